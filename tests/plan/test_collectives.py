"""Collectives are read from small programs that were added up by hand, and from a program that libtpu compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt_jax.plan.collectives import Collective
from gpt_jax.plan.costs import read_costs
from gpt_jax.plan.kernels import Kernel
from tests.plan.hlo_text import kernel, line, loop, module

MESH = {"slice": 1, "data": 2, "fsdp": 2, "tensor": 1}


def test_collectives_have_the_bytes_of_their_larger_side():
    groups = "channel_id=1, replica_groups={{0,1},{2,3}}"
    entry = [
        line("%p", "bf16[64,32]{1,0}", "parameter", "0"),
        line("%x", "f32[3]{0}", "parameter", "1"),
        line("%y", "f32[5]{0}", "parameter", "2"),
        line("%scattered", "bf16[32,32]{1,0}", "reduce-scatter", "%p", groups),
        line("%start", "(bf16[32,32]{1,0}, bf16[64,32]{1,0}, u32[])", "all-gather-start", "%scattered", groups),
        line("%done", "bf16[64,32]{1,0}", "all-gather-done", "%start"),
        line("%sum", "(f32[3]{0}, f32[5]{0})", "all-reduce", "%x, %y", groups, op_name="jit(f)/optimizer/reduce_sum"),
    ]
    assert read_costs(module(entry), MESH).collectives == [
        Collective("reduce-scatter", "bf16", 64 * 32 * 2, 1, "fsdp", 2, "other", "forward"),
        Collective("all-gather", "bf16", 64 * 32 * 2, 1, "fsdp", 2, "other", "forward", asynchronous=True),
        Collective("all-reduce", "f32", 32, 1, "fsdp", 2, "optimizer", "forward"),
    ]


def test_what_runs_between_start_and_end_overlaps_with_a_collective():
    """A permute is under way during a kernel and a loop; another one only during the last instruction of both."""
    pairs = "channel_id=1, source_target_pairs={{0,1},{1,0},{2,3},{3,2}}"
    start = "(f32[8]{0}, f32[8]{0}, u32[]{:S(2)}, u32[]{:S(2)})"
    body = [line(f"%{name}", "f32[8]", "add", "%p, %p", cycles=cycles) for name, cycles in (("b", 2), ("c", 3))]
    body.append(kernel("inner.1", "f32[8]{0}", "%p"))
    instruction, *computations = loop("layers", 3, [line("%p", "f32[8]{0}", "parameter", "0"), *body])
    entry = [
        line("%p", "f32[8]{0}", "parameter", "0"),
        line("%before", "f32[8]{0}", "negate", "%p", cycles=1000),
        line("%start.1", start, "collective-permute-start", "%p", pairs),
        kernel("outer", "f32[8]{0}", "%p"),
        instruction,
        line("%start.2", start, "collective-permute-start", "%before", pairs),
        line("%beside", "f32[8]{0}", "negate", "%p", cycles=7),
        line("%done.1", "f32[8]{0}", "collective-permute-done", "%start.1"),
        line("%done.2", "f32[8]{0}", "collective-permute-done", "%start.2", cycles=2000),
        line("%after", "f32[8]{0}", "negate", "%p", cycles=4000),
    ]
    kernels = (Kernel("outer", 64, 1, "other", "forward"), Kernel("inner", 64, 3, "other", "forward"))
    permute = Collective("collective-permute", "f32", 32, 1, "fsdp", 2, "other", "forward", asynchronous=True)
    steps, *step_computations = loop("steps", 10, entry)
    costs = read_costs(module([steps], *computations, *step_computations), MESH)
    assert costs.collectives == [
        permute._replace(times=10, overlap_cycles=3 * 5 + 7, overlap_kernels=kernels),
        permute._replace(times=10, overlap_cycles=7),
    ]
    assert costs.cycles == 10 * (1000 + 3 * 5 + 7 + 2000 + 4000)
    assert [(kernel.name, kernel.times) for kernel in costs.kernels] == [("outer", 10), ("inner", 30)]


def chain(number, *cycles):
    """Returns fusions that start a collective, continue it and end it, with cycles of each; and their computations."""
    gather = f'channel_id=7, replica_groups=[2,2]<=[2,2]T(1,0), frontend_attributes={{chain_id="{number}"}}'
    fused = [
        line("%p", "bf16[4,8]{1,0}", "parameter", "0"),
        line("%g", "bf16[8,8]{1,0}", "all-gather", "%p", gather, op_name="jit(f)/mlp/dot_general"),
    ]
    start = [*fused, line("ROOT %s", "(bf16[8,8])", "custom-call", "%g", 'custom_call_target="AsyncCollectiveStart"')]
    names = [f"chain{number}.{step}" for step in range(len(cycles))]
    fusions = [
        line(f"%{name}", "bf16[8,8]", "fusion", "%p", f"kind=kCustom, calls=%{name}_computation", cycles=count)
        for name, count in zip(names, cycles, strict=True)
    ]
    return fusions, [(f"{name}_computation", fused if step else start) for step, name in enumerate(names)]


def test_a_collective_that_runs_beside_several_fusions_is_counted_once():
    (start, middle, end), fused = chain(0, 0, 30, 0)
    between = line("%add", "f32[8]", "add", "%p, %p", cycles=4)
    instruction, *computations = loop("layers", 6, [start, middle, between, end, between.replace("add", "after")])
    collectives = read_costs(module([instruction], *fused, *computations), MESH).collectives
    assert collectives == [Collective("all-gather", "bf16", 128, 6, "data", 2, "mlp", "forward", True, overlap_cycles=34)]


def test_a_collective_that_continues_inside_a_loop_is_counted_once():
    (start, inside, end), fused = chain(0, 0, 30, 0)
    (other, done), others = chain(1, 0, 0)
    instruction, *computations = loop("loop", 5, [inside, other, done])
    collectives = read_costs(module([start, instruction, end], *fused, *others, *computations), MESH).collectives
    gather = Collective("all-gather", "bf16", 128, 1, "data", 2, "mlp", "forward", True)
    assert collectives == [gather._replace(overlap_cycles=150), gather._replace(times=5)]


def test_a_collective_on_a_sparse_core_begins_when_it_gets_its_operands():
    inside = [
        line("%q", "bf16[4,8]{1,0}", "parameter", "0"),
        line("ROOT %g", "bf16[8,8]{1,0}", "all-gather", "%q", "replica_groups=[2,2]<=[4]", "jit(f)/mlp/dot", cycles=2**63 - 1),
    ]
    add = lambda name, cycles: line(f"%{name}", "f32[8]", "add", "%p, %p", cycles=cycles)  # noqa: E731
    entry = [
        line("%p", "bf16[4,8]{1,0}", "parameter", "0"),
        line("%start", "((), (), (s32[1]))", "call-start", "", 'async_execution_thread="sparsecore", to_apply=%called'),
        add("before", 1000),
        line("%update", "((bf16[4,8]), bf16[8,8])", "call-update", "%start, %p"),
        add("beside", 7),
        line("%done", "bf16[8,8]{1,0}", "call-done", "%update"),
        add("after", 2000),
    ]
    costs = read_costs(module(entry, ("called", inside)), MESH)
    assert costs.collectives == [Collective("all-gather", "bf16", 128, 1, "fsdp", 2, "mlp", "forward", True, overlap_cycles=7)]
    assert costs.cycles == 3007


def test_transfers_between_slices_are_those_of_a_module_that_each_slice_executes():
    """Four slices of four devices: the module numbers the devices of one slice, and sends to the others through their hosts."""
    name = 'frontend_attributes={_xla_host_transfer_rendezvous="psum.1_0",_xla_megascale_transfer_type="ALL_REDUCE"}'
    infeed = 'is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="other"}'
    entry = [
        line("%p", "f32[8]{0}", "parameter", "0"),
        line("%token", "token[]", "after-all"),
        line("%sum", "f32[8]{0}", "all-reduce", "%p", "replica_groups={{0,1},{2,3}}"),
        line("%send", "(f32[8]{0}, u32[], token[])", "send", "%sum, %token", name, op_name="jit(f)/optimizer/reduce_sum"),
        line("%beside", "f32[8]{0}", "negate", "%p", cycles=7),
        line("%recv", "(f32[8]{0}, u32[], token[])", "recv", "%token", name),
        line("%other", "(f32[8]{0}, u32[], token[])", "recv", "%token", infeed),
        line("%other-done", "(f32[8]{0}, token[])", "recv-done", "%other", "is_host_transfer=true"),
        line("%also", "f32[8]{0}", "negate", "%p", cycles=8),
        line("%recv-done", "(f32[8]{0}, token[])", "recv-done", "%recv", "is_host_transfer=true"),
        line("%after", "f32[8]{0}", "negate", "%p", cycles=1000),
    ]
    text = module(entry).replace("is_scheduled=true", "is_scheduled=true, num_partitions=4", 1)
    assert read_costs(text, {**MESH, "slice": 4}).collectives == [
        Collective("all-reduce", "f32", 32, 1, "fsdp", 2, "other", "forward"),
        Collective("all-reduce", "f32", 32, 1, "slice", 4, "optimizer", "forward", True, overlap_cycles=15),
    ]


@pytest.mark.parametrize(
    ("transfer", "received", "expected"),
    [
        ("ALL_GATHER", "f32[32]{0}", ("all-gather", 4, 128)),
        ("REDUCE_SCATTER", "f32[2]{0}", ("reduce-scatter", 4, 32)),
        ("ONE_TO_ONE", "f32[8]{0}", ("collective-permute", 2, 32)),
    ],
)
def test_kinds_devices_and_bytes_of_transfers_between_slices(transfer, received, expected):
    name = f'frontend_attributes={{_xla_host_transfer_rendezvous="t_0",_xla_megascale_transfer_type="{transfer}"}}'
    entry = [
        line("%p", "f32[8]{0}", "parameter", "0"),
        line("%send", "(f32[8]{0}, u32[], token[])", "send", "%p", name),
        line("%recv", f"({received}, u32[], token[])", "recv", "", name),
        line("%done", f"({received}, token[])", "recv-done", "%recv", "is_host_transfer=true"),
    ]
    text = module(entry).replace("is_scheduled=true", "is_scheduled=true, num_partitions=4", 1)
    (collective,) = read_costs(text, {**MESH, "slice": 4}).collectives
    assert (collective.kind, collective.devices, collective.bytes) == expected


def test_the_axis_slice_inside_a_module_is_like_others():
    entry = [
        line("%p", "f32[8]{0}", "parameter", "0"),
        line("%sum", "f32[8]{0}", "all-reduce", "%p", "replica_groups={{0,2},{1,3}}"),
    ]
    text = module(entry).replace("is_scheduled=true", "is_scheduled=true, num_partitions=4", 1)
    assert [(each.axes, each.devices) for each in read_costs(text, {"slice": 2, "data": 2}).collectives] == [("slice", 2)]


def test_an_all_reduce_of_which_a_device_keeps_its_shard_is_a_reduce_scatter():
    """The compiler pads the 30 rows to 32, sums them over 2 devices, and keeps the rows of this one."""
    groups = "channel_id=1, replica_groups={{0,1},{2,3}}"
    scatter = [
        line("%input", "f32[30,8]{1,0}", "parameter", "0"),
        line("%zero", "f32[]", "constant", "0"),
        line("%pad", "f32[32,8]{1,0}", "pad", "%input, %zero", "padding=0_2x0_0"),
        line("%all-reduce.2", "f32[32,8]{1,0}", "all-reduce", "%pad", groups),
        line("%i", "u32[]", "partition-id"),
        line("ROOT %d", "f32[16,8]{1,0}", "dynamic-slice", "%all-reduce.2, %i, %zero", "dynamic_slice_sizes={16,8}"),
    ]
    whole = [scatter[0], line("ROOT %all-reduce.3", "f32[30,8]{1,0}", "all-reduce", "%input", groups)]
    entry = [
        line("%g", "f32[30,8]{1,0}", "parameter", "0"),
        line("%one", "f32[16,8]", "fusion", "%g", "kind=kCustom, calls=%all-reduce-scatter", "jit(f)/transpose(jvp(mlp))/dot"),
        line("%two", "f32[30,8]", "fusion", "%g", "kind=kCustom, calls=%whole", "jit(f)/transpose(jvp(mlp))/dot"),
    ]
    assert read_costs(module(entry, ("all-reduce-scatter", scatter), ("whole", whole)), MESH).collectives == [
        Collective("reduce-scatter", "f32", 32 * 8 * 4, 1, "fsdp", 2, "mlp", "backward"),
        Collective("all-reduce", "f32", 30 * 8 * 4, 1, "fsdp", 2, "mlp", "backward"),
    ]


def test_compiled_collectives_overlap_with_products_and_leave_each_device_its_shard(tpu_devices):
    """Two layers with sharded weights, and a sum over the batch that looks like a gradient.

    The first layer's weights are gathered before anything else can run, and the second layer's during the first product.
    """
    mesh = Mesh(np.array(tpu_devices("v5e:2x2")), ("fsdp",))
    shard = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731

    def step(x, first, second):
        with jax.named_scope("mlp"):
            x = jax.lax.with_sharding_constraint(x @ first, shard("fsdp"))
            x = jax.lax.with_sharding_constraint(x @ second, shard("fsdp"))
        with jax.named_scope("optimizer"):
            return x, jax.lax.with_sharding_constraint(
                jnp.einsum("bi,bo->io", x, x, preferred_element_type=jnp.float32), shard("fsdp")
            )

    weights = jax.ShapeDtypeStruct((2048, 2048), jnp.bfloat16, sharding=shard("fsdp"))
    batch = jax.ShapeDtypeStruct((16384, 2048), jnp.bfloat16, sharding=shard("fsdp"))
    costs = read_costs(jax.jit(step).lower(batch, weights, weights).compile().as_text(), mesh.shape)
    product = next(cost for cost in costs.costs if cost.kind == "product")
    assert product.cycles == pytest.approx(4096 * 2048 * 2048 / (4 * 128 * 128), rel=0.1)
    gathers = [each for each in costs.collectives if each.kind == "all-gather"]
    assert {(each.bytes, each.axes, each.devices) for each in gathers} == {(2048 * 2048 * 2, "fsdp", 4)}
    assert [(each.asynchronous, each.overlap_cycles) for each in gathers] == [(False, 0), (True, product.cycles)]
    (scatter,) = (each for each in costs.collectives if each.kind == "reduce-scatter")
    assert (scatter.dtype, scatter.devices, scatter.part, scatter.asynchronous) == ("f32", 4, "optimizer", False)
    assert 1 <= scatter.bytes / (2048 * 2048 * 4) <= 1.1  # The compiler pads it.
    assert "all-reduce" not in {each.kind for each in costs.collectives}
