"""Which intermediate results the backward pass finds in memory, and which it computes again (`model.remat`).

off     everything is kept
dots    the arrays that the model marks with `keep` are: results of products with parameters, and those of attention
full    only the input of each layer is
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gpt_jax.config import ModelConfig

KEPT = "kept"
"""The name under which `jax.checkpoint` knows the marked arrays."""


def keep(array: jax.Array) -> jax.Array:
    """Marks an array to be kept where `model.remat` is "dots"."""
    return checkpoint_name(array, KEPT)


def keep_bits(array: jax.Array) -> jax.Array:
    """Marks an operand or a result of a kernel, as integers of the same width.

    JAX passes marked floating-point numbers through `reduce_precision`, which XLA cannot merge into a kernel. It would read and
    write the whole array.
    """
    bits = jax.lax.bitcast_convert_type(array, jnp.uint16 if array.dtype.itemsize == 2 else jnp.uint32)
    return jax.lax.bitcast_convert_type(keep(bits), array.dtype)


def choose_remat(config: ModelConfig) -> str:
    """Returns what `config.remat` stands for. An LSTM has no large intermediate results, so it recomputes nothing by default."""
    return {"transformer": "dots", "lstm": "off"}[config.kind] if config.remat == "auto" else config.remat


def rematerialize(config: ModelConfig, body: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps the body of a scan so that its backward pass computes again what `config.remat` does not keep."""
    remat, policies = choose_remat(config), jax.checkpoint_policies
    if remat == "off":
        return body
    policy = policies.nothing_saveable if remat == "full" else policies.save_only_these_names(KEPT)
    return jax.checkpoint(body, policy=policy, prevent_cse=False)  # CSE cannot undo it inside a scan.
