"""Kernels of causal flash attention for NVIDIA GPUs in Pallas, with the dropout masks of docs/masks.md computed inside.

The algorithm is FlashAttention-2 (Dao, 2023). One program of the forward kernel handles a block of queries and loops over the
blocks of keys to which they attend, with a running maximum. Scores, probabilities and masks exist only in registers. The forward
kernel keeps its output, the output's rounding error, and the logarithm of each row's normalizer for the backward pass.

The backward pass has two kernels. The first computes the gradients of a block of queries in a loop over the keys, and the second
those of a block of keys and values in a loop over the queries. Each block is written by one program and without atomic
additions, so the results are the same in every run.

Only tiles on the diagonal have a causal mask. Exponentials have base 2, and the scale of the scores includes log2(e). A score
therefore takes one fused multiply-add and one exponential instruction.

Triton compiles the kernels, because it is the only backend of Pallas for GPUs that lowers them in all supported versions of JAX
(jax 0.12 announces its end). On other devices, Pallas interprets the kernels, which is slow and meant for tests.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from gpt_jax.model.kernels import gpu_tiles as tiles
from gpt_jax.model.kernels.blockwise import Masks
from gpt_jax.model.kernels.gpu_tiles import KernelConfig, MaskArrays, Ref
from gpt_jax.model.kernels.gpu_tuning import choose_tuning

MASKED = -(2.0**100)
"""Score of a key that a query must not attend to. It is a power of two, so scaling it is exact. As long as a row has seen only
such keys, a scaled score minus the row's maximum is therefore 0, and not the rounding error of a large number."""


class ForwardResults(NamedTuple):
    """The results of the forward kernel, or its references to their parts for one head of one example."""

    output: Any
    """[batch, time, heads, dim], compute dtype."""
    rounding_error: Any
    """The exact output minus the rounded one, like `output`; None in float32. If the backward pass used the rounded output alone,
    the error of the gradients of queries and keys would be a fifth larger than that of plain attention."""
    log_normalizer: Any
    """Base-2 logarithm of each row's normalizer, float32 [batch, heads, time]."""


class Inputs(NamedTuple):
    """The inputs of a kernel, or its references to their parts for one head of one example."""

    query: Any
    """[batch, time, heads, dim], compute dtype."""
    key: Any
    """Like `query`."""
    value: Any
    """Like `query`."""
    masks: MaskArrays
    forward: Any = None
    """The `ForwardResults`. This field and the following ones are for the backward pass."""
    gradient: Any = None
    """Gradient of the output, like `query`."""
    delta: Any = None
    """Sum over each row of probability times its gradient, without the scale of dropout; float32 [batch, heads, time]."""


# -- forward ----------------------------------------------------------------------------------------------------------------


def _forward_kernel(config: KernelConfig, inputs: Inputs, results: ForwardResults) -> None:
    """Computes the output and the logarithms for one block of queries."""
    block_q, block_kv = config.tuning.block_q, config.tuning.block_kv
    start = _query_block() * block_q
    query, zeros = tiles.load(config, inputs.query, start, block_q), tiles.opaque_zeros(config, block_q)
    queries = tiles.query_info(config, inputs.masks, start, block_q)

    def attend(diagonal: bool, block: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        """Lets the queries attend to one block of keys."""
        row_max, normalizer, mixed = carry
        load = functools.partial(tiles.load, config, start=block * block_kv, size=block_kv, partial=diagonal)
        keys = tiles.key_info(config, inputs.masks, block * block_kv, block_kv, diagonal)
        scores = tiles.mask(tiles.dot(config, query, load(inputs.key), transposed=True), MASKED, queries, keys, diagonal)
        new_max = jnp.maximum(row_max, scores.max(1) * config.score_scale)
        weights = tiles.exp2(config, scores * config.score_scale - new_max[:, None])
        correction = tiles.exp2(config, row_max - new_max)
        normalizer = correction * normalizer + weights.sum(1)
        (weights,) = tiles.drop(config, [weights], zeros, queries, keys)
        value = load(inputs.value)
        return new_max, normalizer, correction[:, None] * mixed + tiles.dot(config, weights.astype(value.dtype), value)

    carry = jnp.full(block_q, MASKED), jnp.zeros(block_q), jnp.zeros((block_q, config.dim))
    row_max, normalizer, mixed = _loop_over_keys(config, start, attend, carry)
    output = mixed * (config.kept_scale / normalizer)[:, None]
    tiles.store(config, results.output, start, output)
    if results.rounding_error is not None:
        tiles.store(config, results.rounding_error, start, output - output.astype(query.dtype).astype(jnp.float32))
    tiles.store(config, results.log_normalizer, start, row_max + jnp.log(normalizer) * math.log2(math.e))


def _query_block() -> Array:
    """Returns the block of queries that this program handles. Programs start in order, so those with the most keys come first."""
    return pl.num_programs(0) - 1 - pl.program_id(0)


def _loop_over_keys(config: KernelConfig, start: Any, body: Callable[..., Any], carry: Any) -> Any:
    """Calls `body(diagonal, block, carry)` for each block of keys to which the queries of the block at `start` attend."""
    block_q, block_kv = config.tuning.block_q, config.tuning.block_kv
    diagonal = start // block_kv
    end = pl.cdiv(jnp.minimum(start + block_q, config.time), block_kv)
    carry = jax.lax.fori_loop(0, diagonal, functools.partial(body, False), carry)
    return jax.lax.fori_loop(diagonal, end, functools.partial(body, True), carry)


# -- backward ---------------------------------------------------------------------------------------------------------------


def _query_gradients_kernel(config: KernelConfig, inputs: Inputs, query_gradient: Ref, delta: Ref) -> None:
    """Computes the gradient of one block of queries, and `Inputs.delta` for the other kernel."""
    block_q, block_kv = config.tuning.block_q, config.tuning.block_kv
    start = _query_block() * block_q
    load_rows = functools.partial(tiles.load, config, start=start, size=block_q)
    query, gradient, zeros = load_rows(inputs.query), load_rows(inputs.gradient), tiles.opaque_zeros(config, block_q)
    output = load_rows(inputs.forward.output).astype(jnp.float32)
    log_normalizer = load_rows(inputs.forward.log_normalizer)[:, None]
    if inputs.forward.rounding_error is not None:
        output += load_rows(inputs.forward.rounding_error).astype(jnp.float32)
    row_delta = (gradient.astype(jnp.float32) * output).sum(1) / config.kept_scale
    tiles.store(config, delta, start, row_delta)
    queries = tiles.query_info(config, inputs.masks, start, block_q)

    def add_block(diagonal: bool, block: Array, total: Array) -> Array:
        """Adds the contribution of one block of keys."""
        load = functools.partial(tiles.load, config, start=block * block_kv, size=block_kv, partial=diagonal)
        keys, key = tiles.key_info(config, inputs.masks, block * block_kv, block_kv, diagonal), load(inputs.key)
        exponents = tiles.dot(config, query, key, transposed=True) * config.score_scale - log_normalizer
        weights = tiles.mask(tiles.exp2(config, exponents), 0.0, queries, keys, diagonal)
        weights_gradient = tiles.dot(config, gradient, load(inputs.value), transposed=True)
        (weights_gradient,) = tiles.drop(config, [weights_gradient], zeros, queries, keys)
        scores_gradient = (weights * (weights_gradient - row_delta[:, None])).astype(key.dtype)
        return total + tiles.dot(config, scores_gradient, key)

    total = _loop_over_keys(config, start, add_block, jnp.zeros((block_q, config.dim)))
    tiles.store(config, query_gradient, start, total * config.gradient_scale)


def _key_value_gradients_kernel(config: KernelConfig, inputs: Inputs, key_gradient: Ref, value_gradient: Ref) -> None:
    """Computes the gradients of one block of keys and values.

    Its tiles are transposed, [keys, queries], so that no product needs the transpose of a tile.
    """
    block_q, block_kv = config.tuning.block_q, config.tuning.block_kv
    start = pl.program_id(0) * block_kv
    key, value = (tiles.load(config, ref, start, block_kv) for ref in (inputs.key, inputs.value))
    zeros = tiles.opaque_zeros(config, block_kv)
    keys = tiles.key_info(config, inputs.masks, start, block_kv)

    def add_block(diagonal: bool, block: Array, totals: tuple[Array, Array]) -> tuple[Array, Array]:
        """Adds the contributions of one block of queries."""
        load = functools.partial(tiles.load, config, start=block * block_q, size=block_q)
        queries = tiles.query_info(config, inputs.masks, block * block_q, block_q)
        query, gradient = load(inputs.query), load(inputs.gradient)
        exponents = tiles.dot(config, key, query, transposed=True) * config.score_scale
        exponents -= load(inputs.forward.log_normalizer)[None, :]
        weights = tiles.mask(tiles.exp2(config, exponents), 0.0, queries, keys, diagonal, transposed=True)
        weights_gradient = tiles.dot(config, value, gradient, transposed=True)
        kept, weights_gradient = tiles.drop(config, [weights, weights_gradient], zeros, queries, keys, transposed=True)
        value_total = totals[1] + tiles.dot(config, kept.astype(query.dtype), gradient)
        scores_gradient = (weights * (weights_gradient - load(inputs.delta)[None, :])).astype(query.dtype)
        return totals[0] + tiles.dot(config, scores_gradient, query), value_total

    end = pl.cdiv(config.time, block_q)
    below_diagonal = jnp.minimum(pl.cdiv(start + block_kv, block_q), end)
    totals = jnp.zeros((block_kv, config.dim)), jnp.zeros((block_kv, config.dim))
    totals = jax.lax.fori_loop(start // block_q, below_diagonal, functools.partial(add_block, True), totals)
    totals = jax.lax.fori_loop(below_diagonal, end, functools.partial(add_block, False), totals)
    tiles.store(config, key_gradient, start, totals[0] * config.gradient_scale)
    tiles.store(config, value_gradient, start, totals[1] * config.kept_scale)


# -- calls of the kernels -----------------------------------------------------------------------------------------------------


def forward(query: Array, key: Array, value: Array, masks: Masks, *, rate: float, precision: str) -> ForwardResults:
    """Computes attention of one device's examples and heads.

    Args:
      query, key, value: [batch, time, heads, dim], bfloat16 or float32.
      masks: with a stream if and only if `rate` is not 0.
      rate: dropout rate on the probabilities.
      precision: of products of float32 numbers, as for `attention.attention`.
    """
    batch, time, heads, dim = query.shape
    like_query = jax.ShapeDtypeStruct(query.shape, query.dtype)
    rows = jax.ShapeDtypeStruct((batch, heads, time), jnp.float32)
    results = ForwardResults(like_query, like_query if query.dtype != jnp.float32 else None, rows)
    config = KernelConfig(rate, precision, choose_tuning(time, dim, query.dtype).forward, time, dim)
    inputs = Inputs(query, key, value, tiles.mask_arrays(masks, time))
    (results,) = _run(_forward_kernel, config, pl.cdiv(time, config.tuning.block_q), inputs, (results,))
    return results


def backward(
    query: Array, key: Array, value: Array, masks: Masks, results: ForwardResults, gradient: Array, *, rate: float, precision: str
) -> tuple[Array, Array, Array]:
    """Returns the gradients of query, key and value.

    Args:
      query, key, value, masks, rate, precision: the arguments of `forward`.
      results: what `forward` returned.
      gradient: that of the output.
    """
    _, time, _, dim = query.shape
    inputs = Inputs(query, key, value, tiles.mask_arrays(masks, time), results, gradient)
    like_query = jax.ShapeDtypeStruct(query.shape, query.dtype)
    tuning = choose_tuning(time, dim, query.dtype)
    config = KernelConfig(rate, precision, tuning.query_gradients, time, dim)
    shapes: tuple[Any, ...] = (like_query, results.log_normalizer)
    query_gradient, delta = _run(_query_gradients_kernel, config, pl.cdiv(time, config.tuning.block_q), inputs, shapes)
    config, inputs, shapes = config._replace(tuning=tuning.key_value_gradients), inputs._replace(delta=delta), (like_query,) * 2
    blocks = pl.cdiv(time, config.tuning.block_kv)
    key_gradient, value_gradient = _run(_key_value_gradients_kernel, config, blocks, inputs, shapes)
    return query_gradient, key_gradient, value_gradient


def _run(kernel: Callable[..., None], config: KernelConfig, blocks: int, inputs: Inputs, shapes: tuple[Any, ...]) -> Any:
    """Runs a kernel for each block of each head of each example.

    Args:
      blocks: number of blocks in a head.
      shapes: the shapes and dtypes of the results.
    """
    batch, time, heads, dim = inputs.query.shape

    def block_spec(array: Any) -> pl.BlockSpec:
        """Selects the part of an array that belongs to one head of one example; without an axis of heads, to the example."""
        if array.shape == (batch, time, heads, dim):
            return pl.BlockSpec((None, time, None, dim), lambda _, head, example: (example, 0, head, 0))
        if array.ndim == 2:
            return pl.BlockSpec((None, time), lambda _, head, example: (example, 0))
        return pl.BlockSpec((None, None, array.shape[2]), lambda _, head, example: (example, head, 0))

    def call(interpret: bool, inputs: Inputs) -> Any:
        return pl.pallas_call(
            functools.partial(kernel, config._replace(interpret=interpret)),
            grid=(blocks, heads, batch),
            in_specs=[jax.tree.map(block_spec, inputs)],
            out_specs=jax.tree.map(block_spec, shapes),
            out_shape=shapes,
            compiler_params=plgpu.CompilerParams(num_warps=config.tuning.num_warps, num_stages=config.tuning.num_stages),
            interpret=interpret,
            name=f"attention{kernel.__name__.removesuffix('_kernel')}",
        )(inputs)

    # The platform that matters is the one this is lowered for. It may differ from the platform of this machine.
    return jax.lax.platform_dependent(inputs, cuda=functools.partial(call, False), default=functools.partial(call, True))
