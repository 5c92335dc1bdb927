"""Profiles of a few updates (`--profile.steps 10:15`): a trace for XProf and TensorBoard, and where the time went.

Every operation of a compiled program belongs to a part of the model by its named scope (`PARTS`). A trace only has the names of
operations, so their scopes are looked up in the programs.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import jax

from gpt_jax.errors import UserError
from gpt_jax.runtime.console import Log

PARTS = ("embedding", "attention", "projections", "mlp", "layer_norm", "output", "loss", "optimizer")
"""The named scopes of the model, the loss and the update. In training, the output layer is in the loss."""
CONTAINERS = re.compile(r"(while|call|conditional)(\.\d+)?")
"""Names of operations whose time is that of others, which the trace also contains."""
NUM_OPERATIONS = 10


def parse_steps(steps: str, total_steps: int) -> range:
    """Returns the updates that FIRST:LAST names, counted from 1; empty for an empty text.

    Raises:
      UserError: it has another form, or names updates that the run does not make.
    """
    if not steps:
        return range(0)
    match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", steps)
    if match is None:
        raise UserError(f"--profile.steps: '{steps}' is not FIRST:LAST, such as 10:15")
    first, last = int(match[1]), int(match[2])
    if not 0 < first <= last <= total_steps:
        raise UserError(f"--profile.steps: '{steps}' must be a range of updates from 1 to {total_steps}")
    return range(first, last + 1)


class Profiler:
    """Traces the updates in `steps` of a run.

    Args:
      folder: receives the trace, in the layout that XProf and TensorBoard read.
      log: receives the table at the end.
    """

    def __init__(self, steps: range, folder: Path, log: Log) -> None:
        self._steps, self._folder, self._log = steps, folder, log
        self._active = False

    def before(self, step: int, state: object) -> None:
        """Starts the trace if `step` is the first update to trace, once the devices have finished the updates before it.

        If the run has resumed at a later update, the trace starts there.
        """
        if step in self._steps and not self._active:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._active = True

    def after(self, step: int, state: object, programs: Callable[[], Iterable[str]]) -> bool:
        """Ends the trace if `step` is its last update; returns whether it has.

        Args:
          programs: returns the HLO texts of the programs that were run.
        """
        if not self._active or step < self._steps[-1]:
            return False
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
        self._active = False
        times = operation_times(max(self._folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime))
        for line in describe(times, find_scopes(programs()), len(self._steps)):
            self._log(line)
        self._log(f"the trace of updates {self._steps[0]} to {self._steps[-1]} is in {self._folder}")
        return True

    def close(self) -> None:
        """Drops a trace that has not ended."""
        if self._active:
            jax.profiler.stop_trace()


def operations(trace: Path) -> Iterator[tuple[str, float, float]]:
    """Yields the name, the start and the end of each execution of an operation in a trace, in nanoseconds."""
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            for event in line.events:
                name = dict(event.stats).get("hlo_op")
                if name is not None and event.name == name and not CONTAINERS.fullmatch(name):
                    yield str(name), event.start_ns, event.start_ns + event.duration_ns


def operation_times(trace: Path) -> Counter[str]:
    """Returns the total duration of each operation in a trace, in nanoseconds, summed over devices and threads."""
    times: Counter[str] = Counter()
    for name, start, end in operations(trace):
        times[name] += int(end - start)
    return times


def find_scopes(programs: Iterable[str]) -> dict[str, str]:
    """Maps the names of the operations in HLO texts to the paths of their scopes and JAX primitives."""
    pattern = re.compile(r'^\s*(?:ROOT )?%([\w.\-]+) = .*op_name="([^"]*)"', re.MULTILINE)
    return {name: path for program in programs for name, path in pattern.findall(program)}


def describe(times: Counter[str], scopes: Mapping[str, str], updates: int) -> list[str]:
    """Returns lines with the share of each part of the model and of the operations that take longest."""
    total = max(sum(times.values()), 1)
    parts: Counter[str] = Counter()
    for name, duration in times.items():
        parts[_part(scopes.get(name, ""))] += duration
    lines = [f"profile: {total / updates / 1e9:.4g} s of operations in an update"]
    lines += [f"  {duration / total:6.1%}  {part}" for part, duration in parts.most_common()]
    lines += ["the longest operations:"]
    for name, duration in times.most_common(NUM_OPERATIONS):
        lines.append(f"  {duration / total:6.1%}  {name}  {_shorten(scopes.get(name, ''))}")
    return lines


def _part(path: str) -> str:
    """Returns the innermost named scope in an operation's path, with the pass that it belongs to."""
    found = re.findall(rf"\b({'|'.join(PARTS)})\b", path)
    scope = found[-1] if found else "other"
    return f"{scope}, backward" if "transpose(" in path and scope != "other" else scope


def _shorten(path: str) -> str:
    return "/".join(path.split("/")[-3:])
