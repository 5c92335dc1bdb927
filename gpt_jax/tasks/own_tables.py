"""Tables of users, which spreadsheets, pandas and scripts write in different ways.

The extension of a file says whether it has separators, JSON or Parquet. In a table with separators, the first row names the
columns, and the separator (comma, tab, semicolon or bar) is the one with which the wanted columns appear in it. Cells may be
quoted, but many tables with tabs are not quoted and have stray quotation marks. `_read_tabs` finds out which is the case.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax.errors import UserError, nearest, one_line
from gpt_jax.inputs.archives import max_unpacked_size
from gpt_jax.inputs.formats import BinaryFile, content_suffix, open_file
from gpt_jax.inputs.json_rows import json_lines, json_objects
from gpt_jax.inputs.parquet import ROWS_AT_ONCE
from gpt_jax.tasks.tables import ID_COLUMNS, Record, make_record, parse_csv, read_lines

DELIMITERS = {".csv": ",;\t|", ".tsv": "\t,;|", ".tab": "\t,;|", ".txt": "\t,;|"}
"""Separators by extension, in order of preference."""
JSON = (".jsonl", ".ndjson", ".json")
INNER_RETURN = re.compile(r"\r(?!\n?\Z)")
"""A carriage return that does not end a line."""
MASK = "\ufdd0"
"""A code point that is not a character in any text."""
EXTENSIONS = (*DELIMITERS, *JSON, ".parquet")


class OwnTable(NamedTuple):
    """A user's table."""

    path: Path
    columns: tuple[str, ...]
    records: list[Record]
    note: str = ""
    """Line for the log about an assumption that was made about the file; empty if there was none."""

    def require_column(self, name: str, field: str) -> None:
        """Checks that there is one column with this name.

        Raises:
          UserError: there is no such column, or there are several. The message names the config field `field`.
        """
        count = self.columns.count(name)
        if count == 0:
            raise UserError(f"{self.path}:1: no column '{name}' (--{field}); {nearest(name, self.columns)}")
        if count > 1:
            raise UserError(f"{self.path}:1: {count} columns are named '{name}' (--{field}); give them different names")

    def find_columns(self, name: str, field: str) -> tuple[str, ...]:
        """Returns the column with a name, or the columns whose names it joins with "+"; raises errors as `require_column`."""
        columns = _split_name(name, self.columns)
        for column in columns:
            self.require_column(column, field)
        return columns


def _split_name(name: str, columns: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of columns that a name joins with "+". A column whose own name contains it is preferred."""
    words, parts = name.split("+"), []
    while words:
        sizes = (size for size in range(len(words), 0, -1) if "+".join(words[:size]).strip() in columns)
        size = next(sizes, 1)
        parts.append("+".join(words[:size]).strip())
        words = words[size:]
    return tuple(parts)


def read_own_table(path: str, field: str, wanted: Iterable[str]) -> OwnTable:
    """Reads a user's table.

    Args:
      path: the file.
      field: the config field that names the file, for error messages.
      wanted: names of columns that the task needs, by which the separator is chosen.

    Raises:
      UserError: there is no such file, its extension is unknown, or its content is malformed. The message names the line.
    """
    file = Path(path)
    extension = content_suffix(file)
    if extension not in EXTENSIONS:
        known = f"{', '.join(EXTENSIONS[:-1])} or {EXTENSIONS[-1]}"
        raise UserError(f"--{field}: the name '{path}' must end in {known}, which determines how the file is read")
    if not file.is_file():
        raise UserError(f"--{field}: there is no file '{path}'")
    if extension in JSON:
        return _read_json(file, json_objects if extension == ".json" else json_lines)
    if extension == ".parquet":
        return _read_parquet(file, tuple(wanted))
    return _read_separated(file, DELIMITERS[extension], tuple(wanted))


def _read_json(file: Path, parse: Callable[[BinaryFile, Path], Iterable[tuple[int, dict[str, Any]]]]) -> OwnTable:
    with open_file(file) as stream:
        records = [Record(f"{file}:{line}", fields) for line, fields in parse(stream, file)]
    columns = dict.fromkeys(column for record in records for column in record.fields)
    return OwnTable(file, tuple(columns), records)


def _read_parquet(file: Path, wanted: Sequence[str]) -> OwnTable:
    """Reads those columns of a Parquet file that the task can need."""
    import pyarrow.parquet

    limit, size = max_unpacked_size(file), 0
    rows: list[dict[str, Any]] = []
    try:
        with file.open("rb") as stream, pyarrow.parquet.ParquetFile(stream) as table:
            names = table.schema_arrow.names
            needed = {*ID_COLUMNS, *(name for spelled in wanted for name in _split_name(spelled, names))}
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=[name for name in dict.fromkeys(names) if name in needed]):
                new = batch.to_pylist()
                # The batch may have a string once that is in all of its rows.
                size += batch.nbytes + sum(len(value) for row in new for value in row.values() if isinstance(value, str))
                if size > limit:
                    raise UserError(f"{file}: its rows take more than {limit:,} bytes, too many for its size; write it as .jsonl")
                rows += new
    except UserError:
        raise
    except Exception as error:  # pyarrow raises exceptions of many types for files that are damaged.
        raise UserError(f"{file}: cannot be read as a Parquet file: {one_line(error)}") from error
    records = [Record(f"{file}: row {number}", _decode_bytes(row, file, number)) for number, row in enumerate(rows, start=1)]
    return OwnTable(file, tuple(names), records)


def _decode_bytes(row: dict[str, Any], file: Path, number: int) -> dict[str, Any]:
    """Decodes the bytes in a row of a Parquet file, as which some programs store strings."""
    try:
        return {name: value.decode() if isinstance(value, bytes) else value for name, value in row.items()}
    except UnicodeDecodeError as error:
        problem = f"byte 0x{error.object[error.start]:02x} is not UTF-8"
        raise UserError(f"{file}: row {number}: {problem}; write texts as strings") from error


# -- tables with separators -------------------------------------------------------------------------------------------------

Rows = list[tuple[int, list[str]]]
"""Cells of rows, each with the number of the line in which it begins."""


def _read_separated(file: Path, delimiters: str, wanted: Sequence[str]) -> OwnTable:
    lines = list(read_lines(file))
    if lines and (
        told := re.fullmatch(r'"?sep=([^\w\s"]|\t)"?\s*', lines[0])
    ):  # Excel obeys this line, and some programs write it.
        delimiters, lines[0] = told[1], "\n"
    header = next((line for line in lines if line.strip()), "")

    def fit(delimiter: str) -> tuple[int, int]:
        """Returns the number of wanted columns that the header has, and that of all its columns."""
        try:
            names = [name.strip() for _, cells in _read_quoted(file, [header], delimiter) for name in cells]
        except UserError:  # The names are not quoted, or one of them has several lines.
            names = [name.strip() for name in header.split(delimiter)]
        return sum(set(_split_name(name, names)) <= set(names) for name in wanted), len(names)

    delimiter = max(delimiters, key=fit)
    rows, note = _read_tabs(file, lines) if delimiter == "\t" else (_read_quoted(file, lines, delimiter), "")
    rows = [(line, cells) for line, cells in rows if any(cell.strip() for cell in cells)]
    columns = tuple(name.strip() for name in rows[0][1]) if rows else ()
    records = [make_record(f"{file}:{line}", columns, cells) for line, cells in rows[1:]]
    return OwnTable(file, columns, [_complete_fault(record, columns, note) for record in records], note)


def _complete_fault(record: Record, columns: tuple[str, ...], note: str) -> Record:
    """Returns the record with a fault also for a second header, and with the note about the table in its fault."""
    fault = record.fault and record.fault + (f" ({note})" if note else "")
    if len(columns) > 1 and tuple(record.fields.values()) == columns:
        fault = "the names of the columns again; remove this row"
    return record._replace(fault=fault)


def _read_quoted(file: Path, lines: Sequence[str], delimiter: str) -> Rows:
    """Returns the rows of a table whose cells may be quoted.

    Python's csv module, and so pandas, writes carriage returns without quotes, but does not read them.
    """
    masked = (INNER_RETURN.sub(MASK, line) for line in lines)
    rows = parse_csv(masked, delimiter, file, skip_spaces=delimiter != "\t")
    return [(line, [cell.replace(MASK, "\r") for cell in cells]) for line, cells in rows]


def _read_tabs(file: Path, lines: Sequence[str]) -> tuple[Rows, str]:
    """Returns the rows of a table with tabs, and a note for the log if it is not certain whether its cells are quoted.

    Cells are quoted if all names of columns are. Otherwise, they are quoted if rows of equal length result only from reading them
    in this way, without taking rows for parts of cells. If both readings give rows of equal length, cells are quoted if every
    cell that begins with a quotation mark needs quotes because of the quotation marks in it.
    """
    plain = [(number, line.rstrip("\r\n").split("\t")) for number, line in enumerate(lines, start=1)]
    opened = [cell for _, cells in plain for cell in cells if cell.startswith('"')]
    if not opened:
        return plain, ""
    if all(cell.startswith('"') for cell in next(cells for _, cells in plain if any(cells))):
        return _read_quoted(file, lines, "\t"), ""
    try:
        quoted = _read_quoted(file, lines, "\t")
    except UserError:
        quoted = []
    possible = bool(quoted) and _are_equal(quoted)
    likely = possible and not _takes_rows_for_cells(quoted, lines)
    if likely and not _are_equal(plain):
        return quoted, ""
    if likely and all('""' in cell[1:-1] for cell in opened):
        note = f"{file}: quotation marks around cells ({len(opened):,}) are removed, because those in the cells are doubled"
        return quoted, note
    if not possible and _are_equal(plain) and not any(cell.endswith('"', 1) for cell in opened):
        return plain, ""
    note = f"{file}: quotation marks at the beginning of cells ({len(opened):,}) are taken as part of the text"
    return plain, f"{note}; to have quotation marks around cells removed, name the table .csv"


def _takes_rows_for_cells(quoted: Rows, lines: Sequence[str]) -> bool:
    """Returns whether the lines of some row are rows themselves; its first or last line may have as many cells by chance."""
    ends = [line for line, _ in quoted[1:]] + [len(lines) + 1]
    for (begin, cells), end in zip(quoted, ends, strict=True):
        complete = [line.count("\t") == len(cells) - 1 for line in lines[begin - 1 : end - 1] if line.strip()]
        if len(complete) > 1 and (all(complete) or any(complete[1:-1])):
            return True
    return False


def _are_equal(rows: Rows) -> bool:
    """Returns whether all rows that are not blank have the same number of cells."""
    return len({len(cells) for _, cells in rows if any(cells)}) <= 1
