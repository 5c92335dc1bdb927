"""Sources of text: pieces of plain text, rows, folders, installed documentation, and every kind of bad input."""

import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpt_jax.config import DataConfig
from gpt_jax.data import installed_docs, sources
from gpt_jax.errors import UserError


def read(source: Path | str, **fields) -> list[str]:
    return list(sources.open_source(DataConfig(source=str(source), **fields)).documents())


def rows(path: Path, *texts: str, field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text, "id": 7}) + "\n" for text in texts))
    return path


# -- plain text -------------------------------------------------------------------------------------------------------------


def test_plain_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    paragraphs = [f"Paragraph {i}: " + "word " * (i % 200) + "\n" + "second " * (i % 200) for i in range(1000)]
    text = "\n\n".join(paragraphs) + "\n"
    (tmp_path / "book").write_text(text)
    pieces = read(tmp_path / "book")
    assert "".join(pieces) == text
    assert min(len(piece) for piece in pieces[:-1]) > 16 * 1024
    assert max(len(piece) for piece in pieces) <= 32 * 1024
    assert all(piece.endswith("\n\n") and piece.startswith("Paragraph") for piece in pieces[:-1])


def test_text_without_blank_lines_is_cut_at_line_ends(tmp_path):
    text = "".join(f"line {i} of one long paragraph\n" for i in range(5000))
    (tmp_path / "book.txt").write_text(text)
    pieces = read(tmp_path / "book.txt")
    assert "".join(pieces) == text
    assert len(pieces) == -(-len(text) // (32 * 1024))
    assert all(piece.endswith("\n") for piece in pieces)


@pytest.mark.parametrize("unit", ["two words ", "é", "日本", "a😀"])
def test_one_endless_line_is_cut_between_words_or_characters(tmp_path, unit):
    text = unit * (200_000 // len(unit.encode()))
    (tmp_path / "line").write_text(text)
    pieces = read(tmp_path / "line")
    assert "".join(pieces) == text
    assert all(32 * 1024 - 20 < len(piece.encode()) <= 32 * 1024 for piece in pieces[:-1])
    if " " in unit:
        assert all(piece.endswith(" ") for piece in pieces)


def test_line_ends_are_kept_and_a_byte_order_mark_is_not(tmp_path):
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\r\n")
    assert read(tmp_path / "windows.txt") == ["one\r\n\r\ntwo\r\n"]


def test_compressed_text_reads_like_plain_text(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"some text\n" * 9000))
    assert "".join(read(tmp_path / "a.txt.gz")) == "some text\n" * 9000


# -- rows, folders, globs ---------------------------------------------------------------------------------------------------


def test_each_json_line_is_a_document(tmp_path):
    path = rows(tmp_path / "a.jsonl", "first\nwith two lines", "", "x" * 100_000, field="body")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'\n{"body": "caf\\u00e9"}\n'))
    assert read(path, text_field="body") == ["first\nwith two lines", "", "x" * 100_000]
    assert read(tmp_path / "b.jsonl.gz", text_field="body") == ["café"]


def test_a_folder_is_read_whole_in_order_and_a_glob_in_part(tmp_path):
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    for name in ("z.txt", "sub/b.txt", "sub/deep/a.txt", ".hidden/no.txt", ".no"):
        (tmp_path / name).write_text(name)
    rows(tmp_path / "rows.jsonl", "row")
    assert read(tmp_path) == ["row", "sub/b.txt", "sub/deep/a.txt", "z.txt"]
    assert read(tmp_path / "**" / "*.txt") == ["sub/b.txt", "sub/deep/a.txt", "z.txt"]
    assert read(tmp_path / "s*" / "?.txt") == ["sub/b.txt"]


def test_identity_follows_names_and_contents_but_not_the_place(tmp_path):
    def identity(folder: Path) -> dict:
        return sources.open_source(DataConfig(source=str(folder))).identity()

    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("text")
    first = identity(tmp_path / "one")
    line = f"{hashlib.sha256(b'text').hexdigest()} 4 a.txt\n"
    assert first == {"files": 1, "bytes": 4, "sha256": hashlib.sha256(line.encode()).hexdigest()}
    assert identity(tmp_path / "two") == first
    (tmp_path / "two" / "a.txt").write_text("tex7")
    assert identity(tmp_path / "two") != first
    (tmp_path / "one" / "a.txt").rename(tmp_path / "one" / "b.txt")
    assert identity(tmp_path / "one") != first


# -- mistakes ---------------------------------------------------------------------------------------------------------------

BAD_FILES = {
    "empty.txt": (b"", "empty.txt: the file is empty"),
    "empty.jsonl": (b"", "empty.jsonl: the file is empty"),
    "empty.txt.gz": (gzip.compress(b""), "empty.txt.gz: the file is empty"),
    "mark.txt": (b"\xef\xbb\xbf", "mark.txt: the file is empty"),
    "program": (b"\x7fELF\0\0\0", "program: a binary file"),
    "latin.txt": (b"fine\nfine\ncaf\xe9\n", "latin.txt:3: byte 0xe9 is not UTF-8"),
    "late.txt": (b"fine line\n" * 200_000 + b"\xff", "late.txt:200001: byte 0xff is not UTF-8"),
    "bad.jsonl": (b'{"text": "a"}\n{"text": \n', "bad.jsonl:2: not valid JSON"),
    "list.jsonl": (b'["text"]\n', "list.jsonl:1: a list, not a JSON object with named fields"),
    "field.jsonl": (
        b'{"text": "a"}\n\n{"txt": "b"}\n',
        r"field.jsonl:3: no field 'text' \(--data.text-field\); did you mean txt\?",
    ),
    "number.jsonl": (b'{"text": 3}\n', "number.jsonl:1: the field 'text' is a number, not a string"),
    "latin.jsonl": (b'{"text": "caf\xe9"}\n', "latin.jsonl:1: byte 0xe9 is not UTF-8"),
    "not.gz": (b"plain", "not.gz: broken gzip archive"),
    "short.gz": (gzip.compress(os.urandom(1000).hex().encode())[:-500], "short.gz: broken gzip archive"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_with_its_line(tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / name)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_path_comes_with_the_nearest_names(tmp_path):
    (tmp_path / "novels.txt").write_text("x")
    with pytest.raises(UserError, match=r"novel.txt' does not exist; in .*: did you mean novels.txt\?"):
        read(tmp_path / "novel.txt")
    with pytest.raises(UserError, match=r"novel/a.txt' does not exist; in .*: did you mean novels.txt\?"):
        read(tmp_path / "novel" / "a.txt")
    for i in range(300):
        (tmp_path / f"{i}").touch()
    with pytest.raises(UserError, match=r"does not exist; in .*: 301 other names$"):
        read(tmp_path / "zzzzzzzz")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "--data.source: name a file, a folder, a glob, tfds:NAME, or builtin:docs"),
        ("builtin:novels", "there is no built-in text 'novels'; write builtin:docs"),
        ("{tmp}", "contains no files to read"),
        ("{tmp}/*.txt", r"\*.txt' contains no files to read"),
    ],
)
def test_a_source_without_text_is_refused(tmp_path, source, message):
    (tmp_path / "subfolder").mkdir()
    with pytest.raises(UserError, match=message):
        read(source.format(tmp=tmp_path))


# -- tensorflow-datasets ----------------------------------------------------------------------------------------------------

TFDS_SCRIPT = """
import sys
import numpy as np
import tensorflow_datasets as tfds
from gpt_jax.config import DataConfig
from gpt_jax.data import installed_docs, sources
from gpt_jax.errors import UserError

tfds.dataset_builders.store_as_tfds_dataset(
    name="tiny", version="1.2.3", data_dir=sys.argv[1], disable_shuffling=True,
    features=tfds.features.FeaturesDict({"story": tfds.features.Text(), "label": tfds.features.Scalar(np.int64)}),
    split_datasets={"train": [(0, {"story": "first caf\\u00e9", "label": 1}), (1, {"story": "second", "label": 2})],
                    "test": [(0, {"story": "held out", "label": 3})]},
)
tfds.dataset_builders.store_as_tfds_dataset(
    name="test_only", version="1.0.0", data_dir=sys.argv[1], features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
    split_datasets={"test": [(0, {"text": "held out"})]},
)
source = sources.open_source(DataConfig(source="tfds:tiny", text_field="story"))
print(source.identity(), sorted(source.documents()))
for name, field in (("tiny", "text"), ("tinny", "text"), ("tiny", "label"), ("test_only", "text")):
    try:
        print(list(sources.open_source(DataConfig(source=f"tfds:{name}", text_field=field)).documents()))
    except UserError as error:
        print(error)
"""


@pytest.mark.slow
def test_the_training_split_of_a_tensorflow_data_set_is_read(tmp_path):
    # tensorflow-datasets 4.9.10 imports this package to make a data set, but does not require it.
    pytest.importorskip("importlib_resources", reason="importlib_resources is not installed")
    environment = {
        **os.environ,
        "TFDS_DATA_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-c", TFDS_SCRIPT, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    good, field, name, label, split = done.stdout.splitlines()[-5:]
    assert good == "{'tfds': 'tiny/1.2.3'} ['first café', 'second']"
    assert field.startswith("--data.text-field: tfds:tiny has no 'text'; ")
    assert name.startswith("--data.source: cannot open tfds:tinny (DatasetNotFoundError: ")
    assert label.startswith("--data.text-field: 'label' is a ")
    assert re.match(r"--data.source: cannot read tfds:test_only \(ValueError: Unknown split [\"']train[\"']", split)


def test_without_tensorflow_datasets_the_message_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    message = (
        r"^--data.source: cannot open tfds:tiny \(ModuleNotFoundError[^\n]*check [^\n]* that tensorflow-datasets is installed$"
    )
    with pytest.raises(UserError, match=message):
        read("tfds:tiny")


# -- installed documentation ------------------------------------------------------------------------------------------------

PROSE = "This function returns the number of the items that are in the list, and it is never less than one of them. "
LICENSE = "Permission is granted to use this file in any way that you want, as long as this notice is kept with it. " * 2


def test_installed_documentation_is_prose_taken_once_from_files_that_are_not_imported(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text(
        f'"""{PROSE * 2}\n\n    >>> print(len([1, 2, 3]), "and some of the words that are in prose")\n\n{LICENSE}"""\n'
        f'class A:\n    """Short."""\n    def f(self):\n        """{PROSE * 3}"""\nraise SystemExit("imported")\n'
    )
    (tmp_path / "b.py").write_text(f'def g():\n    r"""{LICENSE}\n\n    It is {PROSE * 2}\n    """\n')
    (tmp_path / "topics.py").write_text(f"topics = {{'if': 'The if statement is used so that {PROSE * 2}'}}\n")
    (tmp_path / "page.md").write_text(f"# Title\n\n| a | b |\n\nThe page is here. {PROSE * 2}\n")
    (tmp_path / "broken.py").write_text('"""' + PROSE * 3 + '"""\nnot python\n')
    (tmp_path / "latin.txt").write_bytes(b"\xe9" + PROSE.encode() * 3)
    names = ["a.py", "b.py", "topics.py", "page.md", "broken.py", "latin.txt"]
    monkeypatch.setattr(installed_docs, "_installed_files", lambda: ((name, tmp_path / name, "some") for name in names))
    documents = read("builtin:docs")
    assert sorted(text.rstrip() for text in documents) == sorted(
        text.rstrip()
        for text in (
            # The license is in a.py too, but b.py comes first in the order of the hash of names.
            PROSE * 2,
            LICENSE + "\n\nIt is " + PROSE * 2,
            PROSE * 3,
            "The if statement is used so that " + PROSE * 2,
            "The page is here. " + PROSE * 2,
        )
    )


def test_the_documentation_of_this_machine_is_there_and_the_same_every_time():
    first, second = (sources.open_source(DataConfig(source="builtin:docs", max_bytes=60_000)) for _ in range(2))
    texts = list(first.documents())
    assert 60_000 <= sum(len(text.encode()) for text in texts) < 2_000_000
    assert len(set(texts)) == len(texts) > 10
    assert first.identity() == second.identity()
    words = " ".join(texts).lower().split()
    assert words.count("the") / len(words) > 0.03  # About 6 % of the words of English prose, and almost none of code.
