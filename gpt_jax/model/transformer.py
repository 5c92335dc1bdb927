"""The decoder-only Transformer of section 4.1, in Flax NNX, used as pure functions on plain dictionaries of arrays.

    params = init(config, key)
    hidden = apply(config, params, tokens, dropout_key=DropoutKey(seed, step, example_id))
    scores = logits(config, params, hidden)

Layers are stacked: every array under `params["blocks"]` has a leading axis of `num_layers`, over which `apply` scans. Flax's
graph definitions are internal to this package. `param_specs` returns the logical axes of each parameter, from which all shardings
are derived, and whether weight decay applies to it.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gpt_jax.config import ModelConfig
from gpt_jax.model.attention import attention, self_attention, split_heads
from gpt_jax.model.dropout import DropoutKey, Site, apply_dropout, mask_stream
from gpt_jax.model.layer_norm import add_and_normalize
from gpt_jax.model.linear import Linear, Terms
from gpt_jax.model.remat import keep, rematerialize
from gpt_jax.runtime.sharding import constrain

Params = dict[str, Any]
"""Parameters as nested dictionaries of arrays."""
Tokens = Int[Array, "batch time"]
Hidden = Float[Array, "batch time embed"]
Starts = Int[Array, "batch"]
"""Position of the first new token of each row."""
Cache = dict[str, Any]
"""Keys and values of earlier positions, under "key" and "value": [layers, batch, heads, positions, dim], without the layer axis
inside a block. With this order of axes, attention reads a head's positions without a transposed copy. The LSTM caches its states
instead (lstm.py)."""


class ParamSpec(NamedTuple):
    """The layout of one parameter, and whether weight decay applies to it."""

    axes: tuple[str | None, ...]
    """Logical axis names, which `mesh.RULES` maps to mesh axes."""
    decay: bool
    """True for matrices and embeddings, False for biases and gains."""


# -- modules ----------------------------------------------------------------------------------------------------------------


class LayerNorm(nnx.Module):
    """Layer normalization of a residual sum over the last axis, with gain and bias, computed in float32."""

    def __init__(self, config: ModelConfig):
        # Sharding a few thousand numbers is not worthwhile.
        self.gain = nnx.Param(jnp.ones(config.embed_dim, config.param_dtype), axes=(None,), decay=False)
        self.bias = nnx.Param(jnp.zeros(config.embed_dim, config.param_dtype), axes=(None,), decay=False)
        self.config = config

    def __call__(self, x: Hidden, branch: Terms, dropout_key: DropoutKey | None, site: Site) -> Hidden:
        """Returns LN(x + dropout(branch)), where the branch is the sum of a product and its bias."""
        product, bias = branch
        rate, stream = self.config.residual_dropout, None
        if dropout_key is not None and rate:
            seed, step, example_id, layer = dropout_key
            stream = mask_stream(seed, step, layer, site, example_id, 0)
        with jax.named_scope("layer_norm"):
            return add_and_normalize(
                x, constrain(product, "batch", None, None), bias, self.gain[...], self.bias[...], stream, rate, self.config
            )


class Attention(nnx.Module):
    """Multi-head causal self-attention with one fused query-key-value projection."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        embed, heads = {"embed": config.embed_dim}, {"heads": config.num_heads, "head_dim": config.head_dim}
        self.qkv = Linear(config, embed, {"qkv": 3, **heads}, rngs=rngs)
        self.out = Linear(config, heads, embed, rngs=rngs)
        self.config = config

    def __call__(
        self, x: Hidden, dropout_key: DropoutKey | None, segment_ids: Tokens | None, cache: Cache | None, start: Starts | None
    ) -> tuple[Terms, Cache | None]:
        config, stream = self.config, None
        if dropout_key is not None and config.attention_dropout:
            seed, step, example_id, layer = dropout_key
            stream = mask_stream(seed, step, layer, Site.ATTENTION, example_id[:, None], jnp.arange(config.num_heads))
            stream = constrain(stream, "batch", "heads", None)
        options: Any = {"stream": stream, "rate": config.attention_dropout, "segment_ids": segment_ids}
        options |= {"precision": config.matmul_precision, "implementation": config.attention}
        if cache is None or start is None:
            with jax.named_scope("projections"):
                projected, bias = self.qkv.terms(x)
            mixed = self_attention(constrain(projected, "batch", None, None, "heads"), bias, config.num_heads, **options)
        else:
            query, key, value = split_heads(self.qkv(x), config.num_heads)
            cache = write_cache(cache, {"key": key.swapaxes(1, 2), "value": value.swapaxes(1, 2)}, start)
            key, value = cache["key"].swapaxes(1, 2), cache["value"].swapaxes(1, 2)
            mixed = attention(query, key, value, query_offset=start, **options).reshape(x.shape)
        with jax.named_scope("projections"):
            return self.out.terms(constrain(mixed, "batch", None, "heads")), cache


class Mlp(nnx.Module):
    """Position-wise feed-forward network with the tanh approximation of GELU."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        embed, mlp = {"embed": config.embed_dim}, {"mlp": config.mlp_dim}
        self.up = Linear(config, embed, mlp, rngs=rngs)
        self.down = Linear(config, mlp, embed, rngs=rngs)

    def __call__(self, x: Hidden) -> Terms:
        up = keep(constrain(self.up(x), "batch", None, "mlp"))
        return self.down.terms(jax.nn.gelu(up, approximate=True))


class Block(nnx.Module):
    """One layer: n = LN(x + attention(x)); h = LN(n + mlp(n)), with post-normalization as in the original Transformer."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.attention = Attention(config, rngs=rngs)
        self.attention_norm = LayerNorm(config)
        self.mlp = Mlp(config, rngs=rngs)
        self.mlp_norm = LayerNorm(config)

    def __call__(
        self, x: Hidden, dropout_key: DropoutKey | None, segment_ids: Tokens | None, cache: Cache | None, start: Starts | None
    ) -> tuple[Hidden, Cache | None]:
        with jax.named_scope("attention"):
            branch, cache = self.attention(x, dropout_key, segment_ids, cache, start)
            x = self.attention_norm(x, branch, dropout_key, Site.RESIDUAL_ATTENTION)
        with jax.named_scope("mlp"):
            return self.mlp_norm(x, self.mlp(x), dropout_key, Site.RESIDUAL_MLP), cache


class TokenEmbedding(nnx.Module):
    """Token embeddings, shared with the output layer."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        tokens = config.init_stddev * jax.random.normal(rngs.params(), (config.padded_vocab_size, config.embed_dim))
        real = jnp.arange(config.padded_vocab_size) < config.vocab_size
        tokens = jnp.where(real[:, None], tokens, 0)  # Padding rows stay zero, because no gradient reaches them.
        self.tokens = nnx.Param(tokens.astype(config.param_dtype), axes=("vocab", "embed"), decay=True)


class Embedding(TokenEmbedding):
    """Token and position embeddings, both learned."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        positions = config.init_stddev * jax.random.normal(rngs.params(), (config.context_length, config.embed_dim))
        self.positions = nnx.Param(positions.astype(config.param_dtype), axes=(None, "embed"), decay=True)


# -- functions on plain dictionaries ----------------------------------------------------------------------------------------


def init(config: ModelConfig, key: PRNGKeyArray) -> Params:
    """Returns random parameters. Call it under jit with output shardings, so that no host holds all of them."""
    embedding_key, blocks_key = jax.random.split(key)
    init_block = functools.partial(init_module, Block, config)
    blocks = jax.vmap(init_block)(jax.random.split(blocks_key, config.num_layers))
    return {"embedding": init_module(Embedding, config, embedding_key), "blocks": blocks}


def param_specs(config: ModelConfig) -> dict[str, Any]:
    """Returns a tree like that of `init`, with a `ParamSpec` in place of each array."""
    return {"embedding": module_param_specs(Embedding, config), "blocks": module_param_specs(Block, config, (None,))}


def apply(
    config: ModelConfig,
    params: Params,
    tokens: Tokens,
    dropout_key: DropoutKey | None = None,
    segment_ids: Tokens | None = None,
    token_rows: Hidden | None = None,
) -> Hidden:
    """Returns the last block's output, in the compute dtype. There is no final layer norm.

    Args:
      tokens: ids below `vocab_size`; `time` is at most `context_length`.
      dropout_key: determines the dropout masks; None for evaluation.
      segment_ids: numbers of the examples packed into one row; attention and positions restart where the number changes.
      token_rows: the tokens' embeddings, if they have already been looked up (tied.py).
    """
    return apply_cached(config, params, tokens, None, None, dropout_key, segment_ids, token_rows)[0]


def apply_cached(
    config: ModelConfig,
    params: Params,
    tokens: Tokens,
    cache: Cache | list[Cache] | None,
    start: Starts | None,
    dropout_key: DropoutKey | None = None,
    segment_ids: Tokens | None = None,
    token_rows: Hidden | None = None,
) -> tuple[Hidden, Cache | list[Cache] | None]:
    """Continues each row i after its `start[i]` cached positions; returns the output at the new ones and the updated cache.

    Keys and values beyond a row's own length, left there by padding, are never attended to and are overwritten as the row
    grows. Without a cache and `start`, rows begin at position 0. Parameters and cache may also be results of `unstack_layers`.
    """
    if start is not None:
        config = dataclasses.replace(config, attention="plain")  # Kernels need whole sequences and batches that split evenly.
    embedding = params["embedding"]
    positions = _positions(tokens, segment_ids) if start is None else start[:, None] + jnp.arange(tokens.shape[1])
    graph, _ = split_module(Block, config)

    def layer(x: jax.Array, scanned: tuple[Params, jax.Array, Cache | None]) -> tuple[jax.Array, Cache | None]:
        layer_params, number, layer_cache = scanned
        layer_key = None if dropout_key is None else dropout_key._replace(layer=number)
        return nnx.merge(graph, layer_params)(x, layer_key, segment_ids, layer_cache, start)

    with jax.default_matmul_precision(config.matmul_precision):
        with jax.named_scope("embedding"):
            rows = look_up_tokens(config, params, tokens) if token_rows is None else token_rows
            x = rows + constrain(embedding["positions"], None, None)[positions]
            x = apply_dropout(x, dropout_key, config.embed_dropout, Site.EMBEDDING)
            x = constrain(x.astype(compute_dtype(config)), "batch", None, None)
        if isinstance(cache, list):
            caches: list[Any] = []
            for number, (layer_params, layer_cache) in enumerate(zip(params["blocks"], cache, strict=True)):
                x, updated = layer(x, (layer_params, jnp.int32(number), layer_cache))
                caches.append(updated)
            return x, caches
        layers = params["blocks"], jnp.arange(config.num_layers), cache
        return jax.lax.scan(rematerialize(config, layer), x, layers, unroll=config.layer_unroll or 1)


def look_up_tokens(config: ModelConfig, params: Params, tokens: Tokens) -> Hidden:
    """Returns the tokens' rows of the table like `tied.lookup`, in float32 but rounded to the compute dtype, for any batch."""
    # The table is gathered over "fsdp" first, so that the lookup moves rows of the table and never the batch.
    table = constrain(params["embedding"]["tokens"].astype(compute_dtype(config)), "vocab", None)
    return table[tokens].astype(jnp.float32)


def empty_cache(config: ModelConfig, batch: int, positions: int) -> Cache:
    """Returns a key-value cache with room for `positions` tokens in each row, in the compute dtype."""
    shape = (config.num_layers, batch, config.num_heads, positions, config.head_dim)
    return {name: jnp.zeros(shape, compute_dtype(config)) for name in ("key", "value")}


def unstack_layers(config: ModelConfig, params: Params, cache: Cache) -> tuple[Params, list[Cache]]:
    """Returns parameters and cache for a loop of `apply_cached`, with the layers in lists instead of along a leading axis.

    A scan over stacked layers copies the slices of each layer. For a few tokens, copying the weights takes longer than
    multiplying by them. Here, the weights are copied once, before the loop.
    """
    layers = [jax.tree.map(operator.itemgetter(layer), (params["blocks"], cache)) for layer in range(config.num_layers)]
    blocks, caches = map(list, zip(*layers, strict=True))
    return params | {"blocks": blocks}, caches


def logits(config: ModelConfig, params: Params, hidden: Hidden) -> Float[Array, "batch time vocab"]:
    """Returns float32 next-token logits over the unpadded vocabulary, computed with the transposed token embeddings."""
    table = params["embedding"]["tokens"].astype(hidden.dtype)
    with jax.default_matmul_precision(config.matmul_precision), jax.named_scope("output"):
        scores = jnp.einsum("bte,ve->btv", hidden, table, preferred_element_type=jnp.float32)
    return scores[..., : config.vocab_size]  # Slicing the table instead would copy it.


def compute_dtype(config: ModelConfig, platform: str | None = None) -> jnp.dtype:
    """Returns the dtype of activations: the configured one, or for "auto", bfloat16 on accelerators and float32 on CPUs.

    Args:
      platform: "cpu", "gpu" or "tpu"; None means the platform of this machine's devices.
    """
    if config.compute_dtype == "auto":
        return jnp.dtype(jnp.float32 if (platform or jax.default_backend()) == "cpu" else jnp.bfloat16)
    return jnp.dtype(config.compute_dtype)


def _positions(tokens: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """Returns the position of each token: 0, 1, 2, ..., restarting with each segment."""
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    if segment_ids is None:
        return index[0]
    first = jnp.concatenate([jnp.ones_like(tokens[:, :1]), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(first, index, 0), axis=1)


# -- shared with the LSTM ---------------------------------------------------------------------------------------------------


def init_module(create: Callable[..., nnx.Module], config: ModelConfig, key: PRNGKeyArray) -> Params:
    """Returns random parameters of one module; `create` is its class."""
    return nnx.to_pure_dict(nnx.state(create(config, rngs=nnx.Rngs(params=key)), nnx.Param))


@functools.cache
def split_module(create: Callable[..., nnx.Module], config: ModelConfig) -> tuple[Any, Any]:
    """Returns a module's Flax graph definition and its abstract state (shapes and dtypes in place of arrays)."""
    return nnx.split(nnx.eval_shape(lambda: create(config, rngs=nnx.Rngs(0))))


def module_param_specs(
    create: Callable[..., nnx.Module], config: ModelConfig, prefix: tuple[str | None, ...] = ()
) -> dict[str, Any]:
    """Returns a `ParamSpec` for each parameter of a module; `prefix` names the axes that stacking prepends."""
    to_spec = lambda leaf: ParamSpec(prefix + leaf.get_metadata()["axes"], leaf.get_metadata()["decay"])  # noqa: E731
    _, state = split_module(create, config)
    return nnx.to_pure_dict(jax.tree.map(to_spec, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)))


def write_cache(cache: Cache, new: Cache, start: Starts) -> Cache:
    """Returns the cache with `new` written into row i from position `start[i]` on; the second-to-last axis holds positions."""
    write = jax.vmap(lambda old, new, at: jax.lax.dynamic_update_slice_in_dim(old, new, at, axis=-2))
    return {name: write(cache[name], new[name], start) for name in cache}
