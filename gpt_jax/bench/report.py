"""The table and the JSON of measured comparisons, with the machine and the versions that they were measured with."""

import datetime
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gpt_jax.bench.comparison import Result, Timing
from gpt_jax.experiments.score_tables import format_table
from gpt_jax.runtime.chips import CHIPS
from gpt_jax.runtime.processor import num_cores, processor_name
from gpt_jax.runtime.rundir import environment, installed_versions, write_atomic

BUSY = 0.1
"""Share of the cores from which other programs are worth a warning."""

PEER_PACKAGES = ("torch", "transformers", "ctranslate2")


def describe_run(peers: Sequence[str]) -> dict[str, Any]:
    """Returns the machine, its load, the versions, the date and the command, before any program has started."""
    facts = environment()
    packages = PEER_PACKAGES if peers else ()
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "machine": f"{processor_name()}, {num_cores()} cores, {platform.system()} {platform.machine()}",
        "load_before": round(os.getloadavg()[0], 2),
        "versions": facts["versions"] | installed_versions(packages),
        "commit": facts["commit"],
        "command": shlex.join(["gpt-jax", *sys.argv[1:]]),
    }


def print_header(facts: dict[str, Any]) -> None:
    """Prints what `describe_run` returned."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    print(f"{facts['command']}\n{facts['date']}; {facts['machine']}; load average {facts['load_before']}\n{versions}")


def print_result(result: Result) -> None:
    """Prints the table of one comparison and remarks about it."""
    print(f"\n{result.comparison.title}")
    if result.finished:
        print(format_table(_table(result)))
    for remark in _remarks(result):
        print(remark)


def _table(result: Result) -> list[Sequence[object]]:
    """Returns the header, and a row for each program that finished, with its rate (or only its time), median and range."""
    comparison, rates = result.comparison, bool(result.comparison.unit)
    header = [f"{comparison.unit}/s", "min", "max", "s"] if rates else ["s", "min", "max"]
    header += ["GFLOP/s"] if comparison.flops else []
    table: list[Sequence[object]] = [("program", *header, f"x {result.reference}", "set-up, s", "peak GB")]
    for name, timing in result.finished.items():
        median, low, high = timing.median, min(timing.seconds), max(timing.seconds)
        figures = [*(comparison.work / s for s in (median, high, low)), median] if rates else [median, low, high]
        figures += [comparison.flops / median / 1e9] if comparison.flops else []
        rest = (f"{result.speed_ratio(name):.2f}", f"{timing.setup:.1f}", f"{timing.peak_bytes / 1e9:.2f}")
        table.append((name, *map(rounded, figures), *rest))
    return table


def _remarks(result: Result) -> Iterator[str]:
    comparison, finished, cores = result.comparison, result.finished, num_cores()
    if (result.other_cores or 0) > BUSY * cores:
        yield f"Other programs used {result.other_cores:.1f} of {cores} cores meanwhile, which distorts these figures."
    if result.failure:
        yield f"failed: {result.failure}"
    first = next(iter(result.timings), "")
    if {first, comparison.part} <= finished.keys():
        yield f"{comparison.part}: {1 / result.speed_ratio(comparison.part, first):.0%} of the time of {first}"
    for name, timing in result.timings.items():
        if timing.failure:
            yield f"{name} failed: {timing.failure}"
        if timing.device:
            yield f"{name}: {_devices(timing, comparison.flops)}"
        yield from (f"  {name}, {part}: {rounded(value)}" for part, value in timing.details.items())


def write_json(path: Path, facts: dict[str, Any], results: Sequence[Result]) -> None:
    """Writes the facts and all measurements; times are seconds of one repetition in each round."""
    comparisons = [
        {
            "title": result.comparison.title,
            "unit": result.comparison.unit,
            "work": result.comparison.work,
            "flops": result.comparison.flops,
            "reference": result.reference,
            "other_cores": result.other_cores,
            "failure": result.failure,
            "programs": {name: _as_json(result, name) for name in result.timings},
        }
        for result in results
    ]
    facts = facts | {"load_after": round(os.getloadavg()[0], 2)}
    write_atomic(path, json.dumps({**facts, "comparisons": comparisons}, indent=1) + "\n")


def rounded(value: float) -> str:
    """Returns a number with three significant digits, or as a whole number with separators if it has more."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def _as_json(result: Result, name: str) -> dict[str, Any]:
    timing = result.timings[name]
    if timing.failure:
        return {"failure": timing.failure}
    figures = {"seconds": timing.seconds, "median": timing.median, "speed_ratio": result.speed_ratio(name)}
    return figures | {name: getattr(timing, name) for name in ("setup", "peak_bytes", "details", "device", "num_devices")}


def _devices(timing: Timing, flops: float) -> str:
    """Returns the accelerators of a program, with the model FLOPs utilization if it can be computed.

    Args:
      flops: floating-point operations in one repetition; 0: not counted.
    """
    devices, chip = f"{timing.num_devices} x {timing.device}", CHIPS.get(timing.device)
    if chip is None or not flops:
        return devices
    return f"{devices}, MFU {flops / timing.median / (timing.num_devices * chip.peak_flops['bfloat16']):.1%} of the bfloat16 peak"
