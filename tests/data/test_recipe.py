"""Recipes: which config, text and tokenizer a finished store is for, however they are written and wherever they are."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from gpt_jax.config import DataConfig, ModelConfig, PretrainConfig, TokenizerConfig
from gpt_jax.config.load import RENAMED_FIELDS, Renamed, config_from_dict, config_to_dict
from gpt_jax.data import recipe
from gpt_jax.data.prepare import prepare
from gpt_jax.data.recipe import check_inputs, check_recipe, check_text
from gpt_jax.data.store import Store
from gpt_jax.data.tokenizers import SentencePiece
from gpt_jax.errors import UserError
from gpt_jax.inputs.text_files import TextFiles


def make_config(
    source: Path | str, kind: str = "bytes", vocab_size: int = 257, path: Path | str = "", **fields
) -> PretrainConfig:
    tokenizer = TokenizerConfig(kind=kind, path=str(path))
    fields = {"shard_bytes": 20_000, "validation_share": 0.1, "processes": 1, **fields}
    return PretrainConfig(
        model=ModelConfig(vocab_size=vocab_size), data=DataConfig(source=str(source), tokenizer=tokenizer, **fields)
    )


def write_texts(folder: Path, count: int = 40) -> Path:
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": f"a text with number {i}"}) + "\n" for i in range(count)))
    return folder


@pytest.fixture
def texts(tmp_path) -> Path:
    return write_texts(tmp_path / "texts")


@pytest.fixture
def store(texts, tmp_path) -> Store:
    return prepare(make_config(texts), tmp_path / "store", lambda line: None)


def check(store: Store, config: PretrainConfig, workdir: Path | None = None, checksums: bool = False) -> list[str]:
    """Returns the lines that are logged while a config is compared with a finished store."""
    lines: list[str] = []
    check_recipe(store.folder, store.index["recipe"], config)
    check_inputs(store, config, lines.append, workdir, checksums)
    return lines


# -- fields -----------------------------------------------------------------------------------------------------------------


def test_only_fields_that_affect_the_contents_are_compared(store, texts):
    config = make_config(texts)
    check(store, config)
    check(store, make_config("", shard_bytes=7, max_bytes=9))
    same = config_from_dict(config_to_dict(config) | {"train": {"batch_size": 8}})
    other = dataclasses.replace(same.data, processes=7, store="elsewhere", prefetch=9, allow_skipped=True)
    check(store, dataclasses.replace(same, data=other))
    for wrong, message in (
        (
            make_config(texts, text_field="body"),
            "data.text-field 'text', not 'body'; give another --data.store or delete that folder",
        ),
        (make_config(texts, format="text"), "data.format 'auto', not 'text'"),
        (make_config("", "sentencepiece", 257), "data.tokenizer.kind 'bytes', not 'sentencepiece'"),
        (make_config("", "sentencepiece", 300), "'sentencepiece'; model.vocab-size 257, not 300"),
        (make_config("builtin:docs"), "data.source '', not 'builtin:docs'"),
        (make_config("tfds:wiki"), "data.source '', not 'tfds:wiki'"),
    ):
        with pytest.raises(UserError, match=message):
            check(store, wrong)


def test_recipes_of_earlier_versions_are_read(store, texts, monkeypatch):
    """They recorded the paths of the text and of the tokenizer, and had fewer fields."""
    fields = store.index["recipe"]["fields"]
    fields["data.shard-size"] = fields.pop("data.shard-bytes")
    fields |= {"data.gone": 7, "data.source": "/somewhere/else", "data.tokenizer.path": "/old/tokenizer"}
    del fields["data.format"]
    monkeypatch.setitem(RENAMED_FIELDS, "data.shard-size", Renamed("data.shard-bytes", {20_000: 30_000}))
    check(store, make_config(texts, shard_bytes=30_000), checksums=True)
    with pytest.raises(UserError, match=r"data.shard-bytes 30000, not 20000"):
        check(store, make_config(texts))
    fields["data.source"] = "tfds:wiki"
    with pytest.raises(UserError, match=r"data.source 'tfds:wiki', not ''"):
        check(store, make_config(texts, shard_bytes=30_000))


# -- text -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checksums", [False, True])
def test_the_same_text_is_recognized_under_every_path(store, texts, tmp_path, monkeypatch, checksums):
    (tmp_path / "link").symlink_to("texts")
    shutil.copytree(texts, tmp_path / "copied")
    monkeypatch.chdir(tmp_path)
    for source in (texts, "texts", "texts/", "./texts", "link", "link/../texts", "copied", "texts/*", "texts/rows.jsonl"):
        assert check(store, make_config(source), checksums=checksums) == []


@pytest.mark.parametrize("checksums", [False, True])
def test_another_text_is_refused(store, texts, tmp_path, checksums):
    more = write_texts(tmp_path / "more", 41)
    message = r"store: the text of --data.source has changed from files 1, bytes 1350.* to files 1, bytes 1384"
    with pytest.raises(UserError, match=message):
        check(store, make_config(more), checksums=checksums)
    with pytest.raises(
        UserError, match=r"give another --data.store or delete that folder, or use the store as it is: --data.source ''$"
    ):
        check(store, make_config(more), checksums=checksums)
    (texts / "rows2.jsonl").write_text('{"text": "one more"}\n')
    with pytest.raises(UserError, match=r"has changed from files 1, bytes 1350.* to files 2, bytes 1371"):
        check(store, make_config(texts), checksums=checksums)


def test_a_change_that_keeps_the_size_is_found_by_prepare_but_a_run_does_not_look_for_it(store, texts, monkeypatch):
    content = (texts / "rows.jsonl").read_text()
    (texts / "rows.jsonl").write_text(content.replace("number 7", "number 8"))
    with pytest.raises(UserError, match=r"has changed from .*sha256 [0-9a-f]{12}\.\.\. to .*sha256 [0-9a-f]{12}\.\.\. since"):
        check(store, make_config(texts), checksums=True)
    monkeypatch.setattr(TextFiles, "identity", lambda self: pytest.fail("the text was read"))
    monkeypatch.setattr(TextFiles, "documents", lambda self: pytest.fail("the text was read"))
    check(store, make_config(texts))


@pytest.mark.parametrize("checksums", [False, True])
@pytest.mark.parametrize("left", ["nothing", "an empty folder", "a broken link"])
def test_a_missing_text_is_accepted_with_a_line(store, texts, tmp_path, checksums, left):
    texts.rename(tmp_path / "elsewhere")
    if left == "an empty folder":  # for example, where a disk is not mounted
        texts.mkdir()
    elif left == "a broken link":
        texts.symlink_to("nowhere")
    (line,) = check(store, make_config(texts), checksums=checksums)
    assert line.startswith(f"{store.folder}: this finished store is used without its text (--data.source: '{texts}' ")


def test_a_data_set_by_name_is_opened_only_to_compare_checksums(store, texts, monkeypatch):
    store.index["recipe"]["fields"]["data.source"] = "tfds:wiki"
    store.index["recipe"]["source"] = {"tfds": "wiki/en/1.0.0"}
    monkeypatch.setattr(recipe, "open_source", lambda *arguments: pytest.fail("the data set was opened"))
    check(store, make_config("tfds:wiki"))
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"data.source 'tfds:wiki', not ''"):
        check(store, make_config(texts))
    (line,) = check(store, make_config("tfds:wiki"), checksums=True)
    assert "this finished store is used without its text (--data.source: cannot open tfds:wiki (" in line


def test_a_part_of_an_identity_is_compared_with_that_part(store):
    identity = store.index["recipe"]["source"]
    check_text(store.folder, store.index["recipe"], {"files": identity["files"]})
    with pytest.raises(UserError, match=r"from tfds None to tfds wiki/en/1.0.0"):
        check_text(store.folder, store.index["recipe"], {"tfds": "wiki/en/1.0.0"})


def test_a_run_inside_the_source_is_refused(store, texts, tmp_path):
    check(store, make_config(texts), workdir=tmp_path / "run")
    check(store, make_config(""), workdir=texts / "run")
    for workdir in (texts, texts / "run", texts / "a" / ".." / "b"):
        with pytest.raises(UserError, match=r"^--workdir: '.*' is inside --data.source '.*texts'"):
            check(store, make_config(texts), workdir=workdir)


# -- tokenizer --------------------------------------------------------------------------------------------------------------


def test_the_tokenizer_is_compared_by_its_fingerprint(texts, tmp_path):
    corpus = [" ".join(f"{chr(97 + i * k % 26)}ord{i * k % 37}" for k in range(40)) for i in range(50)]
    SentencePiece.train(corpus, 300, "nmt_nfkc").save(tmp_path / "one")
    SentencePiece.train(corpus[:40], 300, "nmt_nfkc").save(tmp_path / "two")
    store = prepare(make_config(texts, "sentencepiece", 300, tmp_path / "one"), tmp_path / "store", lambda line: None)
    shutil.copytree(tmp_path / "one", tmp_path / "copied")
    for path in (tmp_path / "one", tmp_path / "copied", tmp_path / "missing", ""):
        check(store, make_config(texts, "sentencepiece", 300, path))
        prepare(make_config(texts, "sentencepiece", 300, path), store.folder, lambda line: None)
    message = rf"store: made with a different tokenizer than --data.tokenizer.path {tmp_path}/two; give another --data.store"
    with pytest.raises(UserError, match=message):
        check(store, make_config(texts, "sentencepiece", 300, tmp_path / "two"))
    with pytest.raises(UserError, match=message):
        prepare(make_config(texts, "sentencepiece", 300, tmp_path / "two"), store.folder, lambda line: None)
