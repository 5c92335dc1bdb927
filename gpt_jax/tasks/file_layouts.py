"""Where the tasks' rows lie: the files of each release, and the sets of tensorflow-datasets, as data."""

from __future__ import annotations

import dataclasses
from typing import Literal

from gpt_jax.tasks.tables import Format

SplitName = Literal["train", "validation", "test"]

NO_GOLD = "no gold label"
COLUMNS = "wrong number of columns"
EMPTY = "empty text"
JOINED = "rows run together"
"""Why a row may be dropped, and counted, instead of being an error: `Layout.drops` has what is known of a release."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Some of a split's rows: one file, or as many as a glob matches, or one split of tensorflow-datasets."""

    path: str
    """A path below the task's folder, or "name/config:split" in tensorflow-datasets."""
    group: str = ""
    """The part of the split that these rows are, where it is also scored on its own."""
    columns: tuple[str, ...] = ()
    """The columns of a table without a header."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where one release of a task keeps its rows."""

    format: Format | Literal["tfds"]
    train: tuple[Part, ...]
    validation: tuple[Part, ...]
    test: tuple[Part, ...]
    """Empty where the release has no such split."""
    texts: tuple[str | tuple[str, ...], ...]
    """Columns of the texts in the order of the input transformation; several for one text are joined with spaces."""
    label: str
    """Column of the label. A test split may lack it."""
    folders: tuple[str, ...] = ()
    """Names of the task's folder, in case a folder above it is given."""
    articles: bool = False
    """A record is an article with several questions, as in RACE."""
    held_out: int = 0
    """Training rows that are the validation split, when that has none of its own (then both name the same part)."""
    drops: tuple[str, ...] = ()
    """Defects that this release is known to have; such rows are dropped and counted."""


def glue(folder: str, texts: tuple[str, ...], label: str = "label") -> Layout:
    """A task's folder of the GLUE download: tables with a header, the tests without labels."""
    return Layout(
        "tsv",
        train=(Part("train.tsv"),),
        validation=(Part("dev.tsv"),),
        test=(Part("test.tsv"),),
        texts=texts,
        label=label,
        folders=(folder,),
    )


def tfds(name: str, texts: tuple[str, ...]) -> Layout:
    """A set of tensorflow-datasets with the splits and the label's name that are usual there."""
    return Layout(
        "tfds",
        train=(Part(f"{name}:train"),),
        validation=(Part(f"{name}:validation"),),
        test=(Part(f"{name}:test"),),
        texts=texts,
        label="label",
    )


def matched(pattern: str) -> tuple[Part, ...]:
    """The two parts of MultiNLI's splits: from the genres that training has seen, and from others."""
    return tuple(Part(pattern.format(group), group) for group in ("matched", "mismatched"))


def race(kind: Literal["json", "tfds"], pattern: str) -> Layout:
    """RACE, whose splits have questions from middle and from high schools."""

    def parts(split: str) -> tuple[Part, ...]:
        return tuple(Part(pattern.format(split=split, group=group), group) for group in ("middle", "high"))

    return Layout(
        kind,
        train=parts("train"),
        validation=parts("dev"),
        test=parts("test"),
        texts=("context", "A", "B", "C", "D"),
        label="answer",
        folders=("RACE",),
        articles=True,
    )


PAIR = ("sentence1", "sentence2")
QUESTIONS = ("question1", "question2")
PREMISE = ("premise", "hypothesis")
STORY = tuple(f"InputSentence{number}" for number in range(1, 5))
ENDINGS = ("RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2")

SNLI = Layout(
    "jsonl",
    train=(Part("snli_1.0_train.jsonl"),),
    validation=(Part("snli_1.0_dev.jsonl"),),
    test=(Part("snli_1.0_test.jsonl"),),
    texts=PAIR,
    label="gold_label",
    folders=("snli_1.0",),
    drops=(NO_GOLD,),
)
SNLI_TFDS = dataclasses.replace(tfds("snli", PREMISE), drops=(NO_GOLD,))
MNLI = dataclasses.replace(glue("MNLI", PAIR, "gold_label"), validation=matched("dev_{}.tsv"), test=matched("test_{}.tsv"))
MNLI_ORIGINAL = Layout(
    "jsonl",
    train=(Part("multinli_1.0_train.jsonl"),),
    validation=matched("multinli_1.0_dev_{}.jsonl"),
    test=(),
    texts=PAIR,
    label="gold_label",
    folders=("multinli_1.0",),
    drops=(NO_GOLD,),
)
MNLI_TFDS = dataclasses.replace(
    tfds("glue/mnli", PREMISE), validation=matched("glue/mnli:validation_{}"), test=matched("glue/mnli:test_{}")
)
SCITAIL = Layout(
    "tsv",
    train=(Part("scitail_1.0_train.tsv", columns=(*PREMISE, "label")),),
    validation=(Part("scitail_1.0_dev.tsv", columns=(*PREMISE, "label")),),
    test=(Part("scitail_1.0_test.tsv", columns=(*PREMISE, "label")),),
    texts=PREMISE,
    label="label",
    folders=("tsv_format", "SciTailV1.1/tsv_format"),
)
# tensorflow-datasets reads the file as if quotes were special, so that a lone one swallows the rows up to the next: it has 23,097
# training rows where the file has 23,596.
SCITAIL_TFDS = dataclasses.replace(tfds("sci_tail", PREMISE), drops=(JOINED,))
# As in the released code, the validation file is the training data, and 374 of its rows are held out for validation.
STORY_CLOZE = Layout(
    "csv",
    train=(Part("cloze_test_val__spring2016*.csv"),),
    validation=(Part("cloze_test_val__spring2016*.csv"),),
    test=(Part("cloze_test_test__spring2016*.csv"),),
    texts=(STORY, *ENDINGS),
    label="AnswerRightEnding",
    held_out=374,
)
# Its order is not the file's, so other rows are held out than in the released code.
STORY_CLOZE_TFDS = Layout(
    "tfds",
    train=(Part("story_cloze/2016:validation"),),
    validation=(Part("story_cloze/2016:validation"),),
    test=(Part("story_cloze/2016:test"),),
    texts=("context", "endings/0", "endings/1"),
    label="label",
    held_out=374,
)
RACE = race("json", "{split}/{group}/*.txt")
RACE_TFDS = race("tfds", "race/{group}:{split}")
MRPC = glue("MRPC", ("#1 String", "#2 String"), "Quality")
MRPC_ORIGINAL = dataclasses.replace(
    MRPC, train=(Part("msr_paraphrase_train.txt"),), validation=(), test=(Part("msr_paraphrase_test.txt"),)
)
# Earlier releases have rows that are broken at a line end, and in all of them a question or two are empty.
QQP = dataclasses.replace(glue("QQP", QUESTIONS, "is_duplicate"), drops=(COLUMNS, EMPTY))
QQP_TFDS = dataclasses.replace(tfds("glue/qqp", QUESTIONS), drops=(EMPTY,))
COLA = dataclasses.replace(
    glue("CoLA", ("sentence",)),
    train=(Part("train.tsv", columns=("source", "label", "mark", "sentence")),),
    validation=(Part("dev.tsv", columns=("source", "label", "mark", "sentence")),),
)
