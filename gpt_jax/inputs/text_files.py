"""The text files that a path or a glob stands for: which of them contain text, what is left out, and their documents."""

import collections
import dataclasses
import functools
import glob
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from gpt_jax.errors import UserError, nearest, require
from gpt_jax.inputs.documents import read_documents
from gpt_jax.inputs.folders import FileList
from gpt_jax.inputs.formats import NotTextError, TextFormat, detect_format
from gpt_jax.inputs.tally import Tally

MAX_SKIPPED = 0.01
"""Maximum share of the files, and of their bytes, that may be left out because they contain no text."""


class MissingSourceError(UserError):
    """The named source has nothing to read. A finished token store no longer needs it."""


@dataclasses.dataclass(eq=False)
class TextFiles:
    """A file, all files below a folder except hidden ones, or the files that match a glob.

    Files without text are left out of a folder and counted. A single file must have text.

    Attributes:
      source: the path or glob, as in `--data.source`.
      format: the format of all files; "auto" if it is decided for each of them.
      text_field: the field of a JSON object, or the column of a Parquet file, that contains the text.
      allow_skipped: whether more than `MAX_SKIPPED` of the files may lack text.
      log: receives lines about what is left out.

    Raises:
      UserError: a folder cannot be read.
      MissingSourceError: there is no file. The message lists similar names that exist.
    """

    source: str
    format: TextFormat | Literal["auto"]
    text_field: str
    allow_skipped: bool
    log: Callable[[str], None]

    def __post_init__(self) -> None:
        self._list = _list_files(self.source)
        if not self._list.files:
            others = _described({**self._list.left_out, **self._list.unreadable})
            raise MissingSourceError(f"--data.source: '{self.source}' contains no files to read" + (others and f"; {others}"))

    def size(self) -> dict[str, int]:
        """Returns the part of the identity that needs no reading: the number of files, and their total size as stored."""
        return {"files": len(self._list.files), "bytes": sum(status.st_size for status in self._list.files.values())}

    def identity(self) -> dict[str, Any]:
        """Returns the size and a checksum of the names, sizes and checksums of all files, including those without text.

        Raises:
          UserError: a file cannot be read.
        """
        digest = hashlib.sha256()
        for path, status in self._list.files.items():
            try:
                with path.open("rb") as file:
                    checksum = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise UserError(f"{path}: {error.strerror}") from error
            # A name need not be UTF-8.
            digest.update(f"{checksum} {status.st_size} {self._list.name(path)}\n".encode("utf-8", "surrogateescape"))
        return {**self.size(), "sha256": digest.hexdigest()}

    def require_outside(self, folder: Path, field: str) -> None:
        """Checks that files written into `folder`, which the option `field` names, do not become part of the source.

        Raises:
          UserError: they would.
        """
        reason = "the text would change with every file written there; give a folder outside it"
        require(not self._list.reaches(folder), field, f"'{folder}' is inside --data.source '{self.source}': {reason}")

    def documents(self) -> Iterator[str]:
        """Yields the documents of all files, in the order of their paths.

        Raises:
          UserError: a file is not in the format that its name implies, or has changed; or too many files contain no text. The
            message names the file and, if possible, the line.
        """
        missing = Tally()
        for path, file_format in self.formats.items():
            yield from read_documents(path, file_format, self.text_field, missing)
            before, now = self._list.files[path], path.stat()
            if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                raise UserError(f"{path}: changed while the text was read; run the command again when nothing writes to it")
        if missing.count:
            self.log(f"{self.source}: left out rows whose text is null: {missing}")

    @functools.cached_property
    def formats(self) -> dict[Path, TextFormat]:
        """The formats of the files with text, by path. What is left out is logged.

        Raises:
          UserError: a file's format is unclear or not supported, or more than `MAX_SKIPPED` of the files contain no text.
          NotTextError: a single file contains no text.
        """
        formats: dict[Path, TextFormat] = {}
        skipped = collections.defaultdict(Tally, self._list.unreadable)
        json_in_txt = Tally()
        for path, status in self._list.files.items():
            try:
                formats[path], is_json_in_txt = detect_format(path, self.format)
            except NotTextError as error:
                if path == Path(self.source):
                    raise
                skipped[error.kind].add(self._list.name(path), status.st_size)
            else:
                if is_json_in_txt:
                    json_in_txt.add(self._list.name(path))
        if self._list.left_out:
            self.log(f"{self.source}: left out {_described(self._list.left_out)}")
        if skipped:
            self._report_skipped(skipped)
        if not formats:
            raise UserError(f"--data.source: '{self.source}' contains no text")
        if json_in_txt.count:
            hint = "--data.format jsonl reads only their text field"
            self.log(f"{self.source}: read as plain text, although the content is JSON: {json_in_txt}; {hint}")
        return formats

    def _report_skipped(self, skipped: Mapping[str, Tally]) -> None:
        """Logs which files contain no text.

        Raises:
          UserError: there are too many.
        """
        count = sum(tally.count for tally in skipped.values())
        total = len(self._list.files) + sum(tally.count for tally in self._list.unreadable.values())
        share = sum(tally.bytes for tally in skipped.values()) / max(self.size()["bytes"], 1)
        summary = f"{count:,} of {total:,} files, with {share:.1%} of the bytes, contain no text ({_described(skipped)})"
        if max(count / total, share) > MAX_SKIPPED and not self.allow_skipped:
            hint = "remove them, name only the others with a glob, or add --data.allow-skipped True"
            raise UserError(f"--data.source: {summary}; {hint}")
        self.log(f"{self.source}: left out: {summary}")


def _described(tallies: Mapping[str, Tally]) -> str:
    return "; ".join(f"{kind}: {tally}" for kind, tally in tallies.items())


def _list_files(source: str) -> FileList:
    """Returns the files that a path or a glob stands for."""
    path = Path(source)
    if path.exists():
        return FileList(path)
    fixed = next((number for number, part in enumerate(path.parts) if glob.has_magic(part)), len(path.parts))
    root, pattern = Path(*path.parts[:fixed]), path.parts[fixed:]
    if not pattern or not root.is_dir():
        raise MissingSourceError(f"--data.source: {_describe_missing(root)}")
    return FileList(root, pattern)


def _describe_missing(path: Path) -> str:
    """Returns a message that a path does not exist, with names from the nearest folder that does exist."""
    if path.is_symlink():
        return f"'{path}' is a link to '{os.readlink(path)}', which does not exist"
    folder = next(parent for parent in path.parents if parent.is_dir())
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    return f"'{path}' does not exist; in {folder}: {nearest(path.relative_to(folder).parts[0], names)}"
