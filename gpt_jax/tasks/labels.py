"""Labels as they are written in tables: which are the same, which are missing, and which are scores rather than classes."""

import collections
import math
import re
from collections.abc import Iterable
from typing import Any

from gpt_jax.errors import UserError, described, listed, shortened
from gpt_jax.tasks.tables import Record, check_rows

MISSING = frozenset(
    {"", "-", "?", ".", "nan", "-nan", "na", "n/a", "<na>", "none", "null", "\\n"}
    | {"#n/a", "#na", "#value!", "#ref!", "#name?", "#div/0!", "#num!", "#null!"}
)
"""Strings that mean a missing label, in lowercase: those of SNLI, pandas, R, Weka, Stata, databases, and spreadsheet errors."""

HIDDEN = "-1"
"""Number that GLUE and tensorflow-datasets write instead of a label in a test split."""

MAX_CLASSES = 1000
"""Maximum number of classes that are read from training rows, and of outputs of a regression."""
FEW_CLASSES = 20
"""Up to this number of classes, every row may have its own."""
MAX_LENGTH = 200
"""Maximum number of characters in a class that is read from training rows."""

_WHOLE = re.compile(r"(-?(?:0|[1-9][0-9]*))(?:\.0*)?")
_NUMBER = re.compile(r"[-+]?[0-9]*[.,]?[0-9]+(?:[eE][-+]?[0-9]+)?")
"""A number, perhaps with a decimal comma as in European spreadsheets."""


def label_text(value: Any) -> str:
    """Returns a label as text. A label has one text, however a file writes it: 1, 1.0 and " 1.0 ", or true and "TRUE".

    Args:
      value: a string, or any value in JSON; None if the row has no such field.

    Raises:
      ValueError: the value is a list, an object or infinite. The message says so.
    """
    if isinstance(value, list | dict) and value:
        raise ValueError(f"the label is {described(value)}; it must be one value")
    if isinstance(value, float) and math.isinf(value):
        raise ValueError("the label is infinite; it must be a class or a score")
    if value is None or value in ([], {}):
        return ""
    text = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()
    if whole := _WHOLE.fullmatch(text):
        return whole[1] if whole[1] != "-0" else "0"
    return text.casefold() if text.casefold() in ("true", "false") else text


def score_of(text: str) -> float | None:
    """Returns a label's text as a number; None if it is not a number, or has a decimal comma."""
    return float(text) if _NUMBER.fullmatch(text) and "," not in text else None


def is_missing(text: str) -> bool:
    """Returns whether the text of a label, if it does not name a class, means that there is no label."""
    return text.casefold() in MISSING


def missing_label_fault(text: str) -> str:
    """Returns the description of a missing label, written as `text`, for an error message."""
    written = f" ('{text}')" if text else ""
    return f"the label is missing{written}, which is only allowed in a test split"


def classes_of(records: Iterable[Record], column: str) -> tuple[str, ...]:
    """Returns the classes of training rows in alphabetical order, or in order of value if all of them are whole numbers.

    Args:
      records: the rows.
      column: the column with the label (`--task.label`).

    Raises:
      UserError: a label is missing or is not one value, two labels differ only in case or blanks, or the labels are scores or
        identifiers rather than classes. The message names rows.
    """
    faults: list[tuple[str, str]] = []
    rows = collections.defaultdict[str, list[str]](list)
    for record in records:
        try:
            text, fault = label_text(record.fields.get(column)), record.fault
        except ValueError as error:
            text, fault = "", record.fault or str(error)
        if not fault and is_missing(text):
            hint = f"; if '{text}' is a class, list the classes in --task.labels" if text else ""
            fault = missing_label_fault(text) + hint
        if fault:
            faults.append((record.where, fault))
        else:
            rows[text].append(record.where)
    check_rows(faults)
    _require_classes(rows, column)
    whole = all(re.fullmatch(r"-?[0-9]{1,18}", text) for text in rows)
    return tuple(sorted(rows, key=int if whole else None))


def _require_classes(rows: dict[str, list[str]], column: str) -> None:
    """Checks that labels, given with the locations of their rows, can be the names of classes."""
    numbers = [text for text in rows if _NUMBER.fullmatch(text)]
    real = [text for text in numbers if not (text.lstrip("+-").isdecimal() or float(text.replace(",", ".")).is_integer())]
    if real and len(numbers) > len(rows) / 2:
        raise UserError(
            f"{rows[real[0]][0]}: the label '{shortened(real[0])}' is a real number, so '{column}' holds scores and not "
            "classes; give their range (--task.score-range LOW HIGH) for a regression, or list the classes (--task.labels)"
        )
    count = sum(map(len, rows.values()))
    too_many = len(rows) > MAX_CLASSES or (len(rows) > FEW_CLASSES and len(rows) > count / 2)
    if too_many or any(len(text) > MAX_LENGTH for text in rows):
        raise UserError(
            f"--task.label: '{column}' has {len(rows):,} different values in {count:,} rows ({listed(rows)}), which look like "
            "identifiers or texts; name another column, list the classes (--task.labels), or give the range (--task.score-range)"
        )
    alike: dict[str, str] = {}
    for text in rows:
        other = alike.setdefault(" ".join(text.split()).casefold(), text)
        if other != text:
            pair = f"the label '{shortened(text)}' differs from '{shortened(other)}' ({rows[other][0]}) only in case or blanks"
            raise UserError(f"{rows[text][0]}: {pair}; write them the same way, or list both in --task.labels")
