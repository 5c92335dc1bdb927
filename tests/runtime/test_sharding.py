"""The mesh of devices, the rows of a batch on each of them, and what the compiled step sends between them."""

import functools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from gpt_jax.config import DataConfig, MeshConfig, ModelConfig, PretrainConfig, TokenizerConfig, TrainConfig
from gpt_jax.errors import UserError
from gpt_jax.model import transformer
from gpt_jax.runtime import sharding
from gpt_jax.runtime.sharding import constrain, host_rows, make_mesh, per_shard, place_batch
from gpt_jax.train.step import lower_step

MIXED = MeshConfig(data=2, fsdp=2, tensor=2)

# -- the mesh ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), (1, 8, 1, 1)),
        (MeshConfig(slice=2, data=1, fsdp=-1), (2, 1, 4, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=2), (1, 2, 2, 2)),
        (MeshConfig(data=1, tensor=8), (1, 1, 1, 8)),
    ],
)
def test_the_mesh_has_all_devices_in_their_order(config, sizes):
    mesh = make_mesh(config)
    assert dict(mesh.shape) == dict(zip(("slice", "data", "fsdp", "tensor"), sizes, strict=True))
    assert list(mesh.devices.ravel()) == jax.devices()


@pytest.mark.parametrize(("topology", "chips"), [("v5e:16x16", 256), ("v5p:4x4x4", 64), ("v6e:2x4", 8)])
def test_every_power_of_two_is_an_axis_of_a_tpu_slice(tpu_devices, topology, chips):
    devices = list(tpu_devices(topology))
    for fsdp in (2**k for k in range(chips.bit_length())):
        mesh = sharding.make_mesh(MeshConfig(fsdp=fsdp), devices)
        assert mesh.shape == {"slice": 1, "data": chips // fsdp, "fsdp": fsdp, "tensor": 1}
        assert {device.id for device in mesh.devices.flat} == {device.id for device in devices}


def test_a_mesh_of_one_device():
    assert dict(make_mesh(MeshConfig(), jax.devices()[:1]).shape) == {"slice": 1, "data": 1, "fsdp": 1, "tensor": 1}


def test_sizes_that_do_not_multiply_to_the_number_of_devices_are_refused():
    message = (
        "--mesh: slice=1 x data=3 x fsdp=1 x tensor=1 requires 3 devices, but the run has 8 devices; set one axis to -1 to use"
    )
    with pytest.raises(UserError, match=f"^{message} all remaining devices$"):
        make_mesh(MeshConfig(data=3))


class Device(NamedTuple):
    """The attributes of a device on one of several TPU slices that decide its place in the mesh."""

    slice_index: int
    platform: str = "tpu"


@pytest.mark.parametrize("slices", [1, 4])
def test_the_slice_axis_must_be_the_number_of_slices(slices):
    devices = [Device(number // 4) for number in range(8)]
    with pytest.raises(UserError, match=r"^--mesh\.slice: the devices are on 2 slices, so it must be 2$"):
        make_mesh(MeshConfig(slice=slices), devices)


# -- names of axes ----------------------------------------------------------------------------------------------------------


def test_names_become_mesh_axes():
    assert sharding.spec(("batch", None, "embed")) == PartitionSpec(("slice", "data", "fsdp"), None, "fsdp")
    assert sharding.spec(("heads", "mlp", "vocab"))[1] == sharding.spec(("mlp",))[0]
    mesh = make_mesh(MIXED)
    assert sharding.named_sharding(mesh, ("vocab", "embed")).shard_shape((128, 16)) == (64, 8)
    assert sharding.named_sharding(mesh, ("batch", None)).shard_shape((8, 6)) == (2, 6)


def test_without_a_mesh_nothing_happens():
    x = jnp.arange(6.0)
    assert constrain(x, "batch") is x
    assert per_shard(sum, (("batch",),), ()) is sum
    assert sharding.all_sum(x, "batch") is x
    assert sharding.all_max(x, "vocab") is x
    assert sharding.shard_index("vocab") == 0


@pytest.mark.parametrize("config", [MeshConfig(), MIXED, MeshConfig(data=1, tensor=8)], ids=str)
def test_per_shard_combines_over_devices(config):
    """Rows are split over "batch" and columns over "vocab"; sums, maxima and shard numbers are those of the whole array."""

    def local(x):
        columns = sharding.shard_index("vocab") * x.shape[1] + jnp.arange(x.shape[1])
        everything = sharding.all_sum(sharding.all_sum(x.sum(), "batch"), "vocab")
        return sharding.all_max(x.max(1), "vocab"), sharding.all_sum(x.sum(0), "batch"), x * columns, everything

    x = np.random.default_rng(0).integers(-50, 50, (8, 16)).astype(np.int32)
    with jax.set_mesh(make_mesh(config)):
        results = jax.jit(per_shard(local, (("batch", "vocab"),), (("batch",), ("vocab",), ("batch", "vocab"), ())))(x)
    jax.tree.map(np.testing.assert_array_equal, results, (x.max(1), x.sum(0), x * np.arange(16), x.sum()))


# -- batches ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [MeshConfig(), MIXED, MeshConfig(slice=2, data=2, fsdp=2)], ids=str)
def test_each_device_gets_its_rows(config):
    mesh = make_mesh(config)
    assert host_rows(mesh, 16).tolist() == list(range(16))
    batch = {"tokens": np.arange(16 * 5, dtype=np.int32).reshape(16, 5), "example_id": np.arange(16, dtype=np.int32)}
    placed = place_batch(mesh, batch, 16)
    for name, array in placed.items():
        assert array.shape == batch[name].shape
        np.testing.assert_array_equal(array, batch[name])
        copies = mesh.shape["tensor"]  # which lie next to each other in the mesh
        for number, device in enumerate(mesh.devices.ravel()):
            (piece,) = [shard.data for shard in array.addressable_shards if shard.device == device]
            rows = 16 * copies // 8
            first = number // copies * rows
            np.testing.assert_array_equal(piece, batch[name][first : first + rows])


# -- what the compiled step computes and sends ------------------------------------------------------------------------------

# No two kinds of array share a size: 64 examples (8 on a device) of 48 tokens, a vocabulary padded to 1,152 entries, width 80.
MODEL = ModelConfig(vocab_size=1100, context_length=48, num_layers=3, embed_dim=80, num_heads=4, mlp_dim=224, loss_chunk=12)
BATCH = 64


class Collective(NamedTuple):
    """A collective operation of a compiled program."""

    kind: str
    shapes: list[tuple[int, ...]]
    """Shapes of its results on one device."""
    times: int
    """Number of times that it runs: the product of the trip counts of the loops around it."""


def collectives(text):
    """Returns the collectives in the text of a compiled program, whose main computation is marked ENTRY."""
    computations, entry = {}, ""
    for line in text.splitlines():
        if start := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            lines = computations[start[2]] = []
            entry = start[2] if start[1] else entry
        elif line.startswith("  "):
            lines.append(line)

    def visit(computation, times):
        for line in computations[computation]:
            _, result, kind = re.match(r"\s+(ROOT )?%?[\w.-]+ = (.*?) ([a-z][a-z-]*)\(", line).groups()
            if re.match("all-gather|all-reduce|all-to-all|collective-|reduce-scatter|ragged-all", kind):
                shapes = [tuple(map(int, filter(None, sizes.split(",")))) for sizes in re.findall(r"\w\[([\d,]*)\]", result)]
                yield Collective(kind, shapes, times)
                continue
            trips = int(re.search(r'known_trip_count":\{"n":"(\d+)"', line)[1]) if kind == "while" else 1
            for called in re.findall(r"(?:to_apply|calls|body|true_computation|false_computation)=%?([\w.-]+)", line):
                yield from visit(called, times * trips)

    return list(visit(entry, 1))


@functools.cache
def compiled(config):
    """Returns the floating-point operations of the update on each device of a mesh (None: one device), and its collectives."""
    mesh = make_mesh(config) if config else make_mesh(MeshConfig(), jax.devices()[:1])
    pretraining = PretrainConfig(
        model=MODEL, data=DataConfig(tokenizer=TokenizerConfig(kind="sentencepiece")), train=TrainConfig(batch_size=BATCH)
    )
    program = lower_step(pretraining, mesh, total_steps=10, warmup_steps=2.0).compile()
    return program.cost_analysis()["flops"], collectives(program.as_text())


def parameter_shapes():
    """Returns the shapes of the embeddings, and those of one layer's parameters."""
    shapes = jax.eval_shape(functools.partial(transformer.init, MODEL), jax.random.key(0))
    embedding, blocks = jax.tree.leaves(shapes["embedding"]), jax.tree.leaves(shapes["blocks"])
    return [leaf.shape for leaf in embedding], [leaf.shape[1:] for leaf in blocks]


def test_a_step_on_one_device_sends_nothing():
    flops, sent = compiled(None)
    assert flops > 0
    assert sent == []


def test_data_parallel_step_divides_the_work_and_sends_gradients_only():
    flops, sent = compiled(MeshConfig(data=8))
    # Loops have the same length in both programs, and a loop's body counts once in both.
    assert flops < 1.1 / 8 * compiled(None)[0]

    assert {collective.kind for collective in sent} == {"all-reduce"}
    # Each layer's own gradients inside the loop over layers; nothing in the loss's loop over chunks of time.
    assert {collective.times for collective in sent} == {1, MODEL.num_layers}
    embedding, blocks = parameter_shapes()
    in_loop = [shape for collective in sent if collective.times > 1 for shape in collective.shapes]
    assert sorted(map(math.prod, in_loop)) == sorted(map(math.prod, blocks))
    # Besides: the table's gradient, in which those of the lookup and of the loss are added; the positions'; the loss and its
    # normalization.
    outside = [math.prod(shape) for collective in sent if collective.times == 1 for shape in collective.shapes]
    table, positions = 1152 * 80, 48 * 80
    assert sorted(embedding) == [(48, 80), (1152, 80)]
    assert sorted(outside) == [1, 1, positions, table]


@pytest.mark.parametrize("config", [MeshConfig(data=1, fsdp=8), MIXED], ids=["fsdp=8", "data=2 x fsdp=2 x tensor=2"])
def test_sharded_step_gathers_parameters_and_never_the_batch(config):
    flops, sent = compiled(config)
    assert flops < 1.1 / 8 * compiled(None)[0]
    assert {collective.kind for collective in sent} <= {"all-reduce", "all-gather", "reduce-scatter"}

    def shares(shape):
        """Returns the sizes of a parameter on a device once it is gathered over fsdp, whether or not tensor still splits it."""
        return {math.prod(shape), math.prod(shape) // config.tensor}

    embedding, blocks = parameter_shapes()
    parameters = set().union(*map(shares, embedding + blocks))
    gathered = [shape for collective in sent if collective.kind == "all-gather" for shape in collective.shapes]
    assert gathered
    assert {math.prod(shape) for shape in gathered} <= parameters, gathered

    # A sum is over a parameter's gradient (or a part of it), a number, or, where heads, width and vocabulary are split, an
    # activation of this device's own examples.
    examples = BATCH // (config.data * config.fsdp)
    activations = {examples * time * width for time in (48, 12) for width in (80, 1)} if config.tensor > 1 else set()
    pieces = {size // config.fsdp for size in parameters}
    summed = {math.prod(shape) for collective in sent if collective.kind == "all-reduce" for shape in collective.shapes}
    assert summed <= parameters | pieces | activations | {1}
    assert not any(shape[:1] == (BATCH,) for collective in sent for shape in collective.shapes)
    if config.tensor == 1:  # nothing in the loss's loop over chunks of time
        assert {collective.times for collective in sent} == {1, MODEL.num_layers}
