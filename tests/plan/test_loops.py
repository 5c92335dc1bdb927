"""Evaluations of the instructions of a fusion: counted by hand, and in what XLA compiles."""

import jax
import jax.numpy as jnp
import pytest

from gpt_jax.model.dropout import dropout, mask_stream
from gpt_jax.plan.hlo import parse
from gpt_jax.plan.loops import Evaluations, count_evaluations
from tests.plan.hlo_text import line, module


def evaluations(*lines):
    computation = parse(module([line("%x", "f32[]", "constant", "1")], ("fused", lines))).computations["fused"]
    return count_evaluations(computation, list(computation.values())[-1])


def test_a_value_for_each_row_is_computed_once_a_row():
    found = evaluations(
        line("%p", "f32[8]{0}", "parameter", "0"),
        line("%scalar", "f32[]", "parameter", "1"),
        line("%twice", "f32[]", "add", "%scalar, %scalar"),
        line("%all", "f32[8]{0}", "broadcast", "%twice", "dimensions={}"),
        line("%row", "f32[8]{0}", "multiply", "%p, %all"),
        line("%rows", "f32[8,4]{1,0}", "broadcast", "%row", "dimensions={0}"),
        line("ROOT %out", "f32[8,4]{1,0}", "exponential", "%rows"),
    )
    assert found["out"] == Evaluations(32, False)
    assert found["row"] == Evaluations(8, False)
    assert found["twice"] == Evaluations(1, False)


def test_a_value_for_each_column_is_computed_for_each_element():
    found = evaluations(
        line("%p", "f32[4]{0}", "parameter", "0"),
        line("%column", "f32[4]{0}", "negate", "%p"),
        line("%columns", "f32[8,4]{1,0}", "broadcast", "%column", "dimensions={1}"),
        line("ROOT %out", "f32[8,4]{1,0}", "exponential", "%columns"),
    )
    assert found["column"] == Evaluations(32, False)


def by_row_and_column(first):
    """Returns the evaluations where the same array is used by row and by column of a square."""
    return evaluations(
        *first,
        line("%hash", "f32[8]{0}", "multiply", "%value, %value"),
        line("%rows", "f32[8,8]{1,0}", "broadcast", "%hash", "dimensions={0}"),
        line("%columns", "f32[8,8]{1,0}", "broadcast", "%hash", "dimensions={1}"),
        line("ROOT %out", "f32[8,8]{1,0}", "add", "%rows, %columns"),
    )


def test_a_function_that_reads_at_a_position_from_memory_is_called_for_each_element():
    layers = [
        line("%p", "f32[3,8]{1,0}", "parameter", "0"),
        line("%layer", "s32[]", "parameter", "1"),
        line("%slice", "f32[1,8]{1,0}", "dynamic-slice", "%p, %layer", "dynamic_slice_sizes={1,8}"),
        line("%value", "f32[8]{0}", "bitcast", "%slice"),
    ]
    found = by_row_and_column(layers)
    assert found["hash"] == Evaluations(8 + 64, True)  # by row in the outer loop, by column in the inner one
    assert found["slice"].repeated
    assert found["out"] == Evaluations(64, False)


def test_any_other_function_is_computed_where_its_index_is_known():
    found = by_row_and_column([line("%value", "f32[8]{0}", "parameter", "0")])
    assert found["hash"] == Evaluations(8 + 64, False)


def test_an_index_that_is_a_part_of_the_innermost_loop_takes_a_division():
    found = evaluations(
        line("%p", "f32[4]{0}", "parameter", "0"),
        line("%value", "f32[4]{0}", "negate", "%p"),
        line("%wide", "f32[4,16]{1,0}", "broadcast", "%value", "dimensions={0}"),
        line("%sum", "f32[4,16]{1,0}", "add", "%wide, %wide"),
        line("ROOT %out", "f32[64]{0}", "bitcast", "%sum"),
    )
    assert found["value"] == Evaluations(64, True)
    kept = evaluations(
        line("%p", "f32[4]{0}", "parameter", "0"),
        line("%value", "f32[4]{0}", "negate", "%p"),
        line("%wide", "f32[4,16,3]{2,1,0}", "broadcast", "%value", "dimensions={0}"),
        line("ROOT %out", "f32[64,3]{1,0}", "bitcast", "%wide"),
    )
    assert kept["value"] == Evaluations(64, False)


def test_transposed_axes_are_followed():
    found = evaluations(
        line("%p", "f32[8]{0}", "parameter", "0"),
        line("%row", "f32[8]{0}", "negate", "%p"),
        line("%rows", "f32[8,4]{1,0}", "broadcast", "%row", "dimensions={0}"),
        line("ROOT %out", "f32[4,8]{1,0}", "transpose", "%rows", "dimensions={1,0}"),
    )
    assert found["row"] == Evaluations(32, False)


@pytest.mark.parametrize(("shape", "repeats"), [((4, 64, 64), True), ((4, 64, 32), False)])
def test_square_dropout_masks_are_hashed_again_for_each_element(shape, repeats):
    def drop(x, examples, seed, step):
        def body(x, layer):
            return dropout(x, mask_stream(seed, step, layer, 2, examples, 0), 0.1) + 1, None

        return jax.lax.scan(body, x, jnp.arange(4))[0]

    arguments = jnp.zeros(shape), jnp.arange(shape[0]), jnp.uint32(1), jnp.int32(2)
    program = parse(jax.jit(drop).lower(*arguments).compile().as_text())
    most = 0
    for each in (one for computation in program.computations.values() for one in computation.values()):
        if each.opcode == "fusion":
            inside = program.computations[each.called[0]]
            found = count_evaluations(inside, list(inside.values())[-1])
            most = max(most, sum(one.times for one in found.values() if one.repeated))
    rounds = 20 * 5  # operations of the 20 rounds of Threefry
    assert (most > rounds * 4 * 64 * 64) == repeats
