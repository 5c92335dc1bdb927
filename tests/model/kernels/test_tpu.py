"""The TPU kernels of attention, interpreted on a CPU with memory full of NaN and a race detector."""

import functools
import math
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from gpt_jax.errors import UserError
from gpt_jax.model.attention import attention
from gpt_jax.model.dropout import Site, dropout, mask_stream
from gpt_jax.model.kernels import tpu_tiles
from gpt_jax.model.kernels.tpu_attention import pallas_tpu_self_attention
from tests.model.kernels.tpu_interpreter import STRICT, interpreted

BATCH = 2


class Case(NamedTuple):
    """The arguments of one call."""

    time: int
    heads: int
    dim: int
    rate: float = 0.1
    segments: str = ""
    dtype: Any = jnp.float32
    block: int = tpu_tiles.MAX_BLOCK
    """Maximum size of a block. A longer sequence takes the path of several blocks."""

    @property
    def shape(self) -> tuple[int, ...]:
        return BATCH, self.time, self.heads, self.dim

    @property
    def segment_ids(self) -> Any:
        """Short segments of several lengths; or late ones, whose first queries see no key of the blocks before their own."""
        index = np.arange(self.time)
        if self.segments == "late":
            return jnp.array([index >= self.time - 70, index >= self.time // 2 + 3]).astype(jnp.int32)
        return jnp.array([index // 37, index // 101 % 2]) if self.segments else None

    @property
    def stream(self) -> Any:
        examples, heads = jnp.array([[5], [9]]), jnp.arange(self.heads)
        return mask_stream(1, 2, 3, Site.ATTENTION, examples, heads) if self.rate else None

    @property
    def arrays(self) -> list[jax.Array]:
        """Query, key, value and the direction of the derivative."""
        draw = np.random.default_rng(self.time + self.heads).normal
        return [jnp.asarray(draw(size=self.shape), self.dtype) for _ in range(4)]


def differentiate(function: Any, arrays: list[jax.Array]) -> list[np.ndarray]:
    """Returns the function's value and the gradients of query, key and value."""

    @jax.jit
    def compute(query, key, value, direction):
        output, pull_back = jax.vjp(function, query, key, value)
        return output, *pull_back(direction.astype(output.dtype))

    return [np.asarray(array, np.float64) for array in compute(*arrays)]


def kernels(case: Case) -> list[np.ndarray]:
    def function(query, key, value):
        packed = jnp.stack([array.reshape(*array.shape[:2], -1) for array in (query, key, value)], 2)
        masks = case.stream, case.rate, case.segment_ids
        return pallas_tpu_self_attention(packed, jnp.zeros_like(packed[0, 0]), case.heads, *masks, "highest").reshape(case.shape)

    with interpreted(STRICT), pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu_tiles, "MAX_BLOCK", case.block)
        return differentiate(function, case.arrays)


def exact(case: Case) -> list[np.ndarray]:
    """Plain attention in float32, from the same numbers and with the derivatives that JAX finds."""
    options = {"stream": case.stream, "rate": case.rate, "segment_ids": case.segment_ids, "precision": "highest"}
    function = functools.partial(attention, **options, implementation="plain")
    return differentiate(function, [array.astype(jnp.float32) for array in case.arrays])


def on_matrix_units(case: Case) -> list[np.ndarray]:
    """Plain attention in which the operands of all products have the dtype of the inputs, as matrix units require.

    On a CPU, JAX would multiply the scores' gradient in float32.
    """
    rounded = jax.custom_vjp(lambda x: x)
    rounded.defvjp(lambda x: (x, None), lambda _, gradient: (gradient.astype(case.dtype).astype(jnp.float32),))
    index = jnp.arange(case.time)
    allowed = index[:, None] >= index
    if case.segments:
        allowed = allowed & (case.segment_ids[:, :, None] == case.segment_ids[:, None])[:, None]

    def function(query, key, value):
        scores = rounded(jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)) / math.sqrt(case.dim)
        weights = jax.nn.softmax(jnp.where(allowed, scores, -1e30))
        weights = dropout(weights, case.stream, case.rate) if case.rate else weights
        return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(case.dtype), value)

    return differentiate(function, case.arrays)


def distance(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


CASES = strategies.builds(
    Case,
    time=strategies.sampled_from([5, 100, 128, 256, 384]),
    heads=strategies.sampled_from([1, 2, 3]),
    dim=strategies.sampled_from([64, 128]),
    rate=strategies.sampled_from([0.0, 0.1, 0.5]),
    segments=strategies.sampled_from(["", "short", "late"]),
    dtype=strategies.just(jnp.float32),
    block=strategies.sampled_from([128, 512]),
)


@hypothesis.settings(derandomize=True, deadline=None, max_examples=8, database=None, phases=[hypothesis.Phase.generate])
@hypothesis.given(CASES)
def test_float32(case):
    for actual, expected in zip(kernels(case), exact(case), strict=True):
        assert distance(actual, expected) < 1e-5


@pytest.mark.parametrize(
    "case",
    [
        Case(384, 3, 64, segments="late", block=128),  # several blocks, a missing head, rows that see no key of earlier blocks
        Case(300, 2, 128, segments="short", block=256),  # padding, heads of 128
    ],
    ids=str,
)
def test_float32_with_all_masks(case):
    for actual, expected in zip(kernels(case), exact(case), strict=True):
        assert distance(actual, expected) < 1e-5


@pytest.mark.parametrize(
    "case", [Case(256, 2, 64, dtype=jnp.bfloat16), Case(200, 3, 64, 0.0, "short", jnp.bfloat16, 128)], ids=str
)
def test_bfloat16_is_as_accurate_as_plain_attention(case):
    expected = exact(case)
    for ours, plain, true in zip(kernels(case), on_matrix_units(case), expected, strict=True):
        assert distance(ours, true) < min(2e-2, 1.05 * distance(plain, true))


def test_products_of_float32_are_exact_if_requested():
    """A CPU multiplies exactly, whatever the precision; a TPU does not."""

    def precisions(precision):
        function = lambda x: pallas_tpu_self_attention(x, jnp.zeros((3, 128)), 2, None, 0.0, None, precision).sum()  # noqa: E731
        text = str(jax.make_jaxpr(jax.grad(function))(jnp.ones((1, 128, 3, 128))))
        return text.count("dot_general["), text.count("HIGHEST, Precision.HIGHEST") + text.count("precision=Precision.HIGHEST")

    products, highest = precisions("highest")
    assert products == highest > 0
    assert precisions("default") == (products, 0)


@pytest.mark.parametrize(
    ("heads", "time", "dtype", "message"),
    [
        (4, 128, jnp.float32, "pallas_tpu takes heads of size 64 or 128, not 32"),
        (2, 8200, jnp.float32, "pallas_tpu takes sequences of at most 8,192 tokens, not 8,200"),
        (2, 128, jnp.float16, "pallas_tpu computes in bfloat16 or float32, not float16"),
    ],
)
def test_what_the_kernels_do_not_take(heads, time, dtype, message):
    with pytest.raises(UserError, match=message):
        pallas_tpu_self_attention(
            jnp.zeros((1, time, 3, 128), dtype), jnp.zeros((3, 128), dtype), heads, None, 0.0, None, "default"
        )
