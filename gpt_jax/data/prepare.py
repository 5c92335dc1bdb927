"""Builds a token store: reads text, drops duplicates, sorts by hash, splits, trains the tokenizer, and tokenizes on every core.

The bytes of the store do not depend on the number of processes or on interruptions. Until the store is finished, its subfolder
`partial/` contains the recipe, the text, and the index entry of every finished shard.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import operator
import os
import shutil
import signal
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt

from gpt_jax.config import DataConfig, PretrainConfig
from gpt_jax.data.dedup import PROGRESS_SECONDS, TABLE, DistinctDocuments, DocumentSpans, write_documents
from gpt_jax.data.recipe import OTHER_STORE, check_inputs, check_recipe, check_text, recipe_fields, require_outside
from gpt_jax.data.sources import TextSource, open_source
from gpt_jax.data.store import (
    INDEX,
    OFFSET_DTYPE,
    PARTIAL,
    RECIPE,
    SHARD,
    SPLITS,
    TOKENIZER,
    Store,
    check_files,
    token_dtype,
    write_index,
)
from gpt_jax.data.tokenizers import MANIFEST, Tokenizer, create_tokenizer, load_tokenizer
from gpt_jax.errors import UserError
from gpt_jax.inputs.json_shapes import mismatch
from gpt_jax.inputs.text_files import TextFiles
from gpt_jax.runtime.console import Log, ProgressLine
from gpt_jax.runtime.lock import locked
from gpt_jax.runtime.rundir import explain_disk_errors, read_json, write_atomic

PART_BYTES = 1 << 18
"""Approximate bytes of text that a process tokenizes at a time. The number is small, so that even a small text occupies every
core and the slowest tokenizer (gpt1, about 1 MB/s per core) shows progress."""

PARTS_AHEAD = 32
"""Number of parts per process that can be encoded before the first of them is written."""

RECIPE_FILE = "recipe.json"

Part = tuple[str, DocumentSpans]
"""The name of a shard and some of its documents, which are encoded together."""
EncodedPart = tuple[str, UInt[np.ndarray, " tokens"], Int64[np.ndarray, " documents"]]
"""The name of a shard, the tokens of some of its documents with a separator after each, and each document's number of tokens."""


def prepare(config: PretrainConfig, store_folder: Path, log: Log, workdir: Path | None = None) -> Store:
    """Builds the token store that `config.data` and `config.model.vocab_size` describe, or continues an unfinished one.

    A finished store is verified and not changed, even if its text no longer exists. The free disk space must be about the size of
    the text plus the size of the tokens.

    Args:
      config: the run's config.
      store_folder: the folder of the store. It is created if necessary.
      log: receives the lines that report progress.
      workdir: the run's folder, if there is one.

    Raises:
      UserError: the source cannot be read or has too little text; the store in the folder was made from other text or with other
        settings; the store or the run's folder is inside the source; a shard was altered; another process is preparing the store;
        the disk is full (the next call continues).
    """
    try:
        with explain_disk_errors(store_folder):
            if not (store_folder / INDEX).exists():
                source = open_source(config.data, log)
                if isinstance(source, TextFiles):
                    require_outside(source, store_folder, workdir)
                    source.formats  # noqa: B018 - Files that are not text are reported before any long work.
                with _locked(store_folder, log):
                    if not (store_folder / INDEX).exists():  # Another process may have finished it in the meantime.
                        return _build(config, store_folder, source, log)
            return _reopen(config, store_folder, log, workdir)
    except OSError as error:
        raise UserError(f"{error.filename or config.data.source}: {error.strerror or error}") from error
    except BrokenProcessPool as error:
        raise UserError(f"{store_folder}: a worker was killed (out of memory?); run again with fewer --data.processes") from error


@contextlib.contextmanager
def _locked(folder: Path, log: Log) -> Iterator[None]:
    """Locks the store while this process prepares it.

    If the text or the settings are invalid, nothing is left behind unless some shards are finished.
    """
    with locked(folder, log):
        (folder / PARTIAL).mkdir(exist_ok=True)
        try:
            yield
        except UserError:
            if not _has_shards(folder / PARTIAL):
                shutil.rmtree(folder / PARTIAL)
                shutil.rmtree(folder / TOKENIZER, ignore_errors=True)
            raise


def _reopen(config: PretrainConfig, folder: Path, log: Log, workdir: Path | None) -> Store:
    """Verifies a finished store and checks that it is the one that `config` describes."""
    store = Store.open(folder)
    store.tokenizer()
    check_recipe(folder, store.index["recipe"], config)
    check_inputs(store, config, log, workdir, checksums=True)
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)  # It is left over if the last call was killed just before it finished.
    log(f"{folder}: already finished, checksums verified, nothing to do: {_summary(store)}")
    return store


def _build(config: PretrainConfig, folder: Path, source: TextSource, log: Log) -> Store:
    """Builds the store, or continues from the contents of `partial/`."""
    data, partial = config.data, folder / PARTIAL
    log(f"{folder}: preparing the text of {data.source}")
    recipe = {"fields": recipe_fields(config), "source": source.identity()}
    recorded = read_json(partial / RECIPE_FILE) if (partial / RECIPE_FILE).exists() else None
    if recorded is not None and _has_shards(partial):
        if problem := mismatch(recorded, RECIPE):
            raise UserError(f"{partial / RECIPE_FILE}: altered since it was written: {problem}; {OTHER_STORE}")
        check_recipe(folder, recorded, config)
        check_text(folder, recorded, recipe["source"])
    elif recorded != recipe:
        shutil.rmtree(folder / TOKENIZER, ignore_errors=True)
        (partial / TABLE).unlink(missing_ok=True)
        write_atomic(partial / RECIPE_FILE, json.dumps(recipe, indent=1))

    @functools.cache
    def documents() -> DistinctDocuments:
        if not (partial / TABLE).exists():
            write_documents(source.documents(), partial, log)
        return DistinctDocuments(partial, data.max_bytes, data.validation_share)

    def sample() -> Iterator[str]:
        log(f"{folder}: training a tokenizer on up to {data.tokenizer.sample_bytes / 1e6:,.0f} MB of the text")
        return documents().sample("train", data.tokenizer.sample_bytes)

    if not (folder / TOKENIZER / MANIFEST).exists():
        # Only a tokenizer that has to be trained needs the text. Errors of other tokenizers are reported before the text is read.
        create_tokenizer(data.tokenizer, config.model.vocab_size, sample).save(folder / TOKENIZER)
    tokenizer = load_tokenizer(folder / TOKENIZER)
    splits = _write_splits(documents(), folder, tokenizer, data, log)
    write_index(folder, tokenizer, recipe=recipe, dropped=documents().dropped, splits=splits)
    shutil.rmtree(partial, ignore_errors=True)
    store = Store.open(folder, verify=False)
    log(f"{folder}: finished: {_summary(store)}")
    return store


def _has_shards(partial: Path) -> bool:
    """Returns whether a shard of an unfinished store is finished. If none is, little is lost by starting over."""
    return any(partial.glob("*-?????.json"))


def _summary(store: Store) -> str:
    """Returns a description of the size of a store."""
    splits = store.index["splits"]
    size, documents, tokens = (sum(split[key] for split in splits.values()) for key in ("text_bytes", "documents", "tokens"))
    dropped = " and ".join(f"{count:,} {kind}" for kind, count in store.index["dropped"].items())
    held_out = f"{splits['validation']['documents']:,} for validation; {dropped} dropped"
    return f"{size / 1e6:,.1f} MB of text, {documents:,} documents ({held_out}), {tokens:,} tokens"


def _num_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -- shards -----------------------------------------------------------------------------------------------------------------


def _write_splits(documents: DistinctDocuments, folder: Path, tokenizer: Tokenizer, data: DataConfig, log: Log) -> dict[str, Any]:
    """Writes the shards that are not finished yet, and returns the index entries of both splits."""
    shards = {
        f"{split}-{number:05d}": numbers
        for split in SPLITS
        for number, numbers in enumerate(_divide(documents.splits[split], documents.lengths, data.shard_bytes))
    }
    entries = {}
    for shard in shards:
        with contextlib.suppress(UserError):  # The shard has no entry yet, or its files are damaged.
            entry = read_json(folder / PARTIAL / f"{shard}.json")
            if not mismatch(entry, SHARD):
                check_files(folder, [entry], verify=True)
                entries[shard] = entry
    if entries:
        log(f"{folder}: continuing; {len(entries)} of {len(shards)} shards are finished")
    parts: list[Part] = [
        (shard, documents.select(part))
        for shard, numbers in shards.items()
        if shard not in entries
        for part in _divide(numbers, documents.lengths, PART_BYTES)
    ]
    results = _encode_parts(folder / TOKENIZER, tokenizer.fingerprint, parts, data.processes or _num_cores(), log)
    with contextlib.closing(results):
        for shard, encoded in itertools.groupby(results, key=operator.itemgetter(0)):
            entries[shard] = _write_shard(folder, shard, encoded)
    splits: dict[str, Any] = {}
    for split in SPLITS:
        listed = [entries[shard] for shard in shards if shard.startswith(split)]
        totals = {key: sum(entry[key] for entry in listed) for key in ("tokens", "documents")}
        splits[split] = {**totals, "text_bytes": int(documents.lengths[documents.splits[split]].sum()), "shards": listed}
    return splits


def _divide(numbers: np.ndarray, lengths: np.ndarray, target_bytes: int) -> list[np.ndarray]:
    """Divides documents, given by their numbers, into parts of about `target_bytes` without cutting any document."""
    if not numbers.size:
        return []
    ends = np.cumsum(lengths[numbers])
    num_parts = max(1, round(int(ends[-1]) / target_bytes))
    part = (ends - lengths[numbers]) * num_parts // ends[-1]
    return np.split(numbers, np.flatnonzero(np.diff(part)) + 1)


def _write_shard(folder: Path, shard: str, parts: Iterable[EncodedPart]) -> dict[str, Any]:
    """Writes a shard, its offsets and then its index entry; returns the entry. The tokens of the shard are kept in memory."""
    _, tokens, counts = zip(*parts, strict=True)
    sizes = np.concatenate(counts)
    file = _write_array(folder / f"{shard}.bin", np.concatenate(tokens))
    offsets = _write_array(folder / f"{shard}.offsets", (np.cumsum(sizes) - sizes).astype(OFFSET_DTYPE))
    entry = {**file, "tokens": int(sizes.sum()), "documents": sizes.size, "offsets": offsets}
    write_atomic(folder / PARTIAL / f"{shard}.json", json.dumps(entry))
    return entry


def _write_array(path: Path, values: np.ndarray) -> dict[str, Any]:
    """Writes an array and returns the entry of its file in the index."""
    data = values.tobytes()
    write_atomic(path, data)
    return {"file": path.name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


# -- tokens -----------------------------------------------------------------------------------------------------------------


def _encode_parts(folder: Path, fingerprint: str, parts: list[Part], processes: int, log: Log) -> Generator[EncodedPart]:
    """Yields the result of `encode_part` for each part in order, computed by several processes. `log` receives the progress."""
    encode = functools.partial(encode_part, folder, fingerprint)
    processes = max(1, min(processes, len(parts)))
    total = sum(int(documents.lengths.sum()) for _, documents in parts) / 1e6
    num_bytes = num_tokens = 0
    start, progress = time.monotonic(), ProgressLine(PROGRESS_SECONDS, log)

    def line() -> str:
        done, seconds = num_bytes / 1e6, time.monotonic() - start
        return f"tokenized {done:,.1f} of {total:,.1f} MB: {done / seconds:.2f} MB/s, {num_tokens / seconds:,.0f} tokens/s"

    with contextlib.ExitStack() as stack:
        stack.callback(progress.clear)
        run: Any = map
        if processes > 1:
            # Processes are spawned, because a forked one may wait forever for a lock of the caller's threads (JAX, TensorFlow).
            spawn = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(processes, spawn, initializer=_start_worker)
            stack.callback(pool.shutdown, cancel_futures=True)
            run = pool.map
        for first in range(0, len(parts), PARTS_AHEAD * processes):
            ahead = parts[first : first + PARTS_AHEAD * processes]
            for (_, documents), encoded in zip(ahead, run(encode, ahead), strict=True):
                num_bytes += int(documents.lengths.sum())
                num_tokens += encoded[1].size
                progress.show(line)
                yield encoded
    log(line())


def _start_worker() -> None:
    """Makes a worker process end with its parent, even if the parent is killed, and leaves Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_after, args=(multiprocessing.parent_process(),), daemon=True).start()


def _exit_after(parent: Any) -> None:
    parent.join()
    os._exit(1)


@functools.lru_cache(maxsize=1)
def _load_once(folder: Path, fingerprint: str) -> Tokenizer:
    """Loads a tokenizer once in each process, and again if its fingerprint has changed."""
    return load_tokenizer(folder)


def encode_part(folder: Path, fingerprint: str, part: Part) -> EncodedPart:
    """Encodes the documents of a part with the tokenizer in a folder, which has the given fingerprint."""
    tokenizer = _load_once(folder, fingerprint)
    shard, documents = part
    tokens: list[int] = []
    counts: list[int] = []
    for text in documents.read():
        ids = tokenizer.encode(text)
        tokens += [*ids, tokenizer.eos_id]
        counts.append(len(ids) + 1)
    return shard, np.array(tokens, token_dtype(tokenizer.vocab_size)), np.array(counts, np.int64)
