"""Users' config files, which are Python programs: whatever goes wrong in one is reported in one line."""

import contextlib
import runpy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt_jax.errors import UserError


def run_config_file(path: Path, hint: Callable[[BaseException], str]) -> Any:
    """Runs a config file and returns what its function `config()` returns. What it prints goes to standard error.

    Args:
      path: the file.
      hint: returns advice about an exception, to be appended to the message.

    Raises:
      UserError: there is no such file, it does not define the function, or it raises an exception. The message names the line.
    """
    if not path.is_file():
        raise UserError(f"{path}: {'a folder, not a config file' if path.is_dir() else 'no such config file'}")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Standard output is for results.
            function = runpy.run_path(str(path)).get("config")
            value = function() if callable(function) else None
    except (Exception, SystemExit) as error:
        raise UserError(f"{_describe_failure(error, path)}{hint(error)}") from error
    if not callable(function):
        raise UserError(f"{path}: a config file must define config(), a function that returns a PretrainConfig or FinetuneConfig")
    return value


def _describe_failure(error: BaseException, path: Path) -> str:
    """Returns FILE:LINE and the message of an error that a config file raised, as one line."""
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == str(path)]
    message = str(error)
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines, message = [error.lineno or 1], error.msg
    if isinstance(error, SystemExit):
        message += "; a config file must not end the program"
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return f"{path}{f':{lines[-1]}' if lines else ''}: {kind}{' '.join(message.split())}"
