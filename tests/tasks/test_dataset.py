"""Tests of reading and encoding all splits of a task."""

from gpt_jax.config import TaskConfig
from gpt_jax.data.tokenizers import Bytes
from gpt_jax.tasks.dataset import load_dataset


def load(folder, train, validation, **fields):
    """Loads a task with these rows of a text and a label, and returns its dataset and the lines that it logs."""
    files = {}
    for name, rows in (("train", train), ("validation", validation)):
        files[name] = str(folder / f"{name}.tsv")
        (folder / f"{name}.tsv").write_text("".join(f"{row}\n" for row in ("text\tlabel", *rows)))
    lines = []
    return load_dataset(TaskConfig(**files, **fields), Bytes(), 64, lines.append), lines


def test_the_number_of_examples_of_each_class_is_logged(tmp_path):
    _, lines = load(tmp_path, ["a\tno", "b\tyes", "c\tno"], ["d\tyes"], labels=("yes", "no", "never"))
    assert lines == [
        "own task train: 3 rows read, 3 used; 0 truncated",
        "own task validation: 1 rows read, 1 used; 0 truncated",
        "train: yes (1), no (2), never (0)",
        "validation: yes (1), no (0), never (0)",
    ]
    train = [f"{number}\tclass {number % 100}" for number in range(1000)]
    _, lines = load(tmp_path, train, train[:2])
    assert lines[2].endswith(", class 18 (10), class 19 (10) and 88 more")


def test_texts_that_are_too_long_are_counted(tmp_path):
    dataset, lines = load(tmp_path, ["a" * 100 + "\t1", "b\t0", "c" * 63 + "\t0"], ["a" * 62 + "\t1"])
    assert lines[:2] == [
        "own task train: 3 rows read, 3 used; 2 truncated",
        "own task validation: 1 rows read, 1 used; 0 truncated",
    ]
    assert dataset.counts["train"]["truncated"] == 2


def test_a_regression_has_soft_labels_within_its_range(tmp_path):
    dataset, lines = load(tmp_path, ["a\t-1", "b\t0.25", "c\t1.0"], ["d\t0.5", "e\t0"], score_range=(-1, 1))
    assert dataset.encoded["train"].labels.tolist() == [[1, 0, 0], [0, 0.75, 0.25], [0, 0, 1]]
    assert len(lines) == 2


def test_examples_of_other_splits_that_are_training_examples_are_counted(tmp_path):
    _, lines = load(tmp_path, ["a\t1", "b\t0", " c \t1"], ["a\t1", "c\t0", "d\t0"])
    assert lines[4:] == ["warning: 2 of the 3 validation examples have the same texts as a training example"]
    _, lines = load(tmp_path, ["a\t1", "b\t0", "b\t0"], ["c\t1", "d\t0"])
    assert not [line for line in lines if line.startswith("warning")]


def test_the_same_file_for_training_and_validation_is_noticed(tmp_path):
    (tmp_path / "train.tsv").write_text("text\tlabel\na\t1\nb\t0\n")
    (tmp_path / "link.tsv").symlink_to(tmp_path / "train.tsv")
    lines = []
    files = {"train": "train.tsv", "validation": "link.tsv", "test": "train.tsv"}
    load_dataset(TaskConfig(**{split: str(tmp_path / name) for split, name in files.items()}), Bytes(), 64, lines.append)
    assert lines[-2:] == [
        "warning: 2 of the 2 validation examples have the same texts as a training example",
        "warning: 2 of the 2 test examples have the same texts as a training example",
    ]


def test_what_was_assumed_about_a_table_is_logged(tmp_path):
    _, lines = load(tmp_path, ['"a"\t1', "b\t0"], ["c\t1"])
    assert lines[1].startswith(
        f"{tmp_path}/train.tsv: quotation marks at the beginning of cells (1) are taken as part of the text"
    )
