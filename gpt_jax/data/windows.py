"""Which tokens each training step sees: a pure function of (tokens, seed, step), on any number of hosts.

Training examples are numbered g = step * batch_size + row, for ever. With `total` tokens, a context of T and N windows an
epoch, example g is number g % N of epoch g // N. A permutation of [0, N), of our own and different every epoch, says which
window that is; window w is the T + 1 tokens from offset + w * T. The offset is drawn anew each epoch, so that windows are not
cut at the same tokens again and again. One window is given up for its sake, so that it can reach every token:

    N = max(total // T - 1, 1)    offset in [0, total - N * T)

Permutation version 1 (64-bit words, arithmetic modulo 2^64). It is frozen: a run that is resumed must see what it would have
seen, so another definition is another version.

    mix64(x)                  SplitMix64's finaliser, a bijection of 64-bit words where every input bit reaches every output bit
    key(seed, epoch, j)       h(h(h(0, seed), epoch), j) with h(k, x) = mix64(k + x + 0x9E3779B97F4A7C15)
    a, b                      a: the least even number with a * a >= N; b = ceil(N / a)
    position = right * a + left   with left in [0, a), right in [0, b); then for j = 0, 2, ..., 10
                                  left  = (left  + mix64(right + key_j) // 2) mod a
                                  right = (right + mix64(left + key_(j+1)) // 2) mod b
                              and once more from the top while the result, right * a + left, is not below N
    offset                    key_12 mod the number of offsets

This is an unbalanced Feistel network with cycle walking (Black and Rogaway, 2002). Fewer than 2a of its a * b values lie beyond
N, so walks are rare. `a` is even because every round is an even permutation when both a and b are odd, and then half of the
orders would never occur. Twelve rounds: over two million windows, the differences between successive windows betray ten rounds
for N up to about 20, twelve for N up to about 10.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from jaxtyping import Float32, Int32, Int64, Integer, UInt64

from gpt_jax.errors import UserError

PERMUTATION_VERSION = 1
ROUNDS = 12

NumpyBatch = dict[str, np.ndarray]
"""A batch of n windows of T tokens, in the shapes and dtypes that `element_spec` returns. Its arrays are read-only because they
may share memory.

    tokens        int32 [n, T]
    targets       int32 [n, T]    the token that follows each of `tokens`
    loss_weights  float32 [n, T]  the weight of each target in the loss
    example_id    int32 [n]       the row of each window in the global batch
"""

Batch = NumpyBatch

ElementSpec = dict[str, tuple[tuple[int | None, ...], np.dtype]]
"""The shape and dtype of each array of a batch, by key. None stands for an axis whose length varies between batches."""


class Tokens(Protocol):
    """A sequence of tokens that can be read anywhere, such as `store.TokenArray`."""

    @property
    def num_tokens(self) -> int:
        """Tokens in all."""

    def read(self, starts: Int64[np.ndarray, " n"], length: int) -> Int32[np.ndarray, "n length"]:
        """The `length` tokens from each of `starts`; all lie within the sequence."""


def _words(value: int) -> UInt64[np.ndarray, ""]:
    """`value` as a 64-bit word. NumPy computes with arrays of no dimensions twice as fast as with Python's integers."""
    return np.array(value, np.uint64)


_GOLDEN = _words(0x9E3779B97F4A7C15)
_SHIFTS = _words(30), _words(27), _words(31)
_FACTORS = _words(0xBF58476D1CE4E5B9), _words(0x94D049BB133111EB)
_ONE = _words(1)


def mix64(x: UInt64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    """SplitMix64's finaliser (Steele, Lea and Flood, 2014; the constants are Stafford's variant 13)."""
    x = (x ^ (x >> _SHIFTS[0])) * _FACTORS[0]
    x = (x ^ (x >> _SHIFTS[1])) * _FACTORS[1]
    return x ^ (x >> _SHIFTS[2])


def epoch_keys(seed: int, epoch: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, "keys n"]:
    """The `ROUNDS` keys of each example's epoch, and one more for its offset."""
    key = mix64(np.full(1, seed, np.uint64) + _GOLDEN)
    key = mix64(key + epoch + _GOLDEN)
    return mix64(key + np.arange(ROUNDS + 1, dtype=np.uint64)[:, None] + _GOLDEN)


def permute(position: UInt64[np.ndarray, " n"], size: int, keys: UInt64[np.ndarray, "keys n"]) -> UInt64[np.ndarray, " n"]:
    """Where each position in [0, size) goes; a bijection of [0, size) for every value of the keys (`epoch_keys`)."""
    side = math.isqrt(size - 1) + 1
    side += side % 2
    a, b = _words(side), _words(-(-size // side))
    right = position // a
    left = position - right * a
    for j in range(0, ROUNDS, 2):
        left = (left + (mix64(right + keys[j]) >> _ONE)) % a
        right = (right + (mix64(left + keys[j + 1]) >> _ONE)) % b
    image = right * a + left
    outside = np.flatnonzero(image >= _words(size))
    if outside.size:
        image[outside] = permute(image[outside], size, keys[:, outside])
    return image


class Windows:
    """The training split as batches of windows, each window once an epoch, in an order of its own every epoch.

    Args:
      tokens: the split.
      context_length: T, tokens the model sees at once; a window has one more.
      batch_size: windows in one global batch.
      seed: of the order and the offsets, in [0, 2^64).

    Raises:
      UserError: the split is shorter than one window.
    """

    def __init__(self, tokens: Tokens, context_length: int, batch_size: int, seed: int) -> None:
        total = tokens.num_tokens
        _require_one_window(total, context_length, "training text", "add text")
        self.windows_per_epoch = max(total // context_length - 1, 1)
        self._offsets = total - self.windows_per_epoch * context_length
        self._tokens = tokens
        self._context_length = context_length
        self._batch_size = batch_size
        self._seed = seed

    def element_spec(self, num_rows: int) -> ElementSpec:
        """Returns the shapes and dtypes of a batch of `num_rows` rows, in the order of the keys of `batch_at`."""
        return _element_spec(num_rows, self._context_length)

    def batch_at(self, step: int, rows: Integer[np.ndarray, " n"]) -> NumpyBatch:
        """The given rows, numbers in [0, batch_size), of the global batch of `step`. All weights are 1."""
        _, window, offset = self._locate(step, rows)
        starts = offset + window * self._context_length
        loss_weights = np.broadcast_to(np.float32(1), (rows.size, self._context_length))
        return _read_batch(self._tokens, starts, loss_weights, rows)

    def window_numbers(
        self, step: int, rows: Integer[np.ndarray, " n"]
    ) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """The epoch and the window within it behind each of these rows: what to name when a step goes wrong."""
        epoch, window, _ = self._locate(step, rows)
        return epoch, window

    def _locate(self, step: int, rows: Integer[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Epoch, window and offset in tokens of each row, int64 [n]."""
        example = (step * self._batch_size + rows.astype(np.int64)).astype(np.uint64)
        size = _words(self.windows_per_epoch)
        epoch = example // size
        keys = epoch_keys(self._seed, epoch)
        window = permute(example - epoch * size, self.windows_per_epoch, keys)
        offset = keys[ROUNDS] % _words(self._offsets)
        return epoch.astype(np.int64), window.astype(np.int64), offset.astype(np.int64)


class EvaluationWindows:
    """A held-out split as batches of consecutive windows from its start, in order. Every next-token pair counts exactly once.

    The last window is moved back until it fits, and the targets that the one before it has scored weigh 0. Rows beyond the last
    window fill the last batch up; they weigh 0.

    Args:
      tokens: the split.
      context_length: T, tokens the model sees at once.
      batch_size: windows in one global batch.
      limit: most windows used; 0: all.

    Raises:
      UserError: the split is shorter than one window.
    """

    def __init__(self, tokens: Tokens, context_length: int, batch_size: int, limit: int) -> None:
        total = tokens.num_tokens
        _require_one_window(total, context_length, "validation text", "raise --data.validation-share")
        windows = -(-(total - 1) // context_length)
        self.num_windows = min(windows, limit) if limit else windows
        self.num_batches = -(-self.num_windows // batch_size)
        self._last_start = total - context_length - 1
        self._tokens = tokens
        self._context_length = context_length
        self._batch_size = batch_size

    def element_spec(self, num_rows: int) -> ElementSpec:
        """Returns the shapes and dtypes of a batch of `num_rows` rows, in the order of the keys of `batch_at`."""
        return _element_spec(num_rows, self._context_length)

    def batch_at(self, step: int, rows: Integer[np.ndarray, " n"]) -> NumpyBatch:
        """The given rows of batch `step`, a number in [0, num_batches). Weights are 1 or 0."""
        window = step * self._batch_size + rows.astype(np.int64)
        starts = np.minimum(window * self._context_length, self._last_start)
        position = starts[:, None] + np.arange(self._context_length)
        counts = (position >= window[:, None] * self._context_length) & (window < self.num_windows)[:, None]
        return _read_batch(self._tokens, starts, counts.astype(np.float32), rows)


def _require_one_window(total: int, context_length: int, what: str, remedy: str) -> None:
    if total < context_length + 1:
        raise UserError(
            f"--model.context-length: the {what} has {total} tokens, and one window of {context_length} and its last target "
            f"needs {context_length + 1}; {remedy} or lower the context length"
        )


def _element_spec(num_rows: int, context_length: int) -> ElementSpec:
    shape = (num_rows, context_length)
    return {
        "tokens": (shape, np.dtype(np.int32)),
        "targets": (shape, np.dtype(np.int32)),
        "loss_weights": (shape, np.dtype(np.float32)),
        "example_id": ((num_rows,), np.dtype(np.int32)),
    }


def _read_batch(
    tokens: Tokens,
    starts: Int64[np.ndarray, " n"],
    loss_weights: Float32[np.ndarray, "n T"],
    rows: Integer[np.ndarray, " n"],
) -> NumpyBatch:
    """Reads a batch at once. `tokens` and `targets` are views of one array, because at this size a fresh array costs more in page
    faults than the read itself.
    """
    windows = tokens.read(starts, loss_weights.shape[1] + 1)
    windows.setflags(write=False)
    return {
        "tokens": windows[:, :-1],
        "targets": windows[:, 1:],
        "loss_weights": loss_weights,
        "example_id": rows.astype(np.int32),
    }
