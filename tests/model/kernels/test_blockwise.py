"""Blockwise attention and its gradients against attention by its definition, whose gradients JAX derives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.model.attention import attention
from gpt_jax.model.dropout import Site, mask_stream
from gpt_jax.model.kernels import blockwise

BATCH, HEADS, DIM = 2, 3, 8


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 16)
    monkeypatch.setattr(blockwise, "MAX_UNROLLED", 3)


def results(implementation, time, rate, segments, dtype=jnp.float32):
    """Returns the output and the gradients of query, key and value of a random weighted sum of it."""
    draw = np.random.default_rng(0).normal
    *arrays, direction = (jnp.asarray(draw(size=(BATCH, time, HEADS, DIM)), dtype) for _ in range(4))
    options = {"rate": rate, "implementation": implementation}
    if rate:
        options["stream"] = mask_stream(1, 2, 3, Site.ATTENTION, jnp.array([[5], [9]]), jnp.arange(HEADS))
    if segments:
        options["segment_ids"] = jnp.array([np.arange(time) // 11, np.arange(time) // 29 % 2])

    @jax.jit
    def compute(arrays):
        output, pull_back = jax.vjp(lambda arrays: attention(*arrays, **options), arrays)
        return output, *pull_back(direction)[0]

    return compute(arrays)


# One short block; exactly one; several and a shorter one; tiles (more than 48 positions), with and without padding.
@pytest.mark.parametrize("time", [5, 16, 41, 64, 77])
@pytest.mark.parametrize("rate", [0.0, 0.2])
@pytest.mark.parametrize("segments", [False, True], ids=["", "segments"])
def test_outputs_and_gradients(time, rate, segments):
    actual, expected = (results(implementation, time, rate, segments) for implementation in ("blockwise", "plain"))
    for ours, theirs in zip(actual, expected, strict=True):
        assert np.linalg.norm(ours - theirs) < 1e-6 * np.linalg.norm(theirs)


@pytest.mark.parametrize("time", [41, 77])
def test_bfloat16(time):
    """A unit in the last place is 2**-8."""
    actual = results("blockwise", time, 0.2, False, jnp.bfloat16)
    for ours, exact in zip(actual, results("plain", time, 0.2, False), strict=True):
        assert ours.dtype == jnp.bfloat16
        assert np.linalg.norm(ours.astype(np.float32) - exact) < 2**-7 * np.linalg.norm(exact)


def test_large_scores_do_not_overflow():
    query = jnp.full((1, 77, 1, DIM), 300.0)
    output, gradient = jax.value_and_grad(lambda x: attention(x, x, x, implementation="blockwise").sum())(query)
    assert np.isfinite(output)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("time", [40, 96])
def test_no_array_has_all_scores(time):
    """The largest array is that of one block, or of one tile for long sequences."""
    lowered = jax.jit(jax.grad(lambda x: attention(x, x, x, implementation="blockwise").sum())).lower(jnp.ones((1, time, 1, 4)))
    plain = jax.jit(jax.grad(lambda x: attention(x, x, x, implementation="plain").sum())).lower(jnp.ones((1, time, 1, 4)))
    assert f"x{time}x{time}x" in plain.as_text()
    assert f"x{time}x{time}x" not in lowered.as_text()
