"""Next-token cross-entropy over the vocabulary, in chunks of time (section 3.1, equation 1).

A batch x time x vocabulary array of float32 logits would be the largest array in the training step. Here the logits of only
`chunk` time steps exist at once. The batch axis is not split, because splitting it, or flattening batch and time, would gather
the batch on every device. The gradients are computed in the forward pass, chunk by chunk, while the logits are available. Value
and gradients therefore take three vocabulary-sized products instead of four, and no array of that size is kept.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gpt_jax.config import ModelConfig
from gpt_jax.model.dropout import DropoutKey
from gpt_jax.model.network import network
from gpt_jax.model.transformer import Hidden, Params, Tokens
from gpt_jax.runtime.sharding import all_max, all_sum, per_shard, shard_index

Batch = dict[str, jax.Array]
Table = Float[Array, "padded_vocab embed"]
Weights = Float[Array, "batch time"]

CACHED_ROWS = 256
"""Number of tokens whose logits a CPU computes at once: few enough for its cache, but enough to amortize the table's gradient,
which is read and written in full for every chunk (docs/benchmarks.md has the measurements)."""


def normalize(batch: Batch) -> Batch:
    """Divides the loss weights by their sum over the global batch, so that the losses of micro-batches add up to the total."""
    return batch | {"loss_weights": batch["loss_weights"] / jnp.maximum(batch["loss_weights"].sum(), 1e-6)}


def language_model_loss(config: ModelConfig, params: Params, batch: Batch, dropout_key: DropoutKey | None) -> Float[Array, ""]:
    """Returns the sum of weight x negative log-likelihood (nats) of the targets, which is their mean after `normalize`.

    Args:
      batch: tokens and targets int32 [batch, time], loss_weights float32 [batch, time], optionally segment_ids [batch, time].
      dropout_key: determines the dropout masks; None for evaluation.
    """
    hidden = network(config).apply(config, params, batch["tokens"], dropout_key=dropout_key, segment_ids=batch.get("segment_ids"))
    table = params["embedding"]["tokens"]
    with jax.default_matmul_precision(config.matmul_precision):
        return cross_entropy(hidden, table, batch["targets"], batch["loss_weights"], config.vocab_size, config.loss_chunk)


def time_chunks(time: int, longest: int, batch: int) -> tuple[Int[Array, "chunks"], int]:
    """Returns the starts and the common length of the fewest chunks of at most `longest` steps that cover `time`.

    The last chunk may extend beyond `time`. If `longest` is 0, a chunk has about `CACHED_ROWS` tokens of a batch of this size.
    """
    longest = longest or max(CACHED_ROWS // batch, 1)
    number = -(-time // longest)
    length = -(-time // number)
    return jnp.arange(number) * length, length


def pad_time(array: jax.Array, time: int) -> jax.Array:
    """Pads axis 1 with zeros to length `time`. Padded loss weights are 0, so padding does not count."""
    missing = time - array.shape[1]
    return jnp.pad(array, [(0, 0), (0, missing)] + [(0, 0)] * (array.ndim - 2)) if missing else array


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(
    hidden: Hidden, table: Table, targets: Tokens, weights: Weights, vocab_size: int, chunk: int
) -> Float[Array, ""]:
    """Returns sum_bt weights[b, t] * -log softmax(hidden[b, t] @ table[:vocab_size].T)[targets[b, t]], float32.

    It is differentiable with respect to `hidden` and `table` only. The product is computed in the dtype of `hidden` with
    float32 results, for at most `chunk` time steps at once (0 means about `CACHED_ROWS` tokens).
    """
    return _over_shards(hidden, table, targets, weights, vocab_size, chunk)


def _over_shards(
    hidden: Hidden, table: Table, targets: Tokens, weights: Weights, vocab_size: int, chunk: int, gradients: bool = False
) -> Any:
    """Computes the loss, with each device handling its own examples and its shard of the vocabulary.

    With `gradients`, it returns (loss, (gradient of hidden, gradient of table)), as the forward pass of a custom VJP must.
    """
    by_example, by_token, by_entry = ("batch", None, None), ("batch", None), ("vocab", None)
    out_names = ((), (by_example, by_entry)) if gradients else ()
    local = functools.partial(_local, vocab_size=vocab_size, chunk=chunk, gradients=gradients)
    with jax.named_scope("loss"):
        return per_shard(local, (by_example, by_entry, by_token, by_token), out_names)(hidden, table, targets, weights)


def _backward(vocab_size: int, chunk: int, gradients: tuple[Array, Array], factor: Array) -> tuple[Array, Array, None, None]:
    """Scales the gradients that the forward pass computed; targets and weights have none."""
    hidden_gradient, table_gradient = ((factor * gradient).astype(gradient.dtype) for gradient in gradients)
    return hidden_gradient, table_gradient, None, None


cross_entropy.defvjp(functools.partial(_over_shards, gradients=True), _backward)


def _local(hidden: Array, table: Array, targets: Array, weights: Array, *, vocab_size: int, chunk: int, gradients: bool) -> Any:
    """Computes the loss, and optionally its gradients, for this device's shard, and sums them over the devices."""
    entries = shard_index("vocab") * table.shape[0] + jnp.arange(table.shape[0])
    narrow = table.astype(hidden.dtype)
    time = hidden.shape[1]
    starts, chunk = time_chunks(time, chunk, hidden.shape[0])
    hidden, targets, weights = (pad_time(array, len(starts) * chunk) for array in (hidden, targets, weights))

    def one_chunk(carry: tuple[jax.Array, jax.Array], start: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        total, table_gradient = carry
        x, target, weight = (jax.lax.dynamic_slice_in_dim(array, start, chunk, axis=1) for array in (hidden, targets, weights))
        scores = jnp.einsum("bte,ve->btv", x, narrow, preferred_element_type=jnp.float32)
        scores = jnp.where(entries < vocab_size, scores, -jnp.inf)  # Rows beyond it are padding.
        highest = all_max(scores.max(axis=-1, keepdims=True), "vocab")
        exponentials = jnp.exp(scores - highest)
        normalizer = all_sum(exponentials.sum(axis=-1, keepdims=True), "vocab")
        is_target = entries == target[..., None]
        # Indexing would not work, because the target may be in another device's shard of the vocabulary.
        target_score = all_sum(jnp.where(is_target, scores - highest, 0).sum(axis=-1), "vocab")
        total = total + (weight * (jnp.log(normalizer[..., 0]) - target_score)).sum()
        if not gradients:
            return (total, table_gradient), jnp.zeros(())
        score_gradient = (weight[..., None] * (exponentials / normalizer - is_target)).astype(hidden.dtype)
        # On CPUs, XLA transposes the first operand, and transposing the gradient of the scores would take longer.
        table_gradient = table_gradient + jnp.einsum("bte,btv->ev", x, score_gradient, preferred_element_type=jnp.float32)
        x_gradient = all_sum(jnp.einsum("btv,ve->bte", score_gradient, narrow, preferred_element_type=jnp.float32), "vocab")
        return (total, table_gradient), x_gradient.astype(hidden.dtype)

    zero = jnp.zeros(table.shape[::-1] if gradients else (), jnp.float32)
    (total, table_gradient), pieces = jax.lax.scan(one_chunk, (jnp.zeros(()), zero), starts)
    total = all_sum(total, "batch")
    if not gradients:
        return total
    hidden_gradient = jnp.moveaxis(pieces, 0, 1).reshape(hidden.shape)[:, :time]
    return total, (hidden_gradient, all_sum(table_gradient.T, "batch").astype(table.dtype))
