"""Layer normalization after a residual sum, as in the original Transformer (section 4.1)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from gpt_jax.config import ModelConfig
from gpt_jax.model.dropout import dropout
from gpt_jax.model.linear import add_bias
from gpt_jax.model.remat import keep


def add_and_normalize(
    x: Float[Array, "batch time embed"],
    branch: Float[Array, "batch time embed"],
    branch_bias: Float[Array, "embed"],
    gain: Float[Array, "embed"],
    bias: Float[Array, "embed"],
    stream: UInt32[Array, "batch 2"] | None,
    rate: float,
    config: ModelConfig,
) -> Float[Array, "batch time embed"]:
    """Returns normalize(x + dropout(branch + branch_bias)) * gain + bias, where normalized rows have mean 0 and variance 1.

    Args:
      x, branch: arrays in the compute dtype, to which their sum is rounded. The normalization is computed in float32.
      branch_bias: the bias of the projection that `branch` comes from.
      gain, bias: the parameters of the layer norm.
      stream, rate: the stream of the dropout mask (None disables dropout) and the dropout rate.
      config: its `attention` also selects the kernels of `kernels.tpu_layer_norm`.
    """
    if config.attention == "pallas_tpu":
        from gpt_jax.model.kernels.tpu_layer_norm import is_supported, pallas_tpu_add_and_normalize

        if is_supported(*x.shape[1:]):
            vectors = branch_bias, gain, bias
            return pallas_tpu_add_and_normalize(x, branch, *vectors, stream, rate, config.layer_norm_epsilon)
    branch = add_bias(branch, branch_bias)
    summed = keep(x + (branch if stream is None else dropout(branch, stream, rate)))
    return normalize(summed, gain, bias, config.layer_norm_epsilon)


def normalize(x: Float[Array, "*rows embed"], gain: jax.Array, bias: jax.Array, epsilon: float) -> Float[Array, "*rows embed"]:
    """Returns x normalized over its last axis, computed in float32 and rounded to the dtype of x."""
    wide = x.astype(jnp.float32)
    centered = wide - wide.mean(axis=-1, keepdims=True)
    variance = jnp.square(centered).mean(axis=-1, keepdims=True)
    return (centered * jax.lax.rsqrt(variance + epsilon) * gain + bias).astype(x.dtype)
