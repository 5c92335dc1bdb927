"""A comparison of two reports side by side: memory, cycles by part, collectives and time, with the change of each row."""

from collections.abc import Iterator
from typing import NamedTuple

from gpt_jax.plan.report_file import Report
from gpt_jax.runtime.chips import GIB, MIB

SMALL = 0.005
"""Relative change below which a row is not marked."""


class Row(NamedTuple):
    """One figure in both reports; 0 where a report does not have it."""

    name: str
    before: float
    after: float
    unit: str

    @property
    def change(self) -> str:
        """The relative change as text; "" if it is small, and "new" or "gone" if only one report has the figure."""
        if self.before == 0 or self.after == 0:
            return "" if self.before == self.after else "new" if self.before == 0 else "gone"
        change = self.after / self.before - 1
        return f"{change:+.1%}" if abs(change) > SMALL else ""


def describe_comparison(before: Report, after: Report, names: tuple[str, str]) -> str:
    """Returns a table of both reports; `names` are the headings of their columns."""
    width = max(24, *(len(name) for name in names))
    lines = [f"{'':52}{names[0]:>{width}}{names[1]:>{width}}"]
    for row in rows(before, after):
        label = f"{row.name} ({row.unit})" if row.unit else row.name
        lines.append(f"{label:52}{row.before:{width},.2f}{row.after:{width},.2f}  {row.change}".rstrip())
    return "\n".join(lines)


def rows(before: Report, after: Report) -> Iterator[Row]:
    """Yields the figures of two reports, in the order of the first one."""
    for name in ("parameters", "moments", "temporaries", "peak"):
        yield Row(f"memory: {name}", before["memory"][name] / GIB, after["memory"][name] / GIB, "GiB")
    cycles, cycles_after = _cycles(before), _cycles(after)
    for part in cycles | cycles_after:
        yield Row(f"cycles: {part}", cycles.get(part, 0) / 1e6, cycles_after.get(part, 0) / 1e6, "million")
    yield Row("cycles: all", sum(cycles.values()) / 1e6, sum(cycles_after.values()) / 1e6, "million")
    transfers, transfers_after = _transfers(before), _transfers(after)
    for name in transfers | transfers_after:
        yield Row(name, transfers.get(name, 0) / MIB, transfers_after.get(name, 0) / MIB, "MiB")
    for name in ("compute", "exposed", "step"):
        yield Row(f"time: {name}", before["time"][name] * 1e3, after["time"][name] * 1e3, "ms")
    yield Row("MFU", before["time"]["utilization"] * 100, after["time"]["utilization"] * 100, "%")


def _cycles(report: Report) -> dict[str, float]:
    return {part: sum(by.values()) for part, by in report["cycles"].items()}


def _transfers(report: Report) -> dict[str, float]:
    """Returns the bytes of the collectives by kind, dtype and axes."""
    found: dict[str, float] = {}
    for each in report["collectives"]:
        name = f"{each['kind']} {each['dtype']} over {each['axes']}"
        found[name] = found.get(name, 0) + each["bytes"]
    return found
