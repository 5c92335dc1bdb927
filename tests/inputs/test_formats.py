"""Formats of files: by first bytes, by extension, by content; and every file that could be misread is refused."""

import gzip
import io
import json
import os
import socket
from pathlib import Path

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
            assert detect_format(path, wanted).format == wanted
    assert detect_format(write(tmp_path, "table.bin", PARQUET), "parquet").format == "parquet"
    with pytest.raises(UserError, match=r"a.bak: not a Parquet file \(its first bytes are not PAR1\); --data.format names"):
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
    "lines, one of them broken": ROWS[:500].rsplit(b"\n", 1)[0] + b'\n{"text": "a\n' + ROWS[:500],
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
            r"a.txt: UTF-16 text, which is not read; use iconv -f UTF-16 -t UTF-8 \S*/a.txt > NEW$",
        ),
        ("a.jsonl", b"\xfe\xff\0{", "UTF-16 text"),
        ("a.txt", "text".encode("utf-32"), "UTF-32 text"),
        ("a.txt.gz", pack("text".encode("utf-16")), r"UTF-16 text, which is not read; use gzip -dc \S*/a.txt.gz > NEW first$"),
        (
            "a b.txt",
            "some text\n".encode("utf-16-le"),
            r"looks like UTF-16LE text, .*; use iconv -f UTF-16LE -t UTF-8 '\S*/a b.txt' > NEW$",
        ),
        ("a.txt", "some text\n".encode("utf-16-be") * 50, "looks like UTF-16BE text"),
        (
            "a.txt",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
            "a placeholder of Git LFS for a file, .* git lfs pull$",
        ),
        ("a.jsonl", b"/annex/objects/SHA256E-s5--ab.jsonl\n", r"a placeholder of git-annex .* git annex get \S*a.jsonl$"),
        ("a.gz", pack(pack(PROSE)), r"a.gz: compressed twice; decompress it once: gzip -dc \S*/a.gz > NEW$"),
        ("a.gz", pack(zstandard.compress(PROSE)), "compressed twice"),
        (
            "a.txt",
            PROSE[:6800] + b"a\0b\n",
            r"a.txt:101: a NUL byte in a text; remove it, for example: tr -d '\\0' < \S*/a.txt > NEW$",
        ),
        ("data.arrow", b"\xff\xff\xff\xff\x70\x01\0\0", "an Arrow stream, which is not read; use datasets.load_from_disk"),
        ("data.arrow", b"ARROW1\0\0", "an Arrow file"),
        ("a.parquet", ROWS, "a.parquet: not a Parquet file"),
        ("a.parquet.gz", pack(PARQUET), "a Parquet file that is compressed as a whole; decompress it first"),
        ("a.txt.gz", pack(PROSE[:50])[:-3], "a.txt.gz: broken gzip archive"),
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
        (b"", "empty files", "the file is empty"),
        (b"\xef\xbb\xbf", "empty files", "the file is empty"),
        (pack(b""), "empty files", "the file is empty"),
        (b"PK\x03\x04rest", "archives", r"a zip archive, which is not read; use unzip \S*/file -d FOLDER"),
        (TAR, "archives", r"a tar archive, which is not read; use tar -xf \S*/file -C FOLDER"),
        (pack(TAR), "archives", r"a tar archive, which is not read; use tar -xf \S*/file -C FOLDER"),
        (zstandard.compress(TAR), "archives", "a tar archive"),
        (b"BZh91AY&SY", "archives", r"compressed with bzip2, .* bzip2 -dk \S*/file"),
        (b"\xfd7zXZ\0\0", "archives", r"compressed with xz, .* xz -dk \S*/file"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "binary files", "a binary file .it has NUL bytes"),
        (pack(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"), "binary files", "a binary file"),
        (b"\xff\xd8\xff\xe1\x10\x05Exif", "binary files", r"a binary file \(control characters, and not UTF-8\)"),
        (b"\x7fELF\2\1\1\0", "binary files", "a binary file"),
        (b"%PDF-1.4\n1 0 obj\n", "documents", r"a PDF document, .* pdftotext \S*/file NEW"),
        (PROSE[:60_000] + bytes(100), "binary files", "a binary file"),
        (b"SQLite format 3\0" + bytes(500), "binary files", "a binary file"),
    ],
)
@pytest.mark.parametrize("wanted", ["auto", "text", "jsonl"])
def test_what_is_not_text_is_told_apart(tmp_path, content, kind, message, wanted):
    with pytest.raises(NotTextError, match=message) as caught:
        detect_format(write(tmp_path, "file", content), wanted)
    assert caught.value.kind == kind


def test_text_in_another_encoding_is_left_to_the_reader_which_names_the_line(tmp_path):
    assert detect_format(write(tmp_path, "latin", "déjà vu\n".encode("latin-1") * 9)).format == "text"
    assert detect_format(write(tmp_path, "euro", "3 €\n".encode("cp1252") * 9)).format == "text"
    assert detect_format(write(tmp_path, "formfeed", "page\fé\x1b[1m\n".encode())).format == "text"


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
