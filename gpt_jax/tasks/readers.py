"""Readers of labeled tasks: their files in the released layout, tensorflow-datasets, or the user's own files.

White space is removed from both ends of a text; otherwise, texts are unchanged. A malformed row raises an error that names the
row's location. Only rows with the known defects of a release (`FileLayout.drops`) are dropped and counted instead.
"""

import collections
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax.config import TaskConfig
from gpt_jax.errors import UserError, described, listed, shortened
from gpt_jax.tasks.file_layouts import COLUMNS, EMPTY, JOINED, NO_GOLD, FileLayout, SplitName
from gpt_jax.tasks.labels import HIDDEN, is_missing, label_text, missing_label_fault, score_of
from gpt_jax.tasks.own_tables import read_own_table
from gpt_jax.tasks.readers_tfds import read_tfds
from gpt_jax.tasks.registry import Task
from gpt_jax.tasks.releases import ARTICLE_FIELDS, RecordGroups, open_release
from gpt_jax.tasks.tables import ID_COLUMNS, Record, check_rows

HELD_OUT_SEED = 3535999445
"""The seed that the released code uses to hold out rows of Story Cloze for validation."""


class Example(NamedTuple):
    """A labeled example."""

    id: str
    texts: tuple[str, ...]
    """(text,), (premise, hypothesis), (a, b), or (context, answer 0, answer 1, ...)."""
    label: float | None
    """The index of the label among the task's labels, or the score in a regression; None if the label is hidden."""
    where: str
    """The example's location: "file:line", or "tfds:glue/cola train 17"."""
    group: str = ""
    """The part of the split that the example belongs to, if parts are also scored separately: "matched", "high", ..."""


class TaskSplit(NamedTuple):
    """One split of a task after reading."""

    examples: list[Example]
    num_rows: int
    """Number of rows that were read, including those that were dropped or are not used."""
    dropped: dict[str, int]
    """Numbers of rows that were dropped, by reason."""
    note: str = ""
    """Line for the log about an assumption that was made about a file; empty if there was none."""
    dropped_indices: tuple[int, ...] = ()
    """Indices, within their file, of the rows that were dropped and have an index."""

    def describe_counts(self) -> str:
        """Returns a description of the counts."""
        dropped = "".join(f", {count:,} dropped: {reason}" for reason, count in self.dropped.items() if count)
        return f"{self.num_rows:,} rows read, {len(self.examples):,} used{dropped}"


def read_split(task: Task, config: TaskConfig, split: SplitName) -> TaskSplit | None:
    """Reads one split of a task.

    Args:
      task: the task of the config (`registry.task_from_config`).
      config: its fields determine where the rows are. `max_train` is not applied here.
      split: the name of the split. Test splits may lack labels.

    Returns:
      The split, with its examples in the order of the files; None if the release or the user's config does not have the split.

    Raises:
      UserError: files are missing, or their release lacks a validation split. For the following errors, the message names file
        and line: a column is missing, a row has too few or too many columns, a label is not in the label set, a score is not a
        number, a text is empty, the number of answers is wrong, or some bytes are not UTF-8.
    """
    layout, groups, note = (_open_named_task if config.name else _open_own_task)(task, config, split)
    if not groups:
        return None
    classes = {} if task.regression else {label_text(name): number for number, name in enumerate(task.labels)}
    examples: list[Example] = []
    faults: list[tuple[str, str]] = []
    dropped: collections.Counter[str] = collections.Counter()
    dropped_indices: list[int] = []
    num_rows = 0
    for group, records in groups.items():
        for record in _split_articles(records, task.labels) if layout.articles else records:
            try:
                texts = _parse_texts(layout, record)
                label = _parse_label(task, classes, layout, record, split)
                examples.append(Example(_row_id(record, num_rows), texts, label, record.where, group))
            except _MalformedRow as error:
                if error.kind in layout.drops:
                    dropped[error.kind] += 1
                else:
                    faults.append((record.where, str(error)))
                # The second part of a row that is broken at a line end may begin with any number, but an index is never greater
                # than the number of rows before it.
                if (index := _row_id(record, num_rows)).isdecimal() and int(index) <= num_rows:
                    dropped_indices.append(int(index))
            num_rows += 1
    check_rows(faults)
    if not examples:
        field = f"task.{'path' if config.name else split}"
        raise UserError(f"--{field}: the {split} split of {task.title} has no usable rows ({num_rows} read, {num_rows} dropped)")
    if layout.held_out and split != "test":
        examples = _hold_out(examples, layout.held_out, split)
        num_rows = len(examples)
    return TaskSplit(examples, num_rows, dict(dropped), note, tuple(dropped_indices))


# -- sources ----------------------------------------------------------------------------------------------------------------


def _open_named_task(task: Task, config: TaskConfig, split: SplitName) -> tuple[FileLayout, RecordGroups, str]:
    """Returns the layout of a task of the paper, the records of one of its splits, and a note for the log."""
    if config.path:
        return *open_release(task, Path(config.path), split), ""
    layout = task.tfds
    assert layout is not None
    hidden_label = "-" if NO_GOLD in layout.drops else None
    parts = layout.paths(split).items()
    return layout, {group: read_tfds(path, layout.label, task.labels, hidden_label) for group, path in parts}, ""


def _open_own_task(task: Task, config: TaskConfig, split: SplitName) -> tuple[FileLayout, RecordGroups, str]:
    """Returns the layout of a user-defined task, the records of one of its splits, and a note for the log."""
    path = getattr(config, split)
    if not path:
        return FileLayout("tsv", path, config.texts), {}, ""
    table = read_own_table(path, f"task.{split}", (*config.texts, config.label))
    texts = tuple(table.find_columns(name, "task.texts") for name in config.texts)
    # A test split may lack the column, but must not capitalize it differently.
    if split != "test" or config.label.casefold() in map(str.casefold, table.columns):
        table.require_columns((config.label,), "task.label")
    return FileLayout("tsv", path, texts, config.label), {"": table.records}, table.note


# -- rows -------------------------------------------------------------------------------------------------------------------


class _MalformedRow(Exception):
    """An error in a row. `kind` is one of the known defects of releases, or empty."""

    def __init__(self, message: str, kind: str = ""):
        super().__init__(message)
        self.kind = kind


def _row_id(record: Record, number: int) -> str:
    """Returns the value of the column that identifies a row, or the row's number in the split if there is no such column."""
    return str(next((record.fields[column] for column in ID_COLUMNS if column in record.fields), number))


def _parse_texts(layout: FileLayout, record: Record) -> tuple[str, ...]:
    if record.fault:
        raise _MalformedRow(record.fault, COLUMNS)
    texts = tuple(_join_columns((text,) if isinstance(text, str) else text, record.fields) for text in layout.texts)
    if JOINED in layout.drops and any("\t" in text for text in texts):
        raise _MalformedRow("a text contains a tab", JOINED)
    return texts


def _join_columns(columns: tuple[str, ...], fields: Mapping[str, Any]) -> str:
    """Returns the text of a column, or those of several columns, of which some may be empty, with spaces between them."""
    values = [fields.get(column) for column in columns]
    for column, value in zip(columns, values, strict=True):
        if not isinstance(value, str) and not (value is None and len(columns) > 1):
            raise _MalformedRow(f"'{column}' must be a string, not {described(value)}")
    text = " ".join(value for value in values if value and value.strip()).strip()
    if not text:
        name = "+".join(columns)
        raise _MalformedRow(f"'{name}' is empty; every text needs at least one character that is not white space", EMPTY)
    return text


def _parse_label(task: Task, classes: Mapping[str, int], layout: FileLayout, record: Record, split: SplitName) -> float | None:
    """Returns the index of a label, or the score of a regression; None if it is hidden.

    Args:
      task: the task.
      classes: the index of each label by its text; empty if the task is a regression.
      layout: the layout of the file.
      record: the row.
      split: the split; only a test split may have hidden labels.
    """
    try:
        text = label_text(record.fields.get(layout.label))
    except ValueError as error:
        raise _MalformedRow(str(error)) from None
    label: float | None = classes.get(text)
    if task.regression:
        score = score_of(text)
        label = score if score is not None and float(task.labels[0]) <= score <= float(task.labels[-1]) else None
    if label is not None:
        return float(label)
    if text == "-" and NO_GOLD in layout.drops:
        raise _MalformedRow("there is no gold label", NO_GOLD)
    if split == "test" and (is_missing(text) or text == HIDDEN):
        return None
    if is_missing(text):
        raise _MalformedRow(missing_label_fault(text))
    if task.regression:
        wanted = f"a number from {task.labels[0]} to {task.labels[-1]}, with a decimal point"
        raise _MalformedRow(f"the score is '{shortened(text)}'; it must be {wanted}")
    raise _MalformedRow(f"the label is '{shortened(text)}'; it must be one of {listed(task.labels)}")


def _hold_out(examples: list[Example], size: int, split: SplitName) -> list[Example]:
    """Returns the examples that the released code trains on, or those that it validates on, in its order."""
    from sklearn.model_selection import train_test_split

    if len(examples) <= size:
        raise UserError(f"{examples[0].where}: the file has {len(examples)} rows, but {size} are to be held out for validation")
    train, validation = train_test_split(examples, test_size=size, random_state=HELD_OUT_SEED)
    return train if split == "train" else validation


# -- articles with questions ------------------------------------------------------------------------------------------------


def _split_articles(records: Iterable[Record], letters: tuple[str, ...]) -> Iterator[Record]:
    """Yields a record for each question of each article. Its context is the article followed by the question."""
    for record in records:
        article, *lists = (record.fields[field] for field in ARTICLE_FIELDS)
        if not isinstance(article, str) or not all(isinstance(items, list) and len(items) == len(lists[0]) for items in lists):
            raise UserError(
                f"{record.where}: 'article' must be a string, and {', '.join(ARTICLE_FIELDS[1:])} must be lists of equal length"
            )
        name = record.fields.get("id") or record.fields.get("example_id")
        for number, (question, options, answer) in enumerate(zip(*lists, strict=True)):
            fields = {"id": f"{name}/{number}", "context": f"{article} {question}", "answer": answer}
            options = options if isinstance(options, list) else [options]
            fault = "" if len(options) == len(letters) else f"{len(options)} options; every question must have {len(letters)}"
            yield Record(f"{record.where} question {number}", fields | dict(zip(letters, options, strict=False)), fault)
