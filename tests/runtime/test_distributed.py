"""Several processes: who they are, waiting with a word, stopping on request. (tests/train/test_processes.py starts some.)"""

import json
import os
import signal
import threading
import time

import jax
import pytest

from gpt_jax.config import DistributedConfig
from gpt_jax.errors import TrainingError, UserError
from gpt_jax.runtime import distributed
from gpt_jax.runtime.distributed import StopRequest

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JOB_COMPLETION_INDEX")


@pytest.fixture
def joined(monkeypatch):
    """The arguments of the calls to jax.distributed.initialize, which does nothing; no cluster's variables are set."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    for name in (*NAMES, "SLURM_STEP_NUM_TASKS", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    return calls


def silent(line):
    raise AssertionError(f"nothing should have been said, but: {line}")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}, ("h:1", 4, 3)),
        ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "4", "JOB_COMPLETION_INDEX": "0"}, ("h:1", 4, 0)),
        ({"SLURM_STEP_NUM_TASKS": "2"}, ()),  # found by JAX itself
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}, ()),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),  # alone: nothing to join
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        ({}, None),
    ],
)
def test_a_process_finds_its_place(joined, monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    distributed.start(DistributedConfig(timeout_seconds=7), silent)
    if expected is None:
        assert joined == []
        return
    (arguments,) = joined
    assert arguments.pop("initialization_timeout") > 7
    assert tuple(arguments.get(name) for name in ("coordinator_address", "num_processes", "process_id") if arguments) == expected


def test_the_config_goes_before_the_environment(joined, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "other:1")
    distributed.start(DistributedConfig(coordinator="here:99", num_processes=2, process_id=1), silent)
    assert joined == [
        {"coordinator_address": "here:99", "num_processes": 2, "process_id": 1, "initialization_timeout": 360},
    ]


@pytest.mark.parametrize("variables", [{}, {"JAX_NUM_PROCESSES": "2"}, {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "first"}])
def test_a_coordinator_without_numbers_is_refused(joined, monkeypatch, variables):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "h:1")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES and JAX_PROCESS_ID must be set to whole numbers"):
        distributed.start(DistributedConfig(), silent)
    assert joined == []


def test_others_that_do_not_come_are_one_line(monkeypatch):
    def initialize(**_):
        raise RuntimeError("DEADLINE_EXCEEDED: barrier timed out\nmore\nlines")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    config = DistributedConfig(coordinator="here:99", num_processes=2, process_id=1, timeout_seconds=5)
    with pytest.raises(TrainingError) as caught:
        distributed.start(config, silent)
    assert str(caught.value) == (
        "process 1 of 2 could not join the others at here:99 in 5 s: DEADLINE_EXCEEDED: barrier timed out"
    )


def test_a_failed_computation_ends_one_of_several_processes_at_once(monkeypatch, capfd):
    def end(code):
        raise SystemExit(code)

    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(SystemExit, match="1"), distributed.losing_peers():
        raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed:\nConnection reset by peer")
    assert capfd.readouterr().err == (
        "gpt-jax: process 0 of 4 lost another one (UNKNOWN: Gloo all-reduce failed: Connection reset by peer); "
        "start all of them again to go on from the newest checkpoint\n"
    )


def test_a_failed_computation_of_a_single_process_is_its_own_error():
    with pytest.raises(jax.errors.JaxRuntimeError, match="out of memory"), distributed.losing_peers():
        raise jax.errors.JaxRuntimeError("out of memory")


def test_a_single_process_waits_for_nobody():
    with distributed.first_alone("anything", silent):
        pass
    assert distributed.agree(17) == 17
    assert distributed.is_primary()


@pytest.fixture
def disagreement(monkeypatch):
    """A function from what each process says (its host is h0, h1, ...) to what is raised; empty: nothing."""

    def compare(*facts):
        told = [json.dumps({"host": f"h{number}", **one}) for number, one in enumerate(facts)]
        monkeypatch.setattr(jax, "process_count", lambda: len(told))
        monkeypatch.setattr(distributed, "_told", lambda own, what, log: told)
        said = set()
        for one in facts:  # each of them compares
            try:
                distributed.require_agreement(one, silent)
                said.add("")
            except UserError as error:
                said.add(str(error).removeprefix("the processes of this run do not agree: "))
        (same,) = said
        return same.removesuffix("; start the same on all hosts")

    return compare


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ("333", ""),
        ("37", "process 1 (h1) has x 7, process 0 (h0) 3"),
        ("337", "process 2 (h2) has x 7, the others 3"),
        ("733", "process 0 (h0) has x 7, the others 3"),
        ("73833", "process 0 (h0) has x 7, process 2 (h2) 8, the others 3"),
        ("7337", "process 1 (h1) has x 3, process 2 (h2) 3, the others 7"),
        ("378", "process 1 (h1) has x 7, process 2 (h2) 8, process 0 (h0) 3"),
    ],
)
def test_those_that_differ_from_most_are_named(disagreement, values, expected):
    assert disagreement(*({"commit": "c", "x": value} for value in values)) == expected


def test_each_difference_is_named_with_its_own_majority(disagreement):
    assert disagreement({"x": "7", "y": "1"}, {"x": "3", "y": "1"}, {"x": "3", "y": "2"}) == (
        "process 0 (h0) has x 7, the others 3; process 2 (h2) has y 2, the others 1"
    )


@pytest.mark.parametrize("nothing", [{}, {"libtpu": ""}])
def test_what_one_process_lacks_is_a_difference_whoever_it_is(disagreement, nothing):
    assert disagreement(nothing, {"libtpu": "1"}, {"libtpu": "1"}) == "process 0 (h0) has libtpu none, the others 1"
    assert disagreement({"libtpu": "1"}, {"libtpu": "1"}, nothing) == "process 2 (h2) has libtpu none, the others 1"
    assert disagreement(nothing, {"libtpu": "1"}) == "process 1 (h1) has libtpu 1, process 0 (h0) none"


def test_a_long_wait_says_what_it_waits_for():
    said = []
    with distributed.waiting("the others", said.append, every=0.05):
        limit = time.monotonic() + 20
        while len(said) < 2 and time.monotonic() < limit:
            time.sleep(0.01)
    count = len(said)
    assert count >= 2
    assert said[0] == "still waiting for the others (0 s)"
    time.sleep(0.2)
    assert len(said) == count


def test_a_short_wait_says_nothing():
    with distributed.waiting("the others", silent):
        pass
    assert not any(thread.daemon and "remind" in thread.name for thread in threading.enumerate())


# -- stopping ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_request_to_stop_after_the_update(number):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with StopRequest() as stop:
        assert not stop.now()
        os.kill(os.getpid(), number)
        assert stop.now()
        assert stop.now()
    assert {number: signal.getsignal(number) for number in before} == before
    with StopRequest() as stop:
        assert not stop.now()


def test_a_second_interrupt_stops_at_once():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.now()
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the signal is noticed between two statements
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_outside_the_main_thread_signals_are_left_alone():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def body():
        with StopRequest() as stop:
            seen.append((stop.now(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def test_several_processes_count_their_updates_from_1_whatever_step_they_resume_at(monkeypatch):
    """JAX's service has all processes stop at the count after the largest it has heard of, which is 0 at first."""
    asked = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        distributed.multihost_utils, "reached_preemption_sync_point", lambda count: asked.append(count) or count == 3
    )
    with StopRequest() as stop:
        assert [stop.now(), stop.now(), stop.now()] == [False, False, True]
    assert asked == [1, 2, 3]
