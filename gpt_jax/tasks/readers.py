"""The rows of a labelled task: from its files in their original layout, from tensorflow-datasets, or from files of one's own.

Texts are stripped of white space at both ends and otherwise left alone. A row that is not as it should be is an error that names
its place; what a release is known to get wrong (`layouts.Layout.drops`) is dropped and counted.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from gpt_jax.config import TaskConfig
from gpt_jax.errors import UserError, described
from gpt_jax.tasks import readers_tfds, tables
from gpt_jax.tasks.file_layouts import COLUMNS, EMPTY, JOINED, NO_GOLD, Layout, Part, SplitName
from gpt_jax.tasks.registry import Task, label_text
from gpt_jax.tasks.tables import Record

ID_COLUMNS = ("index", "idx", "id", "pairID", "InputStoryid")
"""Columns that identify a row, the one to take first. Where there is none, rows are numbered from 0."""

HELD_OUT_SEED = 3535999445
"""The released code's seed, by which it holds rows of Story Cloze out for validation."""


class Row(NamedTuple):
    """A labelled example."""

    id: str
    texts: tuple[str, ...]
    """(text,), (premise, hypothesis), (a, b), or (context, answer 0, answer 1, ...)."""
    label: float | None
    """Index in the task's labels, or the score of a regression; None: hidden."""
    where: str
    """"file:line", or "tfds:glue/cola train 17"."""
    group: str = ""
    """The part of the split that is also scored on its own: "matched" or "mismatched", "middle" or "high"."""


class Split(NamedTuple):
    """The rows of a split."""

    rows: list[Row]
    read: int
    """Rows seen: those in `rows` and those dropped."""
    dropped: dict[str, int]
    """Rows left out, by reason."""
    dropped_indices: tuple[int, ...] = ()
    """The indices in their file of rows left out, where they have one."""

    def counted(self, used: int | None = None) -> str:
        """The counts in words; `used`: how many of `rows` are, if not all."""
        dropped = "".join(f", {count:,} dropped: {reason}" for reason, count in self.dropped.items() if count)
        return f"{self.read:,} rows read, {len(self.rows) if used is None else used:,} used{dropped}"


def read(task: Task, config: TaskConfig, split: SplitName) -> Split | None:
    """Reads one split of a task.

    Args:
      task: `registry.named` or `registry.own` of the config.
      config: says where the rows are; its `max_train` is not applied here.
      split: which one. Test splits may lack labels.

    Returns:
      The rows in the order of their files; None: the release, or the user, has no such split.

    Raises:
      UserError: files that are not there, or a release of them without a validation split; or, with file and line, a missing
        column, a row with too few or too many columns, a label outside the set, a score that is not a number, an empty text, more
        or fewer answers than the task has, bytes that are not UTF-8.
    """
    layout, sources = _named_sources(task, config, split) if config.name else _own_sources(config, split)
    if not sources:
        return None
    rows: list[Row] = []
    dropped: collections.Counter[str] = collections.Counter()
    dropped_indices: list[int] = []
    seen = 0
    for group, records in sources:
        for record in _questions(records, task.labels) if layout.articles else records:
            try:
                rows.append(_row(task, layout, group, record, seen, split))
            except _FaultyRow as fault:
                if fault.reason not in layout.drops:
                    raise UserError(f"{record.where}: {fault}") from fault
                dropped[fault.reason] += 1
                # A row that is broken at a line end has a second piece, which begins with anything; an index does not exceed the
                # number of rows before it.
                if (index := _identity(record, seen)).isdecimal() and int(index) <= seen:
                    dropped_indices.append(int(index))
            seen += 1
    if not rows:
        field = f"task.{'path' if config.name else split}"
        raise UserError(f"--{field}: the {split} split of {task.title} has no rows ({seen} read, {seen} dropped)")
    if layout.held_out and split != "test":
        rows = _held_out(rows, layout.held_out, split)
        seen = len(rows)
    return Split(rows, seen, dict(dropped), tuple(dropped_indices))


# -- where the rows are -----------------------------------------------------------------------------------------------------

Sources = list[tuple[str, Iterable[Record]]]
"""Groups, and the records in each."""


def _named_sources(task: Task, config: TaskConfig, split: SplitName) -> tuple[Layout, Sources]:
    """A task's layout and the records of one of its splits; none where the release, or its user, has no such split."""
    if not config.path:
        layout = task.tfds
        assert layout is not None
        parts: tuple[Part, ...] = getattr(layout, split)
        unlabelled = "-" if NO_GOLD in layout.drops else None
        return layout, [(p.group, readers_tfds.records(p.path, layout.label, task.labels, unlabelled)) for p in parts]
    layout, folder = _locate(task, Path(config.path).expanduser())
    parts = getattr(layout, split)
    if split == "validation" and not parts:
        raise UserError(
            f"--task.path: the release of {task.title} in {folder} has no validation split; give the folder of the GLUE "
            f"download, where it is {task.files[0].validation[0].path}, or leave --task.path out for tensorflow-datasets"
        )
    found = [sorted(folder.glob(part.path)) for part in parts]
    if split == "test" and not any(found):
        return layout, []
    for part, paths in zip(parts, found, strict=True):
        if not paths:
            raise UserError(f"--task.path: {folder} has no {part.path}, which the {split} split of {task.title} needs")
        if len(paths) > 1 and not layout.articles:
            raise UserError(f"--task.path: {folder} has {' and '.join(path.name for path in paths)}; keep one of them")
    return layout, [(part.group, _records(layout, part, paths, split)) for part, paths in zip(parts, found, strict=True)]


def _locate(task: Task, given: Path) -> tuple[Layout, Path]:
    """The layout whose files are in the given folder or in the task's own folder below it."""
    if not given.is_dir():
        raise UserError(f"--task.path: there is no folder '{given}'")
    for layout in task.files:
        for folder in (given, *(given / name for name in layout.folders)):
            if any(any(folder.glob(part.path)) for part in (*layout.train, *layout.validation, *layout.test)):
                return layout, folder
    wanted = " or ".join(layout.train[0].path for layout in task.files)
    places = ", ".join(dict.fromkeys(str(given / name) for layout in task.files for name in ("", *layout.folders)))
    raise UserError(f"--task.path: no files of {task.title}; looked for {wanted} in {places}")


def _records(layout: Layout, part: Part, paths: list[Path], split: SplitName) -> Iterator[Record]:
    assert layout.format != "tfds"
    needed = ARTICLE if layout.articles else (*_columns(layout), *(() if split == "test" else (layout.label,)))
    for path in paths:
        yield from tables.records(path, layout.format, dict.fromkeys(needed, ""), part.columns)


def _own_sources(config: TaskConfig, split: SplitName) -> tuple[Layout, Sources]:
    """The same for a task of the user's own."""
    layout = Layout("tsv", (), (), (), config.texts, config.label)
    given = getattr(config, split)
    if not given:
        return layout, []
    path, kind = tables.locate(given, f"task.{split}")
    needed = dict.fromkeys(config.texts, "task.texts") | ({} if split == "test" else {config.label: "task.label"})
    return layout, [("", tables.records(path, kind, needed))]


def _columns(layout: Layout) -> tuple[str, ...]:
    """The columns that the texts are in."""
    return tuple(column for text in layout.texts for column in ((text,) if isinstance(text, str) else text))


# -- rows -------------------------------------------------------------------------------------------------------------------


class _FaultyRow(Exception):
    """Says what is wrong with a row. `reason` is what it is counted under where a release is known to have such rows."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def _row(task: Task, layout: Layout, group: str, record: Record, number: int, split: SplitName) -> Row:
    if record.fault:
        raise _FaultyRow(COLUMNS, record.fault)
    texts = _texts(layout, record)
    if JOINED in layout.drops and any("\t" in text for text in texts):
        raise _FaultyRow(JOINED, "a text with a tab in it")
    label = label_text(record.fields.get(layout.label))
    if label is None and split != "test":
        raise _FaultyRow("", "no label; only the rows of a test split may lack it")
    return Row(_identity(record, number), texts, None if label is None else _label(task, label), record.where, group)


def _identity(record: Record, number: int) -> str:
    """What names a row in its file, or its number in the split."""
    return str(next((record.fields[column] for column in ID_COLUMNS if column in record.fields), number))


def _texts(layout: Layout, record: Record) -> tuple[str, ...]:
    for column in _columns(layout):
        value = record.fields[column]
        if not isinstance(value, str):
            raise _FaultyRow("", f"'{column}' holds {described(value)}, not a text")
        if not value.strip():
            raise _FaultyRow(EMPTY, f"'{column}' is empty; every text must have something in it besides white space")
    joined = (record.fields[t] if isinstance(t, str) else " ".join(record.fields[column] for column in t) for t in layout.texts)
    return tuple(text.strip() for text in joined)


def _label(task: Task, label: str) -> float:
    """The index of a label, or the score that it is."""
    if not task.regression:
        if label not in task.labels:
            reason = NO_GOLD if label == "-" else ""
            raise _FaultyRow(reason, f"the label is '{label}'; it must be one of {', '.join(task.labels)}")
        return float(task.labels.index(label))
    low, high = float(task.labels[0]), float(task.labels[-1])
    try:
        score = float(label)
    except ValueError:
        score = math.nan
    if not low <= score <= high:
        raise _FaultyRow("", f"the score is '{label}'; it must be a number from {low:g} to {high:g}")
    return score


def _held_out(rows: list[Row], size: int, split: SplitName) -> list[Row]:
    """The rows that the released code trains or validates on, in its order."""
    from sklearn.model_selection import train_test_split

    if len(rows) <= size:
        raise UserError(f"{rows[0].where}: the file has {len(rows)} rows, of which {size} are held out for validation")
    train, validation = train_test_split(rows, test_size=size, random_state=HELD_OUT_SEED)
    return train if split == "train" else validation


# -- articles with questions ------------------------------------------------------------------------------------------------

ARTICLE = ("article", "questions", "options", "answers")
"""Fields of RACE's records: a text, and three lists with an item for each question."""


def _questions(records: Iterable[Record], letters: tuple[str, ...]) -> Iterator[Record]:
    """A record for each question of each article: its context is the article and the question, run together."""
    for record in records:
        article, *lists = (record.fields[field] for field in ARTICLE)
        if not isinstance(article, str) or not all(isinstance(each, list) and len(each) == len(lists[0]) for each in lists):
            raise UserError(f"{record.where}: must hold a text 'article' and lists of equal length {', '.join(ARTICLE[1:])}")
        name = record.fields.get("id") or record.fields.get("example_id")
        for number, (question, options, answer) in enumerate(zip(*lists, strict=True)):
            fields = {"id": f"{name}/{number}", "context": f"{article} {question}", "answer": answer}
            fault = f"{len(options)} options; there must be {len(letters)} for every question"
            yield Record(
                f"{record.where} question {number}",
                fields | dict(zip(letters, options, strict=False)),
                "" if len(options) == len(letters) else fault,
            )
