"""The files of a released task in a user's folder: which release they are, and their rows.

Names of files and folders are compared without case, and files may be compressed. Hidden files, such as the `._NAME` that macOS
puts into archives, are not read.
"""

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from gpt_jax.errors import UserError, listed
from gpt_jax.inputs.formats import COMPRESSIONS
from gpt_jax.tasks.file_layouts import SPLITS, FileLayout, SplitName
from gpt_jax.tasks.registry import Task
from gpt_jax.tasks.tables import Record, read_table

ARTICLE_FIELDS = ("article", "questions", "options", "answers")
"""Fields of RACE's records: a text, and three lists with one item for each question."""

RecordGroups = Mapping[str, Iterable[Record]]
"""The records of a split by group; empty if there is no such split."""


class Release(NamedTuple):
    """One release of a task, in a folder."""

    layout: FileLayout
    folder: Path

    def find(self, split: SplitName) -> dict[str, list[Path]]:
        """Returns the files of a split by group, in the order of their names."""
        return {group: find_files(self.folder, pattern) for group, pattern in self.layout.paths(split).items()}


def open_release(task: Task, given: Path, split: SplitName) -> tuple[FileLayout, RecordGroups, str]:
    """Returns the layout of the release in a folder, the records of one of its splits, and a note for the log (or nothing).

    Raises:
      UserError: the folder does not have exactly one release of the task, or the release lacks files of the split.
    """
    layout, folder = release = find_release(task, given)
    patterns = layout.paths(split)
    if split == "validation" and not patterns:
        in_glue = next(iter(task.files[0].paths(split).values()))
        raise UserError(
            f"--task.path: the release of {task.title} in {folder} has no validation split; give the folder of the GLUE "
            f"download, which has {in_glue}, or leave --task.path out to use tensorflow-datasets"
        )
    files = release.find(split)
    if split == "test" and not any(files.values()):
        return layout, {}, ""
    for group, paths in files.items():
        if not paths:
            raise UserError(f"--task.path: {folder} has no {patterns[group]}, which the {split} split of {task.title} needs")
        if len(paths) > 1 and not layout.articles:
            raise UserError(f"--task.path: {folder} has {listed(path.name for path in paths)}; keep one of them")
    hidden = [path for paths in files.values() for path in _hidden_siblings(paths[0])] if layout.articles else []
    note = f"hidden files are not read ({len(hidden):,}, such as {hidden[0]})" if hidden else ""
    return layout, {group: _read_files(layout, paths, split) for group, paths in files.items()}, note


def find_release(task: Task, given: Path) -> Release:
    """Returns the release whose files are in the given folder, or in the task's own folder below it.

    Raises:
      UserError: there is no such folder, no release, or more than one.
    """
    if not given.is_dir():
        raise UserError(f"--task.path: there is no folder '{given}'")
    releases: list[Release] = []
    for layout in task.files:
        folders = [given, *(folder for name in layout.folders for folder in find_files(given, name, ("",)) if folder.is_dir())]
        candidates = (Release(layout, folder) for folder in folders)
        found = next((release for release in candidates if any(any(release.find(split).values()) for split in SPLITS)), None)
        if found and not (layout.superseded and releases):
            releases.append(found)
    if len(releases) > 1:
        examples = (next(path for split in SPLITS for paths in r.find(split).values() for path in paths) for r in releases)
        both = " and ".join(str(path.relative_to(given)) for path in examples)
        raise UserError(f"--task.path: {given} has {len(releases)} releases of {task.title}, with {both}; keep the files of one")
    if not releases:
        wanted = " or ".join(next(iter(layout.paths("train").values())) for layout in task.files)
        places = ", ".join(dict.fromkeys(str(given / name) for layout in task.files for name in ("", *layout.folders)))
        raise UserError(f"--task.path: there are no files of {task.title}; looked for {wanted} in {places}")
    return releases[0]


def find_files(folder: Path, pattern: str, extensions: Iterable[str] = ("", *COMPRESSIONS)) -> list[Path]:
    """Returns the files and folders below a folder whose path matches a glob, without case, and that are not hidden.

    Args:
      folder: the folder.
      pattern: the glob, with "/" between its parts.
      extensions: extensions that may follow the glob.
    """
    *parents, name = pattern.lower().split("/")
    folders = [folder]
    for part in parents:
        folders = [path for parent in folders for path in _visible(parent) if fnmatchcase(path.name.lower(), part)]
    names = [name + extension for extension in extensions]
    return sorted(
        path for parent in folders for path in _visible(parent) if any(fnmatchcase(path.name.lower(), name) for name in names)
    )


def _visible(folder: Path) -> list[Path]:
    """Returns the contents of a folder that are not hidden; nothing if it is a file."""
    return [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []


def _hidden_siblings(path: Path) -> list[Path]:
    """Returns the hidden files in the folder of a file that have the same extension."""
    return sorted(other for other in path.parent.iterdir() if other.name.startswith(".") and other.suffix == path.suffix)


def _read_files(layout: FileLayout, paths: list[Path], split: SplitName) -> Iterator[Record]:
    assert layout.format != "tfds"
    required = ARTICLE_FIELDS if layout.articles else layout.text_columns + (() if split == "test" else (layout.label,))
    for path in paths:
        yield from read_table(path, layout.format, required, layout.headers.get(split, ()))
