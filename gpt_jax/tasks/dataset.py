"""A labelled task, read and encoded: every split as token ids, ready for batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gpt_jax.config import TaskConfig
from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.data.windows import epoch_keys, permute
from gpt_jax.errors import UserError, require
from gpt_jax.tasks import registry
from gpt_jax.tasks.batches import choose_lengths
from gpt_jax.tasks.file_layouts import SplitName
from gpt_jax.tasks.metrics import require_scorable
from gpt_jax.tasks.readers import Row, Split, read
from gpt_jax.tasks.registry import Task
from gpt_jax.tasks.transforms import Encoded, Specials, encode


class Dataset(NamedTuple):
    """What one tokenizer makes of a task."""

    task: Task
    rows: dict[str, list[Row]]
    """By split; "test" may be missing, or without labels."""
    encoded: dict[str, Encoded]
    lengths: tuple[int, ...]
    """What batches are padded to."""
    counts: dict[str, dict[str, int]]
    """For each split how many rows were read, used, dropped for which reason, and truncated."""
    dropped_indices: dict[str, tuple[int, ...]]
    """`Split.dropped_indices` by split."""

    @property
    def digest(self) -> str:
        """A hexadecimal SHA-256 of all that the training depends on, validation included."""
        sum_ = hashlib.sha256()
        for name, split in ((name, self.encoded[name]) for name in ("train", "validation")):
            sum_.update(name.encode())
            for array in (split.tokens, split.begins, split.lengths, split.labels):
                sum_.update(str(array.shape).encode() + np.ascontiguousarray(array).tobytes())
        return sum_.hexdigest()

    def labelled(self, split: str) -> bool:
        """Whether the split is there and its labels are known."""
        return split in self.rows and all(row.label is not None for row in self.rows[split])


def specials(tokenizer: Tokenizer) -> Specials:
    """The ids that fine-tuning adds behind the tokenizer's."""
    return Specials(*range(tokenizer.vocab_size, tokenizer.vocab_size + len(Specials._fields)))


def task_of(config: TaskConfig) -> Task:
    """The task that a config names or describes.

    Raises:
      UserError: there is none.
    """
    return registry.named(config.name) if config.name else registry.own(config)


def load_dataset(
    config: TaskConfig,
    tokenizer: Tokenizer,
    context_length: int,
    batch_size: int,
    log: Callable[[str], None],
    splits: Sequence[SplitName] = ("train", "validation", "test"),
) -> Dataset:
    """Reads and encodes a task's splits.

    Args:
      context_length: most tokens that the model sees at once.
      batch_size: examples in a batch, by which the lengths are chosen.
      splits: those wanted; only "test" may be missing from the data.

    Raises:
      UserError: what reading and encoding raise; a split that is needed and missing, or has no labels or only one.
    """
    task = task_of(config)
    require(
        config.max_tokens <= context_length,
        "task.max_tokens",
        f"{config.max_tokens} is more than the model's context of {context_length}",
    )
    rows: dict[str, list[Row]] = {}
    encoded: dict[str, Encoded] = {}
    counts: dict[str, dict[str, int]] = {}
    dropped_indices: dict[str, tuple[int, ...]] = {}
    for name in splits:
        split = read(task, config, name)
        if split is None and name == "test" and len(splits) > 1:
            continue
        if split is None or not split.rows:
            raise UserError(f"--task.{'path' if config.name else name}: {task.title} has no {name} rows, and they are needed")
        used = _chosen(split, config.max_train) if name == "train" else split.rows
        if name != "test" or any(row.label is not None for row in used):
            require_scorable(task, used)
        rows[name], dropped_indices[name] = used, split.dropped_indices
        encoded[name] = encode(
            used,
            task.kind,
            tokenizer.encode,
            specials(tokenizer),
            len(task.labels),
            max_tokens=config.max_tokens or context_length,
            truncation=config.truncation,
        )
        counts[name] = {"read": split.read, "used": len(used), **split.dropped, "truncated": encoded[name].truncated}
        log(f"{task.title} {name}: {split.counted(len(used))}; {encoded[name].truncated:,} truncated")
    # Every epoch goes through the training and the validation split. The test split, scored once, need only fit.
    every = [split.longest if name != "test" else np.sort(split.longest)[-1:] for name, split in encoded.items()]
    lengths = choose_lengths(every, batch_size, config.num_length_buckets)
    return Dataset(task, rows, encoded, lengths, counts, dropped_indices)


def _chosen(split: Split, most: int) -> list[Row]:
    """At most so many rows, an even choice that does not depend on the run's seed."""
    count = len(split.rows)
    if not most or count <= most:
        return split.rows
    keys = epoch_keys(0, np.zeros(count, np.uint64))
    return [split.rows[i] for i in np.sort(permute(np.arange(count, dtype=np.uint64), count, keys)[:most])]
