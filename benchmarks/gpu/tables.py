"""The results of a GPU machine as tables in Markdown."""

import functools
import json
import operator
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.session import RESULTS
from benchmarks.gpu.sizes import FULL
from gpt_jax.errors import UserError
from gpt_jax.runtime.chips import CHIPS

Record = dict[str, Any]


def describe(folder: Path) -> str:
    """Returns the Markdown of all results in a folder.

    Raises:
      UserError: there are none.
    """
    path = folder / RESULTS
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        records = [json.loads(line) for line in lines if line.endswith("\n")]  # The last one may not be complete.
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; `run` writes it") from None
    except ValueError as error:
        raise UserError(f"{path}: is not a file of results ({error})") from None
    return "\n".join(_lines(records))


def _lines(records: Sequence[Record]) -> Iterator[str]:
    chip = ""
    session: list[Record] = []
    for record in [*records, {"device": ""}]:
        if "device" not in record:
            session.append(record)
            continue
        for part, rows in PARTS.items():
            yield from rows([entry for entry in session if entry["part"] == part], chip)
        failures = [f"- {entry['part']}, {entry['name']}: {entry['failure']}" for entry in session if entry["failure"]]
        if failures:
            yield from ("Not measured completely:", "", *failures, "")
        session, chip = [], record["device"]
        if chip:
            yield from _heading(record)


def _heading(machine: Record) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    count = f"{machine['devices']} x " if machine["devices"] > 1 else ""
    yield from (f"## {count}{machine['device']} ({machine['date'][:10]})", "")
    yield from (f"{versions}; commit {machine['commit'][:7] or 'unknown'}.", "", f"    {machine['command']}", "")


def _table(*rows: Sequence[object]) -> Iterator[str]:
    """Yields a table; the first row is its header. An empty table is left out."""
    if len(rows) > 1:
        lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
        yield from (lines[0], "|" + "---|" * len(rows[0]), *lines[1:], "")


def _number(value: float | None) -> str:
    """Returns a number with three significant digits, or as a whole number if it has more; "" for None."""
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def _programs(record: Record) -> Iterator[tuple[Record, str, Record]]:
    """Yields each program that a benchmark measured: its comparison, its name and its figures."""
    for comparison in record["result"].get("comparisons", ()):
        for name, program in comparison["programs"].items():
            yield comparison, name, program


# -- the parts --------------------------------------------------------------------------------------------------------------


def _figure(program: Record, convert: Callable[[float], float]) -> str:
    """Returns a program's median, and the range of its rounds if there are several.

    Args:
      convert: from seconds to what is shown.
    """
    if "median" not in program:
        return f"failed: {program['failure']}"
    low, high = sorted(map(convert, (min(program["seconds"]), max(program["seconds"]))))
    spread = f" ({_number(low)} to {_number(high)})" if len(program["seconds"]) > 1 else ""
    return _number(convert(program["median"])) + spread


def _kernels(records: Sequence[Record], chip: str) -> Iterator[str]:
    checks: list[Sequence[object]] = []
    times: list[Sequence[object]] = []
    for record in records:
        for case in record["result"].get("errors", ()):
            shape = (case["dtype"], case["length"], case["dim"], case["segment"] or "")
            if "failure" in case:
                checks.append((*shape, f"failed: {case['failure']}", *[""] * 3))
                continue
            errors = [f"{np.max(case[name]):.1e}" for name in ("errors", "plain")]  # NaN if one is NaN.
            checks.append((*shape, f"{case['errors'][0]:.1e}", *errors, "yes" if case["repeatable"] else "no"))
        for entry in record["result"].get("times", ()):
            queries, keys, warps, stages = entry["blocks"]
            time = f"failed: {entry['failure']}" if "failure" in entry else _number(entry["ms"])
            times.append((entry["kernel"], f"{queries} x {keys}", warps, stages, time))
    worst = ("of the worst result", "of `plain`'s worst", "repeatable")
    yield from _table(("`pallas_gpu`", "length", "head", "segments", "relative error of output", *worst), *checks)
    yield from _table(("kernel", "queries x keys", "warps", "stages", "ms of output and gradients"), *times)


def _modeled(records: Sequence[Record], chip: str) -> Iterator[str]:
    rows: list[Sequence[object]] = []
    for record in records:
        result = record["result"]
        if result:
            times = (f"{1000 * result[name]:.2f}" for name in ("modeled", "measured"))
            rows.append((record["name"], *times, f"{100 * result['error']:+.1f} %", sum(result["unmodeled"].values())))
    return _table(("step", "modeled, ms", "measured, ms", "difference", "operations that are not modeled"), *rows)


def _attention(records: Sequence[Record], chip: str) -> Iterator[str]:
    header = ("attention", "dtype", "what", "ms", "relative error of the output", "of the worst gradient")
    rows: list[Sequence[object]] = []
    for record in records:
        for comparison, name, program in _programs(record):
            what = comparison["title"].partition(": ")[0].removeprefix("attention, ")
            errors = [f"{error:.1e}" for error in program.get("details", {}).values()]
            time = _figure(program, lambda seconds: 1000 * seconds)
            rows.append((f"`{name}`", record["name"], what, time, *errors, *[""] * (2 - len(errors))))
    return _table(header, *rows)


def _determinism(records: Sequence[Record], chip: str) -> Iterator[str]:
    for record in records:
        result = record["result"]
        if record["name"] != "comparison" or not result:
            continue
        equal, seconds = f"{result['equal_updates']} of {result['updates']}", result["update_seconds"]
        arrays = f", and of the final states {result['equal_arrays']} of {result['arrays']} arrays" if "arrays" in result else ""
        yield f"In two runs with deterministic operations, in separate processes without caches, {equal} updates have the same"
        yield f"loss and the same norm of the gradient bit for bit{arrays}."
        if seconds["first"] and seconds["default"]:
            cost = seconds["first"] / seconds["default"] - 1
            first, default = (f"{1000 * seconds[name]:.1f} ms" for name in ("first", "default"))
            yield f"An update took {first}, and {default} with the default operations ({cost:+.0%})."
        yield ""


def _training(records: Sequence[Record], chip: str) -> Iterator[str]:
    peak = CHIPS[chip].peak_flops["bfloat16"] if chip in CHIPS else 0.0

    def utilization(comparison: Record, program: Record) -> str:
        return f"{comparison['flops'] / program['median'] / peak:.1%}" if peak else ""

    return _speeds("training", "tokens/s", "MFU", utilization, records)


def _finetuning(records: Sequence[Record], chip: str) -> Iterator[str]:
    def padding(comparison: Record, program: Record) -> str:
        return _number(program["details"]["padding, %"])

    return _speeds("fine-tuning", "examples/s", "padding, %", padding, records)


def _speeds(
    part: str, unit: str, last: str, describe: Callable[[Record, Record], str], records: Sequence[Record]
) -> Iterator[str]:
    """Yields a table of benchmarks.

    Args:
      last: header of the last column.
      describe: (comparison, program) -> its entry.
    """
    rows: list[Sequence[object]] = []
    for record in records:
        for comparison, name, program in _programs(record):
            title, work, row = comparison["title"].partition(": ")[2], comparison["work"], ["", "", ""]
            if (attention := record["name"].partition(",")[0]) in FULL.attentions:
                title += f", {attention} attention"
            if "median" in program:
                ratio = "" if comparison["reference"] == "gpt_jax" else f"{program['speed_ratio']:.2f}"
                row = [ratio, _number(program["setup"]), describe(comparison, program)]
            rows.append((title, f"`{name}`", _figure(program, functools.partial(operator.truediv, work)), *row))
    return _table((part, "program", unit, "ratio to the best peer", "set-up, s", last), *rows)


def _pretraining(records: Sequence[Record], chip: str) -> Iterator[str]:
    header = ("pre-training", "tokens", "seconds", "tokens/s", "validation loss", "perplexity")
    names = ("tokens", "seconds", "tokens_per_second", "loss", "perplexity")
    rows = [(record["name"], *(_number(record["result"][name]) for name in names)) for record in records if record["result"]]
    return _table(header, *rows)


def _tasks(records: Sequence[Record], chip: str) -> Iterator[str]:
    """Yields a table with a row for each task, and the first metric of its validation split for each start."""
    scores: dict[str, dict[str, str]] = {}
    for record in records:
        task, _, start = record["name"].partition(" from ")
        for metric, score in list(record["result"].get("validation", {}).items())[:1]:
            scores.setdefault(f"{task}, {metric}", {})[start] = f"{100 * score:.1f}"
    starts = ("novels", "nothing")
    rows = [(f"fine-tuning on {task}", *(found.get(start, "") for start in starts)) for task, found in scores.items()]
    return _table(("validation, %", "from the novels", "from nothing"), *rows)


PARTS = {
    "kernels": _kernels,
    "attention": _attention,
    "determinism": _determinism,
    "training": _training,
    "modeled": _modeled,
    "finetuning": _finetuning,
    "pretraining": _pretraining,
    "tasks": _tasks,
}
"""The functions that describe the measurements of a part."""
