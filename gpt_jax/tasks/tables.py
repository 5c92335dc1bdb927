"""Rows of labeled files, and the files of releases: tab-separated, comma-separated, JSON lines, and single JSON objects.

`own_tables` reads users' files, which may be written in many more ways.
"""

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gpt_jax.errors import UserError, listed, nearest
from gpt_jax.inputs.formats import decode_text, open_file
from gpt_jax.inputs.json_rows import json_objects

TableFormat = Literal["tsv", "csv", "json"]
"""`tsv` has no quoting: a tab always separates cells and a line feed always ends a row. `csv` has commas and quotes. `json` has
objects, for example one on each line."""

ID_COLUMNS = ("index", "idx", "id", "pairID", "InputStoryid")
"""Columns that identify a row, in order of preference. Rows without any of them are numbered from 0."""

MAX_CELL = 2**31 - 1
"""Maximum number of characters in a cell. The csv module's own limit is 131,072."""


class Record(NamedTuple):
    """One row of a file or of a data set, before its texts and label are checked."""

    where: str
    """The row's location for error messages: "file:line"."""
    fields: Mapping[str, Any]
    """The values by column. Except in JSON and Parquet, all of them are strings."""
    fault: str = ""
    """A description of the error if the cells do not match the columns; empty otherwise."""


def check_rows(faults: Sequence[tuple[str, str]]) -> None:
    """Checks that there are no faulty rows. Each is given by its location and a description of its error.

    Raises:
      UserError: there are some. The message has the first row's location and error, the number of rows, and the first few
        locations.
    """
    if faults:
        where, message = faults[0]
        file = where.rpartition(":")[0] + ":"
        rows = listed(other.removeprefix(file).strip() for other, _ in faults)
        raise UserError(f"{where}: {message}" + (f"; rows with errors: {len(faults):,} ({rows})" if len(faults) > 1 else ""))


def read_table(path: Path, file_format: TableFormat, required: Iterable[str], header: Sequence[str] = ()) -> Iterator[Record]:
    """Yields the rows of a file of a release in order. Blank lines and a byte-order mark are skipped.

    Args:
      path: the file.
      file_format: its format.
      required: columns that must be present.
      header: the columns of a table without a header row; empty if the first row names them.

    Raises:
      UserError: some bytes are not UTF-8, a column is missing, a quote is not closed, or JSON is malformed. The message names the
        file and the line.
    """
    if file_format == "json":
        for record in read_json_records(path):
            require_columns(required, tuple(record.fields), record.where)
            yield record
        return
    rows = parse_csv(read_lines(path), ",", path) if file_format == "csv" else parse_tabs(read_lines(path))
    columns = [name.strip() for name in header or next(rows, (1, []))[1]]
    require_columns(required, columns, f"{path}:1")
    for line, cells in rows:
        yield make_record(f"{path}:{line}", columns, cells)


def read_json_records(path: Path) -> Iterator[Record]:
    """Yields the objects of a JSON file: one per line, in an array, or one after the other.

    Raises:
      UserError: the file is malformed. The message names the line.
    """
    last = 0
    with open_file(path) as file:
        for number, (line, fields) in enumerate(json_objects(file, path), start=1):
            # Many programs write arrays without line ends.
            place = f" (object {number:,})" if line == last else ""
            yield Record(f"{path}:{line}{place}", fields)
            last = line


def make_record(where: str, columns: Sequence[str], cells: Sequence[str], note: str = "") -> Record:
    """Returns a row of a table with separators. `note` says what was assumed about the table, for the row's fault."""
    fault = ""
    if len(cells) != len(columns):
        fault = f"{len(cells)} columns; there must be {len(columns)}: {listed(columns)}" + (f" ({note})" if note else "")
    elif len(columns) > 1 and [cell.strip() for cell in cells] == list(columns):
        fault = "repeats the names of the columns; remove this row"
    return Record(where, dict(zip(columns, cells, strict=False)), fault)


def require_columns(wanted: Iterable[str], names: Sequence[str], where: str, option: str = "") -> None:
    """Checks that each wanted column of a table, or field of a JSON object, occurs once among the names.

    Raises:
      UserError: one does not. The message names the location, and the option that gives the column, if there is one.
    """
    given = f" ({option})" if option else ""
    for name in wanted:
        if name not in names:
            raise UserError(f"{where}: no column '{name}'{given}; {nearest(name, names)}")
        if names.count(name) > 1:
            raise UserError(f"{where}: several columns are named '{name}'{given}; give them different names")


def read_lines(path: Path) -> Iterator[str]:
    """Yields the lines of a file with their line ends. Only a line feed ends a line, since texts contain other line separators.

    If there is no line feed, carriage returns end the lines, as on old Macs.

    Raises:
      UserError: as `formats.open_file`; or some bytes are not UTF-8, or are NUL. The message names the line.
    """
    with open_file(path) as file:
        for number, data in enumerate(file, start=1):
            # Concatenated tables have a byte-order mark before each header.
            line = decode_text(data, path, number).removeprefix("\ufeff")
            if "\0" in line:
                raise UserError(f"{path}:{number}: a NUL character; the file is damaged, or it is not text")
            # A first line without a line feed is the whole file.
            yield from [line] if number > 1 or line.endswith("\n") else re.findall(r"[^\r]*\r|[^\r]+", line)


def parse_tabs(lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Yields the rows of an unquoted table with tabs, each with the number of its line. Empty lines are skipped."""
    for number, line in enumerate(lines, start=1):
        if content := line.rstrip("\r\n"):
            yield number, content.split("\t")


def parse_csv(lines: Iterable[str], delimiter: str, path: Path, skip_spaces: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Yields the rows with the number of the line in which each begins. A quoted cell may contain line ends.

    Args:
      lines: the lines, with their line ends.
      delimiter: the separator of the cells.
      path: the file, for error messages.
      skip_spaces: whether spaces at the beginning of a cell are removed, so that a quote may follow them.

    Raises:
      UserError: a quote is not closed, or something follows a closing quote.
    """
    csv.field_size_limit(MAX_CELL)
    rows = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=skip_spaces)
    begin = 1
    try:
        for cells in rows:
            if cells:
                yield begin, cells
            begin = rows.line_num + 1
    except csv.Error as error:
        where = f"{path}:{begin}"
        raise UserError(f"{where}: {error}; quote cells that contain separators or quotes, and double those quotes") from error
