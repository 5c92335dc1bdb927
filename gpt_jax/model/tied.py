"""The token table, which is both the embedding and the output layer: how it is gathered, and how its gradients are summed.

    shared = share(params["embedding"]["tokens"], dtype)
    token_rows, shared = lookup(shared, tokens)
    loss = cross_entropy(hidden, shared, targets, ...)

Each device gathers the table once, in the compute dtype. Its gradient has two parts, from the lookup and from the output layer.
Both are added on the device before anything is sent, so that one array crosses the devices: it is summed over them in float32,
and each device receives the columns that it stores. Sums of gradients over devices are in float32 because the error of bfloat16,
0.4 % of each addend, would depend on the number of devices.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gpt_jax.runtime.sharding import all_gather, all_sum, constrain, per_shard, shard_count, shard_index, sum_and_split

TABLE, STORED, PARTIAL = ("vocab", None), ("vocab", "embed"), ("batch", "vocab", None)
"""Logical axes: of the gathered table, of the stored one, and of one unsummed gradient for each shard of the batch."""


class SharedTable(NamedTuple):
    """A gathered table. Functions that use it return the gradient of `gradient` and none of `rows`, so it can be float32."""

    rows: Float[Array, "padded_vocab embed"]
    """In the compute dtype. Each device holds all of them, or its shard if the mesh splits the vocabulary."""
    gradient: Float[Array, "shards padded_vocab embed"]
    """Zeros that are never read, float32. Their gradient is that of the table, with one part for each shard of the batch."""


@jax.custom_vjp
def _gather(table: Array, like: Array) -> SharedTable:
    rows = per_shard(lambda part: all_gather(part.astype(like.dtype), "embed", axis=1), (STORED,), TABLE)(table)
    return SharedTable(rows, constrain(jnp.zeros((shard_count("batch"), *table.shape), jnp.float32), *PARTIAL))


def _sum_gradients(dtype_of: tuple[Array, Array], gradient: SharedTable) -> tuple[Array, Array]:
    table, like = dtype_of
    total = per_shard(lambda part: sum_and_split(part[0], "batch", "embed", axis=1), (PARTIAL,), STORED)(gradient.gradient)
    return total.astype(table.dtype), jnp.zeros_like(like)


_gather.defvjp(lambda table, like: (_gather(table, like), (jnp.zeros((), table.dtype), like)), _sum_gradients)


def share(table: Float[Array, "padded_vocab embed"], dtype: Any) -> SharedTable:
    """Returns the table gathered on each device in a dtype, for functions whose gradients are summed before they are sent."""
    return _gather(table, jnp.zeros((), dtype))


@jax.custom_vjp
def lookup(shared: SharedTable, tokens: Int[Array, "batch time"]) -> tuple[Float[Array, "batch time embed"], SharedTable]:
    """Returns the rows of the tokens in float32, and the table for what uses it next.

    The gradient with respect to the table is added to that of the table returned, without an array of its own.
    """

    def local(rows: Array, tokens: Array) -> Array:
        found = rows.at[local_rows(tokens, rows.shape[0])].get(mode="fill", fill_value=0)
        return all_sum(found, "vocab").astype(jnp.float32)

    return per_shard(local, (TABLE, ("batch", None)), ("batch", None, None))(shared.rows, tokens), shared


def _lookup_gradient(tokens: Array, gradients: tuple[Array, SharedTable]) -> tuple[SharedTable, None]:
    def local(table_gradient: Array, tokens: Array, row_gradients: Array) -> Array:
        rows = local_rows(tokens, table_gradient.shape[1])
        return table_gradient.at[0, rows].add(row_gradients, mode="drop")

    row_gradients, later = gradients
    names = (PARTIAL, ("batch", None), ("batch", None, None))
    return later._replace(gradient=per_shard(local, names, PARTIAL)(later.gradient, tokens, row_gradients)), None


lookup.defvjp(lambda shared, tokens: (lookup(shared, tokens), tokens), _lookup_gradient)


def local_rows(tokens: Array, size: int) -> Array:
    """Returns, inside `per_shard`, the rows of tokens in this device's shard of `size` rows; `size` where they are in another."""
    rows = tokens - shard_index("vocab") * size
    return jnp.where((rows >= 0) & (rows < size), rows, size)
