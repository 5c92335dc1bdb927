"""The synthetic tasks: balanced classes, right labels, repeatable files, and a split by document."""

import collections
import json
import re
from pathlib import Path

import pytest

from gpt_jax.experiments.synthetic_tasks import CHOICES, MIN_WORDS, make_tasks

PACKAGES = ("python", "jax", "numpy", "scipy", "flax")


def sentence(document, k):
    return f"This is sentence number {k} of the document called {document}, no more."


DOCUMENT = re.compile(r"(?:python|jax|numpy|scipy|flax)-(\d+)")

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
    for name in ("word_order", "origin", "same_package"):
        for split in ("train", "validation"):
            assert set(collections.Counter(row["label"] for row in rows[name][split]).values()) == {len(rows[name][split]) // 2}
    assert {row["label"] for row in rows["continuation"]["train"]} == {"0", "1", "2", "3"}


def test_one_text_of_a_pair_does_not_tell_the_label(tasks_and_rows):
    """Each package, in a text or by its name, occurs equally often with both labels."""
    _, rows = tasks_and_rows
    for name, columns in (("origin", ("first", "second")), ("same_package", ("first", "second"))):
        for column in columns:
            with_label = {
                label: collections.Counter(package_of(row[column]) for row in rows[name]["train"] if row["label"] == label)
                for label in ("yes", "no")
            }
            assert with_label["yes"] == with_label["no"]
            assert len(with_label["yes"]) == 4
            assert len(set(with_label["yes"].values())) == 1


def package_of(text):
    """Returns the package of a sentence's document, or the package that a claim names."""
    return text.split()[-1].rstrip(".") if text.startswith("This is documentation of") else place(text)[0].rsplit("-", 1)[0]


def test_labels_are_right(tasks_and_rows):
    _, rows = tasks_and_rows
    sentences = {part + "." for _, text in PASSAGES for part in text.split(". ")}
    shuffled = {tuple(sorted(sentence.split())) for sentence in sentences}
    for row in rows["word_order"]["train"]:
        words = row["text"].split()
        assert (row["label"] == "yes") == (row["text"] in sentences)
        assert tuple(sorted(words)) in shuffled
        assert len(set(words)) >= MIN_WORDS
    for row in rows["origin"]["train"]:
        assert (row["label"] == "yes") == (package_of(row["first"]) == package_of(row["second"]))
    for row in rows["same_package"]["train"]:
        assert (row["label"] == "yes") == (package_of(row["first"]) == package_of(row["second"]))
        assert row["first"] != row["second"]
    for row in rows["continuation"]["train"]:
        document, k = place(row["context"])
        assert [place(row[f"answer {c}"]) == (document, k + 1) for c in range(CHOICES)].index(True) == int(row["label"])
        assert len({row[f"answer {c}"] for c in range(CHOICES)}) == CHOICES


def test_validation_rows_come_from_held_out_documents_and_training_rows_from_the_others(tasks_and_rows):
    _, rows = tasks_and_rows
    for name in rows:
        for split in ("train", "validation"):
            texts = [value for row in rows[name][split] for key, value in row.items() if key != "label"]
            documents = [DOCUMENT.search(text) for text in texts if not text.startswith("This is documentation of")]
            assert {int(document[1]) % 4 == 0 for document in documents} == {split == "validation"}


def test_equal_arguments_write_equal_files_and_another_seed_writes_others(tasks_and_rows, tmp_path):
    tasks, _ = tasks_and_rows
    again = make_tasks(PASSAGES, held_out, tmp_path / "again", train=40, validation=16)
    other = make_tasks(PASSAGES, held_out, tmp_path / "other", train=40, validation=16, seed=1)
    for name, task in tasks.items():
        assert Path(again[name].train).read_bytes() == Path(task.train).read_bytes()
        assert Path(other[name].train).read_bytes() != Path(task.train).read_bytes()
