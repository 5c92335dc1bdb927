"""Batches of labeled examples, padded to one of a few lengths, each of which is compiled once.

Training batches are a pure function of (examples, seed, step), made without iterator state on any number of hosts. Their order
comes from the frozen permutation of pre-training (`data/windows.py`). With n examples, an epoch has n // batch_size batches and
leaves out n mod batch_size examples, which differ between epochs. In epoch e,

    order         is the permutation of [0, n) with the keys of (seed, 2 e), cut after the epoch's last batch
    unbucketed    batch j is slice j of the order
    bucketed      the order is sorted by the length of each example's longest sequence. The sort is stable, so examples of equal
                  length are grouped differently in each epoch. Batch j is slice p(j), where p is the permutation of
                  [0, n // batch_size) with the keys of (seed, 2 e + 1)

Token 0 pads a sequence at its end. Causal attention hides it from the real tokens, and its loss weight is 0.
"""

import abc
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, Int64, Integer

from gpt_jax.data.windows import ElementSpec, NumpyBatch, epoch_keys, permute
from gpt_jax.errors import field_error
from gpt_jax.tasks.transforms import EncodedSplit

EPOCHS_AHEAD = 8
"""Number of epochs in which `TaskBatches.used_lengths` looks for lengths. Arranging an epoch sorts its examples."""


def count_steps(encoded: EncodedSplit, batch_size: int) -> int:
    """Returns the number of training batches in an epoch.

    Raises:
      UserError: the split has fewer examples than one batch.
    """
    count = len(encoded.lengths)
    if count < batch_size:
        problem = f"{batch_size} is more than the {count} examples of the training split; lower it or add examples"
        raise field_error("train.batch_size", problem)
    return count // batch_size


def batch_spec(rows: int, sequences: int, outputs: int) -> ElementSpec:
    """Returns the shape and dtype of each array in a batch of examples (`batch_at`); None marks the padded length.

    Args:
      sequences: number of sequences of one example.
      outputs: number of outputs of the classifier.
    """
    shape, int32, float32 = (rows, sequences), np.dtype(np.int32), np.dtype(np.float32)
    return {
        "tokens": ((*shape, None), int32),
        "targets": ((*shape, None), int32),
        "loss_weights": ((*shape, None), float32),
        "extract": (shape, int32),
        "labels": ((rows, outputs), float32),
        "example_id": (shape, int32),
    }


class _PaddedBatches(abc.ABC):
    """Batches of the examples of one split. A subclass decides which examples are in a batch."""

    def __init__(self, encoded: EncodedSplit, lengths: Sequence[int]) -> None:
        self._encoded = encoded
        self._lengths = np.asarray(lengths)

    @abc.abstractmethod
    def example_numbers(self, step: int) -> Int64[np.ndarray, " batch_size"]:
        """Returns the number within the split of the example in each row of batch `step`; -1 if a row only fills up the batch."""

    def batch_at(self, step: int, rows: Integer[np.ndarray, " n"]) -> NumpyBatch:
        """Returns the given rows, numbers in [0, batch_size), of the global batch of `step`.

        The padded length T depends on the complete batch, so it is the same on every host.

        Returns:
          For n rows with examples of S sequences each:

            tokens        int32 [n, S, T]
            targets       int32 [n, S, T]    the token that follows each of `tokens`
            loss_weights  float32 [n, S, T]  1 / (length - 1) for each real next token; the weights of a sequence add up to 1
            extract       int32 [n, S]       the position of the extract token
            labels        float32 [n, K]     a distribution over the outputs
            example_id    int32 [n, S]       the number of the sequence in the global batch: row * S + s

          Rows that only fill up the batch are zero in everything but `example_id`.
        """
        encoded, examples = self._encoded, self.example_numbers(step)
        padded = int(self._padded_lengths(self._lengths_of(examples).max()))
        examples = examples[rows]
        lengths = self._lengths_of(examples)
        position = np.arange(padded + 1)
        inside = position < lengths[..., None]
        windows = np.where(inside, encoded.tokens[np.where(inside, encoded.begins[examples][..., None] + position, 0)], 0)
        next_tokens = np.maximum(lengths - 1, 0)
        num_sequences = lengths.shape[1]
        return {
            "tokens": windows[..., :-1],
            "targets": windows[..., 1:],
            "loss_weights": inside[..., 1:] / np.maximum(next_tokens, 1).astype(np.float32)[..., None],
            "extract": next_tokens,
            "labels": np.where((examples >= 0)[:, None], encoded.labels[examples], 0),
            "example_id": (rows[:, None] * num_sequences + np.arange(num_sequences)).astype(np.int32),
        }

    def element_spec(self, num_rows: int) -> ElementSpec:
        """Returns the shape and dtype of each array in a batch of `num_rows` rows; None marks the padded length."""
        return batch_spec(num_rows, self._encoded.lengths.shape[1], self._encoded.labels.shape[1])

    def _lengths_of(self, examples: Int64[np.ndarray, "*shape"]) -> Int32[np.ndarray, "*shape S"]:
        """Returns the lengths of the examples' sequences; 0 for example -1."""
        return np.where(examples[..., None] >= 0, self._encoded.lengths[examples], 0)

    def _padded_lengths(self, longest: Integer[np.ndarray, "*shape"]) -> Int64[np.ndarray, "*shape"]:
        """Returns, for each of these lengths, the smallest allowed length that is at least as large."""
        return self._lengths[np.searchsorted(self._lengths, longest)]


class TaskBatches(_PaddedBatches):
    """Batches of the training split. Each example occurs at most once in an epoch, and each epoch has a different order.

    Args:
      encoded: the split.
      batch_size: examples in one global batch.
      seed: seed of the order, in [0, 2^64).
      lengths: the lengths that sequences may be padded to (`choose_lengths`), ascending.
      bucket_by_length: whether the examples of a batch have about the same length.

    Raises:
      UserError: as `count_steps`.
    """

    def __init__(self, encoded: EncodedSplit, batch_size: int, seed: int, lengths: Sequence[int], bucket_by_length: bool) -> None:
        super().__init__(encoded, lengths)
        self._num_examples = len(encoded.lengths)
        self.steps_per_epoch = count_steps(encoded, batch_size)
        self._batch_size = batch_size
        self._seed = seed
        self._bucket_by_length = bucket_by_length
        # Prefetching threads may be in two epochs at once. Computing an epoch twice is harmless.
        self._epoch = functools.lru_cache(maxsize=2)(self._arrange)

    def example_numbers(self, step: int) -> Int64[np.ndarray, " batch_size"]:
        """Returns the number within the split of the example in each row of batch `step`."""
        epoch, number = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[number]

    def padding_share(self, epoch: int = 0) -> float:
        """Returns the share of padding among the tokens of an epoch's batches."""
        lengths = self._lengths_of(self._epoch(epoch))
        padded = self._padded_lengths(lengths.max(axis=(1, 2)))
        return 1 - float(lengths.sum(dtype=np.int64) / (padded.sum() * lengths[0].size))

    def used_lengths(self, start_step: int, end_step: int) -> list[int]:
        """Returns the padded lengths of the batches of steps start_step, ..., end_step - 1, in the order of their first use.

        At most `EPOCHS_AHEAD` epochs are arranged, so a length that is first used later is missing.
        """
        used: dict[int, None] = {}
        possible = set(self._padded_lengths(self._encoded.longest).tolist())
        first_epoch, end_epoch = start_step // self.steps_per_epoch, -(-end_step // self.steps_per_epoch)
        for epoch in range(first_epoch, min(end_epoch, first_epoch + EPOCHS_AHEAD)):
            first = epoch * self.steps_per_epoch
            steps = slice(max(start_step - first, 0), end_step - first)
            longest = self._lengths_of(self._epoch(epoch)[steps]).max(axis=(1, 2))
            used |= dict.fromkeys(self._padded_lengths(longest).tolist())
            if used.keys() == possible:
                break
        return list(used)

    def _arrange(self, epoch: int) -> Int64[np.ndarray, "steps batch_size"]:
        """Returns the examples of each batch of an epoch."""
        order = self._permutation(self._num_examples, 2 * epoch)[: self.steps_per_epoch * self._batch_size]
        if not self._bucket_by_length:
            return order.reshape(-1, self._batch_size)
        order = order[np.argsort(self._encoded.longest[order], kind="stable")]
        return order.reshape(-1, self._batch_size)[self._permutation(self.steps_per_epoch, 2 * epoch + 1)]

    def _permutation(self, size: int, number: int) -> Int64[np.ndarray, " size"]:
        keys = epoch_keys(self._seed, np.full(size, number, np.uint64))
        return permute(np.arange(size, dtype=np.uint64), size, keys).astype(np.int64)


class ScoringBatches(_PaddedBatches):
    """Batches of all examples of a split, longest first, so that the rows that fill up the last batch are cheap.

    Args:
      encoded: the split.
      batch_size: examples in a batch of the greatest length.
      lengths: the lengths that sequences may be padded to (`lengths.choose_lengths`), ascending.
      growth: maximum factor by which a batch of shorter sequences has more examples. It never has more tokens than a batch of the
        greatest length, so it fits into the memory of any device that trains on such a batch.
    """

    def __init__(self, encoded: EncodedSplit, batch_size: int, lengths: Sequence[int], growth: int = 1) -> None:
        super().__init__(encoded, lengths)
        order = np.argsort(-encoded.longest, kind="stable")
        self._shapes = _scoring_shapes(self._padded_lengths(encoded.longest[order]), batch_size, self._lengths[-1], growth)
        self._batches = []
        for rows, _ in self._shapes:
            self._batches.append(np.pad(order[:rows], (0, max(rows - order.size, 0)), constant_values=-1))
            order = order[rows:]
        self.num_batches = len(self._batches)

    def example_numbers(self, step: int) -> Int64[np.ndarray, " rows"]:
        """Returns the number within the split of the example in each row of batch `step`; -1 if a row only fills up the batch."""
        return self._batches[step]

    def shape_at(self, step: int) -> tuple[int, int]:
        """Returns the number of rows of batch `step`, and the length that its sequences are padded to."""
        return self._shapes[step]

    def padding_share(self) -> float:
        """Returns the share of padding among the tokens of all batches."""
        return _padding_share(self._encoded, self._shapes)


def _scoring_shapes(padded: Int64[np.ndarray, " n"], batch_size: int, longest: int, growth: int) -> list[tuple[int, int]]:
    """Returns the number of rows and the padded length of each batch of `ScoringBatches`.

    Args:
      padded: the padded lengths of all examples, descending.
      longest: the greatest allowed length.
      batch_size, growth: as for `ScoringBatches`.
    """
    shapes: list[tuple[int, int]] = []
    begin = 0
    while begin < padded.size:
        length = int(padded[begin])
        rows = batch_size * max(min(growth, int(longest) // length), 1)
        count = -(-int((padded[begin:] == length).sum()) // rows)  # The last of them may contain shorter examples too.
        shapes += [(rows, length)] * count
        begin += rows * count
    return shapes


def _padding_share(encoded: EncodedSplit, shapes: Sequence[tuple[int, int]]) -> float:
    """Returns the share of padding in batches of these numbers of rows and padded lengths, which contain the whole split."""
    padded = sum(rows * length for rows, length in shapes) * encoded.lengths.shape[1]
    return 1 - float(encoded.lengths.sum(dtype=np.int64) / padded)


def largest_scoring_batches(
    encoded: EncodedSplit, batch_size: int, lengths: Sequence[int], max_padding: float | None = None
) -> ScoringBatches:
    """Returns the `ScoringBatches` with the greatest growth for which the share of padding is at most `max_padding`.

    Without growth, a split with few batches may have a larger share. None stands for that share.
    """
    allowed_lengths = np.asarray(lengths)
    padded = allowed_lengths[np.searchsorted(allowed_lengths, np.sort(encoded.longest)[::-1])]

    def share(growth: int) -> float:
        return _padding_share(encoded, _scoring_shapes(padded, batch_size, lengths[-1], growth))

    allowed = share(1) if max_padding is None else max_padding
    growths = range(lengths[-1] // lengths[0], 1, -1)
    return ScoringBatches(encoded, batch_size, lengths, next((growth for growth in growths if share(growth) <= allowed), 1))
