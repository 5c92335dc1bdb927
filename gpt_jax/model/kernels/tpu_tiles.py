"""Helper functions for the TPU attention kernels (kernels/tpu.py)."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, UInt32

from gpt_jax.model.dropout import column_terms, keep_pair, row_term, threshold

LANES = 128
"""Number of lanes of a vector register, and of queries and keys in a tile."""
MAX_BLOCK = 512
"""Maximum number of queries, and of keys, in a block."""
VMEM_SPARE = 8 << 20
"""Bytes of vector memory for everything except whole rows: blocks, spilled registers and the compiler's own scratch."""

RECIPROCAL = pltpu.reciprocal if hasattr(pltpu, "reciprocal") else pl.reciprocal  # moved to pltpu after jax 0.10

Ref = Any  # a reference to memory inside a kernel
Stream = tuple[UInt32[Array, ""], UInt32[Array, ""]]


class KernelConfig(NamedTuple):
    """The static properties of a kernel."""

    time: int
    """Number of positions, a multiple of `LANES`."""
    heads: int
    """Number of heads on this device."""
    dim: int
    """Size of a head: 64 or 128."""
    rate: float
    """Dropout rate on the probabilities."""
    segments: bool
    """Whether queries attend only to keys of their own segment."""
    precision: jax.lax.Precision
    """Precision of products of float32 numbers."""

    @property
    def block(self) -> int:
        """Number of positions in a block: the largest multiple of `LANES` up to `MAX_BLOCK` that divides the time."""
        return max(size for size in range(LANES, MAX_BLOCK + 1, LANES) if self.time % size == 0)

    @property
    def several(self) -> bool:
        """Whether the sequence consists of several blocks."""
        return self.time > self.block

    @property
    def in_group(self) -> int:
        """Number of heads in a group."""
        return LANES // self.dim

    @property
    def groups(self) -> int:
        """Number of groups. With two heads in a group and an odd number of heads, the last group lacks a head."""
        return -(-self.heads // self.in_group)

    @property
    def score_scale(self) -> float:
        """Factor that turns the product of a query and a key into the base-2 logarithm of their unnormalized probability."""
        return math.log2(math.e) / math.sqrt(self.dim)

    @property
    def kept_scale(self) -> float:
        """Factor by which dropout scales the probabilities that it keeps."""
        return 65536 / (65536 - threshold(self.rate))


class MaskTerms(NamedTuple):
    """The terms of one head's dropout mask for one block of queries and one block of keys (docs/masks.md)."""

    row: UInt32[Array, "pairs 1"]
    column: UInt32[Array, "1 keys"]
    multiplier: UInt32[Array, "1 keys"]


def streams(config: KernelConfig, words: Ref) -> list[Stream]:
    """Returns the two words of the stream of each head in the group, or an empty list without dropout."""
    return [(words[0, 2 * head], words[0, 2 * head + 1]) for head in range(config.in_group)] if config.rate else []


def query_terms(config: KernelConfig, stream: Stream, start: Any) -> UInt32[Array, "pairs 1"]:
    """Returns the term R of docs/masks.md for each pair of queries in the block that begins at `start`."""
    pairs = iota((config.block // 2, LANES), 0) + (start >> 1)
    return row_term(stream[0], pairs.astype(jnp.uint32))[:, :1]


def key_terms(config: KernelConfig, a: Array, b: Array, start: Any) -> tuple[UInt32[Array, "1 keys"], UInt32[Array, "1 keys"]]:
    """Returns the terms C and D of docs/masks.md for each key in the block that begins at `start`."""
    keys = iota((8, config.block), 1) + start
    column, multiplier = column_terms(a, b, keys.astype(jnp.uint32))
    return column[:1], multiplier[:1]


def drop(config: KernelConfig, terms: MaskTerms, first: int, keys: slice, arrays: Iterable[Array]) -> list[Array]:
    """Sets the dropped elements of [LANES, keys] arrays to zero, for the tile of queries that begins at `first` in the block."""
    # The queries of a pair, which are 8 apart, are in the same row of two neighboring registers.
    row = terms.row[first // 2 : (first + LANES) // 2].reshape(LANES // 16, 8, 1)
    kept = keep_pair(row, terms.column[None, :, keys], terms.multiplier[None, :, keys], config.rate)

    def drop(x: Array) -> Array:
        by_pair = x.reshape(LANES // 16, 2, 8, x.shape[1])
        return jnp.stack([jnp.where(keep, by_pair[:, half], 0.0) for half, keep in enumerate(kept)], 1).reshape(x.shape)

    return [drop(x) for x in arrays]


def pipelined(units: Iterable[Any], begin: Callable[[Any], Any], finish: Callable[[Any, Any], None], ahead: int) -> None:
    """Calls `finish(unit, begin(unit))` for all units, with the calls of `begin` running `ahead` units ahead of `finish`.

    The cores issue instructions in program order. Without this reordering, the matrix units would wait for each softmax.
    """
    begun: list[tuple[Any, Any]] = []
    for unit in units:
        begun.append((unit, begin(unit)))
        if len(begun) > ahead:
            finish(*begun.pop(0))
    for unit, started in begun:
        finish(unit, started)


def dot(config: KernelConfig, a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Returns the product of two matrices, contracted over one axis of each, in float32."""
    precision = config.precision if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def only_head(config: KernelConfig, head: int, x: Array) -> Array:
    """Returns `x` [rows, LANES] with zeros outside one head's lanes."""
    if config.in_group == 1:
        return x
    is_first = iota(x.shape, 1) < config.dim
    return jnp.where(is_first if head == 0 else ~is_first, x, jnp.zeros_like(x))


def existing_heads(config: KernelConfig, group_axis: int, x: Array) -> Array:
    """Returns `x` [rows, LANES] with zeros in the lanes of a head that the last group lacks, whose contents are undefined."""
    if config.heads % config.in_group == 0:
        return x
    lane = pl.program_id(group_axis) * LANES + iota(x.shape, 1)
    return jnp.where(lane < config.heads * config.dim, x, jnp.zeros_like(x))


def side_by_side(config: KernelConfig, heads: tuple[Array, ...]) -> Array:
    """Returns an array [LANES, LANES] with each head's lanes taken from its own array, [LANES, LANES] or [LANES, 1]."""
    return heads[0] if config.in_group == 1 else jnp.where(iota((LANES, LANES), 1) < config.dim, heads[0], heads[1])


def reciprocal(x: Array, dtype: Any) -> Array:
    """Returns 1 / x. For bfloat16 results, uses an approximation and one step of Newton's method, which is much cheaper."""
    if dtype == jnp.float32:
        return 1 / x
    approximation = RECIPROCAL(x, approx=True)
    return approximation * (2.0 - x * approximation)


def as_column(row: Array) -> Array:
    """Returns a row [1, LANES] as a column that is repeated along the lanes, [LANES, LANES]."""
    return jnp.broadcast_to(row, (LANES, LANES)).T


def repeat(column: Array, width: int) -> Array:
    """Repeats a column [LANES, LANES] along the lanes, to [LANES, width]."""
    return jnp.concatenate([column] * (width // LANES), 1)


def triangle() -> Array:
    """Returns the causal mask of a tile on the diagonal, bool [queries, keys]."""
    return iota((LANES, LANES), 0) >= iota((LANES, LANES), 1)


def iota(shape: tuple[int, ...], axis: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def first_position(config: KernelConfig, block: Any) -> Any:
    """Returns the first position of a block."""
    return pl.multiple_of(block * config.block, config.block) if config.several else 0


def fill_zeros(ref: Ref) -> None:
    ref[...] = jnp.zeros_like(ref)


def optional(present: bool, refs: tuple[Ref, ...]) -> tuple[Ref, tuple[Ref, ...]]:
    """Returns the first of `refs`, or None if it is not present, and the remaining ones."""
    return (refs[0], refs[1:]) if present else (None, refs)


def vmem_limit(rows: int) -> int:
    """Returns the vector memory limit, in bytes, for a kernel that holds `rows` bytes of whole rows."""
    return max(rows + VMEM_SPARE, 16 << 20)
