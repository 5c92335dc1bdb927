"""The files that a folder or a glob pattern means. What is not a file is counted; a folder that cannot be read is an error."""

import collections
import contextlib
import errno
import fnmatch
import glob
import heapq
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from gpt_jax.errors import UserError
from gpt_jax.inputs.tally import Tally

RECURSIVE = "**"
"""The part of a pattern that means a folder and all folders below it."""

Pattern = tuple[str, ...]
FolderId = tuple[int, int]
"""Device and number of a folder, which are the same under each of its names."""


class FileList:
    """The files that match a pattern. The default pattern means all files below a folder.

    Links are followed. In the search below a folder, each folder is entered once, under the name that is not a link if it has one
    there; so loops end. Hidden files and folders are not read unless the pattern names them.

    Args:
      root: the folder to which the pattern is relative.
      pattern: the parts of the pattern between the slashes, in the syntax of `glob`.

    Attributes:
      root: the folder.
      files: the properties (`os.stat`) of each file, in the order of the paths.
      hidden: hidden files and folders that were left out.
      unread_folders: folders that match the pattern, and whose files do not.
      skipped: what matches and is neither a file nor a folder, by the name of its kind.

    Raises:
      UserError: a folder cannot be read, or disappears.
    """

    def __init__(self, root: Path, pattern: Pattern = (RECURSIVE, "*")):
        self.root = root
        self.hidden = Tally()
        self.unread_folders = Tally()
        self.skipped: dict[str, Tally] = collections.defaultdict(Tally)
        # Two of these parts, one after the other, mean the same as one, but take much longer.
        pattern = tuple(part for part, before in zip(pattern, ("", *pattern), strict=False) if {part, before} != {RECURSIVE})
        self._pattern = pattern
        self._hidden: set[Path] = set()
        self._searched: dict[FolderId, set[Pattern]] = collections.defaultdict(set)
        try:
            self._above = {_folder_id(folder) for folder in _real_path(root).parents}
            paths = sorted(set(self._match(root, pattern)))
            self.files = {path: status for path in paths if (status := self._status(path)) is not None}
        except OSError as error:
            raise UserError(f"--data.source: cannot read {error.filename}: {error.strerror}") from error
        for path in sorted(self._hidden):
            self.hidden.add(self._name(path))

    def reaches(self, folder: Path) -> bool:
        """Returns whether a file that is created in `folder`, which need not exist, could become part of the list."""
        folder = _real_path(folder)
        for parent in (folder, *folder.parents):
            with contextlib.suppress(OSError):
                names = folder.relative_to(parent).parts
                if any(_could_match(pattern, names) for pattern in self._searched.get(_folder_id(parent), ())):
                    return True
        return False

    def _match(self, folder: Path, pattern: Pattern) -> Iterator[Path]:
        """Yields the paths in a folder that match a pattern. Some may be yielded more than once."""
        part, rest = pattern[0], pattern[1:]
        if part == RECURSIVE:
            for below in self._walk(folder):
                self._searched[_folder_id(below)].add(pattern)
                yield from self._match(below, rest or ("*",))
            return
        self._searched[_folder_id(folder)].add(pattern)
        for path in self._entries(folder, part):
            if not rest:
                yield path
            elif _is_folder(path):
                yield from self._match(path, rest)

    def _walk(self, folder: Path) -> Iterator[Path]:
        """Yields a folder and all folders below it, each once: links last, so that folders keep their own names."""
        entered: set[FolderId] = set()
        folders, links = [folder], list[Path]()
        while folders or links:
            path = folders.pop() if folders else heapq.heappop(links)
            identity = _folder_id(path)
            if identity in self._above:
                self.skipped["links to a folder that contains the source"].add(self._name(path))
            elif identity not in entered:
                entered.add(identity)
                yield path
                with os.scandir(path) as entries:
                    for entry in entries:
                        if entry.is_dir(follow_symlinks=False):
                            (self._hidden.add if entry.name.startswith(".") else folders.append)(path / entry.name)
                        elif entry.is_symlink() and not entry.name.startswith(".") and _is_folder(path / entry.name):
                            heapq.heappush(links, path / entry.name)

    def _entries(self, folder: Path, part: str) -> Iterator[Path]:
        """Yields the paths in a folder whose names match one part of a pattern."""
        if not glob.has_magic(part):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                (folder / part).lstat()
                yield folder / part
            return
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if fnmatch.fnmatchcase(entry.name, part)]
        for name in names:
            if name.startswith(".") and not part.startswith("."):
                self._hidden.add(folder / name)
            else:
                yield folder / name

    def _status(self, path: Path) -> os.stat_result | None:
        """Returns the properties of a file; counts anything else."""
        try:
            status = path.stat()
        except OSError as error:
            if not path.is_symlink() or error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            self.skipped["broken links"].add(self._name(path))
            return None
        if stat.S_ISREG(status.st_mode):
            return status
        if not stat.S_ISDIR(status.st_mode):
            self.skipped["pipes and devices"].add(self._name(path))
        elif RECURSIVE not in self._pattern and any(path.iterdir()):
            self.unread_folders.add(self._name(path))
        return None

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def _folder_id(path: Path) -> FolderId:
    status = path.stat()
    return status.st_dev, status.st_ino


def _real_path(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises an error if there is a loop of links.


def _is_folder(path: Path) -> bool:
    with contextlib.suppress(OSError):  # A link may be broken, or lead to itself.
        return stat.S_ISDIR(path.stat().st_mode)
    return False


def _could_match(pattern: Pattern, names: tuple[str, ...]) -> bool:
    """Returns whether a pattern could match a file below a folder, given by the names that lead to it from the pattern's root."""
    part, rest = pattern[0], pattern[1:]
    if not names:
        return glob.has_magic(part)
    if part == RECURSIVE:
        return _could_match(rest or ("*",), names) or _could_match(pattern, names[1:])
    return bool(rest) and fnmatch.fnmatchcase(names[0], part) and _could_match(rest, names[1:])
