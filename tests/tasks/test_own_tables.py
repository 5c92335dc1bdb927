"""Tests of the reader of users' tables on what spreadsheets, pandas, R and scripts write, and on damaged files."""

import csv
import gzip
import io
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_jax.errors import UserError
from gpt_jax.tasks.own_tables import OwnTable, read_own_table

LONG = "long " * 28_000
"""A text of 140,000 characters, which exceeds the csv module's own limit."""


@pytest.fixture(autouse=True)
def small_cells() -> None:
    """Sets the csv module's limit as it is in a new process."""
    csv.field_size_limit(131_072)


def read(folder: Path, name: str, content: str | bytes, wanted: tuple[str, ...] = ("text", "label")) -> OwnTable:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_own_table(str(path), "task.train", wanted)


def rows_of(table: OwnTable, *columns: str) -> list[tuple[Any, ...]]:
    assert not [record for record in table.records if record.fault]
    return [tuple(record.fields[column] for column in columns or ("text", "label")) for record in table.records]


def lines_of(table: OwnTable) -> list[int]:
    return [int(record.where.rpartition(":")[2]) for record in table.records]


def error_of(folder: Path, name: str, content: str | bytes) -> str:
    with pytest.raises(UserError) as error:
        read(folder, name, content)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1000
    return str(error.value)


def written(rows: list[list[str]], **options: Any) -> str:
    """Returns a table as Python's csv module writes it, and pandas with it."""
    file = io.StringIO()
    csv.writer(file, **options).writerows(rows)
    return file.getvalue()


# -- separators and quotes --------------------------------------------------------------------------------------------------

TEXTS = ["plain", "tab\there", "line\nend", 'say "x"', '"quoted"', "comma, semicolon; bar|", LONG, "naïve “é”"]
TABLE = [["text", "label"], *([text, str(number % 2)] for number, text in enumerate(TEXTS))]


@pytest.mark.parametrize("name", ["a.csv", "a.CSV", "a.tsv", "a.txt"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tables_of_pandas_and_spreadsheets(tmp_path, name, delimiter, quoting, end):
    table = read(tmp_path, name, written(TABLE, delimiter=delimiter, quoting=quoting, lineterminator=end))
    assert rows_of(table) == [(text, str(number % 2)) for number, text in enumerate(TEXTS)]
    assert lines_of(table) == [2, 3, 4, 6, 7, 8, 9, 10]
    uncertain = delimiter == "\t" and quoting == csv.QUOTE_MINIMAL
    assert table.note == (f"{tmp_path}/{name}: quotation marks around cells (4) are removed" if uncertain else "")


def test_a_long_cell_without_quotes(tmp_path):
    for name, separator in (("a.csv", ","), ("a.tsv", "\t")):
        assert rows_of(read(tmp_path, name, f"text{separator}label\n{LONG}{separator}1\n")) == [(LONG, "1")]


def test_the_separator_makes_the_wanted_columns_appear(tmp_path):
    assert rows_of(read(tmp_path, "a.csv", "text\tlabel\na, b\t1\nc;d\t0\n")) == [("a, b", "1"), ("c;d", "0")]
    assert rows_of(read(tmp_path, "a.tsv", "text,label\na\tb,1\n")) == [("a\tb", "1")]
    assert rows_of(read(tmp_path, "a.csv", "notes;x,text,label\n1,a,b\n")) == [("a", "b")]
    table = read(tmp_path, "a.csv", "Text;Label\na;1\n")  # Misspelled columns should be listed as columns.
    assert table.columns == ("Text", "Label")
    assert rows_of(read(tmp_path, "a.csv", "text\nonly; one\n"), "text") == [("only; one",)]


def test_a_line_before_the_names_of_the_columns_is_refused(tmp_path):
    """Some programs write the separator there, for Excel, or a comment."""
    for line in ("sep=;", "sep=,", "sep=\t", "# exported today"):
        table = read(tmp_path, "a.csv", f"{line}\r\ntext;label\r\na;1\r\n")
        with pytest.raises(UserError, match=rf"^{tmp_path}/a.csv:1: no column 'text' \(--task.texts\); known: {line[:3]}"):
            table.find_columns("text", "task.texts")


def test_spaces_may_follow_the_separator(tmp_path):
    assert rows_of(read(tmp_path, "a.csv", 'label, text\n1, "a, b"\n0, plain\n')) == [("a, b", "1"), ("plain", "0")]


@pytest.mark.parametrize(
    ("content", "columns"),
    [
        (",text,label\n0,a,1\n1,b,0\n", ("", "text", "label")),  # pandas.to_csv with its index
        ("text,label,\na,1,\nb,0,\n", ("text", "label", "")),
        ("text,label,,\na,1,,\nb,0,,\n", ("text", "label", "", "")),
        (" text , label \na,1\nb,0\n", ("text", "label")),
        ("\ufefftext,label\na,1\nb,0\n", ("text", "label")),
        ("id,x,x,text,label\n7,1,2,a,1\n8,3,4,b,0\n", ("id", "x", "x", "text", "label")),
    ],
)
def test_columns_that_are_not_wanted_do_no_harm(tmp_path, content, columns):
    table = read(tmp_path, "a.csv", content)
    assert table.columns == columns
    assert rows_of(table) == [("a", "1"), ("b", "0")]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_blank_rows_are_skipped_and_any_line_end_is_accepted(tmp_path, name, end):
    cell = "," if name.endswith("csv") else "\t"
    lines = ["", f"text{cell}label", "", f"a{cell}1", cell, "  ", f"b{cell}0", f" {cell} ", ""]
    table = read(tmp_path, name, end.join(lines))
    assert rows_of(table) == [("a", "1"), ("b", "0")]
    assert lines_of(table) == [4, 7]


def test_only_line_feeds_end_lines_if_there_are_any(tmp_path):
    """Texts from the web contain these characters, which Python's `str.splitlines` takes for line ends."""
    text = "a\u2028b\x0bc\x0cd\x85e\x1cf"
    assert rows_of(read(tmp_path, "a.tsv", f"text\tlabel\n{text}\t1\n")) == [(text, "1")]
    assert rows_of(read(tmp_path, "a.csv", f"text,label\n{text},1\n")) == [(text, "1")]
    for name in ("a.tsv", "a.csv"):  # Before Python 3.13, the csv module does not quote carriage returns.
        cells = [["text", "label"], ["a\rb", "1"], ["\rc\t,\r", "0"]]
        content = written(cells, delimiter="\t" if name == "a.tsv" else ",", lineterminator="\n")
        assert rows_of(read(tmp_path, name, content)) == [("a\rb", "1"), ("\rc\t,\r", "0")]


def test_rows_with_too_few_or_too_many_cells_have_a_fault(tmp_path):
    table = read(tmp_path, "a.csv", "text,label\na,1\nb\nc,d,0\n")
    assert [record.fault for record in table.records] == [
        "",
        "1 columns; there must be 2: text, label",
        "3 columns; there must be 2: text, label",
    ]
    table = read(tmp_path, "a.tsv", '"text"\t"label"\n"1"\t"a"\t"x"\n')  # R writes no name for the column of row names.
    assert table.records[0].fault == "3 columns; there must be 2: text, label"


def test_a_second_header_is_refused_and_not_a_class(tmp_path):
    """Tables that were joined with `cat` have one for each of them."""
    table = read(tmp_path, "a.csv", "text,label\na,1\ntext, label\nb,0\n")
    assert [record.fault for record in table.records] == ["", "repeats the names of the columns; remove this row", ""]
    table = read(tmp_path, "a.csv", "\ufefftext,label\na,1\n\ufefftext,label\nb,0\n")  # Each has a byte-order mark.
    assert table.records[1].fault == "repeats the names of the columns; remove this row"
    assert rows_of(read(tmp_path, "a.csv", "text\ntext\n"), "text") == [("text",)]


# -- quotation marks in tables with tabs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "texts", "noted"),
    [
        ('text\tlabel\nHe said "so.\t1\nb\t0\n', ['He said "so.', "b"], False),
        ('text\tlabel\n"x\tyes\ny"\tno\nz\t"\n', ['"x', 'y"', "z"], True),  # The last one is not closed.
        ('text\tlabel\n"A\t1\nB."\t0\n', ['"A', 'B."'], True),  # If this were a quoted cell, two rows would be one.
        ('text\tlabel\n"x\tyes\n1\tno\n2\tno\ny"\tno\n', ['"x', "1", "2", 'y"'], True),
        ('text\tlabel\n"A" b"" c."\t1\nd\t0\n', ['"A" b"" c."', "d"], True),
    ],
)
def test_stray_quotation_marks_are_text_with_a_note_if_they_begin_cells(tmp_path, content, texts, noted):
    table = read(tmp_path, "a.tsv", content)
    assert [text for text, _ in rows_of(table)] == texts
    note = rf"{tmp_path}/a.tsv: quotation marks at the beginning of cells \([12]\) are taken as part of the text; if they enclose"
    assert re.match(note, table.note) if noted else table.note == ""


def test_rows_are_not_taken_for_a_part_of_a_quoted_cell_because_one_of_them_is_broken(tmp_path):
    table = read(tmp_path, "a.tsv", 'text\tlabel\n"x\tyes\na\tb\tc\n1\tno\ny"\tno\n')
    assert [record.fields["text"] for record in table.records] == ['"x', "a", "1", 'y"']
    assert [bool(record.fault) for record in table.records] == [False, True, False, False]


def test_quotation_marks_around_whole_cells_are_kept_with_a_note(tmp_path):
    """Neither pandas nor a table without quoting would write this cell differently if its text had quotation marks."""
    table = read(tmp_path, "a.tsv", 'text\tlabel\n"Great film!"\t1\nbad\t0\n"So so."\t0\n')
    assert rows_of(table) == [('"Great film!"', "1"), ("bad", "0"), ('"So so."', "0")]
    assert table.note == (
        f"{tmp_path}/a.tsv: quotation marks at the beginning of cells (2) are taken as part of the text; if they enclose cells, "
        "put them around the names of the columns, too"
    )
    table = read(tmp_path, "a.tsv", '"text"\t"label"\n"Great film!"\t1\nbad\t0\n"So so."\t0\n')  # as the note says
    assert rows_of(table) == [("Great film!", "1"), ("bad", "0"), ("So so.", "0")]
    assert table.note == ""


def test_quotation_marks_that_were_doubled_are_removed_with_a_note(tmp_path):
    """Only the doubled quotation marks tell this table of pandas from one without quoting."""
    table = read(tmp_path, "a.tsv", written([["text", "label"], ['"A" b', "1"], ["c", "0"]], delimiter="\t"))
    assert rows_of(table) == [('"A" b', "1"), ("c", "0")]
    assert table.note == f"{tmp_path}/a.tsv: quotation marks around cells (1) are removed"
    table = read(tmp_path, "a.tsv", 'text\tlabel\n"""A"" b"\t1\n"Great film!"\t0\n')
    assert rows_of(table) == [('"""A"" b"', "1"), ('"Great film!"', "0")]
    assert "(2) are taken as part of the text" in table.note


def test_a_broken_row_among_quoted_cells_is_named(tmp_path):
    table = read(tmp_path, "a.tsv", 'text\tlabel\n"a\tb"\t1\nc\t0\nd\te\tf\n')
    fault = f"3 columns; there must be 2: text, label ({tmp_path}/a.tsv: quotation marks at the beginning of cells (1) are taken"
    assert [record.fault.startswith(fault) for record in table.records] == [True, False, True]
    assert error_of(tmp_path, "a.tsv", '"text"\t"label"\n"a"\t"1"\n"b\t"0"\n') == (
        f"{tmp_path}/a.tsv:3: '\\t' expected after '\"'; quote cells that contain separators or quotes, and double those quotes"
    )


properties = settings(max_examples=200, derandomize=True, database=None, deadline=None)
"""Many small tables, of which a few are read differently from how they were written, or refused."""


def check_texts(table: str, rows: list[tuple[str, ...]], columns: list[str]) -> None:
    """Checks that a table is read as it was written, refused, or read differently with a note."""
    with tempfile.TemporaryDirectory() as folder:
        read_back = read(Path(folder), "a.tsv", table, tuple(columns))
    if not any(record.fault for record in read_back.records) and not read_back.note:
        expected = [[cell.strip() for cell in row] for row in rows]  # A carriage return at the end of a row is a line end.
        assert [[record.fields[column].strip() for column in columns] for record in read_back.records] == list(
            filter(any, expected)
        )


@pytest.mark.parametrize("columns", [["text"], ["text", "label"], ["text", "label", "more"]])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@properties
@given(data=st.data())
def test_quoted_texts_are_not_changed_in_silence(columns, quoting, data):
    cells = st.tuples(*[st.text('"\t\n\rab ,', max_size=6)] * len(columns))
    rows = data.draw(st.lists(cells, max_size=6))
    check_texts(written([columns, *rows], delimiter="\t", quoting=quoting, lineterminator="\n"), rows, columns)


@pytest.mark.parametrize("columns", [["text"], ["text", "label"], ["text", "label", "more"]])
@properties
@given(data=st.data())
def test_texts_without_quoting_are_not_changed_in_silence(columns, data):
    cells = st.tuples(*[st.text('"ab ,', max_size=6)] * len(columns))
    rows = data.draw(st.lists(cells, max_size=6))
    check_texts("".join("\t".join(row) + "\n" for row in [columns, *rows]), rows, columns)


# -- JSON, Parquet and compressed files -------------------------------------------------------------------------------------

OBJECTS = [{"text": "a\nb", "label": 1}, {"text": LONG, "label": None}, {"text": "c"}]


def parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


FORMATS = {
    "a.jsonl": "".join(json.dumps(row) + "\n" for row in OBJECTS).encode(),
    "a.NDJSON": "".join(json.dumps(row) + "\n\n" for row in OBJECTS).encode(),
    "a.json": json.dumps(OBJECTS, indent=1).encode(),
    "b.json": "\n".join(map(json.dumps, OBJECTS)).encode(),
    "a.parquet": parquet(OBJECTS),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("pack", [lambda data: data, lambda data: gzip.compress(data), lambda data: zstandard.compress(data)])
def test_json_and_parquet_also_compressed(tmp_path, name, pack):
    packed = pack(FORMATS[name])
    if packed != FORMATS[name] and name == "a.parquet":
        return  # Parquet has its own compression.
    table = read(tmp_path, name, packed)
    assert table.columns == ("text", "label")
    assert [(record.fields["text"], record.fields.get("label")) for record in table.records] == [
        ("a\nb", 1),
        (LONG, None),
        ("c", None),
    ]


def test_rows_are_named_by_their_line_or_number(tmp_path):
    wheres = {name: [record.where for record in read(tmp_path, name, content).records] for name, content in FORMATS.items()}
    assert wheres["a.jsonl"] == [f"{tmp_path}/a.jsonl:{line}" for line in (1, 2, 3)]
    assert wheres["a.NDJSON"] == [f"{tmp_path}/a.NDJSON:{line}" for line in (1, 3, 5)]
    assert wheres["a.json"] == [f"{tmp_path}/a.json:{line}" for line in (2, 6, 10)]
    table = read(tmp_path, "c.json", json.dumps(OBJECTS))  # as pandas writes it
    assert [record.where for record in table.records] == [f"{tmp_path}/c.json:1{n}" for n in ("", " (object 2)", " (object 3)")]
    assert wheres["a.parquet"] == [f"{tmp_path}/a.parquet: row {row}" for row in (1, 2, 3)]


@pytest.mark.parametrize("name", ["a.csv.gz", "a.CSV.GZ", "a.tsv.zst", "a.csv"])
def test_compressed_tables_with_separators(tmp_path, name):
    pack = zstandard.compress if name.endswith("zst") else gzip.compress
    assert rows_of(read(tmp_path, name, pack(b"text,label\na,1\n"))) == [("a", "1")]


def test_parquet_columns_that_are_not_wanted_are_not_read(tmp_path):
    rows = [{"text": "a", "label": 1.0, "id": 7, "vector": [1.0] * 100}]
    table = read(tmp_path, "a.parquet", parquet(rows))
    assert table.columns == ("text", "label", "id", "vector")
    assert table.records[0].fields == {"text": "a", "label": 1.0, "id": 7}


def test_parquet_that_would_unpack_to_too_much_is_refused(tmp_path):
    """A dictionary stores a long string once, however many rows have it."""
    text = pyarrow.array(["x" * 1_000_000]).dictionary_encode().dictionary
    table = pyarrow.table({"text": pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1000), text)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet: its texts take more than 67,108,864 bytes, too many for its size"):
        read_own_table(str(tmp_path / "a.parquet"), "task.train", ("text",))


def test_parquet_strings_may_be_stored_as_bytes_or_categories(tmp_path):
    categories = pyarrow.array(["x", "y", "x"]).dictionary_encode()
    table = pyarrow.table({"text": pyarrow.array([b"a", b"b", b"\xc3\xa9"]), "label": categories})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert rows_of(read_own_table(str(tmp_path / "a.parquet"), "task.train", ("text", "label"))) == [
        ("a", "x"),
        ("b", "y"),
        ("é", "x"),
    ]
    message = error_of(tmp_path, "a.parquet", parquet([{"text": b"\xff", "label": 1}]))
    assert message == f"{tmp_path}/a.parquet: row 1 of the column 'text': byte 0xff is not UTF-8"


# -- columns by name --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "columns", "found"),
    [
        ("body", ("title", "body"), ("body",)),
        ("title+body", ("title", "body"), ("title", "body")),
        ("title + body", ("title", "body"), ("title", "body")),
        ("title+body", ("title", "title+body", "body"), ("title+body",)),
        ("C++", ("C++", "C"), ("C++",)),
        ("+", ("+", "a"), ("+",)),
    ],
)
def test_names_joined_with_plus(tmp_path, name, columns, found):
    assert OwnTable(tmp_path, columns, []).find_columns(name, "task.texts") == found


@pytest.mark.parametrize(
    ("name", "columns", "message"),
    [
        ("text", ("Text", "label"), "no column 'text' (--task.texts); did you mean Text?"),
        ("title+bdy", ("title", "body"), "no column 'bdy' (--task.texts); did you mean body?"),
        ("title+", ("title", "body"), "no column '' (--task.texts); known: title, body"),
        ("text", ("text", "text", "label"), "several columns are named 'text' (--task.texts); give them different names"),
        ("text", (), "no column 'text' (--task.texts); there are none"),
        ("text", ("I like this film", "1"), "no column 'text' (--task.texts); known: I like this film, 1"),
    ],
)
def test_columns_that_are_absent_or_ambiguous_are_refused(tmp_path, name, columns, message):
    with pytest.raises(UserError) as error:
        OwnTable(tmp_path, columns, []).find_columns(name, "task.texts")
    assert str(error.value) == f"{tmp_path}:1: {message}"


def test_a_table_without_a_header_is_refused_in_a_short_line(tmp_path):
    for columns in ([LONG, "1"], [f"column {number}" for number in range(20_000)]):
        with pytest.raises(UserError) as error:
            read(tmp_path, "a.csv", ",".join(columns) + "\n").find_columns("text", "task.texts")
        assert len(str(error.value)) < 500 + len(str(tmp_path))


# -- files that are not tables ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text,label\nna\xefve,1\n", ":2: byte 0xef is not UTF-8; convert the file to UTF-8"),
        ("a.csv", b"text,label\na\0b,1\n", ":2: a NUL character; the file is damaged, or it is not text"),
        ("a.csv", b'text,label\na,1\n"b,2\n', ":3: unexpected end of data; quote cells that contain separators or quotes"),
        ("a.csv", b'text,label\n"a" b,1\n', ":2: ',' expected after '\"'; quote cells"),
        ("a.txt", "text\tlabel\n".encode("utf-16"), ": .*UTF-16.*iconv"),
        ("a.csv", b"PK\x03\x04....", ": .*zip archive.* not supported; "),  # an .xlsx under another name
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', ":[23]: not valid JSON: Expecting ',' delimiter"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r":1: \\ud800 is half of a surrogate pair"),
        ("a.jsonl", b'{"label": ' + b"9" * 5000 + b"}\n", ":1: not readable: a number has more than 4,300 digits"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, ":1: not readable: its brackets are nested too deeply"),
        ("a.jsonl", b"[1]\n", ":1: a (list|number), not a JSON object with named fields"),
        ("a.json", b'[{"text": "a"}', ":1: not valid JSON: .*array"),
        ("a.parquet", b"PAR1", ": cannot be read as a Parquet file: "),
        ("a.csv.gz", gzip.compress(b"text,label\na,1\n" * 99, mtime=0)[:-20], ": broken gzip archive"),
    ],
)
def test_damaged_files_are_refused_with_their_line(tmp_path, name, content, message):
    assert re.match(re.escape(f"{tmp_path}/{name}") + message, error_of(tmp_path, name, content))


def test_files_that_cannot_be_opened_are_refused(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "link.csv").symlink_to(tmp_path / "nowhere.csv")
    for name in ("folder.csv", "pipe.csv", "link.csv", "absent.csv"):
        with pytest.raises(UserError, match=rf"^--task.test: there is no file '{tmp_path}/{name}'$"):
            read_own_table(str(tmp_path / name), "task.test", ())
    for name in ("rows.xlsx", "rows", "rows.csv.bz2"):
        with pytest.raises(UserError, match=rf"^--task.test: the name '{name}' must end in one of .csv, .*, \.parquet, perhaps "):
            read_own_table(name, "task.test", ())
