"""Readers of labeled tasks: their files in the released layout, tensorflow-datasets, or the user's own files.

White space is removed from both ends of a text; otherwise, texts are unchanged. A malformed row raises an error that names the
row's location. Only rows with the known defects of a release (`FileLayout.drops`) are dropped and counted instead.
"""

import collections
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from gpt_jax.config import TaskConfig
from gpt_jax.errors import UserError, described
from gpt_jax.tasks import tables
from gpt_jax.tasks.file_layouts import COLUMNS, EMPTY, JOINED, NO_GOLD, SPLITS, FileLayout, SplitName
from gpt_jax.tasks.readers_tfds import read_tfds
from gpt_jax.tasks.registry import Task, label_text
from gpt_jax.tasks.tables import Record

ID_COLUMNS = ("index", "idx", "id", "pairID", "InputStoryid")
"""Columns that identify a row, in order of preference. Rows without any of them are numbered from 0."""

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
    layout, groups = (_open_named_task if config.name else _open_own_task)(task, config, split)
    if not groups:
        return None
    examples: list[Example] = []
    dropped: collections.Counter[str] = collections.Counter()
    dropped_indices: list[int] = []
    num_rows = 0
    for group, records in groups.items():
        for record in _split_articles(records, task.labels) if layout.articles else records:
            try:
                examples.append(_parse_example(task, layout, group, record, num_rows, split))
            except _MalformedRow as error:
                if error.defect not in layout.drops:
                    raise UserError(f"{record.where}: {error}") from error
                dropped[error.defect] += 1
                # The second part of a row that is broken at a line end may begin with any number, but an index is never greater
                # than the number of rows before it.
                if (index := _row_id(record, num_rows)).isdecimal() and int(index) <= num_rows:
                    dropped_indices.append(int(index))
            num_rows += 1
    if not examples:
        field = f"task.{'path' if config.name else split}"
        raise UserError(f"--{field}: the {split} split of {task.title} has no usable rows ({num_rows} read, {num_rows} dropped)")
    if layout.held_out and split != "test":
        examples = _hold_out(examples, layout.held_out, split)
        num_rows = len(examples)
    return TaskSplit(examples, num_rows, dict(dropped), tuple(dropped_indices))


# -- sources ----------------------------------------------------------------------------------------------------------------

RecordGroups = Mapping[str, Iterable[Record]]
"""The records of a split by group; empty if there is no such split."""


def _open_named_task(task: Task, config: TaskConfig, split: SplitName) -> tuple[FileLayout, RecordGroups]:
    """Returns the layout of a task of the paper, and the records of one of its splits."""
    if not config.path:
        layout = task.tfds
        assert layout is not None
        hidden_label = "-" if NO_GOLD in layout.drops else None
        parts = layout.paths(split).items()
        return layout, {group: read_tfds(path, layout.label, task.labels, hidden_label) for group, path in parts}
    layout, folder = _find_release(task, Path(config.path).expanduser())
    patterns = layout.paths(split)
    if split == "validation" and not patterns:
        in_glue = next(iter(task.files[0].paths(split).values()))
        raise UserError(
            f"--task.path: the release of {task.title} in {folder} has no validation split; give the folder of the GLUE "
            f"download, which has {in_glue}, or leave --task.path out to use tensorflow-datasets"
        )
    files = {group: sorted(folder.glob(pattern)) for group, pattern in patterns.items()}
    if split == "test" and not any(files.values()):
        return layout, {}
    for group, paths in files.items():
        if not paths:
            raise UserError(f"--task.path: {folder} has no {patterns[group]}, which the {split} split of {task.title} needs")
        if len(paths) > 1 and not layout.articles:
            raise UserError(f"--task.path: {folder} has {' and '.join(path.name for path in paths)}; keep one of them")
    return layout, {group: _read_files(layout, paths, split) for group, paths in files.items()}


def _find_release(task: Task, given: Path) -> tuple[FileLayout, Path]:
    """Returns the layout whose files are in the given folder, or in the task's own folder below it, and that folder."""
    if not given.is_dir():
        raise UserError(f"--task.path: there is no folder '{given}'")
    for layout in task.files:
        for folder in (given, *(given / name for name in layout.folders)):
            if any(any(folder.glob(pattern)) for split in SPLITS for pattern in layout.paths(split).values()):
                return layout, folder
    wanted = " or ".join(next(iter(layout.paths("train").values())) for layout in task.files)
    places = ", ".join(dict.fromkeys(str(given / name) for layout in task.files for name in ("", *layout.folders)))
    raise UserError(f"--task.path: there are no files of {task.title}; looked for {wanted} in {places}")


def _read_files(layout: FileLayout, paths: list[Path], split: SplitName) -> Iterator[Record]:
    assert layout.format != "tfds"
    required = ARTICLE_FIELDS if layout.articles else layout.text_columns + (() if split == "test" else (layout.label,))
    for path in paths:
        yield from tables.read_table(path, layout.format, dict.fromkeys(required, ""), layout.headers.get(split, ()))


def _open_own_task(task: Task, config: TaskConfig, split: SplitName) -> tuple[FileLayout, RecordGroups]:
    """Returns the layout of a user-defined task, and the records of one of its splits."""
    path = getattr(config, split)
    required = dict.fromkeys(config.texts, "task.texts") | ({} if split == "test" else {config.label: "task.label"})
    groups = {"": tables.read_own_table(path, f"task.{split}", required)} if path else {}
    return FileLayout("tsv", path, config.texts, config.label), groups


# -- rows -------------------------------------------------------------------------------------------------------------------


class _MalformedRow(Exception):
    """An error in a row. `defect` names the corresponding known defect of releases; it is empty if there is none."""

    def __init__(self, defect: str, message: str):
        super().__init__(message)
        self.defect = defect


def _parse_example(task: Task, layout: FileLayout, group: str, record: Record, number: int, split: SplitName) -> Example:
    if record.fault:
        raise _MalformedRow(COLUMNS, record.fault)
    texts = _parse_texts(layout, record)
    if JOINED in layout.drops and any("\t" in text for text in texts):
        raise _MalformedRow(JOINED, "a text contains a tab")
    label = label_text(record.fields.get(layout.label))
    if label is None and split != "test":
        raise _MalformedRow("", "the label is missing, which is only allowed in a test split")
    return Example(_row_id(record, number), texts, None if label is None else _parse_label(task, label), record.where, group)


def _row_id(record: Record, number: int) -> str:
    """Returns the value of the column that identifies a row, or the row's number in the split if there is no such column."""
    return str(next((record.fields[column] for column in ID_COLUMNS if column in record.fields), number))


def _parse_texts(layout: FileLayout, record: Record) -> tuple[str, ...]:
    for column in layout.text_columns:
        value = record.fields[column]
        if not isinstance(value, str):
            raise _MalformedRow("", f"'{column}' must be a string, not {described(value)}")
        if not value.strip():
            raise _MalformedRow(EMPTY, f"'{column}' is empty; every text needs at least one character that is not white space")
    joined = (record.fields[t] if isinstance(t, str) else " ".join(record.fields[column] for column in t) for t in layout.texts)
    return tuple(text.strip() for text in joined)


def _parse_label(task: Task, label: str) -> float:
    """Returns the index of a label, or the score of a regression."""
    if not task.regression:
        if label not in task.labels:
            defect = NO_GOLD if label == "-" else ""
            raise _MalformedRow(defect, f"the label is '{label}'; it must be one of {', '.join(task.labels)}")
        return float(task.labels.index(label))
    low, high = float(task.labels[0]), float(task.labels[-1])
    try:
        score = float(label)
    except ValueError:
        score = math.nan
    if not low <= score <= high:
        raise _MalformedRow("", f"the score is '{label}'; it must be a number from {low:g} to {high:g}")
    return score


def _hold_out(examples: list[Example], size: int, split: SplitName) -> list[Example]:
    """Returns the examples that the released code trains on, or those that it validates on, in its order."""
    from sklearn.model_selection import train_test_split

    if len(examples) <= size:
        raise UserError(f"{examples[0].where}: the file has {len(examples)} rows, but {size} are to be held out for validation")
    train, validation = train_test_split(examples, test_size=size, random_state=HELD_OUT_SEED)
    return train if split == "train" else validation


# -- articles with questions ------------------------------------------------------------------------------------------------

ARTICLE_FIELDS = ("article", "questions", "options", "answers")
"""Fields of RACE's records: a text, and three lists with one item for each question."""


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
            fault = "" if len(options) == len(letters) else f"{len(options)} options; every question must have {len(letters)}"
            yield Record(f"{record.where} question {number}", fields | dict(zip(letters, options, strict=False)), fault)
