"""Labels as they are written in tables: which are the same, which are missing, and which are scores rather than classes."""

import collections
import math
import re
from collections.abc import Iterable
from typing import Any

from gpt_jax.errors import UserError, described, listed, shortened
from gpt_jax.tasks.tables import Record, RowFaults

WORDS = frozenset({"none", "na", "n/a", "null"})
"""Words for a missing label, in lowercase, that may also be the name of a class."""

MISSING = WORDS | {"", "-", "nan", "-nan", "<na>", "#n/a", "#na", "#value!", "#ref!", "#name?", "#div/0!", "#num!", "#null!"}
"""Texts for a missing label, in lowercase: an empty cell, that of SNLI, those of pandas, and the errors of spreadsheets."""

HIDDEN = "-1"
"""Number that GLUE and tensorflow-datasets write instead of a label in a test split."""

MAX_CLASSES = 1000
"""Maximum number of classes that are read from training rows, and of outputs of a regression."""
FEW_CLASSES = 20
"""Number of classes up to which there may be one for each row."""
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
    """Returns the number that a label's text is; None if it is not a number, or has a decimal comma."""
    return float(text) if _NUMBER.fullmatch(text) and "," not in text else None


def is_missing(text: str) -> bool:
    """Returns whether the text of a label, if it does not name a class, says that there is no label."""
    return text.casefold() in MISSING


def missing_label_fault(text: str, own: bool) -> str:
    """Returns the description of a missing label, written as `text`, for an error message; `own`: the task is user-defined."""
    written = f" ('{text}')" if text else ""
    hint = f"; if '{text}' is a class, list the classes in --task.labels" if own and text.casefold() in WORDS else ""
    return f"the label is missing{written}, which is only allowed in a test split{hint}"


def classes_of(records: Iterable[Record], column: str) -> tuple[str, ...]:
    """Returns the classes of training rows in alphabetical order, or in order of value if all of them are whole numbers.

    Args:
      records: the rows.
      column: the column with the label (`--task.label`).

    Raises:
      UserError: a label is missing or is not one value, two labels differ only in case or blanks, or the labels are scores or
        identifiers and not classes. The message names rows.
    """
    faults = RowFaults()
    counts: collections.Counter[str] = collections.Counter()
    first_rows: dict[str, str] = {}
    for record in records:
        try:
            text = label_text(record.fields.get(column))
        except ValueError as error:
            faults.add(record.where, str(error), "not one label")
            continue
        if record.fault:
            faults.add(record.where, record.fault, "cells")
        elif is_missing(text):
            faults.add(record.where, missing_label_fault(text, own=True), "missing label")
        else:
            counts[text] += 1
            first_rows.setdefault(text, record.where)
    faults.check()
    _require_classes(counts, first_rows, column)
    whole = all(re.fullmatch(r"-?[0-9]{1,18}", text) for text in counts)
    return tuple(sorted(counts, key=int if whole else None))


def _require_classes(counts: collections.Counter[str], first_rows: dict[str, str], column: str) -> None:
    """Checks that labels can be the names of classes."""
    rows = counts.total()
    numbers = list(counts) if all(map(_NUMBER.fullmatch, counts)) else []
    real = [text for text in numbers if not (text.lstrip("+-").isdecimal() or float(text.replace(",", ".")).is_integer())]
    if real:
        raise UserError(
            f"{first_rows[real[0]]}: the label '{shortened(real[0])}' is a real number, so '{column}' holds scores and not "
            "classes; give their range (--task.score-range LOW HIGH) for a regression, or list the classes (--task.labels)"
        )
    too_many = len(counts) > MAX_CLASSES or (len(counts) > FEW_CLASSES and len(counts) > rows / 2)
    if too_many or any(len(text) > MAX_LENGTH for text in counts):
        raise UserError(
            f"--task.label: '{column}' has {len(counts):,} different values in {rows:,} rows ({listed(counts)}), which look like "
            "identifiers or texts; name the column with the classes, list the classes (--task.labels), or for scores give their "
            "range (--task.score-range)"
        )
    alike: dict[str, str] = {}
    for text in counts:
        other = alike.setdefault(" ".join(text.split()).casefold(), text)
        if other != text:
            raise UserError(
                f"{first_rows[text]}: the label '{shortened(text)}' differs from '{shortened(other)}' ({first_rows[other]}) only "
                "in case or blanks; write them in one way, or list both in --task.labels if they are two classes"
            )
