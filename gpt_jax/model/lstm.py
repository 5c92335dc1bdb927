"""The LSTM that replaces the Transformer in the ablation of section 5: one layer of 2048 units, with the same functions.

    embeddings, dropout -> LSTM -> projection to the embeddings' width, dropout -> softmax over the transposed embeddings

The paper gives only the number of units. In this implementation, the token embeddings are `embed_dim` wide and tied to the
output layer, like the Transformer's, and a projection maps the units back to that width. There are no position embeddings,
because the recurrence makes them unnecessary. Dropout rates are the Transformer's. The mesh axis "tensor" shards the units,
whose outputs are gathered at every step; this saves memory, not time.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from gpt_jax.config import ModelConfig
from gpt_jax.model import transformer
from gpt_jax.model.dropout import DropoutKey, Site, apply_dropout
from gpt_jax.model.linear import Linear
from gpt_jax.model.remat import keep, rematerialize
from gpt_jax.model.transformer import Hidden, Params, Starts, TokenEmbedding, Tokens
from gpt_jax.runtime.sharding import constrain

Cache = dict[str, Float[Array, "batch positions units"]]
"""The state after every position: `hidden` (compute dtype) and `cell` (float32)."""
State = tuple[Float[Array, "batch units"], Float[Array, "batch units"]]
"""The state after one position: hidden and cell."""


class Lstm(nnx.Module):
    """An LSTM layer without peepholes.

    i, f, o = sigmoid, g = tanh of x @ input + h @ recurrent + bias; c = f c + i g; h = o tanh(c).

    Kernels are N(0, 1 / inputs) and the forget gate's bias is 1. At the paper's sizes, this is close to the Transformer's
    N(0, 0.02). At smaller sizes, 0.02 would make the signal vanish, and there is no layer normalization to rescale it.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        embed, units = {"embed": config.embed_dim}, {"mlp": config.lstm_units}
        self.input = Linear(_with_inputs(config, config.embed_dim), embed, {"gates": 4, **units}, rngs=rngs)  # i, f, g, o
        self.input.bias[...] = self.input.bias[...].at[1].set(1)
        recurrent = jax.random.normal(rngs.params(), (config.lstm_units, 4, config.lstm_units)) / config.lstm_units**0.5
        self.recurrent = nnx.Param(recurrent.astype(config.param_dtype), axes=(None, None, "mlp"), decay=True)
        self.output = Linear(_with_inputs(config, config.lstm_units), units, embed, rngs=rngs)
        self.config = config

    def __call__(self, x: Hidden, restart: Bool[Array, "batch time"] | None, state: State) -> tuple[Hidden, Cache]:
        """Returns the output and the state after every position. Where `restart` is True, the state is reset before the step."""
        recurrent = self.recurrent[...].astype(x.dtype)

        def step(state: State, now: tuple[jax.Array, jax.Array | None]) -> tuple[State, State]:
            hidden, cell = state
            projected, fresh = now
            if fresh is not None:
                hidden, cell = (jnp.where(fresh[:, None], 0, array) for array in (hidden, cell))
            gates = keep(projected + jnp.tensordot(hidden, recurrent, 1))
            i, f, g, o = jnp.moveaxis(gates.astype(jnp.float32), 1, 0)
            cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
            hidden = (jax.nn.sigmoid(o) * jnp.tanh(cell)).astype(x.dtype)
            state = constrain(hidden, "batch", None), constrain(cell, "batch", "mlp")
            return state, state

        # The input projection is one product for all steps; only the recurrent product must be computed step by step.
        projected = constrain(self.input(x), "batch", None, None, "mlp")
        by_time = jax.tree.map(lambda array: jnp.moveaxis(array, 1, 0), (projected, restart))
        _, states = jax.lax.scan(rematerialize(self.config, step), state, by_time)
        hidden, cell = (jnp.moveaxis(array, 0, 1) for array in states)
        return self.output(hidden), {"hidden": hidden, "cell": cell}


def _with_inputs(config: ModelConfig, inputs: int) -> ModelConfig:
    """Returns a copy of the config with which `Linear` draws its kernel from N(0, 1 / inputs)."""
    return dataclasses.replace(config, init_stddev=inputs**-0.5)


MODULES = {"embedding": TokenEmbedding, "lstm": Lstm}

# -- functions on plain dictionaries, with the signatures of `transformer` ----------------------------------------------------


def init(config: ModelConfig, key: PRNGKeyArray) -> Params:
    """Returns random parameters; the embeddings are N(0, init_stddev)."""
    keys = zip(MODULES.items(), jax.random.split(key), strict=True)
    return {name: transformer.init_module(module, config, module_key) for (name, module), module_key in keys}


def param_specs(config: ModelConfig) -> dict[str, Any]:
    """Returns a tree like that of `init`, with a `ParamSpec` in place of each array."""
    return {name: transformer.module_param_specs(module, config) for name, module in MODULES.items()}


def apply(
    config: ModelConfig,
    params: Params,
    tokens: Tokens,
    dropout_key: DropoutKey | None = None,
    segment_ids: Tokens | None = None,
    token_rows: Hidden | None = None,
) -> Hidden:
    """Returns the projected output, in the compute dtype.

    Args:
      tokens: ids below `vocab_size`; `time` has no limit.
      dropout_key: determines the dropout masks; None for evaluation.
      segment_ids: numbers of the examples packed into one row; the state is reset where the number changes.
      token_rows: the tokens' rows of the embedding, if they have been looked up (tied.py).
    """
    return apply_cached(config, params, tokens, None, None, dropout_key, segment_ids, token_rows)[0]


def apply_cached(
    config: ModelConfig,
    params: Params,
    tokens: Tokens,
    cache: Cache | None,
    start: Starts | None,
    dropout_key: DropoutKey | None = None,
    segment_ids: Tokens | None = None,
    token_rows: Hidden | None = None,
) -> tuple[Hidden, Cache | None]:
    """Continues row i from its state after position `start[i]` - 1; returns the output at new positions and the updated cache.

    States beyond a row's own length, left there by padding, are never read and are overwritten as the row grows. Without a
    cache and `start`, rows begin at position 0.
    """
    state = _zero_state(config, tokens.shape[0])
    if cache is not None and start is not None:
        last = jnp.maximum(start - 1, 0)[:, None, None]
        before = {name: jnp.take_along_axis(array, last, axis=1)[:, 0] for name, array in cache.items()}
        state = tuple(jnp.where(start[:, None] > 0, before[name], 0) for name in ("hidden", "cell"))  # type: ignore[assignment]
    restart = None if segment_ids is None else jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
    graph, _ = transformer.split_module(Lstm, config)
    with jax.default_matmul_precision(config.matmul_precision):
        x = transformer.look_up_tokens(config, params, tokens) if token_rows is None else token_rows
        x = apply_dropout(x, dropout_key, config.embed_dropout, Site.EMBEDDING)
        x = constrain(x.astype(transformer.compute_dtype(config)), "batch", None, None)
        output, states = nnx.merge(graph, params["lstm"])(x, restart, state)
        output = apply_dropout(output, dropout_key, config.residual_dropout, Site.RESIDUAL_MLP)
        output = constrain(output, "batch", None, None)
    return output, None if cache is None or start is None else transformer.write_cache(cache, states, start)


def empty_cache(config: ModelConfig, batch: int, positions: int) -> Cache:
    """Returns a cache with room for the states after `positions` tokens in each row."""
    hidden, cell = _zero_state(config, batch)
    return {name: jnp.repeat(array[:, None], positions, axis=1) for name, array in (("hidden", hidden), ("cell", cell))}


def unstack_layers(config: ModelConfig, params: Params, cache: Cache) -> tuple[Params, Cache]:
    """Returns its arguments, because there is one layer, which is not stacked."""
    return params, cache


def _zero_state(config: ModelConfig, batch: Any) -> State:  # In an exported graph, the batch is symbolic and not an int.
    """Returns the state before the first token. The cell is a sum over time, so it is float32 for any compute dtype."""
    shape = (batch, config.lstm_units)
    return jnp.zeros(shape, transformer.compute_dtype(config)), jnp.zeros(shape, jnp.float32)
