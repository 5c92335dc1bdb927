"""Every gradient of a training loss against the paper's formulas in float64, for each implementation of attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config import ModelConfig
from gpt_jax.model import transformer
from gpt_jax.model.dropout import DropoutKey
from gpt_jax.model.loss import language_model_loss
from tests.model import paper

CONFIG = ModelConfig(
    vocab_size=50, context_length=300, num_layers=2, embed_dim=32, num_heads=2, mlp_dim=96, init_stddev=0.3, loss_chunk=64
)
"""Long enough for three blocks of queries, the last one shorter. The dropouts are the paper's."""
KEY = DropoutKey(11, 22, np.array([5, 3], np.int32))


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(np.asarray, jax.jit(transformer.init, static_argnums=0)(CONFIG, jax.random.key(0)))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, 50, (2, 301)).astype(np.int32)


@pytest.fixture(scope="module")
def exact(params, tokens):
    """The loss and its gradients by name, in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda array: jnp.asarray(array, jnp.float64), params)
        loss = functools.partial(paper.loss, CONFIG, tokens=tokens[:, :-1], targets=tokens[:, 1:], key=KEY, xp=jnp)
        value, gradients = jax.value_and_grad(loss)(wide)
        assert value.dtype == jnp.float64
        return float(value), by_name(gradients)


def by_name(gradients):
    """Returns the arrays by name, with those of queries, keys and values apart."""
    named = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)}
    kernel, bias = (named.pop(f"['blocks']['attention']['qkv']['{name}']") for name in ("kernel", "bias"))
    for number, part in enumerate(("query", "key", "value")):
        named |= {f"{part} kernel": kernel[:, :, number], f"{part} bias": bias[:, number]}
    return named


@pytest.mark.parametrize("remat", ["off", "dots", "full"])
@pytest.mark.parametrize("attention", ["plain", "blockwise"])
def test_loss_and_gradients(params, tokens, exact, attention, remat):
    config = dataclasses.replace(CONFIG, attention=attention, remat=remat)
    weights = np.full((2, 300), 1 / 600, np.float32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_weights": weights}
    value, gradients = jax.jit(jax.value_and_grad(functools.partial(language_model_loss, config)))(params, batch, KEY)
    expected_value, expected = exact
    assert abs(value - expected_value) < 1e-5 * expected_value
    actual = by_name(gradients)
    # A bias of the keys adds the same to all scores of a query, so its gradient is zero.
    np.testing.assert_allclose(actual.pop("key bias"), 0, atol=1e-6)
    for name, gradient in actual.items():
        assert np.linalg.norm(gradient - expected[name]) < 1e-5 * np.linalg.norm(expected[name]), name
