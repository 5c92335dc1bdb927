"""Configs: durations, rules, overrides with their one-line errors, digests, and config files."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from gpt_jax import config as configs
from gpt_jax.config import (
    FinetuneConfig,
    FinetuneRunConfig,
    InitConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    TaskConfig,
    TrainConfig,
    TransferConfig,
)
from gpt_jax.config.load import (
    apply_overrides,
    config_digest,
    config_from_dict,
    config_names,
    config_to_dict,
    flatten_config,
    load_config,
)
from gpt_jax.errors import Preempted, TrainingError, UserError, nearest

PAPER = PretrainConfig()


def error_of(function: Any, *arguments: Any) -> str:
    """The message of the `UserError` that a call ends in, which is one line."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def override(*arguments: str) -> PretrainConfig:
    return apply_overrides(PAPER, list(arguments), "gpt-jax pretrain test")


def override_error(*arguments: str) -> str:
    return error_of(apply_overrides, PAPER, list(arguments), "gpt-jax pretrain test")


# -- errors -----------------------------------------------------------------------------------------------------------------


def test_exit_codes() -> None:
    assert (UserError.exit_code, TrainingError.exit_code, Preempted.exit_code) == (2, 1, 42)


def test_nearest_offers_close_names_or_all() -> None:
    assert nearest("smok", ["smoke", "gpt1"]) == "did you mean smoke?"
    assert nearest("xyz", ["smoke", "gpt1"]) == "known: smoke, gpt1"


# -- durations --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        ("2000", 2000),
        ("2000 steps", 2000),
        ("1 step", 1),
        ("3 epochs", 46.875),  # 3 * 1000 / 64
        ("0.5 epochs", 7.8125),
        ("1 EPOCH", 15.625),
        ("6e6 tokens", 6e6 / (64 * 512)),
        ("32768 tokens", 1),
        ("0.2%", 6),  # of 3000
        ("0.7%", 21),
        ("100 %", 3000),
    ],
)
def test_durations_become_updates(duration: str, steps: float) -> None:
    found = configs.steps_of(duration, "train.duration", batch_size=64, context_length=512, epoch=1000, total=3000)
    assert found == pytest.approx(steps)


def test_tokens_measure_nothing_where_examples_differ() -> None:
    with pytest.raises(UserError, match=r"--train\.duration: examples differ in their number of tokens"):
        configs.steps_of("6e6 tokens", "train.duration", batch_size=64, context_length=None, epoch=1000)


@pytest.mark.parametrize("duration", ["", "steps", "5 years", "-3 steps", "1e", "3 epochs 2 steps"])
def test_what_is_no_duration_is_refused(duration: str) -> None:
    message = error_of(configs.parse_duration, duration, "train.save_every")
    assert message.startswith(f"--train.save-every: '{duration}' is no duration")


def test_a_share_needs_a_whole() -> None:
    with pytest.raises(UserError, match=r"--train\.eval-every: '5%' is a share of the run"):
        configs.steps_of("5%", "train.eval_every", batch_size=1, context_length=1, epoch=1)
    assert "train.duration" in error_of(lambda: TrainConfig(duration="50%"))


# -- rules ------------------------------------------------------------------------------------------------------------------


def test_defaults_are_the_papers() -> None:
    model, optim, train = PAPER.model, PAPER.optim, PAPER.train
    assert (model.num_layers, model.embed_dim, model.num_heads, model.mlp_dim, model.context_length) == (12, 768, 12, 3072, 512)
    assert (model.vocab_size, model.padded_vocab_size, model.head_dim) == (40_478, 40_576, 64)
    assert (model.embed_dropout, model.attention_dropout, model.residual_dropout) == (0.1, 0.1, 0.1)
    assert (optim.peak_lr, optim.warmup, optim.schedule, optim.weight_decay) == (2.5e-4, "2000 steps", "cosine", 0.01)
    assert (train.batch_size, train.duration) == (64, "100 epochs")


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: ModelConfig(num_heads=7), "--model.num-heads: 7 does not divide"),
        (lambda: ModelConfig(loss_chunk=-1), "--model.loss-chunk: must be 0 (by device) or positive"),
        (lambda: ModelConfig(embed_dropout=1.0), "--model.embed-dropout: "),
        (lambda: OptimConfig(peak_lr=float("inf")), "--optim.peak-lr: "),
        (lambda: OptimConfig(warmup="soon"), "--optim.warmup: "),
        (lambda: TrainConfig(grad_accum_steps=3), "--train.grad-accum-steps: 3 does not divide"),
        (lambda: TrainConfig(save_every="0 steps"), "--train.save-every: must be positive"),
        (lambda: TrainConfig(seed=2**32), "--train.seed: "),
        (lambda: MeshConfig(data=-1, fsdp=-1), "--mesh: only one axis"),
        (lambda: MeshConfig(tensor=0), "--mesh.tensor: "),
        (lambda: PretrainConfig(mesh=MeshConfig(tensor=5)), "--mesh.tensor: 5 does not divide model.num-heads 12"),
        (lambda: PretrainConfig(model=ModelConfig(vocab_size=257)), "--model.vocab-size: the gpt1 tokenizer has 40478"),
        (lambda: TaskConfig(name="cola", train="a.tsv"), "--task.name: 'cola' is a task of the paper"),
        (lambda: TaskConfig(name="cola", labels=("a", "b")), "--task.labels: describes a task of your own"),
        (lambda: TaskConfig(path="GLUE", train="a.tsv"), "--task.path: is for the paper's tasks"),
        (lambda: TaskConfig(kind="entailment", train="a.tsv"), "--task.texts: entailment takes 2 text columns, not 1"),
        (lambda: TaskConfig(kind="multiple_choice", train="a.tsv"), "--task.texts: multiple_choice takes the context's column"),
        (lambda: TaskConfig(lm_weight=-1.0), "--task.lm-weight: must not be negative"),
        (lambda: TransferConfig("RUN", like="gpt1"), "--init.like: goes with --init.from none"),
        (lambda: TransferConfig("RUN", blocks=-2), "--init.blocks: must be -1 (all)"),
    ],
)
def test_a_broken_rule_names_its_field(build: Any, field: str) -> None:
    assert error_of(build).startswith(field)


def test_the_papers_fine_tuning_settings_are_the_defaults() -> None:
    """Section 4.1, "Fine-tuning details", and the released code's clipping."""
    config = FinetuneConfig()
    assert (config.optim.peak_lr, config.optim.schedule, config.optim.warmup) == (6.25e-5, "linear", "0.2%")
    assert (config.optim.b1, config.optim.b2, config.optim.weight_decay, config.optim.clip_norm) == (0.9, 0.999, 0.01, 1.0)
    assert (config.train.batch_size, config.train.duration) == (32, "3 epochs")
    assert (config.task.lm_weight, config.task.classifier_dropout, config.model.embed_dropout) == (0.5, 0.1, 0.1)


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PAPER.model.num_layers = 2  # type: ignore[misc]


# -- overrides --------------------------------------------------------------------------------------------------------------


def test_overrides_reach_every_kind_of_field() -> None:
    changed = override(
        "--optim.peak-lr", "1e-4", "--model.attention=plain", "--data.verify", "False", "--mesh.data", "-1",
        "--train.prompts", "a b", "c", "--init.from", "RUN", "--train.batch_size", "32",
    )  # fmt: skip
    assert changed.optim.peak_lr == 1e-4
    assert changed.model.attention == "plain"
    assert changed.data.verify is False
    assert changed.mesh.data == -1
    assert changed.train.prompts == ("a b", "c")
    assert changed.init.from_ == "RUN"
    assert changed.train.batch_size == 32
    assert changed.model.num_layers == PAPER.model.num_layers


def test_a_rule_across_fields_is_judged_after_all_overrides() -> None:
    changed = override("--model.num-heads", "16", "--model.embed-dim", "1024")
    assert (changed.model.num_heads, changed.model.embed_dim) == (16, 1024)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optim.peek-lr", "1"], "--optim.peek-lr: no such field; did you mean optim.peak-lr"),
        (["--modle.num-layers", "2"], "--modle.num-layers: no such field; did you mean model.num-layers"),
        (["--model", "2"], "--model: no such field; it is a section"),
        (["--optim.peak-lr", "fast"], "--optim.peak-lr: 'fast' is not a number"),
        (["--train.batch-size", "6.5"], "--train.batch-size: '6.5' is not a whole number"),
        (["--data.verify", "maybe"], "--data.verify: 'maybe' is not True or False"),
        (["--train.batch-size"], "--train.batch-size: needs a value"),
        (["--model.remat", "some"], "--model.remat: 'some' is not one of off, dots, full"),
        (["--model.num-heads", "7"], "--model.num-heads: 7 does not divide model.embed-dim 768"),
        (["5", "--train.seed", "1"], "'5' stands before any --field"),
    ],
)
def test_a_wrong_override_is_one_line_that_names_the_field(arguments: list[str], message: str) -> None:
    assert override_error(*arguments).startswith(message)


def test_help_lists_fields_with_their_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        override("--help")
    assert not stop.value.code
    shown = capsys.readouterr().out
    assert "--optim.peak-lr" in shown
    assert "Learning rate at the top of the schedule" in " ".join(shown.replace("│", " ").split())


# -- digests and round trips ------------------------------------------------------------------------------------------------


def with_leaf(config: Any, name: str, value: Any) -> Any:
    """`config` with one leaf changed, past the rules: only the digest is of interest."""
    section, _, rest = name.replace("-", "_").partition(".")
    copy = object.__new__(type(config))
    copy.__dict__.update(vars(config))
    field = section if section in vars(config) else section + "_"
    copy.__dict__[field] = with_leaf(vars(config)[field], rest, value) if rest else value
    return copy


@pytest.mark.parametrize("name", flatten_config(PAPER))
def test_the_digest_depends_on_result_fields_only(name: str) -> None:
    effect = flatten_config(PAPER)[name][1]
    changed = with_leaf(PAPER, name, "something else")
    assert flatten_config(changed)[name][0] == "something else"
    assert (config_digest(changed) != config_digest(PAPER)) == (effect == "result")


@pytest.mark.parametrize(
    ("name", "effect"),
    [
        ("model.embed-dropout", "result"),
        ("optim.warmup", "result"),
        ("train.batch-size", "result"),
        ("train.seed", "result"),
        ("init.from", "result"),
        ("mesh.fsdp", "speed"),
        ("train.save-every", "speed"),
        ("train.grad-accum-steps", "speed"),
        ("model.remat", "speed"),
        ("train.tensorboard", "display"),
    ],
)
def test_effects_of_well_known_fields(name: str, effect: str) -> None:
    assert flatten_config(PAPER)[name][1] == effect


def test_a_config_survives_json() -> None:
    config = override("--train.prompts", "x", "--init.from", "RUN", "--model.remat", "full", "--data.verify", "False")
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_a_fine_tunings_config_survives_json_with_its_architecture() -> None:
    model = ModelConfig(num_layers=3, vocab_size=40_481)
    config = FinetuneRunConfig(model=model, task=TaskConfig(name="cola"), init=TransferConfig("none", like="RUN"))
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_fields_that_an_old_config_lacks_take_their_defaults() -> None:
    values = config_to_dict(dataclasses.replace(PAPER, init=InitConfig("RUN")))
    del values["mesh"], values["train"]["seed"]
    assert config_from_dict(values) == dataclasses.replace(PAPER, init=InitConfig("RUN"))


# -- config files -----------------------------------------------------------------------------------------------------------


def test_loading_by_name_and_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("from gpt_jax.config import *\ndef config():\n    return PretrainConfig(train=TrainConfig(seed=7))\n")
    assert load_config(str(path)).train.seed == 7
    assert load_config("gpt1") == PAPER
    assert "smoke" in config_names()


def test_a_misspelt_config_is_offered_the_nearest() -> None:
    assert error_of(load_config, "smok").startswith("no config is named 'smok'; did you mean smoke")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def config(:", "SyntaxError"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("from gpt_jax.config import ModelConfig\nModelConfig(layers=2)", "layers"),
        ("x = 1", "defines config()"),
        ("def config():\n    return {}", "config() returned a dict, not a PretrainConfig"),
        ("from gpt_jax.config import ModelConfig\ndef config():\n    return ModelConfig(num_heads=7)", "--model.num-heads"),
        ("from gpt_jax.config import ModelConfig\ndef config():\n    return ModelConfig(layers=2)", "layers"),
    ],
)
def test_a_config_file_with_a_mistake_is_named(tmp_path: Path, source: str, message: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(source)
    assert message in error_of(load_config, str(path))


def test_an_absent_config_file_is_named(tmp_path: Path) -> None:
    assert error_of(load_config, str(tmp_path / "none.py")) == f"{tmp_path / 'none.py'}: no such config file"
