"""Users' tables, which spreadsheets, pandas and scripts write in different ways.

A file's extension says whether it contains separators, JSON or Parquet. In a table with separators, the first row names the
columns, and the separator (comma, tab, semicolon or bar) is the one with which the wanted columns appear in it. Cells may be
quoted, but many tables with tabs are not quoted and have stray quotation marks. `_read_tabs` decides which is the case.
"""

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax.errors import UserError
from gpt_jax.inputs.formats import COMPRESSIONS, content_suffix
from gpt_jax.inputs.parquet import parquet_rows
from gpt_jax.tasks import tables
from gpt_jax.tasks.tables import Record

DELIMITERS = {".csv": ",;\t|", ".tsv": "\t,;|", ".tab": "\t,;|", ".txt": "\t,;|"}
"""Separators by extension, in order of preference."""
INNER_RETURN = re.compile(r"\r(?!\n?\Z)")
"""A carriage return that does not end a line."""
MASK = "\ufdd0"
"""A code point that is not a character, so no text contains it."""
EXTENSIONS = (*DELIMITERS, ".jsonl", ".ndjson", ".json", ".parquet")


class OwnTable(NamedTuple):
    """A user's table."""

    path: Path
    columns: tuple[str, ...]
    records: list[Record]
    note: str = ""
    """Line for the log about an assumption that was made about the file; empty if there was none."""

    def require_columns(self, names: Iterable[str], field: str) -> None:
        """Checks that there is one column of each name, which the config field `field` gives; see `tables.require_columns`."""
        tables.require_columns(names, self.columns, f"{self.path}:1", f"--{field}")

    def find_columns(self, name: str, field: str) -> tuple[str, ...]:
        """Returns the column of this name, or the columns that it joins with "+"; raises errors like `require_columns`."""
        columns = _split_name(name, self.columns)
        self.require_columns(columns, field)
        return columns


def _split_name(name: str, columns: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of columns that a name joins with "+". A column of exactly this name is preferred."""
    return (name,) if name in columns else tuple(part.strip() for part in name.split("+"))


def read_own_table(path: str, field: str, wanted: Sequence[str]) -> OwnTable:
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
        endings = f"{', '.join(EXTENSIONS)}, perhaps followed by {', '.join(COMPRESSIONS)}"
        raise UserError(f"--{field}: the name '{path}' must end in one of {endings}")
    if not file.is_file():
        raise UserError(f"--{field}: there is no file '{path}'")
    if extension == ".parquet":
        return _read_parquet(file, wanted)
    if extension in DELIMITERS:
        return _read_separated(file, DELIMITERS[extension], wanted)
    records = list(tables.read_json_records(file))
    return OwnTable(file, tuple(dict.fromkeys(column for record in records for column in record.fields)), records)


def _read_parquet(file: Path, wanted: Sequence[str]) -> OwnTable:
    """Reads the columns of a Parquet file that the task may need."""
    names: list[str] = []

    def select(schema: Any) -> list[str]:
        names.extend(schema.names)
        needed = {*tables.ID_COLUMNS, *(column for name in wanted for column in _split_name(name, names))}
        return [name for name in names if name in needed and names.count(name) == 1]

    records = [Record(f"{file}: row {number}", row) for number, row in enumerate(parquet_rows(file, select), start=1)]
    return OwnTable(file, tuple(names), records)


# -- tables with separators -------------------------------------------------------------------------------------------------

Rows = list[tuple[int, list[str]]]
"""Cells of rows, each with the number of the line in which it begins."""


def _read_separated(file: Path, delimiters: str, wanted: Sequence[str]) -> OwnTable:
    lines = list(tables.read_lines(file))
    header = next((line for line in lines if line.strip()), "").replace("\r", "")

    def fit(delimiter: str) -> tuple[int, int]:
        """Returns the number of wanted columns in the header, and the number of all its columns."""
        names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter, skipinitialspace=True), ())]
        return sum(set(_split_name(name, names)) <= set(names) for name in wanted), len(names)

    csv.field_size_limit(tables.MAX_CELL)
    delimiter = max(delimiters, key=fit)
    rows, note = _read_tabs(file, lines) if delimiter == "\t" else (_read_quoted(file, lines, delimiter), "")
    rows = [(line, cells) for line, cells in rows if any(cell.strip() for cell in cells)]
    columns = tuple(name.strip() for name in rows[0][1]) if rows else ()
    return OwnTable(file, columns, [tables.make_record(f"{file}:{line}", columns, cells, note) for line, cells in rows[1:]], note)


def _read_quoted(file: Path, lines: Iterable[str], delimiter: str) -> Rows:
    """Returns the rows of a table whose cells may be quoted.

    Python's csv module, and therefore pandas, writes carriage returns without quotes, but cannot read them back.
    """
    masked = (INNER_RETURN.sub(MASK, line) for line in lines)
    rows = tables.parse_csv(masked, delimiter, file, skip_spaces=delimiter != "\t")
    return [(line, [cell.replace(MASK, "\r") for cell in cells]) for line, cells in rows]


def _read_tabs(file: Path, lines: Sequence[str]) -> tuple[Rows, str]:
    """Returns the rows of a table with tabs, and a note for the log if it is not certain whether its cells are quoted.

    Cells are quoted if all column names are, or if only reading them as quoted gives rows of equal length and no cell contains a
    line that looks like a row. If both readings give rows of equal length, cells are quoted if every cell that begins with a
    quotation mark contains doubled ones.
    """
    plain = list(tables.parse_tabs(lines))
    opened = [cell for _, cells in plain for cell in cells if cell.startswith('"')]
    if not opened:
        return plain, ""
    if all(cell.startswith('"') for cell in next(cells for _, cells in plain if any(cells))):
        return _read_quoted(file, lines, "\t"), ""
    try:
        quoted = _read_quoted(file, lines, "\t")
    except UserError:
        quoted = []
    inner_lines = ((line, cells) for _, cells in quoted for cell in cells for line in cell.split("\n")[1:-1])
    takes_rows = any(line.count("\t") == len(cells) - 1 for line, cells in inner_lines)
    doubled = all('""' in cell[1:-1] for cell in opened)
    if quoted and _are_equal(quoted) and not takes_rows and (doubled or not _are_equal(plain)):
        return quoted, f"{file}: quotation marks around cells ({len(opened):,}) are removed"
    note = f"{file}: quotation marks at the beginning of cells ({len(opened):,}) are taken as part of the text"
    return plain, f"{note}; if they enclose cells, put them around the names of the columns, too"


def _are_equal(rows: Rows) -> bool:
    """Returns whether all rows that are not blank have the same number of cells."""
    return len({len(cells) for _, cells in rows if any(cells)}) <= 1
