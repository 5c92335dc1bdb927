"""Differentiable causal attention on NVIDIA GPUs, through the kernels of `gpu_kernels`.

The derivative is defined for the whole, sharded arrays, and each of its two rules maps kernels over the devices' shards. A
checkpoint policy therefore sees what the forward rule keeps, by name, and the forward kernel runs once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from gpt_jax.errors import UserError
from gpt_jax.model.kernels.blockwise import Masks
from gpt_jax.model.kernels.gpu_kernels import ForwardResults, backward, forward
from gpt_jax.model.remat import keep_bits
from gpt_jax.runtime.sharding import per_shard

HEAD_DIMS = (16, 32, 64, 128)
"""Sizes of heads that the kernels take."""
MAX_TIME = 8192
"""Maximum sequence length in tokens."""

HEADS = ("batch", None, "heads", None)
"""Logical axes of queries, keys, values and outputs: [batch, time, heads, dim]."""
ROWS = ("batch", "heads", None)
"""Logical axes of streams and normalizers: [batch, heads, 2 or time]."""


def pallas_gpu_attention(
    query: Float[Array, "batch time heads dim"],
    key: Float[Array, "batch time heads dim"],
    value: Float[Array, "batch time heads dim"],
    stream: UInt32[Array, "batch heads 2"] | None,
    rate: float,
    segment_ids: Int[Array, "batch time"] | None,
    precision: str,
) -> Float[Array, "batch time heads dim"]:
    """Computes causal attention of as many queries as keys with GPU kernels.

    Args:
      query, key, value: bfloat16 or float32. Products of either accumulate in float32.
      stream, rate, segment_ids: as for `attention.attention`.
      precision: "highest" for exact products of float32 numbers, which are otherwise TensorFloat-32.

    Raises:
      UserError: the kernels do not take this size of heads, length or dtype.
    """
    if reason := unsupported(query.shape[3], query.shape[1], query.dtype):
        raise UserError(reason)
    rate = 0.0 if stream is None else rate
    masks = Masks(stream if rate else None, None if segment_ids is None else segment_ids.astype(jnp.int32))
    return _attention(query, key, value, masks, rate, precision)


def unsupported(dim: int, time: int, dtype: Any = jnp.bfloat16) -> str | None:
    """Returns the reason, for the user, why the kernels do not take heads of this size, length or dtype; None if they do."""
    if dim not in HEAD_DIMS:
        return f"pallas_gpu takes heads of size {', '.join(map(str, HEAD_DIMS[:-1]))} or {HEAD_DIMS[-1]}, not {dim}"
    if time > MAX_TIME:
        return f"pallas_gpu takes sequences of at most {MAX_TIME:,} tokens, not {time:,}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"pallas_gpu computes in bfloat16 or float32, not {jnp.dtype(dtype)}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(query: Array, key: Array, value: Array, masks: Masks, rate: float, precision: str) -> Array:
    return _forward_rule(query, key, value, masks, rate, precision)[0]


def _forward_rule(
    query: Array, key: Array, value: Array, masks: Masks, rate: float, precision: str
) -> tuple[Array, tuple[Any, ...]]:
    local = functools.partial(forward, rate=rate, precision=precision)
    names = (HEADS, HEADS, HEADS, _mask_names(masks))
    results = per_shard(local, names, _result_names(query))(query, key, value, masks)
    results = jax.tree.map(keep_bits, results)
    return results.output, (query, key, value, masks, results)


def _backward_rule(rate: float, precision: str, saved: tuple[Any, ...], gradient: Array) -> tuple[Array, Array, Array, None]:
    _, _, _, masks, _ = saved
    local = functools.partial(backward, rate=rate, precision=precision)
    names = (HEADS, HEADS, HEADS, _mask_names(masks), _result_names(gradient), HEADS)
    return *per_shard(local, names, (HEADS, HEADS, HEADS))(*saved, gradient), None


def _result_names(output: Array) -> Any:
    """Returns the logical axes of the `ForwardResults`."""
    return ForwardResults(HEADS, HEADS if output.dtype != jnp.float32 else None, ROWS)


def _mask_names(masks: Any) -> Any:
    """Returns the logical axes of `Masks`."""
    segment_ids = None if masks.segment_ids is None else ("batch", None)
    return masks._replace(stream=None if masks.stream is None else ROWS, segment_ids=segment_ids)


_attention.defvjp(_forward_rule, _backward_rule)
