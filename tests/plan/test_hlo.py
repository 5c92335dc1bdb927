"""Instructions, computations and sizes are read from lines that the TPU compiler has written."""

import pytest

from gpt_jax.plan.hlo import parse, shape_bytes, shape_dtypes

MODULE = """HloModule jit_f, is_scheduled=true, num_partitions=8

%fused (p: f32[8], /*index=1*/q: s32[]) -> f32[8] {
  %p = f32[8]{0:T(1024)(128)} parameter(0)
  %q = s32[] parameter(1)
  ROOT %slice.1 = f32[8]{0} dynamic-slice(%p, %q), dynamic_slice_sizes={8}
}

ENTRY %main.2_spmd (x: f32[8]) -> (f32[8], f32[8]) {
  %x = f32[8]{0} parameter(0), sharding={devices=[8]<=[8]}
  %three = s32[]{:T(128)} constant(3)
  %fusion = f32[8]{0:T(8,128)S(1)} fusion(%x, %three), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/mlp/add"}, \
backend_config={"window_config":{"estimated_cycles":"1921","iteration_bounds":["1"]}}
  %loop = (s32[], f32[8]{0}) while(%t), condition=%cond.1, body=%body-1
  %send = (f32[8]{0}, u32[], token[]) send(%x, %token), frontend_attributes={transfer_type="ALL_REDUCE",name="psum.1"}
  %choice = f32[8]{0} conditional(%q, %x, %x), branch_computations={%rare, %usual}
  ROOT %t = (f32[8]{0}, /*index=1*/f32[8]{0}) tuple(%fusion, /*index=1*/%fusion)
}
"""


def test_computations_keep_the_order_of_their_instructions():
    program = parse(MODULE)
    assert (program.entry, program.num_partitions) == ("main.2_spmd", 8)
    assert {name: list(computation) for name, computation in program.computations.items()} == {
        "fused": ["p", "q", "slice.1"],
        "main.2_spmd": ["x", "three", "fusion", "loop", "send", "choice", "t"],
    }


def test_what_an_instruction_says():
    main = parse(MODULE).computations["main.2_spmd"]
    fusion = main["fusion"]
    assert (fusion.shape, fusion.opcode, fusion.inputs) == ("f32[8]{0:T(8,128)S(1)}", "fusion", ["x", "three"])
    assert (fusion.op_name, fusion.cycles, fusion.called) == ("jit(f)/mlp/add", 1921, ["fused"])
    assert (main["three"].operands, main["three"].op_name, main["three"].cycles) == ("3", "", 0)
    assert (main["t"].shape, main["t"].inputs) == ("(f32[8]{0}, /*index=1*/f32[8]{0})", ["fusion"])
    assert (main["loop"].attribute("body"), main["loop"].called) == ("body-1", [])
    assert main["send"].attribute("transfer_type") == "ALL_REDUCE"
    assert main["choice"].called == ["rare", "usual"]
    with pytest.raises(ValueError, match="instruction x has no attribute 'body'"):
        main["x"].attribute("body")


def test_a_module_without_partitions_is_for_one_device():
    assert parse(MODULE.replace(", num_partitions=8", "")).num_partitions == 1


def test_other_texts_are_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        parse("module @jit_f {\n}\n")


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[]", 4),
        ("bf16[2,3]{1,0:T(8,128)(2,1)S(1)}", 12),
        ("(pred[7]{0}, s32[2]{0:S(4)}, /*index=2*/u8[0]{0})", 15),
        ("s4[10]{0:E(4)}", 5),
        ("f8e4m3fn[10]", 10),
    ],
)
def test_bytes_of_shapes(shape, size):
    assert shape_bytes(shape) == size


def test_dtypes_of_shapes():
    assert shape_dtypes("(f32[8]{0:T(8,128)}, bf16[2,3], f32[], u32[]{:S(2)})") == {"f32", "bf16", "u32"}
