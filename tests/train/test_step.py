"""The training step gives one result for all meshes and numbers of micro-batches, compiles once, and survives bad numbers."""

import contextlib
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config import DataConfig, MeshConfig, ModelConfig, OptimConfig, PretrainConfig, TokenizerConfig, TrainConfig
from gpt_jax.model import transformer
from gpt_jax.plan.costs import read_costs
from gpt_jax.runtime import sharding
from gpt_jax.runtime.mesh import num_shards
from gpt_jax.train.pretrain import total_loss
from gpt_jax.train.step import abstract_batch, abstract_state, init_state, jit_evaluation, lower_step, state_shardings

STEPS, WARMUP = 20, 4.0
MODEL = ModelConfig(
    vocab_size=200, context_length=16, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=64, attention="blockwise", loss_chunk=8
)
MESHES = {
    "single": MeshConfig(),
    "data=8": MeshConfig(data=8),
    "fsdp=8": MeshConfig(data=1, fsdp=8),
    "2 x 2 x 2": MeshConfig(data=2, fsdp=2, tensor=2),
}


def make_config(grad_accum_steps=1):
    return PretrainConfig(
        model=MODEL,
        data=DataConfig(tokenizer=TokenizerConfig(kind="sentencepiece")),
        optim=OptimConfig(peak_lr=3e-3, warmup="4 steps", clip_norm=1.0),
        train=TrainConfig(batch_size=16, grad_accum_steps=grad_accum_steps),
    )


def make_mesh(name):
    return sharding.make_mesh(MESHES[name], jax.devices()[:1] if name == "single" else jax.devices())


def batch_at(step):
    """Returns tokens that follow each other by a rule with exceptions; about a tenth of them have loss weight 0."""
    rng = np.random.default_rng(step)
    tokens = np.cumsum(rng.choice([1, 1, 1, 7], size=(16, 17)), axis=1).astype(np.int32) % MODEL.vocab_size
    weights = (rng.random((16, 16)) < 0.9).astype(np.float32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": weights,
        "example_id": np.arange(16, dtype=np.int32),
    }


@contextlib.contextmanager
def compilations():
    """Yields a list that gets an entry for every program that XLA compiles in the body."""
    seen = []

    def listen(event, seconds, **_):
        if event.endswith("backend_compile_duration"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@functools.cache
def compiled(mesh_name, grad_accum_steps):
    """Returns the executable, and the number of programs that were compiled for it."""
    lowered = lower_step(make_config(grad_accum_steps), make_mesh(mesh_name), total_steps=STEPS, warmup_steps=WARMUP)
    with compilations() as seen:
        executable = lowered.compile()
    return executable, len(seen)


@functools.cache
def initial():
    """Returns the initial state as NumPy arrays."""
    return jax.device_get(init_state(make_config(), make_mesh("single")))


def place(state, mesh):
    return jax.device_put(state, state_shardings(make_config(), mesh))


def run(mesh_name, grad_accum_steps, batches, state=None):
    """Makes updates from the initial state or another; returns the metrics of each and the last state, as NumPy arrays."""
    mesh, (update, _) = make_mesh(mesh_name), compiled(mesh_name, grad_accum_steps)
    state = place(state or initial(), mesh)
    metrics = []
    for batch in batches:
        state, values = update(state, sharding.place_batch(mesh, batch, 16))
        metrics.append(jax.device_get(values))
    return metrics, jax.device_get(state)


@functools.cache
def trained(mesh_name):
    return run(mesh_name, 1, map(batch_at, range(STEPS)))


def paths(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, transformer.ParamSpec))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def bits(tree):
    return {name: np.asarray(leaf).tobytes() for name, leaf in paths(tree).items()}


# -- one result on every mesh and for any number of micro-batches -----------------------------------------------------------


def test_training_learns():
    losses = [values["loss"] for values in trained("single")[0]]
    assert abs(losses[0] - np.log(MODEL.vocab_size)) < 0.1
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("mesh_name", ["data=8", "fsdp=8", "2 x 2 x 2"])
def test_every_mesh_gives_the_losses_of_a_single_device(mesh_name):
    for expected, got in zip(trained("single")[0], trained(mesh_name)[0], strict=True):
        np.testing.assert_allclose(got["loss"], expected["loss"], rtol=3e-6)
        np.testing.assert_allclose(got["grad_norm"], expected["grad_norm"], rtol=1e-4)
        assert got["learning_rate"] == expected["learning_rate"]


@pytest.mark.parametrize(("mesh_name", "grad_accum_steps"), [("single", 4), ("2 x 2 x 2", 2)])
def test_micro_batches_give_the_update_of_the_whole_batch(mesh_name, grad_accum_steps):
    """Dropout is on, so a micro-batch must see its own rows' masks; loss weights count as in the whole batch."""
    batches = [batch_at(0), batch_at(1), batch_at(2)]
    whole, state = run("single", 1, batches)
    parts, same_state = run(mesh_name, grad_accum_steps, batches)
    for expected, got in zip(whole, parts, strict=True):
        np.testing.assert_allclose(got["loss"], expected["loss"], rtol=1e-6)
        np.testing.assert_allclose(got["grad_norm"], expected["grad_norm"], rtol=1e-5)
    for name, expected in paths(state["params"]).items():
        np.testing.assert_allclose(paths(same_state["params"])[name], expected, atol=1e-6, rtol=0, err_msg=name)


def test_dropout_depends_on_the_step():
    """The first update has rate 0, so the losses of one batch at steps 0 and 1 can differ only by their masks."""
    same = [batch_at(0)] * 2
    metrics, _ = run("single", 1, same)
    assert metrics[0]["learning_rate"] == 0
    assert abs(metrics[0]["loss"] - metrics[1]["loss"]) > 1e-5


# -- compiled once ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh_name", MESHES)
def test_the_step_compiles_once(mesh_name):
    update, compiled_programs = compiled(mesh_name, 1)
    assert compiled_programs == 1
    mesh = make_mesh(mesh_name)
    state = place(initial(), mesh)
    batches = [sharding.place_batch(mesh, batch_at(step), 16) for step in range(STEPS)]
    with compilations() as seen, jax.transfer_guard("disallow"):
        for batch in batches:
            state, _ = update(state, batch)
            # Simulated devices share a pool of threads, in which several updates in progress can wait for each other forever.
            jax.block_until_ready(state)
    assert seen == []


# -- devices that are not attached ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["auto", pytest.param("blockwise", marks=pytest.mark.slow)])
def test_the_step_compiles_for_tpus_that_are_not_attached(tpu_devices, attention):
    config = make_config(grad_accum_steps=2)
    # libtpu 0.0.42 crashes where a device has much less to do.
    sizes = {"context_length": 128, "embed_dim": 128, "num_heads": 2, "mlp_dim": 256}
    model = dataclasses.replace(MODEL, attention=attention, layer_unroll=1, **sizes)
    config = dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, batch_size=128))
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2), tpu_devices("v5e:2x2"))
    compiled = lower_step(config, mesh, total_steps=STEPS, warmup_steps=WARMUP).compile()
    state = jax.tree.leaves(abstract_state(config, mesh))
    held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in state)
    assert (
        held <= compiled.memory_analysis().argument_size_in_bytes <= 2 * held
    )  # The rest is the batch, and padding to tiles of 128 columns.
    costs = read_costs(compiled.as_text(), mesh.shape)
    assert {part for (part,) in costs.by("part")} >= {"embedding", "attention", "mlp", "layer_norm", "loss", "optimizer"}
    # Both micro-batches go through both layers, and gradients are summed over the devices that have other examples.
    assert {cost.times for cost in costs.costs if (cost.part, cost.kind) == ("mlp", "product")} == {4}
    assert {axis for each in costs.collectives for axis in each.axes.split("+")} == {"data", "fsdp"}
    assert re.search(r"bf16\[16,128,256\]", compiled.as_text())  # a device's rows in the feed-forward network, in bfloat16


def test_evaluation_compiles_for_tpus_that_are_not_attached(tpu_devices):
    config, mesh = make_config(), sharding.make_mesh(MeshConfig(data=4), tpu_devices("v5e:2x2"))
    params, batch = abstract_state(config, mesh)["params"], abstract_batch(config, mesh)
    with jax.set_mesh(mesh):
        compiled = jit_evaluation(config, mesh, total_loss).lower(params, batch).compile()
    assert [leaf.shape for leaf in jax.tree.leaves(compiled.out_info)] == [(), ()]


# -- the state ---------------------------------------------------------------------------------------------------------------


def test_the_state_has_one_step_counter():
    """Besides `step` and the flag `ok` the state holds parameters and their moments, and `step` alone counts updates."""
    assert initial()["step"] == 0
    _, state = run("single", 1, map(batch_at, range(3)))
    assert set(state) == {"params", "moments", "step", "ok"}
    assert set(state["moments"]) == {"mu", "nu"}
    assert (state["step"], state["step"].dtype) == (3, np.int32)
    assert (state["ok"], state["ok"].dtype) == (True, np.bool)
    for moments in state["moments"].values():
        assert jax.tree.map(lambda moment: moment.shape, moments) == jax.tree.map(lambda param: param.shape, state["params"])
        assert {moment.dtype for moment in jax.tree.leaves(moments)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("mesh_name", ["fsdp=8", "2 x 2 x 2"])
def test_initial_parameters_are_made_in_pieces_and_do_not_depend_on_the_mesh(mesh_name):
    mesh = make_mesh(mesh_name)
    state = init_state(make_config(), mesh)
    assert bits(state) == bits(initial())
    assert_spread(state, mesh)


@pytest.mark.parametrize("mesh_name", ["fsdp=8", "2 x 2 x 2"])
def test_an_update_leaves_the_state_where_it_was(mesh_name):
    mesh = make_mesh(mesh_name)
    state = place(initial(), mesh)
    before = {name: array.sharding for name, array in paths(state).items()}
    state, _ = compiled(mesh_name, 1)[0](state, sharding.place_batch(mesh, batch_at(0), 16))
    assert {name: array.sharding for name, array in paths(state).items()} == before
    assert_spread(state, mesh)


def assert_spread(state, mesh):
    """Checks that every array is split as its logical axes say, moments like their parameters: no device holds the whole."""
    parameters = paths(state["params"])
    for name, parameter in paths(transformer.param_specs(MODEL)).items():
        pieces = math.prod(num_shards(mesh.shape, axis) for axis in parameter.axes if axis)
        assert pieces == mesh.size / mesh.shape["data"] or name.endswith(("bias", "gain", "positions")), name
        for shard in parameters[name].addressable_shards:
            assert shard.data.size * pieces == parameters[name].size, name
        for moment in ("mu", "nu"):
            assert paths(state["moments"][moment])[name].sharding == parameters[name].sharding, name
    held = sum(array.addressable_shards[0].data.nbytes for array in jax.tree.leaves(state))
    assert held < 0.35 * sum(array.nbytes for array in jax.tree.leaves(state))


# -- evaluation -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh_name", ["single", "2 x 2 x 2"])
def test_evaluation_sums_the_losses_of_the_targets_that_count(mesh_name):
    config, mesh, batch = make_config(), make_mesh(mesh_name), batch_at(3)
    params = place(initial(), mesh)["params"]
    with jax.set_mesh(mesh):
        total, weight = jit_evaluation(config, mesh, total_loss)(params, sharding.place_batch(mesh, batch, 16))

    @jax.jit
    def logits(params):
        return transformer.logits(MODEL, params, transformer.apply(MODEL, params, jnp.asarray(batch["tokens"])))

    scores = np.asarray(logits(initial()["params"]), np.float64)
    losses = np.log(np.exp(scores).sum(axis=-1)) - np.take_along_axis(scores, batch["targets"][..., None], axis=-1)[..., 0]
    assert weight == batch["loss_weights"].sum()
    np.testing.assert_allclose(total, (losses * batch["loss_weights"]).sum(), rtol=1e-5)


# -- the guard --------------------------------------------------------------------------------------------------------------


def nan_weight(batch):
    weights = batch["loss_weights"].copy()
    weights[5, 3] = np.nan
    return batch | {"loss_weights": weights}


def infinite_weight(batch):
    weights = batch["loss_weights"].copy()
    weights[15, 0] = np.inf
    return batch | {"loss_weights": weights}


@pytest.mark.parametrize("spoil", [nan_weight, infinite_weight])
@pytest.mark.parametrize(("mesh_name", "grad_accum_steps"), [("single", 1), ("2 x 2 x 2", 2)])
def test_a_bad_batch_leaves_the_state_as_it_was_and_so_do_all_later_ones(mesh_name, grad_accum_steps, spoil):
    good = [batch_at(0), batch_at(1)]
    _, before = run(mesh_name, grad_accum_steps, good)
    metrics, after = run(mesh_name, grad_accum_steps, [*good, spoil(batch_at(2)), batch_at(3), batch_at(4)])
    assert [bool(values["ok"]) for values in metrics] == [True, True, False, False, False]
    assert before["ok"]
    assert not after["ok"]
    assert bits(after | {"ok": True}) == bits(before | {"ok": True})
    assert after["step"] == 2


def test_an_infinite_parameter_stops_the_training_too():
    before = jax.tree.map(np.array, initial())
    before["params"]["embedding"]["tokens"][3, 1] = np.inf
    metrics, after = run("single", 1, [batch_at(0), batch_at(1)], before)
    assert [bool(values["ok"]) for values in metrics] == [False, False]
    assert bits(after | {"ok": True}) == bits(before | {"ok": True})


@pytest.mark.parametrize("kind", ["adam_gpt1", "adamw"])
def test_bfloat16_parameters_train_with_float32_moments(kind):
    """In bfloat16 b2 = 0.999 would be 1 and the second moments would never decay. The state keeps its types."""
    config = make_config(grad_accum_steps=2)
    model, optim = dataclasses.replace(MODEL, param_dtype="bfloat16"), dataclasses.replace(config.optim, kind=kind)
    config = dataclasses.replace(config, model=model, optim=optim)
    mesh = make_mesh("single")
    update = lower_step(config, mesh, total_steps=STEPS, warmup_steps=WARMUP).compile()
    state = init_state(config, mesh)
    losses = []
    for step in range(STEPS):
        state, metrics = update(state, sharding.place_batch(mesh, batch_at(step), 16))
        losses.append(float(metrics["loss"]))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state["params"])} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state["moments"])} == {"float32"}
    assert losses[-1] < losses[0] - 0.3
