"""Causal self-attention (section 4.1), with interchangeable implementations whose results must agree.

    plain        the definition, with all probabilities in one array
    blockwise    blocks of queries in plain JAX (kernels/blockwise.py)
    pallas_tpu   kernels for TPUs (kernels/tpu.py, kernels/tpu_attention.py)
    pallas_gpu   kernels for NVIDIA GPUs (kernels/gpu.py)

The modules with Pallas kernels are imported where they are used, because importing Pallas takes time, and runs on CPUs do not
need it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from gpt_jax.errors import require
from gpt_jax.model.dropout import dropout
from gpt_jax.model.kernels.blockwise import MASKED, blockwise_attention
from gpt_jax.model.linear import add_bias
from gpt_jax.model.remat import keep
from gpt_jax.runtime.sharding import constrain

PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}
"""The platforms that some implementations require; all others run everywhere."""


def self_attention(
    projected: Float[Array, "batch time 3 width"],
    bias: Float[Array, "3 width"],
    num_heads: int,
    *,
    stream: UInt32[Array, "batch heads 2"] | None = None,
    rate: float = 0.0,
    segment_ids: Int[Array, "batch time"] | None = None,
    precision: str = "default",
    implementation: str = "auto",
) -> Float[Array, "batch time width"]:
    """Computes causal self-attention over whole sequences from the fused projection of queries, keys and values.

    The heads are side by side: width = heads x dim. The bias is passed separately, because a kernel that computes the other
    gradients can also sum the bias gradient.

    Args:
      projected: queries, keys and values without their bias, in the compute dtype.
      bias: added to `projected`, in the parameters' dtype. Its gradient is summed over examples and devices in float32.
      num_heads: number of heads in the width.
      stream, rate, segment_ids, precision, implementation: as for `attention`.
    """
    time, dim = projected.shape[1], projected.shape[3] // num_heads
    name = _resolve(implementation, time, dim, projected.dtype)
    if name == "pallas_tpu":
        from gpt_jax.model.kernels.tpu_attention import pallas_tpu_self_attention

        return pallas_tpu_self_attention(projected, bias, num_heads, stream, rate, segment_ids, precision)
    qkv = keep(constrain(add_bias(projected, bias), "batch", None, None, "heads"))
    mixed = IMPLEMENTATIONS[name](*split_heads(qkv, num_heads), stream, rate, segment_ids, precision)
    return mixed.reshape(qkv.shape[0], time, -1)


def split_heads(qkv: Float[Array, "batch time 3 width"], num_heads: int) -> list[Float[Array, "batch time heads dim"]]:
    """Returns queries, keys and values, each with a separate axis for the heads."""
    batch, time, _, width = qkv.shape
    by_head = qkv.reshape(batch, time, 3, num_heads, width // num_heads)
    return [part[:, :, 0] for part in jax.lax.split(by_head, (1, 1, 1), axis=2)]


def attention(
    query: Float[Array, "batch queries heads dim"],
    key: Float[Array, "batch keys heads dim"],
    value: Float[Array, "batch keys heads dim"],
    *,
    stream: UInt32[Array, "batch heads 2"] | None = None,
    rate: float = 0.0,
    segment_ids: Int[Array, "batch keys"] | None = None,
    query_offset: Int[Array, "batch"] | Int[Array, ""] | int | None = None,
    precision: str = "default",
    implementation: str = "auto",
) -> Float[Array, "batch queries heads dim"]:
    """Computes scaled dot-product attention under a causal mask, with dropout on the probabilities.

    Query i is at position `query_offset + i` and attends to the keys at positions up to its own. The same function therefore
    serves training (as many queries as keys) and decoding from a cache (fewer queries than keys).

    Args:
      query, key, value: arrays in the compute dtype.
      stream: streams of this layer's dropout masks, from `mask_stream`; None disables dropout. Streams require as many queries as
        keys, so decoding has no dropout.
      rate: dropout rate on the probabilities, a Python number in [0, 1).
      segment_ids: numbers of the examples packed into a row; a query attends only to keys of its own segment. They also require
        as many queries as keys.
      query_offset: position of the first query, one for all rows or one per row; None means keys - queries.
      precision: precision of float32 products in both passes, on hardware that would otherwise reduce it.
      implementation: a name in `IMPLEMENTATIONS`, or "auto" for the choice of `choose_attention` for this machine's devices.
        Decoding, which has fewer queries than keys or an offset, always uses "plain".

    Returns:
      Sums of the values weighted by the probabilities, in the compute dtype. The softmax is computed in float32.

    Raises:
      ValueError: `stream` is given, but the numbers of queries and keys differ.
    """
    queries, keys = query.shape[1], key.shape[1]
    if queries == keys and query_offset is None:
        name = _resolve(implementation, query.shape[1], query.shape[3], query.dtype)
        return IMPLEMENTATIONS[name](query, key, value, stream, rate, segment_ids, precision)
    if stream is not None and queries != keys:
        raise ValueError(f"dropout needs as many queries as keys, got {queries} and {keys}")
    offset = keys - queries if query_offset is None else query_offset
    return _plain(query, key, value, stream, rate, segment_ids, precision, offset)


class Choice(NamedTuple):
    """The implementation that "auto" stands for."""

    name: str
    """Its name in `IMPLEMENTATIONS`."""
    reason: str
    """The reason, as a phrase for the user."""


MAX_PLAIN = 4096
"""Maximum sequence length in tokens for which `plain` replaces a TPU kernel. For longer ones, the probabilities fill memory."""
BLOCKWISE_BEYOND = 64
"""Sequence length in tokens beyond which `blockwise` trains faster than `plain` on CPUs (docs/benchmarks.md)."""


def choose_attention(platform: str, time: int, dim: int, dtype: Any, device_kind: str) -> Choice:
    """Returns the implementation for sequences of `time` tokens and heads of size `dim` in a compute dtype.

    Args:
      platform: the platform of the devices: "cpu", "gpu" or "tpu".
      device_kind: the kind of the devices, as in JAX, or "" if it is unknown. On some, kernels support only shorter sequences.
    """
    if platform == "tpu":
        reason = _unsupported("pallas_tpu", time, dim, dtype, device_kind)
        other = "plain" if time <= MAX_PLAIN else "blockwise"
        return Choice(other, reason) if reason else Choice("pallas_tpu", "the fastest on TPUs")
    if platform != "cpu":
        return Choice("plain", f"nothing is known to be faster on a {platform.upper()}")
    if time > BLOCKWISE_BEYOND:
        return Choice("blockwise", f"faster on CPUs beyond {BLOCKWISE_BEYOND} tokens")
    return Choice("plain", f"about as fast as any on CPUs up to {BLOCKWISE_BEYOND} tokens")


def check_attention(implementation: str, platform: str, time: int, dim: int, dtype: Any, device_kind: str) -> None:
    """Checks that an implementation runs on these devices and supports sequences and heads of this size; see `choose_attention`.

    Raises:
      UserError: it does not.
    """
    needed = PLATFORMS.get(implementation, platform)
    devices = {"cpu": "CPUs", "gpu": "GPUs", "tpu": "TPUs"}
    problem = f"{implementation} runs on {devices.get(needed, needed)}, and the devices are {devices.get(platform, platform)}"
    require(needed == platform, "model.attention", f"{problem}; use auto")
    reason = _unsupported(implementation, time, dim, dtype, device_kind)
    require(reason is None, "model.attention", f"{reason}; use auto")


def _unsupported(implementation: str, time: int, dim: int, dtype: Any, device_kind: str) -> str | None:
    """Returns the reason why an implementation does not support sequences or heads of this size; None if it does."""
    if implementation == "pallas_tpu":
        from gpt_jax.model.kernels import tpu_attention

        return tpu_attention.unsupported(dim, time, dtype, device_kind)
    if implementation == "pallas_gpu":
        from gpt_jax.model.kernels import gpu

        return gpu.unsupported(dim, time, dtype)
    return None


def _resolve(implementation: str, time: Any, dim: int, dtype: Any) -> str:  # In an exported graph, the time is symbolic.
    """Returns the name of an implementation, with "auto" resolved for this machine's devices."""
    if implementation != "auto":
        return implementation
    device = jax.devices()[0]
    return choose_attention(device.platform, time, dim, dtype, device.device_kind).name


def _plain(
    query: Array,
    key: Array,
    value: Array,
    stream: Array | None,
    rate: float,
    segment_ids: Array | None,
    precision: str,
    offset: Array | int = 0,
) -> Array:
    """Computes attention by its definition, with all probabilities in one [batch, heads, queries, keys] array."""
    positions = jnp.asarray(offset)[..., None, None] + jnp.arange(query.shape[1])[:, None]
    allowed = positions >= jnp.arange(key.shape[1])
    if segment_ids is not None:
        allowed = allowed & (segment_ids[:, :, None] == segment_ids[:, None, :])
    if allowed.ndim == 3:
        allowed = allowed[:, None]  # the same for every head

    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, precision=precision, preferred_element_type=jnp.float32)
    scores = scores / math.sqrt(query.shape[-1])
    probabilities = jax.nn.softmax(jnp.where(allowed, scores, MASKED), axis=-1)
    if stream is not None:
        probabilities = dropout(probabilities, stream, rate)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", probabilities.astype(value.dtype), value, precision=precision)
    return keep(mixed)


def _pallas_tpu(query: Array, key: Array, value: Array, *options: Any) -> Array:
    """Packs queries, keys and values into one array for the kernel. In training, the fused projection provides this array."""
    from gpt_jax.model.kernels.tpu_attention import pallas_tpu_self_attention

    batch, time, heads, _ = query.shape
    qkv = jnp.stack([array.reshape(batch, time, -1) for array in (query, key, value)], axis=2)
    return pallas_tpu_self_attention(qkv, jnp.zeros_like(qkv[0, 0]), heads, *options).reshape(query.shape)


def _pallas_gpu(*arguments: Any) -> Array:
    from gpt_jax.model.kernels.gpu import pallas_gpu_attention

    return pallas_gpu_attention(*arguments)


IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {
    "plain": _plain,
    "blockwise": blockwise_attention,
    "pallas_tpu": _pallas_tpu,
    "pallas_gpu": _pallas_gpu,
}
