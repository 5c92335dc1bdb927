"""Columns of Parquet files: every type of strings, nulls, missing columns, damage, and files that would fill the memory."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt_jax.errors import UserError
from gpt_jax.inputs import archives
from gpt_jax.inputs.parquet import parquet_texts

TEXTS = [f"text {i}: déjà vu 😀 " + "word " * i for i in range(100)]


def write(path: Path, columns: dict, **options) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd", "brotli", "lz4"])
@pytest.mark.parametrize("row_group_size", [7, 1000])
def test_all_rows_are_read_in_order(tmp_path, compression, row_group_size):
    columns = {"id": list(range(100)), "text": TEXTS, "meta": [{"url": "u", "tags": ["a", None]}] * 100}
    path = write(tmp_path / "a.parquet", columns, compression=compression, row_group_size=row_group_size)
    assert list(parquet_texts(path, "text")) == TEXTS


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
@pytest.mark.parametrize("store_schema", [True, False])
def test_strings_of_every_type_are_read(tmp_path, kind, store_schema):
    values = [None if i % 10 == 3 else text for i, text in enumerate(TEXTS)]
    encoded = [value and value.encode() for value in values] if "binary" in str(kind) else values
    column = pa.array(encoded).dictionary_encode() if "dictionary" in str(kind) else pa.array(encoded, kind)
    path = write(tmp_path / "a.parquet", {"text": column}, store_schema=store_schema)
    assert list(parquet_texts(path, "text")) == values


def test_a_name_with_a_dot_or_the_name_of_a_nested_field_is_one_column(tmp_path):
    columns = {"a": [{"b": "nested"}], "a.b": ["own"], "text": ["t"], "text2": ["u"], "": ["empty"]}
    path = write(tmp_path / "a.parquet", columns)
    assert [list(parquet_texts(path, name)) for name in ("a.b", "text", "text2", "")] == [["own"], ["t"], ["u"], ["empty"]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("txt", r"a.parquet: no column 'txt' \(--data.text-field\); did you mean text\?$"),
        ("id", r"a.parquet: the column 'id' contains int64, not strings$"),
        ("tags", r"a.parquet: the column 'tags' contains list<element: string>, not strings$"),
        ("meta", r"a.parquet: the column 'meta' contains struct<url: string>, not strings$"),
        ("url", r"no column 'url'"),
        ("latin", r"a.parquet: row 2 of the column 'latin': byte 0xe9 is not UTF-8$"),
        ("twice", r"no column 'twice' .*; several columns have this name$"),
    ],
)
def test_a_column_without_texts_is_refused(tmp_path, name, message):
    columns = {"id": [1, 2], "text": ["a", "b"], "tags": [["a"], []], "meta": [{"url": "u"}] * 2, "nothing": [None, None]}
    columns |= {"latin": [b"fine", b"caf\xe9"]}
    table = pa.table(columns).append_column("twice", [["a", "b"]]).append_column("twice", [["c", "d"]])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message):
        list(parquet_texts(tmp_path / "a.parquet", name))


def test_a_column_of_nulls_has_missing_texts(tmp_path):
    assert list(parquet_texts(write(tmp_path / "a.parquet", {"text": [None, None]}), "text")) == [None, None]


def test_a_table_without_rows_is_empty(tmp_path):
    assert list(parquet_texts(write(tmp_path / "a.parquet", {"text": pa.array([], pa.string())}), "text")) == []


def test_a_damaged_file_is_an_error_or_a_result(tmp_path):
    path = write(tmp_path / "a.parquet", {"text": TEXTS}, row_group_size=20)
    whole = path.read_bytes()
    rng = random.Random(0)
    errors = 0
    for size in (0, 4, 8, 100, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"a.parquet: cannot be read as a Parquet file: \w+: "):
            list(parquet_texts(path, "text"))
    for _ in range(100):
        place = rng.randrange(len(whole))
        path.write_bytes(whole[:place] + rng.randbytes(3) + whole[place + 3 :])
        try:
            list(parquet_texts(path, "text"))
        except UserError as error:
            errors += 1
            assert str(error).startswith(str(path))  # noqa: PT017 - Both outcomes are right.
    assert errors > 10


def test_a_file_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "ALWAYS_ALLOWED", 1_000_000)
    repeated = write(tmp_path / "repeated.parquet", {"text": ["z" * 5_000] * 1000})  # stored once, in a dictionary
    zeros = write(tmp_path / "zeros.parquet", {"text": ["z" * 5_000_000]}, use_dictionary=False, compression="zstd")
    for path in (repeated, zeros):
        assert path.stat().st_size < 5_000
        with pytest.raises(UserError, match=rf"{path.name}: its texts take more than [\d,]+ bytes, too many for its size"):
            list(parquet_texts(path, "text"))


def test_what_the_file_itself_says_is_enough_to_refuse_it(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "ALWAYS_ALLOWED", 1_000_000)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *arguments, **options: pytest.fail("rows were read"))
    zeros = write(tmp_path / "zeros.parquet", {"text": ["z" * 5_000_000]}, use_dictionary=False, compression="zstd")
    with pytest.raises(UserError, match="its texts take more than"):
        list(parquet_texts(zeros, "text"))
