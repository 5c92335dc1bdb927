"""Studies: which fine-tunings they run and what they leave behind; zero-shot scores along a run; examples/s by padding."""

import dataclasses
import json
import shutil

import pytest

from gpt_jax.cli import main
from gpt_jax.config import FinetuneConfig, TransferConfig
from gpt_jax.config.load import load_config
from gpt_jax.experiments import studies
from gpt_jax.experiments.plots import Curve, Point, curves
from gpt_jax.train import checkpoint
from gpt_jax.train.pretrain import pretrain

PNG = b"\x89PNG\r\n\x1a\n"


def settings(config):
    """What distinguishes the fine-tunings of a study."""
    return config.init.from_, config.init.like, config.init.blocks, config.task.lm_weight


def quiet(line):
    pass


def newest(run):
    """The checkpoint that a study starts from."""
    return str(checkpoint.newest(run, quiet).path)


def test_layers_go_from_nothing_to_all_blocks(pretrained):
    start = newest(pretrained)
    variants = studies.layers(FinetuneConfig(init=TransferConfig(str(pretrained))), quiet)
    assert [(variant.name, variant.x, settings(variant.config)) for variant in variants] == [
        ("nothing", -1, ("none", start, -1, 0.5)),
        ("embeddings", 0, (start, "", 0, 0.5)),
        ("1 block", 1, (start, "", 1, 0.5)),
        ("2 blocks", 2, (start, "", 2, 0.5)),
    ]


@pytest.fixture(scope="module")
def lstm(pretrained, tmp_path_factory):
    """The folder of a pre-trained LSTM."""
    config = load_config(str(pretrained.parent / "tiny.py"))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, kind="lstm", num_layers=1, lstm_units=24))
    folder = tmp_path_factory.mktemp("lstm") / "run"
    pretrain(config, folder)
    return folder


def test_ablations_are_the_rows_of_table_5(pretrained, lstm):
    start, said = newest(pretrained), []
    variants = studies.ablations(FinetuneConfig(init=TransferConfig(str(pretrained))), said.append, str(lstm))
    assert {variant.name: settings(variant.config) for variant in variants} == {
        "full": (start, "", -1, 0.5),
        "w/o pre-training": ("none", start, -1, 0.5),
        "w/o aux LM": (start, "", -1, 0.0),
        "LSTM w/ aux LM": (newest(lstm), "", -1, 0.5),
    }
    assert not said
    assert len(studies.ablations(FinetuneConfig(init=TransferConfig(str(pretrained))), said.append)) == 3
    assert said == ["ablations: the LSTM's row is left out; --lstm RUN names a pre-trained one"]


def test_steps_are_the_checkpoints_of_the_run(pretrained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(pretrained, run)
    shutil.copytree(run / "checkpoints" / "1", run / "checkpoints" / "1.replaced")  # as a save that was cut short leaves it
    variants = studies.steps(FinetuneConfig(init=TransferConfig(str(run))), quiet)
    assert [(variant.name, variant.x) for variant in variants] == [("nothing", 0), ("step 1", 1), ("step 2", 2)]
    assert [variant.config.init.from_ for variant in variants[1:]] == [str(run / "checkpoints" / step) for step in ("1", "2")]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("layers", ["--init.from", "none", "--init.like", "gpt1"], "--init.from: say which pre-trained run"),
        ("layers", ["--init.from", "LSTM"], "is an LSTM, which has no blocks"),
        ("layers", ["--init.from", "RUN", "--init.blocks", "1"], "--init.blocks: the study 'layers' says itself"),
        ("layers", ["--init.from", "RUN", "--lstm", "LSTM"], "--lstm: is for the study 'ablations', not for 'layers'"),
        ("steps", ["--init.from", "RUN", "--lstm", "LSTM"], "--lstm: is for the study 'ablations', not for 'steps'"),
        ("steps", ["--init.from", "RUN/checkpoints/1"], "give a run's folder, not a checkpoint's"),
        ("ablations", ["--init.from", "LSTM", "--lstm", "LSTM"], "is an LSTM; the ablations are those of a Transformer"),
        ("ablations", ["--init.from", "RUN", "--lstm", "RUN"], "is a Transformer; pre-train with --model.kind lstm"),
        ("ablations", ["--init.from", "RUN", "--lstm", "nowhere"], "nowhere: no such folder"),
        ("ablations", ["--init.from", "RUN", "--lstm", "none"], "--lstm: name the run of a pre-trained LSTM"),
        ("steps", ["--init.from", "RUN", "--init.blocks", "9"], "--init.blocks: the checkpoint has 2 blocks, not 9"),
        ("layers", ["--init.from", "RUN", "--seeds", "0"], "--seeds: must be positive, not 0"),
        ("ablations", ["--init.from", "RUN", "--init.blocks", "1"], "--init.blocks: the study 'ablations' says itself"),
        ("ablations", ["--init.from", "RUN", "--task.lm-weight", "0"], "--task.lm-weight: the ablations leave"),
    ],
)
def test_what_cannot_be_studied_is_said_before_anything_is_trained(
    config_file, pretrained, lstm, tmp_path, capsys, name, arguments, message
):
    words = [word.replace("RUN", str(pretrained)).replace("LSTM", str(lstm)) for word in arguments]
    out = tmp_path / "study"
    assert main(["study", config_file, "--name", name, "--workdir", str(out), *words]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gpt-jax: ")]
    assert len(said) == 1
    assert message in said[0]
    assert not out.exists()


def test_curves_are_drawn(tmp_path):
    curves(
        tmp_path / "a" / "plot.png",
        "Title",
        "x",
        "y",
        [Curve("one", [Point(0, 1, 0, 2), Point(1, 2, 1, 3)]), Curve("two", [], 1, 5)],
    )
    # The same points joined by lines or not, over numbers, names, or more names than fit side by side.
    points = [Curve("one", [Point(0, 1, 1, 1), Point(1, 2, 2, 2)])]
    kinds = [{}, {"joined": False}, {"ticks": {0: "a", 1: "b"}}, {"ticks": {x: f"name {x}" for x in range(9)}}]
    for number, kind in enumerate(kinds):
        curves(tmp_path / f"{number}.png", "Title", "", "y", points, **kind)
    assert (tmp_path / "a" / "plot.png").read_bytes().startswith(PNG)
    assert len({(tmp_path / f"{number}.png").read_bytes() for number in range(len(kinds))}) == len(kinds)


@pytest.fixture
def config_file(own_task, tmp_path):
    """A config for a fine-tuning of two updates."""
    file = tmp_path / "own.py"
    file.write_text(
        "from gpt_jax.config import FinetuneConfig, FinetuneLoopConfig, TaskConfig\n"
        "def config():\n"
        f"    task = TaskConfig(train={own_task['train']!r}, validation={own_task['validation']!r}, num_length_buckets=1)\n"
        "    return FinetuneConfig(task=task, train=FinetuneLoopConfig(batch_size=8, duration='2 steps', tensorboard=False))\n"
    )
    return str(file)


@pytest.mark.slow
def test_a_study_leaves_its_scores_and_a_figure(config_file, pretrained, tmp_path, capsys):
    out = tmp_path / "study"
    command = ["study", config_file, "--name", "layers", "--init.from", str(pretrained), "--workdir", str(out), "--seeds", "2"]
    assert main(command) == 0
    found = json.loads((out / "layers.json").read_text())
    assert [row["variant"] for row in found["variants"]] == ["nothing", "embeddings", "1 block", "2 blocks"]
    run = newest(pretrained)
    differs = [(row["init"]["from_"], row["init"]["like"], row["init"]["blocks"], row["lm_weight"]) for row in found["variants"]]
    assert differs == [
        ("none", run, -1, 0.5),
        (run, "", 0, 0.5),
        (run, "", 1, 0.5),
        (run, "", 2, 0.5),
    ]
    for row in found["variants"]:
        folder = out / row["variant"].replace(" ", "-")
        each = [json.loads((folder / f"seed-{seed}" / "result.json").read_text())["validation"] for seed in (0, 1)]
        assert row["validation"]["accuracy"]["values"] == [one["accuracy"] for one in each]
    assert len({row["validation"]["loss"]["median"] for row in found["variants"]}) == 4
    assert (out / "layers.png").read_bytes().startswith(PNG)
    before = (out / "layers.json").read_bytes()
    capsys.readouterr()
    assert main(command) == 0  # all of it is there already
    assert (out / "layers.json").read_bytes() == before
    assert "nothing to do" in capsys.readouterr().err


@pytest.mark.slow
def test_padding_is_timed_three_ways_on_the_same_examples(config_file, pretrained, capsys):
    assert main(["bench", "padding", "--config", config_file, "--init.from", str(pretrained)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "%" in line]
    padding = [float(next(word for word in line.split() if word.endswith("%"))[:-1]) for line in lines]
    assert len(lines) == 3
    assert lines[0].startswith("grouped, 1 lengths")
    assert padding[2] > padding[0]
    assert all(float(line.split()[-1]) > 0 for line in lines)


def test_zero_shot_scores_along_a_run(pretrained, tmp_path, capsys):
    schemas = tmp_path / "schemas.txt"
    schemas.write_text(
        "The bee landed on the flower because it had pollen.\nit\nThe bee,The flower\nThe flower\n\n"
        "The dog ran from the cat because he was afraid.\nhe\nThe dog,The cat\nThe dog\n\n"
    )
    out = tmp_path / "out"
    # Both checkpoints of the run; the sentences are cut to the model's context of 32 bytes.
    assert main(["evaluate", str(pretrained), "--zero-shot", f"dprd={schemas}", "--every-checkpoint", "--out", str(out)]) == 0
    found = json.loads((out / "zero_shot.json").read_text())
    assert [(row["step"], row["probe"], row["n"]) for row in found] == [(1, "dprd", 2), (2, "dprd", 2)]
    for row in found:
        assert row["normalized"] == pytest.approx((row["accuracy"] - 0.5) / (0.7641 - 0.5))
    assert (out / "zero_shot.png").read_bytes().startswith(PNG)
    capsys.readouterr()
    # Two at once, each under its own path; a figure of something else does not stay.
    single = str(pretrained / "checkpoints" / "2")
    probe = ["--zero-shot", f"dprd={schemas}"]
    assert main(["evaluate", single, str(pretrained), single, *probe, "--out", str(out)]) == 0
    both = json.loads((out / "zero_shot.json").read_text())
    assert [(row["path"], row["step"], row["accuracy"]) for row in both] == [
        (single, 2, found[1]["accuracy"]),
        (str(pretrained), 2, found[1]["accuracy"]),
    ]
    assert not (out / "zero_shot.png").exists()
    shown = capsys.readouterr()
    assert "DPRD test: 2 rows read, 2 used" in shown.err
    assert "dprd: 76.4, Peng, Khashabi and Roth (2015)" in shown.out
    assert shown.out.splitlines()[-1] == f"{out}/zero_shot.json"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "RUN/checkpoints/1", "--text", "a.txt"], "one checkpoint at a time"),
        (["RUN", "--zero-shot", "wcs=a"], "did you mean wsc"),
        (["RUN", "--zero-shot", "dprd"], "--zero-shot dprd: DPRD is read from a file: write dprd=FILE"),
        (["RUN", "--zero-shot", "dprd=nowhere"], "--zero-shot dprd: nowhere: No such file or directory; give a file of"),
        (["RUN", "--zero-shot", "cola=nowhere"], "--zero-shot cola: there is no folder 'nowhere'"),
        (["RUN", "--zero-shot", "dprd=a", "--zero-shot", "dprd=b"], "--zero-shot: dprd is given more than once"),
        (["RUN", "--zero-shot", "dprd=a", "--split", "test"], "--split: is of a task; with --zero-shot, leave it out"),
        (["RUN", "--text", "a.txt", "--split", "test"], "--split: is of a task; with --text, leave it out"),
        (["RUN", "--zero-shot", "dprd=a", "--max-bytes", "9"], "--max-bytes: goes with --text"),
        (["RUN", "--max-bytes", "9"], "--max-bytes: goes with --text"),
        (["RUN", "--text", "a.txt", "--zero-shot", "dprd=a"], "different measurements"),
        (["RUN", "--text", "a.txt", "--every-checkpoint"], "--every-checkpoint goes with --zero-shot"),
    ],
)
def test_arguments_of_evaluate_that_do_not_go_together(pretrained, capsys, arguments, message):
    assert main(["evaluate", *(word.replace("RUN", str(pretrained)) for word in arguments)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
