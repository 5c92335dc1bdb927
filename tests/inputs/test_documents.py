"""Documents of one file: pieces of plain text, and the text field of rows."""

import gzip
import json
from pathlib import Path

import pytest

from gpt_jax.errors import UserError
from gpt_jax.inputs.documents import read_documents
from gpt_jax.inputs.formats import TextFormat
from gpt_jax.inputs.tally import Tally


def pack(content: bytes) -> bytes:
    """Compresses with gzip, without the time of day."""
    return gzip.compress(content, mtime=0)


def read(path: Path, file_format: TextFormat = "text", text_field: str = "text") -> list[str]:
    return list(read_documents(path, file_format, text_field, Tally()))


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
    text = "some text with a number, %d\n" * 9000
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.txt.gz").write_bytes(pack(text.encode()))
    assert read(tmp_path / "a.txt.gz") == read(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"fine\nfine\ncaf\xe9\n", r"file:3: byte 0xe9 is not UTF-8; convert the file to UTF-8"),
        (b"fine line\n" * 200_000 + b"\xff", r"file:200001: byte 0xff is not UTF-8"),
        (b"fine line\n" * 200_000 + b"a\0b", r"file:200001: a NUL byte, so this is not text in UTF-8; convert the file"),
        (b"lone \xed\xa0\x80 surrogate", r"file:1: byte 0xed is not UTF-8"),
    ],
)
def test_bytes_that_are_not_text_are_named_with_their_line(tmp_path, content, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "file")


# -- rows -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["jsonl", "json"])
def test_the_text_field_of_each_object_is_a_document(tmp_path, file_format):
    texts = ["first\nwith two lines", "", "x" * 100_000, "café 😀"]
    rows = "".join(json.dumps({"id": 7, "body": text}) + "\n" for text in texts)
    (tmp_path / "rows").write_text("\ufeff" + rows, encoding="utf-8")
    assert read(tmp_path / "rows", file_format, "body") == texts
    (tmp_path / "rows").write_bytes(pack(rows.encode()))
    assert read(tmp_path / "rows", file_format, "body") == texts


@pytest.mark.parametrize("file_format", ["jsonl", "json"])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"txt": "b"},
            r"rows:3: no field 'text' \(--data.text-field\); did you mean txt\?; --data.format text reads .* plain text$",
        ),
        ({"text": 3}, r"rows:3: the field 'text' is a number, not a string$"),
        ({"text": ["a"]}, r"rows:3: the field 'text' is a list, not a string$"),
        ({}, r"rows:3: no field 'text' \(--data.text-field\); there are none; --data.format text"),
        ({f"column {i}": 0 for i in range(1000)}, r"rows:3: no field 'text' .*known: column 0, .* and 988 more; "),
    ],
)
def test_a_row_without_a_text_is_named(tmp_path, file_format, row, message):
    (tmp_path / "rows").write_text('{"text": "a"}\n\n' + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message):
        read(tmp_path / "rows", file_format)


@pytest.mark.parametrize("file_format", ["jsonl", "json"])
def test_a_null_text_is_empty_and_counted(tmp_path, file_format):
    (tmp_path / "rows").write_text('{"text": "a"}\n{"text": null}\n{"text": "b"}\n{"text": null}\n')
    missing = Tally()
    assert list(read_documents(tmp_path / "rows", file_format, "text", missing)) == ["a", "", "b", ""]
    assert str(missing) == "2 (rows:2, rows:4)"
