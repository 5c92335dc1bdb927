"""Tests of reading and encoding all splits of a task."""

import pytest

from gpt_jax.config import TaskConfig
from gpt_jax.data.tokenizers import Bytes
from gpt_jax.tasks.dataset import load_dataset


@pytest.fixture
def table(tmp_path):
    def write(name, lengths):
        lines = [f"{'a' * length}\t{number % 2}" for number, length in enumerate(lengths)]
        (tmp_path / name).write_text("\n".join(["text\tlabel", *lines]) + "\n")
        return str(tmp_path / name)

    return write


def test_lengths_suit_the_splits_that_every_epoch_uses(table):
    """The test split, which is scored once, must fit but does not compete for lengths."""
    special = 2  # start and extract
    task = TaskConfig(
        kind="classification",
        texts=("text",),
        label="label",
        train=table("train.tsv", [5] * 4 + [10] * 4),
        validation=table("dev.tsv", [20] * 4),
        test=table("test.tsv", [4, 8, 15, 30] * 50),
        num_length_buckets=4,
    )
    dataset = load_dataset(task, Bytes(), 64, 4, lambda line: None)
    assert dataset.lengths == (5 + special, 10 + special, 20 + special, 30 + special)
