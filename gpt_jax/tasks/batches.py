"""Batches of labelled examples that are padded to a few lengths only, each of which is compiled once.

Training batches are a pure function of (examples, seed, step), made without iterator state by any number of hosts, like those
of pre-training (`data/windows.py`), whose frozen permutation orders them. With n examples an epoch has n // batch_size
batches; it leaves out n mod batch_size examples, others every time. In epoch e,

    order   = the permutation of [0, n) with the keys of (seed, 2 e), cut after the epoch's last batch
    random:   batch j is the j-th slice of it
    grouped:  it is sorted by the examples' longest sequence, stably, so that examples of one length meet others every epoch;
              batch j is slice number p(j), with p the permutation of [0, n // batch_size) with the keys of (seed, 2 e + 1)

Padding is token 0 after a sequence's end: causal attention keeps it from the real tokens, and its loss weight is 0.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, Int64, Integer

from gpt_jax.data.windows import epoch_keys, permute
from gpt_jax.errors import UserError
from gpt_jax.tasks.transforms import Encoded

Batch = dict[str, np.ndarray]
"""n examples of S sequences, padded to T tokens: `tokens` int32 [n, S, T], `targets` int32 [n, S, T] (the next token),
`weights` float32 [n, S, T] (1 / (length - 1) on each real next token, so that every sequence's add up to 1), `extract` int32
[n, S] (position of the extract token), `labels` float32 [n, K] (a distribution over the outputs), `row` int32 [n, S] (global
number of the sequence: row of the batch * S + s). All but `row` are zeros for rows that only fill a batch up."""


def choose_lengths(splits: Sequence[Integer[np.ndarray, " n"]], batch_size: int, most: int) -> tuple[int, ...]:
    """At most `most` lengths, rising, with which the splits' batches need the least padding.

    A split's batches hold its examples in the order of their length, so their own lengths are those of every `batch_size`-th
    example from the longest one down. A dynamic programme over these is exact for `ScoringBatches`; for grouped training
    batches it is exact up to the shift by the few examples that an epoch leaves out.

    Args:
      splits: for each split that shares the lengths, its examples' longest sequences (`Encoded.longest`).
      batch_size: examples in a batch.
      most: most lengths. > 0.
    """
    batches = np.concatenate([np.sort(longest)[::-1][::batch_size] for longest in splits])
    distinct, counts = np.unique(batches, return_counts=True)
    ends = np.concatenate([[0], distinct])
    below = np.concatenate([[0], counts.cumsum()])  # batches up to the length ends[i]
    # cost[i, j]: tokens of a row of every batch in (ends[i], ends[j]], padded to ends[j]; nothing if i = j.
    cost = np.where(ends[:, None] <= ends, (below - below[:, None]) * ends, np.inf)
    least = cost[0]
    steps = []  # steps[k][j]: with k + 2 lengths the last of which is ends[j], the best i for the one before it
    for _ in range(most - 1):
        totals = least[:, None] + cost
        steps.append(totals.argmin(axis=0))
        least = totals.min(axis=0)
    chosen = [len(ends) - 1]
    for step in reversed(steps):
        chosen.append(step[chosen[-1]])
    return tuple(sorted({int(ends[i]) for i in chosen} - {0}))


class TaskBatches:
    """The training split as batches, each example at most once an epoch, in an order of its own every epoch.

    Args:
      encoded: the split.
      batch_size: examples in one global batch.
      seed: of the order, in [0, 2^64).
      lengths: what sequences may be padded to (`choose_lengths`), rising.
      order: `grouped`: a batch holds examples of about one length; `random`: any.

    Raises:
      UserError: the split has fewer examples than one batch.
    """

    def __init__(self, encoded: Encoded, batch_size: int, seed: int, lengths: Sequence[int], bucket_by_length: bool) -> None:
        self._num_examples = len(encoded.lengths)
        self.steps_per_epoch = self._num_examples // batch_size
        if not self.steps_per_epoch:
            raise UserError(
                f"--train.batch-size: {batch_size} is more than the {self._num_examples} examples of the training split; "
                f"lower it or add examples"
            )
        self._encoded = encoded
        self._longest = encoded.longest
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._bucket_by_length = bucket_by_length
        # Threads that work ahead may be in two epochs. Losing a race costs one of them a second computation, no more.
        self._epoch = functools.lru_cache(maxsize=2)(self._arrange)

    def batch_at(self, step: int, rows: Integer[np.ndarray, " n"]) -> Batch:
        """The given rows, numbers in [0, batch_size), of the global batch of `step`."""
        epoch, number = divmod(step, self.steps_per_epoch)
        return _batch(self._encoded, self._lengths, self._epoch(epoch)[number], rows)

    def examples(self, step: int) -> Int64[np.ndarray, " batch_size"]:
        """The number in the split of each row's example: what to name when a step goes wrong."""
        epoch, number = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[number]

    def padding_share(self, epoch: int = 0) -> float:
        """Share of the tokens of an epoch's batches that are padding."""
        return _padding_share(self._encoded, self._lengths, self._epoch(epoch))

    def _arrange(self, epoch: int) -> Int64[np.ndarray, "steps batch_size"]:
        """The examples of each batch of an epoch."""
        order = self._permutation(self._num_examples, 2 * epoch)[: self.steps_per_epoch * self._batch_size]
        if not self._bucket_by_length:
            return order.reshape(-1, self._batch_size)
        order = order[np.argsort(self._longest[order], kind="stable")]
        return order.reshape(-1, self._batch_size)[self._permutation(self.steps_per_epoch, 2 * epoch + 1)]

    def _permutation(self, size: int, number: int) -> Int64[np.ndarray, " size"]:
        keys = epoch_keys(self._seed, np.full(size, number, np.uint64))
        return permute(np.arange(size, dtype=np.uint64), size, keys).astype(np.int64)


class ScoringBatches:
    """All examples of a split exactly once, the longest first, so that rows which fill the last batch up cost least.

    A split of few batches tends to have more padding than the training split: all lengths are in these few.

    Args:
      encoded: the split.
      batch_size: examples in one global batch.
      lengths: what sequences may be padded to (`choose_lengths`), rising.
    """

    def __init__(self, encoded: Encoded, batch_size: int, lengths: Sequence[int]) -> None:
        order = np.argsort(-encoded.longest, kind="stable")
        self.num_batches = -(-order.size // batch_size)
        self._examples = np.full((self.num_batches, batch_size), -1, np.int64)
        self._examples.flat[: order.size] = order
        self._encoded = encoded
        self._lengths = lengths

    def batch_at(self, step: int, rows: Integer[np.ndarray, " n"]) -> Batch:
        """The given rows, numbers in [0, batch_size), of batch `step`, a number in [0, num_batches)."""
        return _batch(self._encoded, self._lengths, self._examples[step], rows)

    def examples(self, step: int) -> Int64[np.ndarray, " batch_size"]:
        """The number in the split of each row's example; -1 where the row only fills the batch up."""
        return self._examples[step]

    def padding_share(self) -> float:
        """Share of the tokens of all batches that are padding."""
        return _padding_share(self._encoded, self._lengths, self._examples)


def _batch(
    encoded: Encoded, lengths: Sequence[int], examples: Int64[np.ndarray, " batch_size"], rows: Integer[np.ndarray, " n"]
) -> Batch:
    """These rows of the batch of `examples`. Its length follows from all of them: every host must pad to the same."""
    padded = int(_padded(lengths, _lengths_of(encoded, examples).max()))
    examples = examples[rows]
    real = _lengths_of(encoded, examples)
    position = np.arange(padded + 1)
    inside = position < real[..., None]
    windows = np.where(inside, encoded.tokens[np.where(inside, encoded.begins[examples][..., None] + position, 0)], 0)
    next_tokens = np.maximum(real - 1, 0)
    num_sequences = real.shape[1]
    return {
        "tokens": windows[..., :-1],
        "targets": windows[..., 1:],
        "loss_weights": inside[..., 1:] / np.maximum(next_tokens, 1).astype(np.float32)[..., None],
        "extract": next_tokens,
        "labels": np.where((examples >= 0)[:, None], encoded.labels[examples], 0),
        "example_id": (rows[:, None] * num_sequences + np.arange(num_sequences)).astype(np.int32),
    }


def _padding_share(encoded: Encoded, lengths: Sequence[int], examples: Int64[np.ndarray, "steps batch_size"]) -> float:
    real = _lengths_of(encoded, examples)
    padded = _padded(lengths, real.max(axis=(1, 2)))
    return 1 - float(real.sum(dtype=np.int64) / (padded.sum() * real[0].size))


def _lengths_of(encoded: Encoded, examples: Int64[np.ndarray, "*shape"]) -> Int32[np.ndarray, "*shape S"]:
    """Lengths of the examples' sequences; 0 for example -1."""
    return np.where(examples[..., None] >= 0, encoded.lengths[examples], 0)


def _padded(lengths: Sequence[int], longest: Integer[np.ndarray, "*shape"]) -> Int64[np.ndarray, "*shape"]:
    """The smallest length that holds the longest sequence."""
    return np.asarray(lengths)[np.searchsorted(lengths, longest)]
