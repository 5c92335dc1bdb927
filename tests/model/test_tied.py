"""The token table's lookup and gradients: equal to plain indexing, and what crosses the devices of a mesh."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config import MeshConfig
from gpt_jax.model.loss import cross_entropy
from gpt_jax.model.tied import lookup, share
from gpt_jax.plan.costs import read_costs
from gpt_jax.runtime.sharding import make_mesh, named_sharding

VOCAB, EMBED, BATCH, TIME = 256, 32, 8, 6
MESHES = [{}, {"data": 8}, {"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]


def loss_of(table, tokens, targets, dtype=jnp.float32):
    """The table as embedding and as output layer, with something between that makes the two gradients differ."""
    rows, shared = lookup(share(table, dtype), tokens)
    weights = jnp.full(tokens.shape, 1 / tokens.size)
    return cross_entropy(jnp.sin(rows).astype(dtype), shared, targets, weights, VOCAB - 6, 4)


def plain_loss(table, tokens, targets):
    scores = jnp.sin(table[tokens]) @ table[: VOCAB - 6].T
    return -jnp.take_along_axis(jax.nn.log_softmax(scores), targets[..., None], -1).mean()


@pytest.fixture(scope="module")
def example():
    draw = np.random.default_rng(3)
    tokens = draw.integers(0, VOCAB - 6, (2, BATCH, TIME)).astype(np.int32)
    return draw.normal(size=(VOCAB, EMBED)).astype(np.float32), *tokens


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_value_and_gradient_are_those_of_plain_indexing(example, sizes):
    expected = jax.jit(jax.value_and_grad(plain_loss))(*example)
    with jax.set_mesh(make_mesh(MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])):
        value, gradient = jax.jit(jax.value_and_grad(loss_of))(*example)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(gradient, expected[1], atol=1e-6)


def test_the_gradient_of_a_bfloat16_table_is_float32(example):
    """Two lookups of one token whose gradients differ by a factor of 1,000: a sum in bfloat16 would lose the smaller one."""
    table = example[0]
    tokens = jnp.array([[5, 5]])

    def weighted(table):
        rows, _ = lookup(share(table, jnp.bfloat16), tokens)
        return (rows * jnp.array([1.0, 1e-3])[:, None]).sum()

    gradient = jax.jit(jax.grad(weighted))(table)
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(gradient[5], 1.001, rtol=1e-6)
    assert not gradient[:5].any()


# The table is large beside everything else, and its columns on a device are not a multiple of a TPU's 128 lanes.
LARGE = {"vocab": 8192, "embed": 768, "batch": 16, "time": 128}


def sent(devices, **sizes):
    """Returns the bytes that each kind of collective sends for a table of `LARGE` on eight TPUs, by kind and dtype."""
    mesh = make_mesh(MeshConfig(**sizes), devices)
    array = lambda shape, dtype, names: jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(mesh, names))  # noqa: E731
    table = array((LARGE["vocab"], LARGE["embed"]), jnp.float32, ("vocab", "embed"))
    tokens = array((LARGE["batch"], LARGE["time"]), jnp.int32, ("batch", None))
    with jax.set_mesh(mesh):
        function = jax.value_and_grad(functools.partial(loss_of, dtype=jnp.bfloat16))
        shardings = named_sharding(mesh, ()), table.sharding
        program = jax.jit(function, out_shardings=shardings).lower(table, tokens, tokens).compile()
    total = {}
    for each in read_costs(program.as_text(), mesh.shape).collectives:
        total[each.kind, each.dtype] = total.get((each.kind, each.dtype), 0) + each.bytes * each.times
    return total


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"data": 8}, {("all-reduce", "f32"): 4}),
        ({"data": 1, "fsdp": 8}, {("all-gather", "bf16"): 2, ("reduce-scatter", "f32"): 4}),
        ({"data": 2, "fsdp": 4}, {("all-gather", "bf16"): 2, ("reduce-scatter", "f32"): 4, ("all-reduce", "f32"): 1}),
    ],
    ids=str,
)
def test_on_tpus_the_table_is_gathered_once_and_its_gradient_crosses_once(tpu_devices, sizes, expected):
    """`expected` is in bytes for each entry of the table, and 2 % more are allowed for padding and for the loss."""
    entries = LARGE["vocab"] * LARGE["embed"]
    total = sent(tuple(tpu_devices("v5e:2x4")), **sizes)
    assert {kind: round(size / entries) for kind, size in total.items() if size > 0.02 * entries} == expected
    assert sum(total.values()) <= 1.02 * entries * sum(expected.values())
