"""Files of labelled rows: tab-separated, comma-separated, JSON lines, and folders of JSON files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gpt_jax.errors import UserError, described, nearest

Format = Literal["tsv", "csv", "jsonl", "json"]
"""`tsv`: no quoting, a tab always separates and a line end always ends a row; `csv`: commas, with quotes; `jsonl`: an object a
line; `json`: an object a file."""


class Record(NamedTuple):
    """One row as it stands in a file."""

    where: str
    """What an error message names: "file:line"."""
    fields: Mapping[str, Any]
    """Values by the names of their columns; texts, except in JSON."""
    fault: str = ""
    """What is wrong with the row's columns, so that the names may not fit the values; empty: nothing."""


def locate(path: str, field: str) -> tuple[Path, Format]:
    """The file that the config's `field` names, and the format that its ending says.

    Raises:
      UserError: there is no such file, or its ending is not known.
    """
    file = Path(path).expanduser()
    formats: dict[str, Format] = {".tsv": "tsv", ".csv": "csv", ".jsonl": "jsonl"}
    if file.suffix.lower() not in formats:
        raise UserError(f"--{field}: '{path}' ends in none of {', '.join(formats)}, which say how a file is read")
    if not file.is_file():
        raise UserError(f"--{field}: there is no file '{path}'")
    return file, formats[file.suffix.lower()]


def records(path: Path, kind: Format, needed: Mapping[str, str], columns: tuple[str, ...] = ()) -> Iterator[Record]:
    """The rows of a file in their order; blank lines are passed over, and so is a byte-order mark.

    Args:
      path: the file.
      kind: its format.
      needed: columns that must be there, and the config's field that names each ("" where none does), for error messages.
      columns: the names of the columns of a table without a header; empty: its first row names them.

    Raises:
      UserError: with file and line: bytes that are not UTF-8, a missing column, quotes that do not close, malformed JSON.
    """
    if kind in ("tsv", "csv"):
        cells = _tab_separated(path) if kind == "tsv" else _comma_separated(path)
        yield from _named(path, cells, needed, columns)
    else:
        objects = _filled_lines(path) if kind == "jsonl" else iter([(1, "".join(text for _, text in _lines(path)))])
        for line, text in objects:
            fields = _object(path, line, text)
            _require(needed, fields, f"{path}:{line}: no field")
            yield Record(f"{path}:{line}", fields)


def _named(
    path: Path, rows: Iterator[tuple[int, list[str]]], needed: Mapping[str, str], columns: tuple[str, ...]
) -> Iterator[Record]:
    """Puts the names of the columns to the cells of each row."""
    header = [name.strip() for name in columns or next(rows, (1, []))[1]]
    _require(needed, header, f"{path}:1: no column")
    for line, cells in rows:
        fault = "" if len(cells) == len(header) else f"columns: {len(cells)}; there must be {len(header)}: {', '.join(header)}"
        yield Record(f"{path}:{line}", dict(zip(header, cells, strict=False)), fault)


def _require(needed: Mapping[str, str], names: Any, complaint: str) -> None:
    for name, field in needed.items():
        if name not in names:
            hint = nearest(name, names) if names else "there are none"
            raise UserError(f"{complaint} '{name}'{f' (--{field})' if field else ''}; {hint}")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines with their numbers and their ends. Only a line feed ends one: texts have Unicode's other separators in them."""
    with path.open("rb") as file:
        for number, data in enumerate(file, start=1):
            try:
                yield number, data.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                where = f"{path}:{number}"
                raise UserError(f"{where}: byte 0x{data[error.start]:02x} is not UTF-8; convert the file to UTF-8") from error


def _filled_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, with their numbers and without their ends."""
    for number, text in _lines(path):
        if line := text.removesuffix("\n").removesuffix("\r"):
            yield number, line


def _tab_separated(path: Path) -> Iterator[tuple[int, list[str]]]:
    for number, line in _filled_lines(path):
        yield number, line.split("\t")


def _comma_separated(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows with the number of the line that each begins in: a quoted cell may hold line ends."""
    taken: list[int] = []  # The reader takes another line only inside of quotes, so these are the lines of one row.

    def lines() -> Iterator[str]:
        for number, text in _lines(path):
            taken.append(number)
            yield text

    try:
        for cells in csv.reader(lines(), strict=True):
            if cells:
                yield taken[0], cells
            taken.clear()
    except csv.Error as error:
        raise UserError(f"{path}:{taken[0]}: {error}; quote a cell that holds commas or quotes, and double its quotes") from error


def _object(path: Path, line: int, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}:{line + error.lineno - 1}"
        raise UserError(f"{where}: not a JSON object: {error.msg} at column {error.colno}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}:{line}: {described(value)}, not a JSON object with named fields")
    return value
