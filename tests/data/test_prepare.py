"""Preparing a store: the same bytes however it is done, continued after any death, and refused when something does not fit."""

import dataclasses
import errno
import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gpt_jax.config import DataConfig, ModelConfig, PretrainConfig, TokenizerConfig
from gpt_jax.config.load import config_from_dict, config_to_dict
from gpt_jax.data import store as store_module
from gpt_jax.data.dedup import is_held_out
from gpt_jax.data.prepare import check_recipe, prepare
from gpt_jax.data.store import Store
from gpt_jax.errors import UserError

WORDS = ["the", "of", "and", "to", "in", "is", "you", "that", "it", "was", "for", "are", "with", "they", "have", "been"]


def text(number: int, words: int = 60) -> str:
    return f"{number} " + " ".join(np.random.default_rng(number).choice(WORDS, words))


def write_rows(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def make_config(source: Path | str, kind: str = "bytes", vocab_size: int = 257, **fields) -> PretrainConfig:
    fields = {"shard_bytes": 20_000, "validation_share": 0.1, "processes": 1, "tokenizer": TokenizerConfig(kind=kind), **fields}
    return PretrainConfig(model=ModelConfig(vocab_size=vocab_size), data=DataConfig(source=str(source), **fields))


def quiet(line: str) -> None:
    pass


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stored_texts(store: Store, split: str) -> list[str]:
    array = store.split(split)
    tokens = array.read(np.zeros(1, np.int64), array.num_tokens)[0] if array.num_tokens else np.zeros(0, np.int32)
    ends = np.flatnonzero(tokens == 256)
    return [bytes(each[each != 256].astype(np.uint8)).decode() for each in np.split(tokens, ends[:-1] + 1)] if ends.size else []


@pytest.fixture
def source(tmp_path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", [text(i) for i in range(1500)])


# -- what is made -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "vocab_size"), [("bytes", 257), ("sentencepiece", 320)])
def test_any_number_of_processes_makes_the_same_bytes(source, tmp_path, monkeypatch, kind, vocab_size):
    monkeypatch.setattr("gpt_jax.data.prepare.PART_BYTES", 20_000)
    config = make_config(source, kind, vocab_size, shard_bytes=80_000)
    one = prepare(config, tmp_path / "one", quiet)
    two = prepare(dataclasses.replace(config, data=dataclasses.replace(config.data, processes=2)), tmp_path / "two", quiet)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert one.digest == two.digest
    assert len(one.index["splits"]["train"]["shards"]) >= 3
    assert not (tmp_path / "one" / "partial").exists()


def test_order_and_packing_of_the_source_do_not_matter_to_the_tokens(source, tmp_path):
    lines = source.read_bytes().splitlines(keepends=True)
    (tmp_path / "again.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[::-1] + lines[:100])))
    first = prepare(make_config(source), tmp_path / "first", quiet)
    again = prepare(make_config(tmp_path / "again.jsonl.gz"), tmp_path / "again", quiet)
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


def test_a_lone_surrogate_becomes_a_question_mark(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "before \\ud800 after"}\n')
    store = prepare(make_config(tmp_path / "rows.jsonl", validation_share=0.0), tmp_path / "store", quiet)
    assert stored_texts(store, "train") == ["before ? after"]


def test_validation_is_chosen_by_the_text_s_hash(source, tmp_path):
    texts = [text(i) for i in range(1500)]
    shares = {}
    for share in (0.0, 0.1, 0.3):
        store = prepare(make_config(source, validation_share=share), tmp_path / str(share), quiet)
        train, validation = (stored_texts(store, split) for split in ("train", "validation"))
        assert sorted(train + validation) == sorted(texts)
        fraction = {each: int.from_bytes(hashlib.sha256(each.encode()).digest()[-8:], "little") / 2**64 for each in texts}
        assert set(validation) == {each for each in texts if fraction[each] < share}
        assert set(validation) == {each for each in texts if is_held_out(each, share)}
        assert abs(len(validation) / len(texts) - share) < 0.03
        shares[share] = set(validation)
    assert shares[0.1] < shares[0.3]


def test_neither_split_is_empty_if_both_are_asked_for(tmp_path):
    write_rows(tmp_path / "rows.jsonl", ["one", "two"])
    for share in (1e-9, 0.999999):
        store = prepare(make_config(tmp_path / "rows.jsonl", validation_share=share), tmp_path / str(share), quiet)
        assert store.split("train").documents == store.split("validation").documents == 1


def test_max_bytes_takes_documents_in_the_order_of_their_hash(source, tmp_path):
    store = prepare(make_config(source, max_bytes=50_000), tmp_path / "store", quiet)
    kept = stored_texts(store, "train") + stored_texts(store, "validation")
    ordered = sorted((text(i) for i in range(1500)), key=lambda each: hashlib.sha256(each.encode()).digest())
    assert set(kept) == set(ordered[: len(kept)])
    size = sum(map(len, kept))
    assert size <= 50_000 < size + len(ordered[len(kept)])
    assert store.split("train").text_bytes + store.split("validation").text_bytes == size
    assert 0.04 < store.split("validation").documents / len(kept) < 0.2


def test_shards_hold_about_the_bytes_asked_for(source, tmp_path):
    store = prepare(make_config(source), tmp_path / "store", quiet)
    sizes = [shard["tokens"] - shard["documents"] for shard in store.index["splits"]["train"]["shards"]]
    assert len(sizes) > 10
    assert all(18_000 < size < 22_000 for size in sizes)


def test_the_tokenizer_is_trained_on_train_documents_only(tmp_path):
    """A letter that only validation documents have is spelt in bytes."""
    texts = [text(i) for i in range(400)]
    held_out = [each for each in texts if int.from_bytes(hashlib.sha256(each.encode()).digest()[-8:], "little") < 2**64 // 10]
    write_rows(tmp_path / "plain.jsonl", texts)
    config = make_config(tmp_path / "plain.jsonl", "sentencepiece", 300)
    store = prepare(config, tmp_path / "store", quiet)
    assert store.split("validation").documents == len(held_out)
    from gpt_jax.data import tokenizers

    order = sorted(set(texts) - set(held_out), key=lambda each: hashlib.sha256(each.encode()).digest())
    assert store.tokenizer().fingerprint == tokenizers.create(config.data.tokenizer, 300, lambda: order).fingerprint


# -- again, and after a death -----------------------------------------------------------------------------------------------


def test_a_finished_store_is_verified_and_left_alone(source, tmp_path):
    config = make_config(source)
    store = prepare(config, tmp_path / "store", quiet)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}
    lines: list[str] = []
    assert prepare(config, tmp_path / "store", lines.append).digest == store.digest
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")} == before
    assert "nothing to do" in lines[-1]
    path = tmp_path / "store" / "train-00004.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\x20\x00")
    with pytest.raises(UserError, match=r"train-00004.bin: altered"):
        prepare(config, tmp_path / "store", quiet)


DIE_SCRIPT = """
import json, os, shutil, signal, sys
from pathlib import Path
from gpt_jax.config.load import from_dict
from gpt_jax.data.prepare import prepare

module, name = {"fsync": os, "replace": os, "rmtree": shutil}[sys.argv[3]], sys.argv[3]
function, left = getattr(module, name), int(sys.argv[4])

def die(*arguments, **options):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments, **options)

setattr(module, name, die)
prepare(config_from_dict(json.loads(sys.argv[1])), Path(sys.argv[2]), print)
"""


def group_is_gone(group: int, seconds: float = 60.0) -> bool:
    """Waits until no process of a group is left."""
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
        ("fsync", 3, 1, 0),  # the sorted texts
        ("replace", 4, 1, 0),  # the tokenizer's place in the store
        ("fsync", 10, 1, 1),  # the second shard
        ("replace", 36, 2, 10),  # the eleventh shard
        ("rmtree", 1, 1, 0),  # after the index, the last step of all
    ],
)
def test_killed_at_any_moment_it_continues_to_the_same_bytes(source, tmp_path, call, number, processes, shards):
    config = make_config(source, processes=processes)
    prepare(make_config(source), tmp_path / "whole", quiet)
    arguments = [json.dumps(config_to_dict(config)), str(tmp_path / "store"), call, str(number)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", DIE_SCRIPT, *arguments], env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    assert process.wait(120) == -signal.SIGKILL
    assert group_is_gone(process.pid), "a worker outlived its parent"
    store = tmp_path / "store"
    if call != "rmtree":
        with pytest.raises(UserError, match="only an unfinished one"):
            Store.open(store)
        assert len(list((store / "partial").glob("train-*.json"))) == shards
    before = {path: path.stat().st_mtime_ns for path in (store / f"train-{i:05d}.bin" for i in range(shards))}
    lines: list[str] = []
    prepare(make_config(source), store, lines.append)
    assert contents(store) == contents(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not shards or any(f"going on; {shards} of " in line for line in lines)


@pytest.fixture
def unfinished(source, tmp_path, monkeypatch) -> Path:
    """A store whose preparation ended after its third shard."""
    fail_after(monkeypatch, 3, store_module.write_json)
    with pytest.raises(KeyboardInterrupt):
        prepare(make_config(source), tmp_path / "store", quiet)
    monkeypatch.undo()
    assert len(list((tmp_path / "store" / "partial").glob("train-*.json"))) == 3
    return tmp_path / "store"


def fail_after(monkeypatch, shards: int, write_json) -> None:
    def write(path: Path, value) -> None:
        nonlocal shards
        write_json(path, value)
        shards -= path.name.startswith("train-")
        if shards == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr("gpt_jax.data.prepare.write_json", write)


def test_an_altered_shard_of_an_unfinished_store_is_made_again(source, tmp_path, unfinished):
    path = unfinished / "train-00001.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\x20\x00")
    prepare(make_config(source), unfinished, quiet)
    prepare(make_config(source), tmp_path / "whole", quiet)
    assert contents(unfinished) == contents(tmp_path / "whole")


@pytest.mark.parametrize("state", ["unfinished", "finished"])
def test_other_settings_or_text_are_refused(source, tmp_path, unfinished, state):
    if state == "finished":
        prepare(make_config(source), unfinished, quiet)
    before = contents(unfinished)
    for fields, message in (
        ({"shard_bytes": 30_000}, "data.shard-bytes 20000, not 30000: give another --data.store or delete that folder"),
        ({"max_bytes": 9, "validation_share": 0.2}, "data.max-bytes 0, not 9; data.validation-share 0.1, not 0.2"),
        ({"tokenizer": TokenizerConfig(kind="sentencepiece")}, "data.tokenizer.kind 'bytes', not 'sentencepiece'"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(make_config(source, **fields), unfinished, quiet)
    with source.open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(
        UserError, match=r"the text of --data.source has changed .*: give another --data.store or delete that folder"
    ):
        prepare(make_config(source), unfinished, quiet)
    assert contents(unfinished) == before


def test_a_mistake_before_the_first_shard_can_be_corrected_in_place(source, tmp_path):
    with pytest.raises(UserError, match="distinct documents within"):
        prepare(make_config(source, max_bytes=5), tmp_path / "store", quiet)
    with pytest.raises(UserError, match=r"model.vocab-size"):
        prepare(make_config(source, "sentencepiece", 20), tmp_path / "store", quiet)
    assert prepare(make_config(source, "sentencepiece", 300), tmp_path / "store", quiet).tokenizer().vocab_size == 300


def test_a_second_process_is_kept_out(source, tmp_path):
    attempts: list[str] = []

    def log(line: str) -> None:
        if not attempts:
            with pytest.raises(UserError, match="another process prepares this store") as caught:
                prepare(make_config(source), tmp_path / "store", quiet)
            attempts.append(str(caught.value))

    prepare(make_config(source), tmp_path / "store", log)
    assert len(attempts) == 1


@pytest.mark.parametrize("writes", [0, 1, 9, 30])
def test_a_full_disk_is_one_line_and_the_next_call_continues(source, tmp_path, monkeypatch, writes):
    fsync, left = os.fsync, writes

    def full(descriptor: int) -> None:
        nonlocal left
        if left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        left -= 1
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"^[^\n]*no space left on [^\n]*run the same command again[^\n]*$"):
        prepare(make_config(source), tmp_path / "store", quiet)
    monkeypatch.undo()
    assert not list((tmp_path / "store").rglob("*.bin.tmp"))
    prepare(make_config(source), tmp_path / "store", quiet)
    prepare(make_config(source), tmp_path / "whole", quiet)
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


# -- what is refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "fields", "message"),
    [
        (["one"], {}, "distinct documents: 1; at least 2 are needed, one for validation"),
        (["one", "one", "one"], {}, "distinct documents: 1; at least 2"),
        (["", "  "], {"validation_share": 0.0}, "distinct documents: 0; at least 1"),
        (["one", "two"], {"max_bytes": 4}, "distinct documents within --data.max-bytes 4: 1; at least 2"),
    ],
)
def test_too_few_documents_are_refused(tmp_path, texts, fields, message):
    write_rows(tmp_path / "rows.jsonl", texts)
    with pytest.raises(UserError, match=message):
        prepare(make_config(tmp_path / "rows.jsonl", **fields), tmp_path / "store", quiet)


def test_a_store_inside_its_own_source_is_refused(source, tmp_path):
    with pytest.raises(UserError, match=r"--data.store: .* lies inside --data.source"):
        prepare(make_config(tmp_path), tmp_path / "store", quiet)
    assert not (tmp_path / "store").exists()


def test_a_source_that_cannot_be_read_or_a_store_that_cannot_be_made_is_named(source, tmp_path):
    with pytest.raises(UserError, match=r"missing.jsonl' does not exist"):
        prepare(make_config(tmp_path / "missing.jsonl"), tmp_path / "store", quiet)
    with pytest.raises(UserError, match=r"--data.source: say what text to read"):
        prepare(make_config(""), tmp_path / "store", quiet)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/store.*: Not a directory"):
        prepare(make_config(source), tmp_path / "file" / "store", quiet)


def test_the_recipe_is_checked_without_the_text(source, tmp_path):
    config = make_config(source)
    store = prepare(config, tmp_path / "store", quiet)
    source.unlink()
    check_recipe(store, config)
    check_recipe(store, make_config("", shard_bytes=7, max_bytes=9))
    same = config_from_dict(config_to_dict(config) | {"train": {"batch_size": 8}})
    check_recipe(
        store, dataclasses.replace(same, data=dataclasses.replace(same.data, processes=7, store="elsewhere", prefetch=9))
    )
    for other, message in (
        (make_config("elsewhere.txt"), rf"data.source '{source}', not 'elsewhere.txt'"),
        (make_config(source, text_field="body"), "data.text-field 'text', not 'body'"),
        (make_config("", "sentencepiece", 257), "data.tokenizer.kind 'bytes', not 'sentencepiece'"),
        (make_config("", "sentencepiece", 300), "'sentencepiece'; model.vocab-size 257, not 300"),
    ):
        with pytest.raises(UserError, match=message):
            check_recipe(store, other)


def test_an_existing_store_will_do_where_no_source_is_named(source, tmp_path):
    store = prepare(make_config(source), tmp_path / "store", quiet)
    source.unlink()
    assert prepare(make_config(""), tmp_path / "store", quiet).digest == store.digest


# -- as a whole -------------------------------------------------------------------------------------------------------------


def test_installed_documentation_becomes_a_store(tmp_path):
    store = prepare(make_config("builtin:docs", "sentencepiece", 2000, max_bytes=150_000), tmp_path / "store", quiet)
    train = store.split("train")
    assert 100_000 < train.text_bytes + store.split("validation").text_bytes <= 150_000
    assert 2.5 < train.text_bytes / train.num_tokens < 6  # bytes a token; 1 would be no tokenizer at all
    sample = store.tokenizer().decode(train.read(np.zeros(1, np.int64), 300)[0].tolist())
    assert " the " in sample


def test_progress_is_logged_where_there_is_no_terminal(source, tmp_path, monkeypatch):
    monkeypatch.setattr("gpt_jax.data.progress.LOG_SECONDS", 0.0)
    lines: list[str] = []
    prepare(make_config(source), tmp_path / "store", lines.append)
    assert any(line.startswith("reading: 0 MB") for line in lines)
    assert any(line.startswith("tokenising: 0 of 0 MB, ") for line in lines)
    assert re.search(r"tokenised 0.4 MB in .* s: .* MB/s, .* tokens/s", "\n".join(lines))
    assert re.search(r"finished: 0.4 MB of text, 1,500 documents \(\d+ for validation; .*\), [\d,]+ tokens$", lines[-1])


def test_preparing_imports_no_accelerator_library():
    script = "import sys, gpt_jax.data.prepare; print({'jax', 'flax', 'tensorflow', 'tensorflow_datasets'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
