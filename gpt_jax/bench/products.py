"""The matrix products of a training step, each timed alone: the time that a step would take if it did nothing else."""

import collections
import math
import statistics
import time
from typing import Any, NamedTuple

from gpt_jax.bench.program import Program, start_jax
from gpt_jax.bench.train import read_config
from gpt_jax.config import ModelConfig


class Product(NamedTuple):
    """A product of two arrays, and how often it occurs in a step."""

    name: str
    equation: str
    """For einsum, as in "ne,eo->no"."""
    left: tuple[int, ...]
    right: tuple[int, ...]
    repeats: int

    @property
    def flops(self) -> int:
        """Floating-point operations of one such product."""
        inputs = self.equation.partition("->")[0].split(",")
        sizes = dict(zip("".join(inputs), (*self.left, *self.right), strict=True))
        return 2 * math.prod(sizes.values())


def products_of_step(model: ModelConfig, batch_size: int) -> list[Product]:
    """Returns the products of a step of the Transformer, forward and backward. The causal mask skips nothing.

    A product with parameters has two more in the backward pass, for the gradients of its input and of its parameters, and so has
    each of the two products in attention.
    """
    time, width, layers = model.context_length, model.embed_dim, model.num_layers
    tokens = batch_size * time
    products = []
    for name, inputs, outputs, count in (
        ("qkv", width, 3 * width, layers),
        ("attention out", width, width, layers),
        ("mlp up", width, model.mlp_dim, layers),
        ("mlp down", model.mlp_dim, width, layers),
        ("logits", width, model.padded_vocab_size, 1),
    ):
        products += [
            Product(name, "ni,io->no", (tokens, inputs), (inputs, outputs), count),
            Product(f"{name}, input gradient", "no,io->ni", (tokens, outputs), (inputs, outputs), count),
            Product(f"{name}, parameter gradient", "ni,no->io", (tokens, inputs), (tokens, outputs), count),
        ]
    heads, square = (batch_size, time, model.num_heads, model.head_dim), (batch_size, model.num_heads, time, time)
    products += [
        Product("scores", "bqhd,bkhd->bhqk", heads, heads, layers),
        Product("scores, query gradient", "bhqk,bkhd->bqhd", square, heads, layers),
        Product("scores, key gradient", "bhqk,bqhd->bkhd", square, heads, layers),
        Product("mixing", "bhqk,bkhd->bqhd", square, heads, layers),
        Product("mixing, probability gradient", "bqhd,bkhd->bhqk", heads, heads, layers),
        Product("mixing, value gradient", "bhqk,bqhd->bkhd", square, heads, layers),
    ]
    return products


def step_products(config: dict[str, Any]) -> Program:
    """Returns a program that computes all products of a step, one after the other, in the dtype of the step's activations.

    Its details are the rates of the products in GFLOP/s.
    """
    device = start_jax()
    import jax
    import jax.numpy as jnp

    from gpt_jax.model.transformer import compute_dtype

    settings = read_config(config)
    dtype = compute_dtype(settings.model)
    products = products_of_step(settings.model, settings.train.batch_size)
    seconds: dict[str, list[float]] = collections.defaultdict(list)
    shapes = {shape for product in products for shape in (product.left, product.right)}
    arrays = {shape: jax.random.normal(jax.random.key(0), shape, dtype) for shape in shapes}
    compute = jax.jit(jnp.einsum, static_argnums=0)

    def run(count: int) -> None:
        for _ in range(count):
            for product in products:
                left, right = arrays[product.left], arrays[product.right]
                begin = time.perf_counter()
                for _ in range(product.repeats):
                    jax.block_until_ready(compute(product.equation, left, right))
                seconds[product.name].append((time.perf_counter() - begin) / product.repeats)

    def rates() -> dict[str, float]:
        medians = {product: statistics.median(seconds[product.name]) for product in products}
        return {f"{product.repeats} x {product.name}, GFLOP/s": product.flops / s / 1e9 for product, s in medians.items()}

    return Program(run, rates, device)
