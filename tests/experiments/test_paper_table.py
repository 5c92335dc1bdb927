"""`gpt-jax report --paper`: measured scores beside the paper's, and the settings in which a run differs."""

import dataclasses
import json

import pytest

from gpt_jax.config import (
    FinetuneConfig,
    FinetuneLoopConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    TaskConfig,
    TransferConfig,
)
from gpt_jax.config.load import config_to_dict
from gpt_jax.errors import UserError
from gpt_jax.experiments.paper_table import print_paper_table

PAPERS_MODEL = ModelConfig(vocab_size=40_478 + 3, compute_dtype="float32")  # with start, delimiter and extract
PAPERS_INPUT = {"bucket_by_length": False, "truncation": "released"}


def write_run(folder, name, result, *, model=PAPERS_MODEL, init="runs/gpt1", **changes):
    """Writes the folder of a finished fine-tuning with the paper's settings, except for `changes`."""
    task = changes.pop("task", TaskConfig(name=name, **PAPERS_INPUT))
    config = FinetuneConfig(model=model, init=TransferConfig(from_=init), task=task, **changes)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"commit": "", "config": config_to_dict(config)}))
    (folder / "result.json").write_text(json.dumps({"task": name} | result))
    return folder


def shown(capsys, *runs):
    print_paper_table(runs)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 130
    return lines


def cells(lines, number):
    """Returns the cells of one run's lines of the table, whose columns are at least two spaces apart."""
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines if line.startswith(f"[{number}]  ")]


def differences(lines, path):
    """Returns the text after "PATH: " as one line."""
    start = next(i for i, line in enumerate(lines) if f" {path}:" in line)
    stop = next((i for i in range(start + 1, len(lines)) if not lines[i].startswith("    ")), len(lines))
    return " ".join(line.strip() for line in lines[start:stop]).split(": ", 1)[1]


def test_a_score_stands_beside_the_papers_score_for_the_same_row(tmp_path, capsys):
    result = {"step": 801, "seconds": 1.5, "validation": {"matthews": 0.1234, "accuracy": 0.6918}}
    run = write_run(tmp_path / "none", "cola", result, init="none")
    lines = shown(capsys, run)
    assert cells(lines, 1) == [
        ["[1]", "CoLA", "Transformer w/o pre-training", "matthews", "12.3", "dev split", "18.9", "test server"],
        ["[1]", "CoLA", "Transformer w/o pre-training", "accuracy", "69.2", "dev split", "-"],
    ]
    assert differences(lines, run) == "none"


LSTM = dataclasses.replace(PAPERS_MODEL, kind="lstm", num_layers=1)
NO_LM = TaskConfig(name="rte", lm_weight=0.0, **PAPERS_INPUT)


@pytest.mark.parametrize(
    ("changes", "row", "paper"),
    [
        ({}, "Transformer w/ aux LM (full)", ["56.0", "test server"]),
        ({"init": "none"}, "Transformer w/o pre-training", ["53.8", "test server"]),
        ({"task": NO_LM}, "Transformer w/o aux LM", ["54.4", "test server"]),
        ({"model": LSTM}, "LSTM w/ aux LM", ["54.6", "test server"]),
        ({"model": LSTM, "task": NO_LM}, "LSTM w/o aux LM", ["-"]),
        ({"init": "none", "task": NO_LM}, "Transformer w/o pre-training or aux LM", ["-"]),
    ],
)
def test_rows_of_table_5(tmp_path, capsys, changes, row, paper):
    lines = shown(capsys, write_run(tmp_path / "run", "rte", {"validation": {"accuracy": 0.5}}, **changes))
    assert cells(lines, 1) == [["[1]", "RTE", row, "accuracy", "50.0", "dev split", *paper]]
    assert "lm-weight" not in "\n".join(lines)
    assert "lstm-units" not in "\n".join(lines)
    assert "num-layers" not in "\n".join(lines)


def test_groups_and_test_splits(tmp_path, capsys):
    validation = {"accuracy": 0.5, "accuracy/middle": 0.625, "accuracy/high": 0.4, "loss": 3.0}
    run = write_run(tmp_path / "race", "race", {"validation": validation, "test": {"accuracy/high": 0.3}})
    assert [line[3:] for line in cells(shown(capsys, run), 1)] == [
        ["accuracy", "50.0", "dev split", "59.0", "test split"],
        ["accuracy/middle", "62.5", "dev split", "62.9", "test split"],
        ["accuracy/high", "40.0", "dev split", "57.4", "test split"],
        ["accuracy/high", "30.0", "test split", "57.4", "test split"],
    ]


def test_several_seeds_show_their_median_and_spread(tmp_path, capsys):
    spread = {"median": 0.2, "mean": 0.25, "min": 0.1, "max": 0.45, "std": 0.18, "values": [0.45, 0.1, 0.2]}
    folder = write_run(tmp_path / "seeds", "cola", {"seeds": [0, 1, 2], "validation": {"matthews": spread}})
    lines = shown(capsys, folder)
    assert cells(lines, 1)[0][3:5] == ["matthews", "20.0 (10.0 to 45.0)"]
    assert differences(lines, f"{folder} (3 seeds)") == "init.from runs/gpt1 (paper: 100 epochs of BooksCorpus)"


def test_settings_that_differ_from_the_papers_are_listed(tmp_path, capsys):
    model = dataclasses.replace(PAPERS_MODEL, num_layers=4, embed_dim=384, num_heads=6, remat="full", lstm_units=7)
    run = write_run(
        tmp_path / "small",
        "sst2",
        {"validation": {"accuracy": 0.8}},
        model=model,
        optim=OptimConfig(peak_lr=1e-4, schedule="linear", warmup="0.2%", clip_norm=1.0),
        train=FinetuneLoopConfig(batch_size=16, duration="3 epochs", seed=7, eval_every="1 epochs", keep_latest=2),
        task=TaskConfig(name="sst2", path="glue", max_train=8000),
    )
    assert differences(shown(capsys, run), run) == (
        "init.from runs/gpt1 (paper: 100 epochs of BooksCorpus), model.num-layers 4 (paper 12), model.embed-dim 384 (paper 768), "
        "model.num-heads 6 (paper 12), optim.peak-lr 0.0001 (paper 6.25e-05), train.batch-size 16 (paper 32), "
        "task.max-train 8000 (paper all), task.truncation longest (paper released), task.bucket-by-length True (paper False)"
    )


def test_the_dtype_that_auto_chose_is_compared(tmp_path, capsys):
    """On a CPU, "auto" means float32, as in the paper, and elsewhere bfloat16."""
    model = dataclasses.replace(PAPERS_MODEL, compute_dtype="auto")
    for platform, expected in (("cpu", "none"), ("gpu", "model.compute-dtype bfloat16 (paper float32)")):
        run = write_run(tmp_path / platform, "rte", {"validation": {"accuracy": 0.5}}, init="none", model=model)
        stored = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(stored | {"platform": platform}))
        assert differences(shown(capsys, run), run) == expected


EIGHT = {
    "cola": {"matthews": 0.4},
    "sst2": {"accuracy": 0.9},
    "mrpc": {"f1": 0.8, "accuracy": 0.6},
    "stsb": {"pearson": 0.8, "spearman": 0.7},
    "qqp": {"f1": 0.7, "accuracy": 0.9},
    "mnli": {"accuracy": 0.5, "accuracy/matched": 0.9, "accuracy/mismatched": 0.7},
    "qnli": {"accuracy": 0.8},
    "rte": {"accuracy": 0.6},
}


def test_averages_are_printed_where_every_part_was_measured(tmp_path, capsys):
    runs = [write_run(tmp_path / name, name, {"validation": scores}) for name, scores in EIGHT.items()]
    lines = shown(capsys, *runs)
    full = "Transformer w/ aux LM (full), dev split"
    table_5 = (40 + 90 + 80 + 80 + 70 + 80 + 80 + 60) / 8
    glue = (40 + 90 + 70 + 75 + 80 + 80 + 80 + 60) / 8
    assert [line for line in lines if " mean " in f" {line}"] == [
        f"mean of eight tasks as in Table 5, {full}: {table_5:.1f} (paper 74.7, test server)",
        f"official GLUE mean except WNLI, {full}: {glue:.1f} (paper 72.8 with WNLI, test server)",
    ]
    assert cells(lines, 6)[0][3:] == ["accuracy", "50.0", "dev split", "81.8", "test server"]
    assert not [line for line in shown(capsys, *runs[1:]) if " mean " in f" {line}"]


def test_the_same_pretrained_model_is_recognized_under_any_path(tmp_path, capsys):
    """Runs record the fingerprint of the checkpoint that they started from; earlier versions recorded only its path."""

    def means(fingerprint):
        folder = tmp_path / fingerprint("name")
        runs = [
            write_run(folder / name, name, {"validation": scores}, init=f"runs/{name}/gpt1") for name, scores in EIGHT.items()
        ]
        for run in runs:
            stored = json.loads((run / "config.json").read_text())
            start = {"step": 9, "fingerprint": fingerprint(run.name), "training": "t"}
            (run / "config.json").write_text(json.dumps(stored | {"init": start}))
        return [line for line in shown(capsys, *runs) if " mean " in f" {line}"]

    assert len(means(lambda name: "same")) == 2
    assert not means(lambda name: name)


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("result.json", {"validation": []}, "'validation' is a list, not an object"),
        ("result.json", {"validation": {"matthews": "high"}}, "'validation.matthews' is a string, not a floating-point number"),
        ("result.json", {"validation": {"matthews": {"values": 5}}}, "'validation.matthews' is an object, not a floating-point"),
        ("result.json", {"seeds": 5}, "'seeds' is a number, not a list"),
        ("result.json", [], ":1: a list, not a JSON object"),
        ("config.json", {}, "'config' is missing"),
        ("config.json", {"config": []}, "'config' is a list, not an object"),
        ("config.json", {"config": {}, "platform": 5}, "'platform' is a number, not a string"),
        ("config.json", {"config": {"task": 5}}, ": no config field is named 'task'"),
        ("config.json", {"config": {}, "init": {"step": 5}}, "'init.fingerprint' is missing"),
    ],
)
def test_a_file_with_bad_values_is_one_line(tmp_path, file, content, problem):
    run = write_run(tmp_path / "run", "cola", {"validation": {"matthews": 0.5}})
    (run / file).write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        print_paper_table([run])
    assert str(error.value).startswith(f"{run / file}:")
    assert problem in str(error.value)


def test_no_average_is_taken_over_two_runs_of_one_task(tmp_path, capsys):
    """Either of them could be meant."""
    runs = [write_run(tmp_path / name, name, {"validation": scores}) for name, scores in EIGHT.items()]
    again = write_run(tmp_path / "again", "rte", {"validation": {"accuracy": 0.9}})
    assert not [line for line in shown(capsys, *runs, again) if " mean " in f" {line}"]


def test_averages_are_not_taken_over_runs_of_different_rows(tmp_path, capsys):
    runs = [
        write_run(tmp_path / name, name, {"validation": scores}, init="none" if name == "rte" else "runs/gpt1")
        for name, scores in EIGHT.items()
    ]
    assert not [line for line in shown(capsys, *runs) if " mean " in f" {line}"]


def test_folders_without_a_finished_fine_tuning_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"^[^\n]*nothing: has no result\.json[^\n]*fine-tuning runs$"):
        print_paper_table([tmp_path / "nothing"])
    pretrained = tmp_path / "pretrained"
    pretrained.mkdir()
    (pretrained / "result.json").write_text("{}")
    (pretrained / "config.json").write_text(json.dumps({"config": config_to_dict(PretrainConfig())}))
    with pytest.raises(UserError, match=r"^[^\n]*pretrained: is a pre-training run[^\n]*$"):
        print_paper_table([pretrained])
    own = write_run(tmp_path / "own", "", {"validation": {"accuracy": 1.0}}, task=TaskConfig(train="my.tsv"))
    with pytest.raises(UserError, match=r"^[^\n]*own: is a run of your own task[^\n]*$"):
        print_paper_table([own])
