"""JSON from outside the project. Every defect becomes a one-line error that names the file and the line."""

import json
import re
import sys
from pathlib import Path
from typing import Any

from gpt_jax.errors import UserError, described

_DECODER = json.JSONDecoder()
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""An escape that may be half of a pair. A half on its own is a code point that no encoding of text can represent."""


def parse_json(text: str, path: Path, line: int = 1) -> Any:
    """Returns the value of a JSON text.

    Args:
      text: the text, which may have several lines.
      path: the file that contains it, for error messages.
      line: the number of its first line.

    Raises:
      UserError: the text is not JSON, is nested too deeply, or has a number with too many digits or a lone surrogate.
    """
    try:
        value = _DECODER.decode(text.rstrip())  # A line end would move the position of an error to the next line.
        require_characters(value, text, 0, len(text))
    except (ValueError, RecursionError) as error:
        raise json_error(error, path, line) from None
    return value


def parse_json_object(text: str, path: Path, line: int = 1) -> dict[str, Any]:
    """Returns the fields of a JSON object; see `parse_json` for the arguments and errors.

    Raises:
      UserError: also if the value is not an object.
    """
    value = parse_json(text, path, line)
    if not isinstance(value, dict):
        raise UserError(f"{path}:{line}: {described(value)}, not a JSON object with named fields")
    return value


def require_characters(value: Any, text: str, start: int, end: int) -> None:
    """Raises a `UnicodeEncodeError` if the JSON value that was parsed from this part of a text has a lone surrogate."""
    if text.find("\\", start, end) >= 0 and _SURROGATE.search(text, start, end):
        json.dumps(value, ensure_ascii=False).encode()


def json_error(error: ValueError | RecursionError, path: Path, line: int) -> UserError:
    """Returns the one-line error for an exception that was raised for JSON whose first line has the given number."""
    match error:
        case json.JSONDecodeError():
            return UserError(f"{path}:{line + error.lineno - 1}: not valid JSON: {error.msg} at column {error.colno}")
        case UnicodeEncodeError():
            lone = f"\\u{ord(error.object[error.start]):04x}"
            return UserError(f"{path}:{line}: {lone} is half of a surrogate pair, which is not a character; remove it")
        case RecursionError():
            return UserError(f"{path}:{line}: not readable: its brackets are nested too deeply")
    return UserError(f"{path}:{line}: not readable: a number has more than {sys.get_int_max_str_digits():,} digits")


def is_cut_off(error: json.JSONDecodeError) -> bool:
    """Returns whether a text that is not JSON could be the beginning of JSON."""
    longest_token = len("\\ud83d\\ude00")  # An error in a number, a constant or an escape is reported at its beginning.
    return error.msg.startswith("Unterminated string") or error.pos >= len(error.doc) - longest_token


_BETWEEN = re.compile(r"[\s,]*")


def looks_like_json(head: str, complete: bool) -> bool:
    """Returns whether at least half of the beginning of a file consists of JSON arrays, objects, or strings on their own lines.

    Numbers and constants do not count, because they are the same as plain text.

    Args:
      head: the beginning of the file.
      complete: whether it is the whole file. Otherwise, the last value may be cut off.
    """
    if head.lstrip()[:1] not in ("[", "{", '"'):
        return False
    covered = position = 0
    while position < len(head):
        start = _BETWEEN.match(head, position).end()  # type: ignore[union-attr]
        position = _end_of_value(head, start, complete)
        covered += position - start
        if position == start:
            position = head.find("\n", start) + 1 or len(head)
    return covered >= len(head.strip()) / 2


def _end_of_value(head: str, start: int, complete: bool) -> int:
    """Returns the end of the JSON value at a position of the beginning of a file, or the position itself if there is none."""
    if head[start : start + 1] not in ("[", "{", '"'):
        return start
    try:
        _, end = _DECODER.raw_decode(head, start)
    except json.JSONDecodeError as error:
        return start if complete or not is_cut_off(error) else len(head)
    except (ValueError, RecursionError):
        return len(head)  # Only JSON is nested too deeply or has a number with too many digits.
    alone = not head[end:].partition("\n")[0].strip(" \t\r,")
    return start if head[start] == '"' and not alone else end  # In plain text, a quotation begins like a string.
