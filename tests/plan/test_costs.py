"""Costs are read from small programs that were added up by hand, and from a program that libtpu compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt_jax.plan.collectives import Collective
from gpt_jax.plan.costs import read_costs
from gpt_jax.plan.kernels import Kernel
from tests.plan.hlo_text import line, loop, module


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
