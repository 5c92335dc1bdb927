"""The token store: the token ids of a corpus on disk, from which windows of any length can be read.

Format version 1 is frozen. Any change needs a new version number, and stores of old versions must remain readable. A store is a
folder with these files:

- `index.json`: {"format": FORMAT, "version": 1, "dtype": "uint16" or "uint32", "tokenizer": {"kind", "fingerprint",
  "vocab_size", "separator"}, "recipe": {"fields", "source"}, "dropped": {"duplicates", "empty"}, "splits": {"train": SPLIT,
  "validation": SPLIT}, "digest"}. The separator is the tokenizer's `eos_id`. The recipe consists of the config fields and the
  identity of the text that the store was made from (`prepare`). A SPLIT is {"tokens", "documents", "text_bytes", "shards":
  [SHARD, ...]}, where text_bytes counts the original text in UTF-8. A SHARD is {"file", "size", "sha256", "tokens",
  "documents", "offsets": {"file", "size", "sha256"}}. Sizes are in bytes, and SHA-256 is hexadecimal. The digest is
  `index_digest` of everything else.
- `train-00000.bin`, `validation-00000.bin`, ...: token ids and nothing else, little-endian, uint16 if the vocabulary has at most
  65,536 entries and uint32 otherwise. The tokens of a split are those of its shards in order. Each document is followed by
  the separator.
- `train-00000.offsets`, ...: the position in the shard of each document's first token, as little-endian uint64.
- `tokenizer/`: the tokenizer, which `load_tokenizer` can read.

Documents are in the order of the SHA-256 of their text, so any sequence of consecutive documents is an even sample.
"""

import bisect
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from jaxtyping import Int32, Int64

from gpt_jax.data.tokenizers import Tokenizer, load_tokenizer
from gpt_jax.errors import UserError, shortened
from gpt_jax.inputs.json_shapes import mismatch
from gpt_jax.runtime.rundir import read_json, sha256, write_atomic

FORMAT = "gpt_jax token store"
VERSION = 1
INDEX = "index.json"
TOKENIZER = "tokenizer"
PARTIAL = "partial"
"""Subfolder of an unfinished store, in which `prepare` keeps its state."""
SPLITS: tuple[Literal["train", "validation"], ...] = ("train", "validation")
OFFSET_DTYPE = np.dtype("<u8")
REMEDY = "restore it or prepare the store again"


FILE_NAME = re.compile(r"(train|validation)-\d{5,}\.(bin|offsets)")
FILE = {"file": str, "size": int, "sha256": str}
SHARD = {**FILE, "tokens": int, "documents": int, "offsets": FILE}
SPLIT = {"tokens": int, "documents": int, "text_bytes": int, "shards": [SHARD]}
RECIPE = {"fields": dict, "source": dict}
SHAPE = {
    "tokenizer": {"kind": str, "fingerprint": str, "vocab_size": int, "separator": int},
    **{"recipe": RECIPE, "dropped": {str: int}, "splits": {"train": SPLIT, "validation": SPLIT}},
}
"""The fields of index.json and their types, as in the description of the format above."""


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the smallest dtype of a store's tokens that can represent every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


# -- opening ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Store:
    """A finished token store, opened by `Store.open`.

    Attributes:
      folder: the store's folder.
      index: the contents of index.json without the digest.
      digest: hexadecimal SHA-256 of the index. Stores with equal digests have equal tokens and were prepared in the same way.
    """

    folder: Path
    index: dict[str, Any]
    digest: str

    @classmethod
    def open(cls, folder: Path, verify: bool = True) -> Self:
        """Opens a store after checking the size of every file and, with `verify`, every checksum (about 1.5 GB/s per core).

        Raises:
          UserError: there is no finished store in the folder, its format version is unknown, or a file is missing, truncated or
            altered.
        """
        path = folder / INDEX
        if not path.is_file():
            hint = "only an unfinished one: prepare it again" if (folder / PARTIAL).is_dir() else f"{INDEX} is missing"
            raise UserError(f"{folder}: there is no token store here ({hint})")
        index = read_json(path)
        if (index.get("format"), index.get("version")) != (FORMAT, VERSION):
            actual = f"format '{index.get('format')}', version {index.get('version')}"
            raise UserError(f"{path}: cannot read {actual}; must be '{FORMAT}', version {VERSION}")
        digest = index.pop("digest", "")
        with contextlib.suppress(RecursionError):
            if digest == index_digest(index):
                check_files(folder, _shards(path, index), verify)
                return cls(folder, index, digest)
        raise UserError(f"{path}: altered since it was written (its digest differs); {REMEDY}")

    @property
    def content_digest(self) -> str:
        """Hexadecimal SHA-256 of the tokens and their tokenizer, whatever they were made from."""
        return index_digest({name: self.index[name] for name in ("tokenizer", "splits")})

    def tokenizer(self) -> Tokenizer:
        """Loads the tokenizer that made the tokens.

        Raises:
          UserError: the tokenizer is missing, or its fingerprint is not the one in the index.
        """
        tokenizer = load_tokenizer(self.folder / TOKENIZER)
        expected = self.index["tokenizer"]["fingerprint"]
        if tokenizer.fingerprint != expected:
            prefixes = f"fingerprint {tokenizer.fingerprint[:12]}, not {expected[:12]}"
            raise UserError(f"{self.folder / TOKENIZER}: not the tokenizer that made this store ({prefixes}); {REMEDY}")
        return tokenizer

    def split(self, name: Literal["train", "validation"]) -> "TokenArray":
        """Returns the tokens of one split."""
        split = self.index["splits"][name]
        files = [self.folder / shard["file"] for shard in split["shards"]]
        return TokenArray(files, token_dtype(self.index["tokenizer"]["vocab_size"]), split["text_bytes"])


def _shards(path: Path, index: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the entries of all shards.

    Raises:
      UserError: the index violates the format, although its digest is right.
    """
    if problem := mismatch(index, SHAPE):
        raise UserError(f"{path}: not the index of a token store: {problem}; {REMEDY}")
    shards = [shard for name in SPLITS for shard in index["splits"][name]["shards"]]
    item_size = token_dtype(index["tokenizer"]["vocab_size"]).itemsize
    for shard in shards:
        for name in (shard["file"], shard["offsets"]["file"]):
            if not FILE_NAME.fullmatch(name):
                raise UserError(f"{path}: '{shortened(name)}' is not the name of a file of a token store; {REMEDY}")
        if not 0 < shard["size"] == shard["tokens"] * item_size:
            raise UserError(f"{path}: {shard['file']} cannot have {shard['size']} bytes and {shard['tokens']} tokens; {REMEDY}")
    return shards


def write_index(folder: Path, tokenizer: Tokenizer, **values: Any) -> None:
    """Writes index.json, which finishes a store. `values` are its "recipe", "dropped" and "splits"."""
    identity = {"kind": tokenizer.kind, "fingerprint": tokenizer.fingerprint}
    sizes = {"vocab_size": tokenizer.vocab_size, "separator": tokenizer.eos_id}
    index = {"format": FORMAT, "version": VERSION, "dtype": token_dtype(tokenizer.vocab_size).name}
    index |= {"tokenizer": identity | sizes, **values}
    write_atomic(folder / INDEX, json.dumps({**index, "digest": index_digest(index)}, indent=1, sort_keys=True) + "\n")


def index_digest(index: dict[str, Any]) -> str:
    """Returns the hexadecimal SHA-256 of an index as JSON with sorted keys and without white space."""
    return hashlib.sha256(json.dumps(index, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_files(folder: Path, shards: Iterable[dict[str, Any]], verify: bool) -> None:
    """Checks the sizes of the files of some shards and then, with `verify`, their checksums on every core.

    Raises:
      UserError: a file is missing, truncated or altered; the message names the first one.
    """
    files = {folder / file["file"]: file for shard in shards for file in (shard, shard["offsets"])}
    for path, file in files.items():
        if not path.is_file():
            raise UserError(f"{path}: missing from the token store; {REMEDY}")
        if path.stat().st_size != file["size"]:
            raise UserError(f"{path}: has {path.stat().st_size} bytes instead of {file['size']}; {REMEDY}")
    if verify:
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:  # hashlib releases the interpreter lock.
            for path, checksum in zip(files, threads.map(sha256, files), strict=True):
                if checksum != files[path]["sha256"]:
                    raise UserError(f"{path}: altered since it was written (its SHA-256 differs); {REMEDY}")


# -- reading ----------------------------------------------------------------------------------------------------------------


class TokenArray:
    """The tokens of one split as one long array over memory-mapped shards.

    Args:
      files: the shards of the split, in order.
      dtype: the dtype of the tokens in the shards.
      text_bytes: size of the original text in UTF-8.

    Attributes:
      num_tokens: number of tokens, with the separators.
      text_bytes: size of the original text in UTF-8.
    """

    def __init__(self, files: Sequence[Path], dtype: np.dtype, text_bytes: int):
        # These are plain arrays because slicing NumPy's memmap class takes several times as long.
        self._shards = [np.memmap(file, dtype, mode="r").view(np.ndarray) for file in files]
        self._edges = list(itertools.accumulate(map(len, self._shards), initial=0))
        self.num_tokens = self._edges[-1]
        self.text_bytes = text_bytes

    def read(self, starts: Int64[np.ndarray, " rows"], length: int) -> Int32[np.ndarray, "rows length"]:
        """Returns an array whose row i is tokens [starts[i], starts[i] + length). A row may span several shards.

        Raises:
          IndexError: a row extends beyond the split.
        """
        if starts.size and (starts.min() < 0 or starts.max() + length > self.num_tokens):
            span = f"[{starts.min()}, {starts.max() + length})"
            raise IndexError(f"rows of {length} tokens span {span}, which is outside the split's {self.num_tokens} tokens")
        tokens = np.empty((starts.size, length), np.int32)
        for row, start in zip(tokens, starts.tolist(), strict=True):
            shard = bisect.bisect_right(self._edges, start) - 1
            filled = 0
            while filled < length:  # Each iteration reads from one shard.
                place = start + filled - self._edges[shard]
                piece = self._shards[shard][place : place + length - filled]
                row[filled : filled + piece.size] = piece
                filled += piece.size
                shard += 1
        return tokens
