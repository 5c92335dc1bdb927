"""Cycles of the TPU kernels: the schedules that libtpu writes, the table of known ones, and the time of a call."""

import json

import pytest

from gpt_jax.plan import kernel_schedules
from gpt_jax.plan.kernel_schedules import TABLE, Schedule, Variant, compile_schedule, count, kernel_cycles, source_hash

V5E = Variant("attention_forward", "TPU v5 lite", "0", "bfloat16", True, False, time=512, dim=64, lacks_head=False, embed=0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "limit"), [("attention_forward", 950), ("attention_backward", 1750)])
def test_attention_on_a_v5e_takes_few_bundles_and_dropout_few_of_them(tpu_devices, name, limit):
    """The limits are bundles for each head and sequence. A grid point computes two heads."""
    with_dropout, without = (compile_schedule(V5E._replace(name=name, dropout=dropout)).bundles / 2 for dropout in (True, False))
    assert 500 < without < with_dropout < 1.15 * without
    assert with_dropout < limit


def test_bundles_in_the_loop_of_a_kernel_count_as_often_as_it_runs():
    program = "\n".join(
        [
            "     0   :  { %s0 = inlined_call_operand.vmem }",
            "   0x1   :  { %1 = vsyncpa [#allocation10], 0 }",
            "   0x2 LB: > { %2 = vpop.f32.mrf.mxu0 ;;  %3 = vpop.f32.mrb.mxu1 }",
            "   0x3 LB: >> { %4 = vpop.f32.mrf.mxu0 }",
            "second_minor_factor: 1 */ }",
            "   0x4   : >> { %5 = sbr.rel (!%p1) target = $region155 }",
            "   0x5 PF: > { %6 = vst [vmem:[#allocation6]] %v1 }",
        ]
    )
    assert count(program, 1.5) == Schedule(bundles=3 + 2 * 1.5, pops=2 + 1.5)


@pytest.mark.parametrize(
    ("schedule", "size", "cycles"),
    [
        (Schedule(1000, 10), 0, 32 * 6 * 1000),  # 32 sequences, 6 pairs of heads
        (Schedule(100, 400), 0, 32 * 6 * 8 * 400 / 4),
        (Schedule(1, 1), 819e6, 197e12 / 131072 / 1000),  # a thousandth of a second at 819 GB/s
    ],
)
def test_a_call_takes_the_largest_of_three_counts(schedule, size, cycles):
    assert kernel_cycles(V5E, 32, 12, size, schedule) == pytest.approx(cycles)


def test_two_cores_share_the_grid_and_an_odd_head_takes_a_group():
    v5p = V5E._replace(chip="TPU v5", lacks_head=True)
    assert kernel_cycles(v5p, 32, 11, 0, Schedule(1000, 0)) == 32 * 6 * 1000 / 2


def test_a_grid_point_of_a_layer_norm_is_a_block_of_rows():
    layer_norm = V5E._replace(name="layer_norm_forward", dim=0, embed=768)
    assert kernel_cycles(layer_norm, 32, 12, 0, Schedule(1000, 0)) == 32 * (512 / 256) * 1000


def test_the_table_is_that_of_the_present_kernels():
    """If a kernel's code has changed, run `python -m benchmarks.tpu_kernels --renew` with each version of libtpu."""
    rows = json.loads(TABLE.read_text())
    assert {row["chip"] for row in rows} >= {"TPU v5 lite", "TPU v5", "TPU v6 lite"}
    assert {row["name"] for row in rows if row["source"] != source_hash(row["name"])} == set()


def test_comments_and_docstrings_do_not_make_the_table_stale(monkeypatch, tmp_path):
    def digest(code):
        (tmp_path / "kernel.py").write_text(code)
        module = type("module", (), {"__file__": str(tmp_path / "kernel.py")})
        monkeypatch.setitem(kernel_schedules.SOURCES, "attention_forward", (module,))
        source_hash.cache_clear()
        return source_hash("attention_forward")

    try:
        code = digest("X = 1\ndef f():\n    return X\n")
        assert digest('"""Text."""\nX = 1  # one\n"""More."""\ndef f():\n    """Text."""\n    return X\n') == code
        assert digest("X = 2\ndef f():\n    return X\n") != code
    finally:
        source_hash.cache_clear()
