"""The chunked loss against the plain formula: values, gradients, micro-batches, meshes, and what it never holds."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config import MeshConfig, ModelConfig
from gpt_jax.model.dropout import DropoutKey
from gpt_jax.model.loss import cross_entropy, language_model_loss, normalize
from gpt_jax.model.network import network
from gpt_jax.runtime.sharding import make_mesh

BATCH, TIME, EMBED, VOCAB, PADDED = 8, 12, 16, 150, 256


@pytest.fixture(scope="module")
def example():
    """hidden, table, targets, weights. The table's padding rows are not zero, so that only a mask can keep them out."""
    draw = np.random.default_rng(0)
    weights = draw.uniform(size=(BATCH, TIME)).astype(np.float32)
    weights[draw.random((BATCH, TIME)) < 0.3] = 0
    hidden = draw.normal(size=(BATCH, TIME, EMBED)).astype(np.float32)
    table = draw.normal(size=(PADDED, EMBED)).astype(np.float32)
    return hidden, table, draw.integers(0, VOCAB, (BATCH, TIME)).astype(np.int32), weights


def plain(hidden, table, targets, weights):
    log_probabilities = jax.nn.log_softmax(hidden @ table[:VOCAB].T)
    return -(weights * jnp.take_along_axis(log_probabilities, targets[..., None], -1)[..., 0]).sum()


@pytest.fixture(scope="module")
def expected(example):
    """The value in NumPy's float64, and the gradients by differentiating the plain formula."""
    hidden, table, targets, weights = (np.asarray(array, np.float64) for array in example)
    scores = hidden @ table[:VOCAB].T
    normalizer = np.log(np.exp(scores).sum(-1))
    value = (weights * (normalizer - np.take_along_axis(scores, targets[..., None].astype(int), -1)[..., 0])).sum()
    return value, jax.jit(jax.grad(plain, argnums=(0, 1)))(*example)


def assert_equal_to(expected, actual, factor=1.0):
    (value, gradients), (expected_value, expected_gradients) = actual, expected
    np.testing.assert_allclose(value, factor * expected_value, rtol=1e-5)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, factor * np.asarray(expected_gradient), atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 4, 12, 100])
def test_equals_the_plain_formula(example, expected, chunk):
    loss = functools.partial(cross_entropy, vocab_size=VOCAB, chunk=chunk)
    assert_equal_to(expected, jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*example))
    np.testing.assert_allclose(jax.jit(loss)(*example), expected[0], rtol=1e-5)  # without gradients, another program


def test_padding_rows_and_unweighted_tokens_take_no_part(example):
    weights = example[3]
    loss = functools.partial(cross_entropy, vocab_size=VOCAB, chunk=4)
    hidden_gradient, table_gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(*example)
    assert not table_gradient[VOCAB:].any()
    assert not hidden_gradient[weights == 0].any()
    assert (weights == 0).any()
    assert np.abs(np.asarray(hidden_gradient[weights > 0])).min(-1).max() > 0


def test_a_factor_outside_reaches_the_gradients(example, expected):
    tripled = jax.jit(jax.value_and_grad(lambda *arrays: 3 * cross_entropy(*arrays, VOCAB, 4), argnums=(0, 1)))
    assert_equal_to(expected, tripled(*example), factor=3)


def test_bfloat16(example, expected):
    hidden, *rest = example
    loss = jax.jit(jax.value_and_grad(functools.partial(cross_entropy, vocab_size=VOCAB, chunk=4), argnums=(0, 1)))
    value, (hidden_gradient, table_gradient) = loss(hidden.astype(jnp.bfloat16), *rest)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected[0], rtol=0.01)
    assert hidden_gradient.dtype == jnp.bfloat16, "the type of the activations"
    assert table_gradient.dtype == jnp.float32, "the type of the parameters"
    np.testing.assert_allclose(table_gradient, expected[1][1], atol=0.05)


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("chunk", [0, 4], ids=["chosen", "4"])
def test_targets_that_are_almost_impossible_or_almost_certain(example, sizes, chunk):
    """Losses of up to thousands of nats, in one chunk of one device only, and losses of 1e-10, as in NumPy's float64."""
    hidden, table, targets, weights = (array.copy() for array in example)
    hidden[0, :4] *= 100
    highest = (hidden @ table[:VOCAB].T).argmax(-1)
    targets[1:3], hidden[1:3] = highest[1:3], 8 * hidden[1:3]
    arrays = hidden, table, targets, weights
    expected, losses = float64_gradients(*arrays)
    assert losses.max() > 1000
    assert losses[1:3].min() < 1e-10
    loss = jax.jit(jax.value_and_grad(functools.partial(cross_entropy, vocab_size=VOCAB, chunk=chunk), argnums=(0, 1)))
    with jax.set_mesh(make_mesh(MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])):
        value, gradients = loss(*arrays)
    np.testing.assert_allclose(value, (weights * losses).sum(), rtol=1e-5)
    for gradient, expected_gradient in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5 * np.abs(expected_gradient).max())
    # Relative to their own size: an uncertain token's gradient is 1e10 times as large.
    certain = (losses < 1e-4) & (weights > 0)
    ratio = np.linalg.norm(np.asarray(gradients[0])[certain], axis=-1) / np.linalg.norm(expected[0][certain], axis=-1)
    np.testing.assert_allclose(ratio, 1, rtol=1e-3)


def float64_gradients(*arrays):
    """The gradients with respect to hidden and table by their formula in NumPy's float64, and the loss of each token."""
    hidden, table, targets, weights = (np.asarray(array, np.float64) for array in arrays)
    scores = hidden @ table[:VOCAB].T
    is_target = np.eye(VOCAB, dtype=bool)[targets.astype(int)]
    against = np.where(is_target, -np.inf, scores - scores[is_target].reshape(*targets.shape, 1))
    others = np.logaddexp.reduce(against, -1, keepdims=True)  # log of the sum of the others' odds
    losses = np.logaddexp(0, others)
    score_gradient = weights[..., None] * np.where(is_target, -np.exp(others - losses), np.exp(against - losses))
    hidden_gradient, table_gradient = score_gradient @ table[:VOCAB], np.einsum("btv,bte->ve", score_gradient, hidden)
    return (hidden_gradient, np.pad(table_gradient, ((0, PADDED - VOCAB), (0, 0)))), losses[..., 0]


@pytest.mark.parametrize("chunk", [1, 3, 4, 6, 10])
def test_a_chunk_that_does_not_divide_the_time(example, chunk):
    """Eleven steps, a prime number: all chunks but those of one step leave the last one to be filled up."""
    hidden, table, targets, weights = example
    arrays = hidden[:, :11], table, targets[:, :11], weights[:, :11]
    loss = functools.partial(cross_entropy, vocab_size=VOCAB, chunk=chunk)
    expected = jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))(*arrays)
    assert_equal_to(expected, jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*arrays))


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_equals_the_plain_formula_on_a_mesh(example, expected, sizes):
    mesh = make_mesh(MeshConfig(**sizes))
    loss = functools.partial(cross_entropy, vocab_size=VOCAB, chunk=4)
    with jax.set_mesh(mesh):
        assert_equal_to(expected, jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*example))


# -- with the model ---------------------------------------------------------------------------------------------------------

TINY = ModelConfig(vocab_size=VOCAB, context_length=TIME, num_layers=1, embed_dim=EMBED, num_heads=2, mlp_dim=32, loss_chunk=4)


def test_normalized_weights_add_to_one(example):
    weights = jax.jit(normalize)({"loss_weights": example[3], "example_id": np.arange(BATCH)})["loss_weights"]
    np.testing.assert_allclose(weights, example[3] / example[3].sum(dtype=np.float64), rtol=1e-6)
    assert not jax.jit(normalize)({"loss_weights": np.zeros((2, 3), np.float32)})["loss_weights"].any(), "and no division by zero"


def test_micro_batches_add_to_the_whole(example):
    """Losses of rows j::4, with dropout, and with weights that differ from part to part."""
    tokens, weights = example[2:]
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, 1),
        "loss_weights": weights,
        "example_id": np.arange(BATCH, dtype=np.int32),
    }
    batch = jax.jit(normalize)(batch)
    params = random_params(TINY)

    @jax.jit
    def loss(params, batch):
        return language_model_loss(TINY, params, batch, DropoutKey(3, 4, batch["example_id"]))

    whole = loss(params, batch)
    parts = [loss(params, {name: array[j::4] for name, array in batch.items()}) for j in range(4)]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-5)


def random_params(config):
    """The rows that pad the table are not zero here, so that only a mask keeps them out."""
    draw = np.random.default_rng(1)
    shapes = jax.eval_shape(functools.partial(network(config).init, config), jax.random.key(0))
    return jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(np.float32) / 3, shapes)


@pytest.mark.parametrize("chunk", [4, TIME])
def test_logits_of_all_time_steps_never_exist_at_once(example, chunk):
    loss = functools.partial(cross_entropy, vocab_size=VOCAB, chunk=chunk)
    text = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*example).compile().as_text()
    assert f"f32[{BATCH},{chunk},{PADDED}]" in text
    sizes = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"\w\[([\d,]+)\]", text)]
    assert max(sizes) == BATCH * chunk * PADDED  # with one chunk it is that of all time steps: so the search does find it
