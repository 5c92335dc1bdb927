"""The network that a config asks for: the Transformer (section 4.1), or the LSTM of the ablation (section 5).

The functions are those of `transformer`, whose docstrings are the contract.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gpt_jax.config import ModelConfig
from gpt_jax.model import lstm, transformer
from gpt_jax.model.transformer import DropoutKey, Params

Cache = transformer.Cache | lstm.Cache


def init(config: ModelConfig, key: PRNGKeyArray) -> Params:
    """Random parameters."""
    return _chosen(config).init(config, key)


def param_specs(config: ModelConfig) -> dict[str, Any]:
    """A tree like `init`'s with a `transformer.ParamSpec` in place of each array."""
    return _chosen(config).param_specs(config)


def count(config: ModelConfig) -> int:
    """Number of parameters, without the rows that pad the vocabulary (the paper's Transformer: 116,534,784)."""
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    padding = (config.padded_vocab_size - config.vocab_size) * config.embed_dim
    return sum(leaf.size for leaf in jax.tree.leaves(shapes)) - padding


def apply(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "batch time"],
    *,
    dropout_key: DropoutKey | None = None,
    segment_ids: Int[Array, "batch time"] | None = None,
) -> Float[Array, "batch time embed"]:
    """The last layer's output, in the compute dtype."""
    return _chosen(config).apply(config, params, tokens, dropout_key=dropout_key, segment_ids=segment_ids)


def apply_cached(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "batch time"],
    cache: Cache,
    start: Int[Array, "batch"],
) -> tuple[Float[Array, "batch time embed"], Cache]:
    """Continues rows whose first `start[i]` positions are in the cache: the new positions' output and the fuller cache."""
    return _chosen(config).apply_cached(config, params, tokens, cache, start)


def empty_cache(config: ModelConfig, batch: int, positions: int) -> Cache:
    """A cache with room for `positions` tokens a row."""
    return _chosen(config).empty_cache(config, batch, positions)


def logits(config: ModelConfig, params: Params, hidden: Float[Array, "batch time embed"]) -> Float[Array, "batch time vocab"]:
    """Next-token scores over the logical vocabulary in float32, through the transposed token embeddings that both have."""
    return transformer.logits(config, params, hidden)


def _chosen(config: ModelConfig) -> ModuleType:
    return {"transformer": transformer, "lstm": lstm}[config.kind]
