"""Calls of Pallas kernels are read from a small program."""

from gpt_jax.plan.costs import read_costs
from gpt_jax.plan.kernels import Kernel
from tests.plan.hlo_text import kernel, line, module


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
