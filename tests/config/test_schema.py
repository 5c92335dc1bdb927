"""The classes of the config: defaults, ranges and rules of their fields, durations, and the number of parameters."""

import ast
import dataclasses
import functools
import itertools
import typing
from pathlib import Path

import jax
import pytest

from gpt_jax.config import (
    DataConfig,
    DistributedConfig,
    FinetuneConfig,
    FinetuneLoopConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PipelineConfig,
    PretrainConfig,
    TaskConfig,
    TokenizerConfig,
    TrainConfig,
    TransferConfig,
    schema,
)
from gpt_jax.config.schema import duration_to_steps, parse_duration
from gpt_jax.errors import UserError
from gpt_jax.model.network import network

PAPER = PretrainConfig()


def error_of(function, *arguments):
    """Returns the message of the `UserError` that a call ends in, which is one line."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


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
def test_durations_become_updates(duration, steps):
    converted = duration_to_steps(duration, "train.duration", batch_size=64, context_length=512, epoch=1000, total=3000)
    assert converted == pytest.approx(steps)


def test_tokens_are_not_a_duration_where_examples_differ():
    with pytest.raises(UserError, match=r"--train\.duration: the number of tokens varies between examples"):
        duration_to_steps("6e6 tokens", "train.duration", batch_size=64, context_length=None, epoch=1000)


@pytest.mark.parametrize("duration", ["", "steps", "5 years", "-3 steps", "1e", "3 epochs 2 steps"])
def test_text_that_is_not_a_duration_is_refused(duration):
    message = error_of(parse_duration, duration, "train.save_every")
    assert message.startswith(f"--train.save-every: '{duration}' is not a duration")


def test_a_percentage_needs_the_length_of_the_run():
    with pytest.raises(UserError, match=r"--train\.eval-every: '5%' is a percentage of the run"):
        duration_to_steps("5%", "train.eval_every", batch_size=1, context_length=1, epoch=1)
    assert "train.duration" in error_of(lambda: TrainConfig(duration="50%"))


# -- defaults ---------------------------------------------------------------------------------------------------------------


def test_defaults_are_the_papers():
    model, optim, train = PAPER.model, PAPER.optim, PAPER.train
    assert (model.num_layers, model.embed_dim, model.num_heads, model.mlp_dim, model.context_length) == (12, 768, 12, 3072, 512)
    assert (model.vocab_size, model.padded_vocab_size, model.head_dim) == (40_478, 40_576, 64)
    assert (model.embed_dropout, model.attention_dropout, model.residual_dropout) == (0.1, 0.1, 0.1)
    assert (optim.peak_lr, optim.warmup, optim.schedule, optim.weight_decay) == (2.5e-4, "2000 steps", "cosine", 0.01)
    assert (train.batch_size, train.duration) == (64, "100 epochs")


def test_the_papers_fine_tuning_settings_are_the_defaults():
    """They are in section 4.1, "Fine-tuning details"; the clipping is the released code's."""
    config = FinetuneConfig()
    assert (config.optim.peak_lr, config.optim.schedule, config.optim.warmup) == (6.25e-5, "linear", "0.2%")
    assert (config.optim.b1, config.optim.b2, config.optim.weight_decay, config.optim.clip_norm) == (0.9, 0.999, 0.01, 1.0)
    assert (config.train.batch_size, config.train.duration) == (32, "3 epochs")
    assert (config.task.lm_weight, config.task.classifier_dropout, config.model.embed_dropout) == (0.5, 0.1, 0.1)


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PAPER.model.num_layers = 2


# -- documentation of the fields --------------------------------------------------------------------------------------------


def sections(kind):
    """Yields a config's dataclass and those of its parts."""
    yield kind
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.default):
            yield from sections(type(field.default))


SECTIONS = sorted({*sections(PretrainConfig), *sections(FinetuneConfig)}, key=lambda kind: kind.__name__)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_says_what_it_is_and_what_it_affects(section):
    names = {kind.__name__ for kind in section.__mro__}
    classes = [node for node in ast.parse(Path(schema.__file__).read_text()).body if isinstance(node, ast.ClassDef)]
    bodies = [node.body for node in classes if node.name in names]
    documented = {
        field.target.id
        for body in bodies
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(field.default):
            assert type(field.default).__doc__, f"{field.name}: its class has no docstring"
        else:
            assert field.name in documented, f"{section.__name__}.{field.name} has no docstring"
            affects = field.metadata.get("affects")
            assert affects in ("result", "input", "speed", "display"), f"{section.__name__}.{field.name} affects {affects}"


def leaves(kind, prefix=""):
    """Yields the section, the field and the dotted name of each field of a config that is not a section itself."""
    for field in dataclasses.fields(kind):
        name = prefix + field.name.rstrip("_").replace("_", "-")
        if dataclasses.is_dataclass(field.default):
            yield from leaves(type(field.default), name + ".")
        else:
            yield kind, field, name


TEXTS = {
    name: (section, field)
    for config in (PretrainConfig, FinetuneConfig)
    for section, field, name in leaves(config)
    if typing.get_origin(hint := typing.get_type_hints(section)[field.name]) is None and hint is str
}
"""The fields that take any text."""
NOT_PATHS = {
    *("data.text-field", "distributed.coordinator", "optim.warmup", "task.label", "task.metric", "task.name"),
    *("profile.steps", "train.duration", "train.eval-every", "train.save-every"),
}


def test_every_field_that_names_a_file_or_folder_is_an_input():
    inputs = {name for name, (_, field) in TEXTS.items() if field.metadata["affects"] == "input"}
    assert TEXTS.keys() - NOT_PATHS == inputs
    assert len(inputs) == 11 - 1  # init.from is a field of both configs
    assert {"data.source", "data.store", "data.tokenizer.path", "init.from", "init.like", "task.path", "task.test"} < inputs


@pytest.mark.parametrize("name", sorted(TEXTS.keys() - NOT_PATHS))
def test_the_home_folder_is_expanded_in_every_path(name, monkeypatch):
    section, field = TEXTS[name]
    monkeypatch.setenv("HOME", "/home/me")
    related = {"init.like": {"from_": "none"}}.get(name, {})

    def kept(value):
        return getattr(section(**{field.name: value} | related), field.name)

    assert kept("~/text s/*.txt") == "/home/me/text s/*.txt"
    assert kept("~") == "/home/me"
    for other in ("", "$HOME/texts", "texts/~", "a~b", "tfds:c4", "none", "~nobody-of-this-name/texts"):
        assert kept(other) == other
    assert error_of(lambda: kept("a\0b")).startswith(f"--{name}: 'a\\x00b' is not a path, because it contains a NUL character")


@pytest.mark.parametrize("name", sorted(TEXTS.keys() - {"train.duration"}))
def test_what_is_not_utf8_is_refused_because_no_json_could_record_it(name):
    section, field = TEXTS[name]
    value = ("caf\udce9",) if isinstance(field.default, tuple) else "caf\udce9"  # as Python decodes an argument in Latin-1
    message = error_of(lambda: section(**{field.name: value}))
    assert message.startswith(f"--{name}: ")
    assert "udce9" in message


@pytest.mark.parametrize("name", sorted(TEXTS.keys() & {"data.text-field", "task.label"}))
def test_other_texts_keep_a_tilde(name):
    section, field = TEXTS[name]
    assert getattr(section(**{field.name: "~/x"}), field.name) == "~/x"


# -- ranges and rules -------------------------------------------------------------------------------------------------------

NAN, INFINITY = float("nan"), float("inf")
REFUSED = {
    "be positive": (0, -1, NAN, INFINITY),
    "be at least 0": (-1, -1e-9, NAN, INFINITY),
    "be in [0, 1)": (-1e-9, 1, 1.5, NAN, INFINITY),
    "be in [0, 2^32)": (-1, 2**32, NAN, INFINITY),
    "be positive, or -1 for all remaining devices": (0, -2),
    "be -1 (all) or a number of blocks": (-2,),
}
"""Values that a field of each range does not take."""

# Numbers without a range, whose rules are written out below.
RULES_OF_THEIR_OWN = {(DistributedConfig, "process_id")}

NUMBERS = [
    pytest.param(section, field, id=f"{section.__name__}.{field.name}")
    for section in SECTIONS
    for field in dataclasses.fields(section)
    if type(field.default) in (int, float)
]


@pytest.mark.parametrize(("section", "field"), NUMBERS)
def test_every_number_has_a_range_and_one_out_of_it_is_refused(section, field):
    within = field.metadata["within"]
    assert (within is None) == ((section, field.name) in RULES_OF_THEIR_OWN)
    integer = type(field.default) is int
    for value in REFUSED[within.words] if within else ():
        if integer and isinstance(value, float):
            continue
        message = error_of(lambda value=value: section(**{field.name: value}))
        assert message == f"--{section.section}.{field.name.replace('_', '-')}: must {within.words}, not {value}"


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (TrainConfig, {"batch_size": "many"}, "--train.batch-size: 'many' is not a whole number"),
        (TrainConfig, {"batch_size": 64.0}, "--train.batch-size: 64.0 is not a whole number"),
        (TrainConfig, {"batch_size": True}, "--train.batch-size: True is not a whole number"),
        (TrainConfig, {"batch_size": 2**63}, "--train.batch-size: 9223372036854775808 is not a number below 2^63"),
        (OptimConfig, {"peak_lr": 10**20}, "--optim.peak-lr: 100000000000000000000 is not a number below 2^63"),
        (TrainConfig, {"duration": 100}, "--train.duration: 100 is not a string"),
        (TrainConfig, {"prompts": "The"}, "--train.prompts: 'The' is not a tuple of strings"),
        (TrainConfig, {"tensorboard": 1}, "--train.tensorboard: 1 is not True or False"),
        (OptimConfig, {"peak_lr": None}, "--optim.peak-lr: None is not a number"),
        (OptimConfig, {"schedule": "cosin"}, "--optim.schedule: 'cosin' is not one of cosine, linear"),
        (MeshConfig, {"data": 2.0}, "--mesh.data: 2.0 is not a whole number"),
        (TransferConfig, {"from_": 3}, "--init.from: 3 is not a string"),
        (DataConfig, {"tokenizer": "bytes"}, "--data.tokenizer: 'bytes' is not a TokenizerConfig"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(section, values, message):
    assert error_of(lambda: section(**values)) == message


def test_a_whole_number_is_a_number():
    assert OptimConfig(clip_norm=1).clip_norm == 1


@pytest.mark.parametrize(
    ("field", "accepted", "refused"),
    [
        ((ModelConfig, "loss_chunk"), 0, -1),
        ((ModelConfig, "num_layers"), 1, 0),
        ((ModelConfig, "embed_dropout"), 0.0, 1.0),
        ((ModelConfig, "init_stddev"), 1e-9, 0.0),
        ((ModelConfig, "layer_norm_epsilon"), 1e-9, 0.0),
        ((TokenizerConfig, "sample_bytes"), 1, 0),
        ((PipelineConfig, "prefetch"), 1, 0),
        ((DataConfig, "validation_share"), 0.0, 1.0),
        ((DataConfig, "max_bytes"), 0, -1),
        ((DataConfig, "shard_bytes"), 1, 0),
        ((DataConfig, "processes"), 0, -1),
        ((OptimConfig, "peak_lr"), 1e-9, 0.0),
        ((OptimConfig, "b1"), 0.0, 1.0),
        ((OptimConfig, "b2"), 0.0, 1.0),
        ((OptimConfig, "epsilon"), 1e-30, 0.0),
        ((OptimConfig, "weight_decay"), 0.0, -0.01),
        ((OptimConfig, "clip_norm"), 0.0, -1.0),
        ((TrainConfig, "batch_size"), 1, 0),
        ((TrainConfig, "seed"), 2**32 - 1, 2**32),
        ((TrainConfig, "grad_accum_steps"), 1, 0),
        ((TrainConfig, "keep_latest"), 1, 0),
        ((TrainConfig, "keep_best"), 0, -1),
        ((FinetuneLoopConfig, "keep_best"), 1, 0),
        ((TrainConfig, "log_seconds"), 0.1, 0.0),
        ((TrainConfig, "eval_windows"), 0, -1),
        ((TrainConfig, "sample_tokens"), 0, -1),
        ((DistributedConfig, "num_processes"), 0, -1),
        ((DistributedConfig, "timeout_seconds"), 1, 0),
        ((TaskConfig, "max_train"), 0, -1),
        ((TaskConfig, "max_tokens"), 0, -1),
        ((TaskConfig, "num_length_buckets"), 0, -1),
        ((TaskConfig, "lm_weight"), 0.0, -1.0),
        ((TaskConfig, "classifier_dropout"), 0.0, 1.0),
    ],
    ids=lambda value: f"{value[0].__name__}.{value[1]}" if isinstance(value, tuple) else str(value),
)
def test_the_ends_of_the_ranges(field, accepted, refused):
    section, name = field
    section(**{name: accepted})
    assert error_of(lambda: section(**{name: refused})).startswith(f"--{section.section}.{name.replace('_', '-')}: must ")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ModelConfig(num_heads=7), "--model.num-heads: 7 does not divide"),
        (
            lambda: ModelConfig(layer_unroll=5),
            "--model.layer-unroll: 5 does not divide model.num-layers 12; use one of 1, 2, 3, 4, 6, 12",
        ),
        (lambda: OptimConfig(warmup="soon"), "--optim.warmup: 'soon' is not a duration"),
        (lambda: TrainConfig(grad_accum_steps=3), "--train.grad-accum-steps: 3 does not divide"),
        (lambda: TrainConfig(save_every="0 steps"), "--train.save-every: must be positive, not '0 steps'"),
        (lambda: FinetuneLoopConfig(keep_best=0), "--train.keep-best: must be positive: the best checkpoint is scored"),
        (lambda: MeshConfig(data=-1, fsdp=-1), "--mesh: only one axis"),
        (lambda: MeshConfig(tensor=0), "--mesh.tensor: must be positive, or -1"),
        (lambda: MeshConfig(slice=-2), "--mesh.slice: must be positive, or -1"),
        (lambda: DistributedConfig("host"), "--distributed.coordinator: 'host' is not HOST:PORT"),
        (lambda: DistributedConfig("host:1"), "--distributed.num-processes: is required with"),
        (lambda: DistributedConfig("host:1", 2), "--distributed.process-id: must be in [0, 2), not -1"),
        (lambda: DistributedConfig("host:1", 2, 2), "--distributed.process-id: must be in [0, 2), not 2"),
        (lambda: PretrainConfig(model=ModelConfig(vocab_size=257)), "--model.vocab-size: the gpt1 tokenizer has 40478"),
        (lambda: TaskConfig(name="cola", train="a.tsv"), "--task.name: 'cola' is a task from the paper"),
        (lambda: TaskConfig(name="cola", labels=("a", "b")), "--task.labels: is only for your own tasks; omit it for"),
        (lambda: TaskConfig(path="GLUE", train="a.tsv"), "--task.path: is only for the paper's tasks"),
        (lambda: TaskConfig(kind="entailment", train="a.tsv"), "--task.texts: entailment takes 2 text columns, not 1"),
        (
            lambda: TaskConfig(kind="multiple_choice", train="a.tsv"),
            "--task.texts: multiple_choice takes a context column and at least two answer columns",
        ),
        (lambda: TransferConfig("RUN", like="gpt1"), "--init.like: requires --init.from none"),
        (lambda: TransferConfig("RUN", blocks=-2), "--init.blocks: must be -1 (all)"),
        (lambda: TransferConfig("none", blocks=2), "--init.blocks: with --init.from none there are no blocks"),
    ],
)
def test_a_broken_rule_names_its_field(build, message):
    assert error_of(build).startswith(message)


# -- the number of parameters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(),
        ModelConfig(vocab_size=257, context_length=16, num_layers=1, embed_dim=8, num_heads=1, mlp_dim=8),
        ModelConfig(vocab_size=256, context_length=20, num_layers=5, embed_dim=12, num_heads=3, mlp_dim=7),
        ModelConfig(kind="lstm"),
        ModelConfig(kind="lstm", vocab_size=257, context_length=16, embed_dim=10, num_heads=4, lstm_units=6),
        ModelConfig(kind="lstm", vocab_size=128, embed_dim=8, lstm_units=24),
    ],
    ids=lambda config: f"{config.kind}-{config.vocab_size}",
)
def test_the_number_of_parameters_is_that_of_the_arrays_without_the_padding_of_the_vocabulary(config):
    arrays = jax.eval_shape(functools.partial(network(config).init, config), jax.random.key(0))
    table = arrays["embedding"]["tokens"]
    assert table.shape == (config.padded_vocab_size, config.embed_dim)
    padding = (config.padded_vocab_size - config.vocab_size) * config.embed_dim
    assert config.num_parameters == sum(array.size for array in jax.tree.leaves(arrays)) - padding


def test_the_papers_model_has_its_number_of_parameters():
    assert ModelConfig().num_parameters == 116_534_784
