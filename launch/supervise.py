"""Starts the local processes of a run again after failures, until the run is done or there is no use in going on.

An attempt's exit code (README, "A run's folder") decides:

    0       done           stop, 0
    2       a mistake      stop, 2: what is wrong stays wrong
    42      preempted      start again, while the budget of preemptions lasts (many)
    other   crashed        start again, while the budget of crashes lasts (few) and two crashes in a row differ: with one exit
                           and no step gained between them, a third would end there too

Of several processes the first to fail ends the attempt: the others could only wait for it.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax.errors import Preempted, TrainingError, UserError, require

POLL_SECONDS = 0.05
BACKOFF_SECONDS = 1.0
BACKOFF_LIMIT_SECONDS = 300.0


class Fate(enum.Enum):
    """How an attempt ended."""

    DONE = 0
    MISTAKE = UserError.exit_code
    PREEMPTED = Preempted.exit_code
    CRASHED = TrainingError.exit_code


def judge(codes: Iterable[int]) -> tuple[Fate, int]:
    """The fate of an attempt whose processes ended with these exit codes (negative: by that signal), and the code that says why.

    A process that lost another one ends with 1, so any other code tells more.
    """
    failed = [code for code in codes if code != 0]
    for fate in (Fate.MISTAKE, Fate.PREEMPTED):
        if fate.value in failed:
            return fate, fate.value
    return (Fate.CRASHED, next((code for code in failed if code != 1), 1)) if failed else (Fate.DONE, 0)


def describe(code: int) -> str:
    """An exit code in words; shells report a signal as 128 plus its number, Python as its negative."""
    number = -code if code < 0 else code - 128
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"exit {code}"
    return f"killed by {name}" + (", as when memory runs out" if number == signal.SIGKILL else "")


class Next(NamedTuple):
    """What follows a failed attempt."""

    again: bool
    wait: float
    """Seconds before the next attempt."""
    line: str
    """What happened and what follows, for the person."""


@dataclasses.dataclass
class Budget:
    """Counts preemptions and crashes, and says after each whether to start again.

    The wait before a restart doubles while the run gains no step, from one second to five minutes.
    """

    preemptions: int
    crashes: int
    preempted: int = dataclasses.field(default=0, init=False)
    crashed: int = dataclasses.field(default=0, init=False)
    _crash: tuple[str, int] | None = dataclasses.field(default=None, init=False)
    _step: int | None = dataclasses.field(default=None, init=False)
    _barren: int = dataclasses.field(default=0, init=False)

    def after_preemption(self, why: str, step: int | None) -> Next:
        """`step`: updates that the run has made, None where that is not known."""
        self.preempted += 1
        return self._next(f"preempted ({why})", step, "preemption", self.preempted, self.preemptions)

    def after_crash(self, why: str, step: int | None) -> Next:
        """As `after_preemption`. Gives up on a crash like the last one, at a step that is not beyond the last one's."""
        self.crashed += 1
        last, self._crash = self._crash, None if step is None else (why, step)
        if last is not None and step is not None and last[0] == why and step <= last[1]:
            return Next(False, 0.0, f"crashed ({why}) at step {step}, as before and no step further: giving up")
        return self._next(f"crashed ({why})", step, "crash", self.crashed, self.crashes)

    def __str__(self) -> str:
        return f"preemptions: {self.preempted}, crashes: {self.crashed}"

    def _next(self, what: str, step: int | None, kind: str, count: int, limit: int) -> Next:
        gained = step is not None and (self._step is None or step > self._step)
        self._barren, self._step = (0 if gained else self._barren + 1), step
        happened = what if step is None else f"{what} at step {step}"
        if count > limit:
            return Next(False, 0.0, f"{happened}: giving up, the budget of {limit} {kind} restarts is spent")
        wait = min(BACKOFF_SECONDS * 2.0 ** min(self._barren, 30), BACKOFF_LIMIT_SECONDS)
        return Next(True, wait, f"{happened}: {kind} restart {count} of {limit} in {wait:.0f} s")


def steps_in(workdir: str) -> int | None:
    """Updates that the runs in this folder have made, all together (a fine-tuning may have a run for each seed).

    None where that cannot be told: no folder is named, or it is not on a file system.
    """
    if not workdir or "://" in workdir:
        return None
    return sum(_last_step(file) for file in Path(workdir).rglob("metrics.jsonl"))


def _last_step(file: Path) -> int:
    with open(file, "rb") as lines:
        lines.seek(max(file.stat().st_size - 65536, 0))
        for line in reversed(lines.read().splitlines()):
            try:
                return int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError):  # cut off at either end
                continue
    return 0


def say(line: str) -> None:
    print(f"supervise: {line}", file=sys.stderr, flush=True)


class Stop:
    """Counts SIGTERM and SIGINT while it is entered."""

    def __init__(self) -> None:
        self.asked = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._notice)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _notice(self, number: int, frame: Any) -> None:
        self.asked += 1


@dataclasses.dataclass
class Supervisor:
    """Runs attempts until one is done."""

    start: Callable[[], Sequence[subprocess.Popen[bytes]]]
    """Starts an attempt: all processes of the run."""
    budget: Budget
    grace_seconds: float
    """Between asking a process to end and killing it; what saving takes must fit in."""
    steps: Callable[[], int | None]
    """Updates that the run has made."""
    tick: Callable[[], None] = lambda: None
    """Called while processes run, some twenty times a second."""
    say: Callable[[str], None] = say
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def run(self) -> int:
        """Returns 0 when done, 2 after a user's mistake, 1 when it gave up, 42 when it was told to stop."""
        with Stop() as stop:
            while True:
                fate, code = judge(self._attempt(stop))
                if fate is Fate.DONE:
                    self.say(f"done ({self.budget})")
                    return 0
                if fate is Fate.MISTAKE:
                    self.say(f"giving up: {describe(code)} is a mistake in what was asked for, which a restart does not mend")
                    return UserError.exit_code
                if stop.asked:
                    self.say("stopped as told; the same command goes on from the newest checkpoint")
                    return Preempted.exit_code
                after = self.budget.after_preemption if fate is Fate.PREEMPTED else self.budget.after_crash
                following = after(describe(code), self.steps())
                self.say(following.line)
                if not following.again:
                    return TrainingError.exit_code
                if self._interrupted(following.wait, stop):
                    self.say("stopped as told, before the restart")
                    return Preempted.exit_code

    def _interrupted(self, wait: float, stop: Stop) -> bool:
        """Waits so many seconds; whether it was told to stop meanwhile."""
        until = self.clock() + wait
        while not stop.asked and self.clock() < until:
            self.sleep(POLL_SECONDS)
        return stop.asked > 0

    def _attempt(self, stop: Stop) -> list[int]:
        """Waits until every process has ended; returns the exit codes that decide: those of the first to fail, if any did."""
        processes = self.start()
        decisive: list[int] = []
        deadline: float | None = None
        try:
            while running := [process for process in processes if process.poll() is None]:
                failed = {number: process.returncode for number, process in enumerate(processes) if process.returncode}
                if deadline is None and (failed or stop.asked):
                    decisive = list(failed.values())
                    deadline = self.clock() + self.grace_seconds
                    first = ", ".join(f"process {number} has ended ({describe(code)})" for number, code in failed.items())
                    self.say(
                        f"{first or 'told to stop'}; waiting up to {self.grace_seconds:g} s for {len(running)} to save and end"
                    )
                    for process in running:
                        process.terminate()
                if deadline is not None and (self.clock() >= deadline or stop.asked > 1):
                    self.say(f"killing {len(running)} that did not end")
                    for process in running:
                        kill(process)
                self.tick()
                self.sleep(POLL_SECONDS)
        finally:
            for process in processes:
                if process.poll() is None:
                    kill(process)
        self.tick()
        return decisive or [process.returncode for process in processes]


def spawn(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Starts a process in a session of its own: Ctrl-C reaches the supervisor alone, which passes it on once, as SIGTERM. A
    training that got it twice would end without saving.
    """
    return subprocess.Popen(command, start_new_session=True, **options)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a process that `spawn` started, and its children."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def supervise(words: Sequence[str], preemptions: int, crashes: int, grace_seconds: float) -> int:
    """`gpt-jax supervise -- WORDS`: runs `gpt-jax WORDS` in one process; returns the exit code.

    Raises:
      UserError: there are no words, or a number makes no sense.
    """
    if not words:
        raise UserError("say what to run: gpt-jax supervise -- pretrain CONFIG --workdir RUN")
    require(preemptions >= 0, "preemptions", f"must be at least 0, not {preemptions}")
    require(crashes >= 0, "crashes", f"must be at least 0, not {crashes}")
    require(grace_seconds > 0, "grace-seconds", f"must be positive, not {grace_seconds}")
    command = [sys.executable, "-m", "gpt_jax", *words]
    workdir = _option(words, "--workdir")
    return Supervisor(
        start=lambda: [spawn(command)],
        budget=Budget(preemptions, crashes),
        grace_seconds=grace_seconds,
        steps=lambda: steps_in(workdir),
    ).run()


def _option(words: Sequence[str], name: str) -> str:
    """The value of `--name VALUE` or `--name=VALUE` among a command's words; empty if it is not there."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == name:
            return following
        if word.startswith(name + "="):
            return word.removeprefix(name + "=")
    return ""
