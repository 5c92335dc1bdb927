"""The text files of a source: formats, identity, what is left out and how it is told, and files that change."""

import gzip
import hashlib
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from gpt_jax.errors import UserError
from gpt_jax.inputs.formats import NotTextError
from gpt_jax.inputs.text_files import MissingSourceError, TextFiles


def pack(content: bytes) -> bytes:
    """Compresses with gzip, without the time of day."""
    return gzip.compress(content, mtime=0)


PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"


def texts_of(
    source: Path | str, log=lambda line: None, *, file_format="auto", text_field="text", allow_skipped=False
) -> TextFiles:
    return TextFiles(str(source), file_format, text_field, allow_skipped, log)


def read(source: Path | str, **options) -> list[str]:
    return list(texts_of(source, **options).documents())


def log_of(source: Path | str, **options) -> list[str]:
    """Returns the lines that are logged while a source is read, without the path of the source."""
    lines: list[str] = []
    list(texts_of(source, lines.append, **options).documents())
    return [line.removeprefix(f"{source}: ") for line in lines]


def rows(*texts: str, field: str = "text") -> bytes:
    return "".join(json.dumps({field: text, "id": 7}) + "\n" for text in texts).encode()


def many(folder: Path, count: int) -> Path:
    """Creates `count` text files of 100 bytes."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        (folder / f"{number:04}.txt").write_text(f"text {number:04}".ljust(99) + "\n")
    return folder


# -- formats ----------------------------------------------------------------------------------------------------------------


def test_a_folder_of_every_format_is_read_in_the_order_of_the_paths(tmp_path):
    (tmp_path / "a.JSON").write_bytes(b'[{"text": "array"}]')
    (tmp_path / "b.json.gz").write_bytes(pack(rows("lines in json")))
    (tmp_path / "c.JSONL").write_bytes(rows("lines"))
    (tmp_path / "d.ndjson.ZST").write_bytes(zstandard.compress(rows("compressed lines")))
    pq.write_table(pa.table({"text": ["table"]}), tmp_path / "e.parquet")
    (tmp_path / "f.md").write_text("# prose")
    (tmp_path / "g.GZ").write_bytes(pack(b"compressed prose"))
    expected = ["array", "lines in json", "lines", "compressed lines", "table", "# prose", "compressed prose"]
    assert read(tmp_path) == expected
    assert log_of(tmp_path) == []


def test_structured_text_under_an_unknown_name_is_refused_unless_the_format_is_settled(tmp_path):
    (tmp_path / "part-00000").write_bytes(rows("one", "two"))
    for source in (tmp_path, tmp_path / "part-00000", tmp_path / "part*"):
        with pytest.raises(UserError, match=r"part-00000: the content is JSON, .* --data.format jsonl or json"):
            read(source)
        assert read(source, file_format="jsonl") == read(source, file_format="json") == ["one", "two"]
        assert read(source, file_format="text") == [rows("one", "two").decode()]


def test_json_named_txt_is_read_as_its_name_says_with_a_line_that_tells(tmp_path):
    (tmp_path / "rows.txt").write_bytes(rows("one"))
    assert read(tmp_path) == [rows("one").decode()]
    message = "read as plain text, although the content is JSON: 1 (rows.txt); --data.format jsonl reads only their text field"
    assert log_of(tmp_path) == log_of(tmp_path / "rows.txt") == [message]
    assert log_of(tmp_path, file_format="text") == []


def test_rows_without_text_are_counted_over_all_files(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": null}\n' + rows("one"))
    (tmp_path / "b.json").write_bytes(b'[{"text": "two"},\n{"text": null}]')
    pq.write_table(pa.table({"text": [None, "three", None]}), tmp_path / "c.parquet")
    assert read(tmp_path) == ["", "one", "two", "", "", "three", ""]
    assert log_of(tmp_path) == ["left out rows whose text is null: 4 (a.jsonl:1, b.json:2, c.parquet: row 1, ...)"]


# -- identity ---------------------------------------------------------------------------------------------------------------


def test_identity_follows_names_and_contents_but_not_the_place(tmp_path, monkeypatch):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("text")
    first = texts_of(tmp_path / "one").identity()
    line = f"{hashlib.sha256(b'text').hexdigest()} 4 a.txt\n"
    assert first == {"files": 1, "bytes": 4, "sha256": hashlib.sha256(line.encode()).hexdigest()}
    (tmp_path / "latest").symlink_to("one")
    monkeypatch.chdir(tmp_path)
    for spelling in (
        tmp_path / "two",
        "one",
        "one/",
        "./one/../two/",
        "latest",
        "latest/",
        "one/a.txt",
        "one/*",
        "one/**",
        "o*/../one/*.txt",
    ):
        if ".." not in str(spelling) or "*" not in str(spelling):
            assert texts_of(spelling).identity() == first, spelling
    (tmp_path / "two" / "a.txt").write_text("tex7")
    assert texts_of(tmp_path / "two").identity() != first
    assert texts_of(tmp_path / "two").size() == {"files": 1, "bytes": 4}
    (tmp_path / "one" / "a.txt").rename(tmp_path / "one" / "b.txt")
    assert texts_of(tmp_path / "one").identity() != first


def test_the_identity_of_a_folder_is_that_of_earlier_versions(tmp_path):
    """Stores record it. Links to files are files of their own; hidden files do not count."""
    for name in ("b/c.txt", "a.txt", "b.txt", ".hidden", ".git/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "link.txt").symlink_to("a.txt")
    digest = hashlib.sha256()
    for name, content in (("a.txt", b"a.txt"), ("b/c.txt", b"b/c.txt"), ("b.txt", b"b.txt"), ("link.txt", b"a.txt")):
        digest.update(f"{hashlib.sha256(content).hexdigest()} {len(content)} {name}\n".encode())
    assert texts_of(tmp_path).identity() == {"files": 4, "bytes": 22, "sha256": digest.hexdigest()}


def test_names_that_are_not_utf8_have_an_identity(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9\n.txt")
    with open(path, "wb") as file:
        file.write(b"text")
    line = hashlib.sha256(b"text").hexdigest().encode() + b" 4 caf\xe9\n.txt\n"
    assert texts_of(tmp_path).identity()["sha256"] == hashlib.sha256(line).hexdigest()
    assert read(tmp_path) == ["text"]


# -- what is left out -------------------------------------------------------------------------------------------------------


def test_hidden_files_are_told_and_cost_nothing(tmp_path):
    many(tmp_path, 2)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "pack").write_bytes(bytes(10_000))
    (tmp_path / ".DS_Store").write_bytes(b"\0")
    assert log_of(tmp_path) == ["left out hidden files and folders: 2 (.DS_Store, .git)"]
    assert log_of(tmp_path / "*") == ["left out hidden files and folders: 2 (.DS_Store, .git)"]
    assert log_of(tmp_path / "*.txt") == []


def test_folders_that_a_glob_leaves_out_are_told(tmp_path):
    many(tmp_path, 2)
    many(tmp_path / "more", 3)
    assert len(read(tmp_path / "*")) == 2
    assert log_of(tmp_path / "*") == ["left out folders that match the glob: 1 (more)"]
    (tmp_path / ".DS_Store").write_bytes(b"\0")
    assert log_of(tmp_path / "*") == ["left out hidden files and folders: 1 (.DS_Store); folders that match the glob: 1 (more)"]
    (tmp_path / ".DS_Store").unlink()
    assert len(read(tmp_path / "**")) == 5
    assert log_of(tmp_path / "**") == []


def test_up_to_a_hundredth_of_the_files_may_be_without_text_and_is_counted(tmp_path):
    many(tmp_path, 299)
    for name in ("empty.txt", "empty2", "empty3"):
        (tmp_path / name).touch()
    many(tmp_path / "more", 1)
    lines = log_of(tmp_path)
    assert lines == [
        "left out: 3 of 303 files, with 0.0% of the bytes, contain no text (empty files: 3 (empty.txt, empty2, empty3))"
    ]
    assert len(read(tmp_path)) == 300
    (tmp_path / "empty4").touch()
    with pytest.raises(
        UserError, match=r"^--data.source: 4 of 304 files, .*empty files: 4 \(empty.txt, empty2, empty3, \.\.\.\)"
    ) as caught:
        read(tmp_path)
    assert str(caught.value).endswith("; remove them, name only the others with a glob, or add --data.allow-skipped True")
    assert len(read(tmp_path, allow_skipped=True)) == 300
    assert log_of(tmp_path, allow_skipped=True)[0].startswith("left out: 4 of 304 files")
    assert len(read(tmp_path / "**" / "*[0-9].txt")) == 300


def test_up_to_a_hundredth_of_the_bytes_may_be_without_text(tmp_path):
    many(tmp_path, 200)
    (tmp_path / "small.png").write_bytes(PNG.ljust(190, b"\0"))
    assert log_of(tmp_path) == ["left out: 1 of 201 files, with 0.9% of the bytes, contain no text (binary files: 1 (small.png))"]
    (tmp_path / "small.png").write_bytes(PNG.ljust(250, b"\0"))
    with pytest.raises(UserError, match=r"1 of 201 files, with 1.2% of the bytes, contain no text"):
        read(tmp_path)


def test_everything_that_is_not_text_is_counted_by_its_kind(tmp_path):
    many(tmp_path, 3)
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "b.zip").write_bytes(b"PK\x03\x04")
    (tmp_path / "c.pdf").write_bytes(b"%PDF-1.7")
    (tmp_path / "d").touch()
    (tmp_path / "e").symlink_to("nowhere")
    os.mkfifo(tmp_path / "f")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "up").symlink_to("../..")
    for options in ({}, {"file_format": "text"}):
        lines = log_of(tmp_path, allow_skipped=True, **options)
        assert len(lines) == 1
        for kind in (
            *(
                "binary files: 1 (a.png)",
                "zip archives: 1 (b.zip)",
                "PDF documents: 1 (c.pdf)",
                "empty files: 1 (d)",
                "links that cannot be followed: 1 (e)",
            ),
            *("pipes and devices: 1 (f)", "links to a folder that contains the source: 1 (sub/up)"),
        ):
            assert kind in lines[0]
        assert "7 of 10 files" in lines[0]


def test_a_folder_without_any_text_is_refused_in_any_case(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    with pytest.raises(UserError, match="contain no text"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"^--data.source: '.*' contains no text$"):
        read(tmp_path, allow_skipped=True)


@pytest.mark.parametrize("content", [b"", PNG, b"PK\x03\x04", pack(b"")])
def test_a_single_file_must_have_text(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(NotTextError, match=rf"^{tmp_path}/file:"):
        read(tmp_path / "file", allow_skipped=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "text".encode("utf-16")),
        ("b.jsonl", b'{"text": '),
        ("c.txt.gz", pack(b"text")[:-2]),
        ("d.txt", b"caf\xe9"),
        ("e.txt", b"version https://git-lfs.github.com/spec/v1\n"),
        ("f", rows("one")),
    ],
)
def test_text_that_cannot_be_read_is_never_left_out(tmp_path, name, content):
    many(tmp_path, 200)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{tmp_path}/{name}:"):
        read(tmp_path, allow_skipped=True)


# -- missing and changing files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{}/novel.txt", r"novel.txt' does not exist; in .*: did you mean novels.txt\?$"),
        ("{}/novel/a.txt", r"novel/a.txt' does not exist; in .*: did you mean novels.txt\?$"),
        ("{}/novel/*.txt", r"novel' does not exist; in .*: did you mean novels.txt\?$"),
        ("{}/zzzzz", r"zzzzz' does not exist; in .*: known: 0, 1, 10, .* and \d+ more$"),
        ("{}/*.md", r"\*.md' contains no files to read$"),
        ("{}/empty", r"empty' contains no files to read$"),
        ("{}/hidden", r"hidden' contains no files to read; hidden files and folders: 1 \(\.a\.txt\)$"),
        ("{}/hid*", r"hid\*' contains no files to read; folders that match the glob: 1 \(hidden\)$"),
        ("{}/pipe", r"pipe' contains no files to read; pipes and devices: 1 \(pipe\)$"),
        ("{}/link", r"link' is a link to 'nowhere', which does not exist$"),
        ("/dev/null", r"'/dev/null' contains no files to read; pipes and devices: 1 \(null\)$"),
    ],
)
def test_a_missing_source_comes_with_the_nearest_names(tmp_path, source, message):
    (tmp_path / "novels.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / ".a.txt").write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    for i in range(30):
        (tmp_path / f"{i}").touch()
    with pytest.raises(MissingSourceError, match=rf"^--data.source: .*{message}"):
        texts_of(source.format(tmp_path))


def test_a_file_name_with_signs_of_a_glob_is_a_file(tmp_path):
    (tmp_path / "a[1].txt").write_text("brackets")
    (tmp_path / "a1.txt").write_text("glob")
    assert read(tmp_path / "a[1].txt") == ["brackets"]
    assert read(tmp_path / "a[12].txt") == ["glob"]


def test_a_file_that_changes_while_the_text_is_read_is_an_error(tmp_path):
    many(tmp_path, 3)
    changed = r"changed while the text was read; run the command again"
    for change, message in (
        (lambda path: path.write_text("longer than before" * 10), changed),
        (lambda path: os.utime(path, ns=(1, 1)), changed),
        (lambda path: path.unlink(), "No such file or directory"),
    ):
        many(tmp_path, 3)
        texts = texts_of(tmp_path)
        documents = texts.documents()
        next(documents)
        change(tmp_path / "0002.txt")
        with pytest.raises(UserError, match=rf"0002.txt: {message}"):
            list(documents)
    many(tmp_path, 3)
    documents = texts_of(tmp_path).documents()
    next(documents)
    (tmp_path / "0000.txt").write_text("changed while it was read")
    with pytest.raises(UserError, match=r"0000.txt: changed while the text was read; run the command again"):
        list(documents)


def test_a_file_that_cannot_be_read_is_named_by_its_identity(tmp_path, monkeypatch):
    many(tmp_path, 3)
    texts = texts_of(tmp_path)
    (tmp_path / "0001.txt").unlink()
    with pytest.raises(UserError, match=r"0001.txt: No such file or directory$"):
        texts.identity()
    monkeypatch.setattr("hashlib.file_digest", lambda *arguments: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(UserError, match=r"0000.txt: Input/output error$"):
        texts.identity()


# -- folders inside ---------------------------------------------------------------------------------------------------------


def test_a_folder_inside_the_source_is_refused(tmp_path):
    many(tmp_path / "texts", 1)
    for source in (tmp_path / "texts", tmp_path / "texts" / "**"):
        with pytest.raises(
            UserError, match=r"^--workdir: '.*texts/run' is inside --data.source '.*': .*; give a folder outside it$"
        ):
            texts_of(source).require_outside(tmp_path / "texts" / "run", "workdir")
    texts_of(tmp_path / "texts" / "*.txt").require_outside(tmp_path / "texts" / "run", "workdir")
    texts_of(tmp_path / "texts" / "0000.txt").require_outside(tmp_path / "texts", "workdir")
