"""The format of the token store, its checks and its reads, compared with a plain NumPy reading of the files."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gpt_jax.config import DataConfig, ModelConfig, PretrainConfig, TokenizerConfig
from gpt_jax.data.prepare import prepare
from gpt_jax.data.store import Store, index_digest, token_dtype
from gpt_jax.errors import UserError

TEXTS = [f"Document {i}: " + " ".join(str(i * k) for k in range(i % 23 + 1)) for i in range(300)]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    data = DataConfig(
        source=str(folder / "rows.jsonl"),
        validation_share=0.2,
        shard_bytes=700,
        processes=1,
        tokenizer=TokenizerConfig(kind="bytes"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpt_jax.data.prepare.PART_BYTES", 200)  # So that a shard is put together from several parts.
        prepare(PretrainConfig(model=ModelConfig(vocab_size=257), data=data), folder / "store", lambda line: None)
    return folder / "store"


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "store")


def naive(folder: Path, split: str) -> np.ndarray:
    """Returns all tokens of a split, read according to the format."""
    index = json.loads((folder / "index.json").read_text())
    files = [folder / shard["file"] for shard in index["splits"][split]["shards"]]
    return np.concatenate([np.frombuffer(file.read_bytes(), "<u2") for file in files])


def test_the_files_are_what_the_format_says(made):
    index = json.loads((made / "index.json").read_text())
    assert (index["format"], index["version"], index["dtype"]) == ("gpt_jax token store", 1, "uint16")
    assert {name: index["tokenizer"][name] for name in ("kind", "vocab_size", "separator")} == {
        "kind": "bytes",
        "vocab_size": 257,
        "separator": 256,
    }
    documents: dict[str, list[bytes]] = {}
    for name, split in index["splits"].items():
        documents[name] = []
        for number, shard in enumerate(split["shards"]):
            assert shard["file"] == f"{name}-{number:05d}.bin"
            assert shard["offsets"]["file"] == f"{name}-{number:05d}.offsets"
            for file in (shard, shard["offsets"]):
                data = (made / file["file"]).read_bytes()
                assert (file["size"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
            tokens = np.frombuffer((made / shard["file"]).read_bytes(), "<u2")
            offsets = np.frombuffer((made / shard["offsets"]["file"]).read_bytes(), "<u8").astype(int)
            assert (shard["tokens"], shard["documents"]) == (len(tokens), len(offsets))
            for begin, end in zip(offsets, [*offsets[1:], len(tokens)], strict=True):
                assert tokens[end - 1] == 256
                documents[name].append(bytes(tokens[begin : end - 1].astype(np.uint8)))
        assert split["documents"] == len(documents[name])
        assert split["tokens"] == sum(shard["tokens"] for shard in split["shards"])
        assert split["text_bytes"] == sum(map(len, documents[name])) == split["tokens"] - split["documents"]
        assert documents[name] == sorted(documents[name], key=lambda text: hashlib.sha256(text).digest())
    assert sorted(documents["train"] + documents["validation"]) == sorted(text.encode() for text in TEXTS)
    assert len(index["splits"]["train"]["shards"]) > 10


def test_reads_equal_the_concatenated_shards_across_their_ends(made):
    store = Store.open(made)
    rng = np.random.default_rng(0)
    for split in ("train", "validation"):
        expected = naive(made, split)
        array = store.split(split)
        assert array.num_tokens == len(expected)
        longest_shard = max(shard["tokens"] for shard in store.index["splits"][split]["shards"])
        for length in (1, 2, 65, longest_shard + 1, 3 * longest_shard, len(expected)):
            starts = rng.integers(0, len(expected) - length + 1, 500)
            starts[:2] = 0, len(expected) - length
            rows = array.read(starts, length)
            assert rows.dtype == np.int32
            np.testing.assert_array_equal(rows, expected[starts[:, None] + np.arange(length)])
    assert store.split("train").read(np.zeros(0, np.int64), 5).shape == (0, 5)


def test_reads_outside_the_split_are_refused(made):
    array = Store.open(made).split("train")
    for starts in ([-1], [0, array.num_tokens - 9]):
        with pytest.raises(IndexError, match="outside the split"):
            array.read(np.array(starts), 10)


def test_a_damaged_file_is_named(copy):
    index = json.loads((copy / "index.json").read_text())
    for file in (index["splits"]["train"]["shards"][3], index["splits"]["validation"]["shards"][0]["offsets"]):
        path = copy / file["file"]
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(UserError, match=f"{file['file']}: altered"):
            Store.open(copy)
        Store.open(copy, verify=False)
        path.write_bytes(data[:-1])
        with pytest.raises(UserError, match=f"{file['file']}: has {len(data) - 1} bytes instead of {len(data)}"):
            Store.open(copy, verify=False)
        path.unlink()
        with pytest.raises(UserError, match=f"{file['file']}: missing"):
            Store.open(copy, verify=False)
        path.write_bytes(data)
    Store.open(copy)


def test_a_folder_that_is_not_a_store_is_refused(copy, tmp_path):
    with pytest.raises(UserError, match=r"nowhere: there is no token store here \(index.json is missing\)"):
        Store.open(tmp_path / "nowhere")
    (tmp_path / "begun" / "partial").mkdir(parents=True)
    with pytest.raises(UserError, match=r"begun: there is no token store here .only an unfinished one: prepare it again"):
        Store.open(tmp_path / "begun")
    index = json.loads((copy / "index.json").read_text())
    for content, message in (
        ("{", "index.json:1: not valid JSON"),
        ("[]", "index.json:1: a list, not a JSON object"),
        ("{}", "index.json: cannot read format 'None'"),
        (
            json.dumps({**index, "version": 2}),
            "format 'gpt_jax token store', version 2; must be 'gpt_jax token store', version 1",
        ),
    ):
        (copy / "index.json").write_text(content)
        with pytest.raises(UserError, match=message):
            Store.open(copy)


WRONG_INDEXES = {
    "splits": ({}, "'splits.train' is missing"),
    "recipe": ([], "'recipe' is a list, not an object"),
    "recipe.fields": (None, "'recipe.fields' is null, not an object"),
    "dropped.empty": ("2", "'dropped.empty' is a string, not a whole number"),
    "tokenizer.vocab_size": (-1, "'tokenizer.vocab_size' is a number, not a whole number"),
    "splits.train.shards": ({}, "'splits.train.shards' is an object, not a list"),
    "splits.train.shards.0.offsets": ("x", "'splits.train.shards.0.offsets' is a string, not an object"),
    "splits.train.shards.0.file": ("../../etc/passwd", "'../../etc/passwd' is not the name of a file of a token store"),
    "splits.train.shards.0.offsets.file": ("a\0b", r"'a\\x00b' is not the name of a file of a token store"),
    "splits.train.shards.0.tokens": (7, "train-00000.bin cannot have .* bytes and 7 tokens"),
    "splits.train.shards.0.size": (2**62, "train-00000.bin cannot have"),
}


@pytest.mark.parametrize("name", WRONG_INDEXES)
def test_an_index_that_another_program_wrote_wrong_is_refused(copy, name):
    """Its digest is right, so only its contents can tell."""
    value, message = WRONG_INDEXES[name]
    index = json.loads((copy / "index.json").read_text())
    part = index
    *parents, last = (int(key) if key.isdigit() else key for key in name.split("."))
    for key in parents:
        part = part[key]
    part[last] = value
    del index["digest"]
    (copy / "index.json").write_text(json.dumps({**index, "digest": index_digest(index)}))
    with pytest.raises(UserError, match=rf"index.json: .*{message}.*; restore it or prepare the store again$"):
        Store.open(copy)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"format": ' + "9" * 5000 + "}", '{"format": "\\ud800"}', b"\xff", b"\0"])
def test_an_index_that_no_parser_reads_is_one_line(copy, content):
    (copy / "index.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"^\S*index.json:"):
        Store.open(copy)


def test_brackets_nested_as_deeply_as_the_parser_allows_are_an_altered_index(copy):
    index = json.loads((copy / "index.json").read_text())
    content = json.dumps({"x": "DEEP", **index})
    for depth in range(800, 1000):
        (copy / "index.json").write_text(content.replace('"DEEP"', "[" * depth + "]" * depth))
        with pytest.raises(UserError, match=r"index.json(: altered|:1: not readable)"):
            Store.open(copy)


def test_the_tokenizer_is_the_one_that_made_the_tokens(copy):
    store = Store.open(copy)
    tokenizer = store.tokenizer()
    assert tokenizer.decode(naive(copy, "train")[:200].tolist()).startswith("Document ")
    store.index["tokenizer"]["fingerprint"] = "0" * 64
    with pytest.raises(UserError, match=r"not the tokenizer that made this store .fingerprint 277089d91c0b, not 000000000000."):
        store.tokenizer()


def test_the_digest_depends_on_the_index_but_not_on_its_layout(copy):
    before = Store.open(copy).digest
    index = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps(index, indent=7))
    assert Store.open(copy).digest == before
    assert index.pop("digest") == before
    canonical = json.dumps(index, sort_keys=True, separators=(",", ":"))
    assert before == hashlib.sha256(canonical.encode()).hexdigest()
    index["splits"]["train"]["text_bytes"] += 1
    (copy / "index.json").write_text(json.dumps({**index, "digest": before}))
    with pytest.raises(UserError, match=r"index.json: altered"):
        Store.open(copy, verify=False)


def test_tokens_have_sixteen_bits_if_every_id_fits():
    assert (token_dtype(257).str, token_dtype(65_536).str, token_dtype(65_537).str) == ("<u2", "<u2", "<u4")
