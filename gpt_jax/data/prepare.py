"""Text to token store: read, drop duplicates, order by hash, split, train the tokenizer, tokenise on every core.

The store is the same byte for byte whatever the number of processes and however often the work was interrupted. Until it is
finished, its subfolder `partial/` holds the text in the order of its hash and an entry for every finished shard.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt_jax.config import PretrainConfig
from gpt_jax.config.load import flatten_config
from gpt_jax.data import sources, tokenizers
from gpt_jax.data.dedup import Texts, collect, sync
from gpt_jax.data.progress import Progress
from gpt_jax.data.store import (
    FORMAT,
    INDEX,
    OFFSET_DTYPE,
    PARTIAL,
    SPLITS,
    TOKENIZER,
    VERSION,
    Store,
    check_files,
    digest_of,
    token_dtype,
    write_json,
)
from gpt_jax.errors import UserError

PART_BYTES = 1 << 18
"""Bytes of text, roughly, that a process tokenises at a time: small enough that little text still occupies every core and that
progress shows with the slowest tokenizer (gpt1, some 0.1 MB/s a core)."""

LOCK = "lock"
RECIPE = "recipe.json"


def prepare(config: PretrainConfig, store_folder: Path, log: Callable[[str], None]) -> Store:
    """Makes the token store that `config.data` and `config.model.vocab_size` describe, or goes on with an unfinished one.

    A finished store is verified and left as it is. Needs free space for about the text and the tokens at once.

    Args:
      config: the run's config.
      store_folder: where the store lies or shall lie.
      log: takes lines for a person to read.

    Raises:
      UserError: the source cannot be read or holds too little; the store in the folder was made or begun from other text or
        with other settings; a shard was altered; another process prepares it; no space left (call again to continue).
    """
    try:
        if not (store_folder / INDEX).exists():
            source = sources.open_source(config.data)
            if store_folder.resolve().is_relative_to(Path(config.data.source).resolve()):
                raise UserError(f"--data.store: '{store_folder}' lies inside --data.source; give a folder outside")
            with _alone(store_folder):
                if not (store_folder / INDEX).exists():  # Another process may have finished it just now.
                    return _build(config, store_folder, source, log)
        return _reopen(config, store_folder, log)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{store_folder}: no space left on its disk; free some (about the size of the text and of the tokens is needed) "
                "and run the same command again: finished shards are kept"
            ) from error
        raise UserError(f"{error.filename or config.data.source}: {error.strerror or error}") from error
    except BrokenProcessPool as error:
        raise UserError(
            f"{store_folder}: a tokenising process was killed, perhaps for want of memory; run the same command again to go on, "
            "with fewer --data.processes"
        ) from error


def check_recipe(store: Store, config: PretrainConfig) -> None:
    """Checks, without reading any text, that a store is one that `config` would make.

    With an empty `config.data.source` any text and settings will do, as long as the tokenizer's kind and size fit the model.

    Raises:
      UserError: naming each field that differs, with both values.
    """
    fields = _fields(config)
    if not config.data.source:
        fields = {name: fields[name] for name in ("data.tokenizer.kind", "model.vocab-size")}
    _require_same(store.folder, store.index["recipe"]["fields"], fields)


# -- what a store is made of ------------------------------------------------------------------------------------------------


def _fields(config: PretrainConfig) -> dict[str, Any]:
    """The config's fields that decide what the store holds, by their dotted names."""
    fields = {name: value for name, (value, effect) in flatten_config(config.data, "data.").items() if effect == "result"}
    return {**fields, "model.vocab-size": config.model.vocab_size}


def _require_same(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises a UserError that names what differs between two recipes' fields."""
    differing = [f"{name} {then[name]!r}, not {now[name]!r}" for name in now if name in then and then[name] != now[name]]
    if differing:
        raise UserError(f"{folder}: made with {'; '.join(differing)}: give another --data.store or delete that folder")


def _require_same_text(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises a UserError unless two source identities are equal."""
    if then != now:
        raise UserError(
            f"{folder}: the text of --data.source has changed since this store was begun (it was {_described(then)}, it is "
            f"{_described(now)}): give another --data.store or delete that folder"
        )


def _described(identity: dict[str, Any]) -> str:
    return ", ".join(f"{name} {str(value)[:40]}" for name, value in identity.items())


def _reopen(config: PretrainConfig, folder: Path, log: Callable[[str], None]) -> Store:
    """Verifies a finished store and that it is the one asked for."""
    store = Store.open(folder)
    store.tokenizer()
    check_recipe(store, config)
    if config.data.source:
        _require_same_text(folder, store.index["recipe"]["source"], sources.open_source(config.data).identity())
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)  # Left over if the last run was killed in its last instant.
    tokens = sum(split["tokens"] for split in store.index["splits"].values())
    log(f"{folder}: finished before, {tokens:,} tokens, checksums are right; nothing to do")
    return store


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps a second process out while this one prepares the store; the lock ends with the process, however that ends."""
    (folder / PARTIAL).mkdir(parents=True, exist_ok=True)
    with (folder / PARTIAL / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process prepares this store; wait for it, or give another --data.store") from None
        yield


def _build(config: PretrainConfig, folder: Path, source: sources.Source, log: Callable[[str], None]) -> Store:
    """Makes the store, or goes on from what `partial/` holds."""
    partial = folder / PARTIAL
    log(f"{folder}: preparing the text of {config.data.source}")
    recipe = {"fields": _fields(config), "source": source.identity()}
    then = json.loads((partial / RECIPE).read_bytes()) if (partial / RECIPE).exists() else None
    if then is not None and any(partial.glob("*-?????.json")):
        _require_same(folder, then["fields"], recipe["fields"])
        _require_same_text(folder, then["source"], recipe["source"])
    elif then != recipe:  # No shard is finished, so little is lost by starting over.
        for path in (folder / TOKENIZER, *partial.iterdir()):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink(missing_ok=True)
        write_json(partial / RECIPE, recipe)

    @functools.cache
    def texts() -> Texts:
        if not (partial / "texts.json").exists():
            collect(source.documents(), partial, log)
        return Texts(partial, config.data.max_bytes, config.data.validation_share)

    def sample() -> Iterator[str]:
        log(f"{folder}: training a tokenizer on up to {config.data.tokenizer.sample_bytes / 1e6:,.0f} MB of the text")
        return texts().sample("train", config.data.tokenizer.sample_bytes)

    if not (folder / TOKENIZER).exists():
        # Before the text is read, unless it is trained on it: what is wrong with a tokenizer shows at once.
        tokenizers.create(config.data.tokenizer, config.model.vocab_size, sample).save(partial / TOKENIZER)
        (partial / TOKENIZER).replace(folder / TOKENIZER)
    tokenizer = tokenizers.load(folder / TOKENIZER)
    splits = tokenise(texts(), folder, tokenizer, config.data.shard_bytes, config.data.processes or _cores(), log)
    index = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "tokenizer": {
            "kind": tokenizer.kind,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "separator": tokenizer.eos_id,
        },
        "recipe": recipe,
        "dropped": texts().dropped,
        "splits": splits,
    }
    write_json(folder / INDEX, {**index, "digest": digest_of(index)})
    shutil.rmtree(partial, ignore_errors=True)
    tokens, documents, size = (sum(split[key] for split in splits.values()) for key in ("tokens", "documents", "text_bytes"))
    dropped = " and ".join(f"{count:,} {kind}" for kind, count in texts().dropped.items())
    log(
        f"{folder}: finished: {size / 1e6:,.1f} MB of text, {documents:,} documents ({splits['validation']['documents']:,} for "
        f"validation; {dropped} dropped), {tokens:,} tokens"
    )
    return Store.open(folder, verify=False)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -- tokens -----------------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A task for one process: documents of a file, at `begins` with `lengths` bytes, and the tokenizer for them."""

    tokenizer: Path
    fingerprint: str
    texts: Path
    begins: np.ndarray
    lengths: np.ndarray


def tokenise(
    texts: Texts, folder: Path, tokenizer: tokenizers.Tokenizer, shard_bytes: int, processes: int, log: Callable[[str], None]
) -> dict[str, Any]:
    """Writes the shards that are not finished yet; returns the index entries of both splits."""
    shards = {
        f"{name}-{number:05d}": run
        for name in SPLITS
        for number, run in enumerate(_runs(texts.documents[name], texts.lengths, shard_bytes))
    }
    entries = {name: entry for name in shards if (entry := _finished(folder, name))}
    if entries:
        log(f"{folder}: going on; {len(entries)} of {len(shards)} shards are finished")
    parts = {
        name: [
            Part(folder / TOKENIZER, tokenizer.fingerprint, texts.path, texts.begins[part], texts.lengths[part])
            for part in _runs(run, texts.lengths, PART_BYTES)
        ]
        for name, run in shards.items()
        if name not in entries
    }
    begun = time.monotonic()
    queue = [part for each in parts.values() for part in each]
    sizes = [int(part.lengths.sum()) for part in queue]
    with contextlib.closing(_in_parallel(queue, processes)) as results, Progress("tokenising", sum(sizes), log) as progress:
        counted = progress.over(results, sizes)
        for name, each in parts.items():
            entries[name] = _write_shard(folder, name, itertools.islice(counted, len(each)))
    tokens, megabytes, seconds = sum(entries[name]["tokens"] for name in parts), sum(sizes) / 1e6, time.monotonic() - begun
    log(f"tokenised {megabytes:,.1f} MB in {seconds:.1f} s: {megabytes / seconds:.2f} MB/s, {tokens / seconds:,.0f} tokens/s")
    splits: dict[str, Any] = {}
    for name in SPLITS:
        listed = [entries[shard] for shard in shards if shard.startswith(name)]
        tokens_documents = {key: sum(entry[key] for entry in listed) for key in ("tokens", "documents")}
        text_bytes = int(texts.lengths[texts.documents[name]].sum())
        splits[name] = {**tokens_documents, "text_bytes": text_bytes, "shards": listed}
    return splits


def _runs(documents: np.ndarray, lengths: np.ndarray, target: int) -> list[np.ndarray]:
    """Cuts a list of documents into runs of about `target` bytes, as even as whole documents allow; none for no documents."""
    if not documents.size:
        return []
    ends = np.cumsum(lengths[documents])
    count = max(1, round(int(ends[-1]) / target))
    run = (ends - lengths[documents]) * count // ends[-1]
    return np.split(documents, np.flatnonzero(np.diff(run)) + 1)


def _in_parallel(parts: list[Part], processes: int) -> Generator[tuple[np.ndarray, np.ndarray]]:
    """The results of `encode` in the order of the parts."""
    if min(processes, len(parts)) <= 1:
        yield from map(encode, parts)
        return
    # Not forked: the caller may have threads (JAX, TensorFlow), which a forked child would find frozen.
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(min(processes, len(parts)), spawn, initializer=_start_worker)
    try:
        pending: collections.deque[concurrent.futures.Future] = collections.deque()
        for part in parts:
            pending.append(pool.submit(encode, part))
            if len(pending) > 4 * processes:  # Enough ahead to keep all busy, and no more results in memory than that.
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Lets a worker end with its parent, even a killed one, and leaves Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: Path, fingerprint: str) -> tokenizers.Tokenizer:
    """The tokenizer, loaded once a process; the fingerprint tells a new one in the same folder."""
    return tokenizers.load(folder)


def encode(part: Part) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a part's documents, each followed by the separator, and the place of each document's first token."""
    tokenizer = _tokenizer(part.tokenizer, part.fingerprint)
    tokens: list[int] = []
    starts = np.empty(len(part.begins), OFFSET_DTYPE)
    with part.texts.open("rb") as file:
        for i, (begin, length) in enumerate(zip(part.begins.tolist(), part.lengths.tolist(), strict=True)):
            starts[i] = len(tokens)
            tokens += tokenizer.encode(os.pread(file.fileno(), length, begin).decode())
            tokens.append(tokenizer.eos_id)
    return np.array(tokens, token_dtype(tokenizer.vocab_size)), starts


def _write_shard(folder: Path, name: str, parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Writes one shard, its offsets and, last, its entry in `partial/`; returns the entry."""
    count = 0
    offsets: list[np.ndarray] = []
    with _Output(folder, f"{name}.bin") as output:
        for tokens, starts in parts:
            output.write(tokens.tobytes())
            offsets.append(starts + OFFSET_DTYPE.type(count))
            count += tokens.size
    with _Output(folder, f"{name}.offsets") as offset_output:
        offset_output.write(np.concatenate(offsets).astype(OFFSET_DTYPE).tobytes())
    documents = sum(map(len, offsets))
    entry = {**output.entry, "tokens": count, "documents": documents, "offsets": offset_output.entry}
    write_json(folder / PARTIAL / f"{name}.json", entry)
    return entry


def _finished(folder: Path, name: str) -> dict[str, Any] | None:
    """The entry of a shard that an earlier call finished, if its files are sound."""
    try:
        entry = json.loads((folder / PARTIAL / f"{name}.json").read_bytes())
        check_files(folder, [entry], verify=True)
    except (FileNotFoundError, UserError):
        return None
    return entry


class _Output:
    """A file that appears under its name only when it is whole and on the disk; `entry` is its part of the index."""

    def __init__(self, folder: Path, name: str):
        self._path = folder / name
        self._temporary = folder / PARTIAL / f"{name}.tmp"
        self._checksum = hashlib.sha256()
        self._size = 0

    def __enter__(self) -> _Output:
        self._file = self._temporary.open("wb")
        return self

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._checksum.update(data)
        self._size += len(data)

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            with self._file:
                if kind is None:
                    sync(self._file)
            if kind is None:
                self._temporary.replace(self._path)
        finally:
            self._temporary.unlink(missing_ok=True)
        self.entry = {"file": self._path.name, "size": self._size, "sha256": self._checksum.hexdigest()}
