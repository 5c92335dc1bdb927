"""Dropout masks as a pure function of where they are used (version 1; docs/masks.md has the definition and the study).

A mask is not drawn from a generator that has a state: whether an element is dropped is computed from
(seed, step, layer, site, row, head, query, key) and from nothing else. So a resumed run, another mesh, another
micro-batch size and another attention kernel all see the same masks.

    mask_stream(seed, step, layer, site, row, head)   uint32[..., 2]        once per (row, head): Threefry-2x32, 20 rounds
    bits(stream, queries, keys)                  uint32[..., Tq, Tk]   16-bit values: two multiplications an element
    keep(stream, queries, keys, rate)            bool[..., Tq, Tk]     False where bits < round(rate * 65536)
    dropout(x, stream, rate)                     like x                [..., T, E] with a stream [..., 2]

Queries q and q + 8, told apart by bit 3, are a pair and share one product. Eight rows are the sublanes of a TPU
vector register, and r, r + 8 are the two rows that a GPU thread holds of a tensor-core accumulator, so a kernel that
computes by pairs (`row_term`, `column_terms`, `keep_pair`) moves nothing between lanes, whatever its block size.

Everything is 32-bit integer arithmetic by operators: the same lines run on NumPy arrays, under `jax.jit` and inside
Pallas kernels. The values are frozen: change none of them without a new version number.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32

MASK_VERSION = 1

Integers = Any  # a Python int, or an integer array of NumPy or JAX, traced or not
Either = Array | np.ndarray  # what is written with operators alone accepts both


class Site(IntEnum):
    """The places in the model that drop out. The numbers are part of the frozen definition."""

    EMBEDDING = 0
    ATTENTION = 1
    RESIDUAL_ATTENTION = 2
    RESIDUAL_MLP = 3
    CLASSIFIER = 4


# --- one stream per (row, head) -------------------------------------------------------------------------------------


def mask_stream(
    seed: Integers, step: Integers, layer: Integers, site: Integers, row: Integers, head: Integers
) -> UInt32[Array, "*shape 2"]:
    """The two words that make the mask of one (row, head). Arguments broadcast: row [B, 1], head [H] give [B, H, 2].

    Limits: layer < 4096, site < 16, head < 65536, the others 32 bits. Python integers are checked, arrays cannot be.
    """
    place = _word("layer", layer, 1 << 12) << np.uint32(20)
    place = place | _word("site", site, 1 << 4) << np.uint32(16)
    place = place | _word("head", head, 1 << 16)
    return jnp.stack(threefry(_word("seed", seed), _word("step", step), _word("row", row), place), axis=-1)


def threefry(k0: Any, k1: Any, x0: Any, x1: Any) -> tuple[Any, Any]:
    """Threefry-2x32 with 20 rounds (Salmon et al., 2011) of the key (k0, k1) and the counter (x0, x1), all uint32."""
    keys = (k0, k1, k0 ^ k1 ^ np.uint32(0x1BD11BDA))
    x0, x1 = jnp.broadcast_arrays(x0 + keys[0], x1 + keys[1])
    for group in range(5):
        for r in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x0 = x0 + x1
            x1 = (x1 << np.uint32(r) | x1 >> np.uint32(32 - r)) ^ x0
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + np.uint32(group + 1)
    return x0, x1


# --- what a kernel computes: a term per pair of queries, two per key, three operations per (pair, key) --------------

SECOND = 0xADB4A92D  # a multiplier with a good two-dimensional lattice mod 2**32 (Steele and Vigna, 2022)


def row_term(a: Any, pair: Any) -> Any:
    """R of a pair of queries: pair p is q = 16 (p // 8) + p % 8 and q + 8. `a` is the stream's first word."""
    return finalise(a ^ pair)


def column_terms(a: Any, b: Any, key: Any) -> tuple[Any, Any]:
    """C and the odd multiplier D of a key, given a stream's two words."""
    column = finalise(b ^ key)
    return column, finalise(a ^ column) | np.uint32(1)


def keep_pair(row: Any, column: Any, multiplier: Any, rate: float) -> tuple[Any, Any]:
    """Whether the elements of a pair are kept: (query with bit 3 clear, query with bit 3 set)."""
    word = (row ^ column) * multiplier
    return _survives(word, rate), _survives(word * np.uint32(SECOND), rate)


def finalise(x: Any) -> Any:
    """A bijection of 32-bit words in which every input bit changes every output bit with probability near 1/2."""
    x = (x ^ x >> np.uint32(16)) * np.uint32(0x21F0AAAD)
    x = (x ^ x >> np.uint32(15)) * np.uint32(0xD35A2D97)
    return x ^ x >> np.uint32(15)


def threshold(rate: float) -> int:
    """How many of an element's 65536 possible values mean "dropped"."""
    dropped = round(rate * 65536) if 0.0 <= rate < 1.0 else 65536
    if dropped == 65536:
        raise ValueError(f"a dropout rate must be at least 0 and less than 1 (by 2**-17 or more), got {rate}")
    return dropped


def _survives(words: Any, rate: float) -> Any:
    # The upper half decides. It is compared as a signed number, because a TPU (v5e) has no unsigned comparison.
    return words.astype(np.int32) >= np.int32((threshold(rate) << 16) - (1 << 31))


# --- whole masks ----------------------------------------------------------------------------------------------------


def bits(stream: UInt32[Either, "*shape 2"], queries: Integers, keys: Integers) -> UInt32[Either, "*shape Tq Tk"]:
    """The 16-bit value of every (query, key); `queries` [..., Tq] and `keys` [..., Tk] are integer positions."""
    return _words(stream, queries, keys) >> np.uint32(16) ^ np.uint32(0x8000)


def keep(stream: UInt32[Either, "*shape 2"], queries: Integers, keys: Integers, rate: float) -> Bool[Either, "*shape Tq Tk"]:
    """False where dropout at `rate` (a Python number) drops: exactly where `bits` is less than round(rate * 65536)."""
    return _survives(_words(stream, queries, keys), rate)


def dropout(x: Float[Array, "*shape T E"], stream: UInt32[Array, "*shape 2"], rate: float) -> Float[Array, "*shape T E"]:
    """Inverted dropout of activations: the query is the time, the key the channel. Rate 0 is the identity."""
    dropped = threshold(rate)
    if dropped == 0:
        return x
    kept = keep(stream, jnp.arange(x.shape[-2]), jnp.arange(x.shape[-1]), rate)
    return jnp.where(kept, x * (65536 / (65536 - dropped)), 0)


def _words(stream: Any, queries: Integers, keys: Integers) -> Any:
    """A 32-bit word per element; its upper half decides."""
    queries, keys = queries.astype(np.uint32), keys.astype(np.uint32)
    pair = queries >> np.uint32(4) << np.uint32(3) | queries & np.uint32(7)
    which = queries >> np.uint32(3) & np.uint32(1)
    a, b = stream[..., 0, None], stream[..., 1, None]
    column, multiplier = column_terms(a, b, keys)
    words = (row_term(a, pair)[..., :, None] ^ column[..., None, :]) * multiplier[..., None, :]
    return words * (np.uint32(1) + which * np.uint32(SECOND - 1))[..., :, None]


def _word(name: str, value: Integers, limit: int = 1 << 32) -> Any:
    """`value` as uint32, checked against its limit where that is possible: when it is not an array."""
    if isinstance(value, (int, np.integer)):
        if not 0 <= value < limit:
            raise ValueError(f"{name} must be in [0, {limit}), got {value}")
        value = np.asarray(value, np.uint32)
    return jnp.asarray(value.astype(np.uint32))
