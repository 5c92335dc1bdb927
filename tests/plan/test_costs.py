"""Costs are read from small programs that were added up by hand, and from programs that libtpu compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt_jax.plan.costs import Collective, Kernel, read_costs

MESH = {"slice": 1, "data": 2, "fsdp": 2, "tensor": 1}


def line(name, shape, opcode, operands="", attributes="", op_name="", cycles=0):
    """Returns an instruction as the compiler writes it."""
    metadata = f', metadata={{op_name="{op_name}" stack_frame_id=3}}' if op_name else ""
    config = f', backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}' if cycles else ""
    comma = ", " if attributes else ""
    return f"  {name} = {shape} {opcode}({operands}){comma}{attributes}{metadata}{config}"


def module(entry, *computations):
    """Returns the text of a module of computations, each a name and its lines, after which comes the entry."""
    blocks = [
        f"%{name} (p: f32[8], /*index=1*/q: s32[]) -> f32[8] {{\n" + "\n".join(lines) + "\n}" for name, lines in computations
    ]
    return "\n\n".join(
        ["HloModule jit_f, is_scheduled=true", *blocks, "ENTRY %main (p: f32[8]) -> f32[8] {\n" + "\n".join(entry) + "\n}"]
    )


def loop(name, trips, body):
    """Returns the `while` instruction, and the computations of a loop."""
    condition = [
        line("%limit", "s32[]{:T(128)}", "constant", str(trips)),
        line("%state", "(s32[], f32[8]{0})", "parameter", "0"),
        line("%i", "s32[]", "get-tuple-element", "%state", "index=0"),
        line("ROOT %less", "pred[]", "compare", "%i, %limit", "direction=LT"),
    ]
    instruction = line(f"%{name}", "(s32[], f32[8]{0})", "while", "%t", f"condition=%{name}_condition, body=%{name}_body")
    return instruction, (f"{name}_condition", condition), (f"{name}_body", body)


def kernel(name, shape, operands, op_name=""):
    """Returns a call of a Pallas kernel."""
    attributes = 'custom_call_target="tpu_custom_call", operand_layout_constraints={f32[8]{0}}'
    return line(f"%{name}", shape, "custom-call", operands, attributes, op_name)


def test_loops_are_multiplied_out():
    inner, *inner_computations = loop("inner", 4, [line("%a", "f32[8]{0}", "add", "%p, %p", op_name="jit(f)/x/add", cycles=3)])
    outer, *outer_computations = loop("outer", 5, [inner, line("%m", "f32[8]{0}", "multiply", "%p, %p", cycles=100)])
    costs = read_costs(
        module([outer, line("%e", "f32[8]", "negate", "%p", cycles=7)], *inner_computations, *outer_computations), {}
    )
    assert costs.cycles == 5 * 4 * 3 + 5 * 100 + 7
    assert {cost.name: (cost.cycles, cost.times) for cost in costs.costs} == {"a": (60, 20), "m": (500, 5), "e": (7, 1)}


def test_the_cheapest_branch_of_a_conditional_counts():
    branches = [
        ("rare", [line("%a", "f32[8]", "add", "%p, %p", cycles=50)]),
        ("usual", [line("%b", "f32[8]", "negate", "%p", cycles=2), line("%c", "f32[8]", "add", "%b, %p", cycles=3)]),
    ]
    entry = line("%choice", "f32[8]", "conditional", "%i, %p, %p", "branch_computations={%rare, %usual}")
    assert [cost.name for cost in read_costs(module([entry], *branches), {}).costs] == ["b", "c"]


def test_the_trip_count_that_the_compiler_states_comes_first():
    instruction, *computations = loop("l", 4, [line("%a", "f32[8]", "add", "%p, %p", cycles=1)])
    known = instruction + ', backend_config={"known_trip_count":{"n":"9"}}'
    assert read_costs(module([known], *computations), {}).cycles == 9


def test_a_loop_without_a_constant_trip_count_is_an_error():
    instruction, (name, condition), body = loop("l", 4, [])
    condition[0] = line("%limit", "s32[]", "parameter", "1")
    with pytest.raises(ValueError, match="trip count of loop l "):
        read_costs(module([instruction], (name, condition), body), {})


def test_a_fusion_belongs_to_the_product_inside_it():
    fused = [
        line("%c", "bf16[8,8]{1,0:T(8,128)(2,1)}", "convolution", "%x, %y", op_name="jit(f)/transpose(jvp())/mlp/dot_general"),
        line("ROOT %s", "bf16[8,8]", "add", "%c, %c", op_name="jit(f)/jvp()/layer_norm/add"),
    ]
    moves = [line("%d", "f32[8]", "dynamic-slice", "%p, %q"), line("ROOT %b", "f32[8]", "bitcast", "%d")]
    mask = [line("ROOT %x", "u32[8]", "xor", "%p, %q", op_name="jit(f)/jvp(embedding)/xor")]
    fusion = lambda name, calls, op_name, cycles: line(  # noqa: E731
        f"%{name}", "f32[8]", "fusion", "%p", f"kind=kLoop, calls=%{calls}", op_name, cycles
    )
    entry = [
        fusion("one", "product", "jit(f)/jvp()/layer_norm/add", 10),
        fusion("two", "moves", "jit(f)/jvp()/while/body/dynamic_slice", 20),
        fusion("three", "mask", "", 40),
        line("%four", "f32[8]", "copy", "%p", op_name="jit(f)/optimizer/mul", cycles=80),
    ]
    costs = read_costs(module(entry, ("product", fused), ("moves", moves), ("mask", mask)), {})
    assert costs.by("part", "direction", "kind") == {
        ("optimizer", "forward", "copy"): 80,
        ("embedding", "forward", "elementwise"): 40,
        ("scan", "forward", "copy"): 20,
        ("mlp", "backward", "product"): 10,
    }


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
    body = [line("%b", "f32[8]", "add", "%p, %p", cycles=5), kernel("inner.1", "f32[8]{0}", "%p")]
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


def test_kernels_have_the_bytes_of_their_distinct_operands_and_results():
    entry = [
        line("%qkv.2", "bf16[1,3,256,64]{3,2,1,0:T(8,128)(2,1)S(1)}", "parameter", "0"),
        line("%words", "u32[1,4]{1,0}", "parameter", "1"),
        kernel(
            "attend_64.12",
            "(bf16[1,256,64]{2,1,0}, f32[1,256]{1,0})",
            "%words, %qkv.2, /*index=2*/%qkv.2, %qkv.2",
            "jit(f)/attention/a",
        ),
    ]
    size = 3 * 256 * 64 * 2 + 4 * 4 + 256 * 64 * 2 + 256 * 4
    assert read_costs(module(entry), {}).kernels == [Kernel("attend_64", size, 1, "attention", "forward")]


# -- compiled programs ------------------------------------------------------------------------------------------------------


def compile_scan(devices, length):
    """Compiles a scan over products with a kernel and a sum over the devices in it; returns its costs."""
    mesh = Mesh(np.array(devices).reshape(4), ("data",))
    sharded = lambda shape, *axes: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*axes)))  # noqa: E731

    def double(x_ref, out_ref):
        out_ref[...] = x_ref[...] * 2

    @jax.named_scope("mlp")
    def kernel(x):
        return jax.lax.psum(pl.pallas_call(double, jax.ShapeDtypeStruct(x.shape, x.dtype), name="double")(x), "data")

    def scan(x, weights):
        def body(x, weight):
            with jax.named_scope("attention"):
                x = x @ weight
            return jax.shard_map(kernel, in_specs=PartitionSpec(None), out_specs=PartitionSpec(None), check_vma=False)(x), None

        return jax.lax.scan(body, x, weights)[0]

    with jax.set_mesh(mesh):
        compiled = jax.jit(scan).lower(sharded((1024, 2048)), sharded((length, 2048, 2048))).compile()
    return read_costs(compiled.as_text(), mesh.shape)


def test_cycles_of_a_compiled_scan_grow_with_its_length(tpu_devices):
    four, seven = (compile_scan(tpu_devices("v5e:2x2"), length) for length in (4, 7))
    products = [costs.by("part", "kind")["attention", "product"] for costs in (four, seven)]
    assert products[0] * 7 == products[1] * 4
    assert 1 <= products[0] / (4 * 1024 * 2048 * 2048 / (4 * 128 * 128)) <= 1.3  # the chip has four units of 128 x 128
    assert four.kernels == [Kernel("double", 2 * 1024 * 2048 * 2, 4, "mlp", "forward")]
    assert seven.collectives == [Collective("all-reduce", "bf16", 1024 * 2048 * 2, 7, "data", 4, "mlp", "forward")]


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
