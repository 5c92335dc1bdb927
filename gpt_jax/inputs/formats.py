"""Formats of text files. The extension of a file or its first bytes tell its format; a file that could be misread is refused.

`open_file` reads a file as bytes, decompressed if necessary, for readers of every kind. `detect_format` decides how the text is
contained in a file of a corpus.
"""

import codecs
import contextlib
import io
import re
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from gpt_jax.errors import UserError
from gpt_jax.inputs.archives import SIGNATURES, Unpacked, unpack_command
from gpt_jax.inputs.json_values import looks_like_json

BinaryFile: TypeAlias = "io.BufferedReader[Any]"
TextFormat = Literal["text", "jsonl", "json", "parquet"]
"""`text`: the file is text. `jsonl`: one JSON object on each line. `json`: an array of objects, or objects one after the other.
`parquet`: a table in Apache Parquet."""

EXTENSIONS: dict[str, TextFormat] = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
}
COMPRESSIONS = (".gz", ".gzip", ".zst", ".zstd")

HEAD_BYTES = 1 << 16
"""Number of bytes at the beginning of a file that its format is decided by."""

BYTE_ORDER_MARK = codecs.BOM_UTF8
PARQUET = b"PAR1"


class NotTextError(UserError):
    """A file does not contain text at all, for example a picture. `kind` is the name for such files in a count of them."""

    def __init__(self, message: str, kind: str):
        super().__init__(message)
        self.kind = kind


class Signature(NamedTuple):
    """The first bytes of a format that is not read, and the command that turns such a file into one that is."""

    position: int
    bytes: bytes
    name: str
    command: str
    kind: str = ""
    """Name for such files in a count of them, if they need not contain text; empty if they are text in another form."""


_TAR = Signature(257, b"ustar", "a tar archive", "tar -xf {file} -C FOLDER", "archives")
REFUSED = (
    Signature(0, codecs.BOM_UTF32_LE, "UTF-32 text", "iconv -f UTF-32 -t UTF-8 {file} > NEW"),
    Signature(0, codecs.BOM_UTF32_BE, "UTF-32 text", "iconv -f UTF-32 -t UTF-8 {file} > NEW"),
    Signature(0, codecs.BOM_UTF16_LE, "UTF-16 text", "iconv -f UTF-16 -t UTF-8 {file} > NEW"),
    Signature(0, codecs.BOM_UTF16_BE, "UTF-16 text", "iconv -f UTF-16 -t UTF-8 {file} > NEW"),
    Signature(0, b"version https://git-lfs.github.com/spec/", "a placeholder of Git LFS for a file", "git lfs pull"),
    Signature(0, b"/annex/objects/", "a placeholder of git-annex for a file", "git annex get {file}"),
    Signature(0, b"ARROW1", "an Arrow file", "datasets.load_from_disk(FOLDER).to_parquet(NEW) in Python"),
    Signature(0, b"\xff\xff\xff\xff", "an Arrow stream", "datasets.load_from_disk(FOLDER).to_parquet(NEW) in Python"),
    Signature(0, b"PK\x03\x04", "a zip archive", "unzip {file} -d FOLDER", "archives"),
    Signature(0, b"PK\x05\x06", "an empty zip archive", "unzip {file} -d FOLDER", "archives"),
    _TAR,
    Signature(0, b"BZh", "compressed with bzip2", "bzip2 -dk {file}", "archives"),
    Signature(0, b"\xfd7zXZ\0", "compressed with xz", "xz -dk {file}", "archives"),
    Signature(0, b"\x04\x22\x4d\x18", "compressed with lz4", "lz4 -d {file} NEW", "archives"),
    Signature(0, b"\x1f\x9d", "compressed with compress", "gzip -dc {file} > NEW", "archives"),
    Signature(0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x {file}", "archives"),
    Signature(0, b"Rar!\x1a\x07", "a RAR archive", "unrar x {file}", "archives"),
    Signature(0, b"%PDF-", "a PDF document", "pdftotext {file} NEW", "documents"),
)
"""Formats that are recognized and not read. UTF-32 precedes UTF-16, whose mark is the beginning of its own."""
_FIRST_BYTES = tuple(signature.bytes for signature in REFUSED if not signature.position)


def content_suffix(path: Path) -> str:
    """Returns the extension of a file's content in lower case: ".jsonl" for "Data.JSONL.GZ"."""
    name = path.name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return Path(name).suffix


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[BinaryFile]:
    """Opens a file for a reader of any kind: a stream of bytes, decompressed if the first bytes are those of gzip or zstd.

    `peek(HEAD_BYTES)[:HEAD_BYTES]` gives all of the first `HEAD_BYTES` bytes before anything is read.

    Raises:
      UserError: it is not a regular file, cannot be opened, or is in a format of `REFUSED`; also while the stream is read, if a
        compressed file is damaged or unpacks to more than `archives.max_unpacked_size`. The message names the file.
      NotTextError: it is in a format of `REFUSED` that need not contain text.
    """
    try:
        # A pipe would block and a device might never end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path}: {'a folder' if path.is_dir() else 'a pipe or device'}, not a file")
        with io.BufferedReader(io.FileIO(path), HEAD_BYTES) as file:
            compression = _checked_head(path, file, "")
            if not compression:
                yield file
                return
            with io.BufferedReader(Unpacked(file, path, compression), HEAD_BYTES) as unpacked:
                if _checked_head(path, unpacked, compression):
                    raise UserError(f"{path}: compressed twice; decompress it once: {unpack_command(compression, path)}")
                yield unpacked
    except OSError as error:
        if error.filename not in (None, str(path)):
            raise
        raise UserError(f"{path}: {error.strerror or error}") from error


def _checked_head(path: Path, file: BinaryFile, compression: str) -> str:
    """Refuses content that begins with a signature of `REFUSED`. Returns its compression: "gzip", "zstd" or empty.

    Args:
      path: the path of the file, for messages.
      file: the content at its beginning.
      compression: the compression of the file from which this content was unpacked; empty if it is the file's own.
    """
    head = file.peek(HEAD_BYTES)
    suspicious = head.startswith(_FIRST_BYTES) or head.startswith(_TAR.bytes, _TAR.position)
    for signature in REFUSED if suspicious else ():
        if head.startswith(signature.bytes, signature.position):
            command = signature.command.format(file=shlex.quote(str(path)))
            if compression and signature is not _TAR:
                command = f"{unpack_command(compression, path)} first"
            message = f"{path}: {signature.name}, which is not read; use {command}"
            raise NotTextError(message, signature.kind) if signature.kind else UserError(message)
    compressed = head.startswith(tuple(SIGNATURES))
    return next(kind for first_bytes, kind in SIGNATURES.items() if head.startswith(first_bytes)) if compressed else ""


class Detected(NamedTuple):
    """The format of a file of a corpus."""

    format: TextFormat
    is_json_in_txt: bool = False
    """Whether the content is JSON although the extension says plain text, which decides."""


def detect_format(path: Path, wanted: TextFormat | Literal["auto"] = "auto") -> Detected:
    """Returns the format of a file of a corpus.

    Known first bytes decide, or else a known extension. A file without either is text, unless its first `HEAD_BYTES` bytes are
    JSON.

    Args:
      path: the file, which may be compressed.
      wanted: the format that the user has settled; "auto" if none.

    Raises:
      NotTextError: the file is empty or binary.
      UserError: see `open_file`; or the file is JSON and has another extension, or is not in the format that its extension or
        `wanted` says.
    """
    with open_file(path) as file:
        head = file.peek(HEAD_BYTES)[:HEAD_BYTES]
        compressed = isinstance(file.raw, Unpacked)
    complete = len(head) < HEAD_BYTES
    head = head.removeprefix(BYTE_ORDER_MARK)
    if not head:
        raise NotTextError(f"{path}: the file is empty", "empty files")
    claimed = wanted if wanted != "auto" else EXTENSIONS.get(content_suffix(path))
    if head.startswith(PARQUET) and wanted in ("auto", "parquet"):
        if compressed:
            raise UserError(f"{path}: a Parquet file that is compressed as a whole; decompress it first (gzip -d or zstd -d)")
        return Detected("parquet")
    if claimed == "parquet":
        raise UserError(f"{path}: not a Parquet file (its first bytes are not PAR1); --data.format names another format")
    _refuse_binary(path, head)
    if claimed is not None and (claimed != "text" or wanted == "text"):
        return Detected(claimed)
    is_json = looks_like_json(head.decode(errors="replace"), complete)
    if is_json and claimed is None:
        hint = "--data.format jsonl or json reads its text field, --data.format text all of it as plain text"
        raise UserError(f"{path}: the content is JSON, but the extension is not .json or .jsonl; {hint}")
    return Detected("text", is_json)


CONTROLS = re.compile(rb"[\x01-\x08\x0e-\x1a\x1c-\x1f]")
"""Control characters other than NUL that do not occur in text of any encoding that extends ASCII."""
MAX_NULS = 0.001
"""Maximum share of NUL bytes in what is otherwise text. Some text from the web has single ones."""


def _refuse_binary(path: Path, head: bytes) -> None:
    """Refuses content with NUL bytes, or with control characters where it is not UTF-8 either.

    Raises:
      NotTextError: it is binary.
      UserError: it is text, but in UTF-16 or with single NUL bytes.
    """
    for encoding, (upper, lower) in {"UTF-16LE": (head[1::2], head[::2]), "UTF-16BE": (head[::2], head[1::2])}.items():
        # The upper bytes of most characters of western languages are 0.
        if upper.count(0) > 0.7 * len(upper) and lower.count(0) < 0.1 * len(lower):
            command = f"iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > NEW"
            raise UserError(f"{path}: looks like {encoding} text, which is not read; use {command}")
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # The last character may be cut off.
        is_text = head.count(0) <= MAX_NULS * len(head) and not (b"\0" in head and CONTROLS.search(head))
    except UnicodeDecodeError:
        is_text = b"\0" not in head and not CONTROLS.search(head)
    if not is_text:
        reason = "it has NUL bytes" if b"\0" in head else "control characters, and not UTF-8"
        raise NotTextError(f"{path}: a binary file ({reason}), which no --data.format reads", "binary files")
    if b"\0" in head:
        line = 1 + head.count(b"\n", 0, head.index(0))
        raise UserError(
            f"{path}:{line}: a NUL byte in a text; remove it, for example: tr -d '\\0' < {shlex.quote(str(path))} > NEW"
        )


def decode_text(data: bytes, path: Path, line: int) -> str:
    """Returns text that begins in the given line of a file.

    Raises:
      UserError: it is not UTF-8. The message names the line.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise encoding_error(error, path, line) from error


def encoding_error(error: UnicodeDecodeError, path: Path, line: int) -> UserError:
    """Returns the error for bytes, of which the first are in the given line of a file, that are not UTF-8."""
    line += error.object.count(b"\n", 0, error.start)
    return UserError(f"{path}:{line}: byte 0x{error.object[error.start]:02x} is not UTF-8; convert the file to UTF-8")
