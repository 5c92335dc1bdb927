"""Curves as PNG files."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from gpt_jax.errors import UserError
from gpt_jax.runtime.rundir import write_atomic


class Point(NamedTuple):
    """A point of a curve, with the least and the greatest of the values that it stands for."""

    x: float
    y: float
    low: float
    high: float


class Curve(NamedTuple):
    """Points under one name. Curves of one colour are of one thing, those of one style (a number from 0) of one model."""

    name: str
    points: Sequence[Point]
    color: int = 0
    style: int = 0


MOST_LEVEL_TICKS = 6
"""More names than these run into one another unless they stand upright."""
STYLES = ("-", "--", ":", "-.")


def require_matplotlib() -> None:
    """Raises a `UserError` where matplotlib is not installed; worth knowing before hours of training."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("plots need matplotlib: pip install 'gpt_jax[plots]'") from None


def curves(
    path: Path,
    title: str,
    x_label: str,
    y_label: str,
    shown: Sequence[Curve],
    ticks: Mapping[float, str] | None = None,
    joined: bool = True,
) -> None:
    """Writes a figure of the curves, bars from the least to the greatest value at their points.

    Args:
      ticks: names of values of x; where there are any, they stand on the axis in place of numbers.
      joined: lines go from point to point, which says that their order means something.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, points, color, style in shown:
        x, y = [point.x for point in points], [point.y for point in points]
        bars = ([p.y - p.low for p in points], [p.high - p.y for p in points])
        line = STYLES[style % len(STYLES)] if joined else "none"
        axes.errorbar(x, y, bars, color=f"C{color}", linestyle=line, marker="o", markersize=4, capsize=3, label=name)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    if ticks:
        axes.set_xticks(list(ticks), list(ticks.values()), rotation=90 if len(ticks) > MOST_LEVEL_TICKS else 0)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if len(shown) > 1:
        axes.legend()
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())
