"""Documents from a source of text: files, tensorflow-datasets, or the documentation installed on this machine.

A document is one text: a JSON object's or an example's text field, a docstring, or a piece of a plain text file. Plain text
is cut so that its pieces, joined again, are the file. Nothing is normalised here and nothing is dropped; what is read is
described by `identity`, which a token store keeps to notice that its source has changed.
"""

from __future__ import annotations

import ast
import functools
import glob
import gzip
import hashlib
import importlib.metadata
import json
import os
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, cast

from gpt_jax.errors import UserError, described, nearest
from gpt_jax.runtime.rundir import sha256

if TYPE_CHECKING:
    from gpt_jax.config import DataConfig

DOCUMENT_BYTES = 32 * 1024
"""Most bytes of a document cut from plain text. A whole book as one document would fall into one split and one process; pieces
of this size divide evenly, and each still spans more than ten of the paper's windows of 512 tokens."""

READ_BYTES = 1 << 20
"""Bytes of a plain text file read at a time."""


class Source(Protocol):
    """Text that can be read more than once."""

    def identity(self) -> dict[str, Any]:
        """What tells this text from any other, ready for JSON: names, versions, sizes, checksums."""

    def documents(self) -> Iterator[str]:
        """The documents, in an order that is the same every time."""


def open_source(config: DataConfig) -> Source:
    """Finds what `config.source` names.

    Raises:
      UserError: the source is empty, does not exist, holds no file, or is no data set that tensorflow-datasets knows.
    """
    if not config.source:
        raise UserError(
            "--data.source: say what text to read: a file, a folder, a glob, tfds:NAME, or builtin:docs for the documentation "
            "installed on this machine"
        )
    kind, _, name = config.source.partition(":")
    if kind == "tfds":
        return ExampleSource(name, config.text_field)
    if kind == "builtin":
        if name != "docs":
            raise UserError(f"--data.source: no text is built in as '{name}'; write builtin:docs")
        return InstalledDocs(config.max_bytes)
    return FileSource(config.source, config.text_field)


# -- files ------------------------------------------------------------------------------------------------------------------


class FileSource:
    """A file, every file below a folder (hidden ones left out), or the files that a glob matches."""

    def __init__(self, source: str, text_field: str):
        self._text_field = text_field
        path = Path(os.path.expanduser(source))
        if path.is_dir():
            self._root = path
            found: Iterable[Path] = (p for p in path.rglob("*") if not any(part[0] == "." for part in p.relative_to(path).parts))
        elif path.exists():
            self._root = path.parent
            found = [path]
        elif glob.has_magic(source):
            fixed = next(i for i, part in enumerate(path.parts) if glob.has_magic(part))
            self._root = Path(*path.parts[:fixed])
            found = map(Path, glob.iglob(str(path), recursive=True))
        else:
            raise UserError(f"--data.source: {_missing(path)}")
        self._paths = sorted(p for p in found if not p.is_dir())
        if not self._paths:
            raise UserError(f"--data.source: '{source}' holds no file to read")

    def identity(self) -> dict[str, Any]:
        """Number and bytes of the files as they are stored, and a checksum of their names, sizes and checksums."""
        listing = hashlib.sha256()
        total = 0
        for path in self._paths:
            size = path.stat().st_size
            listing.update(f"{sha256(path)} {size} {path.relative_to(self._root).as_posix()}\n".encode())
            total += size
        return {"files": len(self._paths), "bytes": total, "sha256": listing.hexdigest()}

    def documents(self) -> Iterator[str]:
        for path in self._paths:
            packed = path.suffix == ".gz"
            rows = path.name.removesuffix(".gz").endswith(".jsonl")
            with cast("IO[bytes]", gzip.open(path) if packed else path.open("rb")) as file:
                try:
                    yield from json_documents(file, path, self._text_field) if rows else text_documents(file, path)
                except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                    raise UserError(f"{path}: broken gzip archive: {error}") from error


def _missing(path: Path) -> str:
    """Says that a path does not exist, and what the nearest folder that does exist holds instead."""
    folder, name = path.parent, path.name
    while not folder.is_dir():
        folder, name = folder.parent, folder.name
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    hint = nearest(name, names)
    return f"'{path}' does not exist; in {folder}: {hint if len(hint) < 200 else f'{len(names)} other names'}"


def text_documents(file: IO[bytes], path: Path) -> Iterator[str]:
    """Cuts plain text into documents of at most DOCUMENT_BYTES; joined, they are the text (less a byte-order mark).

    Raises:
      UserError: no text at all, NUL bytes, or bytes that are not UTF-8, with the line.
    """
    line = 1
    for piece in _cut(_blocks(file, path)):
        text = _decode(piece, path, line)
        line += piece.count(b"\n")
        yield text


def _blocks(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """The file's bytes in blocks, without a leading byte-order mark."""
    block = file.read(READ_BYTES).removeprefix(b"\xef\xbb\xbf")
    if not block:
        raise UserError(f"{path}: the file is empty")
    while block:
        if b"\0" in block:
            raise UserError(f"{path}: a binary file (it has NUL bytes), not text; name only text files, for example by a glob")
        yield block
        block = file.read(READ_BYTES)


def _cut(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Joins blocks and cuts them anew into pieces of at most DOCUMENT_BYTES, at the best place for it."""
    rest = b""
    for block in blocks:
        rest += block
        start = 0
        while len(rest) - start > DOCUMENT_BYTES:
            size = _piece(rest[start : start + DOCUMENT_BYTES])
            yield rest[start : start + size]
            start += size
        rest = rest[start:]
    if rest:
        yield rest


def _piece(window: bytes) -> int:
    """Bytes of a full window to keep as one piece: up to a blank line if its second half has one, else a line end, else a space,
    else as many whole characters as fit."""
    for mark, begin in ((b"\n\n", len(window) // 2), (b"\n", 0), (b" ", 0)):
        at = window.rfind(mark, begin)
        if at >= 0:
            return at + len(mark)
    end = len(window)
    # A UTF-8 character has at most three continuation bytes (10xxxxxx); text with more is refused when it is decoded.
    while end > len(window) - 3 and window[end - 1] & 0xC0 == 0x80:
        end -= 1
    return end - 1 if window[end - 1] >= 0xC0 else end


def _decode(data: bytes, path: Path, line: int) -> str:
    """Decodes UTF-8 that begins in the given line of a file."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise UserError(f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; convert the file to UTF-8") from error


def json_documents(file: IO[bytes], path: Path, text_field: str) -> Iterator[str]:
    """The text field of each line's JSON object; blank lines are passed over.

    Raises:
      UserError: with file and line, what is no JSON object with a string in that field; a file without any line.
    """
    line = 0
    for line, data in enumerate(file, start=1):
        if data.isspace():
            continue
        try:
            row = json.loads(_decode(data, path, line).removeprefix("\ufeff"))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{line}: not a JSON object on one line: {error.msg} at column {error.colno}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{line}: {described(row)}, not a JSON object with the field '{text_field}'")
        if text_field not in row:
            raise UserError(f"{path}:{line}: no field '{text_field}' (--data.text-field); {nearest(text_field, row)}")
        if not isinstance(row[text_field], str):
            raise UserError(f"{path}:{line}: the field '{text_field}' holds {described(row[text_field])}, not a text")
        yield row[text_field]
    if line == 0:
        raise UserError(f"{path}: the file is empty")


# -- tensorflow-datasets ----------------------------------------------------------------------------------------------------


class ExampleSource:
    """The training split of a tensorflow-datasets set ("wikipedia/20230601.en"), downloaded first if it is not there yet."""

    def __init__(self, name: str, text_field: str):
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise UserError(f"--data.source: tfds:{name} needs a package: pip install tensorflow-datasets ({error})") from error
        try:
            self._builder = tfds.builder(name)
        except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--data.source: tensorflow-datasets knows no '{name}': {reason}") from error
        features = list(self._builder.info.features)
        if text_field not in features:
            raise UserError(f"--data.text-field: tfds:{name} has no '{text_field}'; {nearest(text_field, features)}")
        self._as_numpy = tfds.as_numpy
        self._text_field = text_field

    def identity(self) -> dict[str, Any]:
        """The set's full name, configuration and version included."""
        return {"tfds": self._builder.info.full_name}

    def documents(self) -> Iterator[str]:
        try:
            self._builder.download_and_prepare()
        except ImportError as error:
            raise UserError(f"--data.source: this data set needs another package: {error}") from error
        if "train" not in self._builder.info.splits:
            splits = ", ".join(self._builder.info.splits)
            raise UserError(f"--data.source: tfds:{self._builder.name} has no split 'train' to read, but {splits}")
        for example in self._as_numpy(self._builder.as_dataset(split="train", shuffle_files=False)):
            value = example[self._text_field]
            if not isinstance(value, bytes):
                raise UserError(f"--data.text-field: the field '{self._text_field}' holds no text but a {type(value).__name__}")
            yield value.decode()


# -- the documentation installed on this machine ----------------------------------------------------------------------------

DOCUMENTED_PACKAGES = ("flax", "jax", "numpy", "optax", "orbax-checkpoint", "scipy", "tensorflow-datasets")
"""Packages read besides the Python library: what this project stands on, as far as it explains itself in English."""

MIN_DOCUMENT_CHARS = 200
"""Shorter docstrings teach little and repeat a lot ("Returns the value.")."""

COMMON_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be been but by can each for from has have if in into is it its may must no not of on one only or "
        "other so such than that the their then there these they this to used was when where which while will with would you",
    )
)
"""Words that make up a third of English prose and next to nothing of code, tables and lists of names."""


class InstalledDocs:
    """Docstrings, reference topics and text pages of the Python installation and of the packages this project stands on.

    Source files are parsed, never imported. What remains are paragraphs of English prose, each only the first time it occurs
    (so licences and shared passages do not repeat). The same installation gives the same documents in the same order.
    """

    def __init__(self, max_bytes: int):
        """Will read files in the order of the hash of their names until `max_bytes` of text are found (0: all of them)."""
        self._max_bytes = max_bytes

    @functools.cached_property
    def passages(self) -> list[tuple[str, str]]:
        """The package that a document comes from ("python" for the Python library), and the document."""
        documents: list[tuple[str, str]] = []
        found = 0
        seen: set[bytes] = set()
        for _, path, package in sorted(_installed_files(), key=lambda item: hashlib.sha256(item[0].encode()).digest()):
            for text in _passages(path):
                prose = _prose(text, seen)
                if len(prose) >= MIN_DOCUMENT_CHARS:
                    documents.append((package, prose))
                    found += len(prose.encode("utf-8", "replace"))
            if self._max_bytes and found >= self._max_bytes:
                break
        return documents

    def identity(self) -> dict[str, Any]:
        """Number of the documents and a checksum of them."""
        checksum = hashlib.sha256()
        for text in self.documents():
            checksum.update(hashlib.sha256(text.encode("utf-8", "replace")).digest())
        return {"documents": len(self.passages), "sha256": checksum.hexdigest()}

    def documents(self) -> Iterator[str]:
        return (text for _, text in self.passages)


def _installed_files() -> Iterator[tuple[str, Path, str]]:
    """Names (relative, so alike on every machine), paths and packages of files that may hold documentation, tests left out."""
    library = Path(sysconfig.get_path("stdlib"))
    listed = [(path.relative_to(library), path, "python") for path in library.rglob("*.py")]
    for package in DOCUMENTED_PACKAGES:
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        pages = (file for file in files if file.suffix in (".py", ".md", ".rst", ".txt"))
        listed += [(Path(file), Path(str(file.locate())), package) for file in pages]
    for name, path, package in listed:
        if not any(part in ("site-packages", "dist-packages", "..") or "test" in part for part in name.parts) and path.is_file():
            yield name.as_posix(), path, package


def _passages(path: Path) -> Iterator[str]:
    """The docstrings of a Python file and the texts of a `topics` dictionary in it, or the whole of a text page."""
    try:
        source = path.read_text(encoding="utf-8")
        if path.suffix != ".py":
            yield source
            return
        if '"""' not in source and "topics" not in source:
            return
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source)
    except (UnicodeDecodeError, SyntaxError, ValueError):  # The library ships files that are broken on purpose.
        return
    yield from _docstrings(tree)
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict) and path.name == "topics.py":
            yield from ast.literal_eval(statement.value).values()


def _docstrings(node: ast.Module | ast.ClassDef) -> Iterator[str]:
    """The docstrings of a module or class and of what it defines; bodies of functions are passed over."""
    yield ast.get_docstring(node) or ""
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _docstrings(child)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(child) or ""


def _prose(text: str, seen: set[bytes]) -> str:
    """The paragraphs of English prose that were not seen before; adds them to `seen`."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        words = re.findall(r"[A-Za-z']+", paragraph)
        plain = sum(map(len, words)) + paragraph.count(" ") + paragraph.count("\n")
        common = sum(word.lower() in COMMON_WORDS for word in words)
        if len(words) < 8 or plain < 0.85 * len(paragraph) or common < 0.2 * len(words) or ">>>" in paragraph:
            continue
        key = hashlib.sha256(" ".join(words).encode()).digest()
        if key not in seen:
            seen.add(key)
            kept.append(paragraph.strip("\n"))
    return "\n\n".join(kept)
