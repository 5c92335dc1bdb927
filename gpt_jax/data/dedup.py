"""The distinct documents of a corpus, on disk in the order of their hash: an external sort that drops duplicates."""

from __future__ import annotations

import array
import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gpt_jax.data.progress import Progress
from gpt_jax.data.store import write_json
from gpt_jax.errors import UserError

BUCKETS = 128
"""Files that the text is spread over, by hash, to be sorted one at a time: memory holds a 128th of the text. Below the 256 open
files that some systems allow."""


def collect(documents: Iterable[str], folder: Path, log: Callable[[str], None]) -> None:
    """Writes the distinct documents, in the order of the SHA-256 of their UTF-8 text, into the files that `Texts` reads.

    They are spread over BUCKETS files by their first hash bits, then each of these is sorted in memory. Texts of nothing
    but white space are dropped. A lone surrogate, which UTF-8 cannot hold, becomes a question mark, as in the tokenizers.
    """
    paths = [folder / f"bucket-{number:03d}" for number in range(BUCKETS)]
    empty = 0
    try:
        with contextlib.ExitStack() as stack, Progress("reading", None, log) as progress:
            buckets = [stack.enter_context(path.open("wb", buffering=1 << 17)) for path in paths]
            for document in documents:
                if not document or document.isspace():
                    empty += 1
                    continue
                text = document.encode("utf-8", "replace")
                digest = hashlib.sha256(text).digest()
                buckets[digest[0] * BUCKETS // 256].write(digest + len(text).to_bytes(8, "little") + text)
                progress.add(len(text))
        lengths, tails = array.array("q"), array.array("Q")
        duplicates = 0
        with (folder / "texts").open("wb") as file:
            for path in paths:
                previous = b""
                for digest, stored in sorted(_records(path.read_bytes())):
                    if digest == previous:
                        duplicates += 1
                        continue
                    previous = digest
                    file.write(stored)
                    lengths.append(len(stored))
                    tails.append(_tail(digest))
                path.unlink()
            sync(file)
        for name, values in (("lengths", np.asarray(lengths, np.int64)), ("tails", np.asarray(tails, np.uint64))):
            with (folder / f"{name}.npy").open("wb") as file:
                np.save(file, values)
                sync(file)
    except OSError:
        for path in (*paths, folder / "texts"):  # A full disk is not left full.
            path.unlink(missing_ok=True)
        raise
    write_json(folder / "texts.json", {"duplicates": duplicates, "empty": empty})


def _records(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """The digests and texts in a bucket's bytes. (Texts of one digest are equal, so sorting the pairs never orders texts.)"""
    view = memoryview(data)
    at = 0
    while at < len(data):
        end = at + 40 + int.from_bytes(data[at + 32 : at + 40], "little")
        yield data[at : at + 32], view[at + 40 : end]
        at = end


def is_held_out(text: str, validation_share: float) -> bool:
    """Whether a document of this text is for validation (of so few documents that a split would stay empty, one is moved)."""
    return _tail(hashlib.sha256(text.encode("utf-8", "replace")).digest()) < _limit(validation_share)


def _tail(digest: bytes) -> int:
    return int.from_bytes(digest[-8:], "little")


def _limit(validation_share: float) -> int:
    """What the tails of held-out documents are below."""
    return int(validation_share * 2**64)


def sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


class Texts:
    """The documents that `collect` wrote, and which split each belongs to.

    Attributes:
      documents: for each split, the numbers of its documents in the order of their hash.
      begins, lengths: place and size in bytes of each document in the file `path`.
      dropped: how many duplicates and empty texts were left out.
    """

    def __init__(self, folder: Path, max_bytes: int, validation_share: float):
        """Takes documents up to `max_bytes` (0: all); those whose hash, its last eight bytes as a fraction, lies below
        `validation_share` are for validation (the order is decided by the first bytes, so the two are independent).

        Raises:
          UserError: too few documents for the splits asked for.
        """
        self.path = folder / "texts"
        self.dropped: dict[str, int] = json.loads((folder / "texts.json").read_bytes())
        self.lengths = np.load(folder / "lengths.npy")
        ends = np.cumsum(self.lengths)
        self.begins = ends - self.lengths
        count = int(np.searchsorted(ends, max_bytes, side="right")) if max_bytes else ends.size
        found = f"--data.source: distinct documents{f' within --data.max-bytes {max_bytes}' if max_bytes else ''}: {count}"
        if count < 2 and validation_share:
            raise UserError(f"{found}; at least 2 are needed, one for validation (--data.validation-share 0 holds none out)")
        if count < 1:
            raise UserError(f"{found}; at least 1 is needed")
        tails = np.load(folder / "tails.npy")[:count]
        validation = tails < np.uint64(_limit(validation_share))
        if validation_share:  # Neither split stays empty, whatever the hashes of a few documents are.
            validation[np.argmin(tails)] = True
            validation[np.argmax(tails)] = False
        self.documents = {"train": np.flatnonzero(~validation), "validation": np.flatnonzero(validation)}

    def sample(self, split: str, limit: int) -> Iterator[str]:
        """A split's first documents, up to `limit` bytes in all but one at least: in the order of hashes an even sample."""
        with self.path.open("rb") as file:
            left = limit
            for number in self.documents[split]:
                length = int(self.lengths[number])
                if length > left and left < limit:
                    return
                left -= length
                yield os.pread(file.fileno(), length, int(self.begins[number])).decode()
