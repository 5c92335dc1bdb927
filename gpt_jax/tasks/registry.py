"""The labelled tasks as data: what each predicts, how it is scored, where its rows lie, and what the paper reports.

Tables and sections are those of "Improving Language Understanding by Generative Pre-Training" (2018). Figures are in percent.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from gpt_jax.config import TaskConfig
from gpt_jax.errors import UserError, nearest
from gpt_jax.tasks import file_layouts, tables
from gpt_jax.tasks.file_layouts import Layout, glue, tfds

Kind = Literal["classification", "entailment", "similarity", "multiple_choice"]


@dataclasses.dataclass(frozen=True)
class Task:
    """A labelled task."""

    name: str
    title: str
    kind: Kind
    labels: tuple[str, ...]
    """The label set in the order of the classifier's outputs. Of a multiple choice, what the answers are called; of a regression,
    the whole numbers that its scores lie between."""
    metrics: tuple[str, ...]
    """Names in `scoring.METRICS`; the first chooses the best checkpoint, and is the paper's."""
    regression: bool = False
    """Labels are scores rather than members of `labels`."""
    files: tuple[Layout, ...] = ()
    """The layouts that files of this task come in."""
    tfds: Layout | None = None
    """The same in tensorflow-datasets; None for a task of the user's own."""
    published: Mapping[tuple[str, str], float] = dataclasses.field(default_factory=dict)
    """The paper's figures by metric and group ("": the whole split)."""
    published_on: Literal["test server", "test split", ""] = ""
    """What those were measured on: GLUE's server, which keeps the labels of its tests to itself, or a public test split."""


def named(name: str) -> Task:
    """The task of that name.

    Raises:
      UserError: there is none; the nearest names are offered.
    """
    if name not in TASKS:
        raise UserError(f"--task.name: no task is named '{name}'; {nearest(name, TASKS)}")
    return TASKS[name]


def own(config: TaskConfig) -> Task:
    """The task that `config` describes by the fields from `kind` to `labels`.

    Raises:
      UserError: nothing describes a task; fewer than two labels, the same one twice, or not one for each answer; or what
        `tables.records` raises for the training rows, where the labels are theirs.
    """
    if not (config.train or config.validation or config.test):
        raise UserError(f"--task.name: name a task ({', '.join(TASKS)}), or give rows of your own with --task.train")
    answers = len(config.texts) - 1 if config.kind == "multiple_choice" else 0
    labels = config.labels or (tuple(map(str, range(answers))) if answers else _labels_in(config))
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise UserError(f"--task.labels: two different labels or more are needed; found: {', '.join(labels) or 'none'}")
    if answers and len(labels) != answers:
        raise UserError(f"--task.labels: {len(labels)} labels for the {answers} answers in --task.texts; give one for each")
    return Task("", "own task", config.kind, labels, metrics=("accuracy",))


def _labels_in(config: TaskConfig) -> tuple[str, ...]:
    """The labels of the training rows, sorted: by value if all are whole numbers."""
    if not config.train:
        raise UserError("--task.labels: without training rows (--task.train) to take them from, the labels must be given")
    path, kind = tables.locate(config.train, "task.train")
    rows = tables.records(path, kind, {config.label: "task.label"})
    found = {label for row in rows if (label := label_text(row.fields.get(config.label))) is not None}
    numbers = all(re.fullmatch(r"-?\d+", label) for label in found)
    return tuple(sorted(found, key=int if numbers else None))


def label_text(value: Any) -> str | None:
    """A label as it is written in a file, where JSON may hold it as a number; None: there is none."""
    if value is None:
        return None
    return value.strip() if isinstance(value, str) else json.dumps(value)


# -- the tasks --------------------------------------------------------------------------------------------------------------

NLI = ("entailment", "neutral", "contradiction")
BINARY_NLI = ("entailment", "not_entailment")

_TASKS = (
    Task(
        "snli",
        "SNLI",
        "entailment",
        NLI,
        metrics=("accuracy",),
        files=(file_layouts.SNLI,),
        tfds=file_layouts.SNLI_TFDS,
        published={("accuracy", ""): 89.9},
        published_on="test split",
    ),
    Task(
        "mnli",
        "MultiNLI",
        "entailment",
        NLI,
        metrics=("accuracy",),
        files=(file_layouts.MNLI, file_layouts.MNLI_ORIGINAL),
        tfds=file_layouts.MNLI_TFDS,
        published={("accuracy", "matched"): 82.1, ("accuracy", "mismatched"): 81.4},
        published_on="test server",
    ),
    Task(
        "qnli",
        "QNLI",
        "entailment",
        BINARY_NLI,
        metrics=("accuracy",),
        files=(glue("QNLI", ("question", "sentence")),),
        tfds=tfds("glue/qnli", ("question", "sentence")),
        published={("accuracy", ""): 88.1},
        published_on="test server",
    ),
    Task(
        "rte",
        "RTE",
        "entailment",
        BINARY_NLI,
        metrics=("accuracy",),
        files=(glue("RTE", file_layouts.PAIR),),
        tfds=tfds("glue/rte", file_layouts.PAIR),
        published={("accuracy", ""): 56.0},
        published_on="test server",
    ),
    Task(
        "scitail",
        "SciTail",
        "entailment",
        ("entails", "neutral"),
        metrics=("accuracy",),
        files=(file_layouts.SCITAIL,),
        tfds=file_layouts.SCITAIL_TFDS,
        published={("accuracy", ""): 88.3},
        published_on="test split",
    ),
    Task(
        "story_cloze",
        "Story Cloze",
        "multiple_choice",
        ("1", "2"),
        metrics=("accuracy",),
        files=(file_layouts.STORY_CLOZE,),
        tfds=file_layouts.STORY_CLOZE_TFDS,
        published={("accuracy", ""): 86.5},
        published_on="test split",
    ),
    Task(
        "race",
        "RACE",
        "multiple_choice",
        ("A", "B", "C", "D"),
        metrics=("accuracy",),
        files=(file_layouts.RACE,),
        tfds=file_layouts.RACE_TFDS,
        published={("accuracy", "middle"): 62.9, ("accuracy", "high"): 57.4, ("accuracy", ""): 59.0},
        published_on="test split",
    ),
    Task(
        "mrpc",
        "MRPC",
        "similarity",
        ("0", "1"),
        metrics=("f1", "accuracy"),
        files=(file_layouts.MRPC, file_layouts.MRPC_ORIGINAL),
        tfds=tfds("glue/mrpc", file_layouts.PAIR),
        published={("f1", ""): 82.3},
        published_on="test server",
    ),
    Task(
        "qqp",
        "QQP",
        "similarity",
        ("0", "1"),
        metrics=("f1", "accuracy"),
        files=(file_layouts.QQP,),
        tfds=file_layouts.QQP_TFDS,
        published={("f1", ""): 70.3},
        published_on="test server",
    ),
    Task(
        "stsb",
        "STS-B",
        "similarity",
        ("0", "1", "2", "3", "4", "5"),
        metrics=("pearson", "spearman"),
        regression=True,
        files=(glue("STS-B", file_layouts.PAIR, "score"),),
        tfds=tfds("glue/stsb", file_layouts.PAIR),
        published={("pearson", ""): 82.0},
        published_on="test server",
    ),
    Task(
        "cola",
        "CoLA",
        "classification",
        ("0", "1"),
        metrics=("matthews", "accuracy"),
        files=(file_layouts.COLA,),
        tfds=tfds("glue/cola", ("sentence",)),
        published={("matthews", ""): 45.4},
        published_on="test server",
    ),
    Task(
        "sst2",
        "SST-2",
        "classification",
        ("0", "1"),
        metrics=("accuracy",),
        files=(glue("SST-2", ("sentence",)),),
        tfds=tfds("glue/sst2", ("sentence",)),
        published={("accuracy", ""): 91.3},
        published_on="test server",
    ),
)

TASKS = {task.name: task for task in _TASKS}
"""The twelve tasks of section 4.2 by name, with the figures of tables 2 (entailment), 3 (multiple choice) and 4 (the others)."""

GLUE_AVERAGE = 72.8
"""The benchmark's own average of its tasks (Table 4)."""

_ABLATION_TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
_ABLATION_FIGURES = {
    "Transformer w/ aux LM (full)": (45.4, 91.3, 82.3, 82.0, 70.3, 81.8, 88.1, 56.0),
    "Transformer w/o pre-training": (18.9, 84.0, 79.4, 30.9, 65.5, 75.7, 71.2, 53.8),
    "Transformer w/o aux LM": (47.9, 92.0, 84.9, 83.2, 69.8, 81.1, 86.9, 54.4),
    "LSTM w/ aux LM": (30.3, 90.5, 83.2, 71.8, 68.1, 73.7, 81.1, 54.6),
}
ABLATIONS = {row: dict(zip(_ABLATION_TASKS, figures, strict=True)) for row, figures in _ABLATION_FIGURES.items()}
"""Table 5: for each of its rows, the figure of each task in the metric that is the task's first, from the test server."""
ABLATION_AVERAGES = {
    "Transformer w/ aux LM (full)": 74.7,
    "Transformer w/o pre-training": 59.9,
    "Transformer w/o aux LM": 75.0,
    "LSTM w/ aux LM": 69.1,
}
"""The first column of Table 5: the unweighted mean of its eight figures."""
