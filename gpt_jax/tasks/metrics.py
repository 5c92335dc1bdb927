"""Predictions from a classifier's probabilities, their scores, and the files that they are written to.

Scores are fractions in [-1, 1]. Printed tables show them in percent, as the paper does. Where definitions vary, the metrics are
defined as follows:

    f1                    of the label with index 1 ("same meaning" in MRPC and QQP), as in the GLUE benchmark
    matthews              for any number of classes
    pearson, spearman     of scores (STS-B)

If all predictions are the same, their correlation with anything is 0 / 0. In this case, Matthews' coefficient is defined as 0.
For two binary variables it equals Pearson's coefficient, so pearson and spearman are also 0. Such a run ranks below any run that
learned something, and its result is still valid JSON. If all labels are the same, the data is wrong and an error is raised.
"""

import functools
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from jaxtyping import Float32, Float64, Int64

from gpt_jax.errors import UserError
from gpt_jax.runtime.rundir import write_atomic
from gpt_jax.tasks.readers import Example
from gpt_jax.tasks.registry import TASKS, Task

Predictions = Int64[np.ndarray, " n"] | Float64[np.ndarray, " n"]
"""For each row the index of a label, or a score if the task is a regression."""


def predict(task: Task, probabilities: Float32[np.ndarray, "n outputs"]) -> Predictions:
    """Returns the most likely label of each row (the first in a tie), or the expected score over the outputs."""
    if task.regression:
        return probabilities.astype(np.float64) @ task.output_values
    return probabilities.argmax(axis=1)


# -- metrics ----------------------------------------------------------------------------------------------------------------


def compute_metric(name: str, labels: Predictions, predictions: Predictions) -> float:
    """Returns a metric of the predictions.

    Args:
      name: "accuracy", "f1", "matthews", "pearson" or "spearman". F1 is 0 if label 1 is never predicted, and the correlations are
        0 if all predictions are the same.
      labels: the correct labels or scores.
      predictions: the predicted labels or scores.
    """
    from scipy import stats
    from sklearn import metrics

    if name in ("pearson", "spearman"):
        if np.ptp(predictions) == 0:
            return 0.0
        correlation = stats.pearsonr if name == "pearson" else stats.spearmanr
        with warnings.catch_warnings():
            # Predictions that are nearly the same for all rows come from a weak model, not from a mistake.
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            return float(correlation(labels, predictions).statistic)
    functions = {
        "accuracy": metrics.accuracy_score,
        "f1": functools.partial(metrics.f1_score, zero_division=0.0),
        "matthews": metrics.matthews_corrcoef,
    }
    return float(functions[name](labels, predictions))


def require_scorable(task: Task, examples: Sequence[Example]) -> None:
    """Checks that the task's metrics can be computed for these examples, so that errors are found before a model is trained.

    Raises:
      UserError: a label is hidden, or all labels are the same and a metric needs two. The message names the rows' files.
    """
    hidden = [example for example in examples if example.label is None]
    if hidden:
        some = f"label all of its rows, or none ({len(hidden):,} of {len(examples):,} are hidden)"
        remedy = some if len(hidden) < len(examples) else "predictions can be written with --out FOLDER"
        raise UserError(f"{hidden[0].where}: the label is hidden, so this split cannot be scored; {remedy}")
    needs_two = " and ".join(metric for metric in task.metrics if metric != "accuracy")
    only = examples[0].label
    if needs_two and only is not None and all(example.label == only for example in examples):
        kind, value = ("score", f"{only:g}") if task.regression else ("class", f"'{_label_name(task, only)}'")
        raise UserError(
            f"{examples[0].where} to {examples[-1].where}: the split has only one {kind}, {value}, from which "
            f"{task.title}'s {needs_two} cannot be computed; use another split"
        )


def score(task: Task, examples: Sequence[Example], predictions: Predictions) -> dict[str, float]:
    """Returns every metric of the task for all examples ("accuracy") and for each group of them ("accuracy/matched").

    Args:
      task: determines the metrics.
      examples: the examples, with labels.
      predictions: what `predict` returned for these examples.

    Raises:
      UserError: as `require_scorable`.
    """
    require_scorable(task, examples)
    labels = np.array([example.label for example in examples]).astype(predictions.dtype)
    group = np.array([example.group for example in examples])
    parts = {"": np.full(len(examples), True)} | {f"/{name}": group == name for name in sorted(set(group.tolist()) - {""})}
    return {
        metric + suffix: compute_metric(metric, labels[part], predictions[part])
        for suffix, part in parts.items()
        for metric in task.metrics
    }


# -- averages of GLUE -------------------------------------------------------------------------------------------------------

GLUE_FILES = {task.name: task.glue_name for task in TASKS.values() if task.glue_name}
"""The names that GLUE's server uses for its tasks, by our names."""

_MNLI = {"mnli": ("accuracy/matched", "accuracy/mismatched")}
_GLUE = {name: TASKS[name].metrics for name in GLUE_FILES} | {"cola": ("matthews",)} | _MNLI
_TABLE_5 = {name: TASKS[name].metrics[:1] for name in GLUE_FILES} | _MNLI

TABLE_5_MEAN = "mean of eight tasks as in Table 5"
GLUE_MEAN = "official GLUE mean except WNLI"


def glue_averages(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Returns the two averages over the tasks of the GLUE benchmark under descriptive names.

    `TABLE_5_MEAN` is the paper's average, 74.7 for its full model: the unweighted mean of eight tasks, with one metric for each.
    The metrics are Matthews for CoLA, F1 for MRPC and QQP, Pearson for STS-B, and accuracy for SST-2, QNLI, RTE and MultiNLI. The
    figure of MultiNLI is the mean of matched and mismatched: the paper's 81.8 is the mean of 82.1 and 81.4 in its Table 2.

    `GLUE_MEAN` is the benchmark's average: the unweighted mean over tasks of the mean of each task's metrics. These are F1 and
    accuracy for MRPC and QQP, Pearson and Spearman for STS-B, and the accuracies on both parts of MultiNLI. The benchmark's own
    figure (72.8 in Table 4) includes a ninth task, WNLI, which neither the paper nor this project evaluates. On WNLI, the paper's
    model has 53.4 on the leaderboard.

    Args:
      scores: what `score` returned, by task; all for the same split.

    Returns:
      Those averages for which `scores` contains all parts.
    """
    return {
        name: fmean(fmean(scores[task][metric] for metric in metrics) for task, metrics in parts.items())
        for name, parts in ((TABLE_5_MEAN, _TABLE_5), (GLUE_MEAN, _GLUE))
        if all(metric in scores.get(task, ()) for task, metrics in parts.items() for metric in metrics)
    }


# -- files ------------------------------------------------------------------------------------------------------------------


def write_predictions(
    path: Path, task: Task, examples: Sequence[Example], probabilities: Float32[np.ndarray, "n outputs"]
) -> None:
    """Writes one JSON object per line for each example, in order.

        {"id": "17", "gold": "entailment", "prediction": "not_entailment", "probabilities": [0.25, 0.75]}

    `gold` (null if the label is hidden) and `prediction` are names of labels, or scores. The order of `probabilities` is that of
    the task's labels.
    """
    lines = []
    for example, predicted, outputs in zip(examples, predict(task, probabilities), probabilities, strict=True):
        line = {
            "id": example.id,
            "gold": example.label if example.label is None or task.regression else _label_name(task, example.label),
            "prediction": float(predicted) if task.regression else _label_name(task, predicted),
            "probabilities": [float(str(output)) for output in outputs],  # the fewest digits that identify a float32
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_atomic(path, "".join(lines))


_GLUE_GROUPS = {"": "", "matched": "-m", "mismatched": "-mm"}


def write_glue(
    folder: Path, task: Task, examples: Sequence[Example], predictions: Predictions, dropped: Sequence[int] = ()
) -> list[Path]:
    """Writes predictions for a test split as the GLUE server expects them: CoLA.tsv, or MNLI-m.tsv and MNLI-mm.tsv.

    A file has a header and one line for each row of the test file, in order: the row's index, counted from 0, and the prediction.
    The prediction is a label as in the data (entailment, neutral, contradiction, not_entailment; 0 or 1 for CoLA, SST-2, MRPC and
    QQP) or a score in [0, 5] with three decimals (STS-B). The server requires every row, so rows that were dropped by the reader,
    such as empty rows of QQP, get the first label. A complete submission also contains WNLI.tsv and the diagnostic AX.tsv.

    Args:
      folder: the folder to write into.
      task: the task.
      examples: the examples of the test split in any order; each `id` is the index within the example's file.
      predictions: what `predict` returned for these examples.
      dropped: indices of rows that were dropped by the reader (`TaskSplit.dropped_indices`). They are needed because dropped rows
        at the end of the file leave no gap. The two files of MultiNLI have no dropped rows.

    Returns:
      The files that were written.

    Raises:
      UserError: the task is not in GLUE, or the examples are not from its test files.
    """
    if not task.glue_name:
        raise UserError(f"--task.name: {task.title} is not in GLUE, whose server takes {', '.join(GLUE_FILES.values())}")
    tables: dict[str, dict[int, str]] = {}
    for example, prediction in zip(examples, predictions, strict=True):
        file = f"{task.glue_name}{_GLUE_GROUPS[example.group]}.tsv"
        table = tables.setdefault(file, {})
        if not example.id.isdecimal() or int(example.id) in table:
            fault = "occurs twice" if example.id.isdecimal() else "is not a number"
            wanted = f"{file} needs the test split of the GLUE download"
            raise UserError(f"{example.where}: the index '{example.id}' {fault}; {wanted}")
        label = f"{min(max(float(prediction), 0.0), 5.0):.3f}" if task.regression else _label_name(task, prediction)
        table[int(example.id)] = label
    for file, table in tables.items():
        size = 1 + max(*table, *dropped, 0)
        lines = [f"{index}\t{table.get(index, task.labels[0])}\n" for index in range(size)]
        write_atomic(folder / file, "index\tprediction\n" + "".join(lines))
    return [folder / file for file in tables]


def _label_name(task: Task, label: float) -> str:
    return task.labels[int(label)]
