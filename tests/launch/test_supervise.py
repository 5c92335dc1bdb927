"""What follows each exit code, with processes that stand in for a training."""

import json
import os
import signal
import sys
import threading
import time

import pytest

from gpt_jax.errors import UserError
from gpt_jax.launch import supervise
from gpt_jax.launch.supervise import Budget, Fate, Supervisor, describe, judge, spawn, steps_in

# Each attempt takes the next word of PLAN: an exit code, `kill` (itself, by SIGKILL), `save` (until SIGTERM, then 42), `deaf`
# (to SIGTERM); a word before it, as in `7:1`, is the step that it reaches before.
STAND_IN = """
import json, os, signal, sys, time
folder, number, count, plan = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4].split()
signal.alarm(60)
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
with open(f"{folder}/attempts-{number}", "a+") as file:
    file.write(".")
    file.seek(0)
    word = plan[min(len(file.read()), len(plan)) - 1]
step, _, end = word.rpartition(":")
if step:
    with open(f"{folder}/metrics.jsonl", "a") as file:
        file.write("\\n" + json.dumps({"kind": "train", "step": int(step)}) + "\\n" + '{"kind": "tra')
open(f"{folder}/ready-{number}", "w").close()
while not all(os.path.exists(f"{folder}/ready-{each}") for each in range(count)):
    time.sleep(0.01)
if end == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
while end == "deaf" or (end == "save" and not told):
    time.sleep(0.01)
open(f"{folder}/saved-{number}", "w").close()
sys.exit(42 if end == "save" else int(end))
"""


class Stage:
    """A supervisor of stand-ins, what it said and what it waited for."""

    def __init__(self, folder, *plans, preemptions=9, crashes=2, grace=5.0):
        self.folder, self.plans, self.lines, self.now = folder, plans, [], 0.0
        self.supervisor = Supervisor(
            self.start, Budget(preemptions, crashes), grace, lambda: steps_in(str(folder)), say=self.lines.append
        )
        self.processes = []

    def start(self):
        command = [sys.executable, "-SEc", STAND_IN, str(self.folder)]
        count = str(len(self.plans))
        self.processes = [spawn([*command, str(number), count, plan]) for number, plan in enumerate(self.plans)]
        return self.processes

    def skip_backoff(self):
        """Backoff passes at once; processes still need real time."""

        def sleep(seconds):
            if all(process.poll() is not None for process in self.processes):
                self.now += seconds
            else:
                time.sleep(0.01)

        self.supervisor.sleep = sleep
        self.supervisor.clock = lambda: self.now + time.monotonic()
        return self

    def when_ready(self, act):
        """Does something once all stand-ins are where the plan says."""

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
        ([0, 0], (Fate.DONE, 0)),
        ([0, 2, 1], (Fate.MISTAKE, 2)),
        ([42, 1], (Fate.PREEMPTED, 42)),
        ([1, -9], (Fate.CRASHED, -9)),
        ([1, 1], (Fate.CRASHED, 1)),
    ],
)
def test_codes_have_a_fate(codes, expected):
    assert judge(codes) == expected


def test_a_signal_has_its_name():
    assert [describe(code) for code in (1, -15, 143)] == ["exit 1", "killed by SIGTERM", "killed by SIGTERM"]
    assert describe(137) == describe(-9) == "killed by SIGKILL, as when memory runs out"


def test_waits_double_until_a_step_is_gained():
    budget = Budget(preemptions=100, crashes=100)
    assert [budget.after_preemption("exit 42", 7).wait for _ in range(4)] == [1, 2, 4, 8]
    assert budget.after_crash("exit 1", 8).wait == 1
    assert [budget.after_preemption("exit 42", None).wait for _ in range(12)][-3:] == [300, 300, 300]


def test_a_run_that_is_done_ends_it(tmp_path):
    stage = Stage(tmp_path, "0", "0")
    assert stage.supervisor.run() == 0
    assert stage.lines == ["done (preemptions: 0, crashes: 0)"]


def test_preemptions_and_crashes_are_counted_apart(tmp_path):
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
def test_a_spent_budget_ends_it(tmp_path, plan, attempts, last):
    stage = Stage(tmp_path, plan, preemptions=1).skip_backoff()
    assert stage.supervisor.run() == 1
    assert stage.lines[-1] == last
    assert stage.attempts() == attempts


def test_a_crash_that_repeats_at_one_step_ends_it(tmp_path):
    stage = Stage(tmp_path, "3:1 5:1 5:42 5:1 9:0", crashes=9).skip_backoff()
    assert stage.supervisor.run() == 1
    assert stage.lines[-1] == "crashed (exit 1) at step 5, as before and no step further: giving up"
    assert stage.attempts() == 4


def test_another_crash_at_the_same_step_is_no_repetition(tmp_path):
    stage = Stage(tmp_path, "5:1 5:3 5:1 5:0", crashes=9).skip_backoff()
    assert stage.supervisor.run() == 0


def test_a_mistake_is_not_tried_again(tmp_path):
    stage = Stage(tmp_path, "2")
    assert stage.supervisor.run() == 2
    assert stage.lines == ["giving up: exit 2 is a mistake in what was asked for, which a restart does not mend"]
    assert stage.attempts() == 1


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_the_saves_are_waited_for(tmp_path, told):
    before = signal.getsignal(told)
    stage = Stage(tmp_path, "save", "save").when_ready(lambda: os.kill(os.getpid(), told))
    assert stage.supervisor.run() == 42
    assert stage.lines == [
        "told to stop; waiting up to 5 s for 2 to save and end",
        "stopped as told; the same command goes on from the newest checkpoint",
    ]
    assert (tmp_path / "saved-0").exists()
    assert (tmp_path / "saved-1").exists()
    assert signal.getsignal(told) == before


def test_who_does_not_end_within_the_grace_is_killed(tmp_path):
    stage = Stage(tmp_path, "save", "deaf", grace=0.3).when_ready(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert stage.supervisor.run() == 42
    assert stage.lines[1] == "killing 1 that did not end"
    assert [process.returncode for process in stage.processes] == [42, -signal.SIGKILL]


def test_a_second_signal_does_not_wait(tmp_path):
    stage = Stage(tmp_path, "deaf", grace=60)
    say = stage.lines.append

    def again(line):
        say(line)
        if line.startswith("told to stop"):
            os.kill(os.getpid(), signal.SIGINT)

    stage.supervisor.say = again
    stage.when_ready(lambda: os.kill(os.getpid(), signal.SIGINT))
    started = time.monotonic()
    assert stage.supervisor.run() == 42
    assert time.monotonic() - started < 30


def test_told_to_stop_during_the_backoff(tmp_path):
    stage = Stage(tmp_path, "1:1")
    stage.supervisor.sleep = lambda seconds: (
        os.kill(os.getpid(), signal.SIGTERM) if len(stage.lines) == 1 else time.sleep(seconds)
    )
    assert stage.supervisor.run() == 42
    assert stage.lines[-1] == "stopped as told, before the restart"
    assert stage.attempts() == 1


def test_when_one_dies_all_start_again(tmp_path):
    stage = Stage(tmp_path, "save 0", "4:kill 0").skip_backoff()
    assert stage.supervisor.run() == 0
    killed = "killed by SIGKILL, as when memory runs out"
    assert stage.lines == [
        f"process 1 has ended ({killed}); waiting up to 5 s for 1 to save and end",
        f"crashed ({killed}) at step 4: crash restart 1 of 2 in 1 s",  # and not preempted, as process 0's exit code says
        "done (preemptions: 0, crashes: 1)",
    ]
    assert (stage.attempts(0), stage.attempts(1)) == (2, 2)


def test_a_process_that_is_done_waits_for_the_others(tmp_path):
    stage = Stage(tmp_path, "0", "save").when_ready(lambda: stage.processes[0].wait() or stage.processes[1].terminate())
    stage.supervisor.budget = Budget(0, 0)
    assert stage.supervisor.run() == 1
    assert stage.lines == ["preempted (exit 42) at step 0: giving up, the budget of 0 preemption restarts is spent"]


def test_no_process_outlives_an_error_of_ours(tmp_path):
    stage = Stage(tmp_path, "deaf")

    def fail():
        raise KeyError("tick")

    stage.supervisor.tick = fail
    with pytest.raises(KeyError):
        stage.supervisor.run()
    assert stage.processes[0].poll() == -signal.SIGKILL


def test_steps_are_those_of_every_run_in_the_folder(tmp_path):
    assert steps_in(str(tmp_path)) == 0
    for seed, step in ((0, 30), (1, 4)):
        (tmp_path / f"seed-{seed}").mkdir()
        lines = [json.dumps({"step": each}) for each in range(step + 1)]
        (tmp_path / f"seed-{seed}" / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 99')
    assert steps_in(str(tmp_path)) == 34
    assert steps_in("") is None
    assert steps_in("gs://bucket/run") is None


def test_the_command_supervises_a_verb(tmp_path, monkeypatch, capsys):
    begun = []

    def run(command):
        begun.append(command)
        return spawn([sys.executable, "-SEc", "raise SystemExit(2)"])

    monkeypatch.setattr(supervise, "spawn", run)
    assert supervise.supervise(["pretrain", "smoke", "--workdir", str(tmp_path)], 5, 1, 1) == 2
    assert begun == [[sys.executable, "-m", "gpt_jax", "pretrain", "smoke", "--workdir", str(tmp_path)]]
    assert "supervise: giving up: exit 2 is a mistake" in capsys.readouterr().err
    with pytest.raises(UserError, match="say what to run"):
        supervise.supervise([], 5, 1, 1)


def test_the_run_of_a_supervised_command_is_found_in_its_words():
    assert supervise._option(["pretrain", "smoke", "--workdir", "RUN"], "--workdir") == "RUN"
    assert supervise._option(["pretrain", "smoke", "--workdir=RUN"], "--workdir") == "RUN"
    assert supervise._option(["demo"], "--workdir") == ""
