"""Plots of curves, written as PNG files."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt_jax.errors import UserError
from gpt_jax.runtime.rundir import write_atomic

MAX_LEVEL_TICKS = 6  # with more ticks, the names do not fit next to each other and are rotated
LINE_STYLES = ("-", "--", ":", "-.")


class Curve(NamedTuple):
    """A named series of points."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    ranges: Sequence[tuple[float, float]] = ()
    """The lowest and the highest value at each point, drawn as an error bar; empty: no error bars."""
    color: int = 0
    """Number of the color, counted from 0."""
    style: int = 0
    """Number of the line style, counted from 0."""


def require_matplotlib() -> None:
    """Raises a `UserError` if matplotlib is not installed. It is called before hours of training that end with a plot."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("plots need matplotlib: pip install 'gpt_jax[plots]'") from None


def plot_curves(
    path: Path,
    curves: Sequence[Curve],
    title: str,
    x_label: str,
    y_label: str,
    tick_names: Sequence[str] = (),
    joined: bool = True,
) -> None:
    """Plots curves in one figure and writes it to a PNG file.

    Args:
      tick_names: names of the first curve's values of x, which replace the numbers on the axis; empty: numbers.
      joined: whether lines connect the points, which suggests that their order is meaningful.

    Raises:
      UserError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, x, y, ranges, color, style in curves:
        bars = np.abs(np.transpose(ranges) - y) if ranges else None
        line = LINE_STYLES[style % len(LINE_STYLES)] if joined else "none"
        axes.errorbar(x, y, bars, color=f"C{color}", linestyle=line, marker="o", markersize=4, capsize=3, label=name)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    if tick_names:
        axes.set_xticks(curves[0].x, tick_names, rotation=90 if len(tick_names) > MAX_LEVEL_TICKS else 0)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend()
    png = io.BytesIO()
    figure.savefig(png, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, png.getvalue())
