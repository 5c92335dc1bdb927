"""The synthetic tasks: balanced classes, right labels, repeatable files, and a split by document."""

import collections
import json
from pathlib import Path

import pytest

from gpt_jax.experiments.synthetic_tasks import CHOICES, make_tasks

PACKAGES = ("python", "jax", "numpy", "scipy", "flax")


def sentence(document, k):
    return f"This is sentence number {k} of the document called {document}, no more."


PASSAGES = [
    (PACKAGES[d % len(PACKAGES)], " ".join(sentence(f"{PACKAGES[d % len(PACKAGES)]}-{d}", k) for k in range(6)) + " Short.")
    for d in range(400)
]


def held_out(text):
    return int(place(text)[0].rsplit("-", 1)[1]) % 4 == 0


@pytest.fixture(scope="module")
def tasks_and_rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    tasks = make_tasks(PASSAGES, held_out, folder, train=40, validation=16)
    rows = {
        name: {
            split: [json.loads(line) for line in Path(getattr(task, split)).read_text().splitlines()]
            for split in ("train", "validation")
        }
        for name, task in tasks.items()
    }
    return tasks, rows


def place(text):
    """Returns the document and the number of a sentence."""
    words = text.split()
    return words[9].rstrip(","), int(words[4])


def test_there_is_a_task_for_each_transformation_with_the_requested_numbers_of_rows(tasks_and_rows):
    tasks, rows = tasks_and_rows
    assert {task.kind for task in tasks.values()} == {"classification", "entailment", "similarity", "multiple_choice"}
    for name, task in tasks.items():
        assert (len(rows[name]["train"]), len(rows[name]["validation"])) == (40, 16)
        assert all(set(row) == {*task.texts, "label"} for split in rows[name].values() for row in split)


def test_labels_are_balanced(tasks_and_rows):
    _, rows = tasks_and_rows
    for name in ("package", "neighbors", "same_text"):
        assert len(set(collections.Counter(row["label"] for row in rows[name]["train"]).values())) == 1
    assert {row["label"] for row in rows["continuation"]["train"]} == {"0", "1", "2", "3"}


def test_labels_are_right(tasks_and_rows):
    _, rows = tasks_and_rows
    for row in rows["package"]["train"]:
        assert f"called {row['label']}-" in row["text"]
    for row in rows["neighbors"]["train"]:
        (one, k), (other, j) = place(row["first"]), place(row["second"])
        assert (row["label"] == "yes") == (one == other and j == k + 1)
    for row in rows["same_text"]["train"]:
        assert (row["label"] == "yes") == (place(row["first"])[0] == place(row["second"])[0])
        assert row["first"] != row["second"]
    for row in rows["continuation"]["train"]:
        document, k = place(row["context"])
        assert [place(row[f"answer {c}"]) == (document, k + 1) for c in range(CHOICES)].index(True) == int(row["label"])


def test_validation_rows_come_from_held_out_documents_and_training_rows_from_the_others(tasks_and_rows):
    _, rows = tasks_and_rows
    for name in ("neighbors", "same_text", "continuation", "package"):
        for split in ("train", "validation"):
            texts = [value for row in rows[name][split] for key, value in row.items() if key != "label"]
            assert {held_out(text) for text in texts} == {split == "validation"}


def test_equal_arguments_write_equal_files_and_another_seed_writes_others(tasks_and_rows, tmp_path):
    tasks, _ = tasks_and_rows
    again = make_tasks(PASSAGES, held_out, tmp_path / "again", train=40, validation=16)
    other = make_tasks(PASSAGES, held_out, tmp_path / "other", train=40, validation=16, seed=1)
    for name, task in tasks.items():
        assert Path(again[name].train).read_bytes() == Path(task.train).read_bytes()
        assert Path(other[name].train).read_bytes() != Path(task.train).read_bytes()
