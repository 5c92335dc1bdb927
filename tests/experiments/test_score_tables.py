"""Tables as text, zero-shot scores along a run, and the arguments of `gpt-jax evaluate`."""

import json

import pytest

from gpt_jax.cli import main
from gpt_jax.experiments.score_tables import format_table

PNG = b"\x89PNG\r\n\x1a\n"


def test_zero_shot_scores_along_a_run(pretrained, tmp_path, capsys):
    schemas = tmp_path / "schemas.txt"
    schemas.write_text(
        "The bee landed on the flower because it had pollen.\nit\nThe bee,The flower\nThe flower\n\n"
        "The dog ran from the cat because he was afraid.\nhe\nThe dog,The cat\nThe dog\n\n"
    )
    out = tmp_path / "out"
    # Both checkpoints of the run are scored. The sentences are cut to the model's context of 32 bytes.
    assert main(["evaluate", str(pretrained), "--zero-shot", f"dprd={schemas}", "--every-checkpoint", "--out", str(out)]) == 0
    scores = json.loads((out / "zero_shot.json").read_text())
    assert [(row["step"], row["probe"], row["n"]) for row in scores] == [(1, "dprd", 2), (2, "dprd", 2)]
    for row in scores:
        assert row["normalized"] == pytest.approx((row["accuracy"] - 0.5) / (0.7641 - 0.5))
    assert (out / "zero_shot.png").read_bytes().startswith(PNG)
    capsys.readouterr()
    # Two runs are scored in one call, each under its own path. The figure of the earlier call is deleted.
    single = str(pretrained / "checkpoints" / "2")
    probe = ["--zero-shot", f"dprd={schemas}"]
    assert main(["evaluate", single, str(pretrained), single, *probe, "--out", str(out)]) == 0
    both = json.loads((out / "zero_shot.json").read_text())
    assert [(row["path"], row["step"], row["accuracy"]) for row in both] == [
        (single, 2, scores[1]["accuracy"]),
        (str(pretrained), 2, scores[1]["accuracy"]),
    ]
    assert not (out / "zero_shot.png").exists()
    captured = capsys.readouterr()
    assert "DPRD test: 2 rows read, 2 used" in captured.err
    assert "dprd: 76.4, Peng, Khashabi and Roth (2015)" in captured.out
    assert captured.out.splitlines()[-1] == f"{out}/zero_shot.json"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "RUN/checkpoints/1", "--text", "a.txt"], "one checkpoint at a time"),
        (["RUN", "--zero-shot", "wcs=a"], "did you mean wsc"),
        (["RUN", "--zero-shot", "dprd"], "--zero-shot dprd: DPRD is read from a file: write dprd=FILE"),
        (["RUN", "--zero-shot", "dprd=nowhere"], "--zero-shot dprd: nowhere: No such file or directory"),
        (["RUN", "--zero-shot", "cola=nowhere"], "--zero-shot cola: there is no folder 'nowhere'"),
        (["RUN", "--zero-shot", "dprd=a", "--zero-shot", "dprd=b"], "--zero-shot: dprd is given more than once"),
        (["RUN", "--zero-shot", "dprd=a", "--split", "test"], "--split: applies to tasks; with --zero-shot, leave it out"),
        (["RUN", "--text", "a.txt", "--split", "test"], "--split: applies to tasks; with --text, leave it out"),
        (["RUN", "--zero-shot", "dprd=a", "--max-bytes", "9"], "--max-bytes: requires --text"),
        (["RUN", "--max-bytes", "9"], "--max-bytes: requires --text"),
        (["RUN", "--text", "a.txt", "--zero-shot", "dprd=a"], "different measurements"),
        (["RUN", "--text", "a.txt", "--every-checkpoint"], "--every-checkpoint: requires --zero-shot"),
    ],
)
def test_arguments_of_evaluate_that_do_not_go_together(pretrained, capsys, arguments, message):
    assert main(["evaluate", *(word.replace("RUN", str(pretrained)) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_table_is_aligned():
    rows = [("name", "steps", "loss"), ("a long name", 5, "1.25"), ("b", 1000, "-10.5")]
    assert format_table(rows).split("\n") == [
        "name         steps   loss",
        "a long name      5   1.25",
        "b             1000  -10.5",
    ]


def test_the_columns_of_a_table_have_sides():
    rows = [("a", "bb", "c"), ("dd", "e", "ff"), ("", "", "")]
    assert format_table(rows, "><<").split("\n") == [" a  bb  c", "dd  e   ff", ""]


def test_rows_of_a_table_have_as_many_cells_as_the_header():
    with pytest.raises(ValueError, match="zip"):
        format_table([("a", "b"), ("c",)])
