"""Differentiable self-attention on TPUs, computed from the fused projection with the kernels of `tpu`.

The derivative is defined on whole, sharded arrays, and each of its two rules maps a kernel over the devices' shards. The arrays
that the forward rule saves are therefore visible to checkpoint policies, by name, and the forward kernel runs only once.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from gpt_jax.errors import UserError
from gpt_jax.model.kernels.tpu import backward, forward
from gpt_jax.model.kernels.tpu_tiles import LANES, KernelConfig
from gpt_jax.model.remat import keep_bits
from gpt_jax.runtime.sharding import all_sum, constrain, per_shard

HEAD_DIMS = (64, 128)
"""Head sizes that the kernels support."""
MAX_TIME = 8192
"""Maximum sequence length in tokens. The backward kernel holds all positions of a group of heads in vector memory."""
MAX_BYTES_BY_CHIP = {"TPU v4": 8192}
"""Maximum product of tokens and bytes per number for chips with less vector memory, by their `device_kind` in JAX."""

QKV = ("batch", None, None, "heads")
"""Logical axes of queries, keys and values: [batch, 3, time, width], with the heads side by side."""
OUTPUT = ("batch", None, "heads")
"""Logical axes of the output: [batch, time, width]."""
LOGARITHMS = ("batch", "heads", None, None)
"""Logical axes of the normalizers' logarithms: [batch, groups, in_group, time]. A device forms groups from its own heads."""
STREAM, SEGMENTS, BIAS = ("batch", "heads", None), ("batch", None), (None, "heads")


class Options(NamedTuple):
    """The static arguments of the differentiable function."""

    dim: int
    """Size of a head."""
    rate: float
    precision: str


def pallas_tpu_self_attention(
    projected: Float[Array, "batch time 3 width"],
    bias: Float[Array, "3 width"],
    num_heads: int,
    stream: UInt32[Array, "batch heads 2"] | None,
    rate: float,
    segment_ids: Int[Array, "batch time"] | None,
    precision: str,
) -> Float[Array, "batch time width"]:
    """Computes causal self-attention with TPU kernels.

    Sequences whose length is not a multiple of 128 are padded, which is safe because no query attends to keys at later positions.

    Args:
      projected: queries, keys and values without their bias, bfloat16 or float32, with the heads side by side.
      bias: added to `projected`. The backward kernel sums its gradient, which avoids further passes over memory.
      num_heads: number of heads in the width.
      stream, rate, segment_ids, precision: as for `attention.attention`.

    Raises:
      UserError: the kernels do not support this head size, length or dtype.
    """
    time, dim = projected.shape[1], projected.shape[3] // num_heads
    if reason := unsupported(dim, time, projected.dtype):
        raise UserError(reason)
    return _self_attention(projected, bias, stream, segment_ids, Options(dim, 0.0 if stream is None else rate, precision))


def unsupported(dim: int, time: int, dtype: Any = jnp.bfloat16, device_kind: str = "") -> str | None:
    """Returns the reason, for the user, why the kernels do not support this head size, length or dtype; None if they do."""
    dtype = jnp.dtype(dtype)
    longest, where = MAX_TIME, ""
    if device_kind in MAX_BYTES_BY_CHIP:
        longest, where = MAX_BYTES_BY_CHIP[device_kind] // dtype.itemsize, f" in {dtype} on a {device_kind}"
    if dim not in HEAD_DIMS:
        return f"pallas_tpu takes heads of size 64 or 128, not {dim}"
    if time > longest:
        return f"pallas_tpu takes sequences of at most {longest:,} tokens{where}, not {time:,}"
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"pallas_tpu computes in bfloat16 or float32, not {dtype}"
    return None


# -- one device's shard -------------------------------------------------------------------------------------------------------


def _local_forward(options: Options, qkv: Array, stream: Array | None, segment_ids: Array | None) -> tuple[Array, Array]:
    """Computes the output and the logarithms for this device's examples and heads."""
    config = _kernel_config(options, qkv, segment_ids)
    output, logarithms = forward(config, _pad(config, qkv, 2), *_masks(config, len(qkv), stream, segment_ids))
    return output[:, : qkv.shape[2]], logarithms


def _local_backward(
    options: Options,
    qkv: Array,
    stream: Array | None,
    segment_ids: Array | None,
    output: Array,
    logarithms: Array,
    gradient: Array,
) -> tuple[Array, Array]:
    """Computes the gradient of `qkv` for this device's examples and heads, and the bias gradient, summed over all examples."""
    config = _kernel_config(options, qkv, segment_ids)
    masks, rows = _masks(config, len(qkv), stream, segment_ids), (_pad(config, array, 1) for array in (output, gradient))
    output, gradient = rows
    qkv_gradient, bias_gradient = backward(config, _pad(config, qkv, 2), *masks, output, logarithms, gradient)
    return qkv_gradient[:, :, : qkv.shape[2]], all_sum(bias_gradient, "batch")


def _kernel_config(options: Options, qkv: Array, segment_ids: Array | None) -> KernelConfig:
    _, _, time, width = qkv.shape
    precision = jax.lax.Precision.DEFAULT if options.precision == "default" else jax.lax.Precision.HIGHEST
    return KernelConfig(time + -time % LANES, width // options.dim, options.dim, options.rate, segment_ids is not None, precision)


def _pad(config: KernelConfig, array: Array, axis: int) -> Array:
    """Pads the time axis `axis` of an array with zeros, to `shape.time`."""
    missing = config.time - array.shape[axis]
    return jnp.pad(array, [(0, missing if i == axis else 0) for i in range(array.ndim)]) if missing else array


def _masks(
    config: KernelConfig, batch: int, stream: Array | None, segment_ids: Array | None
) -> tuple[UInt32[Array, "batch groups 1 words"], Int[Array, "batch 1 padded_time"] | None]:
    """Returns the streams by group and the segments as rows. The streams of missing heads are zero; without dropout, all are."""
    stream = jnp.zeros((batch, config.heads, 2), jnp.uint32) if stream is None else stream
    missing = config.groups * config.in_group - config.heads
    words = jnp.pad(stream, ((0, 0), (0, missing), (0, 0))).reshape(batch, config.groups, 1, 2 * config.in_group)
    return words, None if segment_ids is None else _pad(config, segment_ids.astype(jnp.int32), 1)[:, None]


# -- the differentiable function ----------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _self_attention(projected: Array, bias: Array, stream: Array | None, segment_ids: Array | None, options: Options) -> Array:
    return _forward_rule(projected, bias, stream, segment_ids, options)[0]


def _forward_rule(
    projected: Array, bias: Array, stream: Array | None, segment_ids: Array | None, options: Options
) -> tuple[Array, tuple[Any, ...]]:
    # With this order of axes, XLA writes the product and reads its gradient without a copy.
    qkv = constrain((projected + bias.astype(projected.dtype)).swapaxes(1, 2), *QKV)
    local = functools.partial(_local_forward, options)
    results = per_shard(local, (QKV, *_names(stream, segment_ids)), (OUTPUT, LOGARITHMS))(qkv, stream, segment_ids)
    output, logarithms = map(keep_bits, results)
    return output, (keep_bits(qkv), bias, stream, segment_ids, output, logarithms)


def _backward_rule(options: Options, saved: tuple[Any, ...], gradient: Array) -> tuple[Array, Array, None, None]:
    qkv, bias, stream, segment_ids, *results = saved
    names = (QKV, *_names(stream, segment_ids), OUTPUT, LOGARITHMS, OUTPUT)
    local = functools.partial(_local_backward, options)
    qkv_gradient, bias_gradient = per_shard(local, names, (QKV, BIAS))(qkv, stream, segment_ids, *results, gradient)
    return qkv_gradient.swapaxes(1, 2), bias_gradient.astype(bias.dtype), None, None


def _names(stream: Array | None, segment_ids: Array | None) -> tuple[Any, Any]:
    """Returns the logical axes of the optional arguments."""
    return None if stream is None else STREAM, None if segment_ids is None else SEGMENTS


_self_attention.defvjp(_forward_rule, _backward_rule)
