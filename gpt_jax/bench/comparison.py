"""Times programs side by side: each runs in a process of its own, and they take turns.

The speed of a machine that is shared changes from minute to minute. So the programs are set up one after the other, and then
alternate in rounds of a few seconds, so that each of them sees the same machine. While one runs, the others wait for input.
"""

import contextlib
import dataclasses
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax.bench.process import Worker, WorkerError, start_worker
from gpt_jax.bench.program import ProgramSpec
from gpt_jax.config import ModelConfig
from gpt_jax.errors import require
from gpt_jax.runtime.console import say
from gpt_jax.runtime.processor import OtherLoad

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


def require_transformer(model: ModelConfig) -> None:
    """Checks that a model can be measured.

    Raises:
      UserError: it is an LSTM.
    """
    require(model.kind == "transformer", "config", "this model is an LSTM; benchmarks measure Transformers")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Programs that do the same work."""

    title: str
    unit: str
    """The unit of the work, such as "tokens"; empty: only times are reported."""
    work: float
    """Amount of work in one repetition."""
    programs: dict[str, ProgramSpec]
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
    num_devices: int = 1
    """Number of accelerators that shared the work."""
    failure: str = ""
    """Why there are no measurements; empty if there are."""

    @property
    def median(self) -> float:
        """Median seconds of one repetition."""
        return statistics.median(self.seconds)


@dataclasses.dataclass(frozen=True)
class Result:
    """A comparison with the measurements of its programs."""

    comparison: Comparison
    timings: dict[str, Timing]
    other_cores: float | None
    """Mean number of cores that the machine's other programs used during the rounds; None: not known."""
    failure: str = ""
    """Why there are no timings at all; empty if there are."""

    @property
    def finished(self) -> dict[str, Timing]:
        """The programs that did not fail."""
        return {name: timing for name, timing in self.timings.items() if not timing.failure}

    @property
    def has_failures(self) -> bool:
        """Whether the comparison or one of its programs failed."""
        return bool(self.failure) or len(self.finished) < len(self.timings)

    @property
    def reference(self) -> str:
        """The program that the others are compared with: the fastest peer, or the first program if there are no peers."""
        peers = [name for name in self.comparison.peers if name in self.finished]
        return min(peers, key=lambda name: self.timings[name].median) if peers else next(iter(self.finished), "")

    def speed_ratio(self, name: str, other: str = "") -> float:
        """Returns how many times as fast as another program this one is: the median of the ratios in each round.

        Args:
          other: empty: the reference.
        """
        pairs = zip(self.timings[other or self.reference].seconds, self.timings[name].seconds, strict=True)
        return statistics.median(theirs / own for theirs, own in pairs)


def failed(title: str, error: Exception) -> Result:
    """Returns the result of a comparison that could not be made."""
    return Result(Comparison(title, "", 0, {}), {}, None, str(error))


def run_comparison(comparison: Comparison, rounds: int, round_seconds: float | None = None) -> Result:
    """Measures all programs of a comparison. One that fails, or runs out of memory, does not keep the others from finishing.

    If there are peers, each program may use one GPU only, because the peers are written for one.

    Args:
      rounds: number of rounds of each program.
      round_seconds: shortest duration of a round; None: `ROUND_SECONDS`.

    Raises:
      UserError: a program reported a user's mistake.
    """
    shortest = ROUND_SECONDS if round_seconds is None else round_seconds
    timings: dict[str, Timing] = {}
    workers: dict[str, Worker] = {}
    counts, setups = {}, {}
    with contextlib.ExitStack() as stack:
        for name, spec in comparison.programs.items():
            say(f"{comparison.title}: preparing {name}")
            worker = stack.enter_context(start_worker(spec, one_gpu=bool(comparison.peers)))
            try:
                setups[name] = worker.setup()
                counts[name] = max(1, round(shortest / worker.run(1)))
            except WorkerError as error:
                timings[name] = Timing(failure=str(error))
            else:
                workers[name] = worker
        load = OtherLoad([os.getpid(), *(worker.pid for worker in workers.values())])
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        for number in range(rounds):
            first = number % max(len(workers), 1)
            for name in [*list(workers)[first:], *list(workers)[:first]]:
                try:
                    seconds[name].append(workers[name].run(counts[name]) / counts[name])
                    say(f"{comparison.title}: round {number + 1} of {rounds}, {name} {seconds[name][-1]:.3g} s")
                except WorkerError as error:
                    del workers[name]
                    timings[name] = Timing(failure=str(error))
        other_cores = load.cores()
        for name, worker in workers.items():
            try:
                timings[name] = Timing(setups[name], tuple(seconds[name]), **worker.finish())
            except WorkerError as error:
                timings[name] = Timing(failure=str(error))
    return Result(comparison, {name: timings[name] for name in comparison.programs}, other_cores)
