"""Layouts of labeled data: where a release of a task keeps its rows, and what its columns mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from gpt_jax.tasks.tables import TableFormat

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")

NO_GOLD = "no gold label"
COLUMNS = "wrong number of columns"
EMPTY = "empty text"
JOINED = "rows run together"
"""Known defects of releases, as they are counted. `FileLayout.drops` lists those of each release."""

PAIR = ("sentence1", "sentence2")
PREMISE = ("premise", "hypothesis")


@dataclasses.dataclass(frozen=True)
class FileLayout:
    """Where one release of a task keeps its rows: in files below one folder, or in a data set of tensorflow-datasets."""

    format: TableFormat | Literal["tfds"]
    path: str
    """A path or a glob below the task's folder, or "name/config:split" in tensorflow-datasets. The name of a split replaces
    "{split}", and then each of `groups` replaces "{group}"."""
    texts: tuple[str | tuple[str, ...], ...]
    """Columns of the texts in the order of the input transformation. Several columns of one text are joined with spaces."""
    label: str = "label"
    """Column of the label. A test split may lack it."""
    split_names: tuple[str, str, str] = ("train", "dev", "test")
    """Names of the training, validation and test splits within `path`; empty where the release lacks the split."""
    groups: tuple[str, ...] = ()
    """Parts of a split that are also scored on their own."""
    headers: Mapping[SplitName, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Column names of the splits whose files do not begin with them."""
    folders: tuple[str, ...] = ()
    """Where the task's folder may be below the folder that the user names."""
    articles: bool = False
    """Whether a record is an article with several questions, as in RACE."""
    held_out: int = 0
    """Number of training rows that form the validation split, if the two splits share a file."""
    drops: tuple[str, ...] = ()
    """Defects that this release is known to have. Rows with one of them are dropped and counted."""

    def paths(self, split: SplitName) -> dict[str, str]:
        """Returns the path of each group of a split; a split without groups has one, "". Empty if there is no such split."""
        name = dict(zip(SPLITS, self.split_names, strict=True))[split]
        path = self.path.replace("{split}", name)
        groups = self.groups if "{group}" in path else ("",)
        return {group: path.replace("{group}", group) for group in groups if name}

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns of the texts, one by one."""
        return tuple(column for text in self.texts for column in ((text,) if isinstance(text, str) else text))


def glue(name: str, texts: tuple[str, ...], **fields: Any) -> FileLayout:
    """Returns the layout of a task's folder in the GLUE download: tables with a header, of which the tests lack labels."""
    return FileLayout("tsv", "{split}.tsv", texts, folders=(name,), **fields)


def tfds(
    name: str, texts: tuple[str, ...], split_names: tuple[str, str, str] = ("train", "validation", "test"), **fields: Any
) -> FileLayout:
    """Returns the layout of a data set of tensorflow-datasets."""
    return FileLayout("tfds", f"{name}:{{split}}", texts, split_names=split_names, **fields)


def nli(name: str, **fields: Any) -> FileLayout:
    """Returns the layout in which Stanford released SNLI, and New York University MultiNLI: JSON lines."""
    return FileLayout("jsonl", f"{name}_{{split}}.jsonl", PAIR, "gold_label", folders=(name,), drops=(NO_GOLD,), **fields)
