"""Several processes: who they are, what they wait for, stopping on request. tests/train/test_processes.py starts real ones."""

import json
import os
import signal
import threading
import time

import jax
import pytest

from gpt_jax.config import DistributedConfig
from gpt_jax.errors import Preempted, TrainingError, UserError
from gpt_jax.runtime import distributed, environment, lock
from gpt_jax.runtime.distributed import StopRequest


@pytest.fixture
def joined(monkeypatch):
    """The arguments of the calls to jax.distributed.initialize, which does nothing."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    return calls


def silent(line):
    raise AssertionError(f"nothing should have been logged, but: {line}")


@pytest.mark.parametrize("found", [{"coordinator_address": "h:1", "num_processes": 4, "process_id": 3}, {}])
def test_a_process_joins_those_that_its_environment_describes(joined, monkeypatch, found):
    monkeypatch.setattr(environment, "cluster_arguments", lambda config: found)
    distributed.start(DistributedConfig(timeout_seconds=7), silent)
    (arguments,) = joined
    assert arguments.pop("initialization_timeout") > 7
    assert arguments == found


def test_a_single_process_joins_nobody_and_needs_its_devices(joined, monkeypatch):
    monkeypatch.setattr(environment, "cluster_arguments", lambda config: None)
    monkeypatch.setattr(environment, "require_devices", lambda: joined.append("devices"))
    distributed.start(DistributedConfig(), silent)
    assert joined == ["devices"]


def test_the_config_goes_before_the_environment(joined, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "other:1")
    distributed.start(DistributedConfig(coordinator="here:99", num_processes=2, process_id=1), silent)
    assert joined == [{"coordinator_address": "here:99", "num_processes": 2, "process_id": 1, "initialization_timeout": 360}]


def test_a_cluster_that_jax_does_not_recognize_is_a_mistake(monkeypatch):
    def initialize(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(environment, "cluster_arguments", lambda config: {})
    with pytest.raises(UserError) as caught:
        distributed.start(DistributedConfig(), silent)
    assert str(caught.value) == (
        "JAX cannot find the processes of this run in the cluster's variables (coordinator_address should be defined.); "
        "set JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID"
    )


def test_a_timeout_while_joining_is_one_line(monkeypatch):
    def initialize(**_):
        raise RuntimeError("DEADLINE_EXCEEDED: barrier timed out\nmore\nlines")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    config = DistributedConfig(coordinator="here:99", num_processes=2, process_id=1, timeout_seconds=5)
    with pytest.raises(TrainingError) as caught:
        distributed.start(config, silent)
    assert str(caught.value) == (
        "process 1 of 2 could not join the others at here:99 within 5 s: DEADLINE_EXCEEDED: barrier timed out"
    )


def test_a_failed_computation_ends_one_of_several_processes_at_once(monkeypatch, capfd):
    def end(code):
        raise SystemExit(code)

    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(SystemExit, match="1"), distributed.exit_if_peer_lost():
        raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed:\nConnection reset by peer")
    assert capfd.readouterr().err == (
        "gpt-jax: process 0 of 4 lost another process (UNKNOWN: Gloo all-reduce failed: Connection reset by peer); "
        "restart all processes to continue from the newest checkpoint\n"
    )


def test_a_lost_lock_ends_one_of_several_processes_at_once(monkeypatch, capfd):
    """The others wait for it in a computation, so it cannot end in the ordinary way."""

    def end(code):
        raise SystemExit(code)

    def lose():
        with distributed.exit_if_peer_lost():
            raise lock.LockLost("run: this process has lost the lock of this folder")

    with pytest.raises(lock.LockLost):
        lose()
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(SystemExit, match="1"):
        lose()
    assert capfd.readouterr().err == "gpt-jax: run: this process has lost the lock of this folder\n"


def test_a_process_that_ends_at_once_releases_its_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "_exit", lambda code: None)
    with lock.locked(tmp_path / "run", silent):
        distributed._exit_now("a reason")
        assert list(tmp_path.iterdir()) == []


def test_a_failed_computation_of_a_single_process_is_its_own_error():
    with pytest.raises(jax.errors.JaxRuntimeError, match="out of memory"), distributed.exit_if_peer_lost():
        raise jax.errors.JaxRuntimeError("out of memory")


def test_a_single_process_waits_for_nobody():
    with distributed.primary_first("anything", silent):
        pass
    assert distributed.broadcast(17) == 17
    assert distributed.is_primary()


@pytest.fixture
def exchange(monkeypatch):
    """A function that makes this process one of three, with its number and the texts that it receives; returns what it does."""

    def join(number, received):
        actions = []
        monkeypatch.setattr(jax, "process_count", lambda: 3)
        monkeypatch.setattr(jax, "process_index", lambda: number)
        monkeypatch.setattr(distributed, "_exchange", lambda text, what, log: actions.append((text, what)) or received)
        return actions

    return join


def test_the_first_process_runs_before_the_others_which_then_run(exchange):
    actions = exchange(0, ["", "", ""])
    with distributed.primary_first("the store", silent):
        actions.append("body")
    assert actions == ["body", ("", "the other 2 processes to reach the store")]
    actions = exchange(2, ["", "", ""])
    with distributed.primary_first("the store", silent):
        actions.append("body")
    assert actions == [("", "process 0 to finish the store"), "body"]


def test_a_mistake_that_the_first_process_finds_ends_all_of_them(exchange):
    def run():
        with distributed.primary_first("the store", silent):
            actions.append("body")
            raise UserError("the text is empty")

    actions = exchange(0, ["", "", ""])
    with pytest.raises(UserError, match="the text is empty"):
        run()
    assert actions == ["body", ("the text is empty", "the other 2 processes to reach the store")]
    actions = exchange(1, ["the text is empty", "", ""])
    with pytest.raises(UserError, match="the text is empty"):
        run()
    assert actions == [("", "process 0 to finish the store")]


def test_the_lock_of_a_folder_is_held_by_the_first_process_only(exchange, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "broadcast", lambda value: sent.append(value) or 1)
    monkeypatch.setattr(distributed.StopRequest, "after_update", lambda self: False)
    for number in (0, 1):
        sent = []
        actions = exchange(number, ["", "", ""])
        with distributed.locked(tmp_path, silent):
            assert len(list(tmp_path.glob("lock.*"))) == 1 - number
        assert sent == [1 - number]
        assert len(actions) == 1
    assert list(tmp_path.iterdir()) == []


def test_all_processes_wait_for_the_lock_and_can_be_stopped_meanwhile(exchange, tmp_path, monkeypatch):
    """A signal may reach any of them; JAX's service tells all of them at the same count."""
    monkeypatch.setattr(distributed, "broadcast", lambda value: 0)
    monkeypatch.setattr(lock, "pause", lambda: counts.append("pause"))
    monkeypatch.setattr(
        distributed.multihost_utils, "reached_preemption_sync_point", lambda count: counts.append(count) or count == 3
    )
    counts = []
    exchange(1, ["", "", ""])
    with pytest.raises(Preempted, match="stop requested while waiting for the lock"), distributed.locked(tmp_path, silent):
        pass
    assert counts == [1, "pause", 2, "pause", 3]


def test_a_mistake_with_the_lock_ends_all_processes(exchange, tmp_path):
    with lock.locked(tmp_path, silent):
        actions = exchange(0, ["", "", ""])
        with pytest.raises(UserError, match="in use by process") as caught, distributed.locked(tmp_path, silent):
            pass
        assert actions[0][0] == str(caught.value)
    exchange(1, ["run: in use by process 7", "", ""])
    with pytest.raises(UserError, match="in use by process 7"), distributed.locked(tmp_path, silent):
        pass


@pytest.fixture
def disagreement(monkeypatch):
    """A function from the facts of each process, whose hosts are h0, h1, ..., to the error of all of them; empty: none."""

    def compare(*facts):
        texts = [json.dumps({"host": f"h{number}", **own}) for number, own in enumerate(facts)]
        monkeypatch.setattr(jax, "process_count", lambda: len(texts))
        monkeypatch.setattr(distributed, "_exchange", lambda text, what, log: texts)
        messages = set()
        for own in facts:  # as each process does
            try:
                distributed.require_agreement(own, silent)
                messages.add("")
            except UserError as error:
                messages.add(str(error).removeprefix("the processes of this run do not agree: "))
        (message,) = messages
        return message.removesuffix("; run the same command on all hosts")

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
def test_processes_that_differ_from_most_are_named(disagreement, values, expected):
    assert disagreement(*({"commit": "c", "x": value} for value in values)) == expected


def test_each_difference_is_named_with_its_own_majority(disagreement):
    assert disagreement({"x": "7", "y": "1"}, {"x": "3", "y": "1"}, {"x": "3", "y": "2"}) == (
        "process 0 (h0) has x 7, the others 3; process 2 (h2) has y 2, the others 1"
    )


@pytest.mark.parametrize("absent", [{}, {"libtpu": ""}])
def test_a_fact_that_one_process_lacks_is_a_difference_whichever_process_it_is(disagreement, absent):
    assert disagreement(absent, {"libtpu": "1"}, {"libtpu": "1"}) == "process 0 (h0) has libtpu none, the others 1"
    assert disagreement({"libtpu": "1"}, {"libtpu": "1"}, absent) == "process 2 (h2) has libtpu none, the others 1"
    assert disagreement(absent, {"libtpu": "1"}) == "process 1 (h1) has libtpu 1, process 0 (h0) none"


def test_a_long_wait_is_explained_again_and_again():
    lines = []
    with distributed.waiting("the others", lines.append, every=0.05):
        limit = time.monotonic() + 20
        while len(lines) < 2 and time.monotonic() < limit:
            time.sleep(0.01)
    count = len(lines)
    assert count >= 2
    assert lines[0] == "still waiting for the others (0 s)"
    time.sleep(0.2)
    assert len(lines) == count


def test_a_short_wait_is_not_mentioned():
    def reminding():
        return any("remind" in thread.name for thread in threading.enumerate())

    with distributed.waiting("the others", silent):
        assert reminding()
    assert not reminding()


# -- stopping ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_request_to_stop_after_the_update(number):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with StopRequest() as stop:
        assert not stop.after_update()
        os.kill(os.getpid(), number)
        assert stop.after_update()
        assert stop.after_update()
    assert {number: signal.getsignal(number) for number in before} == before
    with StopRequest() as stop:
        assert not stop.after_update()


def test_a_second_interrupt_stops_at_once():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.after_update()
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the signal is noticed between two statements
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_outside_the_main_thread_signals_are_left_alone():
    before = signal.getsignal(signal.SIGTERM)
    during = []

    def body():
        with StopRequest() as stop:
            during.append((stop.after_update(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert during == [(False, before)]


def test_several_processes_count_their_updates_from_1_whatever_step_they_resume_at(monkeypatch):
    """JAX's service stops all processes at the count after the largest that it has heard of, which is 0 at first."""
    counts = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        distributed.multihost_utils, "reached_preemption_sync_point", lambda count: counts.append(count) or count == 3
    )
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert signal.getsignal(signal.SIGTERM) == before, "the service has its own handler of SIGTERM"
        assert [stop.after_update(), stop.after_update(), stop.after_update()] == [False, False, True]
    assert counts == [1, 2, 3]
