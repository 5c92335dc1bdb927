"""Configs as data: overrides with their one-line errors, digests, JSON, fields of earlier versions, and config files."""

import dataclasses
import json
from pathlib import Path

import pytest

from gpt_jax.cli import main
from gpt_jax.config import FinetuneRunConfig, InitConfig, ModelConfig, PretrainConfig, TaskConfig, TransferConfig
from gpt_jax.config.load import (
    DIGEST_VERSION,
    RENAMED_FIELDS,
    apply_overrides,
    config_digest,
    config_folder,
    config_from_dict,
    config_names,
    config_to_dict,
    flatten_config,
    load_config,
)
from gpt_jax.errors import UserError

PAPER = PretrainConfig()


def error_of(function, *arguments):
    """Returns the message of the `UserError` that a call ends in, which is one line."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def override(*arguments):
    return apply_overrides(PAPER, list(arguments), "gpt-jax pretrain test")


def override_error(*arguments):
    return error_of(apply_overrides, PAPER, list(arguments), "gpt-jax pretrain test")


# -- overrides --------------------------------------------------------------------------------------------------------------


def test_overrides_reach_every_kind_of_field():
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


def test_a_rule_across_fields_is_checked_after_all_overrides():
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
        (["--train.batch-size", ""], "--train.batch-size: '' is not a whole number"),
        (["--data.source", "my", "text.txt"], "--data.source: 'my text.txt' is not one value (quote it)"),
        (["--model.remat", "some"], "--model.remat: 'some' is not one of auto, off, dots, full"),
        (["--model.num-heads", "7"], "--model.num-heads: 7 does not divide model.embed-dim 768"),
        (["5", "--train.seed", "1"], "'5' comes before any --field"),
    ],
)
def test_a_wrong_override_is_one_line_that_names_the_field(arguments, message):
    assert override_error(*arguments).startswith(message)


def test_help_lists_fields_with_their_meaning(capsys):
    with pytest.raises(SystemExit) as stop:
        override("--help")
    assert not stop.value.code
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--optim.peak-lr" in shown
    assert "Maximum learning rate of the schedule" in shown
    inputs = "--data.source, --data.store, --data.tokenizer.path, --init.from."
    assert f"Paths to the same content count as the same value: {inputs}" in shown


# -- digests and round trips ------------------------------------------------------------------------------------------------


def with_leaf(config, name, value):
    """Returns a copy of `config` with one field changed, without checking any rule, since only the digest is of interest."""
    section, _, rest = name.replace("-", "_").partition(".")
    copy = object.__new__(type(config))
    copy.__dict__.update(vars(config))
    field = section if section in vars(config) else section + "_"
    copy.__dict__[field] = with_leaf(vars(config)[field], rest, value) if rest else value
    return copy


@pytest.mark.parametrize("name", flatten_config(PAPER))
def test_the_digest_depends_on_result_fields_only(name):
    affects = flatten_config(PAPER)[name][1]
    changed = with_leaf(PAPER, name, "something else")
    assert flatten_config(changed)[name][0] == "something else"
    assert (config_digest(changed) != config_digest(PAPER)) == (affects == "result")


@pytest.mark.parametrize(
    ("name", "affects"),
    [
        ("model.embed-dropout", "result"),
        ("optim.warmup", "result"),
        ("train.batch-size", "result"),
        ("train.seed", "result"),
        ("init.from", "input"),
        ("mesh.fsdp", "speed"),
        ("train.save-every", "speed"),
        ("train.grad-accum-steps", "speed"),
        ("model.remat", "speed"),
        ("train.tensorboard", "display"),
    ],
)
def test_well_known_fields_affect(name, affects):
    assert flatten_config(PAPER)[name][1] == affects


def test_paths_are_not_in_the_digest():
    """Version 1 of the digest changed with the spelling of a path."""
    paths = ("--data.source", "texts/", "--data.store", "stores/a", "--data.tokenizer.path", "bpe", "--init.from", "runs/a")
    assert config_digest(override(*paths)) == config_digest(PAPER)
    assert DIGEST_VERSION == 2


def test_a_config_survives_json():
    config = override("--train.prompts", "x", "--init.from", "RUN", "--model.remat", "full", "--data.verify", "False")
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_a_fine_tunings_config_survives_json_with_its_architecture():
    model = ModelConfig(num_layers=3, vocab_size=40_481)
    config = FinetuneRunConfig(model=model, task=TaskConfig(name="cola"), init=TransferConfig("none", like="RUN"))
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_fields_that_an_old_config_lacks_take_their_defaults():
    values = config_to_dict(dataclasses.replace(PAPER, init=InitConfig("RUN")))
    del values["mesh"], values["train"]["seed"]
    assert config_from_dict(values) == dataclasses.replace(PAPER, init=InitConfig("RUN"))


# -- fields of earlier versions ---------------------------------------------------------------------------------------------

VERSION_1 = [
    ("train", "micro_batches", 4, "grad_accum_steps", 4),
    ("task", "lengths", 3, "num_length_buckets", 3),
    ("task", "order", "random", "bucket_by_length", False),
    ("task", "order", "grouped", "bucket_by_length", True),
]
"""Section, name and value of a field in version 1, and its present name and value."""


def test_every_renamed_field_is_listed_above():
    names = {f"{section}.{name}".replace("_", "-") for section, name, *_ in VERSION_1}
    assert names == RENAMED_FIELDS.keys()
    values = {value for *_, value, _, _ in VERSION_1 if isinstance(value, str)}
    assert values == {value for renamed in RENAMED_FIELDS.values() for value in renamed.values}


@pytest.mark.parametrize(("section", "old_name", "old_value", "name", "value"), VERSION_1)
def test_a_recorded_config_is_translated(section, old_name, old_value, name, value):
    config = FinetuneRunConfig(task=TaskConfig(bucket_by_length=not value) if name == "bucket_by_length" else TaskConfig())
    values = json.loads(json.dumps(config_to_dict(config)))
    del values[section][name]
    values[section][old_name] = old_value
    part = dataclasses.replace(getattr(config, section), **{name: value})
    assert config_from_dict(values) == dataclasses.replace(config, **{section: part}) != config


@pytest.mark.parametrize(
    ("section", "field", "message"),
    [
        ("train", "bach_size", "RUN/config.json: no config field is named 'train.bach-size'; did you mean train.batch-size"),
        ("train", "micro_batch", "RUN/config.json: no config field is named 'train.micro-batch'; "),
        ("model", "order", "RUN/config.json: no config field is named 'model.order'; did you mean model.remat"),
        ("train", "batch_size", "RUN/config.json: --train.batch-size: 'many' is not a whole number"),
        ("optim", "schedule", "RUN/config.json: --optim.schedule: 'many' is not one of cosine, linear"),
        ("train", "prompts", "RUN/config.json: --train.prompts: 'many' is not a tuple of strings"),
        ("modle", {"kind": "lstm"}, "RUN/config.json: no config field is named 'modle.kind'; did you mean model.kind"),
        ("model", 5, "RUN/config.json: no config field is named 'model'; did you mean model."),
    ],
    ids=str,
)
def test_a_mistake_in_a_recorded_config_is_one_line_that_names_its_file(section, field, message):
    values = config_to_dict(PAPER)
    if isinstance(field, str):
        values[section][field] = "many"
    else:
        values[section] = field
    assert error_of(config_from_dict, values, "RUN/config.json").startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pretrain smoke --train.micro-batches 2", "--train.micro-batches: was renamed; use --train.grad-accum-steps"),
        ("pretrain smoke --train.micro_batches=2", "--train.micro-batches: was renamed; use --train.grad-accum-steps"),
        ("finetune finetune/cola --task.lengths 4", "--task.lengths: was renamed; use --task.num-length-buckets"),
        (
            "finetune finetune/cola --task.order random",
            "--task.order: was renamed; use --task.bucket-by-length (grouped is now True, random is now False)",
        ),
    ],
)
def test_an_old_name_on_the_command_line_is_refused_with_the_new_one(tmp_path, capsys, arguments, message):
    assert main([*arguments.split(), "--workdir", str(tmp_path / "run")]) == 2
    assert capsys.readouterr() == ("", f"gpt-jax: {message}\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("TrainConfig(micro_batches=2)", "it was renamed: use grad_accum_steps"),
        ("TaskConfig(lengths=4)", "it was renamed: use num_length_buckets"),
        ("TaskConfig(order='random')", "it was renamed: use bucket_by_length (grouped is now True, random is now False)"),
        ("dataclasses.replace(TrainConfig(), micro_batches=2)", "it was renamed: use grad_accum_steps"),
    ],
)
def test_an_old_name_in_a_config_file_is_refused_with_the_new_one(tmp_path, capsys, argument, message):
    path = tmp_path / "mine.py"
    path.write_text(f"import dataclasses\nfrom gpt_jax.config import *\n\ndef config():\n    return {argument}\n")
    for verb in ("pretrain", "finetune"):
        assert main([verb, str(path), "--workdir", str(tmp_path / "run")]) == 2
        output, error = capsys.readouterr()
        assert output == ""
        assert error.startswith(f"gpt-jax: {path}:5: TypeError: ")
        assert error.endswith(f"; {message}\n")
        assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


# -- config files -----------------------------------------------------------------------------------------------------------


def test_loading_by_name_and_by_path(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from gpt_jax.config import *\ndef config():\n    return PretrainConfig(train=TrainConfig(seed=7))\n")
    assert load_config(str(path)).train.seed == 7
    assert load_config("gpt1") == PAPER
    assert config_folder().samefile(Path(__file__).parents[2] / "configs")
    assert "smoke" in config_names()


def test_the_nearest_config_is_offered_for_a_misspelled_one():
    assert error_of(load_config, "smok").startswith("no config is named 'smok'; did you mean smoke")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def config(:", ":1: SyntaxError: "),
        ("def config():\nreturn 1", ":2: IndentationError: expected an indented block after function definition on line 1"),
        ("x = 1\nimport no_such_module", ":2: ModuleNotFoundError: No module named 'no_such_module'"),
        ("from gpt_jax.config import ModelConfig\nModelConfig(layers=2)", ":2: TypeError: "),
        ("from gpt_jax.config import Config", ":1: ImportError: cannot import name 'Config' from 'gpt_jax.config'"),
        ("x = 1", ": a config file must define config()"),
        ("", ": a config file must define config()"),
        ("from gpt_jax.config import PretrainConfig\nconfig = PretrainConfig()", ": a config file must define config()"),
        ("def config():\n    return {}", ": config() returned a dict, not a PretrainConfig"),
        ("def config(size):\n    return {}", ": TypeError: config() missing 1 required positional argument: 'size'"),
        ("from gpt_jax.config import *\ndef config():\n    return ModelConfig(num_heads=7)", ":3: --model.num-heads: 7 does not"),
        ("def config():\n    return PretrainConfig()", ":2: NameError: name 'PretrainConfig' is not defined"),
        ("def config():\n    raise ValueError('one\\n  two')", ":2: ValueError: one two"),
        ("def config():\n    return helper()\n\ndef helper():\n    return 1 / 0", ":5: ZeroDivisionError: division by zero"),
        ("def config():\n    return config()", ":2: RecursionError: maximum recursion depth exceeded"),
        ("import sys\nsys.exit(0)", ":2: SystemExit: 0; a config file must not end the program"),
        ("def config():\n    raise SystemExit", ":2: SystemExit: ; a config file must not end the program"),
        (b"x = 1\ny = 'caf\xe9'\n", "SyntaxError: (unicode error) 'utf-8' codec can't decode byte 0xe9"),
        (b"x = 1\0\n", "source code "),
        (b"\x7fELF\x02\x01\x01", "S"),
    ],
)
def test_a_config_file_with_a_mistake_is_named_with_the_line(tmp_path, source, message):
    path = tmp_path / "mine.py"
    path.write_bytes(source if isinstance(source, bytes) else source.encode())
    error = error_of(load_config, str(path))
    assert error.startswith(str(path))
    assert message in error.removeprefix(str(path))


def test_a_mistake_in_a_module_that_a_config_imports_is_reported_at_the_import(tmp_path, monkeypatch):
    (tmp_path / "mine_too.py").write_text("def broken(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "mine.py"
    path.write_text("x = 1\nimport mine_too\n")
    assert error_of(load_config, str(path)).startswith(f"{path}:2: SyntaxError: invalid syntax (mine_too.py, line 1)")


def test_what_a_config_file_prints_does_not_mix_with_results(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text("from gpt_jax.config import *\nprint('a')\ndef config():\n    print('b')\n    return PretrainConfig()\n")
    assert load_config(str(path)) == PAPER
    assert capsys.readouterr() == ("", "a\nb\n")


def test_an_absent_config_file_is_named(tmp_path):
    assert error_of(load_config, str(tmp_path / "none.py")) == f"{tmp_path / 'none.py'}: no such config file"
    (tmp_path / "folder.py").mkdir()
    assert error_of(load_config, str(tmp_path / "folder.py")) == f"{tmp_path / 'folder.py'}: a folder, not a config file"


def test_a_config_file_in_the_home_folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("from gpt_jax.config import *\ndef config():\n    return PretrainConfig()\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config("~/mine.py") == PAPER
