"""The labeled tasks as data: their labels, metrics and files, and the figures that the paper reports.

Tables and sections are those of "Improving Language Understanding by Generative Pre-Training" (2018). Figures are in percent.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np
from jaxtyping import Float64

from gpt_jax.config import TaskConfig
from gpt_jax.errors import UserError, listed, nearest, require
from gpt_jax.tasks.file_layouts import COLUMNS, EMPTY, JOINED, NO_GOLD, PAIR, PREMISE, SPLITS, FileLayout, glue, nli, tfds
from gpt_jax.tasks.labels import MAX_CLASSES, classes_of, label_text
from gpt_jax.tasks.own_tables import read_own_table

TaskKind = Literal["classification", "entailment", "similarity", "multiple_choice"]


@dataclasses.dataclass(frozen=True)
class Task:
    """A labeled task."""

    name: str
    title: str
    kind: TaskKind
    labels: tuple[str, ...]
    """The labels in the order of the classifier's outputs: names of classes, names of the answers of a multiple-choice question,
    or all integers in the range of a regression's scores."""
    files: tuple[FileLayout, ...] = ()
    """The layouts in which files of the task were released; empty for a user-defined task."""
    tfds: FileLayout | None = None
    """The layout in tensorflow-datasets; None for a user-defined task."""
    metrics: tuple[str, ...] = ("accuracy",)
    """Names of metrics, as in `metrics.compute_metric`. The first one is the paper's and determines the best checkpoint."""
    regression: bool = False
    """Whether labels are scores rather than members of `labels`."""

    @property
    def output_values(self) -> Float64[np.ndarray, " outputs"]:
        """The score that each output of a regression stands for, or the index of each label."""
        return np.array(self.labels, np.float64) if self.regression else np.arange(len(self.labels), dtype=np.float64)

    @property
    def glue_name(self) -> str:
        """The name of the task and of its folder in the GLUE benchmark; empty for other tasks."""
        return self.files[0].folders[0] if self.tfds and self.tfds.path.startswith("glue/") else ""

    @property
    def published(self) -> Mapping[tuple[str, str], float]:
        """The paper's figures by metric and group, as in `PUBLISHED`; empty for a user-defined task."""
        return PUBLISHED.get(self.name, {})

    @property
    def published_on(self) -> str:
        """The split that the paper's figures are for. Only GLUE's server has the labels of its test splits."""
        return "test server" if self.glue_name else "test split"


def get_task(name: str) -> Task:
    """Returns the task with this name.

    Raises:
      UserError: there is no such task; the message contains the nearest names.
    """
    if name not in TASKS:
        raise UserError(f"--task.name: there is no task '{name}'; {nearest(name, TASKS)}")
    return TASKS[name]


METRICS = {"classes": ("accuracy", "f1", "matthews"), "answers": ("accuracy",), "scores": ("pearson", "spearman")}
"""Metrics of a user-defined task, by the kind of its labels."""


def task_from_config(config: TaskConfig) -> Task:
    """Returns the task that a config names, or the one that its fields from `kind` to `metrics` describe.

    Raises:
      UserError: no task has that name; the config does not describe a task; there are fewer than two labels, a label occurs
        twice, or there is not one label for each answer; the metrics are not for labels of this kind; or the labels cannot be
        read from the training rows.
    """
    if config.name:
        return get_task(config.name)
    if not (config.train or config.validation or config.test):
        raise UserError(f"--task.name: name a task ({', '.join(TASKS)}), or give rows of your own with --task.train")
    kind = "answers" if config.kind == "multiple_choice" else "scores" if config.score_range else "classes"
    labels = _own_labels(config)
    metrics = config.metrics or (METRICS[kind] if kind == "scores" else ("accuracy",))
    for metric in metrics:
        require(metric in METRICS[kind], "task.metrics", f"'{metric}' is not a metric for {kind}; known: {listed(METRICS[kind])}")
    wanted = f"f1 is a metric for two labels, not for {len(labels)}; use accuracy or matthews"
    require("f1" not in metrics or len(labels) == 2, "task.metrics", wanted)
    return Task("", "own task", config.kind, labels, metrics=metrics, regression=kind == "scores")


def _own_labels(config: TaskConfig) -> tuple[str, ...]:
    """Returns the labels of a user-defined task."""
    answers = len(config.texts) - 1 if config.kind == "multiple_choice" else 0
    if config.score_range:
        span = config.score_range[-1] - config.score_range[0] if len(config.score_range) == 2 else 0
        wanted = f"must be the lowest and the highest score, less than {MAX_CLASSES:,} apart, such as 0 5"
        require(0 < span < MAX_CLASSES, "task.score_range", wanted)
        require(not answers, "task.score_range", "does not apply to multiple_choice, whose labels are answers")
        require(not config.labels, "task.labels", "are names of classes; omit them with --task.score-range")
        return tuple(str(config.score_range[0] + k) for k in range(span + 1))
    labels = config.labels or (tuple(map(str, range(answers))) if answers else _labels_of_rows(config))
    if len(labels) < 2 or len(set(map(label_text, labels)) - {""}) < len(labels):
        raise UserError(f"--task.labels: give two or more different labels, not {listed(labels) or 'none'}")
    if answers and len(labels) != answers:
        raise UserError(f"--task.labels: {len(labels)} labels for the {answers} answers in --task.texts; give one for each")
    return labels


def _labels_of_rows(config: TaskConfig) -> tuple[str, ...]:
    """Returns the classes of the training rows."""
    if not config.train:
        raise UserError("--task.labels: give the labels, since there are no training rows (--task.train) to read them from")
    table = read_own_table(config.train, "task.train", (*config.texts, config.label))
    table.require_columns((config.label,), "task.label")
    if not table.records:
        raise UserError(f"--task.train: {table.path} has no rows")
    return classes_of(table.records, config.label)


# -- the tasks --------------------------------------------------------------------------------------------------------------

NLI = ("entailment", "neutral", "contradiction")
BINARY_NLI = ("entailment", "not_entailment")
BINARY = ("0", "1")
SCORES = ("0", "1", "2", "3", "4", "5")

QNLI_TEXTS = ("question", "sentence")
QQP_TEXTS = ("question1", "question2")
COLA_COLUMNS = ("source", "label", "mark", "sentence")
MATCHED = ("matched", "mismatched")  # MultiNLI: genres that occur in the training split, and other genres

MNLI_FILES = (
    glue("MNLI", PAIR, label="gold_label", split_names=("train", "dev_{group}", "test_{group}"), groups=MATCHED),
    nli("multinli_1.0", split_names=("train", "dev_{group}", ""), groups=MATCHED),
)
MNLI_TFDS = tfds("glue/mnli", PREMISE, ("train", "validation_{group}", "test_{group}"), groups=MATCHED)
SCITAIL = FileLayout(
    "tsv",
    "scitail_1.0_{split}.tsv",
    PREMISE,
    headers=dict.fromkeys(SPLITS, (*PREMISE, "label")),
    folders=("tsv_format", "SciTailV1.1/tsv_format"),
)
# tensorflow-datasets treats quotes in the file as special characters, so a single quote joins all rows up to the next one. It has
# 23,097 training rows, while the file has 23,596.
SCITAIL_TFDS = tfds("sci_tail", PREMISE, drops=(JOINED,))
# As in the released code, the validation file provides the training data, and 374 of its rows are held out for validation. In the
# release of winter 2018, the test file has no labels.
STORY_CLOZE = FileLayout(
    "csv",
    "cloze_test_{split}__spring2016*.csv",
    (tuple(f"InputSentence{number}" for number in range(1, 5)), "RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2"),
    label="AnswerRightEnding",
    split_names=("val", "val", "test"),
    held_out=374,
)
STORY_CLOZE_2018 = dataclasses.replace(STORY_CLOZE, path="cloze_test_{split}__winter2018*.csv")
# The rows are not in the order of the file, so the rows that are held out are not those of the released code.
STORY_CLOZE_TFDS = tfds(
    "story_cloze/2016", ("context", "endings/0", "endings/1"), ("validation", "validation", "test"), held_out=374
)
RACE = FileLayout(
    "json",
    "{split}/{group}/*.txt",
    ("context", "A", "B", "C", "D"),
    label="answer",
    groups=("middle", "high"),  # schools
    folders=("RACE",),
    articles=True,
)
RACE_TFDS = dataclasses.replace(RACE, format="tfds", path="race/{group}:{split}")
MRPC = glue("MRPC", ("#1 String", "#2 String"), label="Quality")
MRPC_ORIGINAL = dataclasses.replace(MRPC, path="msr_paraphrase_{split}.txt", split_names=("train", "", "test"), superseded=True)
# Earlier releases have rows that are broken at a line end, and every release has a few empty questions.
QQP = glue("QQP", QQP_TEXTS, label="is_duplicate", drops=(COLUMNS, EMPTY))
STSB = glue("STS-B", PAIR, label="score")
COLA = glue("CoLA", ("sentence",), headers={"train": COLA_COLUMNS, "validation": COLA_COLUMNS})

_TASKS = (
    Task("snli", "SNLI", "entailment", NLI, (nli("snli_1.0"),), tfds("snli", PREMISE, drops=(NO_GOLD,))),
    Task("mnli", "MultiNLI", "entailment", NLI, MNLI_FILES, MNLI_TFDS),
    Task("qnli", "QNLI", "entailment", BINARY_NLI, (glue("QNLI", QNLI_TEXTS),), tfds("glue/qnli", QNLI_TEXTS)),
    Task("rte", "RTE", "entailment", BINARY_NLI, (glue("RTE", PAIR),), tfds("glue/rte", PAIR)),
    Task("scitail", "SciTail", "entailment", ("entails", "neutral"), (SCITAIL,), SCITAIL_TFDS),
    Task("story_cloze", "Story Cloze", "multiple_choice", ("1", "2"), (STORY_CLOZE, STORY_CLOZE_2018), STORY_CLOZE_TFDS),
    Task("race", "RACE", "multiple_choice", ("A", "B", "C", "D"), (RACE,), RACE_TFDS),
    Task("mrpc", "MRPC", "similarity", BINARY, (MRPC, MRPC_ORIGINAL), tfds("glue/mrpc", PAIR), ("f1", "accuracy")),
    Task("qqp", "QQP", "similarity", BINARY, (QQP,), tfds("glue/qqp", QQP_TEXTS, drops=(EMPTY,)), ("f1", "accuracy")),
    Task("stsb", "STS-B", "similarity", SCORES, (STSB,), tfds("glue/stsb", PAIR), ("pearson", "spearman"), regression=True),
    Task("cola", "CoLA", "classification", BINARY, (COLA,), tfds("glue/cola", ("sentence",)), ("matthews", "accuracy")),
    Task("sst2", "SST-2", "classification", BINARY, (glue("SST-2", ("sentence",)),), tfds("glue/sst2", ("sentence",))),
)

TASKS = {task.name: task for task in _TASKS}
"""The twelve tasks of section 4.2 by name."""

# -- the paper's figures ----------------------------------------------------------------------------------------------------

PUBLISHED: Mapping[str, Mapping[tuple[str, str], float]] = {
    "mnli": {("accuracy", "matched"): 82.1, ("accuracy", "mismatched"): 81.4},
    "snli": {("accuracy", ""): 89.9},
    "scitail": {("accuracy", ""): 88.3},
    "qnli": {("accuracy", ""): 88.1},
    "rte": {("accuracy", ""): 56.0},
    "story_cloze": {("accuracy", ""): 86.5},
    "race": {("accuracy", "middle"): 62.9, ("accuracy", "high"): 57.4, ("accuracy", ""): 59.0},
    "cola": {("matthews", ""): 45.4},
    "sst2": {("accuracy", ""): 91.3},
    "mrpc": {("f1", ""): 82.3},
    "stsb": {("pearson", ""): 82.0},
    "qqp": {("f1", ""): 70.3},
}
"""The figures of Table 2 (entailment), Table 3 (multiple choice) and Table 4 (other tasks) by task, then by metric and group. The
group "" is the complete split."""

GLUE_AVERAGE = 72.8
"""The GLUE benchmark's own average of its tasks (Table 4)."""

_TABLE_5_COLUMNS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
_TABLE_5 = {
    "Transformer w/ aux LM (full)": (74.7, 45.4, 91.3, 82.3, 82.0, 70.3, 81.8, 88.1, 56.0),
    "Transformer w/o pre-training": (59.9, 18.9, 84.0, 79.4, 30.9, 65.5, 75.7, 71.2, 53.8),
    "Transformer w/o aux LM": (75.0, 47.9, 92.0, 84.9, 83.2, 69.8, 81.1, 86.9, 54.4),
    "LSTM w/ aux LM": (69.1, 30.3, 90.5, 83.2, 71.8, 68.1, 73.7, 81.1, 54.6),
}
ABLATION_AVERAGES = {model: average for model, (average, *_) in _TABLE_5.items()}
"""The first column of Table 5: the unweighted mean of the other eight."""
ABLATIONS = {model: dict(zip(_TABLE_5_COLUMNS, figures, strict=True)) for model, (_, *figures) in _TABLE_5.items()}
"""The figures of Table 5 by model and task, from the test server. Each figure is for the first of the task's metrics."""
