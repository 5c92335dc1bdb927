"""Comparisons: programs take turns in processes of their own, and one that fails does not keep the others from finishing."""

import os
from pathlib import Path
from typing import Any

import pytest

from gpt_jax.bench.comparison import Comparison, Result, Timing, run_comparison
from gpt_jax.bench.program import ProgramSpec
from gpt_jax.errors import UserError
from gpt_jax.runtime.processor import OtherLoad, num_cores

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def find_programs(monkeypatch):
    """Lets worker processes import this project and its tests."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def spec(function: str, /, **arguments: Any) -> ProgramSpec:
    return ProgramSpec(f"tests.bench.programs:{function}", arguments)


def comparison(**programs: ProgramSpec) -> Comparison:
    return Comparison("test", "", 0, programs)


def test_programs_take_turns_and_each_begins_a_round(tmp_path):
    log = tmp_path / "log"
    programs = {name: spec("logging", name=name, log=str(log)) for name in "abc"}
    result = run_comparison(comparison(**programs), rounds=3, round_seconds=0.0)
    calls = [line.split()[0] for line in log.read_text().splitlines()]
    assert "".join(calls) == "aabbcc" + "abc" + "bca" + "cab"  # Each runs twice first: to compile, and to choose its count.
    assert {len(timing.seconds) for timing in result.timings.values()} == {3}


def test_a_short_program_is_repeated_until_a_round_is_long_enough(tmp_path):
    log = tmp_path / "log"
    run_comparison(comparison(a=spec("logging", name="a", log=str(log))), rounds=2, round_seconds=0.05)
    *warm_up, first, second = [int(line.split()[1]) for line in log.read_text().splitlines()]
    assert warm_up == [1, 1]
    assert first == second > 1


def test_every_program_gets_the_same_number_of_threads(tmp_path):
    result = run_comparison(comparison(a=spec("logging", name="a", log=str(tmp_path / "log"))), rounds=1, round_seconds=0.0)
    assert result.timings["a"].details == {"threads": num_cores()}


@pytest.mark.parametrize(
    ("peers", "visible", "details"),
    [
        ((), "", {"gpu": -1.0}),
        ((), "2,3", {"gpu": 2.0, "entries": 2.0}),
        (("a",), "", {"gpu": 0.0, "entries": 1.0}),
        (("a",), "2,3", {"gpu": 2.0, "entries": 1.0}),
    ],
)
def test_programs_share_one_gpu_if_there_are_peers(peers, visible, details, monkeypatch):
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    else:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    programs = {name: spec("visible") for name in "ab"}
    result = run_comparison(Comparison("test", "", 0, programs, peers), rounds=1, round_seconds=0.0)
    assert [timing.details for timing in result.timings.values()] == [details, details]
    assert {(timing.device, timing.num_devices) for timing in result.timings.values()} == {("a GPU", 3)}


def test_output_of_a_program_is_not_mistaken_for_an_answer_and_its_files_are_deleted(tmp_path):
    result = run_comparison(comparison(a=spec("chatty", folder=str(tmp_path))), rounds=2, round_seconds=0.0)
    assert not result.timings["a"].failure
    scratch = Path((tmp_path / "scratch").read_text())
    assert not scratch.exists()
    assert not scratch.parent.exists()


def test_peak_memory_is_that_of_each_program_alone():
    result = run_comparison(comparison(a=spec("large", megabytes=300), b=spec("large", megabytes=1)), 1, 0.0)
    a, b = (result.timings[name].peak_bytes for name in "ab")
    assert 290e6 < a - b < 310e6


@pytest.mark.parametrize(
    ("failing", "reason"),
    [
        (spec("raising", after=0), "ValueError: two lines"),
        (spec("raising", after=3), "ValueError: two lines"),  # in the second round
        (spec("killed"), "killed, probably for lack of memory"),
        (spec("exiting"), "ended with exit code 3: the last words"),
    ],
)
def test_a_program_that_fails_does_not_keep_others_from_finishing(tmp_path, failing, reason):
    good = spec("logging", name="a", log=str(tmp_path / "log"))
    result = run_comparison(comparison(bad=failing, good=good), rounds=3, round_seconds=0.0)
    assert result.timings["bad"] == Timing(failure=reason)
    assert len(result.timings["good"].seconds) == 3
    assert result.reference == "good"


def test_a_comparison_of_which_every_program_fails_has_no_reference():
    result = run_comparison(comparison(a=spec("exiting"), b=spec("raising", after=2)), rounds=2, round_seconds=0.0)
    assert result.reference == ""
    assert all(timing.failure for timing in result.timings.values())


def test_a_mistake_of_the_user_ends_the_comparison(tmp_path):
    good = spec("logging", name="a", log=str(tmp_path / "log"))
    with pytest.raises(UserError, match=r"^--config: is wrong$"):
        run_comparison(comparison(good=good, bad=spec("mistaken")), rounds=1)


def test_the_reference_is_the_fastest_peer_and_ratios_are_medians_over_rounds():
    seconds = {"ours": (1.0, 2.0, 4.0), "slow": (9.0, 9.0, 9.0), "fast": (3.0, 3.0, 4.0)}
    timings = {name: Timing(seconds=values) for name, values in seconds.items()}
    programs = {name: spec("killed") for name in seconds}
    result = Result(Comparison("test", "", 0, programs, peers=("slow", "fast")), timings, None)
    assert result.reference == "fast"
    assert result.speed_ratio("ours") == 1.5  # of 3, 1.5 and 1
    assert result.speed_ratio("fast") == 1.0
    assert result.speed_ratio("ours", "slow") == 4.5
    assert Result(Comparison("test", "", 0, programs), timings, None).reference == "ours"


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux counts the processor time of all programs")
def test_own_processes_do_not_count_as_other_load():
    begin = os.times()
    own, all_ = OtherLoad([os.getpid()]), OtherLoad([])
    while os.times().user - begin.user < 0.5:
        pass
    with_own, without = all_.cores(), own.cores()
    assert with_own is not None
    assert without is not None
    assert with_own - without > 0.1  # about one core, or less if other programs take turns with this one
