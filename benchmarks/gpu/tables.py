"""The results of a GPU machine as tables in Markdown."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.session import RESULTS
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
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
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


def _attention(records: Sequence[Record], chip: str) -> Iterator[str]:
    header = ("attention", "dtype", "what", "ms (range)", "relative error of the output", "of the worst gradient")
    rows: list[Sequence[object]] = []
    for record in records:
        for comparison, name, program in _programs(record):
            what = comparison["title"].partition(": ")[0].removeprefix("attention, ")
            times = [1000 * seconds for seconds in program.get("seconds", ())]
            median = (
                f"{_number(1000 * program['median'])} ({_number(min(times))} to {_number(max(times))})" if times else "failed"
            )
            errors = [f"{error:.1e}" for error in program.get("details", {}).values()]
            rows.append((f"`{name}`", record["name"], what, median, *errors, *[""] * (2 - len(errors))))
    return _table(header, *rows)


def _determinism(records: Sequence[Record], chip: str) -> Iterator[str]:
    for record in records:
        result = record["result"]
        if record["name"] != "comparison" or not result:
            continue
        equal, seconds = f"{result['equal_updates']} of {result['updates']}", result["update_seconds"]
        arrays = f", and of the final states {result['equal_arrays']} of {result['arrays']} arrays" if "arrays" in result else ""
        yield f"Of two runs with deterministic operations, in two processes without caches, {equal} updates have the same loss"
        yield f"and the same norm of the gradient bit for bit{arrays}."
        if seconds["first"] and seconds["default"]:
            cost = seconds["first"] / seconds["default"] - 1
            yield f"An update took {1000 * seconds['first']:.1f} ms, and {1000 * seconds['default']:.1f} ms with the default"
            yield f"operations ({cost:+.0%})."
        yield ""


def _training(records: Sequence[Record], chip: str) -> Iterator[str]:
    header = ("training", "program", "tokens/s (range)", "MFU", "ratio to the best peer", "set-up, s")
    rows: list[Sequence[object]] = []
    for record in records:
        for comparison, name, program in _programs(record):
            title = comparison["title"].partition(": ")[2]
            if "median" not in program:
                rows.append((title, f"`{name}`", f"failed: {program['failure']}", "", "", ""))
                continue
            peak = CHIPS[chip].peak_flops["bfloat16"] if chip in CHIPS else 0
            utilization = f"{comparison['flops'] / program['median'] / peak:.1%}" if peak else ""
            ratio = "" if comparison["reference"] == "gpt_jax" else f"{program['speed_ratio']:.2f}"
            rows.append((title, f"`{name}`", _speed(comparison, program), utilization, ratio, _number(program["setup"])))
    return _table(header, *rows)


def _speed(comparison: Record, program: Record) -> str:
    median, *ends = (comparison["work"] / s for s in (program["median"], max(program["seconds"]), min(program["seconds"])))
    return f"{_number(median)} ({' to '.join(map(_number, ends))})"


def _finetuning(records: Sequence[Record], chip: str) -> Iterator[str]:
    header = ("fine-tuning", "program", "examples/s (range)", "ratio to the best peer", "padding, %")
    rows: list[Sequence[object]] = []
    for record in records:
        for comparison, name, program in _programs(record):
            if "median" not in program:
                rows.append((record["name"], f"`{name}`", f"failed: {program['failure']}", "", ""))
                continue
            ratio = "" if comparison["reference"] == "gpt_jax" else f"{program['speed_ratio']:.2f}"
            padding = _number(program["details"].get("padding, %"))
            rows.append((record["name"], f"`{name}`", _speed(comparison, program), ratio, padding))
    return _table(header, *rows)


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
    "attention": _attention,
    "determinism": _determinism,
    "training": _training,
    "finetuning": _finetuning,
    "pretraining": _pretraining,
    "tasks": _tasks,
}
"""The functions that describe the measurements of a part."""
