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
    """Yields the strings in a column of a Parquet file, with None for nulls.

    Raises:
      UserError: as `parquet_rows`; or there is no such column of strings.
    """
    kind: Any = None

    def select(schema: Any) -> list[str]:
        nonlocal kind
        if schema.names.count(column) != 1:
            hint = nearest(column, schema.names) if column not in schema.names else "several columns have this name"
            raise UserError(f"{path}: no column '{column}' (--data.text-field); {hint}")
        kind = schema.field(column).type
        return [column]

    for row in parquet_rows(path, select):
        if not isinstance(row[column], str | None):
            raise UserError(f"{path}: the column '{column}' contains {shortened(str(kind))}, not strings")
        yield row[column]


def parquet_rows(path: Path, select: Callable[[Any], list[str]]) -> Iterator[dict[str, Any]]:
    """Yields the values of each row of a Parquet file by column. Bytes are decoded, because some programs store strings as bytes.

    Args:
      path: the file.
      select: returns the names of the wanted columns of a `pyarrow.Schema`, each of which must occur once.

    Raises:
      UserError: the file is damaged, would unpack to more than `archives.max_unpacked_size`, or has strings that are not UTF-8.
    """
    number, size, limit = 0, 0, max_unpacked_size(path)
    try:
        import pyarrow.parquet

        with path.open("rb") as file, pyarrow.parquet.ParquetFile(file) as table:
            columns, metadata = select(table.schema_arrow), table.metadata
            if sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)) > limit:
                raise _too_large(path, limit)
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=columns):
                rows = batch.to_pylist()
                # The batch may store only once a string that is in all of its rows.
                size += batch.nbytes + sum(len(value) for row in rows for value in row.values() if isinstance(value, str | bytes))
                if size > limit:
                    raise _too_large(path, limit)
                for row in rows:
                    number += 1
                    yield {name: _decoded(row[name], path, number, name) for name in columns}
    except UserError:
        raise
    except Exception as error:  # pyarrow raises exceptions of many types for damaged files.
        raise UserError(f"{path}: cannot be read as a Parquet file: {one_line(error)}") from error


def _decoded(value: Any, path: Path, row: int, column: str) -> Any:
    """Returns a value of a row, as a string if it is bytes."""
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        problem = f"byte 0x{error.object[error.start]:02x} is not UTF-8"
        raise UserError(f"{path}: row {row} of the column '{column}': {problem}") from error


def _too_large(path: Path, limit: int) -> UserError:
    return UserError(f"{path}: its texts take more than {limit:,} bytes, too many for its size (see the limit for archives)")
