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
from gpt_jax.errors import UserError
from gpt_jax.tasks.transforms import EncodedSplit


def choose_lengths(splits: Sequence[Integer[np.ndarray, " n"]], batch_size: int, max_lengths: int) -> tuple[int, ...]:
    """Returns the lengths, ascending and at most `max_lengths`, for which the splits' batches need the least padding.

    The batches of a split contain its examples in order of length, so the lengths of the batches are those of every
    `batch_size`-th example, starting from the longest. Dynamic programming over these lengths is exact for `ScoringBatches`. For
    bucketed training batches, it ignores the shift by the few examples that an epoch leaves out.

    Args:
      splits: for each split that shares the result, the lengths of the examples' longest sequences (`EncodedSplit.longest`).
      batch_size: examples in a batch.
      max_lengths: maximum number of lengths. > 0.
    """
    batches = np.concatenate([np.sort(longest)[::-1][::batch_size] for longest in splits])
    distinct, counts = np.unique(batches, return_counts=True)
    ends = np.concatenate([[0], distinct])
    below = np.concatenate([[0], counts.cumsum()])  # number of batches of at most ends[i] tokens
    # cost[i, j]: tokens in one row of each batch that is longer than ends[i] and at most ends[j] long, padded to ends[j].
    cost = np.where(ends[:, None] <= ends, (below - below[:, None]) * ends, np.inf)
    least = cost[0]
    steps = []  # steps[k][j]: the best i for the length before ends[j], if ends[j] is the last of k + 2 lengths
    for _ in range(max_lengths - 1):
        totals = least[:, None] + cost
        steps.append(totals.argmin(axis=0))
        least = totals.min(axis=0)
    chosen = [len(ends) - 1]
    for step in reversed(steps):
        chosen.append(step[chosen[-1]])
    return tuple(sorted({int(ends[i]) for i in chosen} - {0}))


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
        sequences = (num_rows, self._encoded.lengths.shape[1])
        int32, float32 = np.dtype(np.int32), np.dtype(np.float32)
        return {
            "tokens": ((*sequences, None), int32),
            "targets": ((*sequences, None), int32),
            "loss_weights": ((*sequences, None), float32),
            "extract": (sequences, int32),
            "labels": ((num_rows, self._encoded.labels.shape[1]), float32),
            "example_id": (sequences, int32),
        }

    def _padding_share(self, examples: Int64[np.ndarray, "steps batch_size"]) -> float:
        lengths = self._lengths_of(examples)
        padded = self._padded_lengths(lengths.max(axis=(1, 2)))
        return 1 - float(lengths.sum(dtype=np.int64) / (padded.sum() * lengths[0].size))

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
      UserError: the split has fewer examples than one batch.
    """

    def __init__(self, encoded: EncodedSplit, batch_size: int, seed: int, lengths: Sequence[int], bucket_by_length: bool) -> None:
        super().__init__(encoded, lengths)
        self._num_examples = len(encoded.lengths)
        self.steps_per_epoch = self._num_examples // batch_size
        if not self.steps_per_epoch:
            raise UserError(
                f"--train.batch-size: {batch_size} is more than the {self._num_examples} examples of the training split; lower "
                "it or add examples"
            )
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
        return self._padding_share(self._epoch(epoch))

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

    A split with few batches tends to have more padding than the training split, because its few batches cover all lengths.

    Args:
      encoded: the split.
      batch_size: examples in one global batch.
      lengths: the lengths that sequences may be padded to (`choose_lengths`), ascending.
    """

    def __init__(self, encoded: EncodedSplit, batch_size: int, lengths: Sequence[int]) -> None:
        super().__init__(encoded, lengths)
        order = np.argsort(-encoded.longest, kind="stable")
        self.num_batches = -(-order.size // batch_size)
        self._examples = np.full((self.num_batches, batch_size), -1, np.int64)
        self._examples.flat[: order.size] = order

    def example_numbers(self, step: int) -> Int64[np.ndarray, " batch_size"]:
        """Returns the number within the split of the example in each row of batch `step`; -1 if a row only fills up the batch."""
        return self._examples[step]

    def padding_share(self) -> float:
        """Returns the share of padding among the tokens of all batches."""
        return self._padding_share(self._examples)
