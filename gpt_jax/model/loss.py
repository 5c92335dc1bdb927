"""Next-token cross-entropy over the vocabulary, in chunks of time (section 3.1, equation 1).

A batch x time x vocabulary array of float32 logits would be the largest array in the training step. Here, only the logits of
`chunk` time steps exist at once. The batch axis is not split, because splitting it, or flattening batch and time, would gather
the batch on every device. The gradients are computed in the forward pass, chunk by chunk, while the logits are available. The
loss and its gradients therefore take three vocabulary-sized products instead of four, and no vocabulary-sized array is kept.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gpt_jax.config import ModelConfig
from gpt_jax.model.dropout import DropoutKey
from gpt_jax.model.network import network
from gpt_jax.model.tied import PARTIAL, TABLE, SharedTable, local_rows, lookup, share
from gpt_jax.model.transformer import Hidden, Params, Tokens, compute_dtype
from gpt_jax.runtime.sharding import all_max, all_sum, is_split, per_shard, shard_index

Batch = dict[str, jax.Array]
Table = Float[Array, "padded_vocab embed"]
Weights = Float[Array, "batch time"]

CACHED_ROWS = 256
"""Number of tokens whose logits a CPU computes at once: few enough for its cache, but enough to amortize the cost of reading and
writing the table's whole gradient for every chunk (docs/benchmarks.md has the measurements)."""

LARGEST_ODDS = 1e25
"""Maximum sum of the odds against a target for which their products with weights and activations fit the range of bfloat16."""


def normalize(batch: Batch) -> Batch:
    """Divides the loss weights by their sum over the global batch, so that the losses of micro-batches add up to the total."""
    return batch | {"loss_weights": batch["loss_weights"] / jnp.maximum(batch["loss_weights"].sum(), 1e-6)}


def language_model_loss(config: ModelConfig, params: Params, batch: Batch, dropout_key: DropoutKey | None) -> Float[Array, ""]:
    """Returns the sum over targets of weight x negative log-likelihood (nats), a weighted mean if `normalize` was applied.

    Args:
      batch: tokens and targets int32 [batch, time], loss_weights float32 [batch, time], optionally segment_ids [batch, time].
      dropout_key: determines the dropout masks; None for evaluation.
    """
    token_rows, table = embed_tokens(config, params, batch["tokens"])
    hidden = network(config).apply(
        config, params, batch["tokens"], dropout_key=dropout_key, segment_ids=batch.get("segment_ids"), token_rows=token_rows
    )
    with jax.default_matmul_precision(config.matmul_precision):
        return cross_entropy(hidden, table, batch["targets"], batch["loss_weights"], config.vocab_size, config.loss_chunk)


def embed_tokens(config: ModelConfig, params: Params, tokens: Tokens) -> tuple[Hidden, SharedTable]:
    """Returns the tokens' rows of the table, and the gathered table for `cross_entropy`, which then need not gather it again."""
    with jax.named_scope("embedding"):
        return lookup(share(params["embedding"]["tokens"], compute_dtype(config)), tokens)


def time_chunks(time: int, longest: int, batch: int) -> tuple[Int[Array, "chunks"], int]:
    """Returns the starts and the common length of the fewest chunks of at most `longest` steps that cover `time`.

    The last chunk may extend beyond `time`. If `longest` is 0, a chunk of a batch of this size has about `CACHED_ROWS` tokens.
    """
    longest = longest or max(CACHED_ROWS // batch, 1)
    number = -(-time // longest)
    length = -(-time // number)
    return jnp.arange(number) * length, length


def pad_time(array: jax.Array, time: int) -> jax.Array:
    """Pads axis 1 with zeros to length `time`. The loss weights of the padding are thus 0, so it does not affect the loss."""
    missing = time - array.shape[1]
    return jnp.pad(array, [(0, 0), (0, missing)] + [(0, 0)] * (array.ndim - 2)) if missing else array


def cross_entropy(
    hidden: Hidden, table: Table | SharedTable, targets: Tokens, weights: Weights, vocab_size: int, chunk: int
) -> Float[Array, ""]:
    """Returns sum_bt weights[b, t] * -log softmax(hidden[b, t] @ table[:vocab_size].T)[targets[b, t]], float32.

    The function is differentiable with respect to `hidden` and `table` only. The product has operands in the dtype of `hidden`
    and float32 results, and is computed for at most `chunk` time steps at once (0 means about `CACHED_ROWS` tokens).
    """
    shared = table if isinstance(table, SharedTable) else share(table, hidden.dtype)
    return _cross_entropy(hidden, shared, targets, weights, vocab_size, chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(hidden: Array, table: SharedTable, targets: Array, weights: Array, vocab_size: int, chunk: int) -> Array:
    return _over_shards(hidden, table, targets, weights, vocab_size, chunk)


def _over_shards(
    hidden: Array, table: SharedTable, targets: Array, weights: Array, vocab_size: int, chunk: int, gradients: bool = False
) -> Any:
    """Computes the loss, with each device handling its own examples and its shard of the vocabulary.

    If `gradients` is True, it returns (loss, (gradient of hidden, gradient of table)), as the forward pass of a custom VJP must.
    The table's gradient is not yet summed over the devices (tied.py).
    """
    by_example, by_token = ("batch", None, None), ("batch", None)
    out_names = ((), (by_example, PARTIAL)) if gradients else ()
    local = functools.partial(_local, vocab_size=vocab_size, chunk=chunk, gradients=gradients)
    with jax.named_scope("loss"):
        return per_shard(local, (by_example, TABLE, by_token, by_token), out_names)(hidden, table.rows, targets, weights)


def _backward(vocab_size: int, chunk: int, gradients: tuple[Array, Array], factor: Array) -> tuple[Array, Any, None, None]:
    """Scales the gradients that the forward pass computed. Targets and weights have no gradients."""
    hidden_gradient, table_gradient = ((factor * gradient).astype(gradient.dtype) for gradient in gradients)
    return hidden_gradient, SharedTable(None, table_gradient), None, None  # type: ignore[arg-type]  # None: no gradient


_cross_entropy.defvjp(functools.partial(_over_shards, gradients=True), _backward)


def _local(hidden: Array, table: Array, targets: Array, weights: Array, *, vocab_size: int, chunk: int, gradients: bool) -> Any:
    """Computes the loss, summed over devices, and optionally its gradients for this device's examples and vocabulary entries.

    With odds[v] = exp(score[v] - score[target]) for all entries but the target (`_odds`), and `others` as their sum,

        loss = log(1 + others)
        gradient of score[v] = weight / (1 + others) * (odds[v], or -others for the target)

    Each token's factor, weight / (1 + others), is applied to the smaller operand or to the result of a product, so that the
    products read the odds unchanged. No digits cancel where the target is almost certain: the odds and `others` are then small.
    """
    first = shard_index("vocab") * table.shape[0]
    entries = first + jnp.arange(table.shape[0])
    # On CPUs, XLA transposes the first operand of the product for the table's gradient, so the smaller operand comes first. On
    # TPUs, this order would require transposing the result.
    on_cpu = chunk == 0
    time = hidden.shape[1]
    starts, chunk = time_chunks(time, chunk, hidden.shape[0])
    hidden, targets, weights = (pad_time(array, len(starts) * chunk) for array in (hidden, targets, weights))
    rows = local_rows(targets, table.shape[0])

    def one_chunk(carry: tuple[jax.Array, jax.Array], start: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Any]:
        total, table_gradient = carry
        part = lambda array: jax.lax.dynamic_slice_in_dim(array, start, chunk, axis=1)  # noqa: E731
        x, target, weight = map(part, (hidden, targets, weights))
        target_row = table.at[part(rows)].get(mode="fill", fill_value=0)
        target_score = all_sum(_product("bte,bte->bt", x, target_row), "vocab")
        # Entries from `vocab_size` on are padding.
        competes = lambda: (entries < vocab_size) & (entries != target[..., None])  # noqa: E731
        odds, others, shift = _odds(x, table, competes, target_score)
        normalizer = jnp.exp(target_score - shift) + others
        total = total + (weight * (jnp.log(normalizer) + shift - target_score)).sum()
        if not gradients:
            return (total, table_gradient), None
        factor = weight / normalizer
        operands = ("bte,btv->ev", _scale(x, factor), odds) if on_cpu else ("btv,bte->ve", odds, _scale(x, factor))
        table_gradient = table_gradient + _product(*operands)
        x_gradient = all_sum(_product("btv,ve->bte", odds, table) - others[..., None] * target_row, "vocab")
        return (total, table_gradient), (_scale(x_gradient, factor).astype(x.dtype), factor, others)

    shape = table.shape[::-1] if on_cpu else table.shape
    zero = jnp.zeros(shape if gradients else (), jnp.float32)
    (total, table_gradient), pieces = jax.lax.scan(one_chunk, (jnp.zeros(()), zero), starts)
    total = all_sum(total, "batch")
    if not gradients:
        return total
    hidden_gradient, factor, others = (jnp.moveaxis(x, 0, 1).reshape(*targets.shape, *x.shape[3:]) for x in pieces)
    # The targets' part is added once, not in each chunk, because on TPUs, adding rows reads and writes the whole gradient.
    target_gradient = -others[..., None] * _scale(hidden, factor)
    table_gradient = table_gradient.T if on_cpu else table_gradient
    table_gradient = table_gradient.at[rows].add(target_gradient, mode="drop")
    return total, (hidden_gradient[:, :time], table_gradient[None])


def _odds(x: Array, table: Array, competes: Callable[[], Array], target_score: Array) -> tuple[Array, Array, Array]:
    """Returns exp(score - shift) of all entries but the target, in the dtype of `x`, their sum over all shards, and the shift.

    The shift is usually the target's score. It is known before the other scores, so the exponentials and their sum are computed
    as the product's results are produced, and no scores are written to memory. If a sum could overflow, which requires a target
    whose probability is below 1e-25, all tokens of the chunk are computed again, shifted by their highest scores.

    Args:
      x: hidden states [batch, time, embed].
      table: this device's rows [entries, embed], in the dtype of `x`.
      competes: returns bool [batch, time, entries], False for targets and padding. Each branch calls it instead of reading a
        stored array.
      target_score: float32 [batch, time].
    """

    def exponentials(x: Array, shift: Array) -> tuple[Array, Array, Array]:
        odds = jnp.where(competes(), jnp.exp(_product("bte,ve->btv", x, table) - shift[..., None]), 0)
        return odds.astype(x.dtype), all_sum(odds.sum(axis=-1), "vocab"), shift

    def shifted_by_highest() -> tuple[Array, Array, Array]:
        scores = jnp.where(competes(), _product("bte,ve->btv", x, table), -jnp.inf)
        highest = all_max(scores.max(axis=-1), "vocab")
        # Without the barrier, XLA would merge the two products into one and store its results.
        return exponentials(jax.lax.optimization_barrier(x), jnp.maximum(highest, target_score))

    usual = exponentials(x, target_score)
    largest = usual[1].max()
    if is_split("vocab"):  # All devices that communicate in the second branch must take it together.
        largest = all_max(largest, "batch")
    return jax.lax.cond(largest < LARGEST_ODDS, lambda: usual, shifted_by_highest)


def _product(axes: str, *operands: Array) -> Array:
    """Returns an einsum with float32 results."""
    return jnp.einsum(axes, *operands, preferred_element_type=jnp.float32)


def _scale(x: Array, factor: Array) -> Array:
    """Returns each token of `x` [batch, time, embed] times its factor [batch, time], computed in float32, in the dtype of `x`."""
    return (factor[..., None] * x).astype(x.dtype)
