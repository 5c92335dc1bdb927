"""Labeled tasks after reading and encoding: every split as token ids, ready to be divided into batches."""

import collections
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gpt_jax.config import TaskConfig
from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.data.windows import epoch_keys, permute
from gpt_jax.errors import UserError, listed, shortened
from gpt_jax.tasks.file_layouts import SPLITS, SplitName
from gpt_jax.tasks.metrics import require_scorable
from gpt_jax.tasks.readers import Example, TaskSplit, read_split
from gpt_jax.tasks.registry import Task, task_from_config
from gpt_jax.tasks.transforms import EncodedSplit, encode_examples, longest_input, special_tokens


class TaskDataset(NamedTuple):
    """The splits of a task, encoded with one tokenizer."""

    task: Task
    splits: dict[str, TaskSplit]
    """The examples that are used, by split. "test" may be missing or may not have labels."""
    encoded: dict[str, EncodedSplit]
    """The examples as token ids, by split."""

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """For each split, the numbers of rows that were read, used, dropped for each reason, and truncated."""
        return {
            name: {
                "read": split.num_rows,
                "used": len(split.examples),
                **split.dropped,
                "truncated": self.encoded[name].num_truncated,
            }
            for name, split in self.splits.items()
        }

    @property
    def digest(self) -> str:
        """The hexadecimal SHA-256 of everything in the training and validation splits that training depends on."""
        sha256 = hashlib.sha256()
        for name in ("train", "validation"):
            split = self.encoded[name]
            sha256.update(name.encode())
            for array in (split.tokens, split.begins, split.lengths, split.labels):
                sha256.update(str(array.shape).encode() + np.ascontiguousarray(array).tobytes())
        return sha256.hexdigest()

    def is_labeled(self, split: str) -> bool:
        """Returns whether the split is present and its labels are known."""
        return split in self.splits and all(example.label is not None for example in self.splits[split].examples)


def load_dataset(
    config: TaskConfig,
    tokenizer: Tokenizer,
    context_length: int,
    log: Callable[[str], None],
    splits: Sequence[SplitName] = SPLITS,
) -> TaskDataset:
    """Reads and encodes the splits of a task.

    Args:
      config: names or describes the task.
      tokenizer: encodes the texts.
      context_length: maximum number of tokens that the model processes at once.
      log: receives lines about the splits once all of them are read.
      splits: the splits to read. If there are several, "test" may be missing from the data.

    Raises:
      UserError: a split cannot be read or encoded, a required split is missing, or a split has fewer than two different labels.
    """
    task = task_from_config(config)
    max_tokens = longest_input(config, task.kind, len(task.output_values), context_length)
    loaded: dict[str, TaskSplit] = {}
    encoded: dict[str, EncodedSplit] = {}
    for name in splits:
        split = read_split(task, config, name)
        if split is None and name == "test" and len(splits) > 1:
            continue
        if split is None:
            raise UserError(f"--task.{'path' if config.name else name}: {task.title} has no {name} rows; they are required")
        if name == "train":
            split = split._replace(examples=_subset(split.examples, config.max_train))
        if name != "test" or any(example.label is not None for example in split.examples):
            require_scorable(task, split.examples)
        loaded[name] = split
        encoded[name] = encode_examples(
            split.examples,
            task.kind,
            tokenizer.encode,
            special_tokens(tokenizer),
            task.output_values,
            max_tokens=max_tokens,
            truncation=config.truncation,
        )
    for title, content in loaded.items():
        log(f"{task.title} {title}: {content.describe_counts()}; {encoded[title].num_truncated:,} truncated")
        if content.note:
            log(content.note)
    if not config.name:
        if not task.regression:
            _count_labels(task, loaded, log)
        _warn_of_repeated_texts(loaded, log)
    return TaskDataset(task, loaded, encoded)


def _count_labels(task: Task, splits: Mapping[str, TaskSplit], log: Callable[[str], None]) -> None:
    """Logs the number of examples of each class in each split that has labels."""
    for name, split in splits.items():
        counts = collections.Counter(example.label for example in split.examples)
        if counts.keys() != {None}:
            log(f"{name}: {listed(f'{shortened(label)} ({counts[number]:,})' for number, label in enumerate(task.labels))}")


def _warn_of_repeated_texts(splits: Mapping[str, TaskSplit], log: Callable[[str], None]) -> None:
    """Logs the number of examples in the other splits that have the same texts as a training example."""
    known = {example.texts for example in splits["train"].examples} if "train" in splits else set()
    for name, split in splits.items():
        repeated = sum(example.texts in known for example in split.examples)
        if repeated and name != "train":
            log(f"warning: {repeated:,} of the {len(split.examples):,} {name} examples have the same texts as a training example")


def _subset(examples: list[Example], max_examples: int) -> list[Example]:
    """Returns at most `max_examples` examples, or all if it is 0, chosen evenly and independently of the run's seed."""
    count = len(examples)
    if not max_examples or count <= max_examples:
        return examples
    keys = epoch_keys(0, np.zeros(count, np.uint64))
    return [examples[i] for i in np.sort(permute(np.arange(count, dtype=np.uint64), count, keys)[:max_examples])]
