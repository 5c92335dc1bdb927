"""Causal flash attention for TPUs in Pallas, with the dropout masks of docs/masks.md computed inside (docs/kernels.md).

As in FlashAttention-2 (Dao, 2023), the forward kernel keeps its output and the logarithm of each row's normalizer, from which
the backward kernel computes the probabilities again, tile by tile. Tiles above the diagonal are skipped.

A TPU's vector registers and matrix units are 128 lanes wide. A kernel therefore handles a group of heads that fills 128 lanes:
two heads of 64 or one of 128. Two heads stay side by side; a product for one of them multiplies the other's lanes by zero.
Nothing is shifted or padded for it in memory.

The kernels work on blocks of up to 512 queries and 512 keys, whose tiles of 128 x 128 are unrolled in an order that keeps the
matrix units busy. A sequence of up to 512 tokens is one block, so that each softmax sees its whole row; longer ones loop over
blocks with a running maximum.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, UInt32

from gpt_jax.model.dropout import column_terms, keep_pair, row_term, threshold
from gpt_jax.model.kernels.blockwise import MASKED

LANES = 128
"""Lanes of a vector register, and the number of queries and of keys in a tile."""
MAX_BLOCK = 512
"""Maximum number of queries, and of keys, in a block."""
SCORES_AHEAD = 2
"""Number of rows of tiles whose scores the forward kernel computes ahead of their softmax (docs/kernels.md)."""
TILES_AHEAD = 4
"""Number of tiles whose first two products the backward kernel computes ahead (docs/kernels.md)."""
VMEM_SPARE = 8 << 20
"""Bytes of vector memory for everything but whole rows: blocks, spilled registers and the compiler's own scratch."""

INTERPRET: Any = False
"""The argument `interpret` of `pallas_call`, with which tests run the kernels on CPUs."""

RECIPROCAL = pltpu.reciprocal if hasattr(pltpu, "reciprocal") else pl.reciprocal  # where it is in jax 0.12, and before

Ref = Any  # a reference to memory inside a kernel
Packed = Float[Array, "batch three time width"]
"""Queries, keys and values with all heads side by side, width = heads * dim. In this layout, XLA writes the projection's result
and reads its gradient without a copy."""
Stream = tuple[UInt32[Array, ""], UInt32[Array, ""]]


class Shape(NamedTuple):
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
        """Whether the time consists of several blocks."""
        return self.time > self.block

    @property
    def in_group(self) -> int:
        """Number of heads in a group."""
        return LANES // self.dim

    @property
    def groups(self) -> int:
        """Number of groups. If the number of heads is odd, the last group lacks a head."""
        return -(-self.heads // self.in_group)

    @property
    def score_scale(self) -> float:
        """Factor from the product of a query and a key to the logarithm, base 2, of the weight."""
        return math.log2(math.e) / math.sqrt(self.dim)

    @property
    def kept_scale(self) -> float:
        """Factor of the probabilities that dropout keeps."""
        return 65536 / (65536 - threshold(self.rate))


class MaskTerms(NamedTuple):
    """The terms of one head's dropout mask for one block of queries and one of keys (docs/masks.md)."""

    row: UInt32[Array, "pairs 1"]
    column: UInt32[Array, "1 keys"]
    multiplier: UInt32[Array, "1 keys"]


# -- forward ------------------------------------------------------------------------------------------------------------------


def _forward_kernel(shape: Shape, words: Ref, query: Ref, key: Ref, value: Ref, *refs: Ref) -> None:
    """Computes one block of queries of one group, as grid point (example, group, block).

    Refs:
      words: uint32 [1, 2 * in_group], the streams of the group's heads.
      query, output: [block, LANES]; key, value: [time, LANES].
      segments: int32 [1, time], if there are any.
      log_normalizers: float32 [in_group, block], base 2.
      columns: float32 [LANES, LANES], scratch for the maximum and the normalizer of each unit, a column each.
      state: scratch if there are several blocks: maximum, normalizer and mixed values, float32 [in_group, block, LANES] each.
    """
    segments, (output, log_normalizers, columns, *state) = _optional(shape.segments, refs)
    block, size, dtype = pl.program_id(2), shape.block, query.dtype
    streams = _streams(shape, words)
    row_terms = [_row_terms(shape, stream, block * size) for stream in streams]
    mixed_by_unit: dict[tuple[int, int], tuple[Array, Array]] = {}

    def attend(key_block: Any, diagonal: bool) -> None:
        """Lets the queries attend to one block of keys. A unit is one head's tile of queries with all their keys in the block."""
        start = _start(shape, key_block)
        terms = [MaskTerms(rows, *_column_terms(shape, *pair, start)) for rows, pair in zip(row_terms, streams, strict=True)]

        def scores(unit: tuple[int, int]) -> Array:
            head, first = unit
            width = first + LANES if diagonal else size
            keys = pl.ds(start, width)
            s = _dot(shape, _only(shape, head, query[pl.ds(first, LANES), :]), _existing(shape, 1, key[keys, :]), (1, 1))
            if shape.segments:
                own = _column(segments[:, pl.ds(_start(shape, block) + first, LANES)])
                s = jnp.where(_repeat(own, width) == segments[:, keys], s, MASKED)
            if diagonal:
                last = jnp.where(_triangle(), s[:, first:], MASKED)
                s = jnp.concatenate([s[:, :first], last], 1) if first else last
            return s

        def mix(unit: tuple[int, int], s: Array) -> None:
            head, first = unit
            rows, number = pl.ds(first, LANES), first // LANES * shape.in_group + head
            highest = s.max(1, keepdims=True)
            if shape.several:
                before, normalizer_before, mixed_before = (ref[head, rows, :] for ref in state)
                highest = jnp.maximum(highest, before)
            weights = jnp.exp2((s - (_repeat(highest, s.shape[1]) if shape.several else highest)) * shape.score_scale)
            normalizer = weights.sum(1, keepdims=True)
            if shape.rate:
                (weights,) = _drop(shape, terms[head], first, slice(0, s.shape[1]), [weights])
            mixed = _dot(shape, weights.astype(dtype), value[pl.ds(start, s.shape[1]), :], (1, 0))
            if shape.several:
                shrink = jnp.exp2((before - highest) * shape.score_scale)
                normalizer, mixed = normalizer + shrink * normalizer_before, mixed + shrink * mixed_before
            if not diagonal:
                for ref, new in zip(state, (highest, normalizer, mixed), strict=True):
                    ref[head, rows, :] = new
                return
            # Columns are cheap to store, and one transposition below turns all of them into rows.
            columns[:, number : number + 1] = highest[:, :1]
            columns[:, LANES // 2 + number : LANES // 2 + number + 1] = normalizer[:, :1]
            mixed_by_unit[unit] = mixed, normalizer
            if head == shape.in_group - 1:
                mixed, normalizer = (_side_by_side(shape, heads) for heads in zip(*mixed_by_unit.values(), strict=True))
                mixed_by_unit.clear()
                output[rows, :] = (mixed * (_reciprocal(normalizer, dtype) * shape.kept_scale)).astype(dtype)

        units = [(head, first) for first in range(0, size, LANES) for head in range(shape.in_group)]
        _pipelined(units, scores, mix, SCORES_AHEAD)

    if shape.several:
        state[0][...] = jnp.full_like(state[0], MASKED)
        for ref in state[1:]:
            ref[...] = jnp.zeros_like(ref)
        jax.lax.fori_loop(0, block, lambda key_block, _: attend(key_block, diagonal=False), None)
    attend(block, diagonal=True)

    rows = columns[...].T
    logarithms = rows[: LANES // 2] * shape.score_scale + jnp.log2(rows[LANES // 2 :])
    for tile in range(size // LANES):
        units = slice(tile * shape.in_group, (tile + 1) * shape.in_group)
        log_normalizers[:, tile * LANES : (tile + 1) * LANES] = logarithms[units]


def forward(
    shape: Shape, qkv: Packed, words: UInt32[Array, "batch groups 1 words"], segments: Int[Array, "batch 1 time"] | None
) -> tuple[Float[Array, "batch time width"], Float[Array, "batch groups in_group time"]]:
    """Returns the output and the logarithm, base 2, of each row's normalizer in float32."""
    batch, _, time, width = qkv.shape
    block = shape.block
    spec = lambda size, part, index: pl.BlockSpec((None, None, size, LANES), index(part))  # noqa: E731
    whole = lambda part: lambda b, j, i: (b, part, 0, j)  # noqa: E731
    in_specs = [
        pl.BlockSpec((None, None, 1, words.shape[3]), lambda b, j, i: (b, j, 0, 0), memory_space=pltpu.SMEM),
        spec(block, 0, lambda part: lambda b, j, i: (b, part, i, j)),
        spec(time, 1, whole),
        spec(time, 2, whole),
    ]
    if shape.segments:
        in_specs.append(pl.BlockSpec((None, 1, time), lambda b, j, i: (b, 0, 0)))
    state = [pltpu.VMEM((shape.in_group, block, LANES), jnp.float32)] * 3 if shape.several else []
    return pl.pallas_call(
        functools.partial(_forward_kernel, shape),
        grid=(batch, shape.groups, time // block),
        in_specs=in_specs,
        out_specs=[
            pl.BlockSpec((None, block, LANES), lambda b, j, i: (b, i, j)),
            pl.BlockSpec((None, None, shape.in_group, block), lambda b, j, i: (b, j, 0, i)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((batch, time, width), qkv.dtype),
            jax.ShapeDtypeStruct((batch, shape.groups, shape.in_group, time), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((LANES, LANES), jnp.float32), *state],
        # A chip with two cores divides the examples.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_vmem(4 * time * LANES * qkv.dtype.itemsize),
        ),
        name="attention_forward",
        interpret=INTERPRET,
    )(words, qkv, qkv, qkv, *([segments] if shape.segments else []))


# -- backward -----------------------------------------------------------------------------------------------------------------


class BackwardRefs(NamedTuple):
    """The memory of the backward kernel, in the order of its arguments after `words`."""

    query: Ref
    """[time, LANES]."""
    key: Ref
    """[block, LANES]."""
    value: Ref
    """[block, LANES]."""
    output: Ref
    """[time, LANES]."""
    log_normalizers: Ref
    """float32 [in_group, time], base 2."""
    gradient: Ref
    """Gradient of the output, [time, LANES]."""
    segments: Ref
    """int32 [1, time], or None."""
    gradients: Ref
    """Results: the gradients of queries, keys and values, [3, time, LANES]."""
    bias_gradients: Ref
    """Results: their sums over time and examples, float32 [3, LANES]."""
    query_total: Ref
    """Scratch: the gradients of the queries, transposed, float32 [LANES, time]."""
    key_total: Ref
    """Scratch: the gradients of the keys, transposed, float32 [LANES, block]."""
    value_total: Ref
    """Scratch: the gradients of the values, transposed, float32 [LANES, block]."""


def _backward_kernel(shape: Shape, words: Ref, *arguments: Ref) -> None:
    """Computes the gradients of a block of keys and values, and its part of the queries'; grid point (group, example, block).

    The gradients are accumulated transposed, [dim, positions]: a product whose result has 64 columns leaves half of a matrix unit
    idle, and one whose result has 64 rows does not.
    """
    inputs, (segments, results) = arguments[:6], _optional(shape.segments, arguments[6:])
    refs = BackwardRefs._make((*inputs, segments, *results))
    block, size = pl.program_id(2), shape.block
    start = _start(shape, block)
    streams = _streams(shape, words)
    column_terms = [_column_terms(shape, *stream, start) for stream in streams]
    keys_transposed = refs.key[...].T

    def attend(query_block: Any, diagonal: bool) -> None:
        row_terms = [_row_terms(shape, stream, _start(shape, query_block)) for stream in streams]
        terms = [MaskTerms(rows, *columns) for rows, columns in zip(row_terms, column_terms, strict=True)]
        _differentiate_block(shape, refs, terms, keys_transposed, _start(shape, query_block), start, diagonal)

    if shape.several:
        pl.when(block == 0)(lambda: _fill_zeros(refs.query_total))
    attend(block, diagonal=True)
    if shape.several:
        jax.lax.fori_loop(block + 1, shape.time // size, lambda later, _: attend(later, diagonal=False), None)

    pl.when((pl.program_id(1) == 0) & (block == 0))(lambda: _fill_zeros(refs.bias_gradients))
    scale = shape.kept_scale / math.sqrt(shape.dim)
    # The block's queries attend to no later keys, so the total of their gradients is complete, too.
    for part, (total, offset, factor) in enumerate(
        ((refs.query_total, start, scale), (refs.key_total, 0, scale), (refs.value_total, 0, shape.kept_scale))
    ):
        for first in range(0, size, LANES):
            tile = (total[:, pl.ds(offset + first, LANES)] * factor).T
            refs.gradients[part, pl.ds(start + first, LANES), :] = tile.astype(refs.gradients.dtype)
            refs.bias_gradients[part : part + 1, :] += tile.sum(0, keepdims=True)


def _differentiate_block(
    shape: Shape, refs: BackwardRefs, terms: list[MaskTerms], keys_transposed: Array, start: Any, key_start: Any, diagonal: bool
) -> None:
    """Adds what the tiles of one block of queries and one of keys contribute to the totals.

    Args:
      terms: the terms of each head's dropout mask for these blocks.
      keys_transposed: [LANES, block].
      start, key_start: first positions of the blocks.
      diagonal: whether the blocks have the same positions, so that the tiles above the diagonal are left out.
    """
    queries_transposed, gradients_transposed = (ref[pl.ds(start, shape.block), :].T for ref in (refs.query, refs.gradient))
    logarithms: dict[tuple[int, int], Array] = {}
    inner: dict[tuple[int, int], Array] = {}

    def prepare_rows(first: int) -> None:
        """Computes two columns for each head: the normalizer's logarithm, and the sum of probability x its gradient."""
        rows = pl.ds(start + first, LANES)
        products = refs.gradient[rows, :].astype(jnp.float32) * refs.output[rows, :].astype(jnp.float32)
        for head in range(shape.in_group):
            logarithms[head, first] = _column(refs.log_normalizers[head : head + 1, rows])
            inner[head, first] = _only(shape, head, products).sum(1, keepdims=True) * (1 / shape.kept_scale)

    def multiply(tile: tuple[int, int, int]) -> tuple[Array, Array]:
        """Returns the scores and the gradient of the weights, before their masks."""
        head, first, k = tile
        rows, keys = pl.ds(start + first, LANES), slice(k, k + LANES)
        if (head, first) not in inner:
            prepare_rows(first)
        of_key, of_value = (_existing(shape, 0, ref[keys, :]) for ref in (refs.key, refs.value))
        of_rows = (_only(shape, head, ref[rows, :]) for ref in (refs.query, refs.gradient))
        return _dot(shape, next(of_rows), of_key, (1, 1)), _dot(shape, next(of_rows), of_value, (1, 1))

    def differentiate(tile: tuple[int, int, int], multiplied: tuple[Array, Array]) -> None:
        head, first, k = tile
        scores, weights_gradient = multiplied
        on_diagonal, dtype = diagonal and k == first, refs.query.dtype
        weights = jnp.exp2(scores * shape.score_scale - logarithms[head, first])
        if on_diagonal:
            weights = jnp.where(_triangle(), weights, 0.0)
        if shape.segments:
            own = _column(refs.segments[:, pl.ds(start + first, LANES)])
            weights = jnp.where(own == refs.segments[:, pl.ds(key_start + k, LANES)], weights, 0.0)
        kept = weights
        if shape.rate:
            weights_gradient, kept = _drop(shape, terms[head], first, slice(k, k + LANES), [weights_gradient, weights])
        scores_gradient = (weights * (weights_gradient - inner[head, first])).astype(dtype)
        lanes, rows, keys = slice(head * shape.dim, (head + 1) * shape.dim), slice(first, first + LANES), slice(k, k + LANES)
        # The first part that a total receives replaces what was in memory.
        for total, at, is_first, part in (
            (refs.value_total, keys, on_diagonal, _dot(shape, gradients_transposed[lanes, rows], kept.astype(dtype), (1, 0))),
            (refs.key_total, keys, on_diagonal, _dot(shape, queries_transposed[lanes, rows], scores_gradient, (1, 0))),
            (
                refs.query_total,
                pl.ds(start + first, LANES),
                k == 0 and not shape.several,
                _dot(shape, keys_transposed[lanes, keys], scores_gradient, (1, 1)),
            ),
        ):
            total[lanes, at] = part if is_first else total[lanes, at] + part

    tiles = [
        (head, first, k)
        for first in range(0, shape.block, LANES)
        for k in range(0, first + LANES if diagonal else shape.block, LANES)
        for head in range(shape.in_group)
    ]
    _pipelined(tiles, multiply, differentiate, TILES_AHEAD)


def backward(
    shape: Shape,
    qkv: Packed,
    words: UInt32[Array, "batch groups 1 words"],
    segments: Int[Array, "batch 1 time"] | None,
    output: Float[Array, "batch time width"],
    log_normalizers: Float[Array, "batch groups in_group time"],
    gradient: Float[Array, "batch time width"],
) -> tuple[Packed, Float[Array, "three width"]]:
    """Returns the gradient of `qkv`, and its sum over batch and time in float32: that of the projection's bias."""
    batch, _, time, width = qkv.shape
    block = shape.block
    # Whole rows of long sequences are in memory once, because their transfer takes little of the time.
    mode = {"pipeline_mode": pl.Buffered(1)} if shape.several else {}
    rows = pl.BlockSpec((None, time, LANES), lambda j, b, i: (b, 0, j), **mode)
    in_specs = [
        pl.BlockSpec((None, None, 1, words.shape[3]), lambda j, b, i: (b, j, 0, 0), memory_space=pltpu.SMEM),
        pl.BlockSpec((None, None, time, LANES), lambda j, b, i: (b, 0, 0, j), **mode),
        pl.BlockSpec((None, None, block, LANES), lambda j, b, i: (b, 1, i, j)),
        pl.BlockSpec((None, None, block, LANES), lambda j, b, i: (b, 2, i, j)),
        rows,
        pl.BlockSpec((None, None, shape.in_group, time), lambda j, b, i: (b, j, 0, 0)),
        rows,
    ]
    if shape.segments:
        in_specs.append(pl.BlockSpec((None, 1, time), lambda j, b, i: (b, 0, 0)))
    return pl.pallas_call(
        functools.partial(_backward_kernel, shape),
        grid=(shape.groups, batch, time // block),
        in_specs=in_specs,
        out_specs=[
            pl.BlockSpec((None, 3, time, LANES), lambda j, b, i: (b, 0, 0, j), **mode),
            pl.BlockSpec((3, LANES), lambda j, b, i: (0, j)),
        ],
        out_shape=[jax.ShapeDtypeStruct(qkv.shape, qkv.dtype), jax.ShapeDtypeStruct((3, width), jnp.float32)],
        scratch_shapes=[pltpu.VMEM((LANES, time), jnp.float32), *[pltpu.VMEM((LANES, block), jnp.float32)] * 2],
        # A chip with two cores divides the groups; each sums the bias gradients of its own over the examples.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_vmem((6 * qkv.dtype.itemsize + 4) * time * LANES) if shape.several else None,
        ),
        name="attention_backward",
        interpret=INTERPRET,
    )(words, qkv, qkv, qkv, output, log_normalizers, gradient, *([segments] if shape.segments else []))


# -- pieces of both -----------------------------------------------------------------------------------------------------------


def _streams(shape: Shape, words: Ref) -> list[Stream]:
    """Returns the two words of each head in the group; none without dropout."""
    return [(words[0, 2 * head], words[0, 2 * head + 1]) for head in range(shape.in_group)] if shape.rate else []


def _row_terms(shape: Shape, stream: Stream, start: Any) -> UInt32[Array, "pairs 1"]:
    """Returns R for each pair of queries in the block that begins at `start`."""
    pairs = _iota((shape.block // 2, LANES), 0) + (start >> 1)
    return row_term(stream[0], pairs.astype(jnp.uint32))[:, :1]


def _column_terms(shape: Shape, a: Array, b: Array, start: Any) -> tuple[UInt32[Array, "1 keys"], UInt32[Array, "1 keys"]]:
    """Returns C and D for each key in the block that begins at `start`."""
    keys = _iota((8, shape.block), 1) + start
    column, multiplier = column_terms(a, b, keys.astype(jnp.uint32))
    return column[:1], multiplier[:1]


def _drop(shape: Shape, terms: MaskTerms, first: int, keys: slice, arrays: Iterable[Array]) -> list[Array]:
    """Sets the dropped elements of [LANES, keys] arrays to zero, for the tile of queries that begins at `first` in the block."""
    # The queries of a pair, 8 apart, are the same rows of two neighboring registers.
    row = terms.row[first // 2 : (first + LANES) // 2].reshape(LANES // 16, 8, 1)
    kept = keep_pair(row, terms.column[None, :, keys], terms.multiplier[None, :, keys], shape.rate)

    def drop(x: Array) -> Array:
        by_pair = x.reshape(LANES // 16, 2, 8, x.shape[1])
        return jnp.stack([jnp.where(keep, by_pair[:, half], 0.0) for half, keep in enumerate(kept)], 1).reshape(x.shape)

    return [drop(x) for x in arrays]


def _pipelined(units: Iterable[Any], begin: Callable[[Any], Any], finish: Callable[[Any, Any], None], ahead: int) -> None:
    """Calls `finish(unit, begin(unit))` for all units, in an order in which `begin` is `ahead` units ahead of `finish`.

    The cores issue instructions in the order of the program. Without this, the matrix units would wait for each softmax.
    """
    begun: list[tuple[Any, Any]] = []
    for unit in units:
        begun.append((unit, begin(unit)))
        if len(begun) > ahead:
            finish(*begun.pop(0))
    for unit, started in begun:
        finish(unit, started)


def _dot(shape: Shape, a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Returns the product of two matrices over one axis of each, in float32."""
    precision = shape.precision if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _only(shape: Shape, head: int, x: Array) -> Array:
    """Returns [rows, LANES] with zeros outside of one head's lanes."""
    if shape.in_group == 1:
        return x
    is_first = _iota(x.shape, 1) < shape.dim
    return jnp.where(is_first if head == 0 else ~is_first, x, jnp.zeros_like(x))


def _existing(shape: Shape, group_axis: int, x: Array) -> Array:
    """Returns [rows, LANES] with zeros in the lanes of a head that the last group lacks, where memory holds anything."""
    if shape.heads % shape.in_group == 0:
        return x
    lane = pl.program_id(group_axis) * LANES + _iota(x.shape, 1)
    return jnp.where(lane < shape.heads * shape.dim, x, jnp.zeros_like(x))


def _side_by_side(shape: Shape, heads: tuple[Array, ...]) -> Array:
    """Returns [LANES, LANES] with each head's lanes from its own array, which is [LANES, LANES] or [LANES, 1]."""
    return heads[0] if shape.in_group == 1 else jnp.where(_iota((LANES, LANES), 1) < shape.dim, heads[0], heads[1])


def _reciprocal(x: Array, dtype: Any) -> Array:
    """Returns 1 / x; for bfloat16 results by an approximation and one step of Newton's method, which is much cheaper."""
    if dtype == jnp.float32:
        return 1 / x
    approximation = RECIPROCAL(x, approx=True)
    return approximation * (2.0 - x * approximation)


def _column(row: Array) -> Array:
    """Returns [1, LANES] as a column that is repeated along the lanes, [LANES, LANES]."""
    return jnp.broadcast_to(row, (LANES, LANES)).T


def _repeat(column: Array, width: int) -> Array:
    """Repeats a column [LANES, LANES] to [LANES, width]."""
    return jnp.concatenate([column] * (width // LANES), 1)


def _triangle() -> Array:
    """Returns which keys the queries of a tile on the diagonal attend to."""
    return _iota((LANES, LANES), 0) >= _iota((LANES, LANES), 1)


def _iota(shape: tuple[int, ...], axis: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _start(shape: Shape, block: Any) -> Any:
    """Returns the first position of a block."""
    return pl.multiple_of(block * shape.block, shape.block) if shape.several else 0


def _fill_zeros(ref: Ref) -> None:
    ref[...] = jnp.zeros_like(ref)


def _optional(present: bool, refs: tuple[Ref, ...]) -> tuple[Ref, tuple[Ref, ...]]:
    """Splits off the first of `refs`, or None if it is not present."""
    return (refs[0], refs[1:]) if present else (None, refs)


def _vmem(rows: int) -> int:
    """Returns the limit of vector memory in bytes for a kernel that holds this many bytes of whole rows."""
    return max(rows + VMEM_SPARE, 16 << 20)
