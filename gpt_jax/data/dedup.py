"""The distinct documents of a corpus in the order of their hash.

The text is written to disk once, in the order in which it is read, and its documents are later read in the order of their hash.
About 200 bytes per document are kept in memory, but none of the text. If the text is larger than the memory, the store should be
on an SSD, because the documents are then read from all over the disk.
"""

import hashlib
import io
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from gpt_jax.errors import UserError
from gpt_jax.runtime.console import Log, ProgressLine
from gpt_jax.runtime.rundir import write_atomic

PROGRESS_SECONDS = 5.0
"""Seconds between progress lines if standard error is not a terminal."""

TEXT = "text"
"""The documents in UTF-8, one after the other, including duplicates."""
TABLE = "documents.npz"
"""The table of the distinct documents. It is written after `TEXT`, so if it exists, both are complete."""


def write_documents(documents: Iterable[str], folder: Path, log: Log) -> None:
    """Writes documents into the files that `DistinctDocuments` reads.

    Documents that consist only of white space are left out. A lone surrogate, which UTF-8 cannot represent, becomes a question
    mark, as in the tokenizers.
    """
    digests, lengths, num_empty = bytearray(), list[int](), 0
    start, progress = time.monotonic(), ProgressLine(PROGRESS_SECONDS, log)
    try:
        with (folder / TEXT).open("wb") as file:

            def line() -> str:
                return f"reading: {file.tell() / 1e6:,.0f} MB, {file.tell() / 1e6 / (time.monotonic() - start):.2f} MB/s"

            for document in documents:
                if not document.strip():
                    num_empty += 1
                    continue
                text = document.encode("utf-8", "replace")
                file.write(text)
                digests += hashlib.sha256(text).digest()
                lengths.append(len(text))
                progress.show(line)
            file.flush()
            os.fsync(file.fileno())
        unique, first = np.unique(np.frombuffer(digests, "S32"), return_index=True)
        sizes = np.array(lengths, np.int64)
        starts = np.cumsum(sizes) - sizes
        dropped = (sizes.size - unique.size, num_empty)
        table = io.BytesIO()
        np.savez(table, starts=starts[first], lengths=sizes[first], tails=unique.view("<u8")[3::4], dropped=dropped)
        write_atomic(folder / TABLE, table.getvalue())
    except Exception:
        (folder / TEXT).unlink(missing_ok=True)  # The disk may be full.
        raise
    finally:
        progress.clear()


class DocumentSpans(NamedTuple):
    """Documents in a file of UTF-8 text, given by their positions and sizes in bytes."""

    file: Path
    starts: Int64[np.ndarray, " documents"]
    lengths: Int64[np.ndarray, " documents"]

    def read(self) -> Iterator[str]:
        """Yields the text of the documents."""
        with self.file.open("rb") as file:
            for start, length in zip(self.starts.tolist(), self.lengths.tolist(), strict=True):
                yield os.pread(file.fileno(), length, start).decode()


def is_held_out(text: str, validation_share: float) -> bool:
    """Returns whether a document with this text is for validation, apart from the exception in `DistinctDocuments`."""
    digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[-8:], "little") < int(validation_share * 2**64)


class DistinctDocuments:
    """The distinct documents that `write_documents` wrote, sorted by the SHA-256 of their text and divided into splits.

    A document is for validation if the last eight bytes of its hash, as a fraction, are below `validation_share`. The order
    depends on the first bytes, so it is independent of the split. If a split would be empty, one document of the other split is
    moved there.

    Args:
      folder: the folder of the files.
      max_bytes: only the first documents that fit into this many bytes are used; 0: all documents.
      validation_share: share of the documents in the validation split, in [0, 1).

    Attributes:
      lengths: size in bytes of each document.
      splits: the numbers of the documents of each split, in ascending order.
      dropped: how many "duplicates" and how many "empty" documents were left out.

    Raises:
      UserError: there are too few documents for the splits.
    """

    def __init__(self, folder: Path, max_bytes: int, validation_share: float):
        self._file = folder / TEXT
        with np.load(folder / TABLE) as table:
            self._starts, self.lengths, tails = table["starts"], table["lengths"], table["tails"]
            self.dropped = dict(zip(("duplicates", "empty"), table["dropped"].tolist(), strict=True))
        if max_bytes:
            tails = tails[: np.searchsorted(np.cumsum(self.lengths), max_bytes, side="right")]
        least = 2 if validation_share else 1
        if tails.size < least:
            limit = f" within --data.max-bytes {max_bytes}" if max_bytes else ""
            hint = ", one of them for validation (--data.validation-share 0 holds none out)" if validation_share else ""
            raise UserError(f"--data.source: too few distinct documents{limit} ({tails.size}); at least {least} are needed{hint}")
        validation = tails < np.uint64(int(validation_share * 2**64))
        if validation_share:
            validation[np.argmin(tails)] = True
            validation[np.argmax(tails)] = False
        self.splits = {"train": np.flatnonzero(~validation), "validation": np.flatnonzero(validation)}

    def select(self, numbers: Int64[np.ndarray, " documents"]) -> DocumentSpans:
        """Returns the documents with the given numbers."""
        return DocumentSpans(self._file, self._starts[numbers], self.lengths[numbers])

    def sample(self, split: str, max_bytes: int) -> Iterator[str]:
        """Yields the first documents of a split that fit into `max_bytes`, but at least one.

        These documents are an even sample of the split.
        """
        numbers = self.splits[split]
        count = np.searchsorted(np.cumsum(self.lengths[numbers]), max_bytes, side="right")
        return self.select(numbers[: max(1, count)]).read()
