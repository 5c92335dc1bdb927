"""Causal attention in blocks of queries, in plain JAX: the default on CPUs, and the fallback where no kernel is better.

A block of queries attends only to the keys up to its own end, so with n blocks, only (n + 1) / 2n of the scores are computed:
10/16 at a length of 512. Only the scores of one block exist at a time. For the backward pass, only the output and the logarithm
of each row's normalizer are kept; scores, probabilities and dropout masks are recomputed, as in FlashAttention
(Dao et al., 2022).

Up to `MAX_UNROLLED` blocks are unrolled, each with an ordinary softmax over its prefix of keys. Longer sequences are divided into
square tiles and processed by two nested loops with a running maximum, so that no array has queries x keys elements.

Arrays have the layout [batch, heads, time, dim] here.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from gpt_jax.model import remat
from gpt_jax.model.dropout import keep, threshold

BLOCK = 128
"""Number of queries in a block."""
MAX_UNROLLED = 8
"""Maximum number of blocks that are unrolled."""
MASKED = -1e30
"""Score of a key that a query must not attend to. It is finite, so that the difference of two such scores is not NaN."""

Heads = Float[Array, "batch heads time dim"]
Rows = Float[Array, "batch heads time 1"]
Queries = Float[Array, "batch heads queries dim"]
Keys = Float[Array, "batch heads keys dim"]
Tile = Float[Array, "batch heads queries keys"]


class Masks(NamedTuple):
    """The masks that apply in addition to the causal mask."""

    stream: UInt32[Array, "batch heads 2"] | None
    """Streams of the dropout masks; None without dropout."""
    segment_ids: Int[Array, "batch time"] | None


def blockwise_attention(
    query: Float[Array, "batch time heads dim"],
    key: Float[Array, "batch time heads dim"],
    value: Float[Array, "batch time heads dim"],
    stream: UInt32[Array, "batch heads 2"] | None,
    rate: float,
    segment_ids: Int[Array, "batch time"] | None,
    precision: str,
) -> Float[Array, "batch time heads dim"]:
    """Computes causal attention with as many queries as keys; see `attention.attention` for the arguments."""
    time = query.shape[1]
    excess = -time % BLOCK if time > MAX_UNROLLED * BLOCK else 0  # No query attends to the padding.
    pad = lambda array: jnp.pad(array, [(0, 0), (0, excess)] + [(0, 0)] * (array.ndim - 2)) if excess else array  # noqa: E731
    masks = Masks(stream, None if segment_ids is None else pad(segment_ids))
    by_head = (pad(array).swapaxes(1, 2) for array in (query, key, value))
    mixed = _attention(*by_head, masks, rate if stream is not None else 0.0, precision)
    return mixed[:, :, :time].swapaxes(1, 2)


def _forward(query: Heads, key: Heads, value: Heads, masks: Masks, rate: float) -> tuple[Heads, Rows]:
    """Returns the output and the logarithm of each row's normalizer (float32)."""
    if query.shape[2] > MAX_UNROLLED * BLOCK:
        return _forward_tiled(query, key, value, masks, rate)
    outputs, log_normalizers = [], []
    for start, end in _blocks(query.shape[2]):
        rows, columns = jnp.arange(start, end), jnp.arange(end)
        scores = _scores(query[:, :, start:end], key[:, :, :end], rows, columns, masks)
        highest = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        normalizer = weights.sum(-1, keepdims=True)
        outputs.append(_mix(_drop(weights, rows, columns, masks, rate), value[:, :, :end]) / normalizer)
        log_normalizers.append(highest + jnp.log(normalizer))
    return jnp.concatenate(outputs, 2).astype(value.dtype), jnp.concatenate(log_normalizers, 2)


def _backward(
    query: Heads, key: Heads, value: Heads, masks: Masks, rate: float, log_normalizer: Rows, inner: Rows, gradient: Heads
) -> tuple[Heads, Heads, Heads]:
    """Returns the gradients of query, key and value; `gradient` is the gradient of the output."""
    if query.shape[2] > MAX_UNROLLED * BLOCK:
        return _backward_tiled(query, key, value, masks, rate, log_normalizer, inner, gradient)
    query_gradients = []
    key_gradient = value_gradient = jnp.zeros((*key.shape[:2], key.shape[3], key.shape[2]), jnp.float32)
    for start, end in _blocks(query.shape[2]):
        block = query[:, :, start:end], log_normalizer[:, :, start:end], inner[:, :, start:end], gradient[:, :, start:end]
        tile = _tile_gradients(*block, key[:, :, :end], value[:, :, :end], jnp.arange(start, end), jnp.arange(end), masks, rate)
        query_gradients.append(tile[0])
        key_gradient, value_gradient = (
            total.at[..., :end].add(part) for total, part in zip((key_gradient, value_gradient), tile[1:], strict=True)
        )
    query_gradient = jnp.concatenate(query_gradients, 2)
    return _as_inputs(query_gradient, key_gradient, value_gradient, query.dtype)


def _blocks(time: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, time)) for start in range(0, time, BLOCK)]


# -- one block of queries and a range of keys -------------------------------------------------------------------------------


def _scores(query: Queries, key: Keys, rows: Array, columns: Array, masks: Masks) -> Tile:
    """Returns the scaled scores, float32 [batch, heads, queries, keys], of queries at positions `rows` and keys at `columns`."""
    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32) / math.sqrt(query.shape[-1])
    allowed = rows[:, None] >= columns
    if masks.segment_ids is not None:
        of_rows, of_columns = (jnp.take(masks.segment_ids, positions, axis=1) for positions in (rows, columns))
        allowed = (allowed & (of_rows[:, :, None] == of_columns[:, None, :]))[:, None]
    return jnp.where(allowed, scores, MASKED)


def _drop(weights: Tile, rows: Array, columns: Array, masks: Masks, rate: float) -> Tile:
    """Applies dropout to `weights`, float32 [batch, heads, queries, keys]."""
    dropped = threshold(rate)
    if masks.stream is None or dropped == 0:
        return weights
    return jnp.where(keep(masks.stream, rows, columns, rate), weights * (65536 / (65536 - dropped)), 0)


def _mix(weights: Tile, value: Keys) -> Queries:
    """Returns the weighted sums of values, float32 [batch, heads, queries, dim]."""
    return jnp.einsum("bhqk,bhkd->bhqd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)


def _tile_gradients(
    query: Queries,
    log_normalizer: Float[Array, "batch heads queries 1"],
    inner: Float[Array, "batch heads queries 1"],
    gradient: Queries,
    key: Keys,
    value: Keys,
    rows: Array,
    columns: Array,
    masks: Masks,
    rate: float,
) -> tuple[Array, Array, Array]:
    """Returns the contributions of a block of queries and a range of keys to the three gradients, in float32.

    The gradients of keys and values are transposed, [batch, heads, dim, keys]: the products then transpose the narrow operand,
    which makes them up to twice as fast on CPUs as products that transpose the weights.
    """
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    weights = jnp.exp(_scores(query, key, rows, columns, masks) - log_normalizer)
    value_gradient = product("bhqd,bhqk->bhdk", gradient, _drop(weights, rows, columns, masks, rate).astype(gradient.dtype))
    weights_gradient = _drop(product("bhqd,bhkd->bhqk", gradient, value), rows, columns, masks, rate)
    scores_gradient = weights * (weights_gradient - inner) / math.sqrt(query.shape[-1])
    scores_gradient = scores_gradient.astype(query.dtype)
    query_gradient = product("bhqk,bhkd->bhqd", scores_gradient, key)
    return query_gradient, product("bhqd,bhqk->bhdk", query, scores_gradient), value_gradient


def _as_inputs(query_gradient: Array, key_gradient: Array, value_gradient: Array, dtype: jnp.dtype) -> tuple[Heads, Heads, Heads]:
    key_gradient, value_gradient = (gradient.swapaxes(2, 3).astype(dtype) for gradient in (key_gradient, value_gradient))
    return query_gradient.astype(dtype), key_gradient, value_gradient


# -- long sequences ---------------------------------------------------------------------------------------------------------


def _forward_tiled(query: Heads, key: Heads, value: Heads, masks: Masks, rate: float) -> tuple[Heads, Rows]:
    """Computes the results of `_forward` tile by tile; the time must be a multiple of `BLOCK`."""
    batch, heads, time, dim = query.shape

    def block(i: Array) -> tuple[Array, Array]:
        def tile(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            highest, normalizer, mixed = carry
            scores = _scores(queries, _at(key, j), rows, _positions(j), masks)
            new = jnp.maximum(highest, scores.max(-1, keepdims=True))
            weights, shrink = jnp.exp(scores - new), jnp.exp(highest - new)
            normalizer = shrink * normalizer + weights.sum(-1, keepdims=True)
            weights = _drop(weights, rows, _positions(j), masks, rate)
            return new, normalizer, shrink * mixed + _mix(weights, _at(value, j))

        queries, rows = _at(query, i), _positions(i)
        nothing = jnp.zeros((batch, heads, BLOCK, 1))
        start = nothing + MASKED, nothing, jnp.zeros((batch, heads, BLOCK, dim))
        highest, normalizer, mixed = jax.lax.fori_loop(0, i + 1, tile, start)
        return mixed / normalizer, highest + jnp.log(normalizer)

    outputs, log_normalizers = jax.lax.map(block, jnp.arange(time // BLOCK))
    join = lambda blocks: jnp.moveaxis(blocks, 0, 2).reshape(batch, heads, time, -1)  # noqa: E731
    return join(outputs).astype(value.dtype), join(log_normalizers)


def _backward_tiled(
    query: Heads, key: Heads, value: Heads, masks: Masks, rate: float, log_normalizer: Rows, inner: Rows, gradient: Heads
) -> tuple[Heads, Heads, Heads]:
    """Computes the results of `_backward` tile by tile; the time must be a multiple of `BLOCK`."""
    batch, heads, time, dim = query.shape

    def block(totals: tuple[Array, Array, Array], i: Array) -> tuple[tuple[Array, Array, Array], None]:
        queries = _at(query, i), _at(log_normalizer, i), _at(inner, i), _at(gradient, i)

        def tile(j: Array, totals: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            parts = _tile_gradients(*queries, _at(key, j), _at(value, j), _positions(i), _positions(j), masks, rate)
            return _add_at(totals[0], parts[0], i, 2), _add_at(totals[1], parts[1], j, 3), _add_at(totals[2], parts[2], j, 3)

        return jax.lax.fori_loop(0, i + 1, tile, totals), None

    zero, transposed = jnp.zeros((batch, heads, time, dim)), jnp.zeros((batch, heads, dim, time))
    totals, _ = jax.lax.scan(block, (zero, transposed, transposed), jnp.arange(time // BLOCK))
    return _as_inputs(*totals, query.dtype)


def _positions(block: Array) -> Array:
    return block * BLOCK + jnp.arange(BLOCK)


def _at(array: Array, block: Array) -> Array:
    """Returns one block of positions of an array [batch, heads, time, ...]."""
    return jax.lax.dynamic_slice_in_dim(array, block * BLOCK, BLOCK, axis=2)


def _add_at(total: Array, part: Array, block: Array, axis: int) -> Array:
    old = jax.lax.dynamic_slice_in_dim(total, block * BLOCK, BLOCK, axis)
    return jax.lax.dynamic_update_slice_in_dim(total, old + part, block * BLOCK, axis)


# -- the differentiable function ---------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(query: Heads, key: Heads, value: Heads, masks: Masks, rate: float, precision: str) -> Heads:
    return _attention_fwd(query, key, value, masks, rate, precision)[0]


def _attention_fwd(
    query: Heads, key: Heads, value: Heads, masks: Masks, rate: float, precision: str
) -> tuple[Heads, tuple[Any, ...]]:
    with jax.default_matmul_precision(precision):
        output, log_normalizer = _forward(query, key, value, masks, rate)
    output, log_normalizer = map(remat.keep, (output, log_normalizer))
    return output, (query, key, value, masks, output, log_normalizer)


def _attention_bwd(rate: float, precision: str, saved: tuple[Any, ...], gradient: Heads) -> tuple[Heads, Heads, Heads, None]:
    query, key, value, masks, output, log_normalizer = saved
    # The gradient of the softmax needs the row sum of probability times its gradient. Dropout does not change this sum.
    inner = (gradient.astype(jnp.float32) * output.astype(jnp.float32)).sum(-1, keepdims=True)
    with jax.default_matmul_precision(precision):
        return *_backward(query, key, value, masks, rate, log_normalizer, inner, gradient), None


_attention.defvjp(_attention_fwd, _attention_bwd)
