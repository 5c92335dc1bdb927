"""Reports of comparisons: the table, its remarks, and the JSON."""

import json

import pytest

from gpt_jax.bench import report
from gpt_jax.bench.comparison import Comparison, Result, Timing, failed
from gpt_jax.bench.program import ProgramSpec
from gpt_jax.errors import UserError
from gpt_jax.runtime.processor import num_cores

SPEC = ProgramSpec("none:none", {})


def result(other_cores: float | None = 0.0, **comparison: object) -> Result:
    programs = dict.fromkeys(("ours", "theirs", "broken"), SPEC)
    timings = {
        "ours": Timing(3.0, (0.5, 0.25, 1.0), 2_000_000_000, {"padding, %": 12.3456}),
        "theirs": Timing(1.0, (1.0, 1.0, 1.0), 1_000_000_000),
        "broken": Timing(failure="killed, probably for lack of memory"),
    }
    arguments = {"title": "a test", "unit": "tokens", "work": 1000, "programs": programs, "peers": ("theirs",), "flops": 2e9}
    return Result(Comparison(**arguments | comparison), timings, other_cores)  # type: ignore[arg-type]


def test_the_table_has_rates_their_range_and_the_ratio_to_the_peer(capsys):
    report.print_result(result())
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["", "a test"]
    assert lines[2].split("  ")[0] == "program"
    assert lines[3].split() == ["ours", "2,000", "1,000", "4,000", "0.500", "4.00", "2.00", "3.0", "2.00"]
    assert lines[4].split() == ["theirs", "1,000", "1,000", "1,000", "1.00", "2.00", "1.00", "1.0", "1.00"]
    assert "broken failed: killed, probably for lack of memory" in lines
    assert "  ours, padding, %: 12.3" in lines


def test_without_a_unit_the_table_has_seconds(capsys):
    report.print_result(result(unit="", work=0, flops=0.0))
    header, ours = capsys.readouterr().out.splitlines()[2:4]
    assert header.split()[:4] == ["program", "s", "min", "max"]
    assert ours.split() == ["ours", "0.500", "0.250", "1.00", "2.00", "3.0", "2.00"]


def test_a_part_is_a_share_of_the_first_program(capsys):
    report.print_result(result(part="theirs"))
    assert "theirs: 200% of the time of ours" in capsys.readouterr().out


def test_other_programs_are_mentioned(capsys):
    report.print_result(result(other_cores=0.05 * num_cores()))
    assert "Other programs" not in capsys.readouterr().out
    report.print_result(result(other_cores=0.5 * num_cores()))
    assert "Other programs used" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("device", "count", "remark"),
    [
        ("NVIDIA H100 80GB HBM3", 1, ["ours: 1 x NVIDIA H100 80GB HBM3, MFU 50.0% of the bfloat16 peak"]),
        ("NVIDIA H100 80GB HBM3", 2, ["ours: 2 x NVIDIA H100 80GB HBM3, MFU 25.0% of the bfloat16 peak"]),
        ("an unknown chip", 2, ["ours: 2 x an unknown chip"]),
        ("", 1, []),
    ],
)
def test_accelerators_are_named_with_their_utilization(device, count, remark, capsys):
    comparison = Comparison("a test", "", 0, {"ours": SPEC}, flops=989.4e12 / 4)
    report.print_result(Result(comparison, {"ours": Timing(1.0, (0.5,), device=device, num_devices=count)}, None))
    assert capsys.readouterr().out.splitlines()[4:] == remark


def test_a_comparison_without_timings_has_its_reason(capsys, tmp_path):
    result = failed("a test", UserError("--config: is wrong"))
    assert result.has_failures
    report.print_result(result)
    assert capsys.readouterr().out == "\na test\nfailed: --config: is wrong\n"
    report.write_json(tmp_path / "out.json", {}, [result])
    [comparison] = json.loads((tmp_path / "out.json").read_text())["comparisons"]
    assert (comparison["failure"], comparison["programs"]) == ("--config: is wrong", {})


def test_the_json_has_every_round(tmp_path):
    facts = report.describe_run([])
    assert {"date", "machine", "load_before", "versions", "commit", "command"} <= facts.keys()
    report.write_json(tmp_path / "out.json", facts, [result()])
    [comparison] = json.loads((tmp_path / "out.json").read_text())["comparisons"]
    assert comparison["reference"] == "theirs"
    assert comparison["programs"]["ours"]["seconds"] == [0.5, 0.25, 1.0]
    assert comparison["programs"]["ours"]["speed_ratio"] == 2.0
    assert comparison["programs"]["broken"] == {"failure": "killed, probably for lack of memory"}
