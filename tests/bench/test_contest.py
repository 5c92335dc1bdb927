"""Contests: programs take turns in processes of their own, and one that fails does not keep the others from finishing."""

import os
from pathlib import Path
from typing import Any

import pytest

from gpt_jax.bench.contest import Contest, Outcome, Timing, run_contest
from gpt_jax.bench.machine import OtherLoad, num_cores
from gpt_jax.bench.program import Recipe
from gpt_jax.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def find_programs(monkeypatch):
    """Lets worker processes import this project and its tests."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def recipe(function: str, /, **arguments: Any) -> Recipe:
    return Recipe(f"tests.bench.programs:{function}", arguments)


def contest(**programs: Recipe) -> Contest:
    return Contest("test", "", 0, programs)


def test_programs_take_turns_and_each_begins_a_round(tmp_path):
    log = tmp_path / "log"
    programs = {name: recipe("logging", name=name, log=str(log)) for name in "abc"}
    outcome = run_contest(contest(**programs), rounds=3, round_seconds=0.0)
    calls = [line.split()[0] for line in log.read_text().splitlines()]
    assert "".join(calls) == "aabbcc" + "abc" + "bca" + "cab"  # Each runs twice first: to compile, and to choose its count.
    assert {len(timing.seconds) for timing in outcome.timings.values()} == {3}


def test_a_short_program_is_repeated_until_a_round_is_long_enough(tmp_path):
    log = tmp_path / "log"
    run_contest(contest(a=recipe("logging", name="a", log=str(log))), rounds=2, round_seconds=0.05)
    *warm_up, first, second = [int(line.split()[1]) for line in log.read_text().splitlines()]
    assert warm_up == [1, 1]
    assert first == second > 1


def test_every_program_gets_the_same_number_of_threads(tmp_path):
    outcome = run_contest(contest(a=recipe("logging", name="a", log=str(tmp_path / "log"))), rounds=1, round_seconds=0.0)
    assert outcome.timings["a"].details == {"threads": num_cores()}


def test_output_of_a_program_is_not_mistaken_for_an_answer_and_its_files_are_deleted(tmp_path):
    outcome = run_contest(contest(a=recipe("chatty", folder=str(tmp_path))), rounds=2, round_seconds=0.0)
    assert not outcome.timings["a"].failure
    scratch = Path((tmp_path / "scratch").read_text())
    assert not scratch.exists()
    assert not scratch.parent.exists()


def test_peak_memory_is_that_of_each_program_alone():
    outcome = run_contest(contest(a=recipe("large", megabytes=300), b=recipe("large", megabytes=1)), 1, 0.0)
    a, b = (outcome.timings[name].peak_bytes for name in "ab")
    assert 290e6 < a - b < 310e6


@pytest.mark.parametrize(
    ("failing", "reason"),
    [
        (recipe("raising", after=0), "ValueError: two lines"),
        (recipe("raising", after=3), "ValueError: two lines"),  # in the second round
        (recipe("killed"), "killed, probably for lack of memory"),
        (recipe("exiting"), "ended with exit code 3: the last words"),
    ],
)
def test_a_program_that_fails_does_not_keep_others_from_finishing(tmp_path, failing, reason):
    good = recipe("logging", name="a", log=str(tmp_path / "log"))
    outcome = run_contest(contest(bad=failing, good=good), rounds=3, round_seconds=0.0)
    assert outcome.timings["bad"] == Timing(failure=reason)
    assert len(outcome.timings["good"].seconds) == 3
    assert outcome.reference == "good"


def test_a_contest_of_which_every_program_fails_has_no_reference():
    outcome = run_contest(contest(a=recipe("exiting"), b=recipe("raising", after=2)), rounds=2, round_seconds=0.0)
    assert outcome.reference == ""
    assert all(timing.failure for timing in outcome.timings.values())


def test_a_mistake_of_the_user_ends_the_contest(tmp_path):
    good = recipe("logging", name="a", log=str(tmp_path / "log"))
    with pytest.raises(UserError, match=r"^--config: is wrong$"):
        run_contest(contest(good=good, bad=recipe("mistaken")), rounds=1)


def test_the_reference_is_the_fastest_peer_and_ratios_are_medians_over_rounds():
    seconds = {"ours": (1.0, 2.0, 4.0), "slow": (9.0, 9.0, 9.0), "fast": (3.0, 3.0, 4.0)}
    timings = {name: Timing(seconds=values) for name, values in seconds.items()}
    programs = {name: recipe("killed") for name in seconds}
    outcome = Outcome(Contest("test", "", 0, programs, peers=("slow", "fast")), timings, None)
    assert outcome.reference == "fast"
    assert outcome.speed_ratio("ours") == 1.5  # of 3, 1.5 and 1
    assert outcome.speed_ratio("fast") == 1.0
    assert outcome.speed_ratio("ours", "slow") == 4.5
    assert Outcome(Contest("test", "", 0, programs), timings, None).reference == "ours"


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
