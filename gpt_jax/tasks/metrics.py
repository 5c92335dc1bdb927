"""From a classifier's probabilities to predictions, scores and the files they are handed on in.

Scores are fractions in [-1, 1]; what a person sees is a hundred times that, as in the paper. Which metrics a task has is in
`registry`; here is what they mean where textbooks leave a choice:

    f1                    of the label with index 1, "same meaning" in MRPC and QQP, as the GLUE benchmark has it
    matthews              of any number of classes
    pearson, spearman     of a score (STS-B)

A prediction that is the same for all rows has no correlation with anything: the quotient is 0 / 0. Matthews' coefficient takes it
for 0, and it is Pearson's of two binary variables, so pearson and spearman do the same; such a run ranks below any other
that learnt something, and its result stays valid JSON. A gold standard that is the same for all rows is a mistake instead.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from jaxtyping import Float32, Float64, Int64

from gpt_jax.errors import UserError
from gpt_jax.runtime.rundir import write_atomic
from gpt_jax.tasks.readers import Row
from gpt_jax.tasks.registry import Task

Predictions = Int64[np.ndarray, " n"] | Float64[np.ndarray, " n"]
"""The index of a label for each row, or a score where the task is a regression."""


def predict(task: Task, probabilities: Float32[np.ndarray, "n outputs"]) -> Predictions:
    """The likeliest label (of equals the first), or of a regression the expectation sum_k k * p_k over its integer labels."""
    if task.regression:
        return probabilities.astype(np.float64) @ np.arange(probabilities.shape[1])
    return probabilities.argmax(axis=1)


# -- metrics ----------------------------------------------------------------------------------------------------------------


def accuracy(gold: Predictions, predictions: Predictions) -> float:
    """Share of rows whose label is right."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(gold, predictions))


def f1(gold: Predictions, predictions: Predictions) -> float:
    """Harmonic mean of precision and recall of the label with index 1; 0 if it is never predicted."""
    from sklearn.metrics import f1_score

    return float(f1_score(gold, predictions, zero_division=0.0))


def matthews(gold: Predictions, predictions: Predictions) -> float:
    """Matthews' correlation coefficient; 0 if all predictions are the same."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(gold, predictions))


def pearson(gold: Predictions, predictions: Predictions) -> float:
    """Pearson's correlation coefficient; 0 if all predictions are the same."""
    from scipy import stats

    return _correlation(stats.pearsonr, gold, predictions)


def spearman(gold: Predictions, predictions: Predictions) -> float:
    """Pearson's coefficient of the ranks, equals sharing their mean rank; 0 if all predictions are the same."""
    from scipy import stats

    return _correlation(stats.spearmanr, gold, predictions)


def _correlation(function: Callable, gold: Predictions, predictions: Predictions) -> float:
    from scipy.stats import DegenerateDataWarning

    if np.ptp(predictions) == 0:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # almost the same for all rows: a weak model, no mistake
        return float(function(gold, predictions).statistic)


METRICS: dict[str, Callable[[Predictions, Predictions], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
"""Each takes the gold labels or scores and the predictions."""


def require_scorable(task: Task, rows: Sequence[Row]) -> None:
    """Refuses rows that the task's metrics cannot be computed on; worth knowing before a model is trained for them.

    Raises:
      UserError: a label is hidden; or all labels are the same and a metric needs two. It names the rows' files.
    """
    hidden = [row for row in rows if row.label is None]
    if hidden:
        some = len(hidden) < len(rows)
        way = "give all of its rows a label, or none" if some else "predictions can be written with --out FOLDER"
        raise UserError(f"{hidden[0].where}: the label is hidden, so this split cannot be scored; {way}")
    needs_two = [metric for metric in task.metrics if metric != "accuracy"]
    only = rows[0].label
    if needs_two and only is not None and all(row.label == only for row in rows):
        kind, value = ("score", f"{only:g}") if task.regression else ("class", f"'{_name(task, only)}'")
        raise UserError(
            f"{rows[0].where} to {rows[-1].where}: the split has one {kind} only, {value}, and {' and '.join(needs_two)} "
            f"of {task.title} cannot do with fewer than two; give a split with others"
        )


def score(task: Task, rows: Sequence[Row], predictions: Predictions) -> dict[str, float]:
    """Every metric of the task over all rows, "accuracy", and over each group of them, "accuracy/matched".

    Args:
      rows: with labels.
      predictions: of these rows, from `predict`.

    Raises:
      UserError: as `require_scorable`.
    """
    require_scorable(task, rows)
    gold = np.array([row.label for row in rows]).astype(predictions.dtype)
    group = np.array([row.group for row in rows])
    parts = {"": np.full(len(rows), True)} | {f"/{name}": group == name for name in sorted(set(group.tolist()) - {""})}
    return {
        metric + suffix: METRICS[metric](gold[part], predictions[part])
        for suffix, part in parts.items()
        for metric in task.metrics
    }


# -- the averages of GLUE ---------------------------------------------------------------------------------------------------

_GLUE = {
    "cola": ("matthews",),
    "sst2": ("accuracy",),
    "mrpc": ("f1", "accuracy"),
    "stsb": ("pearson", "spearman"),
    "qqp": ("f1", "accuracy"),
    "mnli": ("accuracy/matched", "accuracy/mismatched"),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
}
_TABLE_5 = _GLUE | {"mrpc": ("f1",), "stsb": ("pearson",), "qqp": ("f1",)}

TABLE_5_MEAN = "mean of eight tasks as in Table 5"
GLUE_MEAN = "official GLUE mean but for WNLI"


def glue_averages(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The two averages over the tasks of the GLUE benchmark, each under a name that says what went into it.

    `TABLE_5_MEAN` is the paper's, 74.7 for its full model: the unweighted mean of eight tasks, one metric each. These are
    Matthews for CoLA, F1 for MRPC and QQP, Pearson for STS-B, accuracy for SST-2, QNLI, RTE and MultiNLI, whose figure is the
    mean of matched and mismatched: the paper's 81.8 is that of the 82.1 and 81.4 in its Table 2.

    `GLUE_MEAN` is the benchmark's: the unweighted mean over tasks of the mean of each task's metrics, which are F1 and accuracy
    for MRPC and QQP, Pearson and Spearman for STS-B, and both parts of MultiNLI. The benchmark's own figure (72.8, Table 4) has a
    ninth task, WNLI, which the paper does not treat and which is not among ours; on the leaderboard the paper's model has 53.4.

    Args:
      scores: for each task's name the result of `score`, all of one split.

    Returns:
      Those averages of which every part is in `scores`.
    """
    return {
        name: fmean(fmean(scores[task][metric] for metric in metrics) for task, metrics in parts.items())
        for name, parts in ((TABLE_5_MEAN, _TABLE_5), (GLUE_MEAN, _GLUE))
        if all(metric in scores.get(task, ()) for task, metrics in parts.items() for metric in metrics)
    }


# -- files ------------------------------------------------------------------------------------------------------------------


def write_predictions(path: Path, task: Task, rows: Sequence[Row], probabilities: Float32[np.ndarray, "n outputs"]) -> None:
    """Writes one JSON object a row, in the rows' order.

        {"id": "17", "gold": "entailment", "prediction": "not_entailment", "probabilities": [0.25, 0.75]}

    `gold` (null where it is hidden) and `prediction` are labels by name, or scores; `probabilities` go with the task's labels.
    """
    lines = []
    for row, predicted, outputs in zip(rows, predict(task, probabilities), probabilities, strict=True):
        line = {
            "id": row.id,
            "gold": row.label if row.label is None or task.regression else _name(task, row.label),
            "prediction": float(predicted) if task.regression else _name(task, predicted),
            "probabilities": [float(str(output)) for output in outputs],  # as few digits as tell a float32 apart
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_atomic(path, "".join(lines))


GLUE_FILES = {
    "cola": "CoLA",
    "sst2": "SST-2",
    "mrpc": "MRPC",
    "stsb": "STS-B",
    "qqp": "QQP",
    "mnli": "MNLI",
    "qnli": "QNLI",
    "rte": "RTE",
}
"""The tasks of GLUE by name, and what the server calls them."""
_GLUE_GROUPS = {"": "", "matched": "-m", "mismatched": "-mm"}


def write_glue(
    folder: Path, task: Task, rows: Sequence[Row], predictions: Predictions, dropped: Sequence[int] = ()
) -> list[Path]:
    """Writes the predictions for a hidden test split as the GLUE server takes them: CoLA.tsv, or MNLI-m.tsv and MNLI-mm.tsv.

    A header and a line for each row of the test file, in its order: its index from 0 and the prediction, a label as in the data
    (entailment, neutral, contradiction, not_entailment; 0 or 1 for CoLA, SST-2, MRPC and QQP) or a score in [0, 5] with three
    decimals (STS-B). The server wants every row: one that was dropped in reading, as empty ones of QQP are, gets the first label.
    A submission holds WNLI.tsv and the diagnostic AX.tsv besides.

    Args:
      rows: those of the test split, in any order; each `id` is the index in its file.
      dropped: indices of rows that were dropped in reading (`Split.dropped_indices`): at the file's end they leave no gap. None
        are in the two files of MultiNLI.

    Returns:
      The files written.

    Raises:
      UserError: the task is not in GLUE, or the rows are not those of its test files.
    """
    if task.name not in GLUE_FILES:
        raise UserError(f"--task.name: {task.title} is no task of GLUE, whose server takes {', '.join(GLUE_FILES.values())}")
    tables: dict[str, dict[int, str]] = {}
    for row, prediction in zip(rows, predictions, strict=True):
        file = f"{GLUE_FILES[task.name]}{_GLUE_GROUPS[row.group]}.tsv"
        table = tables.setdefault(file, {})
        if not row.id.isdecimal() or int(row.id) in table:
            fault = "stands there twice" if row.id.isdecimal() else "is no number"
            raise UserError(f"{row.where}: the index '{row.id}' {fault}; {file} needs the test split of the GLUE download")
        table[int(row.id)] = f"{min(max(float(prediction), 0.0), 5.0):.3f}" if task.regression else _name(task, prediction)
    for file, table in tables.items():
        size = 1 + max(*table, *dropped, 0)
        lines = [f"{index}\t{table.get(index, task.labels[0])}\n" for index in range(size)]
        write_atomic(folder / file, "index\tprediction\n" + "".join(lines))
    return [folder / file for file in tables]


def _name(task: Task, label: float) -> str:
    return task.labels[int(label)]
