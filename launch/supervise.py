"""Restarts the local processes of a run after failures, until the run is done or another restart would not help.

The exit code of an attempt (README, "A run's folder") decides:

    0       done           stop and return 0
    2       a mistake      stop and return 2, because a restart would fail in the same way
    42      preempted      restart, unless the limit of preemptions is reached (many)
    other   crashed        restart, unless the limit of crashes is reached (few) or the crash repeats: after two crashes with the
                           same exit code and no progress between them, a third one would be the same

With several processes, the first process that fails ends the attempt, because the others can only wait for it.
"""

import argparse
import contextlib
import dataclasses
import enum
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax.errors import Preempted, TrainingError, UserError, require
from gpt_jax.runtime.lock import WAIT
from gpt_jax.runtime.signals import StopSignals

from .tpu_worker import last_step

POLL_SECONDS = 0.05
BACKOFF_SECONDS = 1.0
BACKOFF_LIMIT_SECONDS = 300.0


class Outcome(enum.Enum):
    """The outcome of an attempt. The values are exit codes."""

    DONE = 0
    MISTAKE = UserError.exit_code
    PREEMPTED = Preempted.exit_code
    CRASHED = TrainingError.exit_code


def classify_exit(codes: Iterable[int]) -> tuple[Outcome, int]:
    """Returns the outcome of an attempt, and the exit code that shows the cause.

    Args:
      codes: the exit codes of its processes. A negative code is the signal that ended the process. A process that loses the
        connection to another one ends with 1, so any other code is closer to the cause.
    """
    failed = [code for code in codes if code != 0]
    for outcome in (Outcome.MISTAKE, Outcome.PREEMPTED):
        if outcome.value in failed:
            return outcome, outcome.value
    return (Outcome.CRASHED, next((code for code in failed if code != 1), 1)) if failed else (Outcome.DONE, 0)


def describe_exit(code: int) -> str:
    """Returns a phrase for an exit code. A signal is represented by 128 plus its number (shells) or its negative (Python)."""
    number = -code if code < 0 else code - 128
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"exit {code}"
    return f"killed by {name}" + (", as when memory runs out" if number == signal.SIGKILL else "")


class RestartDecision(NamedTuple):
    """The decision whether to restart after a failed attempt."""

    restart: bool
    message: str
    """One line that describes the event and the decision."""
    delay: float = 0.0
    """Seconds to wait before the restart."""


class RestartBudget:
    """Counts preemptions and crashes, and decides after each one whether to restart.

    The delay before a restart doubles while the run makes no progress, from one second to five minutes.

    Args:
      preemptions: maximum number of restarts after preemptions.
      crashes: maximum number of restarts after crashes.
    """

    def __init__(self, preemptions: int, crashes: int) -> None:
        self._limits = {Outcome.PREEMPTED: preemptions, Outcome.CRASHED: crashes}
        self._counts = dict.fromkeys(self._limits, 0)
        self._last_crash: tuple[str, int | None] | None = None
        self._step: int | None = None
        self._attempts_without_progress = 0

    def __str__(self) -> str:
        return f"preemptions: {self._counts[Outcome.PREEMPTED]}, crashes: {self._counts[Outcome.CRASHED]}"

    def decide(self, outcome: Outcome, reason: str, step: int | None) -> RestartDecision:
        """Counts a failed attempt and decides whether to restart.

        Args:
          outcome: PREEMPTED or CRASHED.
          reason: a phrase for the cause. Two crashes count as the same if their reasons are equal.
          step: number of updates that the run has made, or None if it is unknown.
        """
        self._counts[outcome] += 1
        count, limit = self._counts[outcome], self._limits[outcome]
        progress = step is not None and (self._step is None or step > self._step)
        self._attempts_without_progress = 0 if progress else self._attempts_without_progress + 1
        self._step = step
        event = f"{outcome.name.lower()} ({reason})" + ("" if step is None else f" at step {step}")
        if outcome is Outcome.CRASHED:
            last, self._last_crash = self._last_crash, (reason, step)
            if last and last[0] == reason and last[1] is not None and step is not None and step <= last[1]:
                return RestartDecision(False, f"{event}, like the crash before it and without progress: giving up")
        kind = "preemption" if outcome is Outcome.PREEMPTED else "crash"
        if count > limit:
            return RestartDecision(False, f"{event}: giving up, the budget of {limit} {kind} restarts is spent")
        delay = min(BACKOFF_SECONDS * 2.0 ** min(self._attempts_without_progress, 30), BACKOFF_LIMIT_SECONDS)
        return RestartDecision(True, f"{event}: {kind} restart {count} of {limit} in {delay:.0f} s", delay)


def count_steps(workdir: str) -> int | None:
    """Returns the total number of updates of all runs in a folder (fine-tuning may have one run for each seed).

    Returns None if the number is unknown because no folder is given or the folder is not on a file system.
    """
    if not workdir or "://" in workdir:
        return None
    return sum(last_step(file) for file in Path(workdir).rglob("metrics.jsonl"))


def show(text: str) -> None:
    """Writes to standard error. A closed terminal is ignored, because processes or machines still have to be stopped."""
    with contextlib.suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()


def say(line: str) -> None:
    """Shows a line with the prefix of `gpt-jax supervise`."""
    show(f"supervise: {line}\n")


@dataclasses.dataclass
class Supervisor:
    """Runs attempts until one succeeds."""

    start: Callable[[], Sequence[subprocess.Popen[bytes]]]
    """Starts all processes of one attempt."""
    budget: RestartBudget
    grace_seconds: float
    """Time in seconds between asking a process to end and killing it, in which it must save a checkpoint."""
    steps: Callable[[], int | None]
    """Returns the number of updates that the run has made."""
    tick: Callable[[], None] = lambda: None
    """A function that is called about twenty times a second while processes run."""
    say: Callable[[str], None] = say
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def run(self) -> int:
        """Returns 0 when the run is done, 2 after a user's mistake, 1 after giving up, and 42 after a request to stop."""
        with StopSignals() as stop:
            while True:
                outcome, code = classify_exit(self._attempt(stop))
                if outcome is Outcome.DONE:
                    self.say(f"done ({self.budget})")
                    return 0
                if outcome is Outcome.MISTAKE:
                    self.say(f"giving up: {describe_exit(code)} is a mistake in the command or its input")
                    return UserError.exit_code
                if not stop.count:
                    decision = self.budget.decide(outcome, describe_exit(code), self.steps())
                    self.say(decision.message)
                    if not decision.restart:
                        return TrainingError.exit_code
                    until = self.clock() + decision.delay
                    while not stop.count and self.clock() < until:
                        self.sleep(POLL_SECONDS)
                if stop.count:
                    self.say("stopped on request; run the same command again to continue from the newest checkpoint")
                    return Preempted.exit_code

    def _attempt(self, stop: StopSignals) -> list[int]:
        """Waits for all processes to end; returns the exit codes of the first ones that failed, or of all if none failed."""
        processes = self.start()
        decisive: list[int] = []
        deadline: float | None = None
        try:
            while running := [process for process in processes if process.poll() is None]:
                failed = {number: process.returncode for number, process in enumerate(processes) if process.returncode}
                if deadline is None and (failed or stop.count):
                    decisive = list(failed.values())
                    deadline = self.clock() + self.grace_seconds
                    causes = ", ".join(f"process {number} ended ({describe_exit(code)})" for number, code in failed.items())
                    wait = f"waiting up to {self.grace_seconds:g} s for running processes ({len(running)}) to save and end"
                    self.say(f"{causes or 'stop requested'}; {wait}")
                    for process in running:
                        process.terminate()
                if deadline is not None and (self.clock() >= deadline or stop.count > 1):
                    self.say(f"killing processes that did not end in time ({len(running)})")
                    kill(running)
                self.tick()
                self.sleep(POLL_SECONDS)
        finally:
            kill(processes)
        self.tick()
        return decisive or [process.returncode for process in processes]


def spawn(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Starts a process in its own session, so that Ctrl-C only reaches the current process, which passes it on once as SIGTERM.

    A run that receives Ctrl-C twice would end without saving.
    """
    return subprocess.Popen(command, start_new_session=True, **options)


def kill(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Kills processes that were started by `spawn` and are still running, with their children."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def supervise(words: Sequence[str], preemptions: int, crashes: int, grace_seconds: float) -> int:
    """Runs `gpt-jax WORDS` in one supervised process, which waits if another one uses the run's folder; returns the exit code.

    Raises:
      UserError: there are no words, or a number is out of range.
    """
    if not words:
        raise UserError("name the command to run: gpt-jax supervise -- pretrain CONFIG --workdir RUN")
    require(preemptions >= 0, "preemptions", f"must be at least 0, not {preemptions}")
    require(crashes >= 0, "crashes", f"must be at least 0, not {crashes}")
    require(grace_seconds > 0, "grace-seconds", f"must be positive, not {grace_seconds}")
    command, workdir = [sys.executable, "-m", "gpt_jax", *words], find_workdir(words)
    budget = RestartBudget(preemptions, crashes)
    environment = {**os.environ, WAIT: "1"}
    return Supervisor(lambda: [spawn(command, env=environment)], budget, grace_seconds, lambda: count_steps(workdir)).run()


def find_workdir(words: Sequence[str]) -> str:
    """Returns the value of --workdir among the words of a command, or an empty string."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--workdir", nargs="?", type=os.path.expanduser, default="", const="")
    return parser.parse_known_args(words)[0].workdir
