"""Affine maps with parameters: how their weights are gathered, and how their gradients are summed over devices."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gpt_jax.config import ModelConfig
from gpt_jax.runtime.sharding import all_gather, is_split, per_shard, sum_and_split

Names = tuple[str | None, ...]
"""Logical axis names."""
Terms = tuple[jax.Array, jax.Array]
"""A product with a parameter, in the compute dtype, and the bias to be added to it, in the parameters' dtype."""


class Linear(nnx.Module):
    """Affine map x @ kernel + bias over one or more input and output dimensions.

    The kernel is drawn from N(0, init_stddev); the bias is initially 0. Heads and their dimensions are separate axes of the
    parameters but a single axis of activations, because TPUs would pad or transpose arrays that end with a short axis of heads
    and an axis of 64 numbers.
    """

    def __init__(self, config: ModelConfig, inputs: dict[str, int], outputs: dict[str, int], *, rngs: nnx.Rngs):
        shape = (*inputs.values(), *outputs.values())
        names = tuple(name if name in ("embed", "heads", "mlp") else None for name in (*inputs, *outputs))
        kernel = config.init_stddev * jax.random.normal(rngs.params(), shape)
        self.kernel = nnx.Param(kernel.astype(config.param_dtype), axes=names, decay=True)
        bias = jnp.zeros(tuple(outputs.values()), config.param_dtype)
        self.bias = nnx.Param(bias, axes=names[len(inputs) :], decay=False)
        self.outputs = _merge_heads(outputs)
        self.shape = (*_merge_heads(inputs), *self.outputs)
        merged = tuple(axis for axis, name in zip(names, (*inputs, *outputs), strict=True) if name != "head_dim")
        self.names = merged[: -len(self.outputs)], merged[-len(self.outputs) :]
        self.precision = config.matmul_precision

    def __call__(self, x: jax.Array) -> jax.Array:
        return add_bias(self._multiply(x), self.bias[...].reshape(self.outputs))

    def terms(self, x: jax.Array) -> Terms:
        """Returns x @ kernel and the bias, for a caller whose Pallas kernel also sums the bias gradient."""
        return self._multiply(x), self.bias[...].reshape(self.outputs)

    def _multiply(self, x: jax.Array) -> jax.Array:
        return product(x, self.kernel[...].reshape(self.shape), *self.names, self.precision)


def _merge_heads(sizes: dict[str, int]) -> tuple[int, ...]:
    """Returns the sizes, with "heads" and "head_dim" merged into their product."""
    heads = {"heads": sizes["heads"] * sizes["head_dim"]} if "heads" in sizes else {}
    return tuple((sizes | heads)[name] for name in sizes if name != "head_dim")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def product(x: jax.Array, kernel: jax.Array, inputs: Names, outputs: Names, precision: str) -> jax.Array:
    """Returns `x` times a parameter, contracting the last axes of `x` with the first axes of `kernel`, in the dtype of `x`.

    The kernel is rounded to the dtype of `x` and then gathered, in the forward pass and again in the backward pass. Its gradient
    is computed and summed over devices in float32, like the gradient of the token table (tied.py), and each device receives the
    shard that it stores. The collectives are explicit because on TPUs, XLA would choose hundreds of transfers between neighbors,
    or sum the whole gradient on each device.

    Args:
      x: [batch, ..., *inputs].
      kernel: [*inputs, *outputs].
      inputs, outputs: logical names of the kernel's axes, one of which is "embed".
    """
    return jnp.tensordot(x, _gather(kernel, (*inputs, *outputs), x.dtype), axes=len(inputs), precision=precision)


def _gather(kernel: jax.Array, names: Names, dtype: Any) -> jax.Array:
    """Returns the kernel in a dtype, with the whole "embed" axis on each device."""
    gather = lambda part: all_gather(part.astype(dtype), "embed", axis=names.index("embed"))  # noqa: E731
    return per_shard(gather, (names,), _without_embed(names))(kernel) if is_split("embed") else kernel.astype(dtype)


def _without_embed(names: Names) -> Names:
    return tuple(None if name == "embed" else name for name in names)


def _product_fwd(
    x: jax.Array, kernel: jax.Array, inputs: Names, outputs: Names, precision: str
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(x, kernel, inputs, outputs, precision), (x, kernel)


def _product_bwd(
    inputs: Names, outputs: Names, precision: str, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    rows = range(x.ndim - len(inputs))
    multiply = functools.partial(jax.lax.dot_general, precision=precision)
    contracted = range(len(rows), gradient.ndim), range(len(inputs), kernel.ndim)
    x_gradient = multiply(gradient, _gather(kernel, (*inputs, *outputs), x.dtype), (contracted, ((), ())))

    # If devices store shards, the operand with "embed" comes first, so that each shard is contiguous in memory. Otherwise the
    # narrower operand comes first, because XLA transposes the first operand on CPUs.
    sides = [(x, inputs), (gradient, outputs)]
    swapped = "embed" in outputs if is_split("embed") else x.size > gradient.size
    (first, first_names), (second, second_names) = reversed(sides) if swapped else sides

    def local(first: jax.Array, second: jax.Array) -> jax.Array:
        part = multiply(first, second, ((rows, rows), ((), ())), preferred_element_type=jnp.float32)
        return sum_and_split(part, "batch", "embed", axis=0)

    def stacked(first: jax.Array, second: jax.Array) -> jax.Array:
        return jnp.stack([local(first, second[..., i, :]) for i in range(second.shape[-2])], axis=1)

    # TPUs store the matrices of queries, keys and values separately. In one array, the gradients would be summed and sent whole.
    function = stacked if is_split("embed") and len(second_names) == 2 else local
    names = tuple(("batch", *(None,) * (len(rows) - 1), *_without_embed(side)) for side in (first_names, second_names))
    total = per_shard(function, names, (*first_names, *second_names))(first, second).astype(kernel.dtype)
    return x_gradient, jnp.moveaxis(total, range(len(outputs)), range(-len(outputs), 0)) if swapped else total


product.defvjp(_product_fwd, _product_bwd)


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns `x` [..., *outputs] plus a parameter [*outputs], in the dtype of `x`. The bias gradient is summed in float32."""
    return x + bias.astype(x.dtype)


def _add_bias_bwd(bias: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    total = gradient.sum(axis=tuple(range(gradient.ndim - bias.ndim)), dtype=jnp.float32)
    return gradient, total.astype(bias.dtype)


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), bias), _add_bias_bwd)
