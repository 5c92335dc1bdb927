"""Times programs side by side: each runs in a process of its own, and they take turns.

The speed of a machine that is shared changes from minute to minute. So the programs are set up one after the other, and then
alternate in rounds of a few seconds, so that each of them sees the same machine. While one runs, the others wait for input.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from gpt_jax.bench.machine import busy_seconds, num_cores, process_seconds
from gpt_jax.bench.program import Recipe
from gpt_jax.errors import UserError
from gpt_jax.runtime.console import say

ROUND_SECONDS = 2.0
"""Shortest duration of a round, as far as whole repetitions allow."""


class Request(NamedTuple):
    """A user's choice of config, sizes and peers for one benchmark."""

    config: Any = None
    """A `PretrainConfig` or `FinetuneConfig`; None for benchmarks without one."""
    config_name: str = ""
    batch_sizes: Sequence[int] = ()
    """Empty: the config's own batch size."""
    peers: Sequence[str] = ()
    products: bool = False
    """Whether `train` also times the matrix products of a step alone."""
    store: Path | None = None
    """The token store that `input` reads; None: random tokens."""


@dataclasses.dataclass(frozen=True)
class Contest:
    """Programs that do the same work."""

    title: str
    unit: str
    """The unit of the work, such as "tokens"; empty: only times are reported."""
    work: float
    """Amount of work in one repetition."""
    programs: dict[str, Recipe]
    """The programs by name."""
    peers: tuple[str, ...] = ()
    """Names of the programs of other projects; the fastest of them is what the others are compared with."""
    flops: float = 0.0
    """Floating-point operations in one repetition; 0: not counted."""
    part: str = ""
    """Name of a program that does only a part of the first program's work; empty: there is none."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """The measurements of one program."""

    setup: float = 0.0
    """Seconds from building the program to the end of its first repetition, which include compilation."""
    seconds: tuple[float, ...] = ()
    """Seconds of one repetition in each round; empty if the program failed."""
    peak_bytes: int = 0
    """Largest resident memory of the program's process."""
    details: dict[str, float] = dataclasses.field(default_factory=dict)
    """Further figures of the program, by name."""
    device: str = ""
    """Kind of accelerator that the program used; empty for a CPU."""
    failure: str = ""
    """Why there are no measurements; empty if there are."""

    @property
    def median(self) -> float:
        """Median seconds of one repetition."""
        return statistics.median(self.seconds)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A contest with the measurements of its programs."""

    contest: Contest
    timings: dict[str, Timing]
    other_cores: float | None
    """Mean number of cores that the machine's other programs used during the rounds; None: not known."""

    @property
    def finished(self) -> dict[str, Timing]:
        """The programs that did not fail."""
        return {name: timing for name, timing in self.timings.items() if not timing.failure}

    @property
    def reference(self) -> str:
        """The program that the others are compared with: the fastest peer, or the first program if there are no peers."""
        peers = [name for name in self.contest.peers if name in self.finished]
        return min(peers, key=lambda name: self.timings[name].median) if peers else next(iter(self.finished), "")

    def speed_ratio(self, name: str, other: str = "") -> float:
        """Returns how many times as fast as another program this one is: the median of the ratios in each round.

        Args:
          other: empty: the reference.
        """
        pairs = zip(self.timings[other or self.reference].seconds, self.timings[name].seconds, strict=True)
        return statistics.median(theirs / own for theirs, own in pairs)


def run_contest(contest: Contest, rounds: int, round_seconds: float | None = None) -> Outcome:
    """Measures all programs of a contest. A program that fails, or runs out of memory, does not keep the others from finishing.

    Args:
      rounds: number of rounds of each program.
      round_seconds: shortest duration of a round; None: `ROUND_SECONDS`.

    Raises:
      UserError: a program reported a user's mistake.
    """
    timings: dict[str, Timing] = {}
    shortest = ROUND_SECONDS if round_seconds is None else round_seconds
    with contextlib.ExitStack() as stack:
        workers, counts, setups = {}, {}, {}
        for name, recipe in contest.programs.items():
            say(f"{contest.title}: preparing {name}")
            worker = stack.enter_context(start_worker(recipe))
            try:
                setups[name] = worker.setup()
                counts[name] = max(1, round(shortest / worker.run(1)))
            except WorkerError as error:
                timings[name] = Timing(failure=str(error))
            else:
                workers[name] = worker
        meter = OtherLoad([os.getpid(), *(worker.pid for worker in workers.values())])
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        for number in range(rounds):
            say(f"{contest.title}: round {number + 1} of {rounds}")
            order = list(workers)
            for name in order[number % len(order) :] + order[: number % len(order)]:
                try:
                    seconds[name].append(workers[name].run(counts[name]) / counts[name])
                except WorkerError as error:
                    del workers[name]
                    timings[name] = Timing(failure=str(error))
        other_cores = meter.cores()
        for name, worker in workers.items():
            timings[name] = Timing(setups[name], tuple(seconds[name]), **worker.finish())
    return Outcome(contest, {name: timings[name] for name in contest.programs}, other_cores)


class OtherLoad:
    """Measures how busy the programs other than some processes keep this machine, from its creation on."""

    def __init__(self, own: Sequence[int]):
        self._own = own
        self._start = time.monotonic(), *self._used()

    def cores(self) -> float | None:
        """Returns the mean number of cores that other programs have used; None if it is not known."""
        (start, machine, own), (machine_now, own_now) = self._start, self._used()
        if machine is None or machine_now is None:
            return None
        return max(0.0, (machine_now - machine) - (own_now - own)) / (time.monotonic() - start)

    def _used(self) -> tuple[float | None, float]:
        return busy_seconds(), sum(map(process_seconds, self._own))


# -- processes --------------------------------------------------------------------------------------------------------------


class WorkerError(Exception):
    """A program failed for a reason that is not a user's mistake."""


class Worker:
    """The controlling side of one `worker` process."""

    def __init__(self, recipe: Recipe, process: subprocess.Popen[bytes], log: IO[bytes]):
        assert process.stdin is not None
        assert process.stdout is not None
        self._recipe, self._process, self._log = recipe, process, log
        self._requests, self._answers = process.stdin, process.stdout

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def setup(self) -> float:
        """Builds the program and runs it once; returns the seconds that this took."""
        return float(self._ask(self._recipe)["setup"])

    def run(self, count: int) -> float:
        """Runs the program `count` times; returns the seconds that this took."""
        return float(self._ask(count)["seconds"])

    def finish(self) -> dict[str, Any]:
        """Ends the process; returns its peak memory, details and device."""
        self._requests.close()
        answer = self._answer()
        self._process.wait()
        return answer

    def _ask(self, request: Any) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # The process has ended, and `_answer` says why.
            self._requests.write(json.dumps(request).encode() + b"\n")
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        """Returns the next answer.

        Raises:
          UserError: the program reported a user's mistake.
          WorkerError: the program failed, or its process ended.
        """
        line = self._answers.readline()
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            last = (self._log.read().decode(errors="replace").strip().splitlines() or ["nothing was printed"])[-1]
            raise WorkerError("killed, probably for lack of memory" if code == -9 else f"ended with exit code {code}: {last}")
        answer: dict[str, Any] = json.loads(line)
        if "mistake" in answer:
            raise UserError(answer["mistake"])
        if "failure" in answer:
            raise WorkerError(answer["failure"])
        return answer


@contextlib.contextmanager
def start_worker(recipe: Recipe) -> Iterator[Worker]:
    """Starts the process of a program, and ends it and deletes its temporary files when the block exits."""
    command = [sys.executable, "-m", "gpt_jax.bench.worker"]
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryDirectory() as scratch,
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, bufsize=0, env=worker_environment(scratch), stdin=pipe, stdout=pipe, stderr=log) as process,
    ):
        try:
            yield Worker(recipe, process, log)
        finally:
            process.kill()


def worker_environment(scratch: str) -> dict[str, str]:
    """Returns a program's environment: a thread for each core, a folder of its own, and a GPU that it shares with the others."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(num_cores()))
    return {**os.environ, **threads, "TMPDIR": scratch, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
