"""Rows of Parquet files, read a few at a time."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpt_jax.errors import UserError, nearest, one_line, shortened
from gpt_jax.inputs.archives import max_unpacked_size

ROWS_AT_ONCE = 16
"""Number of rows that are read at a time. A file can repeat one long string in all of its rows, so a small number bounds the
memory; larger numbers are hardly faster."""


def parquet_texts(path: Path, column: str) -> Iterator[str | None]:
    """Yields the strings in a column of a Parquet file, in which nulls are None.

    Raises:
      UserError: as `parquet_rows`; or there is no such column of strings.
    """

    def select(schema: Any) -> list[str]:
        if schema.names.count(column) != 1:
            hint = nearest(column, schema.names) if column not in schema.names else "there are several of this name"
            raise UserError(f"{path}: no column '{column}' (--data.text-field); {hint}")
        kind = schema.field(column).type
        if not _contains_strings(kind):
            raise UserError(f"{path}: the column '{column}' contains {shortened(str(kind))}, not strings")
        return [column]

    return (row[column] for row in parquet_rows(path, select))


def parquet_rows(path: Path, select: Callable[[Any], list[str]]) -> Iterator[dict[str, Any]]:
    """Yields the values of each row of a Parquet file by column. Bytes, as which some programs store strings, are decoded.

    Args:
      path: the file.
      select: returns the names of the wanted columns for a `pyarrow.Schema`, in which they occur once.

    Raises:
      UserError: the file is damaged, would unpack to more than `archives.max_unpacked_size`, or has strings that are not UTF-8.
    """
    number, size, limit = 0, 0, max_unpacked_size(path)
    try:
        import pyarrow.parquet

        with path.open("rb") as file, pyarrow.parquet.ParquetFile(file) as table:
            columns = select(table.schema_arrow)
            if sum(_unpacked_size(table.metadata, column) for column in columns) > limit:
                raise _too_large(path, limit)
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=columns):
                values = [_plain_values(batch.column(column)) for column in columns]
                size += sum(array.nbytes for array in values)
                if size > limit:
                    raise _too_large(path, limit)
                for row in zip(*values, strict=True):
                    number += 1
                    yield {name: _decoded(value.as_py(), path, number, name) for name, value in zip(columns, row, strict=True)}
    except UserError:
        raise
    except Exception as error:  # pyarrow raises exceptions of many types for files that are damaged.
        raise UserError(f"{path}: cannot be read as a Parquet file: {one_line(error)}") from error


def _plain_values(values: Any) -> Any:
    """Returns an array of pyarrow's without its dictionary, and strings as bytes, whose encoding pyarrow does not check."""
    import pyarrow

    values = values.dictionary_decode() if pyarrow.types.is_dictionary(values.type) else values
    return values.cast(pyarrow.large_binary()) if _contains_strings(values.type) else values


def _decoded(value: Any, path: Path, row: int, column: str) -> Any:
    """Returns a value of a row, in which bytes are replaced with a string."""
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        problem = f"byte 0x{error.object[error.start]:02x} is not UTF-8"
        raise UserError(f"{path}: row {row} of the column '{column}': {problem}") from error


def _contains_strings(kind: Any) -> bool:
    """Returns whether a column of this type of pyarrow's contains strings, or bytes, as which some programs store strings."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    texts = (types.is_string, types.is_large_string, types.is_string_view)
    return any(test(kind) for test in (*texts, types.is_binary, types.is_large_binary, types.is_binary_view))


def _unpacked_size(metadata: Any, column: str) -> int:
    """Returns the size in bytes of a column of a Parquet file before compression, according to the file."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)


def _too_large(path: Path, limit: int) -> UserError:
    return UserError(f"{path}: its texts take more than {limit:,} bytes, too many for its size (see the limit for archives)")
