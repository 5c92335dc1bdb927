"""Causal flash attention for TPUs in Pallas; the kernels compute the dropout masks of docs/masks.md (docs/kernels.md).

As in FlashAttention-2 (Dao, 2023), the forward kernel keeps its output and the logarithm of each row's normalizer, from which
the backward kernel recomputes the probabilities, tile by tile. Tiles above the diagonal are skipped.

A TPU's vector registers and matrix units are 128 lanes wide. A kernel therefore handles a group of heads that fills 128 lanes:
two heads of size 64 or one of size 128. Two heads stay side by side: a product for one head multiplies the other head's lanes by
zero, so nothing is shifted or padded in memory.

The kernels work on blocks of up to 512 queries and 512 keys, whose tiles of 128 x 128 are unrolled in an order that keeps the
matrix units busy. A sequence of up to 512 tokens is one block, so that each softmax sees its whole row. For longer sequences, the
kernels loop over blocks with a running maximum.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, UInt32

from gpt_jax.model.kernels import tpu_tiles as tiles
from gpt_jax.model.kernels.blockwise import MASKED
from gpt_jax.model.kernels.tpu_tiles import LANES, KernelConfig, MaskTerms, Ref

SCORES_AHEAD = 2
"""Number of rows of tiles whose scores the forward kernel computes ahead of their softmax (docs/kernels.md)."""
TILES_AHEAD = 4
"""Number of tiles whose first two products the backward kernel computes in advance (docs/kernels.md)."""

INTERPRET: Any = False
"""The argument `interpret` of `pallas_call`, which tests set in order to run the kernels on CPUs."""

Packed = Float[Array, "batch three time width"]
"""Queries, keys and values with all heads side by side, width = heads * dim. In this layout, XLA writes the projection's result
and reads its gradient without a copy."""


# -- forward ------------------------------------------------------------------------------------------------------------------


def _forward_kernel(config: KernelConfig, words: Ref, query: Ref, key: Ref, value: Ref, *refs: Ref) -> None:
    """Computes the output for one block of queries and one group of heads, at grid point (example, group, block).

    Refs:
      words: uint32 [1, 2 * in_group], the streams of the group's heads.
      query, output: [block, LANES]; key, value: [time, LANES].
      segments: int32 [1, time], if there are any.
      log_normalizers: float32 [in_group, block], base-2 logarithms.
      columns: float32 [LANES, LANES], scratch for the maximum and the normalizer of each unit, one column each.
      state: scratch if there are several blocks: maximum, normalizer and weighted values, float32 [in_group, block, LANES] each.
    """
    segments, (output, log_normalizers, columns, *state) = tiles.optional(config.segments, refs)
    block, size, dtype = pl.program_id(2), config.block, query.dtype
    streams = tiles.streams(config, words)
    row_terms = [tiles.query_terms(config, stream, block * size) for stream in streams]
    mixed_by_unit: dict[tuple[int, int], tuple[Array, Array]] = {}

    def attend(key_block: Any, diagonal: bool) -> None:
        """Processes one block of keys. A unit is one head's tile of queries with all keys in the block that it attends to."""
        start = tiles.first_position(config, key_block)
        terms = [MaskTerms(rows, *tiles.key_terms(config, *pair, start)) for rows, pair in zip(row_terms, streams, strict=True)]

        def scores(unit: tuple[int, int]) -> Array:
            head, first = unit
            width = first + LANES if diagonal else size
            keys = pl.ds(start, width)
            queries = tiles.only_head(config, head, query[pl.ds(first, LANES), :])
            s = tiles.dot(config, queries, tiles.existing_heads(config, 1, key[keys, :]), (1, 1))
            if config.segments:
                own = tiles.as_column(segments[:, pl.ds(tiles.first_position(config, block) + first, LANES)])
                s = jnp.where(tiles.repeat(own, width) == segments[:, keys], s, MASKED)
            if diagonal:
                last = jnp.where(tiles.triangle(), s[:, first:], MASKED)
                s = jnp.concatenate([s[:, :first], last], 1) if first else last
            return s

        def mix(unit: tuple[int, int], s: Array) -> None:
            head, first = unit
            rows, number = pl.ds(first, LANES), first // LANES * config.in_group + head
            highest = s.max(1, keepdims=True)
            if config.several:
                before, normalizer_before, mixed_before = (ref[head, rows, :] for ref in state)
                highest = jnp.maximum(highest, before)
            weights = jnp.exp2((s - (tiles.repeat(highest, s.shape[1]) if config.several else highest)) * config.score_scale)
            normalizer = weights.sum(1, keepdims=True)
            if config.rate:
                (weights,) = tiles.drop(config, terms[head], first, slice(0, s.shape[1]), [weights])
            mixed = tiles.dot(config, weights.astype(dtype), value[pl.ds(start, s.shape[1]), :], (1, 0))
            if config.several:
                shrink = jnp.exp2((before - highest) * config.score_scale)
                normalizer, mixed = normalizer + shrink * normalizer_before, mixed + shrink * mixed_before
            if not diagonal:
                for ref, new in zip(state, (highest, normalizer, mixed), strict=True):
                    ref[head, rows, :] = new
                return
            # Columns are cheap to store, and one transposition below turns all of them into rows.
            columns[:, number : number + 1] = highest[:, :1]
            columns[:, LANES // 2 + number : LANES // 2 + number + 1] = normalizer[:, :1]
            mixed_by_unit[unit] = mixed, normalizer
            if head == config.in_group - 1:
                mixed, normalizer = (tiles.side_by_side(config, heads) for heads in zip(*mixed_by_unit.values(), strict=True))
                mixed_by_unit.clear()
                output[rows, :] = (mixed * (tiles.reciprocal(normalizer, dtype) * config.kept_scale)).astype(dtype)

        units = [(head, first) for first in range(0, size, LANES) for head in range(config.in_group)]
        tiles.pipelined(units, scores, mix, SCORES_AHEAD)

    if config.several:
        state[0][...] = jnp.full_like(state[0], MASKED)
        for ref in state[1:]:
            ref[...] = jnp.zeros_like(ref)
        jax.lax.fori_loop(0, block, lambda key_block, _: attend(key_block, diagonal=False), None)
    attend(block, diagonal=True)

    rows = columns[...].T
    logarithms = rows[: LANES // 2] * config.score_scale + jnp.log2(rows[LANES // 2 :])
    for tile in range(size // LANES):
        units = slice(tile * config.in_group, (tile + 1) * config.in_group)
        log_normalizers[:, tile * LANES : (tile + 1) * LANES] = logarithms[units]


def forward(
    config: KernelConfig, qkv: Packed, words: UInt32[Array, "batch groups 1 words"], segments: Int[Array, "batch 1 time"] | None
) -> tuple[Float[Array, "batch time width"], Float[Array, "batch groups in_group time"]]:
    """Returns the output, and the base-2 logarithm of each row's normalizer in float32."""
    batch, _, time, width = qkv.shape
    block = config.block
    spec = lambda size, part, index: pl.BlockSpec((None, None, size, LANES), index(part))  # noqa: E731
    whole = lambda part: lambda b, j, i: (b, part, 0, j)  # noqa: E731
    in_specs = [
        pl.BlockSpec((None, None, 1, words.shape[3]), lambda b, j, i: (b, j, 0, 0), memory_space=pltpu.SMEM),
        spec(block, 0, lambda part: lambda b, j, i: (b, part, i, j)),
        spec(time, 1, whole),
        spec(time, 2, whole),
    ]
    if config.segments:
        in_specs.append(pl.BlockSpec((None, 1, time), lambda b, j, i: (b, 0, 0)))
    state = [pltpu.VMEM((config.in_group, block, LANES), jnp.float32)] * 3 if config.several else []
    return pl.pallas_call(
        functools.partial(_forward_kernel, config),
        grid=(batch, config.groups, time // block),
        in_specs=in_specs,
        out_specs=[
            pl.BlockSpec((None, block, LANES), lambda b, j, i: (b, i, j)),
            pl.BlockSpec((None, None, config.in_group, block), lambda b, j, i: (b, j, 0, i)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((batch, time, width), qkv.dtype),
            jax.ShapeDtypeStruct((batch, config.groups, config.in_group, time), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((LANES, LANES), jnp.float32), *state],
        # On a chip with two cores, the examples are divided between the cores.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=tiles.vmem_limit(4 * time * LANES * qkv.dtype.itemsize),
        ),
        name="attention_forward",
        interpret=INTERPRET,
    )(words, qkv, qkv, qkv, *([segments] if config.segments else []))


# -- backward -----------------------------------------------------------------------------------------------------------------


class BackwardRefs(NamedTuple):
    """References to the memory of the backward kernel, in the order of its arguments after `words`."""

    query: Ref
    """Queries, [time, LANES]."""
    key: Ref
    """Keys, [block, LANES]."""
    value: Ref
    """Values, [block, LANES]."""
    output: Ref
    """Output of the forward kernel, [time, LANES]."""
    log_normalizers: Ref
    """Base-2 logarithms of the normalizers, float32 [in_group, time]."""
    gradient: Ref
    """Gradient of the output, [time, LANES]."""
    segments: Ref
    """Segment ids, int32 [1, time], or None."""
    gradients: Ref
    """Results: the gradients of queries, keys and values, [3, time, LANES]."""
    bias_gradients: Ref
    """Results: the sums of these gradients over time and examples, float32 [3, LANES]."""
    query_total: Ref
    """Scratch: the gradients of the queries, transposed, float32 [LANES, time]."""
    key_total: Ref
    """Scratch: the gradients of the keys, transposed, float32 [LANES, block]."""
    value_total: Ref
    """Scratch: the gradients of the values, transposed, float32 [LANES, block]."""


def _backward_kernel(config: KernelConfig, words: Ref, *arguments: Ref) -> None:
    """Computes the gradients of a block of keys and values, and its contribution to the gradients of the queries.

    The grid point is (group, example, block). The gradients are accumulated transposed, [dim, positions]: a product whose result
    has 64 columns leaves half of a matrix unit idle, but one whose result has 64 rows does not.
    """
    inputs, (segments, results) = arguments[:6], tiles.optional(config.segments, arguments[6:])
    refs = BackwardRefs._make((*inputs, segments, *results))
    block, size = pl.program_id(2), config.block
    start = tiles.first_position(config, block)
    streams = tiles.streams(config, words)
    column_terms = [tiles.key_terms(config, *stream, start) for stream in streams]
    keys_transposed = refs.key[...].T

    def attend(query_block: Any, diagonal: bool) -> None:
        row_terms = [tiles.query_terms(config, stream, tiles.first_position(config, query_block)) for stream in streams]
        terms = [MaskTerms(rows, *columns) for rows, columns in zip(row_terms, column_terms, strict=True)]
        _differentiate_block(config, refs, terms, keys_transposed, tiles.first_position(config, query_block), start, diagonal)

    if config.several:
        pl.when(block == 0)(lambda: tiles.fill_zeros(refs.query_total))
    attend(block, diagonal=True)
    if config.several:
        jax.lax.fori_loop(block + 1, config.time // size, lambda later, _: attend(later, diagonal=False), None)

    pl.when((pl.program_id(1) == 0) & (block == 0))(lambda: tiles.fill_zeros(refs.bias_gradients))
    scale = config.kept_scale / math.sqrt(config.dim)
    # The block's queries do not attend to later keys, so the total of their gradients is complete, too.
    for part, (total, offset, factor) in enumerate(
        ((refs.query_total, start, scale), (refs.key_total, 0, scale), (refs.value_total, 0, config.kept_scale))
    ):
        for first in range(0, size, LANES):
            tile = (total[:, pl.ds(offset + first, LANES)] * factor).T
            refs.gradients[part, pl.ds(start + first, LANES), :] = tile.astype(refs.gradients.dtype)
            refs.bias_gradients[part : part + 1, :] += tile.sum(0, keepdims=True)


def _differentiate_block(
    config: KernelConfig,
    refs: BackwardRefs,
    terms: list[MaskTerms],
    keys_transposed: Array,
    start: Any,
    key_start: Any,
    diagonal: bool,
) -> None:
    """Adds the contributions of one block of queries and one block of keys to the totals, tile by tile.

    Args:
      terms: the terms of each head's dropout mask for these blocks.
      keys_transposed: [LANES, block].
      start, key_start: first positions of the blocks.
      diagonal: whether the blocks have the same positions. If so, the tiles above the diagonal are skipped.
    """
    queries_transposed, gradients_transposed = (ref[pl.ds(start, config.block), :].T for ref in (refs.query, refs.gradient))
    logarithms: dict[tuple[int, int], Array] = {}
    inner: dict[tuple[int, int], Array] = {}

    def prepare_rows(first: int) -> None:
        """Computes two columns for each head: the normalizer's logarithm, and the row sum of probability x its gradient."""
        rows = pl.ds(start + first, LANES)
        products = refs.gradient[rows, :].astype(jnp.float32) * refs.output[rows, :].astype(jnp.float32)
        for head in range(config.in_group):
            logarithms[head, first] = tiles.as_column(refs.log_normalizers[head : head + 1, rows])
            inner[head, first] = tiles.only_head(config, head, products).sum(1, keepdims=True) * (1 / config.kept_scale)

    def multiply(tile: tuple[int, int, int]) -> tuple[Array, Array]:
        """Returns the scores and the gradient of the weights, before masking."""
        head, first, k = tile
        rows, keys = pl.ds(start + first, LANES), slice(k, k + LANES)
        if (head, first) not in inner:
            prepare_rows(first)
        of_key, of_value = (tiles.existing_heads(config, 0, ref[keys, :]) for ref in (refs.key, refs.value))
        of_rows = (tiles.only_head(config, head, ref[rows, :]) for ref in (refs.query, refs.gradient))
        return tiles.dot(config, next(of_rows), of_key, (1, 1)), tiles.dot(config, next(of_rows), of_value, (1, 1))

    def differentiate(tile: tuple[int, int, int], multiplied: tuple[Array, Array]) -> None:
        head, first, k = tile
        scores, weights_gradient = multiplied
        on_diagonal, dtype = diagonal and k == first, refs.query.dtype
        weights = jnp.exp2(scores * config.score_scale - logarithms[head, first])
        if on_diagonal:
            weights = jnp.where(tiles.triangle(), weights, 0.0)
        if config.segments:
            own = tiles.as_column(refs.segments[:, pl.ds(start + first, LANES)])
            weights = jnp.where(own == refs.segments[:, pl.ds(key_start + k, LANES)], weights, 0.0)
        kept = weights
        if config.rate:
            weights_gradient, kept = tiles.drop(config, terms[head], first, slice(k, k + LANES), [weights_gradient, weights])
        scores_gradient = (weights * (weights_gradient - inner[head, first])).astype(dtype)
        lanes, rows, keys = slice(head * config.dim, (head + 1) * config.dim), slice(first, first + LANES), slice(k, k + LANES)
        value_part = tiles.dot(config, gradients_transposed[lanes, rows], kept.astype(dtype), (1, 0))
        key_part = tiles.dot(config, queries_transposed[lanes, rows], scores_gradient, (1, 0))
        if config.in_group == 1:  # libtpu 0.0.42 and 0.0.50 cannot compile the other form for size 128 and several blocks.
            query_part = tiles.dot(config, scores_gradient, refs.key[keys, :], (1, 0)).T
        else:
            query_part = tiles.dot(config, keys_transposed[lanes, keys], scores_gradient, (1, 1))
        # The first part of a total overwrites the earlier contents of its memory.
        for total, at, part, is_first in (
            (refs.value_total, keys, value_part, on_diagonal),
            (refs.key_total, keys, key_part, on_diagonal),
            (refs.query_total, pl.ds(start + first, LANES), query_part, k == 0 and not config.several),
        ):
            total[lanes, at] = part if is_first else total[lanes, at] + part

    order = [
        (head, first, k)
        for first in range(0, config.block, LANES)
        for k in range(0, first + LANES if diagonal else config.block, LANES)
        for head in range(config.in_group)
    ]
    tiles.pipelined(order, multiply, differentiate, TILES_AHEAD)


def backward(
    config: KernelConfig,
    qkv: Packed,
    words: UInt32[Array, "batch groups 1 words"],
    segments: Int[Array, "batch 1 time"] | None,
    output: Float[Array, "batch time width"],
    log_normalizers: Float[Array, "batch groups in_group time"],
    gradient: Float[Array, "batch time width"],
) -> tuple[Packed, Float[Array, "three width"]]:
    """Returns the gradient of `qkv`, and its sum over batch and time in float32, the gradient of the projection's bias."""
    batch, _, time, width = qkv.shape
    block = config.block
    # For long sequences, whole rows are not double-buffered, because their transfer takes only a small part of the time.
    mode = {"pipeline_mode": pl.Buffered(1)} if config.several else {}
    rows = pl.BlockSpec((None, time, LANES), lambda j, b, i: (b, 0, j), **mode)
    in_specs = [
        pl.BlockSpec((None, None, 1, words.shape[3]), lambda j, b, i: (b, j, 0, 0), memory_space=pltpu.SMEM),
        pl.BlockSpec((None, None, time, LANES), lambda j, b, i: (b, 0, 0, j), **mode),
        pl.BlockSpec((None, None, block, LANES), lambda j, b, i: (b, 1, i, j)),
        pl.BlockSpec((None, None, block, LANES), lambda j, b, i: (b, 2, i, j)),
        rows,
        pl.BlockSpec((None, None, config.in_group, time), lambda j, b, i: (b, j, 0, 0)),
        rows,
    ]
    if config.segments:
        in_specs.append(pl.BlockSpec((None, 1, time), lambda j, b, i: (b, 0, 0)))
    return pl.pallas_call(
        functools.partial(_backward_kernel, config),
        grid=(config.groups, batch, time // block),
        in_specs=in_specs,
        out_specs=[
            pl.BlockSpec((None, 3, time, LANES), lambda j, b, i: (b, 0, 0, j), **mode),
            pl.BlockSpec((3, LANES), lambda j, b, i: (0, j)),
        ],
        out_shape=[jax.ShapeDtypeStruct(qkv.shape, qkv.dtype), jax.ShapeDtypeStruct((3, width), jnp.float32)],
        scratch_shapes=[pltpu.VMEM((LANES, time), jnp.float32), *[pltpu.VMEM((LANES, block), jnp.float32)] * 2],
        # On a chip with two cores, the groups are divided between the cores; each sums its own bias gradients over the examples.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=tiles.vmem_limit((6 * qkv.dtype.itemsize + 4) * time * LANES) if config.several else None,
        ),
        name="attention_backward",
        interpret=INTERPRET,
    )(words, qkv, qkv, qkv, output, log_normalizers, gradient, *([segments] if config.segments else []))
