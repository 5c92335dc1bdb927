"""Sources of text: files, tensorflow-datasets, or the documentation that is installed on this machine.

A source yields documents. A document is one text: the text field of a JSON object or of an example, a docstring, or a piece of a
plain text file. Joining the pieces of a plain text file gives the file again. Text is not normalized here, and none is left out.
A token store records the `identity` of its source, so that a later change of the text is detected.
"""

import glob
import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from gpt_jax.config import DataConfig
from gpt_jax.data.installed_docs import InstalledDocs
from gpt_jax.errors import UserError, described, nearest
from gpt_jax.inputs.json_values import parse_json_object
from gpt_jax.runtime.rundir import sha256

MAX_DOCUMENT_BYTES = 32 * 1024
"""Maximum size of a document cut from plain text. If a book were one document, it would be in a single split and occupy a single
process. Pieces of this size can be divided evenly, and each still contains more than ten of the paper's windows of 512 tokens."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class TextSource(Protocol):
    """A source of text that can be read more than once."""

    def identity(self) -> dict[str, Any]:
        """Returns JSON values (names, versions, sizes, checksums) that change whenever the text changes."""

    def documents(self) -> Iterator[str]:
        """Yields the documents, in the same order every time."""


def open_source(config: DataConfig) -> TextSource:
    """Returns the source that `config.source` names.

    Raises:
      UserError: the name is empty or unknown, or there is no file to read.
    """
    if not config.source:
        raise UserError("--data.source: name a file, a folder, a glob, tfds:NAME, or builtin:docs (installed documentation)")
    kind, _, name = config.source.partition(":")
    if kind == "tfds":
        return TfdsSource(name, config.text_field)
    if kind != "builtin":
        return FileSource(config.source, config.text_field)
    if name != "docs":
        raise UserError(f"--data.source: there is no built-in text '{name}'; write builtin:docs")
    return InstalledDocs(config.max_bytes)


# -- files ------------------------------------------------------------------------------------------------------------------


class FileSource:
    """A file, all files below a folder except hidden ones, or the files that match a glob.

    Raises:
      UserError: there is no such file. The message lists similar names that exist.
    """

    def __init__(self, source: str, text_field: str):
        self._text_field = text_field
        path = Path(os.path.expanduser(source))
        paths: Iterable[Path]
        if path.is_dir():
            self._root = path
            paths = (p for p in path.rglob("*") if not any(part[0] == "." for part in p.relative_to(path).parts))
        elif path.exists():
            self._root = path.parent
            paths = [path]
        elif glob.has_magic(source):
            fixed = next(i for i, part in enumerate(path.parts) if glob.has_magic(part))
            self._root = Path(*path.parts[:fixed])
            paths = map(Path, glob.iglob(str(path), recursive=True))
        else:
            raise UserError(f"--data.source: {_describe_missing(path)}")
        self._paths = sorted(p for p in paths if not p.is_dir())
        if not self._paths:
            raise UserError(f"--data.source: '{source}' contains no files to read")

    def identity(self) -> dict[str, Any]:
        """Returns the number of files, their total size as stored, and a checksum of their names, sizes and checksums."""
        sizes = [path.stat().st_size for path in self._paths]
        files = zip(self._paths, sizes, strict=True)
        lines = [f"{sha256(path)} {size} {path.relative_to(self._root).as_posix()}\n" for path, size in files]
        return {"files": len(sizes), "bytes": sum(sizes), "sha256": hashlib.sha256("".join(lines).encode()).hexdigest()}

    def documents(self) -> Iterator[str]:
        """Yields the documents of all files, in the order of their paths.

        Raises:
          UserError: a file is not in the format that its name implies. The message names the file and, if possible, the line.
        """
        for path in self._paths:
            is_json = path.name.removesuffix(".gz").endswith(".jsonl")
            try:
                with gzip.GzipFile(path) if path.suffix == ".gz" else path.open("rb") as file:
                    if file.peek(1) in (b"", BYTE_ORDER_MARK):
                        raise UserError(f"{path}: the file is empty")
                    yield from json_documents(file, path, self._text_field) if is_json else text_documents(file, path)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise UserError(f"{path}: broken gzip archive: {error}") from error


def _describe_missing(path: Path) -> str:
    """Returns a message that a path does not exist, with names from the nearest folder that does exist."""
    folder = next(parent for parent in path.parents if parent.is_dir())
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    hint = nearest(path.relative_to(folder).parts[0], names)
    return f"'{path}' does not exist; in {folder}: {hint if len(hint) < 200 else f'{len(names)} other names'}"


BinaryFile = gzip.GzipFile | io.BufferedReader


def text_documents(file: BinaryFile, path: Path) -> Iterator[str]:
    """Cuts plain text into documents of at most MAX_DOCUMENT_BYTES. Joined, they give the text without its byte-order mark.

    Raises:
      UserError: there are NUL bytes, or bytes that are not UTF-8. The message names the line.
    """
    line = 1
    text = file.read(len(BYTE_ORDER_MARK)).removeprefix(BYTE_ORDER_MARK)
    while text := text + file.read(MAX_DOCUMENT_BYTES + 1 - len(text)):
        if b"\0" in text:
            raise UserError(f"{path}: a binary file (it has NUL bytes), not text; name only text files, for example by a glob")
        size = len(text) if len(text) <= MAX_DOCUMENT_BYTES else _cut_position(text[:MAX_DOCUMENT_BYTES])
        yield _decode(text[:size], path, line)
        line += text.count(b"\n", 0, size)
        text = text[size:]


def _cut_position(text: bytes) -> int:
    """Returns the position at which to cut a text that is too long.

    The position is after the last blank line if that is in the second half of the text, else after the last line, else after the
    last space. If there is none of these, the position is chosen so that no character is cut in two.
    """
    for separator, start in ((b"\n\n", len(text) // 2), (b"\n", 0), (b" ", 0)):
        position = text.rfind(separator, start)
        if position >= 0:
            return position + len(separator)
    end = len(text)
    # A character has at most three continuation bytes (10xxxxxx). If there are more, decoding the text raises an error.
    while end > len(text) - 3 and text[end - 1] & 0xC0 == 0x80:
        end -= 1
    return end - 1 if text[end - 1] >= 0xC0 else end


def _decode(data: bytes, path: Path, line: int) -> str:
    """Decodes UTF-8 text that begins in the given line of a file."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise UserError(f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; convert the file to UTF-8") from error


def json_documents(file: BinaryFile, path: Path, text_field: str) -> Iterator[str]:
    """Yields the text field of the JSON object on each line that is not blank.

    Raises:
      UserError: a line is not a JSON object with a string in that field. The message names the line.
    """
    for line, data in enumerate(file, start=1):
        if data.isspace():
            continue
        row = parse_json_object(_decode(data, path, line).removeprefix("\ufeff"), path, line)
        if text_field not in row:
            raise UserError(f"{path}:{line}: no field '{text_field}' (--data.text-field); {nearest(text_field, row)}")
        if not isinstance(row[text_field], str):
            raise UserError(f"{path}:{line}: the field '{text_field}' is {described(row[text_field])}, not a string")
        yield row[text_field]


# -- tensorflow-datasets ----------------------------------------------------------------------------------------------------


class TfdsSource:
    """The training split of a data set in tensorflow-datasets ("wikipedia/20230601.en"). It is downloaded if necessary.

    Raises:
      UserError: tensorflow-datasets is not installed, or does not have this data set or this text field.
    """

    def __init__(self, name: str, text_field: str):
        try:
            import tensorflow_datasets as tfds

            self._builder = tfds.builder(name)
        except Exception as error:
            hint = "check the name, and that tensorflow-datasets is installed"
            raise UserError(f"--data.source: cannot open tfds:{name} ({_one_line(error)}); {hint}") from error
        features = list(self._builder.info.features)
        if text_field not in features:
            raise UserError(f"--data.text-field: tfds:{name} has no '{text_field}'; {nearest(text_field, features)}")
        self._as_numpy = tfds.as_numpy
        self._text_field = text_field

    def identity(self) -> dict[str, Any]:
        """Returns the full name of the data set, with its configuration and version."""
        return {"tfds": self._builder.info.full_name}

    def documents(self) -> Iterator[str]:
        """Yields the text field of each training example.

        Raises:
          UserError: the data set needs another package, has no split "train", or has no texts in this field.
        """
        try:
            self._builder.download_and_prepare()
            examples = self._as_numpy(self._builder.as_dataset(split="train", shuffle_files=False))
        except Exception as error:  # For example, another package is missing, or the data set has no split "train".
            raise UserError(f"--data.source: cannot read tfds:{self._builder.name} ({_one_line(error)})") from error
        for example in examples:
            text = example[self._text_field]
            if not isinstance(text, bytes):
                raise UserError(f"--data.text-field: '{self._text_field}' is a {type(text).__name__}, not a string")
            yield text.decode()


def _one_line(error: Exception) -> str:
    """Returns the type and the beginning of the message of an error, which may have several lines."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
