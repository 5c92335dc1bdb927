"""Files compressed with gzip or zstd, read as a stream of bytes that is checked for damage and bounded in size."""

import functools
import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from gpt_jax.errors import UserError

GZIP = b"\x1f\x8b"
ZSTD = (b"\x28\xb5\x2f\xfd", *(bytes((byte, 0x2A, 0x4D, 0x18)) for byte in range(0x50, 0x60)))
"""First bytes of zstd files, which may begin with one of sixteen kinds of skippable frames."""

MAX_EXPANSION = 200
"""Maximum ratio of the unpacked to the compressed size. Text expands 2 to 10 times, and repetitive logs or tables at most about
100 times. Archives of zeros, which would fill the disk, expand 1,000 times (gzip) or more than 10,000 times (zstd)."""
ALWAYS_ALLOWED = 64 << 20
"""Unpacked size in bytes that is allowed at any ratio, since a small file of repeated lines harms nobody."""

MAX_WINDOW = 1 << 31
"""Maximum window of a zstd file in bytes (`zstd --long=31`, which some large collections of text use). Reading a file takes as
much memory as its window."""
ZSTD_INPUT = 1 << 12
"""Number of compressed bytes that are unpacked at a time. They unpack to at most 128 MiB."""
GZIP_OUTPUT = 1 << 16
"""Maximum number of bytes that are unpacked at a time."""


def max_unpacked_size(path: Path) -> int:
    """Returns the maximum size in bytes to which the content of a compressed file may unpack."""
    return max(ALWAYS_ALLOWED, MAX_EXPANSION * path.stat().st_size)


def compression_of(head: bytes) -> str:
    """Returns the compression of a file that begins with `head`: "gzip", "zstd", or empty."""
    return "gzip" if head.startswith(GZIP) else "zstd" if head.startswith(ZSTD) else ""


class Unpacked(io.RawIOBase):
    """The unpacked content of a compressed file.

    Args:
      file: the compressed file, opened at its beginning. It must stay open.
      path: the path of the file, for its size and for messages.
      kind: "gzip" or "zstd".

    Raises (when it is read):
      UserError: the archive is damaged, ends early, is followed by something else, or unpacks to more than `max_unpacked_size`.
    """

    def __init__(self, file: BinaryIO, path: Path, kind: str):
        self._pieces = _checked_pieces(file, path, kind)
        self._rest = bytearray()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fills the buffer, except at the end of the content. Returns the number of bytes."""
        while len(self._rest) < len(buffer) and (piece := next(self._pieces, b"")):
            self._rest += piece
        size = min(len(self._rest), len(buffer))
        buffer[:size] = self._rest[:size]
        del self._rest[:size]
        return size


def _checked_pieces(file: BinaryIO, path: Path, kind: str) -> Iterator[bytes]:
    """Yields the content in pieces, none of them empty."""
    import zstandard

    limit, size = max_unpacked_size(path), 0
    try:
        for piece in filter(None, _gzip_pieces(file) if kind == "gzip" else _zstd_pieces(file)):
            size += len(piece)
            if size > limit:
                rule = f"{MAX_EXPANSION} times its size, or {ALWAYS_ALLOWED:,}"
                hint = f"if it really is text, decompress it yourself with {kind} -d"
                raise UserError(f"{path}: unpacks to more than {limit:,} bytes (the limit is {rule}); {hint}")
            yield piece
    except (gzip.BadGzipFile, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"{path}: broken {kind} archive after {size:,} bytes of content: {error}") from error


def _gzip_pieces(file: BinaryIO) -> Iterable[bytes]:
    return iter(functools.partial(gzip.GzipFile(fileobj=file).read1, GZIP_OUTPUT), b"")


def _zstd_pieces(file: BinaryIO) -> Iterator[bytes]:
    """Yields the content of all frames. The library's own file reader does not notice if the last frame is cut off."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
    data = file.read(ZSTD_INPUT)
    while data:
        frame = decompressor.decompressobj()
        while not frame.eof:
            if not data:
                raise EOFError("it ends within a frame")
            yield frame.decompress(data)
            data = b"" if frame.eof else file.read(ZSTD_INPUT)
        data = frame.unused_data or file.read(ZSTD_INPUT)
