"""Tables as text, and those of measured scores: fine-tuning with several seeds, and zero-shot scores of pre-trained models."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt_jax.experiments.plots import Curve, plot_curves
from gpt_jax.runtime.rundir import write_atomic


def print_seed_scores(result: dict[str, Any]) -> None:
    """Prints how the scores of fine-tuning runs vary between seeds.

    Args:
      result: the return value of `finetune_seeds`.
    """
    columns = {"median": "median", "mean": "mean", "deviation": "std", "lowest": "min", "highest": "max"}
    table = [(f"of {len(result['seeds'])} seeds", "metric", *columns)]
    for split in ("validation", "test"):
        for metric, spread in result.get(split, {}).items():
            unit, scale, digits = ("nats", 1, 3) if metric == "loss" else ("%", 100, 1)
            table.append((split, f"{metric}, {unit}", *(f"{scale * spread[key]:.{digits}f}" for key in columns.values())))
    print(format_table(table, "<<>>>>>"))


def print_zero_shot_scores(scores: Sequence[dict[str, Any]], out: Path | None) -> None:
    """Prints zero-shot scores and writes them to files.

    Args:
      scores: the return value of `zero_shot`.
      out: folder for zero_shot.json and, if a probe was scored on several checkpoints of a run, zero_shot.png; None: no files.
    """
    table: list[Sequence[object]] = [("step", "probe", "split", "metric", "score, %", "normalized", "rows", "cut", "run")]
    for score in scores:
        metric = "matthews" if "matthews" in score else "accuracy"
        normalized = "-" if score["normalized"] is None else f"{score['normalized']:.3f}"
        figures = (f"{100 * score[metric]:.1f}", normalized, f"{score['n']:,}", f"{score['truncated']:,}")
        table.append((score["step"], score["probe"], score["split"], metric, *figures, score["path"]))
    print(format_table(table, "><<<>>>><"))
    print("normalized: 0 is a random guess, 1 the best supervised model; cut: rows of all splits that lost their beginning")
    for name, best, source in dict.fromkeys((score["probe"], score["best"], score["source"]) for score in scores):
        print(f"    {name}: {'' if best is None else f'{100 * best:.1f}, '}{source}")
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    data, figure = out / "zero_shot.json", out / "zero_shot.png"
    write_atomic(data, json.dumps(list(scores), indent=1) + "\n")
    curves = _zero_shot_curves(scores)
    if any(len(curve.x) > 1 for curve in curves):
        label = "score (0: random guess, 1: best supervised)"
        plot_curves(figure, curves, "Zero-shot scores during pre-training", "pre-training steps", label)
        print(f"{data}, {figure}")
    else:
        figure.unlink(missing_ok=True)  # A figure from an earlier call would not match the new scores.
        print(data)


def _zero_shot_curves(scores: Sequence[dict[str, Any]]) -> list[Curve]:
    """Returns the normalized scores as curves over the steps, with a color for each probe and a line style for each run."""
    scores = [score for score in scores if score["normalized"] is not None]
    probes, runs = (list(dict.fromkeys(score[key] for score in scores)) for key in ("probe", "path"))
    folders = [Path(run).name for run in runs]
    labels = folders if len(set(folders)) == len(folders) else runs
    curves = []
    for (color, probe), (style, run) in itertools.product(enumerate(probes), enumerate(runs)):
        series = [score for score in scores if (score["probe"], score["path"]) == (probe, run)]
        name = probe if len(runs) == 1 else f"{probe}, {labels[style]}"
        x, y = ([score[key] for score in series] for key in ("step", "normalized"))
        curves.append(Curve(name, x, y, color=color, style=style))
    return curves


def format_table(rows: Sequence[Sequence[object]], align: str = "") -> str:
    """Returns a table as text, its columns aligned and two spaces apart.

    Args:
      rows: the header and then the rows, all of the same number of cells.
      align: one character for each column, "<" or ">"; empty: the first column to the left, the others to the right.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    align = align or "<" + ">" * (len(widths) - 1)
    lines = ("  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)
