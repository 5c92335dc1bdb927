"""The token store: a corpus as token ids on disk, from which windows of any length are read.

Format, version 1 (frozen; a change gets a new number, and old numbers keep loading). A folder with

- `index.json`: {"format": FORMAT, "version": 1, "dtype": "uint16" or "uint32", "tokenizer": {"kind", "fingerprint",
  "vocab_size", "separator"}, "recipe": how it was prepared (`prepare`), "dropped": {"duplicates", "empty"}, "splits":
  {"train": SPLIT, "validation": SPLIT}}. A SPLIT is {"tokens", "documents", "text_bytes", "shards": [SHARD, ...]} where
  text_bytes counts the original text in UTF-8, and a SHARD is {"file", "size", "sha256", "tokens", "documents", "offsets":
  {"file", "size", "sha256"}}; sizes in bytes, SHA-256 in hexadecimal. Last "digest": `digest_of` all the rest.
- `train-00000.bin`, `validation-00000.bin`, ...: nothing but token ids, little-endian: uint16 where the vocabulary has at most
  65,536 entries, else uint32. A split is its shards one after the other. Each document is followed by the separator.
- `train-00000.offsets`, ...: for each document of the shard the place of its first token in it, little-endian uint64.
- `tokenizer/`: what `tokenizers.load` reads.

Documents lie in the order of the SHA-256 of their text, so any run of them is an even sample.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32, Int64

from gpt_jax.data import tokenizers
from gpt_jax.errors import UserError
from gpt_jax.runtime.rundir import sha256, write_atomic

FORMAT = "gpt_jax token store"
VERSION = 1
INDEX = "index.json"
TOKENIZER = "tokenizer"
PARTIAL = "partial"
"""Subfolder of a store that is not finished yet; belongs to `prepare`."""
SPLITS: tuple[Literal["train", "validation"], ...] = ("train", "validation")
OFFSET_DTYPE = np.dtype("<u8")


def token_dtype(vocab_size: int) -> np.dtype:
    """The type of stored tokens: the smallest that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


# -- opening ----------------------------------------------------------------------------------------------------------------


class Store:
    """A finished token store; made by `open`.

    Attributes:
      index: what index.json holds, without the digest.
      digest: hexadecimal SHA-256 that tells this store from any other: equal digests hold equal tokens, prepared alike.
    """

    def __init__(self, folder: Path, index: dict[str, Any], digest: str):
        self.folder = folder
        self.index = index
        self.digest = digest

    @classmethod
    def open(cls, folder: Path, verify: bool = True) -> Store:
        """Opens a store after checking the size of every file and, with `verify`, every checksum (about 1.5 GB/s a core).

        Raises:
          UserError: there is no finished store, its format version is unknown, or a file is missing, cut short or altered.
        """
        path = folder / INDEX
        try:
            index = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            unfinished = (folder / PARTIAL).is_dir()
            hint = "only an unfinished one: prepare it again to continue" if unfinished else f"{INDEX} is missing"
            raise UserError(f"{folder}: no token store here ({hint})") from None
        except ValueError as error:
            raise UserError(f"{path}: damaged, not JSON ({error}); prepare the store anew in an empty folder") from None
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise UserError(f"{path}: not the index of a token store (its format must be '{FORMAT}')")
        if index.get("version") != VERSION:
            raise UserError(f"{path}: format version {index.get('version')} is unknown; this program reads version {VERSION}")
        digest = index.pop("digest", "")
        if digest != digest_of(index):
            raise UserError(f"{path}: altered since it was written (digest); restore it or prepare the store anew")
        shards = [shard for name in SPLITS for shard in index["splits"][name]["shards"]]
        check_files(folder, shards, verify)
        return cls(folder, index, digest)

    def tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer that made the tokens.

        Raises:
          UserError: it is missing, or is not the one that the index names.
        """
        tokenizer = tokenizers.load(self.folder / TOKENIZER)
        expected = self.index["tokenizer"]["fingerprint"]
        if tokenizer.fingerprint != expected:
            raise UserError(
                f"{self.folder / TOKENIZER}: not the tokenizer that made this store (its fingerprint begins with "
                f"{tokenizer.fingerprint[:12]}, must be {expected[:12]})"
            )
        return tokenizer

    def split(self, name: Literal["train", "validation"]) -> TokenArray:
        """The tokens of one split."""
        split = self.index["splits"][name]
        files = [self.folder / shard["file"] for shard in split["shards"]]
        reader = MappedShards(files, token_dtype(self.index["tokenizer"]["vocab_size"]))
        sizes = [shard["tokens"] for shard in split["shards"]]
        return TokenArray(reader, sizes, text_bytes=split["text_bytes"], documents=split["documents"])


def digest_of(index: dict[str, Any]) -> str:
    """The hexadecimal SHA-256 of an index as JSON with sorted keys and no white space."""
    return hashlib.sha256(json.dumps(index, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_files(folder: Path, shards: Iterable[dict[str, Any]], verify: bool) -> None:
    """Checks the files of index entries: their sizes, then with `verify` their checksums, on every core.

    Raises:
      UserError: naming the first file that is missing, of another size or altered.
    """
    files = [file for shard in shards for file in (shard, shard["offsets"])]
    for file in files:
        path = folder / file["file"]
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise UserError(f"{path}: missing from the token store; restore it or prepare the store anew") from None
        if size != file["size"]:
            raise UserError(f"{path}: {size} bytes, must be {file['size']}; restore it or prepare the store anew")
    if verify:
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:  # hashlib lets go of the interpreter lock.
            checksums = threads.map(sha256, [folder / file["file"] for file in files])
            for file, checksum in zip(files, checksums, strict=True):
                if checksum != file["sha256"]:
                    raise UserError(
                        f"{folder / file['file']}: altered since it was written (SHA-256); restore it or prepare the store anew"
                    )


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` by `value` as JSON: at any instant the old file or the new one is there, whole."""
    write_atomic(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


# -- reading ----------------------------------------------------------------------------------------------------------------


class MappedShards:
    """A split's shards, memory-mapped. The only place that reads tokens: what else has a `fill` can take its place, for
    example one that fetches the byte ranges of all spans at once from an object store."""

    def __init__(self, files: Iterable[Path], dtype: np.dtype):
        # As plain arrays, since slicing numpy's own memmap class takes several times as long.
        self._shards = [np.memmap(file, dtype, mode="r").view(np.ndarray) for file in files]

    def fill(self, rows: Int32[np.ndarray, "rows length"], spans: Iterable[tuple[int, int, int, int, int]]) -> None:
        """Copies each span (row, column, shard, start in the shard, number of tokens) into its place in `rows`."""
        shards = self._shards
        for row, column, shard, start, size in spans:
            rows[row, column : column + size] = shards[shard][start : start + size]


class TokenArray:
    """The tokens of one split as one long array.

    Attributes:
      num_tokens: separators included.
      text_bytes: bytes of the original text in UTF-8.
      documents: number of documents.
    """

    def __init__(self, reader: MappedShards, sizes: list[int], *, text_bytes: int, documents: int):
        self._reader = reader
        self._edges = np.cumsum([0, *sizes], dtype=np.int64)
        self.num_tokens = int(self._edges[-1])
        self.text_bytes = text_bytes
        self.documents = documents

    def read(self, starts: Int64[np.ndarray, " rows"], length: int) -> Int32[np.ndarray, "rows length"]:
        """Row i is tokens [starts[i], starts[i] + length), wherever shards end.

        Raises:
          IndexError: a row reaches outside the split.
        """
        if starts.size and (starts.min() < 0 or starts.max() + length > self.num_tokens):
            reach = f"[{starts.min()}, {starts.max() + length})"
            raise IndexError(f"rows of {length} tokens reach over {reach}, outside the split's {self.num_tokens} tokens")
        rows = np.empty((starts.size, length), np.int32)
        self._reader.fill(rows, self._spans(starts, length))
        return rows

    def _spans(self, starts: Int64[np.ndarray, " rows"], length: int) -> Iterator[tuple[int, int, int, int, int]]:
        """Cuts rows where shards end; each round takes what all unfinished rows find in one shard."""
        row = np.arange(starts.size)
        position = starts
        column = np.zeros_like(row)
        while row.size:
            shard = np.searchsorted(self._edges, position, side="right") - 1
            size = np.minimum(length - column, self._edges[shard + 1] - position)
            spans = (row, column, shard, position - self._edges[shard], size)
            yield from zip(*(values.tolist() for values in spans), strict=True)
            column, position = column + size, position + size
            more = column < length
            row, column, position = row[more], column[more], position[more]
