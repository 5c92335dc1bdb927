"""Damaged files: whatever a file from outside the project contains, its reader gives a result or a one-line error of ours.

Hypothesis damages valid files (tests/damage.py) in the same way every time. A case that once failed is an `example` of its test.
"""

import gzip
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt_jax.config import DataConfig, ModelConfig, PretrainConfig, TaskConfig, TokenizerConfig
from gpt_jax.data.prepare import prepare
from gpt_jax.data.recipe import check_recipe
from gpt_jax.data.sources import open_source
from gpt_jax.data.store import Store, index_digest
from gpt_jax.data.tokenizers import GPT1, Bytes, SentencePiece, create_tokenizer, load_tokenizer
from gpt_jax.errors import UserError
from gpt_jax.interop.import_ import inspect_folder
from gpt_jax.runtime.rundir import RunDir
from gpt_jax.tasks.readers import read_split
from gpt_jax.tasks.registry import TASKS, task_from_config
from gpt_jax.tasks.winograd import read_winograd
from gpt_jax.train import checkpoint_info
from tests.damage import damaged_bytes, damaged_json, damaged_json_file

pytestmark = pytest.mark.slow

FIXTURES = Path(__file__).parent / "fixtures"
CASES = 300
fuzz = settings(
    max_examples=CASES,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)
MAX_MESSAGE = 2000  # characters; a message that lists everything in a file would be longer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def check(read: Callable[[], object]) -> None:
    """Fails unless `read` returns, or raises a `UserError` with one line."""
    try:
        read()
    except UserError as error:
        message = str(error)
        assert message.isprintable(), message
        assert 0 < len(message) < MAX_MESSAGE, message[:MAX_MESSAGE]


# -- corpora ----------------------------------------------------------------------------------------------------------------

TEXT = ("The quick brown fox jumps over the lazy dog.\n\n" * 30).encode()
OBJECTS = [{"text": f"Document {i}: naïve, “quoted”", "id": i, "tags": [None, 1.5]} for i in range(12)]
JSON_LINES = "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(OBJECTS)).encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=4)
    return file.getvalue()


CORPORA = {
    "text.txt": TEXT,
    "README": TEXT,
    "rows.jsonl": JSON_LINES,
    "rows.ndjson.gz": gzip.compress(JSON_LINES, mtime=0),
    "rows.JSON": json.dumps(OBJECTS).encode(),
    "text.zst": zstandard.compress(TEXT),
    "rows.jsonl.zst": zstandard.compress(JSON_LINES),
    "rows.parquet": parquet(OBJECTS),
}


@pytest.mark.parametrize("name", CORPORA)
@fuzz
@given(data=st.data())
def test_corpora(folder: Path, name: str, data: st.DataObject) -> None:
    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    content = CORPORA[name]
    # Damage inside of an archive, where the checksum is right, reaches the reader of the text.
    if name.endswith(".gz") and data.draw(st.booleans()):
        content = gzip.compress(data.draw(damaged_bytes(JSON_LINES)), mtime=0)
    elif name.endswith(".zst") and data.draw(st.booleans()):
        content = zstandard.compress(data.draw(damaged_bytes(zstandard.decompress(content))))
    else:
        content = data.draw(damaged_bytes(content))
    path = corpus / name
    path.write_bytes(content)
    whole_folder = data.draw(st.booleans())

    def read() -> None:
        source = open_source(DataConfig(source=str(corpus if whole_folder else path)))
        source.identity()
        assert all(document.encode() for document in source.documents() if document)

    check(read)
    path.unlink()


# -- tables and task folders ------------------------------------------------------------------------------------------------

ROWS = [{"first": f"A {i}", "second": f'"B", {i}\té', "label": ("yes", "no")[i % 2], "score": i / 4} for i in range(12)]
CELLS = [[str(value).replace("\t", " ") for value in row.values()] for row in ROWS]
TABLES = {
    "rows.tsv": "".join("\t".join(cells) + "\n" for cells in [list(ROWS[0]), *CELLS]).encode(),
    "rows.csv": "".join(
        ",".join('"{}"'.format(cell.replace('"', '""')) for cell in cells) + "\n" for cells in [list(ROWS[0]), *CELLS]
    ).encode(),
    "rows.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "rows.csv.gz": b"",
    "rows.parquet": parquet(ROWS),
}
TABLES["rows.csv.gz"] = gzip.compress(TABLES["rows.csv"], mtime=0)


@pytest.mark.parametrize("name", TABLES)
@fuzz
@given(data=st.data())
def test_tables_of_a_users_own_task(folder: Path, name: str, data: st.DataObject) -> None:
    path = folder / name
    path.write_bytes(data.draw(damaged_bytes(TABLES[name])))
    split = data.draw(st.sampled_from(("train", "validation", "test")))
    labels = data.draw(st.sampled_from((("no", "yes"), ())))
    config = TaskConfig(kind="entailment", texts=("first", "second"), train=str(path), validation=str(path), test=str(path))
    config = TaskConfig(**{**vars(config), "labels": labels, "label": data.draw(st.sampled_from(("label", "score", "none")))})
    check(lambda: read_split(task_from_config(config), config, split))


SNLI = [
    {"sentence1": f"A man {i}.", "sentence2": "A dog.", "gold_label": ("neutral", "entailment", "-")[i % 3], "pairID": str(i)}
    for i in range(9)
]
RACE = {"article": "A text.", "questions": ["Why _ ?", "Who?"], "options": [list("abcd"), list("efgh")], "answers": ["A", "D"]}
RELEASES = {
    ("cola", "train.tsv"): b"".join(f"gj04\t{i % 2}\t\tA sentence, {i}.\n".encode() for i in range(9)),
    ("stsb", "train.tsv"): b"index\tsentence1\tsentence2\tscore\n"
    + b"".join(f"{i}\tA {i}\tB\t{i / 2}\n".encode() for i in range(9)),
    ("qqp", "train.tsv"): b"id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    + b"".join(f"{i}\t1\t2\tA {i}?\tB?\t{i % 2}\n".encode() for i in range(9)),
    ("snli", "snli_1.0_train.jsonl"): "".join(json.dumps(row) + "\n" for row in SNLI).encode(),
    ("race", "train/high/1.txt"): json.dumps(RACE).encode(),
    ("story_cloze", "cloze_test_val__spring2016 - cloze_test_ALL_val.csv"): (
        "InputStoryid,InputSentence1,InputSentence2,InputSentence3,InputSentence4,RandomFifthSentenceQuiz1,"
        "RandomFifthSentenceQuiz2,AnswerRightEnding\n" + "".join(f'{i},A,B,C,"D, d",E,F,{i % 2 + 1}\n' for i in range(400))
    ).encode(),
}


@pytest.mark.parametrize(("task", "name"), RELEASES)
@fuzz
@given(data=st.data())
def test_files_of_a_released_task(folder: Path, task: str, name: str, data: st.DataObject) -> None:
    path = folder / task / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".txt"):
        (path.parents[1] / "middle").mkdir(exist_ok=True)
        (path.parents[1] / "middle" / "2.txt").write_bytes(RELEASES[task, name])
    content = RELEASES[task, name]
    path.write_bytes(data.draw(damaged_json_file(content) if name.endswith(".txt") else damaged_bytes(content)))
    check(lambda: read_split(TASKS[task], TaskConfig(name=task, path=str(folder / task)), "train"))


WINOGRAD = "The trophy did not fit into the case because [it] was too big.\nit\nThe trophy,the case\nThe trophy\n\n" * 4


@fuzz
@given(content=damaged_bytes(WINOGRAD.encode()))
def test_winograd_schemas(folder: Path, content: bytes) -> None:
    (folder / "schemas.txt").write_bytes(content)
    check(lambda: read_winograd(folder / "schemas.txt"))


# -- tokenizers -------------------------------------------------------------------------------------------------------------

SYMBOLS = ["a", "b", "a</w>", "b</w>", "ab", "ab</w>", "\n</w>"]
VOCABULARY = json.dumps({symbol: i for i, symbol in enumerate(SYMBOLS)}).encode()
MERGES = b"#version: 0.2\na b\na b</w>\n"


@pytest.fixture(scope="module")
def tokenizers(folder: Path) -> dict[str, Path]:
    texts = [" ".join(f"{chr(97 + i * k % 26)}ord{i * k % 37}" for k in range(40)) for i in range(50)]
    made = {"bytes": Bytes(), "gpt1": GPT1(VOCABULARY, MERGES), "sentencepiece": SentencePiece.train(texts, 300, "nmt_nfkc")}
    for kind, tokenizer in made.items():
        tokenizer.save(folder / "tokenizers" / kind)
    return {kind: folder / "tokenizers" / kind for kind in made}


@pytest.mark.parametrize("kind", ["bytes", "gpt1", "sentencepiece"])
@fuzz
@given(data=st.data())
def test_tokenizer_folders(folder: Path, tokenizers: dict[str, Path], kind: str, data: st.DataObject) -> None:
    copy = folder / "tokenizer"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(tokenizers[kind], copy)
    path = data.draw(st.sampled_from(sorted(copy.iterdir())))
    content = path.read_bytes()
    path.write_bytes(data.draw(damaged_json_file(content) if path.suffix == ".json" else damaged_bytes(content)))

    def read() -> None:
        tokenizer = load_tokenizer(copy)
        tokenizer.decode(tokenizer.encode("ab word1\n") if kind != "gpt1" else [0, 1])  # Encoding with the latter needs spaCy.

    check(read)


@fuzz
@given(vocabulary=damaged_json_file(VOCABULARY) | st.just(VOCABULARY), merges=damaged_bytes(MERGES))
def test_released_vocabularies(folder: Path, vocabulary: bytes, merges: bytes) -> None:
    """Its files carry no checksum of ours, so any damage reaches the parser."""
    (folder / GPT1.files[0]).write_bytes(vocabulary)
    (folder / GPT1.files[1]).write_bytes(merges)
    config = TokenizerConfig(kind="gpt1", path=str(folder))
    check(lambda: create_tokenizer(config, len(SYMBOLS), lambda: ()).decode([0, 1]))


# -- configs and models of other frameworks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["run_v1", "finetune_v1", "lstm_v1"])
@fuzz
@given(data=st.data())
def test_the_config_of_a_run(folder: Path, run: str, data: st.DataObject) -> None:
    copy = folder / run
    if not copy.exists():
        shutil.copytree(FIXTURES / run, copy)
    content = (FIXTURES / run / "config.json").read_bytes()
    (copy / "config.json").write_bytes(data.draw(damaged_json_file(content)))

    def read() -> None:
        opened = RunDir(copy)
        opened.require_not_imported()
        opened.check_data("0" * 64)
        opened.check_config(PretrainConfig())

    check(read)
    step = next((copy / "checkpoints").iterdir())
    original = (FIXTURES / run / "checkpoints" / step.name / "config.json").read_bytes()
    (step / "config.json").write_bytes(data.draw(damaged_json_file(original)))
    check(lambda: checkpoint_info.read_config(checkpoint_info.inspect_checkpoint(step, checksums=False)))


HUGGING_FACE = {
    **{"model_type": "openai-gpt", "architectures": ["OpenAIGPTLMHeadModel"], "afn": "gelu", "vocab_size": len(SYMBOLS)},
    **{"n_positions": 8, "n_embd": 4, "n_layer": 1, "n_head": 2, "layer_norm_epsilon": 1e-5, "initializer_range": 0.02},
    **{"embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1},
}


@fuzz
@given(
    config=damaged_json_file(json.dumps(HUGGING_FACE).encode()), vocabulary=damaged_json_file(VOCABULARY) | st.just(VOCABULARY)
)
def test_the_config_of_a_hugging_face_model(folder: Path, config: bytes, vocabulary: bytes) -> None:
    model = folder / "huggingface"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_bytes(config)
    (model / "model.safetensors").write_bytes(b"")
    (model / "vocab.json").write_bytes(vocabulary)
    (model / "merges.txt").write_bytes(MERGES)
    check(lambda: inspect_folder(model))


# -- manifests and store indexes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["run_v1", "finetune_v1"])
@fuzz
@given(data=st.data())
def test_manifests(folder: Path, run: str, data: st.DataObject) -> None:
    copy = folder / f"manifest_{run}"
    if not copy.exists():
        shutil.copytree(FIXTURES / run / "checkpoints", copy / "checkpoints")
    path = sorted(copy.rglob("manifest.json"))[-1]
    original = (FIXTURES / run / path.relative_to(copy)).read_bytes()
    if data.draw(st.booleans()):
        value = data.draw(damaged_json(json.loads(original)))
        # With its checksum, as a program of somebody else's would write it.
        path.write_bytes(checkpoint_info.encode_manifest(value) if isinstance(value, dict) else json.dumps(value).encode())
    else:
        path.write_bytes(data.draw(damaged_bytes(original)))

    def use(found: checkpoint_info.CheckpointInfo) -> None:
        assert f"{found.step:>9} {found.size / 1e6:9.1f} {found.state:<10} {found.problem}"
        assert all(f"{name} {value:.4f}" for name, value in found.metrics.items())
        if found.state == "sound":
            checkpoint_info.read_manifest(found)
            checkpoint_info.best_checkpoints([found], 1)

    check(lambda: [use(info) for info in checkpoint_info.list_checkpoints(copy)])
    check(lambda: use(checkpoint_info.find_checkpoint(copy, lambda line: None)))
    check(lambda: use(checkpoint_info.find_checkpoint(path.parent, lambda line: None)))


@pytest.fixture(scope="module")
def store(folder: Path) -> tuple[Path, bytes]:
    """The folder of a store, and the content of its index."""
    source = folder / "source.txt"
    source.write_bytes(b"".join(b"A document with number %d.\n\n" % i for i in range(9000)))
    data = DataConfig(source=str(source), validation_share=0.3, processes=1, tokenizer=TokenizerConfig(kind="bytes"))
    prepare(PretrainConfig(model=ModelConfig(vocab_size=257), data=data), folder / "store", lambda line: None)
    return folder / "store", (folder / "store" / "index.json").read_bytes()


@fuzz
@given(data=st.data())
def test_store_indexes(store: tuple[Path, bytes], data: st.DataObject) -> None:
    folder, original = store
    path = folder / "index.json"
    if data.draw(st.booleans()):
        value = data.draw(damaged_json({name: part for name, part in json.loads(original).items() if name != "digest"}))
        if isinstance(value, dict):
            value["digest"] = index_digest({name: part for name, part in value.items() if name != "digest"})
        path.write_text(json.dumps(value))
    else:
        path.write_bytes(data.draw(damaged_bytes(original)))
    config = PretrainConfig(model=ModelConfig(vocab_size=257), data=DataConfig(tokenizer=TokenizerConfig(kind="bytes")))

    def read() -> None:
        opened = Store.open(folder)
        opened.tokenizer()
        check_recipe(folder, opened.index["recipe"], config)
        for name in ("train", "validation"):
            split = opened.split(name)  # type: ignore[arg-type]
            split.read(np.zeros(1, np.int64), min(split.num_tokens, 8))
            int(split.text_bytes)

    check(read)
