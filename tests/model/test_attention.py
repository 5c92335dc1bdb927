"""Attention against a NumPy transcription and masks written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.model import dropout as masks
from gpt_jax.model.attention import attention

SQUARE = [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
LAST_TWO = [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]  # i >= j - ns + nd with nd = 2 queries over ns = 6 keys

run = jax.jit(attention, static_argnames=("rate", "implementation"))


def expected(query, key, value, allowed, kept=1.0):
    """[batch, time, heads, dim] in float64; `allowed` and `kept` broadcast to [batch, heads, queries, keys]."""
    query, key, value = (np.asarray(array, np.float64) for array in (query, key, value))
    scores = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
    weights = np.exp(scores) * np.asarray(allowed)
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True) * kept, value)


def random(queries, keys, batch=2, heads=3, dim=4):
    draw = np.random.default_rng(0).normal
    shapes = ((batch, queries, heads, dim), (batch, keys, heads, dim), (batch, keys, heads, dim))
    return [draw(size=shape).astype(np.float32) for shape in shapes]


def seen(queries, keys, batch=1, **options):
    """Returns which keys each query sees. With equal scores and identity values, the output is the probabilities themselves."""
    zero = jnp.zeros((batch, max(queries, keys), 1, keys))
    value = jnp.broadcast_to(jnp.eye(keys)[None, :, None], (batch, keys, 1, keys))
    probabilities = np.asarray(run(zero[:, :queries], zero[:, :keys], value, **options))[:, :, 0]
    mask = probabilities > 0
    np.testing.assert_allclose(probabilities, mask / mask.sum(-1, keepdims=True), rtol=1e-6)
    return mask.astype(int).tolist()


@pytest.mark.parametrize("mask", [SQUARE, LAST_TWO, [[1, 1, 1, 1, 1, 1]]], ids=len)
def test_causal_masks(mask):
    assert seen(len(mask), 6) == [mask]


def test_query_offset():
    assert seen(2, 6, query_offset=1) == [[[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]]]
    assert seen(2, 6, batch=3, query_offset=jnp.array([0, 4, 2])) == [
        [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]],
        LAST_TWO,
        [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]],
    ]


def test_segments_do_not_see_each_other():
    assert seen(6, 6, batch=2, segment_ids=jnp.array([[7, 7, 3, 3, 3, 7], [1, 1, 1, 1, 1, 1]])) == [
        [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0], [1, 1, 0, 0, 0, 1]],
        SQUARE,
    ]


@pytest.mark.parametrize("implementation", ["auto", "plain", "blockwise"])  # kernels: tests/model/kernels
@pytest.mark.parametrize("mask", [SQUARE, LAST_TWO], ids=len)
def test_values(implementation, mask):
    arrays = random(len(mask), 6)
    np.testing.assert_allclose(run(*arrays, implementation=implementation), expected(*arrays, mask), atol=1e-6)


@pytest.mark.parametrize("implementation", ["auto", "plain", "blockwise"])  # kernels: tests/model/kernels
def test_dropout_falls_on_the_probabilities(implementation):
    arrays = random(20, 20)
    stream = masks.mask_stream(1, 2, 3, masks.Site.ATTENTION, jnp.array([[5], [9]]), jnp.arange(3))
    kept = masks.keep(np.asarray(stream), np.arange(20), np.arange(20), 0.25) / 0.75
    causal = np.tril(np.ones((20, 20)))
    actual = run(*arrays, stream=stream, rate=0.25, implementation=implementation)
    np.testing.assert_allclose(actual, expected(*arrays, causal, kept), atol=1e-6)
    np.testing.assert_array_equal(
        run(*arrays, stream=stream, rate=0.0, implementation=implementation), run(*arrays, implementation=implementation)
    )


def test_bfloat16_keeps_its_type_and_softmax_in_float32():
    arrays = [jnp.asarray(array, jnp.bfloat16) for array in random(20, 20)]
    actual = run(*arrays)
    assert actual.dtype == jnp.bfloat16
    # Half a unit in the last place of a bfloat16 is 2^-9: once on the probabilities, once on the result.
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected(*arrays, np.tril(np.ones((20, 20)))), atol=0.01)
    text = jax.jit(attention).lower(*arrays).as_text()
    assert "stablehlo.exponential" in text
    assert all("xf32>" in line for line in text.splitlines() if "stablehlo.exponential" in line)
