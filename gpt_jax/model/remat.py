"""Rematerialization: the intermediate results that are kept for the backward pass, depending on `model.remat`.

off     keeps everything
dots    keeps the arrays that the model marks with `keep`: results of products with parameters, and results of attention
full    keeps only the input of each layer
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gpt_jax.config import ModelConfig

KEPT = "kept"
"""The name that marked arrays have in policies of `jax.checkpoint`."""


def keep(array: jax.Array) -> jax.Array:
    """Marks an array to be kept if `model.remat` is "dots"."""
    return checkpoint_name(array, KEPT)


def keep_bits(array: jax.Array) -> jax.Array:
    """Marks an operand or a result of a Pallas kernel to be kept, as integers of the same width.

    JAX passes marked floating-point arrays through `reduce_precision`. XLA cannot fuse this operation into a kernel, so the
    operation would read and write the whole array.
    """
    bits = jax.lax.bitcast_convert_type(array, jnp.uint16 if array.dtype.itemsize == 2 else jnp.uint32)
    return jax.lax.bitcast_convert_type(keep(bits), array.dtype)


def choose_remat(config: ModelConfig) -> str:
    """Returns `config.remat` with "auto" resolved. An LSTM has no large intermediate results, so its default is "off"."""
    return {"transformer": "dots", "lstm": "off"}[config.kind] if config.remat == "auto" else config.remat


def rematerialize(config: ModelConfig, body: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps the body of a scan so that its backward pass recomputes the results that `config.remat` does not keep."""
    remat, policies = choose_remat(config), jax.checkpoint_policies
    if remat == "off":
        return body
    policy = policies.nothing_saveable if remat == "full" else policies.save_only_these_names(KEPT)
    return jax.checkpoint(body, policy=policy, prevent_cse=False)  # Inside a scan, CSE cannot undo the recomputation.
