"""The files of a released task in a user's folder: which release they belong to, and their rows.

Names of files and folders are compared without case, and files may be compressed. Hidden files, such as the `._NAME` that macOS
puts into archives, are not read.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from gpt_jax.errors import UserError, listed
from gpt_jax.inputs.formats import COMPRESSIONS
from gpt_jax.tasks.file_layouts import SPLITS, FileLayout, SplitName
from gpt_jax.tasks.registry import Task
from gpt_jax.tasks.tables import Record, read_table

ARTICLE_FIELDS = ("article", "questions", "options", "answers")
"""Fields of RACE's records: a text, and three lists with one item for each question."""

RecordGroups = Mapping[str, Iterable[Record]]
"""The records of a split by group; empty if there is no such split."""


def open_release(task: Task, given: Path, split: SplitName) -> tuple[FileLayout, RecordGroups]:
    """Returns the layout of the release in a folder, and the records of one of its splits.

    Raises:
      UserError: the folder does not have exactly one release of the task, or the release lacks files of the split.
    """
    layout, folder = _find_release(task, given)
    patterns = layout.paths(split)
    if split == "validation" and not patterns:
        in_glue = next(iter(task.files[0].paths(split).values()))
        raise UserError(
            f"--task.path: the release of {task.title} in {folder} has no validation split; give the folder of the GLUE "
            f"download, which has {in_glue}, or leave --task.path out to use tensorflow-datasets"
        )
    files = {group: find_files(folder, pattern) for group, pattern in patterns.items()}
    if split == "test" and not any(files.values()):
        return layout, {}
    for group, paths in files.items():
        if not paths:
            raise UserError(f"--task.path: {folder} has no {patterns[group]}, which the {split} split of {task.title} needs")
        if len(paths) > 1 and not layout.articles:
            raise UserError(f"--task.path: {folder} has {listed(path.name for path in paths)}; keep one of them")
    return layout, {group: _read_files(layout, paths, split) for group, paths in files.items()}


def _find_release(task: Task, given: Path) -> tuple[FileLayout, Path]:
    """Returns the layout whose files are in the given folder, or in the task's own folder below it, and that folder."""
    if not given.is_dir():
        raise UserError(f"--task.path: there is no folder '{given}'")
    releases: list[tuple[FileLayout, Path, Path]] = []
    for layout in task.files:
        patterns = [pattern for split in SPLITS for pattern in layout.paths(split).values()]
        for folder in (given, *(folder for name in layout.folders for folder in find_files(given, name))):
            found = next((path for pattern in patterns for path in find_files(folder, pattern)), None)
            if found and not (layout.superseded and releases):
                releases.append((layout, folder, found))
    if len(releases) > 1:
        examples = listed(str(path.relative_to(given)) for _, _, path in releases)
        kept = "keep the files of one, or give its own folder"
        raise UserError(f"--task.path: {given} has {len(releases)} releases of {task.title}, with {examples}; {kept}")
    if not releases:
        wanted = " or ".join(next(iter(layout.paths("train").values())) for layout in task.files)
        places = ", ".join(dict.fromkeys(str(given / name) for layout in task.files for name in ("", *layout.folders)))
        raise UserError(f"--task.path: there are no files of {task.title}; looked for {wanted} in {places}")
    return releases[0][:2]


def find_files(folder: Path, pattern: str) -> list[Path]:
    """Returns the paths below a folder that match a glob, ignoring case and compression, and are not hidden."""
    names = (pattern + extension for extension in ("", *COMPRESSIONS))
    globs = [re.sub("[a-zA-Z]", lambda letter: f"[{letter[0].lower()}{letter[0].upper()}]", name) for name in names]
    return sorted(path for glob in globs for path in folder.glob(glob) if not path.name.startswith("."))


def _read_files(layout: FileLayout, paths: list[Path], split: SplitName) -> Iterator[Record]:
    assert layout.format != "tfds"
    texts = [column for text in layout.texts for column in ((text,) if isinstance(text, str) else text)]
    required = ARTICLE_FIELDS if layout.articles else texts if split == "test" else [*texts, layout.label]
    for path in paths:
        yield from read_table(path, layout.format, required, layout.headers.get(split, ()))
