"""The choice between the Transformer (section 4.1) and the LSTM of the ablation (section 5)."""

from __future__ import annotations

from typing import Any, Protocol

from jaxtyping import Array, Float, Int, PRNGKeyArray

from gpt_jax.config import ModelConfig
from gpt_jax.model import lstm, transformer
from gpt_jax.model.dropout import DropoutKey
from gpt_jax.model.transformer import Cache, Params


class Network(Protocol):
    """The functions on plain dictionaries of arrays that the modules `transformer` and `lstm` both offer.

    The docstrings of `transformer` are the contract.
    """

    def init(self, config: ModelConfig, key: PRNGKeyArray) -> Params: ...

    def param_specs(self, config: ModelConfig) -> dict[str, Any]: ...

    def apply(
        self,
        config: ModelConfig,
        params: Params,
        tokens: Int[Array, "batch time"],
        *,
        dropout_key: DropoutKey | None = None,
        segment_ids: Int[Array, "batch time"] | None = None,
    ) -> Float[Array, "batch time embed"]: ...

    def apply_cached(
        self, config: ModelConfig, params: Params, tokens: Int[Array, "batch time"], cache: Cache, start: Int[Array, "batch"]
    ) -> tuple[Float[Array, "batch time embed"], Cache]: ...

    def empty_cache(self, config: ModelConfig, batch: int, positions: int) -> Cache: ...


def network(config: ModelConfig) -> Network:
    """Returns the module that implements the architecture of `config.kind`."""
    return {"transformer": transformer, "lstm": lstm}[config.kind]
