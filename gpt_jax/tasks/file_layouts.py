"""Layouts of labeled data: the files and columns in which the releases of a task have their rows."""

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
"""The known defects of rows, by which they are counted. `FileLayout.drops` lists the defects of each release."""

PAIR = ("sentence1", "sentence2")
PREMISE = ("premise", "hypothesis")


@dataclasses.dataclass(frozen=True)
class FileLayout:
    """The location and format of the rows of one release of a task: files below a folder, or a tensorflow-datasets data set."""

    format: TableFormat | Literal["tfds"]
    path: str
    """A path or a glob below the task's folder, or "name/config:split" in tensorflow-datasets. "{split}" is replaced with the
    name of a split, and then "{group}" with each of `groups`."""
    texts: tuple[str | tuple[str, ...], ...]
    """Columns of the texts in the order of the input transformation. If one text has several columns, those that are not empty
    are joined with spaces."""
    label: str = "label"
    """Column of the label. A test split may lack it."""
    split_names: tuple[str, str, str] = ("train", "dev", "test")
    """Names of the training, validation and test splits within `path`; empty if the release lacks the split."""
    groups: tuple[str, ...] = ()
    """Parts of a split that are also scored separately."""
    headers: Mapping[SplitName, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """The columns of those splits whose files have no header row."""
    folders: tuple[str, ...] = ()
    """Names of the task's folder. The user may give this folder or the folder that contains it."""
    articles: bool = False
    """Whether a record is an article with several questions, as in RACE."""
    superseded: bool = False
    """Whether the folder of another release, which is then used instead, also contains these files."""
    held_out: int = 0
    """Number of training rows that form the validation split, if the two splits share a file."""
    drops: tuple[str, ...] = ()
    """Defects that this release is known to have. Rows with one of them are dropped and counted."""

    def paths(self, split: SplitName) -> dict[str, str]:
        """Returns the paths of a split by group. A split without groups has the group "", and a missing split has no groups."""
        name = dict(zip(SPLITS, self.split_names, strict=True))[split]
        path = self.path.replace("{split}", name)
        groups = self.groups if "{group}" in path else ("",)
        return {group: path.replace("{group}", group) for group in groups if name}


def glue(name: str, texts: tuple[str, ...], **fields: Any) -> FileLayout:
    """Returns the layout of a task's folder in the GLUE download: tables with a header row. Test splits have no labels."""
    return FileLayout("tsv", "{split}.tsv", texts, folders=(name,), **fields)


def tfds(
    name: str, texts: tuple[str, ...], split_names: tuple[str, str, str] = ("train", "validation", "test"), **fields: Any
) -> FileLayout:
    """Returns the layout of a data set in tensorflow-datasets."""
    return FileLayout("tfds", f"{name}:{{split}}", texts, split_names=split_names, **fields)


def nli(name: str, **fields: Any) -> FileLayout:
    """Returns the layout of the original releases of SNLI and MultiNLI: JSON lines."""
    return FileLayout("json", f"{name}_{{split}}.jsonl", PAIR, "gold_label", folders=(name,), drops=(NO_GOLD,), **fields)
