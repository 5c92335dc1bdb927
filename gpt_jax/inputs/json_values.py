"""JSON from outside the project. Every defect becomes a one-line error that names the file and the line."""

import json
import re
import sys
from pathlib import Path
from typing import Any

from gpt_jax.errors import UserError, described

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
        value = json.loads(text.rstrip())  # A line end would move the position of an error to the next line.
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        where = f"{path}:{line + error.lineno - 1}"
        raise UserError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
    except UnicodeEncodeError as error:
        lone = f"\\u{ord(error.object[error.start]):04x}"
        raise UserError(f"{path}:{line}: {lone} is half of a surrogate pair, which is not a character; remove it") from None
    except RecursionError:
        raise UserError(f"{path}:{line}: not readable: its brackets are nested too deeply") from None
    except ValueError:
        raise UserError(f"{path}:{line}: not readable: a number has more than {sys.get_int_max_str_digits():,} digits") from None
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
