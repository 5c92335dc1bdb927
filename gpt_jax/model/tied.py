"""The token table, shared by the embedding and the output layer: how it is gathered, and how its gradients are summed.

    shared = share(params["embedding"]["tokens"], dtype)
    token_rows, shared = lookup(shared, tokens)
    loss = cross_entropy(hidden, shared, targets, ...)

Each device gathers the table once, in the compute dtype. The table's gradient has two parts, one from the lookup and one from
the output layer. Each device adds the two before anything is sent, so only one array is communicated: it is summed over the
devices in float32, and each device receives the columns that it stores. Gradients are summed over devices in float32 because the
rounding error of bfloat16, 0.4 % of each addend, would depend on the number of devices.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gpt_jax.runtime.sharding import all_gather, all_sum, constrain, per_shard, shard_count, shard_index, sum_and_split

TABLE, STORED, PARTIAL = ("vocab", None), ("vocab", "embed"), ("batch", "vocab", None)
"""Logical axes of the gathered table, of the stored table, and of the unsummed gradients, one for each shard of the batch."""


class SharedTable(NamedTuple):
    """A gathered table. Its gradient is returned for the field `gradient` and not for `rows`, so that it can be float32."""

    rows: Float[Array, "padded_vocab embed"]
    """Rows in the compute dtype. Each device holds all rows, or its shard of them if the mesh splits the vocabulary."""
    gradient: Float[Array, "shards padded_vocab embed"]
    """Float32 zeros that are never read. Their gradient is the table's gradient, with one part for each shard of the batch."""


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
    """Returns the table in a dtype, gathered on each device, for functions whose gradients are added up before they are sent."""
    return _gather(table, jnp.zeros((), dtype))


@jax.custom_vjp
def lookup(shared: SharedTable, tokens: Int[Array, "batch time"]) -> tuple[Float[Array, "batch time embed"], SharedTable]:
    """Returns the tokens' rows in float32, and the table for the next function that uses it.

    The gradient of the lookup is added to the gradient of the returned table, so it needs no array of its own.
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
    """Returns, inside `per_shard`, each token's row in this device's shard of `size` rows, or `size` if another shard has it."""
    rows = tokens - shard_index("vocab") * size
    return jnp.where((rows >= 0) & (rows < size), rows, size)
