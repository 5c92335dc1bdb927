"""Measured scores beside the scores that the paper reports for the same task and ablation (`gpt-jax report --paper RUN...`).

Our scores are for the development split (validation) or a test split with public labels. The paper's scores for GLUE's tasks are
from the benchmark's test server, whose labels are secret. The table therefore shows the split of each score, and a list below the
table names the settings in which a run differs from the paper.
"""

import dataclasses
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from gpt_jax.config import FinetuneRunConfig, ModelConfig, TaskConfig
from gpt_jax.config.load import config_from_dict, flatten_config
from gpt_jax.errors import UserError
from gpt_jax.experiments.score_tables import format_table
from gpt_jax.model.transformer import compute_dtype
from gpt_jax.runtime.rundir import START_SHAPE, read_json
from gpt_jax.tasks import metrics
from gpt_jax.tasks.registry import ABLATION_AVERAGES, ABLATIONS, GLUE_AVERAGE, TASKS, Task
from gpt_jax.tasks.transforms import SpecialTokens

WIDTH = 130
FULL = "Transformer w/ aux LM (full)"
SPLITS = {"validation": "dev split", "test": "test split"}
SCORE = (float, {"values": [float]})
"""The shape of a score in result.json, for one seed or several."""


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A finished fine-tuning run with one or more seeds."""

    path: Path
    config: FinetuneRunConfig
    origin: str
    """Fingerprint of the pre-trained checkpoint, or its path in runs of earlier versions, or "none"."""
    platform: str | None
    """Platform on which the run was last started ("cpu", "gpu" or "tpu"); None: unknown."""
    num_seeds: int
    scores: dict[str, dict[str, list[float]]]
    """Scores by split and metric: one number in [-1, 1] for each seed."""

    @property
    def task(self) -> Task:
        """The registry's entry of the run's task."""
        return TASKS[self.config.task.name]

    @property
    def row(self) -> str:
        """Name of the run's row in Table 5. Combinations that are not in the table are named in the same way."""
        architecture = "LSTM" if self.config.model.kind == "lstm" else "Transformer"
        missing = ["pre-training"] * (self.config.init.from_ == "none") + ["aux LM"] * (self.config.task.lm_weight == 0)
        if missing:
            return f"{architecture} w/o {' or '.join(missing)}"
        return "LSTM w/ aux LM" if architecture == "LSTM" else FULL


def print_paper_table(paths: Sequence[Path]) -> None:
    """Prints the table, the settings that differ from the paper's, and the averages over tasks that the runs allow.

    Args:
      paths: folders of fine-tuning runs, each with one or more seeds.

    Raises:
      UserError: a folder does not contain a finished fine-tuning run on one of the paper's tasks.
    """
    runs = [_load_run(path) for path in paths]
    table = [("", "task", "row", "metric", "measured", "on", "paper", "on")]
    for number, run in enumerate(runs, 1):
        for split, scores in run.scores.items():
            for metric, values in scores.items():
                figure = _published(run, metric)
                paper = ("-", "") if figure is None else (f"{figure:.1f}", run.task.published_on)
                table.append((f"[{number}]", run.task.title, run.row, metric, _in_percent(values), SPLITS[split], *paper))
    print(format_table(table, "<" * len(table[0])))
    print("\nAll scores are percentages; for several seeds, the median (lowest to highest). Settings that differ from the paper:")
    for number, run in enumerate(runs, 1):
        seeds = f" ({run.num_seeds} seeds)" if run.num_seeds > 1 else ""
        text = f"[{number}] {run.path}{seeds}: {', '.join(_differences(run)) or 'none'}"
        print(textwrap.fill(text, WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False))
    if averages := list(_averages(runs)):
        print("\n" + "\n".join(averages))


def _load_run(path: Path) -> FinishedRun:
    if not (path / "result.json").is_file():
        raise UserError(f"{path}: has no result.json; --paper takes the folders of finished fine-tuning runs")
    stored = read_json(path / "config.json", {"config": dict, "platform?": (str, None), "init?": (START_SHAPE, None)})
    result = read_json(path / "result.json", {f"{split}?": {str: SCORE} for split in SPLITS} | {"seeds?": [int]})
    config = config_from_dict(stored["config"], path / "config.json")
    if not isinstance(config, FinetuneRunConfig):
        raise UserError(f"{path}: is a pre-training run; --paper takes the folders of finished fine-tuning runs")
    if config.task.name not in TASKS:
        raise UserError(f"{path}: is a run of your own task, which the paper does not report; give runs of the paper's tasks")
    scores: dict[str, dict[str, list[float]]] = {split: {} for split in SPLITS if split in result}
    for split in scores:
        for metric, value in result[split].items():
            values = value["values"] if isinstance(value, dict) else [value]
            if values and metric.partition("/")[0] in TASKS[config.task.name].metrics:
                scores[split][metric] = values
    start = stored.get("init")
    origin = start["fingerprint"] if start else config.init.from_
    return FinishedRun(path, config, origin, stored.get("platform"), len(result.get("seeds", [0])), scores)


def _published(run: FinishedRun, metric: str) -> float | None:
    """Returns the paper's score in percent for a run's row and a metric; None if the paper has none."""
    name, _, group = metric.partition("/")
    if run.row == FULL and (name, group) in run.task.published:
        return run.task.published[name, group]
    return ABLATIONS.get(run.row, {}).get(run.task.name) if metric == run.task.metrics[0] else None


def _in_percent(values: Sequence[float]) -> str:
    middle = f"{100 * median(values):.1f}"
    return middle if len(values) == 1 else f"{middle} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def _averages(runs: Sequence[FinishedRun]) -> Iterator[str]:
    """Yields a line for each average over tasks. All runs in an average have the same pre-trained model, row and split.

    There is no average if two of these runs have the same task, because it is not clear which run to use.
    """
    for origin, row, split in dict.fromkeys((run.origin, run.row, split) for run in runs for split in run.scores):
        group = [run for run in runs if (run.origin, run.row) == (origin, row) and split in run.scores]
        scores = {run.task.name: {metric: median(values) for metric, values in run.scores[split].items()} for run in group}
        if len(scores) < len(group):
            continue
        for name, average in metrics.glue_averages(scores).items():
            paper = ""
            if name == metrics.TABLE_5_MEAN and row in ABLATION_AVERAGES:
                paper = f" (paper {ABLATION_AVERAGES[row]:.1f}, test server)"
            elif name == metrics.GLUE_MEAN and row == FULL:
                paper = f" (paper {GLUE_AVERAGE:.1f} with WNLI, test server)"
            yield f"{name}, {row}, {SPLITS[split]}: {100 * average:.1f}{paper}"


# Fields that are not settings but describe the task, the row or the seed, and fields that only one architecture uses.
NOT_COMPARED = {"model.kind", "task.name", "train.seed"}
TRANSFORMER_FIELDS = {"model.num-layers", "model.num-heads", "model.mlp-dim", "model.layer-norm-epsilon"}
LSTM_FIELDS = {"model.lstm-units"}
VALUE_NAMES = {("init.blocks", -1): "all", ("task.max-train", 0): "all", ("task.max-tokens", 0): "the context"}


def _differences(run: FinishedRun) -> list[str]:
    """Returns a phrase for each setting that differs from the paper's, and for the pre-trained model if there is one."""
    config, init = run.config, run.config.init.from_
    if run.platform:  # replaces "auto" with the type that this platform chose
        dtype: Any = compute_dtype(config.model, run.platform).name
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, compute_dtype=dtype))
    skipped = NOT_COMPARED | (TRANSFORMER_FIELDS if config.model.kind == "lstm" else LSTM_FIELDS)
    if config.task.lm_weight == 0:  # the name of the row includes it
        skipped |= {"task.lm-weight"}
    # These are the paper's settings, including those from which our defaults differ on purpose (docs/paper.md).
    model = ModelConfig(vocab_size=ModelConfig().vocab_size + len(SpecialTokens._fields), compute_dtype="float32")
    task = TaskConfig(bucket_by_length=False, truncation="released")
    paper = flatten_config(FinetuneRunConfig(model=model, task=task))
    differences = [] if init == "none" else [f"init.from {init} (paper: 100 epochs of BooksCorpus)"]
    for name, (value, affects) in flatten_config(config).items():
        expected = paper[name][0]
        if affects == "result" and name not in skipped and value != expected:
            value, expected = VALUE_NAMES.get((name, value), value), VALUE_NAMES.get((name, expected), expected)
            differences.append(f"{name} {value} (paper {expected})")
    return differences
