"""Operations of the GPU attention kernels (kernels/gpu_kernels.py) on blocks and tiles: loads, stores, products and masks.

A tile is the part of a head's scores that belongs to one block of queries and one block of keys. Sequences are not padded to a
multiple of the block size. Loads and stores of the last block are masked instead.

Dropout masks are those of docs/masks.md, computed element by element. The two queries of a pair are eight rows or columns apart
in a tile, so the same thread computes both, whether the tile is transposed or not. Because a query's place in its pair depends
only on its place in the block, the compiler sees that both elements share the term R and the product (R ^ C) * D, and computes
these once. The terms C and D of a key take 19 operations, and a thread would need those of 16 keys for 64 scores. XLA therefore
computes them before the kernel runs.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from gpt_jax.model.dropout import SECOND, column_terms, row_term, threshold
from gpt_jax.model.kernels.blockwise import Masks
from gpt_jax.model.kernels.gpu_tuning import TuningConfig

Ref = Any  # a reference to memory inside a kernel


class KernelConfig(NamedTuple):
    """The static properties of a kernel."""

    rate: float
    """Dropout rate on the probabilities."""
    precision: str
    """Precision of products of float32 numbers."""
    tuning: TuningConfig
    time: int
    """Number of positions."""
    dim: int
    """Size of a head."""
    interpret: bool = False
    """Whether Pallas interprets the kernel instead of compiling it."""

    @property
    def score_scale(self) -> float:
        """Factor that turns the product of a query and a key into the base-2 logarithm of the weight."""
        return math.log2(math.e) / math.sqrt(self.dim)

    @property
    def kept_scale(self) -> float:
        """Factor of the probabilities that dropout keeps."""
        return 65536 / (65536 - threshold(self.rate))

    @property
    def gradient_scale(self) -> float:
        """Factor of the gradients of queries and keys."""
        return self.kept_scale / math.sqrt(self.dim)


# -- memory and arithmetic --------------------------------------------------------------------------------------------------


def load(config: KernelConfig, ref: Ref, start: Any, size: int, partial: bool = True) -> Array:
    """Loads `size` positions of [time, dim] or [time]. Positions after the end are zeros.

    Args:
      partial: whether the positions may extend beyond the end. If not, the load needs no mask.
    """
    block = ref.at[pl.ds(start, size)]
    if not (partial and config.time % size):
        return plgpu.load(block)
    inside = start + iota(size) < config.time
    return plgpu.load(block, mask=inside[:, None] if len(ref.shape) == 2 else inside, other=0)


def store(config: KernelConfig, ref: Ref, start: Any, value: Array) -> None:
    """Stores positions of [time, dim] or [time], from `start` to the end at most."""
    size = len(value)
    inside = start + iota(size) < config.time
    mask = None if config.time % size == 0 else inside[:, None] if value.ndim == 2 else inside
    plgpu.store(ref.at[pl.ds(start, size)], value.astype(ref.dtype), mask=mask)


def iota(size: int) -> Array:
    return jax.lax.iota(jnp.int32, size)


def dot(config: KernelConfig, a: Array, b: Array, transposed: bool = False) -> Array:
    """Returns a @ b, or a @ b.T if `transposed`, in float32."""
    dimensions = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=config.precision, preferred_element_type=jnp.float32)


def exp2(config: KernelConfig, x: Array) -> Array:
    """Returns 2**x, or 0 where this is less than 2**-126.

    Such small weights do not matter, and to compute them would take four instructions instead of one.
    """
    return jnp.exp2(x) if config.interpret else _inline_ptx("ex2.approx.ftz.f32 $0, $1;", x)


def opaque_zeros(config: KernelConfig, size: int) -> Array:
    """Returns float32 zeros [size, 1] that the compiler does not recognize as constants.

    With constant zeros, the compiler would convert a tile to 16 bits before it selects the kept elements. It would then have to
    unpack and repack the pairs of elements that one instruction converts.
    """
    zeros = jnp.zeros(size)
    return (zeros if config.interpret else _inline_ptx("mov.f32 $0, $1;", zeros))[:, None]


def _inline_ptx(instruction: str, x: Array) -> Array:
    """Applies a PTX instruction to each element of a float32 array ($1); its result ($0) is float32, too."""
    shape = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    return plgpu.elementwise_inline_asm(instruction, args=[x], constraints="=f,f", pack=1, result_shape_dtypes=[shape])[0]


# -- masks ------------------------------------------------------------------------------------------------------------------


class MaskArrays(NamedTuple):
    """The arrays from which a kernel computes masks, or its references to their parts for one head of one example."""

    stream: Any
    """uint32 [batch, heads, 2], or None without dropout."""
    key_terms: Any
    """Terms C and D of each key, both uint32 [batch, heads, time], or None without dropout."""
    segment_ids: Any
    """int32 [batch, time], or None."""


def mask_arrays(masks: Masks, time: int) -> MaskArrays:
    """Returns the arrays for sequences of `time` keys."""
    terms = None
    if masks.stream is not None:
        first, second = masks.stream[..., 0, None], masks.stream[..., 1, None]
        terms = column_terms(first, second, jnp.arange(time, dtype=jnp.uint32))
    return MaskArrays(masks.stream, terms, masks.segment_ids)


class BlockInfo(NamedTuple):
    """Properties of a block of queries or keys that determine the masks of its tiles."""

    positions: Array
    segment_ids: Array | None
    terms: tuple[Array, Array] | None
    """Dropout terms: for queries, R and the multiplier of their place in the pair; for keys, C and D."""


def query_info(config: KernelConfig, masks: MaskArrays, start: Any, size: int) -> BlockInfo:
    """Returns the properties of the block of `size` queries that begins at `start`."""
    terms = None
    if config.rate:
        place = iota(size).astype(jnp.uint32)
        pair = (start.astype(jnp.uint32) >> 1) + (place >> 4 << 3 | place & 7)
        terms = row_term(masks.stream[0], pair), jnp.where(place & 8 == 0, jnp.uint32(1), jnp.uint32(SECOND))
    segment_ids = None if masks.segment_ids is None else load(config, masks.segment_ids, start, size)
    return BlockInfo(start + iota(size), segment_ids, terms)


def key_info(config: KernelConfig, masks: MaskArrays, start: Any, size: int, partial: bool = True) -> BlockInfo:
    """Returns the properties of the block of `size` keys that begins at `start`; `partial` is as for `load`."""
    load_block = functools.partial(load, config, start=start, size=size, partial=partial)
    terms = (load_block(masks.key_terms[0]), load_block(masks.key_terms[1])) if config.rate else None
    return BlockInfo(start + iota(size), None if masks.segment_ids is None else load_block(masks.segment_ids), terms)


def mask(x: Array, fill: float, queries: BlockInfo, keys: BlockInfo, diagonal: bool, transposed: bool = False) -> Array:
    """Replaces the elements of a tile with `fill` where a query must not attend to a key.

    Args:
      diagonal: whether keys may be later than queries, so that the tile needs the causal mask.
      transposed: whether the tile is [keys, queries] instead of [queries, keys].
    """
    if diagonal:
        of_queries, of_keys = _broadcastable(queries.positions, keys.positions, transposed)
        x = jnp.where(of_queries >= of_keys, x, fill)
    if queries.segment_ids is not None and keys.segment_ids is not None:
        of_queries, of_keys = _broadcastable(queries.segment_ids, keys.segment_ids, transposed)
        x = jnp.where(of_queries == of_keys, x, fill)
    return x


def drop(
    config: KernelConfig, tiles: Sequence[Array], zeros: Array, queries: BlockInfo, keys: BlockInfo, transposed: bool = False
) -> list[Array]:
    """Sets the dropped elements of tiles to `zeros` without scaling the others; `transposed` is as for `mask`."""
    if queries.terms is None or keys.terms is None:
        return list(tiles)
    row, column = _broadcastable(queries.terms[0], keys.terms[0], transposed)
    place_multiplier, key_multiplier = _broadcastable(queries.terms[1], keys.terms[1], transposed)
    words = (row ^ column) * key_multiplier * place_multiplier
    kept = words.astype(jnp.int32) >= np.int32((threshold(config.rate) << 16) - (1 << 31))
    return [jnp.where(kept, tile, zeros) for tile in tiles]


def _broadcastable(of_queries: Array, of_keys: Array, transposed: bool) -> tuple[Array, Array]:
    """Reshapes vectors so that they broadcast to [queries, keys], or to [keys, queries] if `transposed`."""
    return (of_queries[None, :], of_keys[:, None]) if transposed else (of_queries[:, None], of_keys[None, :])
