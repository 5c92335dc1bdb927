"""Formats of files: by first bytes, by extension, by content; and every file that could be misread is refused."""

import gzip
import io
import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import zstandard

from gpt_jax.errors import UserError
from gpt_jax.inputs.formats import HEAD_BYTES, NotTextError, content_suffix, detect_format, open_file


def pack(content: bytes) -> bytes:
    """Compresses with gzip, without the time of day."""
    return gzip.compress(content, mtime=0)


ROWS = b"".join(b'{"text": "a text with number %d", "id": %d}\n' % (i, i) for i in range(3000))
ARRAY = b"[" + ROWS.strip().replace(b"\n", b",\n") + b"]"
PRETTY = json.dumps([json.loads(row) for row in ROWS.splitlines()], indent=2).encode()
LONG = b'{"id": 1, "text": "' + b"word " * HEAD_BYTES + b'"}'
PROSE = b"Call me Ishmael. Some years ago, never mind how long precisely, ...\n" * 3000
PARQUET = b"PAR1\x15\x04\0\0 the rest PAR1"


def write(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


# -- known extensions and first bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        *((name, ROWS, "jsonl") for name in ("a.jsonl", "a.ndjson", "a.JSONL", "a.NdJson", "v1.2.jsonl")),
        *((name, pack(ROWS), "jsonl") for name in ("a.jsonl.gz", "a.ndjson.GZ", "A.JSONL.Gz", "a.jsonl.gzip")),
        *((name, zstandard.compress(ROWS), "jsonl") for name in ("a.jsonl.zst", "a.JSONL.ZST", "a.ndjson.zstd")),
        *((name, ARRAY, "json") for name in ("a.json", "a.JSON")),
        *((name, pack(ROWS), "json") for name in ("c4-train.00000-of-01024.json.gz", "a.JSON.GZ")),
        *((name, PARQUET, "parquet") for name in ("a.parquet", "a.PARQUET", "a.jsonl", "a.txt", "part-00000")),
        *((name, PROSE, "text") for name in ("a.txt", "a.TXT", "book", "a.md", "a.rst", "a.html", "a.json.bak", "1342-0")),
        *((name, pack(PROSE), "text") for name in ("a.txt.gz", "a.GZ", "book", "a.md.gz")),
        # The first bytes tell the compression: some programs decompress a download and keep its name.
        ("a.jsonl.gz", ROWS, "jsonl"),
        ("a.txt.gz", PROSE, "text"),
        ("a.jsonl", pack(ROWS), "jsonl"),
        ("a.jsonl.gz", zstandard.compress(ROWS), "jsonl"),
    ],
)
def test_the_format_of_a_file(tmp_path, name, content, expected):
    assert detect_format(write(tmp_path, name, content)) == (expected, False)


def test_a_settled_format_holds_for_every_name(tmp_path):
    for name in ("a.txt", "a.jsonl", "a.bak", "a.json.gz"):
        path = write(tmp_path, name, ROWS)
        for wanted in ("text", "jsonl", "json"):
            assert detect_format(path, wanted) == (wanted, False)
    assert detect_format(write(tmp_path, "table.bin", PARQUET), "parquet") == ("parquet", False)
    with pytest.raises(
        UserError, match=r"a.bak: not a Parquet file \(its first bytes are not PAR1\); unpack it, or name another"
    ):
        detect_format(tmp_path / "a.bak", "parquet")


def test_suffixes_of_the_content():
    names = {"Data.JSONL.GZ": ".jsonl", "a.csv": ".csv", "a.tsv.zst": ".tsv", "a.gz": "", "a": "", "b.tar.gz": ".tar", ".gz": ""}
    assert {name: content_suffix(Path(name)) for name in names} == names


# -- content ----------------------------------------------------------------------------------------------------------------

NAMES_JSON = r"^.*/rows: the content is JSON, but the extension is not .json or .jsonl; --data.format jsonl or json reads"
JSON = {
    "lines": ROWS,
    "one object": b'{"text": "a"}',
    "an array": ARRAY,
    "an array with line ends": PRETTY,
    "objects with line ends, one after the other": PRETTY[1:-1].replace(b"},", b"}"),
    "objects on one line": ROWS.replace(b"\n", b""),
    "an object longer than what is looked at": LONG,
    "lines longer than what is looked at": LONG + b"\n" + LONG,
    "strings on lines": b'"one"\n"two \\u00e9"\n',
    "lines, of which one beyond the middle is broken": ROWS[:900].rsplit(b"\n", 1)[0] + b'\n{"text": "a\n' + ROWS[:500],
    "after blank lines": b"\n\n  " + ROWS,
    "after a byte-order mark": b"\xef\xbb\xbf" + ROWS,
    "nested too deeply": b"[" * 100_000,
    "a number that is too long": b'{"text": ' + b"9" * 5000 + b"}\n",
    "a character cut in two": b'["' + "é".encode() * HEAD_BYTES + b'"]',
}


@pytest.mark.parametrize("kind", JSON)
@pytest.mark.parametrize("compress", [bytes, pack, zstandard.compress])
def test_json_under_another_name_is_not_taken_for_plain_text(tmp_path, kind, compress):
    with pytest.raises(UserError, match=NAMES_JSON):
        detect_format(write(tmp_path, "rows", compress(JSON[kind])))


@pytest.mark.parametrize(
    "content",
    [
        b"[Illustration]\n\nCHAPTER I\n",
        b"[1] A footnote, which begins like an array.\n" * 100,
        b'"Hello," she said.\n"And so on," he said; "and on."\n' * 100,
        b'{"an": "example"}\nof JSON in a text that goes on with other things\n',
        b"{\\rtf1 braces of another language}\n",
        b"1\n2\n3\n",
        b"3.14159",
        b"null\n",
        b'"An opening quote without an end\n' * 4000,
        "日本語\n".encode() * 10_000,
        b"\n\n\n",
        b"text\n" * 20_000 + b'{"text": "a"}\n',
    ],
)
def test_plain_text_that_resembles_json_is_text(tmp_path, content):
    assert detect_format(write(tmp_path, "notes", content)) == ("text", False)


def test_json_named_txt_is_text_as_its_name_says_but_marked(tmp_path):
    assert detect_format(write(tmp_path, "rows.txt", ROWS)) == ("text", True)
    assert detect_format(write(tmp_path, "rows.txt.gz", pack(ROWS))) == ("text", True)
    assert detect_format(write(tmp_path, "rows.txt", ROWS), "text") == ("text", False)


# -- refusals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.txt",
            "text".encode("utf-16"),
            r"a.txt: text in UTF-16 or UTF-32, which is not supported; convert .* iconv -f UTF-16 -t UTF-8$",
        ),
        ("a.jsonl", b"\xfe\xff\0{", "text in UTF-16"),
        ("a.txt", "text".encode("utf-32"), "text in UTF-16 or UTF-32"),
        ("a.txt.gz", pack("text".encode("utf-16")), "text in UTF-16"),
        (
            "a.txt",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
            "a placeholder for a file in Git LFS; git lfs pull",
        ),
        ("a.jsonl", b"/annex/objects/SHA256E-s5--ab.jsonl\n", "a placeholder for a file in git-annex; git annex get"),
        ("a.gz", pack(pack(PROSE)), r"a.gz: compressed twice; decompress it once$"),
        ("a.gz", pack(zstandard.compress(PROSE)), "compressed twice"),
        (
            "data.arrow",
            b"\xff\xff\xff\xff\x70\x01\0\0",
            "an Arrow file, which is not supported; convert it with datasets.load_from_disk",
        ),
        ("data.arrow", b"ARROW1\0\0", "an Arrow file"),
        ("a.parquet", ROWS, "a.parquet: not a Parquet file"),
        ("a.parquet.gz", pack(PARQUET), "a.parquet.gz: not a Parquet file .*; unpack it, or name another --data.format"),
        ("a.txt.gz", pack(PROSE[:50])[:-3], "a.txt.gz: broken gzip archive"),
        ("latin", PROSE[:6800] + "déjà vu\n".encode("latin-1"), r"latin:101: byte 0xe9 is not UTF-8; convert the file to UTF-8$"),
        ("euro.txt", "3 €\n".encode("cp1252") * 9, r"euro.txt:1: byte 0x80 is not UTF-8"),
        ("rows.jsonl", b'\n{"text": "\xe9"}\n', r"rows.jsonl:2: byte 0xe9 is not UTF-8"),
    ],
)
def test_text_in_a_form_that_is_not_read_is_refused_with_what_helps(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as caught:
        detect_format(write(tmp_path, name, content))
    assert not isinstance(caught.value, NotTextError)


TAR = io.BytesIO(b"name.txt".ljust(257, b"\0") + b"ustar\x0000" + bytes(247)).getvalue()


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"", "empty files", "file: the file is empty"),
        (b"\xef\xbb\xbf", "empty files", "the file is empty"),
        (pack(b""), "empty files", "the file is empty"),
        (b"PK\x03\x04rest", "zip archives", "file: zip archives are not supported; unpack or convert the file"),
        (TAR, "tar archives", "tar archives are not supported"),
        (pack(TAR), "tar archives", "tar archives are not supported"),
        (zstandard.compress(TAR), "tar archives", "tar archives are not supported"),
        (b"BZh91AY&SY", "bzip2 archives", "bzip2 archives are not supported"),
        (b"\xfd7zXZ\0\0", "xz archives", "xz archives are not supported"),
        (b"%PDF-1.4\n1 0 obj\n", "PDF documents", "PDF documents are not supported"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "binary files", "file:3: a NUL byte, .*; convert the file to UTF-8, or leave it out"),
        (pack(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"), "binary files", "a NUL byte"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "binary files", "a NUL byte"),
        (b"\x7fELF\2\1\1\0", "binary files", "a NUL byte"),
        (b"SQLite format 3\0" + bytes(500), "binary files", "a NUL byte"),
        (np.arange(3000, dtype="<u2").tobytes(), "binary files", "file:1: a NUL byte"),
        ("some text\n".encode("utf-16-le"), "binary files", "a NUL byte, so this is not text in UTF-8; convert"),
        (PROSE[:6800] + b"a\0b\n", "binary files", "file:101: a NUL byte"),
    ],
)
@pytest.mark.parametrize("wanted", ["auto", "text", "jsonl"])
def test_what_is_not_text_is_told_apart(tmp_path, content, kind, message, wanted):
    with pytest.raises(NotTextError, match=message) as caught:
        detect_format(write(tmp_path, "file", content), wanted)
    assert caught.value.kind == kind


def test_text_with_control_characters_or_cut_within_a_character_is_text(tmp_path):
    assert detect_format(write(tmp_path, "formfeed", "page\fé\x1b[1m\n".encode())) == ("text", False)
    assert detect_format(write(tmp_path, "long", b"a" + "é".encode() * HEAD_BYTES)) == ("text", False)


# -- opening ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [bytes, pack, zstandard.compress])
def test_a_file_opens_with_all_of_its_head_before_anything_is_read(tmp_path, compress):
    content = os.urandom(HEAD_BYTES // 2).hex().encode() * 3
    with open_file(write(tmp_path, "file", compress(content))) as file:
        assert file.peek(HEAD_BYTES)[:HEAD_BYTES] == content[:HEAD_BYTES]
        assert file.read() == content


def test_only_regular_files_are_opened(tmp_path):
    """Opening a pipe would wait for its writer."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket"))
    server.close()
    for path in (tmp_path / "pipe", tmp_path / "link", tmp_path / "socket", Path("/dev/null"), Path("/dev/zero")):
        with pytest.raises(UserError, match=rf"^{path}: a pipe or device, not a file$"), open_file(path):
            pass
    with pytest.raises(UserError, match=r": a folder, not a file$"), open_file(tmp_path):
        pass
    with pytest.raises(UserError, match=r"nowhere: No such file or directory$"), open_file(tmp_path / "nowhere"):
        pass


def test_errors_of_the_disk_and_of_permissions_name_the_file(tmp_path, monkeypatch):
    path = write(tmp_path, "a.txt", PROSE)

    def fail(error: OSError) -> None:
        with open_file(path):
            raise error

    with pytest.raises(UserError, match=r"a.txt: Input/output error$"):
        fail(OSError(5, "Input/output error"))
    with pytest.raises(FileNotFoundError):  # of another file, which the caller reads at the same time
        fail(FileNotFoundError(2, "No such file or directory", "other"))
    monkeypatch.setattr(io, "FileIO", lambda name: (_ for _ in ()).throw(PermissionError(13, "Permission denied", str(name))))
    with pytest.raises(UserError, match=r"a.txt: Permission denied$"), open_file(path):
        pass
