"""What was measured beside what the paper reports for the same task and row: `gpt-jax report --paper RUN...`.

A figure of ours is of the development split (validation) or of a test split with labels at hand; the paper's figures for
the tasks of GLUE are from the benchmark's test server, which has labels that nobody else has. So where a figure is from stands
beside each, and so do the settings in which a run differs from the paper's.
"""

from __future__ import annotations

import dataclasses
import statistics
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gpt_jax.config import FinetuneConfig, ModelConfig, TaskConfig
from gpt_jax.config.load import config_from_dict, flatten_config
from gpt_jax.errors import UserError
from gpt_jax.model.transformer import compute_dtype
from gpt_jax.runtime.rundir import read_json
from gpt_jax.tasks import metrics
from gpt_jax.tasks.registry import ABLATION_AVERAGES, ABLATIONS, GLUE_AVERAGE, TASKS, Task
from gpt_jax.tasks.transforms import Specials

WIDTH = 130
FULL = "Transformer w/ aux LM (full)"
_SPLITS = {"validation": "dev split", "test": "test split"}


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished fine-tuning, of one seed or of several."""

    path: Path
    task: Task
    origin: str
    """Where its parameters come from."""
    row: str
    """The row of Table 5 that it corresponds to; one that the table does not have is named in the same way."""
    differences: list[str]
    """Settings that are not the paper's."""
    seeds: int
    """How many the scores are of."""
    scores: dict[str, dict[str, list[float]]]
    """For each split and metric a fraction for each seed."""


def show(runs: Sequence[Path]) -> None:
    """Prints the table, the settings that differ, and the averages of which every part was measured.

    Args:
      runs: folders of fine-tuning runs, or of several seeds of one.

    Raises:
      UserError: a folder holds no finished fine-tuning of one of the paper's tasks.
    """
    found = [_load(path) for path in runs]
    table = [("", "task", "row", "metric", "measured", "on", "paper", "on")]
    for number, run in enumerate(found, 1):
        for split, measured in run.scores.items():
            for metric, values in measured.items():
                figure = _published(run, metric)
                paper = ("-", "") if figure is None else (f"{figure:.1f}", run.task.published_on)
                table.append((f"[{number}]", run.task.title, run.row, metric, _percent(values), _SPLITS[split], *paper))
    print("\n".join(_aligned(table)))
    print("\nAll figures are percentages; of several seeds, the median (lowest to highest). Settings other than the paper's:")
    for number, run in enumerate(found, 1):
        seeds = f" ({run.seeds} seeds)" if run.seeds > 1 else ""
        text = f"[{number}] {run.path}{seeds}: {', '.join(run.differences) or 'none'}"
        print(textwrap.fill(text, WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False))
    averages = list(_averages(found))
    if averages:
        print("\n" + "\n".join(averages))


def _load(path: Path) -> Run:
    if not (path / "result.json").is_file():
        raise UserError(f"{path}: no result.json there; --paper takes the folders of finished fine-tuning runs")
    stored = read_json(path / "config.json")
    config = config_from_dict(stored["config"])
    if not isinstance(config, FinetuneConfig):
        raise UserError(f"{path} is a pre-training run; --paper takes the folders of finished fine-tuning runs")
    if config.task.name not in TASKS:
        raise UserError(
            f"{path}: its task is your own, and the paper has no figure for it; --paper takes runs of the paper's tasks"
        )
    task = TASKS[config.task.name]
    result = read_json(path / "result.json")
    scores = {
        split: {
            metric: value["values"] if isinstance(value, dict) else [value]
            for metric, value in result[split].items()
            if metric.partition("/")[0] in task.metrics
        }
        for split in _SPLITS
        if split in result
    }
    return Run(
        path,
        task,
        config.init.from_,
        _row(config),
        _differences(config, stored.get("platform")),
        len(result.get("seeds", [0])),
        scores,
    )


def _row(config: FinetuneConfig) -> str:
    """The name of the row in Table 5."""
    architecture = "LSTM" if _architecture(config).kind == "lstm" else "Transformer"
    lacks = ["pre-training"] * (config.init.from_ == "none") + ["aux LM"] * (config.task.lm_weight == 0)
    if lacks:
        return f"{architecture} w/o {' or '.join(lacks)}"
    return "LSTM w/ aux LM" if architecture == "LSTM" else FULL


def _published(run: Run, metric: str) -> float | None:
    """The paper's figure in percent; None: it has none for this row and metric."""
    name, _, group = metric.partition("/")
    if run.row == FULL and (name, group) in run.task.published:
        return run.task.published[name, group]
    return ABLATIONS.get(run.row, {}).get(run.task.name) if metric == run.task.metrics[0] else None


def _percent(values: Sequence[float]) -> str:
    middle = f"{100 * statistics.median(values):.1f}"
    return middle if len(values) == 1 else f"{middle} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def _averages(runs: Sequence[Run]) -> Iterator[str]:
    """A line for each average over tasks that were fine-tuned alike: one origin, one row, one split, one run a task."""
    for origin, row, split in dict.fromkeys((run.origin, run.row, split) for run in runs for split in run.scores):
        alike = [run for run in runs if (run.origin, run.row) == (origin, row) and split in run.scores]
        scores = {
            run.task.name: {metric: statistics.median(values) for metric, values in run.scores[split].items()} for run in alike
        }
        if len(scores) < len(alike):
            continue
        for name, average in metrics.glue_averages(scores).items():
            paper = ""
            if name == metrics.TABLE_5_MEAN and row in ABLATION_AVERAGES:
                paper = f" (paper {ABLATION_AVERAGES[row]:.1f}, test server)"
            elif name == metrics.GLUE_MEAN and row == FULL:
                paper = f" (paper {GLUE_AVERAGE:.1f} with WNLI, test server)"
            yield f"{name}, {row}, {_SPLITS[split]}: {100 * average:.1f}{paper}"


def _architecture(config: FinetuneConfig) -> ModelConfig:
    """That of a run, which the checkpoint or `--init.like` has settled."""
    assert isinstance(config.model, ModelConfig)
    return config.model


# Settings that a Transformer or an LSTM does not have, and those that name the task, the row and the seed.
_TRANSFORMER_ONLY = {"num-layers", "num-heads", "mlp-dim", "layer-norm-epsilon"}
_LSTM_ONLY = {"lstm-units"}
_NO_SETTINGS = {"model.kind", "init.from", "init.like", "init.tokenizer", "task.name", "train.seed"}
_WORDS = {("init.blocks", -1): "all", ("task.max-train", 0): "all", ("task.max-tokens", 0): "the context"}


def _differences(config: FinetuneConfig, platform: str | None) -> list[str]:
    """Each setting that is not the paper's, and with pre-trained parameters where they come from.

    Args:
      platform: "cpu", "gpu" or "tpu", where the run was last started, which settles `--model.compute-dtype auto`; None: unknown.
    """
    if platform:
        settled: Any = compute_dtype(_architecture(config), platform).name
        config = dataclasses.replace(config, model=dataclasses.replace(_architecture(config), compute_dtype=settled))
    foreign = _TRANSFORMER_ONLY if _architecture(config).kind == "lstm" else _LSTM_ONLY
    skipped = _NO_SETTINGS | {f"model.{name}" for name in foreign}
    if config.task.lm_weight == 0:  # the row says so
        skipped.add("task.lm-weight")
    model = ModelConfig()
    model = dataclasses.replace(model, vocab_size=model.vocab_size + len(Specials._fields))
    # Where our defaults differ from the paper on purpose (docs/paper.md), its own settings stand here.
    model = dataclasses.replace(model, compute_dtype="float32")
    task = dataclasses.replace(TaskConfig(), bucket_by_length=False, truncation="released")
    papers = flatten_config(dataclasses.replace(FinetuneConfig(), model=model, task=task))
    pretraining = [] if config.init.from_ == "none" else [f"init.from {config.init.from_} (paper: 100 epochs of BooksCorpus)"]
    return pretraining + [
        f"{name} {_WORDS.get((name, value), value)} (paper {_WORDS.get((name, papers[name][0]), papers[name][0])})"
        for name, (value, effect) in flatten_config(config).items()
        if effect == "result" and name not in skipped and value != papers[name][0]
    ]


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose columns start below one another."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
