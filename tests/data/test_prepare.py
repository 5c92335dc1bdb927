"""`prepare` makes the same bytes in every way, continues after being killed at any moment, and refuses what does not fit."""

import dataclasses
import errno
import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest

from gpt_jax.config import DataConfig, ModelConfig, PretrainConfig, TokenizerConfig
from gpt_jax.config.load import config_to_dict
from gpt_jax.data.dedup import is_held_out
from gpt_jax.data.installed_docs import InstalledDocs
from gpt_jax.data.prepare import prepare
from gpt_jax.data.store import Store
from gpt_jax.data.tokenizers import create_tokenizer
from gpt_jax.errors import UserError
from gpt_jax.runtime.rundir import write_atomic

WORDS = ["the", "of", "and", "to", "in", "is", "you", "that", "it", "was", "for", "are", "with", "they", "have", "been"]


def text(number: int, words: int = 60) -> str:
    return f"{number} " + " ".join(np.random.default_rng(number).choice(WORDS, words))


def write_rows(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def make_config(source: Path | str, kind: str = "bytes", vocab_size: int = 257, **fields) -> PretrainConfig:
    fields = {"shard_bytes": 20_000, "validation_share": 0.1, "processes": 1, "tokenizer": TokenizerConfig(kind=kind), **fields}
    return PretrainConfig(model=ModelConfig(vocab_size=vocab_size), data=DataConfig(source=str(source), **fields))


def ignore(line: str) -> None:
    pass


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the files in a folder, without the lock of a process that was killed."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("lock.")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def stored_texts(store: Store, split: str) -> list[str]:
    array = store.split(split)
    tokens = array.read(np.zeros(1, np.int64), array.num_tokens)[0] if array.num_tokens else np.zeros(0, np.int32)
    ends = np.flatnonzero(tokens == 256)
    documents = np.split(tokens, ends[:-1] + 1) if ends.size else []
    return [bytes(document[document != 256].astype(np.uint8)).decode() for document in documents]


def sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


TEXTS = [text(i) for i in range(1500)]


@pytest.fixture(scope="module")
def shared_source(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("source") / "rows.jsonl", TEXTS)


@pytest.fixture(scope="module")
def whole(shared_source, tmp_path_factory) -> Path:
    """The finished store of `shared_source` with the default settings of `make_config`."""
    folder = tmp_path_factory.mktemp("whole") / "store"
    prepare(make_config(shared_source), folder, ignore)
    return folder


@pytest.fixture
def source(shared_source, tmp_path) -> Path:
    """A copy of `shared_source` that a test may change."""
    return shutil.copy(shared_source, tmp_path / "rows.jsonl")


# -- contents ---------------------------------------------------------------------------------------------------------------


def test_documents_order_and_splits_are_frozen(tmp_path):
    """The digest was recorded when format version 1 was made. Equal text must give equal stores for good."""
    rows = [f"Document {i}: " + " ".join(str(i * k) for k in range(i % 23 + 1)) for i in range(300)]
    book = "\n\n".join(rows) + "日本" * 20_000 + "\n" + "café au lait " * 9_000 + "\n" + "one\n" * 20_000
    (tmp_path / "text").mkdir()
    write_rows(tmp_path / "text" / "rows.jsonl", [*rows, *rows[:7], "", "\u2003"])
    (tmp_path / "text" / "book.txt").write_text(book)
    config = make_config(tmp_path / "text", shard_bytes=60_000, validation_share=0.2)
    index = prepare(config, tmp_path / "store", ignore).index
    assert index["dropped"] == {"duplicates": 10, "empty": 2}
    assert index["recipe"]["source"] == {
        "bytes": 368_335,
        "files": 2,
        "sha256": "6fa3907de91f037b1babb4267e4b680e269a00a39637b2fe3f3292ce12c1c7fa",
    }
    digest = hashlib.sha256(json.dumps(index["splits"], sort_keys=True).encode()).hexdigest()
    assert digest == "83fd637fd9ffe97329988ab217c0079f4c3242637b6e4f5c74949c6ae3742979"


@pytest.mark.parametrize(("kind", "vocab_size"), [("bytes", 257), ("sentencepiece", 320)])
def test_any_number_of_processes_makes_the_same_bytes(source, tmp_path, monkeypatch, kind, vocab_size):
    monkeypatch.setattr("gpt_jax.data.prepare.PART_BYTES", 20_000)
    config = make_config(source, kind, vocab_size, shard_bytes=80_000)
    one = prepare(config, tmp_path / "one", ignore)
    two = prepare(dataclasses.replace(config, data=dataclasses.replace(config.data, processes=2)), tmp_path / "two", ignore)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert one.digest == two.digest
    assert len(one.index["splits"]["train"]["shards"]) >= 3
    assert not (tmp_path / "one" / "partial").exists()


def test_order_and_compression_of_the_source_do_not_affect_the_tokens(source, whole, tmp_path):
    lines = source.read_bytes().splitlines(keepends=True)
    (tmp_path / "again.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[::-1] + lines[:100])))
    first = Store.open(whole)
    again = prepare(make_config(tmp_path / "again.jsonl.gz"), tmp_path / "again", ignore)
    assert first.index["splits"] == again.index["splits"]
    assert (first.index["dropped"], again.index["dropped"]) == ({"duplicates": 0, "empty": 0}, {"duplicates": 100, "empty": 0})


def test_duplicates_and_empty_texts_are_dropped_and_counted(tmp_path):
    texts = [text(i) for i in range(50)]
    write_rows(tmp_path / "rows.jsonl", [*texts, *texts[:20], texts[3], "", " \n"])
    lines: list[str] = []
    store = prepare(make_config(tmp_path / "rows.jsonl"), tmp_path / "store", lines.append)
    assert store.index["dropped"] == {"duplicates": 21, "empty": 2}
    assert sorted(stored_texts(store, "train") + stored_texts(store, "validation")) == sorted(texts)
    assert "21 duplicates and 2 empty dropped" in lines[-1]


def test_a_lone_surrogate_of_a_source_becomes_a_question_mark(tmp_path, monkeypatch):
    """Files cannot contain one, but docstrings of installed packages can."""
    monkeypatch.setattr(InstalledDocs, "passages", [("python", "before \ud800 after")])
    store = prepare(make_config("builtin:docs", validation_share=0.0), tmp_path / "store", ignore)
    assert stored_texts(store, "train") == ["before ? after"]


def test_validation_is_chosen_by_the_hash_of_the_text(source, tmp_path):
    shares = {}
    for share in (0.0, 0.1, 0.3):
        store = prepare(make_config(source, validation_share=share), tmp_path / str(share), ignore)
        train, validation = (stored_texts(store, split) for split in ("train", "validation"))
        assert sorted(train + validation) == sorted(TEXTS)
        fraction = {text: int.from_bytes(sha256(text)[-8:], "little") / 2**64 for text in TEXTS}
        assert set(validation) == {text for text in TEXTS if fraction[text] < share}
        assert set(validation) == {text for text in TEXTS if is_held_out(text, share)}
        assert abs(len(validation) / len(TEXTS) - share) < 0.03
        shares[share] = set(validation)
    assert shares[0.1] < shares[0.3]


def test_neither_split_is_empty_if_there_are_two_documents(tmp_path):
    write_rows(tmp_path / "rows.jsonl", ["one", "two"])
    for share in (1e-9, 0.999999):
        store = prepare(make_config(tmp_path / "rows.jsonl", validation_share=share), tmp_path / str(share), ignore)
        assert [store.index["splits"][split]["documents"] for split in ("train", "validation")] == [1, 1]


def test_max_bytes_takes_documents_in_the_order_of_their_hash(source, tmp_path):
    store = prepare(make_config(source, max_bytes=50_000), tmp_path / "store", ignore)
    kept = stored_texts(store, "train") + stored_texts(store, "validation")
    ordered = sorted(TEXTS, key=sha256)
    assert set(kept) == set(ordered[: len(kept)])
    size = sum(map(len, kept))
    assert size <= 50_000 < size + len(ordered[len(kept)])
    assert store.split("train").text_bytes + store.split("validation").text_bytes == size
    assert 0.04 < store.index["splits"]["validation"]["documents"] / len(kept) < 0.2


def test_shards_hold_about_the_configured_bytes(whole):
    shards = Store.open(whole).index["splits"]["train"]["shards"]
    sizes = [shard["tokens"] - shard["documents"] for shard in shards]
    assert len(sizes) > 10
    assert all(18_000 < size < 22_000 for size in sizes)


def test_the_tokenizer_is_trained_on_train_documents_only(tmp_path):
    texts = TEXTS[:400]
    held_out = [text for text in texts if int.from_bytes(sha256(text)[-8:], "little") < 2**64 // 10]
    write_rows(tmp_path / "plain.jsonl", texts)
    config = make_config(tmp_path / "plain.jsonl", "sentencepiece", 300)
    store = prepare(config, tmp_path / "store", ignore)
    assert store.index["splits"]["validation"]["documents"] == len(held_out)
    order = sorted(set(texts) - set(held_out), key=sha256)
    assert store.tokenizer().fingerprint == create_tokenizer(config.data.tokenizer, 300, lambda: order).fingerprint


# -- a second call ----------------------------------------------------------------------------------------------------------


def test_a_finished_store_is_verified_and_not_changed(shared_source, whole, tmp_path):
    config = make_config(shared_source)
    shutil.copytree(whole, tmp_path / "store")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}
    lines: list[str] = []
    assert prepare(config, tmp_path / "store", lines.append).digest == Store.open(whole).digest
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")} == before
    assert re.search(r"already finished, .*nothing to do: 0.4 MB of text, 1,500 documents \(", lines[-1])
    path = tmp_path / "store" / "train-00004.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\x20\x00")
    with pytest.raises(UserError, match=r"train-00004.bin: altered"):
        prepare(config, tmp_path / "store", ignore)


KILL_SCRIPT = """
import json, os, shutil, signal, sys
from pathlib import Path
from gpt_jax.config.load import config_from_dict
from gpt_jax.data.prepare import prepare

module, name = {"fsync": os, "replace": os, "rmtree": shutil}[sys.argv[3]], sys.argv[3]
function, left = getattr(module, name), int(sys.argv[4])

def kill(*arguments, **options):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments, **options)

setattr(module, name, kill)
prepare(config_from_dict(json.loads(sys.argv[1])), Path(sys.argv[2]), print)
"""


def group_has_ended(group: int, seconds: float = 60.0) -> bool:
    """Waits until no process of a group is left, and returns whether that happened in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize(
    ("call", "number", "processes", "shards"),
    [
        ("fsync", 1, 1, 0),  # the recipe
        ("fsync", 2, 1, 0),  # the text
        ("replace", 3, 1, 0),  # the tokenizer's manifest
        ("fsync", 9, 1, 1),  # the offsets of the second shard
        ("replace", 36, 2, 10),  # the entry of the eleventh shard
        ("rmtree", 2, 1, 0),  # the last step of all, after the index
    ],
)
def test_killed_at_any_moment_it_continues_to_the_same_bytes(shared_source, whole, tmp_path, call, number, processes, shards):
    config = make_config(shared_source, processes=processes)
    arguments = [json.dumps(config_to_dict(config)), str(tmp_path / "store"), call, str(number)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", KILL_SCRIPT, *arguments], env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    assert process.wait(120) == -signal.SIGKILL
    assert group_has_ended(process.pid), "a worker outlived its parent"
    store = tmp_path / "store"
    if call == "rmtree":
        assert (store / "partial").exists()
        Store.open(store)
    else:
        with pytest.raises(UserError, match="only an unfinished one"):
            Store.open(store)
        assert len(list((store / "partial").glob("train-*.json"))) == shards
    before = {path: path.stat().st_mtime_ns for path in (store / f"train-{i:05d}.bin" for i in range(shards))}
    lines: list[str] = []
    prepare(make_config(shared_source), store, lines.append)
    assert contents(store) == contents(whole)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not shards or any(f"continuing; {shards} of " in line for line in lines)


@pytest.fixture
def unfinished(source, tmp_path, monkeypatch) -> Path:
    """A store whose preparation was interrupted after its third shard."""
    left = 3

    def write(path: Path, content: bytes | str) -> None:
        nonlocal left
        write_atomic(path, content)
        left -= path.match("train-*.json")
        if left == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr("gpt_jax.data.prepare.write_atomic", write)
    with pytest.raises(KeyboardInterrupt):
        prepare(make_config(source), tmp_path / "store", ignore)
    monkeypatch.undo()
    assert len(list((tmp_path / "store" / "partial").glob("train-*.json"))) == 3
    return tmp_path / "store"


def test_an_altered_shard_of_an_unfinished_store_is_made_again(source, tmp_path, unfinished):
    path = unfinished / "train-00001.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\x20\x00")
    prepare(make_config(source), unfinished, ignore)
    prepare(make_config(source), tmp_path / "whole", ignore)
    assert contents(unfinished) == contents(tmp_path / "whole")


def test_an_unfinished_store_of_the_previous_version_is_continued(source, tmp_path, unfinished):
    """The previous version sorted the text on disk and kept it under other names."""
    for name in ("text", "documents.npz"):
        (unfinished / "partial" / name).unlink()
    for name in ("texts", "texts.json", "lengths.npy", "tails.npy"):
        (unfinished / "partial" / name).write_text("not read")
    (unfinished / "partial" / "tokenizer").mkdir()
    shards = {path: path.stat().st_mtime_ns for path in unfinished.glob("train-*")}
    assert len(shards) == 6
    lines: list[str] = []
    prepare(make_config(source), unfinished, lines.append)
    assert any("continuing; 3 of " in line for line in lines)
    assert {path: path.stat().st_mtime_ns for path in shards} == shards
    prepare(make_config(source), tmp_path / "whole", ignore)
    assert contents(unfinished) == contents(tmp_path / "whole")


@pytest.mark.parametrize("state", ["unfinished", "finished"])
def test_other_settings_or_text_are_refused(source, tmp_path, unfinished, state):
    if state == "finished":
        prepare(make_config(source), unfinished, ignore)
    before = contents(unfinished)
    for fields, message in (
        ({"shard_bytes": 30_000}, "data.shard-bytes 20000, not 30000; give another --data.store or delete that folder"),
        ({"max_bytes": 9, "validation_share": 0.2}, "data.max-bytes 0, not 9; data.validation-share 0.1, not 0.2"),
        ({"tokenizer": TokenizerConfig(kind="sentencepiece")}, "data.tokenizer.kind 'bytes', not 'sentencepiece'"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(make_config(source, **fields), unfinished, ignore)
    with source.open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(
        UserError, match=r"the text of --data.source has changed from .* to .*; give another --data.store or delete that folder"
    ):
        prepare(make_config(source), unfinished, ignore)
    assert contents(unfinished) == before


def test_a_mistake_before_the_first_shard_can_be_corrected_in_place(source, tmp_path):
    with pytest.raises(UserError, match="distinct documents within"):
        prepare(make_config(source, max_bytes=5), tmp_path / "store", ignore)
    with pytest.raises(UserError, match=r"model.vocab-size"):
        prepare(make_config(source, "sentencepiece", 20), tmp_path / "store", ignore)
    assert prepare(make_config(source, "sentencepiece", 300), tmp_path / "store", ignore).tokenizer().vocab_size == 300


def test_a_second_process_is_kept_out(source, tmp_path):
    attempts: list[str] = []

    def log(line: str) -> None:
        if not attempts:
            with pytest.raises(UserError, match=f"store: in use by process {os.getpid()} on host ") as caught:
                prepare(make_config(source), tmp_path / "store", ignore)
            attempts.append(str(caught.value))

    prepare(make_config(source), tmp_path / "store", log)
    assert len(attempts) == 1


def test_a_killed_worker_is_one_line(source, tmp_path, monkeypatch):
    def encode_parts(*arguments):
        yield from ()
        raise BrokenProcessPool("a process in the pool was terminated abruptly")

    monkeypatch.setattr("gpt_jax.data.prepare._encode_parts", encode_parts)
    with pytest.raises(UserError, match=r"store: a worker was killed .*; run again with fewer --data.processes$"):
        prepare(make_config(source, processes=2), tmp_path / "store", ignore)


@pytest.mark.parametrize("writes", [0, 1, 9, 30])
def test_a_full_disk_is_one_line_and_the_next_call_continues(shared_source, whole, tmp_path, monkeypatch, writes):
    fsync, left = os.fsync, writes

    def full(descriptor: int) -> None:
        nonlocal left
        if left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        left -= 1
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"^[^\n]*no space left on [^\n]*run the same command again[^\n]*$"):
        prepare(make_config(shared_source), tmp_path / "store", ignore)
    monkeypatch.undo()
    assert not list((tmp_path / "store").rglob("*.tmp"))
    assert (tmp_path / "store" / "partial" / "text").exists() == (writes > 1)
    prepare(make_config(shared_source), tmp_path / "store", ignore)
    assert contents(tmp_path / "store") == contents(whole)


# -- refusals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "fields", "message"),
    [
        (["one"], {}, r"too few distinct documents \(1\); at least 2 are needed, one of them for validation"),
        (["one", "one", "one"], {}, r"too few distinct documents \(1\); at least 2"),
        (["", "  "], {"validation_share": 0.0}, r"too few distinct documents \(0\); at least 1"),
        (["one", "two"], {"max_bytes": 4}, r"too few distinct documents within --data.max-bytes 4 \(1\); at least 2"),
    ],
)
def test_too_few_documents_are_refused(tmp_path, texts, fields, message):
    write_rows(tmp_path / "rows.jsonl", texts)
    with pytest.raises(UserError, match=message):
        prepare(make_config(tmp_path / "rows.jsonl", **fields), tmp_path / "store", ignore)


@pytest.mark.parametrize("spelling", ["texts", "texts/**/*.jsonl", "link", "."])
def test_a_store_or_run_inside_its_own_source_is_refused(tmp_path, monkeypatch, spelling):
    (tmp_path / "texts").mkdir()
    write_rows(tmp_path / "texts" / "rows.jsonl", TEXTS[:50])
    (tmp_path / "link").symlink_to("texts")
    monkeypatch.chdir(tmp_path)
    config = make_config(spelling)
    before = contents(tmp_path)
    for store_folder, workdir, field in (
        (Path("texts/store"), None, "data.store"),
        (Path("texts/run/store"), Path("texts/run"), "workdir"),
        (tmp_path / "store", Path("texts/run"), "workdir"),
    ):
        folder = store_folder if field == "data.store" else workdir
        with pytest.raises(UserError, match=rf"^--{field}: '{folder}' is inside --data.source '{re.escape(spelling)}': "):
            prepare(config, store_folder, ignore, workdir)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_a_mistake_in_the_text_leaves_nothing_behind(source, tmp_path, kind):
    with source.open("a") as file:
        file.write('{"text": \n')
    vocab_size = 257 if kind == "bytes" else 300
    short = make_config(write_rows(tmp_path / "sound.jsonl", TEXTS), kind, vocab_size, max_bytes=10)
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for folder in (tmp_path / "store", tmp_path / "a" / "b" / "store", tmp_path / "there"):
        with pytest.raises(UserError, match=r"rows.jsonl:1501: not valid JSON"):
            prepare(make_config(source, kind, vocab_size), folder, ignore)
        assert sorted(tmp_path.rglob("*")) == before
        with pytest.raises(UserError, match=r"too few distinct documents within --data.max-bytes 10 \(0\)"):
            prepare(short, folder, ignore)
        assert sorted(tmp_path.rglob("*")) == before


def test_a_source_that_cannot_be_read_or_a_store_that_cannot_be_made_is_named(source, tmp_path):
    with pytest.raises(UserError, match=r"missing.jsonl' does not exist"):
        prepare(make_config(tmp_path / "missing.jsonl"), tmp_path / "store", ignore)
    with pytest.raises(UserError, match=r"--data.source: name a file, a folder, a glob, tfds:NAME, or builtin:docs"):
        prepare(make_config(""), tmp_path / "store", ignore)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/store.*: Not a directory"):
        prepare(make_config(source), tmp_path / "file" / "store", ignore)


def test_an_existing_store_is_enough_where_no_source_is_named(source, tmp_path):
    store = prepare(make_config(source), tmp_path / "store", ignore)
    source.unlink()
    assert prepare(make_config(""), tmp_path / "store", ignore).digest == store.digest


def test_a_finished_store_does_without_its_text_and_says_so(source, tmp_path):
    store = prepare(make_config(source), tmp_path / "store", ignore)
    source.rename(tmp_path / "moved.jsonl")
    lines: list[str] = []
    assert prepare(make_config(source), tmp_path / "store", lines.append).digest == store.digest
    assert re.search(r"this finished store is used without its text \(--data.source: '.*rows.jsonl' does not exist; ", lines[0])
    (tmp_path / "store" / "index.json").unlink()
    with pytest.raises(UserError, match=r"rows.jsonl' does not exist"):
        prepare(make_config(source), tmp_path / "store", ignore)


def test_the_store_does_not_depend_on_how_its_source_is_written(tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    write_rows(tmp_path / "texts" / "rows.jsonl", TEXTS[:50])
    (tmp_path / "latest").symlink_to("texts")
    monkeypatch.chdir(tmp_path)
    first = prepare(make_config(tmp_path / "texts"), tmp_path / "store", ignore)
    for number, spelling in enumerate(("texts", "texts/", "./latest", "texts/*.jsonl", "texts/rows.jsonl")):
        assert prepare(make_config(spelling), tmp_path / "store", ignore).digest == first.digest
        assert prepare(make_config(spelling), tmp_path / f"store{number}", ignore).digest == first.digest
        assert contents(tmp_path / f"store{number}") == contents(tmp_path / "store")
    shutil.move(tmp_path / "texts", tmp_path / "elsewhere")
    assert prepare(make_config("elsewhere"), tmp_path / "store", ignore).digest == first.digest


def test_an_unfinished_store_continues_under_another_spelling_of_its_source(source, tmp_path, unfinished, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines: list[str] = []
    prepare(make_config("rows.jsonl"), unfinished, lines.append)
    assert any("continuing; 3 of " in line for line in lines)


@pytest.mark.parametrize("name", ["recipe.json", "train-00001.json"])
@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"fields": [], "source": 1}'])
def test_damaged_notes_of_an_unfinished_store_are_refused_or_made_again(source, tmp_path, unfinished, name, content):
    (unfinished / "partial" / name).write_text(content)
    if name == "recipe.json":
        with pytest.raises(UserError, match=r"partial/recipe.json.*: "):
            prepare(make_config(source), unfinished, ignore)
        return
    prepare(make_config(source), unfinished, ignore)
    prepare(make_config(source), tmp_path / "whole", ignore)
    assert contents(unfinished) == contents(tmp_path / "whole")


def test_files_without_text_are_refused_before_anything_is_written(tmp_path):
    (tmp_path / "texts").mkdir()
    write_rows(tmp_path / "texts" / "rows.jsonl", TEXTS[:50])
    (tmp_path / "texts" / "empty").touch()
    with pytest.raises(UserError, match=r"1 of 2 files, .* contain no text .*add --data.allow-skipped True$"):
        prepare(make_config(tmp_path / "texts"), tmp_path / "store", ignore)
    assert not (tmp_path / "store").exists()
    lines: list[str] = []
    prepare(make_config(tmp_path / "texts", allow_skipped=True), tmp_path / "store", lines.append)
    assert any("left out: 1 of 2 files" in line for line in lines)
    prepare(make_config(tmp_path / "texts"), tmp_path / "store", ignore)


# -- the whole preparation --------------------------------------------------------------------------------------------------


def test_installed_documentation_becomes_a_store(tmp_path):
    store = prepare(make_config("builtin:docs", "sentencepiece", 1000, max_bytes=150_000), tmp_path / "store", ignore)
    train = store.split("train")
    assert 100_000 < train.text_bytes + store.split("validation").text_bytes <= 150_000
    assert 2 < train.text_bytes / train.num_tokens < 6  # Bytes a token. Encoding as bytes would give 1.
    sample = store.tokenizer().decode(train.read(np.zeros(1, np.int64), 300)[0].tolist())
    assert " the " in sample


def test_progress_is_logged_where_there_is_no_terminal(source, tmp_path, monkeypatch):
    for module in ("dedup", "prepare"):
        monkeypatch.setattr(f"gpt_jax.data.{module}.PROGRESS_SECONDS", 0.0)
    lines: list[str] = []
    prepare(make_config(source), tmp_path / "store", lines.append)
    assert any(line.startswith("reading: 0 MB") for line in lines)
    assert sum(bool(re.fullmatch(r"tokenized 0.\d of 0.4 MB: .* MB/s, .* tokens/s", line)) for line in lines) > 10
    assert re.fullmatch(r"tokenized 0.4 of 0.4 MB: .* MB/s, .* tokens/s", lines[-2])
    assert re.search(r"finished: 0.4 MB of text, 1,500 documents \(\d+ for validation; .*\), [\d,]+ tokens$", lines[-1])


def test_preparing_imports_no_accelerator_library():
    script = "import sys, gpt_jax.data.prepare; print({'jax', 'flax', 'tensorflow', 'tensorflow_datasets'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
