"""The files that a path or a glob pattern stands for. What is left out is counted; a folder that cannot be read is an error."""

import collections
import contextlib
import fnmatch
import glob
import heapq
import os
import stat
from pathlib import Path

from gpt_jax.errors import UserError
from gpt_jax.inputs.tally import Tally

RECURSIVE = "**"
"""The part of a pattern that matches a folder and all folders below it."""

Pattern = tuple[str, ...]
"""The parts of a glob pattern between the slashes. The empty pattern matches the path reached so far."""
Patterns = frozenset[Pattern]
"""The patterns that the names below a folder may match. After `RECURSIVE`, there are several."""
FolderId = tuple[int, int]
"""Device and inode of a folder, which are the same under each of its names."""


class FileList:
    """A file, or the files below a folder that match a pattern; without a pattern, all of them.

    Links are followed. Each folder is searched once, under a name that is not a link if it has one, so loops end. Hidden files
    and folders are left out unless a part of the pattern begins with a dot.

    Args:
      path: the file or folder.
      pattern: the parts of the pattern, in the syntax of `glob`.

    Attributes:
      root: the folder to which the names in messages are relative.
      files: the properties (`os.stat`) of each file, in the order of the paths.
      left_out: hidden files and folders, and folders that match only by name, by the name of their kind.
      unreadable: matches that are neither a file nor a folder, by the name of their kind.

    Raises:
      UserError: a folder cannot be read, or disappears.
    """

    def __init__(self, path: Path, pattern: Pattern = (RECURSIVE,)):
        self.files: dict[Path, os.stat_result] = {}
        self.left_out: dict[str, Tally] = collections.defaultdict(Tally)
        self.unreadable: dict[str, Tally] = collections.defaultdict(Tally)
        self._searched: dict[FolderId, Patterns] = collections.defaultdict(frozenset)
        self._read_hidden = any(part.startswith(".") for part in pattern)
        try:
            self.root = path if path.is_dir() else path.parent
            if path.is_dir():
                self._search((*pattern, "*") if pattern[-1] == RECURSIVE else pattern)
            else:
                self._add(path, path.stat())
        except OSError as error:
            raise UserError(f"--data.source: cannot read {error.filename}: {error.strerror}") from error
        self.files = dict(sorted(self.files.items()))

    def name(self, path: Path) -> str:
        """Returns the name of a file or folder for messages."""
        return path.relative_to(self.root).as_posix()

    def reaches(self, folder: Path) -> bool:
        """Returns whether a file that is created in `folder`, which need not exist, could become part of the list."""
        folder = _real_path(folder)
        for parent in (folder, *folder.parents):
            with contextlib.suppress(OSError):
                patterns: Patterns = self._searched.get(_folder_id(parent), frozenset())
                for name in folder.relative_to(parent).parts:
                    patterns = _below(patterns, name)
                if any(glob.has_magic(pattern[0]) for pattern in patterns if pattern):
                    return True
        return False

    def _search(self, pattern: Pattern) -> None:
        """Lists the folders in which files could match, beginning with those that are reached without a link."""
        above = {_folder_id(folder) for folder in _real_path(self.root).parents}
        folders = [(False, self.root, _expanded({pattern}))]
        while folders:
            _, folder, patterns = heapq.heappop(folders)
            identity = _folder_id(folder)
            if identity in above:
                self.unreadable["links to a folder that contains the source"].add(self.name(folder))
                continue
            patterns -= self._searched[identity]
            self._searched[identity] |= patterns
            for path in sorted(folder.iterdir()) if patterns else ():
                below = _below(patterns, path.name)
                if not below:
                    continue
                status = _status(path)
                is_searched = stat.S_ISDIR(status.st_mode) and any(below)
                is_listed = () in below or stat.S_ISLNK(status.st_mode)  # A broken link may point to a folder.
                if path.name.startswith(".") and not self._read_hidden:
                    if is_searched or is_listed:
                        self.left_out["hidden files and folders"].add(self.name(path))
                elif is_searched:
                    heapq.heappush(folders, (path.is_symlink(), path, below))
                elif is_listed:
                    self._add(path, status)

    def _add(self, path: Path, status: os.stat_result) -> None:
        """Lists a file that matches; counts anything else."""
        if stat.S_ISREG(status.st_mode):
            self.files[path] = status
        elif stat.S_ISDIR(status.st_mode):
            self.left_out["folders that match the glob"].add(self.name(path))
        elif stat.S_ISLNK(status.st_mode):
            self.unreadable["links that cannot be followed"].add(self.name(path))
        else:
            self.unreadable["pipes and devices"].add(self.name(path))


def _status(path: Path) -> os.stat_result:
    """Returns the properties of a file or folder, or those of a link itself if it cannot be followed."""
    try:
        return path.stat()
    except OSError:
        if not path.is_symlink():
            raise
        return path.lstat()


def _folder_id(path: Path) -> FolderId:
    status = path.stat()
    return status.st_dev, status.st_ino


def _real_path(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises an error if there is a loop of links.


def _below(patterns: Patterns, name: str) -> Patterns:
    """Returns the patterns that remain below a folder, or at a file, with this name."""
    remaining = {pattern for pattern in patterns if pattern[:1] == (RECURSIVE,)}
    remaining |= {pattern[1:] for pattern in patterns - remaining if pattern and fnmatch.fnmatchcase(name, pattern[0])}
    return _expanded(remaining)


def _expanded(patterns: set[Pattern]) -> Patterns:
    """Returns patterns together with those that remain if a leading `RECURSIVE` matches no folder."""
    expanded = set(patterns)
    while shorter := {pattern[1:] for pattern in expanded if pattern[:1] == (RECURSIVE,)} - expanded:
        expanded |= shorter
    return frozenset(expanded)
