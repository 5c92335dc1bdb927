"""Differentiable self-attention on TPUs from the fused projection, through the kernels of `tpu`.

The derivative is defined for the whole, sharded arrays, and each of its two rules maps a kernel over the devices' shards. A
checkpoint policy therefore sees what the forward rule keeps, by name, and the forward kernel runs once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, UInt32

from gpt_jax.model.kernels.blockwise import ATTENTION_OUTPUT, KEPT
from gpt_jax.model.kernels.tpu import LANES, Shape, backward, forward
from gpt_jax.runtime.sharding import all_sum, constrain, per_shard

HEAD_DIMS = (64, 128)
"""Sizes of heads that the kernels take."""
MAX_TIME = 8192
"""Maximum sequence length in tokens, of which the backward kernel holds whole rows in vector memory."""

QKV = ("batch", None, None, "heads", None)
"""Logical axes of queries, keys and values: [batch, 3, time, heads, dim]."""
HEADS = ("batch", None, "heads", None)
"""Logical axes of the output: [batch, time, heads, dim]."""
LOGARITHMS = ("batch", "heads", None, None)
"""Logical axes of the normalizers' logarithms, [batch, groups, in_group, time], whose groups a device forms of its own heads."""
STREAM, SEGMENTS, BIAS = ("batch", "heads", None), ("batch", None), (None, "heads", None)


def pallas_tpu_self_attention(
    projected: Float[Array, "batch time 3 heads dim"],
    bias: Float[Array, "3 heads dim"],
    stream: UInt32[Array, "batch heads 2"] | None,
    rate: float,
    segment_ids: Int[Array, "batch time"] | None,
    precision: str,
) -> Float[Array, "batch time heads dim"]:
    """Computes causal self-attention with TPU kernels.

    Times that are not a multiple of 128 are padded inside, because no query attends to keys after its own.

    Args:
      projected: queries, keys and values without their bias, bfloat16 or float32.
      bias: added to `projected`. Its gradient is summed in the backward kernel instead of in 36 passes over memory.
      stream, rate, segment_ids, precision: as for `attention.attention`.

    Raises:
      ValueError: the kernels do not take this size of heads, length or dtype.
    """
    dim, time = projected.shape[4], projected.shape[1]
    if reason := refusal(dim, time, projected.dtype):
        raise ValueError(reason)
    bias = bias.astype(projected.dtype)
    return _self_attention(projected, bias, stream, segment_ids, rate if stream is not None else 0.0, precision)


def refusal(dim: int, time: int, dtype: Any = jnp.bfloat16) -> str | None:
    """Returns the reason, for the user, why the kernels do not take heads of this size, length or dtype; None if they do."""
    if dim not in HEAD_DIMS:
        return f"pallas_tpu takes heads of size 64 or 128, not {dim}"
    if time > MAX_TIME:
        return f"pallas_tpu takes sequences of at most {MAX_TIME:,} tokens, not {time:,}"
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"pallas_tpu computes in bfloat16 or float32, not {jnp.dtype(dtype)}"
    return None


def _shape(
    qkv: Float[Array, "batch 3 time heads dim"], stream: Array | None, segment_ids: Array | None, rate: float, precision: str
) -> Shape:
    _, _, time, heads, dim = qkv.shape
    exact = precision in ("high", "highest", "float32", "tensorfloat32")
    padded = time + -time % LANES
    return Shape(
        padded,
        heads,
        dim,
        rate if stream is not None else 0.0,
        segment_ids is not None,
        jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
    )


def _flat(shape: Shape, array: Array, axis: int) -> Array:
    """Merges the last two axes of [..., time, heads, dim] and pads the time, which is on `axis`."""
    flat = array.reshape(*array.shape[:-2], shape.heads * shape.dim)
    padding = [(0, shape.time - array.shape[axis] if i == axis else 0) for i in range(flat.ndim)]
    return jnp.pad(flat, padding) if shape.time > array.shape[axis] else flat


def _words(shape: Shape, batch: int, stream: Array | None) -> UInt32[Array, "batch groups 1 words"]:
    """Returns the streams by group; zeros where the last group lacks a head, or without dropout."""
    if stream is None:
        return jnp.zeros((batch, shape.groups, 1, 2 * shape.in_group), jnp.uint32)
    missing = shape.groups * shape.in_group - shape.heads
    return jnp.pad(stream, ((0, 0), (0, missing), (0, 0))).reshape(batch, shape.groups, 1, 2 * shape.in_group)


def _rows(shape: Shape, segment_ids: Array | None) -> Int[Array, "batch 1 time"] | None:
    if segment_ids is None:
        return None
    padded = jnp.pad(segment_ids, ((0, 0), (0, shape.time - segment_ids.shape[1])), mode="edge")
    return padded[:, None].astype(jnp.int32)


def _local_forward(
    qkv: Array, stream: Array | None, segment_ids: Array | None, *, rate: float, precision: str
) -> tuple[Array, Array]:
    """Computes the output [batch, time, heads, dim] and the logarithms for this device's examples and heads."""
    shape = _shape(qkv, stream, segment_ids, rate, precision)
    batch, _, time, heads, dim = qkv.shape
    output, logarithms = forward(shape, _flat(shape, qkv, 2), _words(shape, batch, stream), _rows(shape, segment_ids))
    return output[:, :time].reshape(batch, time, heads, dim), logarithms


def _local_backward(
    qkv: Array,
    stream: Array | None,
    segment_ids: Array | None,
    output: Array,
    logarithms: Array,
    gradient: Array,
    *,
    rate: float,
    precision: str,
) -> tuple[Array, Array]:
    """Computes the gradients of `qkv` and, summed over all examples, of the bias for this device's shard."""
    shape = _shape(qkv, stream, segment_ids, rate, precision)
    batch, _, time, heads, dim = qkv.shape
    gradients, bias_gradient = backward(
        shape,
        _flat(shape, qkv, 2),
        _words(shape, batch, stream),
        _rows(shape, segment_ids),
        _flat(shape, output, 1),
        logarithms,
        _flat(shape, gradient, 1),
    )
    return gradients[:, :, :time].reshape(qkv.shape), all_sum(bias_gradient.reshape(3, heads, dim), "batch")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _self_attention(
    projected: Array, bias: Array, stream: Array | None, segment_ids: Array | None, rate: float, precision: str
) -> Array:
    return _forward_rule(projected, bias, stream, segment_ids, rate, precision)[0]


def _forward_rule(
    projected: Array, bias: Array, stream: Array | None, segment_ids: Array | None, rate: float, precision: str
) -> tuple[Array, tuple[Any, ...]]:
    qkv = checkpoint_name(constrain((projected + bias).swapaxes(1, 2), *QKV), KEPT)
    local = functools.partial(_local_forward, rate=rate, precision=precision)
    output, logarithms = per_shard(local, (QKV, *_names(stream, segment_ids)), (HEADS, LOGARITHMS))(qkv, stream, segment_ids)
    output, logarithms = (checkpoint_name(array, ATTENTION_OUTPUT) for array in (output, logarithms))
    return output, (qkv, stream, segment_ids, output, logarithms)


def _backward_rule(rate: float, precision: str, saved: tuple[Any, ...], gradient: Array) -> tuple[Array, Array, None, None]:
    _, stream, segment_ids, _, _ = saved
    local = functools.partial(_local_backward, rate=rate, precision=precision)
    names = (QKV, *_names(stream, segment_ids), HEADS, LOGARITHMS, HEADS)
    gradients, bias_gradient = per_shard(local, names, (QKV, BIAS))(*saved, gradient)
    return gradients.swapaxes(1, 2), bias_gradient.astype(gradient.dtype), None, None


def _names(stream: Array | None, segment_ids: Array | None) -> tuple[Any, Any]:
    """Returns the logical axes of the optional arguments."""
    return None if stream is None else STREAM, None if segment_ids is None else SEGMENTS


_self_attention.defvjp(_forward_rule, _backward_rule)
