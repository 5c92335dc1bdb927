"""The search for the mesh, the micro-batches and `model.remat` with which a pre-training is fastest on a TPU slice.

candidates.py orders the combinations that fit by an estimate. The best few are compiled, and compared by the
modeled time of a step.
"""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from gpt_jax.config import PretrainConfig
from gpt_jax.errors import TrainingError
from gpt_jax.plan.candidates import Candidate, find_candidates
from gpt_jax.plan.config_source import config_source
from gpt_jax.plan.describe import advice
from gpt_jax.plan.program import topology_name
from gpt_jax.plan.report_file import Report, read_report
from gpt_jax.plan.topology import topology_devices
from gpt_jax.runtime.accelerators import Accelerator
from gpt_jax.runtime.chips import GIB
from gpt_jax.runtime.console import say

COMPILED = 4
"""Number of candidates to compile."""
COMPILER_BYTES = 3 * GIB
"""Free memory in bytes that each compilation requires if several run at the same time."""
WAIT = 0.2
"""Seconds between two checks of the running compilations."""


class Planned(NamedTuple):
    """A candidate and the result of its compilation."""

    candidate: Candidate
    report: Report | None
    """None if the candidate does not compile."""
    refusal: str = ""
    """The reason, if the candidate does not compile."""


Poll = Callable[[], Planned | None]
"""A function whose result is None until a compilation has ended."""


def search(name: str, config: PretrainConfig, accelerator: Accelerator, slices: int, write: Path | None) -> Report:
    """Prints the best candidates and the options of the best one, whose report it returns.

    Args:
      name: the config's name.
      write: a file to create with the best candidate's config.

    Raises:
      UserError: there are no candidates, or the file exists or cannot be created.
      TrainingError: no candidate compiles.
    """
    jax.config.update("jax_platforms", "cpu")  # Do not look for a TPU.
    candidates = find_candidates(config, topology_devices(topology_name(accelerator), slices), slices)
    hardware = f"{slices} x {accelerator.name}" if slices > 1 else accelerator.name
    at_once = _at_once(len(candidates))
    say(f"{len(candidates)} candidates fit {hardware}; compiling the best {COMPILED}, {at_once} at a time, which takes minutes")
    with tempfile.TemporaryDirectory() as folder, compilations(Path(folder), accelerator, slices) as start:
        planned = compile_best(candidates, start, at_once)
    ranked = sorted((each for each in planned if each.report), key=_modeled_seconds)
    if not ranked:
        raise TrainingError(f"no candidate compiles for {hardware}: {planned[0].refusal}")
    print(describe_search(name, hardware, planned))
    best = ranked[0]
    if write is not None:
        sentence = f"{name} for {hardware}, with the mesh, micro-batches and remat that `gpt-jax plan --search` chose."
        with write.open("x", encoding="utf-8") as file:
            file.write(config_source(best.candidate.config, write, sentence))
        print(f"wrote {write}")
    return dict(best.report or {}) | {"config": name}


def compile_best(candidates: Sequence[Candidate], start: Callable[[Candidate], Poll], at_once: int) -> list[Planned]:
    """Compiles the first candidates, and another one for each that is refused; returns all results.

    Args:
      start: begins to plan a candidate, and returns a function that polls for the result.
      at_once: number of compilations that run at the same time.
    """
    waiting, running, planned = list(candidates), list[Poll](), list[Planned]()
    while True:
        compiled = sum(each.report is not None for each in planned)
        while waiting and len(running) < at_once and compiled + len(running) < COMPILED:
            running.append(start(waiting.pop(0)))
        if not running:
            return planned
        for poll in list(running):
            result = poll()
            if result is not None:
                running.remove(poll)
                planned.append(result)
                say(f"{time.strftime('%H:%M:%S')} {result.candidate.options}: {_outcome(result)}")
        time.sleep(WAIT)


@contextlib.contextmanager
def compilations(folder: Path, accelerator: Accelerator, slices: int) -> Iterator[Callable[[Candidate], Poll]]:
    """Provides the function `start` of `compile_best`, which plans each candidate in a process of its own.

    Processes that are still running at the end are stopped.

    Args:
      folder: an empty folder for their files.
    """
    processes: list[subprocess.Popen[bytes]] = []

    def start(candidate: Candidate) -> Poll:
        own = folder / str(len(processes))
        config, report, errors = (own.with_suffix(suffix) for suffix in (".py", ".json", ".txt"))
        config.write_text(config_source(candidate.config, config, "A candidate."), encoding="utf-8")
        words = ["plan", str(config), "--topology", accelerator.name, "--slices", str(slices), "--json", str(report)]
        with errors.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "gpt_jax", *words], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr
            )
        processes.append(process)

        def poll() -> Planned | None:
            code = process.poll()
            if code is None:
                return None
            if code == 0:
                return Planned(candidate, read_report(report))
            lines = errors.read_text(errors="replace").strip().splitlines()
            return Planned(candidate, None, lines[-1].removeprefix("gpt-jax: ") if lines and code > 0 else f"ended with {code}")

        return poll

    try:
        yield start
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                process.wait()


def describe_search(name: str, hardware: str, planned: Sequence[Planned]) -> str:
    """Returns a table of the compiled candidates, fastest first, then the refused candidates and the options of the best one."""
    header = f"{'mesh':32}{'micro-batches':>13}{'remat':>7}{'GiB':>7}{'step ms':>9}{'tokens/s':>12}{'MFU':>7}{'waiting ms':>12}"
    lines = [f"{name} on {hardware}: modeled, the fastest first", "", f"{header}  limited by"]
    ranked = sorted((each for each in planned if each.report), key=_modeled_seconds)
    for candidate, report, _ in ranked:
        assert report is not None
        step, mesh = report["time"], candidate.config.mesh
        axes = f"slice={mesh.slice} " * (mesh.slice > 1) + f"data={mesh.data} fsdp={mesh.fsdp} tensor={mesh.tensor}"
        limit = re.split("[:;]", advice(report))[0].removeprefix("limited by ")
        lines.append(
            f"{axes:32}{candidate.config.train.grad_accum_steps:13}{candidate.config.model.remat:>7}"
            f"{report['memory']['peak'] / GIB:7.2f}{step['step'] * 1e3:9.1f}{step['tokens_per_second']:12,.0f}"
            f"{step['utilization']:7.1%}{step['exposed'] * 1e3:12.1f}  {limit}"
        )
    lines += [f"refused: {each.candidate.options}: {each.refusal}" for each in planned if each.report is None]
    return "\n".join([*lines, "", f"the best one: {ranked[0].candidate.options}"])


def _modeled_seconds(planned: Planned) -> float:
    return planned.report["time"]["step"] if planned.report else float("inf")


def _outcome(planned: Planned) -> str:
    if planned.report is None:
        return f"refused: {planned.refusal}"
    return f"{planned.report['time']['step'] * 1e3:.1f} ms, MFU {planned.report['time']['utilization']:.1%}"


def _at_once(candidates: int) -> int:
    """Returns the number of compilations for which the machine has cores and free memory."""
    free = 0
    with contextlib.suppress(OSError):  # Only Linux has the file.
        memory = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        free = int(memory[1]) * 1024 if memory else 0
    return max(1, min(os.cpu_count() or 1, free // COMPILER_BYTES, COMPILED, candidates))
