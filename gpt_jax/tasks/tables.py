"""Files of labeled rows: tab-separated, comma-separated, JSON lines, and single JSON objects."""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gpt_jax.errors import UserError, nearest
from gpt_jax.inputs.json_values import parse_json_object

TableFormat = Literal["tsv", "csv", "jsonl", "json"]
"""`tsv` has no quoting: a tab always separates cells and a line feed always ends a row. `csv` has commas and quotes. `jsonl` has
one object per line, and `json` has one object per file."""


class Record(NamedTuple):
    """One row of a file or of a data set, before its texts and label are checked."""

    where: str
    """The row's location for error messages: "file:line"."""
    fields: Mapping[str, Any]
    """The values by column. Except in JSON, all of them are strings."""
    fault: str = ""
    """A description of the error if the number of cells does not match the columns; empty otherwise."""


def read_own_table(path: str, field: str, required: Mapping[str, str]) -> Iterator[Record]:
    """Yields the rows of a user's own file. Its suffix determines the format.

    Args:
      path: the file.
      field: the config field that names the file, for error messages.
      required: as for `read_table`.

    Raises:
      UserError: there is no such file, its suffix is unknown, or its content is malformed (`read_table`).
    """
    file = Path(path).expanduser()
    formats: dict[str, TableFormat] = {".tsv": "tsv", ".csv": "csv", ".jsonl": "jsonl"}
    file_format = formats.get(file.suffix.lower())
    if file_format is None:
        raise UserError(f"--{field}: '{path}' must end in .tsv, .csv or .jsonl, which determines how the file is read")
    if not file.is_file():
        raise UserError(f"--{field}: there is no file '{path}'")
    yield from read_table(file, file_format, required)


def read_table(path: Path, file_format: TableFormat, required: Mapping[str, str], header: Sequence[str] = ()) -> Iterator[Record]:
    """Yields the rows of a file in order. Blank lines and a byte-order mark are skipped.

    Args:
      path: the file.
      file_format: its format.
      required: columns that must be present, each with the config field that names it, for error messages ("" if none does).
      header: the columns of a table without a header row; empty if the first row names them.

    Raises:
      UserError: some bytes are not UTF-8, a column is missing, a quote is not closed, or JSON is malformed. The message names the
        file and the line.
    """
    if file_format in ("jsonl", "json"):
        objects = _filled_lines(path) if file_format == "jsonl" else [(1, "".join(text for _, text in _lines(path)))]
        for line, text in objects:
            fields = parse_json_object(text, path, line)
            _require_columns(required, fields, f"{path}:{line}: no field")
            yield Record(f"{path}:{line}", fields)
        return
    rows = _parse_csv(path) if file_format == "csv" else ((line, text.split("\t")) for line, text in _filled_lines(path))
    columns = [name.strip() for name in header or next(rows, (1, []))[1]]
    _require_columns(required, columns, f"{path}:1: no column")
    for line, cells in rows:
        fault = f"{len(cells)} columns; there must be {len(columns)}: {', '.join(columns)}" if len(cells) != len(columns) else ""
        yield Record(f"{path}:{line}", dict(zip(columns, cells, strict=False)), fault)


def _require_columns(required: Mapping[str, str], names: Iterable[str], complaint: str) -> None:
    names = list(names)
    for name, field in required.items():
        if name not in names:
            hint = nearest(name, names) if names else "there are none"
            raise UserError(f"{complaint} '{name}'{f' (--{field})' if field else ''}; {hint}")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the lines with their numbers and line ends. Only a line feed ends a line, since texts contain other separators."""
    with path.open("rb") as file:
        for number, data in enumerate(file, start=1):
            try:
                yield number, data.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                where = f"{path}:{number}"
                raise UserError(f"{where}: byte 0x{data[error.start]:02x} is not UTF-8; convert the file to UTF-8") from error


def _filled_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the lines that are not empty, with their numbers and without their line ends."""
    for number, text in _lines(path):
        if line := text.removesuffix("\n").removesuffix("\r"):
            yield number, line


def _parse_csv(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields the rows with the number of the line in which each begins. A quoted cell may contain line ends."""
    consumed: list[int] = []  # the lines of the current row, which has several only inside quotes

    def lines() -> Iterator[str]:
        for number, text in _lines(path):
            consumed.append(number)
            yield text

    try:
        for cells in csv.reader(lines(), strict=True):
            if cells:
                yield consumed[0], cells
            consumed.clear()
    except csv.Error as error:
        where = f"{path}:{consumed[0]}"
        raise UserError(f"{where}: {error}; quote cells that contain commas or quotes, and double those quotes") from error
