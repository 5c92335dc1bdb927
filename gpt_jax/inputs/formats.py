"""Formats of text files. A file's extension or first bytes determine its format; a file that could be misread is refused.

`open_file` reads a file as bytes, decompressed if necessary, for readers of every kind. `detect_format` decides how a corpus file
contains its text.
"""

import codecs
import contextlib
import io
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

from gpt_jax.errors import UserError
from gpt_jax.inputs.archives import Unpacked, compression_of
from gpt_jax.inputs.json_values import looks_like_json

BinaryFile: TypeAlias = "io.BufferedReader[Any]"
TextFormat = Literal["text", "jsonl", "json", "parquet"]
"""`text`: the file is text. `jsonl`, `json`: objects one after the other, such as one per line, or in an array. `parquet`: a
table in Apache Parquet."""

EXTENSIONS: dict[str, TextFormat] = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
}
COMPRESSIONS = (".gz", ".gzip", ".zst", ".zstd")

HEAD_BYTES = 1 << 16
"""Number of bytes at the beginning of a file that determine its format."""

BYTE_ORDER_MARK = codecs.BOM_UTF8
PARQUET = b"PAR1"

_UTF16 = "text in UTF-16 or UTF-32, which is not supported; convert it to UTF-8, for example with iconv -f UTF-16 -t UTF-8"
_ARROW = "an Arrow file, which is not supported; convert it with datasets.load_from_disk(FOLDER).to_parquet(FILE) in Python"
REFUSED = {
    **{codecs.BOM_UTF16_LE: _UTF16, codecs.BOM_UTF16_BE: _UTF16, b"ARROW1": _ARROW, b"\xff\xff\xff\xff": _ARROW},
    b"version https://git-lfs.github.com/spec/": "a placeholder for a file in Git LFS; git lfs pull fetches the file",
    b"/annex/objects/": "a placeholder for a file in git-annex; git annex get fetches the file",
}
"""First bytes of unsupported files that stand for text, and what to do with such a file."""
NOT_TEXT = {b"PK\x03\x04": "zip archives", b"BZh": "bzip2 archives", b"\xfd7zXZ\0": "xz archives", b"%PDF-": "PDF documents"}
"""First bytes of files that need not contain text, and the names of their kinds. Most other formats have NUL bytes."""
TAR, TAR_POSITION = b"ustar", 257
NUL_BYTE = "a NUL byte, so this is not text in UTF-8; convert the file to UTF-8, or leave it out with a glob"


class NotTextError(UserError):
    """A file does not contain text at all, for example a picture. `kind` names such files in a count of them."""

    def __init__(self, message: str, kind: str):
        super().__init__(message)
        self.kind = kind


def content_suffix(path: Path) -> str:
    """Returns the extension of a file's content in lower case: ".jsonl" for "Data.JSONL.GZ"."""
    name = path.name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return Path(name).suffix


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[BinaryFile]:
    """Opens a file as a stream of bytes, decompressed if its first bytes are those of gzip or zstd.

    `peek(HEAD_BYTES)[:HEAD_BYTES]` gives all of the first `HEAD_BYTES` bytes before anything is read.

    Raises:
      UserError: it is not a regular file, cannot be opened, or is in a format of `REFUSED`; also while the stream is read, if a
        compressed file is damaged or unpacks to more than `archives.max_unpacked_size`. The message names the file.
      NotTextError: it is a tar archive or in a format of `NOT_TEXT`.
    """
    try:
        # A pipe would block and a device might never end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path}: {'a folder' if path.is_dir() else 'a pipe or device'}, not a file")
        with io.BufferedReader(io.FileIO(path), HEAD_BYTES) as file:
            compression = _compression(path, file)
            if not compression:
                yield file
                return
            with io.BufferedReader(Unpacked(file, path, compression), HEAD_BYTES) as unpacked:
                if _compression(path, unpacked):
                    raise UserError(f"{path}: compressed twice; decompress it once")
                yield unpacked
    except OSError as error:
        if error.filename not in (None, str(path)):
            raise
        raise UserError(f"{path}: {error.strerror or error}") from error


def _compression(path: Path, file: BinaryFile) -> str:
    """Returns the compression of a file opened at its beginning, and refuses a file in an unsupported format."""
    head = file.peek(HEAD_BYTES)
    for first_bytes, problem in REFUSED.items():
        if head.startswith(first_bytes):
            raise UserError(f"{path}: {problem}")
    kinds = [kind for first_bytes, kind in NOT_TEXT.items() if head.startswith(first_bytes)]
    if kinds or head.startswith(TAR, TAR_POSITION):
        kind = kinds[0] if kinds else "tar archives"
        raise NotTextError(f"{path}: {kind} are not supported; unpack or convert the file", kind)
    return compression_of(head)


def detect_format(path: Path, wanted: TextFormat | Literal["auto"] = "auto") -> tuple[TextFormat, bool]:
    """Returns the format of a corpus file, and whether it is JSON that counts as plain text because of its extension.

    Known first bytes decide, or else a known extension. A file without either is text, unless its first `HEAD_BYTES` bytes are
    JSON.

    Args:
      path: the file, which may be compressed.
      wanted: the format that the user chose; "auto" if none.

    Raises:
      NotTextError: the file is empty or has NUL bytes.
      UserError: see `open_file`; or the file is JSON with another extension, is not UTF-8, or is not in the format that its
        extension or `wanted` says.
    """
    with open_file(path) as file:
        head = file.peek(HEAD_BYTES)[:HEAD_BYTES]
        is_parquet = head.startswith(PARQUET) and not isinstance(file.raw, Unpacked)
    if not head.removeprefix(BYTE_ORDER_MARK):
        raise NotTextError(f"{path}: the file is empty", "empty files")
    claimed = wanted if wanted != "auto" else EXTENSIONS.get(content_suffix(path))
    if is_parquet and wanted in ("auto", "parquet"):
        return "parquet", False
    if claimed == "parquet":
        raise UserError(f"{path}: not a Parquet file (its first bytes are not PAR1); unpack it, or name another --data.format")
    if b"\0" in head:
        line = 1 + head.count(b"\n", 0, head.index(0))
        raise NotTextError(f"{path}:{line}: {NUL_BYTE}", "binary files")
    complete = len(head) < HEAD_BYTES
    text = decode_text(head, path, 1, complete).removeprefix("\ufeff")
    if claimed is not None and (claimed != "text" or wanted == "text"):
        return claimed, False
    is_json = looks_like_json(text, complete)
    if is_json and claimed is None:
        hint = "--data.format jsonl or json reads its text field, --data.format text all of it as plain text"
        raise UserError(f"{path}: the content is JSON, but the extension is not .json or .jsonl; {hint}")
    return "text", is_json


def decode_text(data: bytes, path: Path, line: int, complete: bool = True) -> str:
    """Returns text that begins in the given line of a file. Unless it is `complete`, its last character may be cut off.

    Raises:
      UserError: it is not UTF-8. The message names the line.
    """
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(data, complete)
    except UnicodeDecodeError as error:
        raise encoding_error(error, path, line) from error


def encoding_error(error: UnicodeDecodeError, path: Path, line: int) -> UserError:
    """Returns the error for bytes that begin in the given line of a file and are not UTF-8."""
    line += error.object.count(b"\n", 0, error.start)
    return UserError(f"{path}:{line}: byte 0x{error.object[error.start]:02x} is not UTF-8; convert the file to UTF-8")
