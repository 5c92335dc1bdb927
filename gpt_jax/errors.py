"""The errors a user sees, and the exit code each ends in (README, "Exit codes")."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """A mistake in a config, a file, a data row, a checkpoint or the environment.

    The message is one line that names the field or `file:line` and says what would be right. The command line prints it
    to standard error without a traceback and exits with 2.
    """

    exit_code = 2


class TrainingError(Exception):
    """Training itself failed (a non-finite loss, a lost peer). The evidence is in the run's folder; exit code 1."""

    exit_code = 1


class VerificationError(Exception):
    """What was exported does not compute what the checkpoint computes; it was removed. Exit code 1."""

    exit_code = 1


class Preempted(Exception):
    """The process was told to stop (SIGTERM) and has saved its state; exit code 42, which launchers read as "restart me"."""

    exit_code = 42


def field_error(field: str, message: str) -> UserError:
    """Returns an error that names a config field, or another option, as on the command line."""
    return UserError(f"--{field.replace('_', '-')}: {message}")


def require(condition: bool, field: str, message: str) -> None:
    """Raises a `UserError` that names `field` unless `condition` holds."""
    if not condition:
        raise field_error(field, message)


def nearest(name: str, known: Iterable[str]) -> str:
    """A half-sentence with the known names closest to a misspelt `name`, or all of them if none is close."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"


def described(value: Any) -> str:
    """What a JSON value is, in words for a message."""
    words = {str: "a text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return words.get(type(value), "null")
