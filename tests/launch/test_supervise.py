"""The decision after each exit code, with stand-ins for the processes of a training."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from gpt_jax.errors import UserError
from gpt_jax.launch import supervise
from gpt_jax.launch.supervise import (
    Outcome,
    RestartBudget,
    Supervisor,
    classify_exit,
    count_steps,
    describe_exit,
    find_workdir,
    spawn,
)

# Each attempt takes the next word of its plan, the last one repeatedly: an exit code; `kill` to end by SIGKILL; `save` to wait
# for SIGTERM and end with 42; or `deaf` to ignore SIGTERM. In `7:1`, the number before the colon is the step that it reaches.
STAND_IN = """
import json, os, signal, sys, time
folder, number, count, plan = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4].split()
signal.alarm(60)
signals = []
signal.signal(signal.SIGTERM, lambda *_: signals.append(1))
with open(f"{folder}/attempts-{number}", "a+") as file:
    file.write(".")
    file.seek(0)
    word = plan[min(len(file.read()), len(plan)) - 1]
step, _, end = word.rpartition(":")
if step:
    with open(f"{folder}/metrics.jsonl", "a") as file:
        file.write("\\n" + json.dumps({"kind": "train", "step": int(step)}) + "\\n" + '{"kind": "tra')
open(f"{folder}/ready-{number}", "w").close()
while not all(os.path.exists(f"{folder}/ready-{other}") for other in range(count)):
    time.sleep(0.01)
if end == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
while end == "deaf" or (end == "save" and not signals):
    time.sleep(0.01)
open(f"{folder}/saved-{number}", "w").close()
sys.exit(42 if end == "save" else int(end))
"""


class Stage:
    """A supervisor of stand-ins, with one plan for each process, and the lines that it reports."""

    def __init__(self, folder, *plans, preemptions=9, crashes=2, grace=5.0):
        self.folder, self.plans, self.lines, self.now = folder, plans, [], 0.0
        self.supervisor = Supervisor(
            self.start, RestartBudget(preemptions, crashes), grace, lambda: count_steps(str(folder)), say=self.lines.append
        )
        self.processes = []

    def start(self):
        command = [sys.executable, "-SEc", STAND_IN, str(self.folder)]
        count = str(len(self.plans))
        self.processes = [spawn([*command, str(number), count, plan]) for number, plan in enumerate(self.plans)]
        return self.processes

    def skip_backoff(self):
        """Lets the delays before restarts pass at once; processes still take real time."""

        def sleep(seconds):
            if all(process.poll() is not None for process in self.processes):
                self.now += seconds
            else:
                time.sleep(0.01)

        self.supervisor.sleep = sleep
        self.supervisor.clock = lambda: self.now + time.monotonic()
        return self

    def when_ready(self, act):
        """Calls `act` once all stand-ins have reached their step."""

        def wait():
            while not all((self.folder / f"ready-{number}").exists() for number in range(len(self.plans))):
                time.sleep(0.01)
            act()

        threading.Thread(target=wait).start()
        return self

    def attempts(self, number=0):
        return len((self.folder / f"attempts-{number}").read_text())


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 0], (Outcome.DONE, 0)),
        ([0, 2, 1], (Outcome.MISTAKE, 2)),
        ([42, 1], (Outcome.PREEMPTED, 42)),
        ([1, -9], (Outcome.CRASHED, -9)),
        ([1, 1], (Outcome.CRASHED, 1)),
    ],
)
def test_exit_codes_are_classified(codes, expected):
    assert classify_exit(codes) == expected


def test_signals_are_described_by_their_names():
    assert [describe_exit(code) for code in (1, -15, 143)] == ["exit 1", "killed by SIGTERM", "killed by SIGTERM"]
    assert describe_exit(137) == describe_exit(-9) == "killed by SIGKILL, as when memory runs out"


def test_delays_double_until_a_step_is_gained():
    budget = RestartBudget(preemptions=100, crashes=100)
    assert [budget.decide(Outcome.PREEMPTED, "exit 42", 7).delay for _ in range(4)] == [1, 2, 4, 8]
    assert budget.decide(Outcome.CRASHED, "exit 1", 8).delay == 1
    assert [budget.decide(Outcome.PREEMPTED, "exit 42", None).delay for _ in range(12)][-3:] == [300, 300, 300]


def test_the_supervisor_ends_when_the_run_is_done(tmp_path):
    stage = Stage(tmp_path, "0", "0")
    assert stage.supervisor.run() == 0
    assert stage.lines == ["done (preemptions: 0, crashes: 0)"]


def test_preemptions_and_crashes_are_counted_separately(tmp_path):
    stage = Stage(tmp_path, "3:42 5:1 5:42 6:kill 8:42 8:0").skip_backoff()
    assert stage.supervisor.run() == 0
    assert stage.lines == [
        "preempted (exit 42) at step 3: preemption restart 1 of 9 in 1 s",
        "crashed (exit 1) at step 5: crash restart 1 of 2 in 1 s",
        "preempted (exit 42) at step 5: preemption restart 2 of 9 in 2 s",
        "crashed (killed by SIGKILL, as when memory runs out) at step 6: crash restart 2 of 2 in 1 s",
        "preempted (exit 42) at step 8: preemption restart 3 of 9 in 1 s",
        "done (preemptions: 3, crashes: 2)",
    ]


@pytest.mark.parametrize(
    ("plan", "attempts", "last"),
    [
        ("1:1 2:1 3:1 4:1", 3, "crashed (exit 1) at step 3: giving up, the budget of 2 crash restarts is spent"),
        ("1:42 2:42", 2, "preempted (exit 42) at step 2: giving up, the budget of 1 preemption restarts is spent"),
    ],
)
def test_the_supervisor_gives_up_when_a_budget_is_spent(tmp_path, plan, attempts, last):
    stage = Stage(tmp_path, plan, preemptions=1).skip_backoff()
    assert stage.supervisor.run() == 1
    assert stage.lines[-1] == last
    assert stage.attempts() == attempts


def test_the_supervisor_gives_up_when_a_crash_repeats_at_one_step(tmp_path):
    stage = Stage(tmp_path, "3:1 5:1 5:42 5:1 9:0", crashes=9).skip_backoff()
    assert stage.supervisor.run() == 1
    assert stage.lines[-1] == "crashed (exit 1) at step 5, like the crash before it and without progress: giving up"
    assert stage.attempts() == 4


def test_a_different_crash_at_the_same_step_is_not_a_repetition(tmp_path):
    stage = Stage(tmp_path, "5:1 5:3 5:1 5:0", crashes=9).skip_backoff()
    assert stage.supervisor.run() == 0


def test_a_mistake_is_not_retried(tmp_path):
    stage = Stage(tmp_path, "2")
    assert stage.supervisor.run() == 2
    assert stage.lines == ["giving up: exit 2 is a mistake in the command or its input"]
    assert stage.attempts() == 1


STOPPED = "stopped on request; run the same command again to continue from the newest checkpoint"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_processes_have_time_to_save(tmp_path, number):
    before = signal.getsignal(number)
    stage = Stage(tmp_path, "save", "save").when_ready(lambda: os.kill(os.getpid(), number))
    assert stage.supervisor.run() == 42
    assert stage.lines == ["stop requested; waiting up to 5 s for running processes (2) to save and end", STOPPED]
    assert (tmp_path / "saved-0").exists()
    assert (tmp_path / "saved-1").exists()
    assert signal.getsignal(number) == before


def test_processes_that_do_not_end_in_time_are_killed(tmp_path):
    stage = Stage(tmp_path, "save", "deaf", grace=0.3).when_ready(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert stage.supervisor.run() == 42
    assert stage.lines[1] == "killing processes that did not end in time (1)"
    assert [process.returncode for process in stage.processes] == [42, -signal.SIGKILL]


def test_a_second_signal_kills_at_once(tmp_path):
    stage = Stage(tmp_path, "deaf", grace=60)
    say = stage.lines.append

    def again(line):
        say(line)
        if line.startswith("stop requested"):
            os.kill(os.getpid(), signal.SIGINT)

    stage.supervisor.say = again
    stage.when_ready(lambda: os.kill(os.getpid(), signal.SIGINT))
    started = time.monotonic()
    assert stage.supervisor.run() == 42
    assert time.monotonic() - started < 30


def test_a_signal_ends_the_delay_before_a_restart(tmp_path):
    stage = Stage(tmp_path, "1:1")
    stage.supervisor.sleep = lambda seconds: (
        os.kill(os.getpid(), signal.SIGTERM) if len(stage.lines) == 1 else time.sleep(seconds)
    )
    assert stage.supervisor.run() == 42
    assert stage.lines[-1] == STOPPED
    assert stage.attempts() == 1


def test_when_one_process_dies_all_are_restarted(tmp_path):
    stage = Stage(tmp_path, "save 0", "4:kill 0").skip_backoff()
    assert stage.supervisor.run() == 0
    killed = "killed by SIGKILL, as when memory runs out"
    assert stage.lines == [
        f"process 1 ended ({killed}); waiting up to 5 s for running processes (1) to save and end",
        f"crashed ({killed}) at step 4: crash restart 1 of 2 in 1 s",  # not preempted, as the exit code of process 0 suggests
        "done (preemptions: 0, crashes: 1)",
    ]
    assert (stage.attempts(0), stage.attempts(1)) == (2, 2)


def test_a_process_that_is_done_waits_for_the_others(tmp_path):
    stage = Stage(tmp_path, "0", "save").when_ready(lambda: stage.processes[0].wait() or stage.processes[1].terminate())
    stage.supervisor.budget = RestartBudget(0, 0)
    assert stage.supervisor.run() == 1
    assert stage.lines == ["preempted (exit 42) at step 0: giving up, the budget of 0 preemption restarts is spent"]


def test_no_process_outlives_an_error_in_the_supervisor(tmp_path):
    stage = Stage(tmp_path, "deaf")

    def fail():
        raise KeyError("tick")

    stage.supervisor.tick = fail
    with pytest.raises(KeyError):
        stage.supervisor.run()
    assert stage.processes[0].poll() == -signal.SIGKILL


def test_the_steps_of_all_runs_in_the_folder_are_counted(tmp_path):
    assert count_steps(str(tmp_path)) == 0
    for seed, step in ((0, 30), (1, 4)):
        (tmp_path / f"seed-{seed}").mkdir()
        lines = [json.dumps({"step": number}) for number in range(step + 1)]
        (tmp_path / f"seed-{seed}" / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 99')
    assert count_steps(str(tmp_path)) == 34
    assert count_steps("") is None
    assert count_steps("gs://bucket/run") is None


def test_the_command_supervises_a_verb(tmp_path, monkeypatch, capsys):
    commands = []

    def run(command, env):
        commands.append(command)
        assert env == {**os.environ, "GPT_JAX_WAIT_FOR_LOCK": "1"}
        return spawn([sys.executable, "-SEc", "raise SystemExit(2)"])

    monkeypatch.setattr(supervise, "spawn", run)
    assert supervise.supervise(["pretrain", "smoke", "--workdir", str(tmp_path)], 5, 1, 1) == 2
    assert commands == [[sys.executable, "-m", "gpt_jax", "pretrain", "smoke", "--workdir", str(tmp_path)]]
    assert "supervise: giving up: exit 2 is a mistake" in capsys.readouterr().err
    with pytest.raises(UserError, match="name the command to run"):
        supervise.supervise([], 5, 1, 1)


def test_the_folder_of_the_run_is_found_in_the_supervised_command():
    assert find_workdir(["pretrain", "smoke", "--workdir", "RUN", "--mesh.data", "-1"]) == "RUN"
    assert find_workdir(["pretrain", "smoke", "--workdir=RUN"]) == "RUN"
    assert find_workdir(["pretrain", "smoke", "--workdir"]) == ""
    assert find_workdir(["demo"]) == ""
    assert find_workdir(["pretrain", "smoke", "--workdir=~/RUN"]) == f"{Path.home()}/RUN"
