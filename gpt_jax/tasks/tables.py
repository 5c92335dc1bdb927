"""Rows of labeled files, and the files of releases: tab-separated, comma-separated, JSON lines, and single JSON objects.

`own_tables` reads the files of users, which may be written in many more ways.
"""

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gpt_jax.errors import UserError, listed, nearest
from gpt_jax.inputs.formats import open_file
from gpt_jax.inputs.json_values import parse_json_object

TableFormat = Literal["tsv", "csv", "jsonl", "json"]
"""`tsv` has no quoting: a tab always separates cells and a line feed always ends a row. `csv` has commas and quotes. `jsonl` has
one object per line, and `json` has one object per file."""

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
    """A description of the error if the number of cells does not match the columns; empty otherwise."""


class RowFaults:
    """The rows of a split that cannot be used, by the kind of their error."""

    def __init__(self) -> None:
        self._rows: dict[str, list[str]] = {}
        self._messages: dict[str, str] = {}

    def add(self, where: str, message: str, kind: str = "") -> None:
        """Adds a row by its location and a description of its error. Errors with the same message are of one kind by default."""
        self._messages.setdefault(kind or message, message)
        self._rows.setdefault(kind or message, []).append(where)

    def check(self) -> None:
        """Raises an error if any rows were added.

        Raises:
          UserError: the message has the first error and its location, the number and locations of the rows with errors of the
            same kind (of which only the first are listed), and the number of rows with other errors.
        """
        if not self._rows:
            return
        kind, wheres = next(iter(self._rows.items()))
        text = f"{wheres[0]}: {self._messages[kind]}"
        if len(wheres) > 1:
            place = wheres[0].rpartition(":")[0] + ":"
            text += f"; rows with such errors: {len(wheres):,} ({listed(where.removeprefix(place).strip() for where in wheres)})"
        others = sum(map(len, self._rows.values())) - len(wheres)
        raise UserError(text + (f"; rows with other errors: {others:,}" if others else ""))


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
    if file_format in ("jsonl", "json"):
        objects = _filled_lines(path) if file_format == "jsonl" else [(1, "".join(read_lines(path)))]
        for line, text in objects:
            fields = parse_json_object(text, path, line)
            _require_columns(required, fields, f"{path}:{line}: no field")
            yield Record(f"{path}:{line}", fields)
        return
    rows = (
        parse_csv(read_lines(path), ",", path)
        if file_format == "csv"
        else ((line, text.split("\t")) for line, text in _filled_lines(path))
    )
    columns = [name.strip() for name in header or next(rows, (1, []))[1]]
    _require_columns(required, columns, f"{path}:1: no column")
    for line, cells in rows:
        yield make_record(f"{path}:{line}", columns, cells)


def make_record(where: str, columns: Sequence[str], cells: Sequence[str]) -> Record:
    """Returns a row of a table with separators."""
    fault = f"{len(cells)} columns; there must be {len(columns)}: {listed(columns)}" if len(cells) != len(columns) else ""
    return Record(where, dict(zip(columns, cells, strict=False)), fault)


def _require_columns(required: Iterable[str], names: Iterable[str], complaint: str) -> None:
    names = list(names)
    for name in required:
        if name not in names:
            raise UserError(f"{complaint} '{name}'; {nearest(name, names)}")


def read_lines(path: Path) -> Iterator[str]:
    """Yields the lines of a file with their line ends. Only a line feed ends a line, since texts contain other separators.

    If there is no line feed, carriage returns end the lines, as on old Macs.

    Raises:
      UserError: as `formats.open_file`; or some bytes are not UTF-8, or are NUL. The message names the line.
    """
    with open_file(path) as file:
        for number, data in enumerate(file, start=1):
            try:
                line = data.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                where = f"{path}:{number}"
                raise UserError(f"{where}: byte 0x{data[error.start]:02x} is not UTF-8; convert the file to UTF-8") from error
            if "\0" in line:
                raise UserError(f"{path}:{number}: a NUL character; the file is damaged, or it is not text")
            # A first line without a line feed is the whole file.
            yield from [line] if number > 1 or line.endswith("\n") else re.findall(r"[^\r]*\r|[^\r]+", line)


def _filled_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the lines that are not empty, with their numbers and without their line ends."""
    for number, text in enumerate(read_lines(path), start=1):
        if line := text.removesuffix("\n").removesuffix("\r"):
            yield number, line


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
        raise UserError(f"{where}: {error}; quote cells that contain commas or quotes, and double those quotes") from error
