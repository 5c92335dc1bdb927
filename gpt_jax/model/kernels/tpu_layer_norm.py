"""Residual sum, dropout and layer normalization on TPUs, with a backward pass that reads each array once.

    sum = residual + dropout(branch + branch_bias)
    output = normalize(sum) * gain + bias

XLA fuses the first line into the product that computes `branch`. Pallas kernels compute the second line and the gradients of
both lines. Memory bandwidth limits these kernels. While a few rows are in registers, a kernel therefore computes their means,
their variances around the means, all gradients, and the contributions of the rows to the gradients of `gain`, `bias` and
`branch_bias`. XLA would read the rows again for each sum.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, UInt32

from gpt_jax.model.dropout import column_terms, dropout, keep_pair, row_term, threshold
from gpt_jax.model.kernels import tpu
from gpt_jax.model.kernels.tpu_tiles import LANES, fill_zeros
from gpt_jax.model.remat import keep
from gpt_jax.runtime.sharding import all_sum, per_shard

ROWS = 32
"""Number of rows that are in registers at a time."""
BLOCK = 256
"""Maximum number of rows in a block. Loops over a block are unrolled, so that the scheduler has enough to interleave."""
MAX_BYTES = 6 << 20
"""Bytes of vector memory that the blocks of four double-buffered arrays may fill. A v4 has 16 MiB in total, which must also hold
spilled registers."""
MAX_EMBED = 6144
"""Maximum width of the residual stream. At this width, eight blocks of `ROWS` rows in float32 fill `MAX_BYTES`."""
SUBLANES = 8
VECTORS = 3
"""Number of gradients that are sums over rows: the gradients of `gain`, `bias` and `branch_bias`."""

HIDDEN, STREAM, VECTOR = ("batch", None, None), ("batch", None), (None,)


class Options(NamedTuple):
    """The static arguments of the differentiable function."""

    epsilon: float
    rate: float


def pallas_tpu_add_and_normalize(
    residual: Float[Array, "batch time embed"],
    branch: Float[Array, "batch time embed"],
    branch_bias: Float[Array, "embed"],
    gain: Float[Array, "embed"],
    bias: Float[Array, "embed"],
    stream: UInt32[Array, "batch 2"] | None,
    rate: float,
    epsilon: float,
) -> Float[Array, "batch time embed"]:
    """Returns normalize(residual + dropout(branch + branch_bias)) * gain + bias.

    Args:
      residual, branch: bfloat16 or float32; `embed` must be a multiple of 128, and `time` a multiple of 32.
      branch_bias: the bias of the projection that `branch` comes from.
      gain, bias: the parameters of the layer norm.
      stream: determines the dropout mask; None disables dropout.
      rate: dropout rate.
    """
    options = Options(epsilon, 0.0 if stream is None else rate)
    return _add_and_normalize(residual, branch, branch_bias, gain, bias, stream, options)


def is_supported(time: int, embed: int) -> bool:
    """Returns whether the kernels support arrays of this size."""
    return embed % LANES == 0 and embed <= MAX_EMBED and time % ROWS == 0


# -- the kernels --------------------------------------------------------------------------------------------------------------


def _normalize_kernel(epsilon: float, sums: Any, gain: Any, bias: Any, output: Any) -> None:
    """Normalizes a block of rows, [block, embed]."""
    for start in range(0, sums.shape[0], ROWS):
        rows = pl.ds(start, ROWS)
        centered, scale = _statistics(sums[rows, :].astype(jnp.float32), epsilon)
        output[rows, :] = (centered * scale * gain[...] + bias[...]).astype(output.dtype)


def _statistics(x: Array, epsilon: float) -> tuple[Array, Array]:
    """Returns the rows minus their means, and the reciprocals of their standard deviations, [rows, 1]."""
    centered = x - x.mean(1, keepdims=True)
    return centered, jax.lax.rsqrt(jnp.square(centered).mean(1, keepdims=True) + epsilon)


def _gradient_kernel(options: Options, words: Any, sums: Any, gradient: Any, gain: Any, *outputs: Any) -> None:
    """Computes all gradients for a block of rows at grid point (example, block).

    Refs:
      words: uint32 [1, 2], the example's stream.
      sums, gradient (of the output): [block, embed]; gain: float32 [1, embed].
      residual_gradient, and branch_gradient if there is dropout: [block, embed].
      vectors: float32 [VECTORS * SUBLANES, embed], the example's sums over rows, one partial sum for each sublane.
    """
    residual_gradient, *branch_gradient, vectors = outputs
    block, embed = sums.shape
    start_of_block = pl.program_id(1) * block
    pl.when(pl.program_id(1) == 0)(lambda: fill_zeros(vectors))
    scale_kept = 65536 / (65536 - threshold(options.rate))
    if options.rate:
        a, b = words[0, 0], words[0, 1]
        channels = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, embed), 1).astype(jnp.uint32)
        column, multiplier = (term[:1] for term in column_terms(a, b, channels))
    totals = [jnp.zeros((SUBLANES, embed), jnp.float32)] * VECTORS
    for start in range(0, block, ROWS):
        rows = pl.ds(start, ROWS)
        centered, scale = _statistics(sums[rows, :].astype(jnp.float32), options.epsilon)
        normalized = centered * scale
        upstream = gradient[rows, :].astype(jnp.float32)
        scaled = upstream * gain[...]
        inner = (scaled * normalized).mean(1, keepdims=True)
        into = (scaled - scaled.mean(1, keepdims=True) - normalized * inner) * scale
        residual_gradient[rows, :] = into.astype(residual_gradient.dtype)
        kept = into
        if options.rate:
            pairs = jax.lax.broadcasted_iota(jnp.int32, (ROWS // 2, LANES), 0) + ((start_of_block + start) >> 1)
            row = row_term(a, pairs.astype(jnp.uint32))[:, :1].reshape(ROWS // 16, 8, 1)
            halves = keep_pair(row, column[None], multiplier[None], options.rate)
            by_pair = (into * scale_kept).reshape(ROWS // 16, 2, 8, embed)
            kept = jnp.stack([jnp.where(keep, by_pair[:, half], 0.0) for half, keep in enumerate(halves)], 1).reshape(into.shape)
            branch_gradient[0][rows, :] = kept.astype(residual_gradient.dtype)
        parts = (upstream * normalized, upstream, kept)
        totals = [total + part.reshape(-1, SUBLANES, embed).sum(0) for total, part in zip(totals, parts, strict=True)]
    for number, total in enumerate(totals):
        vectors[number * SUBLANES : (number + 1) * SUBLANES, :] += total


def block_rows(time: int, embed: int, itemsize: int) -> int:
    """Returns the number of rows in a block: at most `BLOCK`, and few enough that eight blocks fit into `MAX_BYTES`."""
    longest = max(min(BLOCK, MAX_BYTES // (8 * embed * itemsize)), ROWS)
    return max(size for size in range(ROWS, longest + 1, ROWS) if time % size == 0)


def normalize(sums: Array, gain: Array, bias: Array, *, epsilon: float) -> Array:
    """Normalizes this device's rows, [batch, time, embed]."""
    batch, time, embed = sums.shape
    block = block_rows(time, embed, sums.dtype.itemsize)
    rows = pl.BlockSpec((None, block, embed), lambda b, i: (b, i, 0))
    vector = pl.BlockSpec((1, embed), lambda b, i: (0, 0))
    return pl.pallas_call(
        functools.partial(_normalize_kernel, epsilon),
        grid=(batch, time // block),
        in_specs=[rows, vector, vector],
        out_specs=rows,
        out_shape=jax.ShapeDtypeStruct(sums.shape, sums.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        name="layer_norm_forward",
        interpret=tpu.INTERPRET,
    )(sums, gain[None].astype(jnp.float32), bias[None].astype(jnp.float32))


def differentiate(
    options: Options, sums: Array, stream: Array | None, gain: Array, gradient: Array
) -> tuple[Array, Array, Float[Array, "3 embed"]]:
    """Returns the gradients of the residual and of `branch`, and those of the vectors, summed over all examples."""
    batch, time, embed = sums.shape
    block = block_rows(time, embed, sums.dtype.itemsize)
    rows = pl.BlockSpec((None, block, embed), lambda b, i: (b, i, 0))
    words = jnp.zeros((batch, 2), jnp.uint32) if stream is None else stream
    like = jax.ShapeDtypeStruct(sums.shape, sums.dtype)
    number = 2 if options.rate else 1
    *gradients, vectors = pl.pallas_call(
        functools.partial(_gradient_kernel, options),
        grid=(batch, time // block),
        in_specs=[
            pl.BlockSpec((None, 1, 2), lambda b, i: (b, 0, 0), memory_space=pltpu.SMEM),
            rows,
            rows,
            pl.BlockSpec((1, embed), lambda b, i: (0, 0)),
        ],
        out_specs=[*[rows] * number, pl.BlockSpec((None, VECTORS * SUBLANES, embed), lambda b, i: (b, 0, 0))],
        out_shape=[*[like] * number, jax.ShapeDtypeStruct((batch, VECTORS * SUBLANES, embed), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="layer_norm_backward",
        interpret=tpu.INTERPRET,
    )(words[:, None], sums, gradient, gain[None].astype(jnp.float32))
    summed = all_sum(vectors.reshape(batch, VECTORS, SUBLANES, embed).sum((0, 2)), "batch")
    return gradients[0], gradients[-1], summed


# -- the differentiable function ----------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _add_and_normalize(
    residual: Array, branch: Array, branch_bias: Array, gain: Array, bias: Array, stream: Array | None, options: Options
) -> Array:
    return _forward_rule(residual, branch, branch_bias, gain, bias, stream, options)[0]


def _forward_rule(
    residual: Array, branch: Array, branch_bias: Array, gain: Array, bias: Array, stream: Array | None, options: Options
) -> tuple[Array, tuple[Any, ...]]:
    branch = branch + branch_bias.astype(branch.dtype)
    sums = keep(residual + (branch if stream is None else dropout(branch, stream, options.rate)))
    to_rows = per_shard(functools.partial(normalize, epsilon=options.epsilon), (HIDDEN, VECTOR, VECTOR), HIDDEN)
    return to_rows(sums, gain, bias), (sums, stream, branch_bias, gain, bias)


def _backward_rule(options: Options, saved: tuple[Any, ...], gradient: Array) -> tuple[Array, Array, Array, Array, Array, None]:
    sums, stream, branch_bias, gain, bias = saved
    names = (HIDDEN, None if stream is None else STREAM, VECTOR, HIDDEN)
    of_shard = per_shard(functools.partial(differentiate, options), names, (HIDDEN, HIDDEN, (None, None)))
    residual, branch, vectors = of_shard(sums, stream, gain, gradient)
    of_gain, of_bias, of_branch_bias = (v.astype(p.dtype) for v, p in zip(vectors, (gain, bias, branch_bias), strict=True))
    return residual, branch, of_branch_bias, of_gain, of_bias, None


_add_and_normalize.defvjp(_forward_rule, _backward_rule)
