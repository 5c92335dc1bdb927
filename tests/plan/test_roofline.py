"""The modeled time of a program: small programs worked by hand, and FLOPs of compiled steps against the formula."""

from typing import Any

import jax
import pytest

from gpt_jax.bench.products import products_of_step
from gpt_jax.config import DataConfig, ModelConfig, PretrainConfig, TokenizerConfig, TrainConfig
from gpt_jax.plan.roofline import Task, estimate, schedule
from gpt_jax.runtime.sharding import make_mesh
from gpt_jax.train.step import lower_step
from tests.plan.hlo_text import line, loop, module
from tests.plan.rates_by_hand import rates

ON_ALL_CORES = 'backend_config={"outer_dimension_partitions":["2"]}'
LIBRARY = 'backend_config={"fusion_config":{"kind":"__ynn_fusion"},"outer_dimension_partitions":[]}'
A, B = line("%a", "f32[500]{0}", "parameter", "0"), line("%b", "f32[500]{0}", "parameter", "1")


def fused(name, *lines):
    """Returns a computation, and a function from a name to an instruction that calls it."""
    return name, [line("%p", "f32[500]{0}", "parameter", "0"), *lines]


def test_tasks_share_the_cores():
    tasks = {
        "a": Task((), 6.0, 2),  # 0 to 3 on both cores
        "b": Task((), 2.0, 1),  # 3 to 5
        "c": Task(("a",), 4.0, 1),  # 3 to 7
        "d": Task(("b", "outside"), 3.0, 2),  # 5 to 7 on one core, then on both
        "e": Task(("c", "d"), 1.0, 1),
    }
    assert schedule(tasks, 2) == pytest.approx(7 + 0.5 + 1)
    assert schedule(tasks, 1) == pytest.approx(16)
    assert schedule({}, 2) == 0.0


def test_a_copy_takes_the_time_of_the_bytes_that_it_reads_and_writes():
    found = estimate(module([A, line("%c", "f32[500]{0}", "copy", "%a", op_name="jit(f)/mlp/copy")]), rates())
    assert found.seconds == pytest.approx(8e-6)  # 4,000 bytes at 0.5 GB/s on one core
    assert found.by_part() == {"mlp": pytest.approx(8e-6)}
    assert (found.flops, found.unmodeled) == (0.0, {})


def test_a_fusion_on_all_cores_moves_bytes_and_computes():
    computation = fused(
        "f",
        line("%q", "f32[500]{0}", "parameter", "1"),
        line("%e", "f32[500]{0}", "exponential", "%p"),
        line("ROOT %m", "f32[500]{0}", "multiply", "%e, %q"),
    )
    entry = [A, B, line("%out", "f32[500]{0}", "fusion", "%a, %b", f"kind=kLoop, calls=%f, {ON_ALL_CORES}")]
    assert estimate(module(entry, computation), rates()).seconds == pytest.approx(6e-6 + 500 * (7e-9 + 1e-9))
    entry[-1] = entry[-1].replace(f", {ON_ALL_CORES}", "")
    one_core = estimate(module(entry, computation), rates())
    assert one_core.seconds == pytest.approx(12e-6 + 2 * 500 * (7e-9 + 1e-9))
    assert one_core.work[0].seconds == pytest.approx(one_core.seconds / 2)  # its share of two cores


def test_operations_that_are_repeated_for_each_element_have_a_rate_of_their_own():
    computation = (
        "f",
        [
            line("%p", "f32[3,20]{1,0}", "parameter", "0"),
            line("%i", "s32[]", "parameter", "1"),
            line("%s", "f32[1,20]{1,0}", "dynamic-slice", "%p, %i", "dynamic_slice_sizes={1,20}"),
            line("%v", "f32[20]{0}", "bitcast", "%s"),
            line("%h", "f32[20]{0}", "multiply", "%v, %v"),
            line("%rows", "f32[20,20]{1,0}", "broadcast", "%h", "dimensions={0}"),
            line("%columns", "f32[20,20]{1,0}", "broadcast", "%h", "dimensions={1}"),
            line("ROOT %x", "f32[20,20]{1,0}", "xor", "%rows, %columns"),
        ],
    )
    arrays = [line("%a", "f32[3,20]{1,0}", "parameter", "0"), line("%i", "s32[]", "parameter", "1")]
    entry = [*arrays, line("%out", "f32[20,20]{1,0}", "fusion", "%a, %i", f"kind=kLoop, calls=%f, {ON_ALL_CORES}")]
    moved = (1600 + 80 + 4) / 1e9  # the result, a row of the operand, and the index
    repeated = (20 + 400) * 11e-9  # by row and by column
    assert estimate(module(entry, computation), rates()).seconds == pytest.approx(moved + repeated + 400 * 1e-9, rel=1e-3)


def test_slices_of_operands_and_of_the_result_count_alone():
    computation = (
        "f",
        [
            line("%p", "f32[10,500]{1,0}", "parameter", "0"),
            line("%i", "s32[]", "parameter", "1"),
            line("%q", "f32[10,500]{1,0}", "parameter", "2"),
            line("%s", "f32[1,500]{1,0}", "dynamic-slice", "%q, %i", "dynamic_slice_sizes={1,500}"),
            line("%n", "f32[1,500]{1,0}", "negate", "%s"),
            line("ROOT %u", "f32[10,500]{1,0}", "dynamic-update-slice", "%p, %n, %i"),
        ],
    )
    entry = [
        line("%a", "f32[10,500]{1,0}", "parameter", "0"),
        line("%i", "s32[]", "parameter", "1"),
        line("%out", "f32[10,500]{1,0}", "fusion", "%a, %i, %a", "kind=kLoop, calls=%f"),
    ]
    # 2,000 bytes of the operand, 4,000 of the result and 4 of the index at 0.5 GB/s; 500 negations on one core
    assert estimate(module(entry, computation), rates()).seconds == pytest.approx(6004 / 0.5e9 + 500 * 2e-9, rel=1e-3)


def test_transposed_and_reduced_arrays_have_rates_of_their_own():
    transposed = (
        "t",
        [
            line("%p", "f32[50,10]{1,0}", "parameter", "0"),
            line("%x", "f32[10,50]{0,1}", "transpose", "%p", "dimensions={1,0}"),
            line("ROOT %c", "f32[10,50]{1,0}", "copy", "%x"),
        ],
    )
    reduced = fused(
        "r",
        line("%zero", "f32[]", "parameter", "1"),
        line("ROOT %sum", "f32[]", "reduce", "%p, %zero", "dimensions={0}, to_apply=%add"),
    )
    entry = [line("%m", "f32[50,10]{1,0}", "parameter", "0"), A, line("%z", "f32[]", "constant", "0")]
    add = "add", [line("%x", "f32[]", "parameter", "0"), line("ROOT %y", "f32[]", "add", "%x, %x")]
    first = line("%t1", "f32[10,50]{1,0}", "fusion", "%m", f"kind=kLoop, calls=%t, {ON_ALL_CORES}")
    second = line("%r1", "f32[]", "fusion", "%a, %z", f"kind=kCustom, calls=%r, {LIBRARY}")
    assert estimate(module([*entry, first], transposed), rates()).seconds == pytest.approx(4000 * 5e-9)
    assert estimate(module([*entry, second], reduced, add), rates()).seconds == pytest.approx(2008 * 3e-9, rel=1e-3)


def test_a_product_takes_its_flops_over_the_rate_of_its_layout():
    measured = rates(products={"NN f32": [(1, 1, 1, 2e9)], "TT f32": [(1, 1, 1, 1e9)], "batched NT f32": [(1, 1, 1, 4e9)]})
    arrays = [
        line("%x", "f32[20,30]{1,0}", "parameter", "0"),
        line("%y", "f32[30,40]{1,0}", "parameter", "1"),
        line("%q", "f32[2,3,20,8]{3,2,1,0}", "parameter", "2"),
    ]
    batched = "lhs_batch_dims={0,1}, lhs_contracting_dims={3}, rhs_batch_dims={0,1}, rhs_contracting_dims={3}"
    plain, transposed = (f"lhs_contracting_dims={{{left}}}, rhs_contracting_dims={{{right}}}" for left, right in ((1, 0), (0, 1)))
    cases = {
        line("%d", "f32[20,40]{1,0}", "dot", "%x, %y", plain): (20 * 40 * 30, 2e9),
        line("%d", "f32[30,30]{1,0}", "dot", "%x, %z", transposed): (30 * 30 * 20, 1e9),
        line("%d", "f32[2,3,20,20]{3,2,1,0}", "dot", "%q, %q2", batched): (6 * 20 * 20 * 8, 4e9),
    }
    more = [line("%z", "f32[30,20]{1,0}", "parameter", "3"), line("%q2", "f32[2,3,20,8]{3,2,1,0}", "parameter", "4")]
    for text, (multiplications, rate) in cases.items():
        found = estimate(module([*arrays, *more, text]), measured)
        assert found.flops == 2 * multiplications
        assert found.seconds == pytest.approx(2 * multiplications / rate)


def test_products_of_gpu_libraries_are_read_and_other_calls_are_listed():
    arrays = [line("%x", "bf16[20,30]{1,0}", "parameter", "0"), line("%y", "bf16[40,30]{1,0}", "parameter", "1")]
    contracted = '"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]'
    dimensions = f'"dot_dimension_numbers":{{{contracted},"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}'
    gemm = f'custom_call_target="__cublas$gemm", backend_config={{"gemm_backend_config":{{{dimensions}}}}}'
    call = line("%g", "(bf16[20,40]{1,0}, s8[1024]{0})", "custom-call", "%x, %y", gemm)
    other = line("%k", "bf16[20,30]{1,0}", "custom-call", "%x", 'custom_call_target="__cudnn$fmha"')
    one_gpu = rates(cores=1, products={"NT bf16": [(1, 1, 1, 3e9)]})
    found = estimate(module([*arrays, call, other]), one_gpu)
    assert found.seconds == pytest.approx(2 * 20 * 40 * 30 / 3e9)
    assert found.unmodeled == {"custom-call __cudnn$fmha": 1}
    assert estimate(module([*arrays, call]), rates(cores=1)).unmodeled == {"custom-call __cublas$gemm": 1}  # no rate in bf16


def test_loops_are_multiplied_out_and_the_shorter_branch_counts():
    copy = line("%c", "f32[500]{0}", "copy", "%p", op_name="jit(f)/mlp/copy")
    instruction, *computations = loop("l", 4, [line("%p", "f32[500]{0}", "parameter", "0"), copy])
    found = estimate(module([instruction], *computations), rates())
    assert found.seconds == pytest.approx(4 * (8e-6 + 1e-6))
    assert [(each.name, each.times, each.seconds) for each in found.work] == [("c", 4, pytest.approx(4 * 8e-6 / 2))]
    branches = [fused("short", copy), fused("long", copy, line("%d", "f32[500]{0}", "copy", "%c"))]
    choice = line("%choice", "f32[500]{0}", "conditional", "%i, %a, %a", "branch_computations={%long, %short}")
    assert estimate(module([A, choice], *branches), rates()).seconds == pytest.approx(8e-6)


def test_a_loop_of_unknown_length_is_listed():
    instruction, (name, condition), body = loop("l", 4, [line("%p", "f32[500]{0}", "parameter", "0")])
    unknown = [text for text in condition if "constant" not in text]
    assert estimate(module([instruction], (name, unknown), body), rates()).unmodeled == {"while": 1}


def test_an_all_reduce_takes_the_measured_time_and_a_gather_half_of_it():
    reduce = line("%r", "f32[500]{0}", "all-reduce", "%a", "replica_groups={{0,1}}, to_apply=%add")
    gather = line("%g", "f32[500]{0}", "all-gather", "%h", "replica_groups={{0,1}}, dimensions={0}")
    half = line("%h", "f32[250]{0}", "parameter", "1")
    several = rates(curves=rates().curves | {"all-reduce": [(2000, 6e-6)]})
    assert estimate(module([A, reduce]), several).seconds == pytest.approx(6e-6)
    assert estimate(module([half, gather]), several).seconds == pytest.approx(3e-6)
    scatter = line("%s", "f32[250]{0}", "reduce-scatter", "%a", "replica_groups={{0,1}}, dimensions={0}, to_apply=%add")
    assert estimate(module([A, scatter]), several).seconds == pytest.approx(3e-6)
    assert estimate(module([A, reduce]), rates()).unmodeled == {"all-reduce": 1}
    permute = line("%c", "f32[500]{0}", "collective-permute", "%a", "source_target_pairs={{0,1}}")
    assert estimate(module([A, permute]), several).unmodeled == {"collective-permute": 1}


@pytest.mark.parametrize(("unroll", "parts"), [(1, 1), (2, 1), (1, 2)], ids=["scanned", "unrolled", "micro-batches"])
def test_the_flops_of_a_step_are_those_of_its_products(unroll, parts):
    sizes: dict[str, Any] = {
        "vocab_size": 512,
        "context_length": 32,
        "num_layers": 2,
        "embed_dim": 32,
        "num_heads": 2,
        "mlp_dim": 64,
    }
    model = ModelConfig(**sizes, remat="dots", attention="plain", layer_unroll=unroll)
    train = TrainConfig(batch_size=4, grad_accum_steps=parts)
    config = PretrainConfig(model=model, data=DataConfig(tokenizer=TokenizerConfig(kind="sentencepiece")), train=train)
    text = lower_step(config, make_mesh(config.mesh, jax.devices()[:1])).compile().as_text()
    products = products_of_step(model, 4)
    expected = sum(each.flops * each.repeats for each in products)
    if unroll == 1:  # Without a loop, the compiler merges what is recomputed with the forward pass.
        expected += next(each.flops * each.repeats for each in products if each.name == "scores")
    found = estimate(text, rates())
    assert found.flops == pytest.approx(expected, rel=0.001)
    assert found.unmodeled == {}
    assert sum(found.by_part().values()) == pytest.approx(found.seconds)
    assert {"attention", "projections", "mlp", "loss", "optimizer", "embedding"} <= set(found.by_part())
