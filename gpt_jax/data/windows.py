"""The tokens of each training step, as a pure function of (tokens, seed, step) on any number of hosts.

Training examples are numbered g = step * batch_size + row, without an upper limit. With `total` tokens, a context of T tokens and
N windows in an epoch, example g is at position g % N of epoch g // N. Each epoch has its own permutation of [0, N), which maps
the position to a window. Window w consists of the T + 1 tokens from offset + w * T on. Each epoch also has its own offset, so
that the text is not always cut at the same tokens. An epoch has one window fewer than would fit, which leaves room for offsets
that reach every token:

    N = max(total // T - 1, 1)    offset in [0, total - N * T)

Permutation version 1 is defined below, in 64-bit words with arithmetic modulo 2^64. It is frozen, because a resumed run must read
the tokens that it would have read without the interruption. Any other definition needs a new version number.

    mix64(x)                  SplitMix64's finalizer, a bijection of 64-bit words in which each input bit affects each output bit
    key(seed, epoch, j)       h(h(h(0, seed), epoch), j) with h(k, x) = mix64(k + x + 0x9E3779B97F4A7C15)
    a, b                      a: the least even number with a * a >= N; b = ceil(N / a)
    position = right * a + left   with left in [0, a), right in [0, b); then for j = 0, 2, ..., 10
                                  left  = (left  + mix64(right + key_j) // 2) mod a
                                  right = (right + mix64(left + key_(j+1)) // 2) mod b
                              and again from the top while the result, right * a + left, is N or more
    offset                    key_12 mod the number of offsets

This is an unbalanced Feistel network with cycle walking (Black and Rogaway, 2002). Fewer than 2a of its a * b values are N or
more, so walks are rare. `a` is even because every round is an even permutation when a and b are both odd, and half of all
orders would then never occur. There are twelve rounds because, over two million windows, the differences between successive
windows show a pattern for N up to about 20 with ten rounds, but only up to about 10 with twelve.
"""

import math
from typing import Protocol

import numpy as np
from jaxtyping import Float32, Int32, Int64, Integer, UInt64

from gpt_jax.errors import UserError

PERMUTATION_VERSION = 1
ROUNDS = 12

NumpyBatch = dict[str, np.ndarray]
"""A batch of n windows of T tokens, with the shapes and dtypes that `element_spec` returns. Do not write to the arrays, because
they may share memory.

    tokens        int32 [n, T]
    targets       int32 [n, T]    the token after each of `tokens`
    loss_weights  float32 [n, T]  the weight of each target in the loss
    example_id    int32 [n]       the row of each window in the global batch
"""

INT32, FLOAT32 = np.dtype(np.int32), np.dtype(np.float32)

Rows = Integer[np.ndarray, " n"]
"""Row numbers in a global batch, in [0, batch_size)."""
Numbers = Int64[np.ndarray, " n"]
"""One number for each of these rows."""

ElementSpec = dict[str, tuple[tuple[int | None, ...], np.dtype]]
"""The shape and dtype of each array of a batch, by key. None marks an axis whose length differs between batches."""


class TokenSequence(Protocol):
    """A sequence of `num_tokens` tokens with random access, such as `store.TokenArray`."""

    num_tokens: int

    def read(self, starts: Int64[np.ndarray, " n"], length: int) -> Int32[np.ndarray, "n length"]:
        """Returns `length` tokens from each of `starts` on. All of them must be within the sequence."""


# -- the permutation --------------------------------------------------------------------------------------------------------


def _uint64(value: int) -> UInt64[np.ndarray, ""]:
    """Returns a 64-bit word as a zero-dimensional array, which makes NumPy twice as fast as a Python integer would."""
    return np.array(value, np.uint64)


_GOLDEN = _uint64(0x9E3779B97F4A7C15)
_SHIFTS = _uint64(30), _uint64(27), _uint64(31)
_FACTORS = _uint64(0xBF58476D1CE4E5B9), _uint64(0x94D049BB133111EB)
_ONE = _uint64(1)


def mix64(x: UInt64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    """Applies SplitMix64's finalizer (Steele, Lea and Flood, 2014; the constants are Stafford's variant 13)."""
    x = (x ^ (x >> _SHIFTS[0])) * _FACTORS[0]
    x = (x ^ (x >> _SHIFTS[1])) * _FACTORS[1]
    return x ^ (x >> _SHIFTS[2])


def epoch_keys(seed: int, epoch: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, "keys n"]:
    """Returns the `ROUNDS` keys of each example's epoch and, in the last row, the word that its offset is drawn from."""
    key = mix64(np.full(1, seed, np.uint64) + _GOLDEN)
    key = mix64(key + epoch + _GOLDEN)
    return mix64(key + np.arange(ROUNDS + 1, dtype=np.uint64)[:, None] + _GOLDEN)


def permute(position: UInt64[np.ndarray, " n"], size: int, keys: UInt64[np.ndarray, "keys n"]) -> UInt64[np.ndarray, " n"]:
    """Returns the image of each position under its epoch's permutation of [0, size).

    Args:
      position: numbers in [0, size).
      size: > 0.
      keys: the keys of each position's epoch (`epoch_keys`). Any values give a bijection.
    """
    side = math.isqrt(size - 1) + 1
    side += side % 2
    a, b = _uint64(side), _uint64(-(-size // side))
    right = position // a
    left = position - right * a
    for j in range(0, ROUNDS, 2):
        left = (left + (mix64(right + keys[j]) >> _ONE)) % a
        right = (right + (mix64(left + keys[j + 1]) >> _ONE)) % b
    image = right * a + left
    outside = np.flatnonzero(image >= _uint64(size))
    if outside.size:
        image[outside] = permute(image[outside], size, keys[:, outside])
    return image


# -- batches ----------------------------------------------------------------------------------------------------------------


class _WindowReader:
    """Base class of the classes below. It reads windows of T + 1 tokens as batches.

    Raises:
      UserError: there are fewer tokens than in one window; the message contains `text` and `remedy`.
    """

    def __init__(self, tokens: TokenSequence, context_length: int, batch_size: int, text: str, remedy: str) -> None:
        if tokens.num_tokens < context_length + 1:
            shortage = f"the {text} text has {tokens.num_tokens} tokens, but one window needs {context_length + 1}"
            raise UserError(f"--model.context-length: {shortage}; {remedy} or lower the context length")
        self._tokens = tokens
        self._context_length = context_length
        self._batch_size = batch_size

    def element_spec(self, num_rows: int) -> ElementSpec:
        """Returns the shapes and dtypes of a batch of `num_rows` rows, in the order of its keys."""
        shape = (num_rows, self._context_length)
        tokens, weights, row = (shape, INT32), (shape, FLOAT32), ((num_rows,), INT32)
        return {"tokens": tokens, "targets": tokens, "loss_weights": weights, "example_id": row}

    def _read(self, starts: Numbers, loss_weights: Float32[np.ndarray, "n T"], rows: Rows) -> NumpyBatch:
        """Reads the windows from `starts` on.

        `tokens` and `targets` are views of one array, because at this size a new array costs more time in page faults than
        the read itself.
        """
        windows = self._tokens.read(starts, self._context_length + 1)
        windows.setflags(write=False)
        tokens = {"tokens": windows[:, :-1], "targets": windows[:, 1:]}
        return tokens | {"loss_weights": loss_weights, "example_id": rows.astype(np.int32)}


class Windows(_WindowReader):
    """Batches of the training split. Every window occurs once in an epoch, and each epoch has its own order.

    Args:
      tokens: the split.
      context_length: T, the number of tokens that the model processes at once.
      batch_size: windows in one global batch.
      seed: the seed of the order and of the offsets, in [0, 2^64).

    Attributes:
      windows_per_epoch: number of windows in one epoch.

    Raises:
      UserError: the split is shorter than one window.
    """

    def __init__(self, tokens: TokenSequence, context_length: int, batch_size: int, seed: int) -> None:
        super().__init__(tokens, context_length, batch_size, "training", "add text")
        self.windows_per_epoch = max(tokens.num_tokens // context_length - 1, 1)
        self._num_offsets = tokens.num_tokens - self.windows_per_epoch * context_length
        self._seed = seed

    def batch_at(self, step: int, rows: Rows) -> NumpyBatch:
        """Returns the given rows of the global batch of `step`. All loss weights are 1."""
        _, window, offset = self._locate(step, rows)
        loss_weights = np.broadcast_to(np.float32(1), (rows.size, self._context_length))
        return self._read(offset + window * self._context_length, loss_weights, rows)

    def provenance(self, step: int) -> dict[str, list[int]]:
        """Returns the epoch and the window of each row of the global batch of `step`, to record if its update is not finite."""
        epochs, windows, _ = self._locate(step, np.arange(self._batch_size))
        return {"epochs": epochs.tolist(), "windows": windows.tolist()}

    def _locate(self, step: int, rows: Rows) -> tuple[Numbers, Numbers, Numbers]:
        """Returns the epoch, the window and the offset in tokens of each row."""
        example = (step * self._batch_size + rows.astype(np.int64)).astype(np.uint64)
        size = _uint64(self.windows_per_epoch)
        epoch = example // size
        keys = epoch_keys(self._seed, epoch)
        window = permute(example - epoch * size, self.windows_per_epoch, keys)
        offset = keys[ROUNDS] % _uint64(self._num_offsets)
        return epoch.astype(np.int64), window.astype(np.int64), offset.astype(np.int64)


class EvaluationWindows(_WindowReader):
    """Batches of consecutive windows from the start of a held-out split. Every target counts exactly once.

    Each window begins `stride` tokens after the previous one, except that the last one begins early enough to fit into the split.
    Targets that the previous window has already scored get loss weight 0, so every counted target outside the first window has at
    least `context_length - stride + 1` tokens before it in its window. The last batch is filled up with rows of loss weight 0.

    Args:
      tokens: the split.
      context_length: T, the number of tokens that the model processes at once.
      batch_size: windows in one global batch.
      limit: largest number of windows to use; 0: all of them.
      stride: tokens between the starts of windows, at most `context_length`; 0: `context_length`, so that windows do not overlap.

    Attributes:
      num_windows: number of windows that are scored.
      num_batches: number of batches that they fill.

    Raises:
      UserError: the split is shorter than one window.
    """

    def __init__(self, tokens: TokenSequence, context_length: int, batch_size: int, limit: int, stride: int = 0) -> None:
        super().__init__(tokens, context_length, batch_size, "validation", "raise --data.validation-share")
        self._stride = stride or context_length
        windows = 1 - (context_length + 1 - tokens.num_tokens) // self._stride
        self.num_windows = min(windows, limit) if limit else windows
        self.num_batches = -(-self.num_windows // batch_size)

    def batch_at(self, step: int, rows: Rows) -> NumpyBatch:
        """Returns the given rows of batch `step` in [0, num_batches). Loss weights are 1 or 0."""
        window = step * self._batch_size + rows.astype(np.int64)
        begins = window * self._stride
        starts = np.minimum(begins, self._tokens.num_tokens - self._context_length - 1)
        scored = np.where(window > 0, begins + self._context_length - self._stride, 0)  # up to here
        position = starts[:, None] + np.arange(self._context_length)
        counts = (position >= scored[:, None]) & (window < self.num_windows)[:, None]
        return self._read(starts, counts.astype(np.float32), rows)
