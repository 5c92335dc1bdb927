"""The TPU kernels of layer normalization, interpreted on a CPU, against plain JAX and its derivatives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config import ModelConfig
from gpt_jax.model.dropout import Site, mask_stream
from gpt_jax.model.kernels import tpu_layer_norm
from gpt_jax.model.layer_norm import add_and_normalize
from tests.model.kernels.tpu_interpreter import STRICT, interpreted

CONFIG = ModelConfig(num_layers=1, embed_dim=256, num_heads=4)


def results(attention, time, rate, dtype):
    """Returns the output and the gradients of all arguments of a random weighted sum of it."""
    draw = np.random.default_rng(0)
    residual, branch, direction = (jnp.asarray(draw.normal(3, 2, (2, time, 256)), dtype) for _ in range(3))
    branch_bias = jnp.asarray(draw.normal(size=256), dtype)
    gain, bias = (jnp.asarray(draw.normal(size=256), jnp.float32) for _ in range(2))
    stream = mask_stream(1, 2, 3, Site.RESIDUAL_MLP, jnp.array([5, 9]), 0) if rate else None
    config = dataclasses.replace(CONFIG, attention=attention)

    @jax.jit
    def compute(*arrays):
        output, pull_back = jax.vjp(lambda *arrays: add_and_normalize(*arrays, stream, rate, config), *arrays)
        return output, *pull_back(direction)

    with interpreted(STRICT):
        return [np.asarray(array, np.float64) for array in compute(residual, branch, branch_bias, gain, bias)]


def distances(actual, expected):
    return [np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) for ours, theirs in zip(actual, expected, strict=True)]


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("time", [32, 288])  # 288 = 3 blocks of 96
def test_float32(time, rate):
    assert max(distances(*(results(name, time, rate, jnp.float32) for name in ("pallas_tpu", "plain")))) < 1e-5


def test_bfloat16_is_as_accurate_as_plain_jax():
    exact = results("plain", 64, 0.3, jnp.float32)
    ours, plain = (distances(results(name, 64, 0.3, jnp.bfloat16), exact) for name in ("pallas_tpu", "plain"))
    for of_kernel, of_plain in zip(ours, plain, strict=True):
        assert of_kernel < max(1.05 * of_plain, 2**-8)


def test_other_sizes_do_without_the_kernels():
    assert not tpu_layer_norm.is_supported(100, 256)
    assert not tpu_layer_norm.is_supported(128, 192)
    for ours, plain in zip(results("pallas_tpu", 9, 0.3, jnp.float32), results("plain", 9, 0.3, jnp.float32), strict=True):
        np.testing.assert_array_equal(ours, plain)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize(("embed", "dtype"), [(768, "bfloat16"), (4096, "bfloat16"), (2048, "float32")])
def test_the_kernels_compile_for_all_chips(tpu_devices, topology, embed, dtype):
    """Wide rows take shorter blocks, because all of them have to fit into vector memory."""
    [device, *_] = tpu_devices(topology)
    placed = functools.partial(jax.ShapeDtypeStruct, sharding=jax.sharding.SingleDeviceSharding(device))
    rows, vector, stream = placed((2, 512, embed), dtype), placed((embed,), jnp.float32), placed((2, 2), jnp.uint32)
    config = dataclasses.replace(CONFIG, attention="pallas_tpu", embed_dim=embed)

    def loss(residual, branch, branch_bias, gain, bias, stream):
        return add_and_normalize(residual, branch, branch_bias, gain, bias, stream, 0.1, config).sum()

    differentiate = jax.jit(jax.grad(loss, tuple(range(5))))
    text = differentiate.lower(rows, rows, placed((embed,), dtype), vector, vector, stream).compile().as_text()
    assert "layer_norm_backward" in text
