"""The TPU kernels of attention and layer norms inside the model: meshes, accumulation, rematerialization, and training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config import DataConfig, MeshConfig, ModelConfig, PretrainConfig, TokenizerConfig, TrainConfig
from gpt_jax.model import transformer
from gpt_jax.model.attention import PLATFORMS
from gpt_jax.model.dropout import DropoutKey
from gpt_jax.model.kernels.tpu_attention import pallas_tpu_self_attention
from gpt_jax.plan.costs import read_costs
from gpt_jax.runtime import sharding
from gpt_jax.train.step import init_state, lower_step
from tests.model.kernels.tpu_interpreter import PLAIN, interpreted
from tests.tiny import replace_fields

CONFIG = PretrainConfig(
    model=ModelConfig(
        vocab_size=257,
        context_length=128,
        num_layers=2,
        embed_dim=256,
        num_heads=4,
        mlp_dim=128,
        attention="pallas_tpu",
        remat="dots",
    ),
    data=DataConfig(tokenizer=TokenizerConfig(kind="bytes")),
    train=TrainConfig(batch_size=8),
)
NAMES = ("attention_forward", "attention_backward")


def train(config, steps, devices=1):
    """Returns the losses and the gradient norms of the first updates, [updates, 2]."""
    draw = np.random.default_rng(0)
    with interpreted(PLAIN):
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
        state = init_state(config, mesh)
        update = lower_step(config, mesh, total_steps=20).compile()
    numbers = []
    for step in range(steps):
        tokens = draw.integers(0, 257, (8, 129)).astype(np.int32)
        examples = np.arange(8, dtype=np.int32) + 8 * step
        weights = np.ones((8, 128), np.float32)
        batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_weights": weights, "example_id": examples}
        state, metrics = update(state, sharding.place_batch(mesh, batch, 8))
        numbers.append([metrics["loss"], metrics["grad_norm"]])
    return np.array(numbers)


@pytest.fixture(scope="module")
def expected():
    """Two updates of plain attention on one device."""
    return train(replace_fields(CONFIG, model={"attention": "plain"}), 2)


@pytest.mark.parametrize(
    ("devices", "mesh", "accumulation", "remat"),
    [
        (8, MeshConfig(data=-1, tensor=4), 1, "dots"),  # each device has one head, half of a group
        (4, MeshConfig(data=-1, fsdp=2), 2, "off"),
        (1, MeshConfig(), 2, "full"),
    ],
)
def test_updates_do_not_depend_on_the_implementation(expected, devices, mesh, accumulation, remat):
    config = replace_fields(CONFIG, model={"remat": remat}, train={"grad_accum_steps": accumulation})
    np.testing.assert_allclose(train(dataclasses.replace(config, mesh=mesh), 2, devices), expected, rtol=1e-5)


@pytest.mark.slow
def test_twenty_updates_do_not_depend_on_the_implementation_or_the_mesh(monkeypatch):
    monkeypatch.setitem(PLATFORMS, "pallas_gpu", "cpu")
    losses = {}
    cases = ("plain", 1), ("blockwise", 8), ("pallas_tpu", 1), ("pallas_tpu", 8), ("pallas_gpu", 1), ("pallas_gpu", 8)
    for attention, devices in cases:
        config = replace_fields(CONFIG, model={"attention": attention})
        losses[attention, devices] = train(config, 20, devices)[:, 0]
    for actual in losses.values():
        np.testing.assert_allclose(actual, losses["plain", 1], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "time", "heads", "dim", "segments", "dtype"),
    [
        ("v4:2x2x1", 512, 2, 64, True, "bfloat16"),  # no 32-bit multiplication
        ("v4:2x2x1", 4096, 2, 64, False, "bfloat16"),  # the longest that fits
        ("v5e:2x2", 8192, 2, 64, False, "bfloat16"),
        ("v5e:2x2", 200, 3, 64, True, "float32"),
        ("v5p:2x2x1", 1024, 2, 128, True, "bfloat16"),
        ("v6e:2x2", 384, 1, 64, False, "bfloat16"),
        ("tpu7x:2x2x1", 512, 1, 128, False, "float32"),
    ],
)
def test_the_kernels_compile_for_all_chips(tpu_devices, topology, time, heads, dim, segments, dtype):
    [device, *_] = tpu_devices(topology)
    placed = functools.partial(jax.ShapeDtypeStruct, sharding=jax.sharding.SingleDeviceSharding(device))
    width, ids = heads * dim, placed((2, time), jnp.int32) if segments else None
    arrays = placed((2, time, 3, width), dtype), placed((3, width), dtype), placed((2, heads, 2), jnp.uint32), ids

    def loss(projected, bias, stream, segment_ids):
        return pallas_tpu_self_attention(projected, bias, heads, stream, 0.1, segment_ids, "highest").sum()

    text = jax.jit(jax.grad(loss, (0, 1))).lower(*arrays).compile().as_text()
    assert [kernel.times for kernel in read_costs(text, {"data": 1}).kernels] == [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "forward"), [("dots", 1), ("full", 2)])
def test_the_forward_kernel_runs_once_if_its_results_are_kept(tpu_devices, remat, forward):
    """In each of two layers, as compiled for a TPU."""
    config = dataclasses.replace(CONFIG.model, remat=remat, compute_dtype="bfloat16")
    [device, *_] = tpu_devices("v5e:2x2")
    placed = functools.partial(jax.ShapeDtypeStruct, sharding=jax.sharding.SingleDeviceSharding(device))
    shapes = jax.eval_shape(lambda key: transformer.init(config, key), jax.random.key(0))
    params, tokens = jax.tree.map(lambda array: placed(array.shape, array.dtype), shapes), placed((2, 128), jnp.int32)

    def loss(params, tokens):
        return transformer.apply(config, params, tokens, DropoutKey(1, 2, jnp.arange(2))).sum()

    kernels = read_costs(jax.jit(jax.grad(loss)).lower(params, tokens).compile().as_text(), {"data": 1}).kernels
    runs = [sum(kernel.times for kernel in kernels if kernel.name.startswith(name)) for name in NAMES]
    assert runs == [2 * forward, 2]
