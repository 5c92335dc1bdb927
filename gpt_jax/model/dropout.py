"""Dropout masks as a pure function of where they are used (version 1; docs/masks.md has the definition and the study).

There is no stateful generator: (seed, step, layer, site, example, head, query, key) fully determines whether an element is
dropped. Resuming, or changing the mesh, the micro-batch size or the attention kernel, therefore leaves the masks unchanged.

    mask_stream(seed, step, layer, site, example, head)   uint32[..., 2]        once per (example, head): Threefry-2x32, 20 rounds
    bits(stream, queries, keys)                           uint32[..., Tq, Tk]   16-bit values; two multiplications per element
    keep(stream, queries, keys, rate)                     bool[..., Tq, Tk]     False where bits < round(rate * 65536)
    dropout(x, stream, rate)                              like x, [..., T, E] with a stream [..., 2]
    apply_dropout(x, key, rate, site)                     like x, [batch, time, embed]

Queries q and q + 8, which differ in bit 3, form a pair and share one product. A TPU vector register has eight sublanes, and a GPU
thread holds rows r and r + 8 of a tensor-core accumulator. A kernel that computes masks by pairs (`row_term`, `column_terms`,
`keep_pair`) therefore moves no data between lanes, regardless of its block size.

All computations are 32-bit integer arithmetic with Python operators, so the same code runs on NumPy arrays, under `jax.jit` and
inside Pallas kernels. The values are frozen: any change requires a new version number.
"""

from enum import IntEnum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

MASK_VERSION = 1

Integers = Any  # A Python int, or a NumPy or JAX integer array, traced or not.
AnyArray = Array | np.ndarray  # Code that uses only operators accepts both.


class Site(IntEnum):
    """The places in the model that have dropout. The numbers are part of the frozen definition."""

    EMBEDDING = 0
    ATTENTION = 1
    RESIDUAL_ATTENTION = 2
    RESIDUAL_MLP = 3
    CLASSIFIER = 4


class DropoutKey(NamedTuple):
    """The mask arguments that all sites of a layer share during one update."""

    seed: UInt32[Array, ""] | int
    step: Int[Array, ""] | int
    example_id: Int[Array, "batch"]
    """Index of each example in the global batch."""
    layer: Int[Array, ""] | int = 0
    """Index of the layer, counted from 0; also 0 outside the layers."""


# --- one stream per (example, head) ---------------------------------------------------------------------------------


def mask_stream(
    seed: Integers, step: Integers, layer: Integers, site: Integers, example: Integers, head: Integers
) -> UInt32[Array, "*shape 2"]:
    """Returns the two words that define the mask of one (example, head).

    Arguments broadcast: example [B, 1] and head [H] give [B, H, 2]. Limits: layer < 4096, site < 16, head < 65536, the others
    < 2**32. Python integers are checked; arrays cannot be.

    Raises:
      ValueError: a Python integer is out of range.
    """
    place = _word("layer", layer, 1 << 12) << np.uint32(20)
    place = place | _word("site", site, 1 << 4) << np.uint32(16)
    place = place | _word("head", head, 1 << 16)
    return jnp.stack(threefry(_word("seed", seed), _word("step", step), _word("example", example), place), axis=-1)


def threefry(k0: Any, k1: Any, x0: Any, x1: Any) -> tuple[Any, Any]:
    """Returns Threefry-2x32 with 20 rounds (Salmon et al., 2011) of the key (k0, k1) and the counter (x0, x1), all uint32."""
    keys = (k0, k1, k0 ^ k1 ^ np.uint32(0x1BD11BDA))
    x0, x1 = jnp.broadcast_arrays(x0 + keys[0], x1 + keys[1])
    for group in range(5):
        for r in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x0 = x0 + x1
            x1 = (x1 << np.uint32(r) | x1 >> np.uint32(32 - r)) ^ x0
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + np.uint32(group + 1)
    return x0, x1


# --- computed in kernels: one term per pair of queries, two per key, three operations per (pair, key) ----------------

SECOND = 0xADB4A92D  # a multiplier with a good two-dimensional lattice mod 2**32 (Steele and Vigna, 2022)


def row_term(a: Any, pair: Any) -> Any:
    """Returns the term R of query pair p: queries q = 16 (p // 8) + p % 8 and q + 8. `a` is the stream's first word."""
    return finalize(a ^ pair)


def column_terms(a: Any, b: Any, key: Any) -> tuple[Any, Any]:
    """Returns the term C and the odd multiplier D of a key, given a stream's two words."""
    column = finalize(b ^ key)
    return column, finalize(a ^ column) | np.uint32(1)


def keep_pair(row: Any, column: Any, multiplier: Any, rate: float) -> tuple[Any, Any]:
    """Returns whether the two elements of a pair are kept: the query with bit 3 clear, then the one with bit 3 set."""
    word = (row ^ column) * multiplier
    return _survives(word, rate), _survives(word * np.uint32(SECOND), rate)


def finalize(x: Any) -> Any:
    """Applies a bijection of 32-bit words in which flipping any input bit flips each output bit with probability near 1/2."""
    x = (x ^ x >> np.uint32(16)) * np.uint32(0x21F0AAAD)
    x = (x ^ x >> np.uint32(15)) * np.uint32(0xD35A2D97)
    return x ^ x >> np.uint32(15)


def threshold(rate: float) -> int:
    """Returns the number of an element's 65536 possible values that mean "dropped".

    Raises:
      ValueError: the rate is not in [0, 1), or rounds to 1.
    """
    dropped = round(rate * 65536) if 0.0 <= rate < 1.0 else 65536
    if dropped == 65536:
        raise ValueError(f"a dropout rate must be at least 0 and less than 1 (by 2**-17 or more), got {rate}")
    return dropped


def _survives(words: Any, rate: float) -> Any:
    # The upper half of a word decides. The comparison is signed, because a TPU (v5e) has no unsigned comparison.
    return words.astype(np.int32) >= np.int32((threshold(rate) << 16) - (1 << 31))


# --- whole masks ----------------------------------------------------------------------------------------------------


def bits(stream: UInt32[AnyArray, "*shape 2"], queries: Integers, keys: Integers) -> UInt32[AnyArray, "*shape Tq Tk"]:
    """Returns the 16-bit value of every (query, key); `queries` [..., Tq] and `keys` [..., Tk] are integer positions."""
    return _words(stream, queries, keys) >> np.uint32(16) ^ np.uint32(0x8000)


def keep(stream: UInt32[AnyArray, "*shape 2"], queries: Integers, keys: Integers, rate: float) -> Bool[AnyArray, "*shape Tq Tk"]:
    """Returns False where dropout at `rate` (a Python number) applies: where `bits` is less than round(rate * 65536)."""
    return _survives(_words(stream, queries, keys), rate)


def dropout(x: Float[Array, "*shape T E"], stream: UInt32[Array, "*shape 2"], rate: float) -> Float[Array, "*shape T E"]:
    """Applies inverted dropout; positions on axis T are the queries, and positions on axis E the keys. Rate 0 is the identity."""
    dropped = threshold(rate)
    if dropped == 0:
        return x
    kept = keep(stream, jnp.arange(x.shape[-2]), jnp.arange(x.shape[-1]), rate)
    return jnp.where(kept, x * (65536 / (65536 - dropped)), 0)


def apply_dropout(x: jax.Array, key: DropoutKey | None, rate: float, site: Site) -> jax.Array:
    """Applies dropout to activations [batch, time, embed] at one site; returns them unchanged without a key (evaluation)."""
    if key is None or rate == 0:
        return x
    return dropout(x, mask_stream(key.seed, key.step, key.layer, site, key.example_id, 0), rate)


def _words(stream: Any, queries: Integers, keys: Integers) -> Any:
    """Returns a 32-bit word for each element. The word's upper half decides whether the element is kept."""
    queries, keys = queries.astype(np.uint32), keys.astype(np.uint32)
    pair = queries >> np.uint32(4) << np.uint32(3) | queries & np.uint32(7)
    second_of_pair = queries >> np.uint32(3) & np.uint32(1)
    a, b = stream[..., 0, None], stream[..., 1, None]
    column, multiplier = column_terms(a, b, keys)
    words = (row_term(a, pair)[..., :, None] ^ column[..., None, :]) * multiplier[..., None, :]
    return words * (np.uint32(1) + second_of_pair * np.uint32(SECOND - 1))[..., :, None]


def _word(name: str, value: Integers, limit: int = 1 << 32) -> Any:
    """Returns `value` as uint32, checked against its limit unless it is an array."""
    if isinstance(value, (int, np.integer)):
        if not 0 <= value < limit:
            raise ValueError(f"{name} must be in [0, {limit}), got {value}")
        value = np.asarray(value, np.uint32)
    return jnp.asarray(value.astype(np.uint32))
