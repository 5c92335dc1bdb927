"""JSON from outside the project. Every defect becomes a one-line error that names the file and the line."""

import json
import re
import sys
from pathlib import Path
from typing import Any

from gpt_jax.errors import UserError, described, shortened

_DECODER = json.JSONDecoder()
WHITE_SPACE = re.compile("[ \t\r\n\ufeff]*")
"""White space between values. In concatenated files, it includes byte-order marks."""
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
        value = _DECODER.decode(text)
        require_characters(value, text, 0, len(text))
    except (ValueError, RecursionError) as error:
        raise json_error(error, path, line) from None
    return value


def parse_json_object(text: str, path: Path, line: int = 1) -> dict[str, Any]:
    """Returns the fields of a JSON object; see `parse_json` for the arguments and errors.

    Raises:
      UserError: also if the value is not an object.
    """
    return require_object(parse_json(text, path, line), path, line)


def require_object(value: Any, path: Path, line: int) -> dict[str, Any]:
    """Returns a JSON value that begins in the given line of a file and must be an object.

    Raises:
      UserError: it is not an object.
    """
    if not isinstance(value, dict):
        raise UserError(f"{path}:{line}: {described(value)}, not a JSON object with named fields")
    return value


def require_characters(value: Any, text: str, start: int, end: int) -> None:
    """Raises a `UnicodeEncodeError` if the JSON value that was parsed from this part of a text has a lone surrogate."""
    if text.find("\\", start, end) >= 0 and _SURROGATE.search(text, start, end):
        json.dumps(value, ensure_ascii=False).encode()


def json_error(error: ValueError | RecursionError, path: Path, line: int, start: int = 0) -> UserError:
    """Returns the one-line error for an exception that was raised while parsing JSON.

    Args:
      error: the exception.
      path: the file that contains the JSON.
      line: the number of the line in which the value begins.
      start: the position of its beginning in the text that was parsed.
    """
    match error:
        case json.JSONDecodeError():
            before, rest = error.doc[start : error.pos], error.doc[error.pos :].strip()
            lines = (before if rest else before.rstrip()).count("\n")
            place = repr(shortened(rest, 20)) if rest else "the end"
            # In JSON lines, a missing bracket is noticed only in the next line.
            begin = f" (in the value that begins in line {line})" if lines and line > 1 and error.msg != "Extra data" else ""
            return UserError(f"{path}:{line + lines}: not valid JSON: {error.msg.removesuffix(' at')} at {place}{begin}")
        case UnicodeEncodeError():
            lone = f"\\u{ord(error.object[error.start]):04x}"
            return UserError(f"{path}:{line}: {lone} is half of a surrogate pair, which is not a character; remove it")
        case RecursionError():
            return UserError(f"{path}:{line}: not readable: its brackets are nested too deeply")
    return UserError(f"{path}:{line}: not readable: a number has more than {sys.get_int_max_str_digits():,} digits")


def is_cut_off(error: Exception) -> bool:
    """Returns whether an exception was raised for a text that could be the beginning of JSON."""
    longest_token = len("\\ud83d\\ude00")  # An error in a number, a constant or an escape is reported at its beginning.
    return isinstance(error, json.JSONDecodeError) and (
        error.msg.startswith("Unterminated string") or error.pos >= len(error.doc) - longest_token
    )


def looks_like_json(head: str, complete: bool) -> bool:
    """Returns whether the beginning of a file, or more than half of it, consists of JSON arrays, objects or strings.

    Numbers and constants do not count, because they look like plain text.

    Args:
      head: the beginning of the file.
      complete: whether it is the whole file. Otherwise, the last value may be cut off.
    """
    head, position = head.strip(), 0
    while head[position : position + 1] in ("[", "{", '"'):
        try:
            _, end = _DECODER.raw_decode(head, position)
        except (ValueError, RecursionError) as error:
            if not isinstance(error, json.JSONDecodeError) or (not complete and is_cut_off(error)):
                return True  # Only JSON can be nested too deeply or have a number with too many digits.
            break
        position = WHITE_SPACE.match(head, end).end()  # type: ignore[union-attr]
    # In plain text, a quotation begins like a string.
    return position == len(head) > 0 or (position > len(head) / 2 and head[0] != '"')
