"""The configs under configs/: headers that are true, and the paper's settings written out."""

import ast
import io
import math
import re
import shlex
import tokenize

import pytest

from gpt_jax.cli import main
from gpt_jax.config import FinetuneConfig, PretrainConfig, TaskConfig
from gpt_jax.config.load import config_folder, config_names, flatten_config, load_config
from gpt_jax.tasks.registry import ABLATIONS, TASKS

NAMES = config_names()
BENCHMARKS = config_folder().resolve().parent / "docs" / "benchmarks.md"
PAPERS_CONFIGS = ["gpt1", *(name for name in NAMES if name.startswith("finetune/"))]


def source_of(name):
    return (config_folder() / f"{name}.py").read_text()


def header_of(name):
    """Returns the command in a config's docstring as a list of words, the text after "Time:" and the text after "Expect:"."""
    match = re.fullmatch(
        r"[^\n]+\.\n\n    (?P<command>gpt-jax [^\n]+(\\\n[^\n]+)*)\n\n(.+\n\n)?Time: (?P<time>.+)\nExpect: (?P<expect>.+)",
        ast.get_docstring(ast.parse(source_of(name))),
        re.DOTALL,
    )
    assert match, f"{name}: the header does not consist of a sentence, a command, text, a time and a result"
    command = shlex.split(match["command"].replace("\\\n", " "))
    return command, " ".join(match["time"].split()), " ".join(match["expect"].split())


@pytest.mark.parametrize("name", NAMES)
def test_the_command_in_the_header_runs_this_config(name, monkeypatch):
    """Whatever the command runs receives this config, changed in the fields that the command sets and in no other."""
    received = []
    for function in ("gpt_jax.train.pretrain.pretrain", "gpt_jax.tasks.finetune.finetune"):
        monkeypatch.setattr(function, lambda config, workdir, *_: received.append(config))
    command, _, _ = header_of(name)
    assert main(command[1:]) == 0
    (config,) = received
    loaded, changed = flatten_config(load_config(name)), flatten_config(config)
    assert command[2] == name
    assert loaded.keys() == changed.keys()
    options = {word.removeprefix("--") for word in command if word.startswith("--")}
    assert {field for field in loaded if loaded[field] != changed[field]} == options - {"workdir"}


@pytest.mark.parametrize("name", NAMES)
def test_times_name_the_hardware_and_results_are_figures_or_not_measured(name):
    _, time, expect = header_of(name)
    measured = re.search(r"\d (second|minute|hour)s?\b[^.;]* (core|GPU|TPU)s?\b", time)
    assert measured or "not measured" in time
    assert re.search(r"\d", expect) or "not measured" in expect
    if "docs/benchmarks.md" in source_of(name):  # That page must have every measured figure.
        ours = f"{time} {expect.partition('the paper reports')[0]}"
        for figure in re.findall(r"\d+(?:\.\d+)?", ours):
            assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.]\d)", BENCHMARKS.read_text()), figure


def test_the_loss_of_the_smoke_config_starts_at_that_of_equal_probabilities():
    _, _, expect = header_of("smoke")
    assert f"from about {math.log(load_config('smoke').model.vocab_size):.1f} to" in expect


METRICS = {"accuracy": "accuracy", "f1": "F1", "matthews": "Matthews correlation", "pearson": "Pearson correlation"}
TABLES = {"entailment": 2, "multiple_choice": 3, "similarity": 4, "classification": 4}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_the_papers_results_are_those_of_the_registry(task):
    _, _, expect = header_of(f"finetune/{task.name}")
    *_, papers = expect.split("the paper reports ")
    figures, place, rest = re.fullmatch(r"(.+?) on (GLUE's test server|the test split) \((.+)", papers).groups()
    assert place.endswith(task.published_on)
    assert rest.startswith(f"Table {TABLES[task.kind]})")
    assert METRICS[task.metrics[0]] in figures
    found = {group or "": float(figure) for figure, group in re.findall(r"(\d+\.\d)(?: \((\w+)\))?", figures)}
    assert found == {group: figure for (_, group), figure in task.published.items()}


def test_the_papers_result_without_pretraining_is_that_of_table_5():
    _, _, expect = header_of("finetune/cola")
    figure = ABLATIONS["Transformer w/o pre-training"]["cola"]
    assert f"without pre-training, with one seed (docs/benchmarks.md), where the paper reports {figure} on" in expect


SHARED = {
    "embed_dropout": 0.1,
    "attention_dropout": 0.1,
    "residual_dropout": 0.1,
    "OptimConfig.kind": "adam_gpt1",
    "b1": 0.9,
    "b2": 0.999,
    "epsilon": 1e-8,
    "weight_decay": 0.01,
}
PRETRAINING = SHARED | {
    "vocab_size": 40_478,
    "context_length": 512,
    "num_layers": 12,
    "embed_dim": 768,
    "num_heads": 12,
    "mlp_dim": 3072,
    "init_stddev": 0.02,
    "layer_norm_epsilon": 1e-5,
    "TokenizerConfig.kind": "gpt1",
    "peak_lr": 2.5e-4,
    "schedule": "cosine",
    "warmup": "2000 steps",
    "clip_norm": 0.0,
    "batch_size": 64,
    "duration": "100 epochs",
}
FINETUNING = SHARED | {
    "peak_lr": 6.25e-5,
    "schedule": "linear",
    "warmup": "0.2%",
    "clip_norm": 1.0,
    "batch_size": 32,
    "duration": "3 epochs",
    "lm_weight": 0.5,
    "classifier_dropout": 0.1,
}


@pytest.mark.parametrize("name", PAPERS_CONFIGS)
def test_the_papers_settings_are_the_defaults_and_written_out_with_their_sections(name):
    task = name.partition("/")[2].replace("own", "")
    assert load_config(name) == (PretrainConfig() if name == "gpt1" else FinetuneConfig(task=TaskConfig(name=task)))
    source = source_of(name)
    assert source.count("\n") <= 50
    comments = {
        token.start[0]: token.string
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    written = {}
    for call in ast.walk(ast.parse(source)):
        for keyword in call.keywords if isinstance(call, ast.Call) else ():
            if isinstance(keyword.value, ast.Constant) and keyword.arg != "name":
                label = f"{call.func.id}.kind" if keyword.arg == "kind" else keyword.arg
                written[label] = keyword.value.value
                assert re.search("section 4.1|released", comments[keyword.value.lineno]), f"{label}: no source"
    assert written == (PRETRAINING if name == "gpt1" else FINETUNING)
