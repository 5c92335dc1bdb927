"""Exceptions that are reported to users, with their exit codes (README, "A run's folder")."""

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """A mistake in a config, a file, a data row, a checkpoint or the environment.

    The message is one line that names the field or `file:line` and states what is expected. The command line prints the message
    to standard error without a traceback and exits with code 2. Characters that would break the line or cannot be printed (in
    names of files or columns, for example) are escaped.
    """

    exit_code = 2

    def __init__(self, message: str):
        super().__init__(printable(message))


class TrainingError(Exception):
    """Training itself failed, for example with a non-finite loss. The details are in the run's folder. Exit code 1."""

    exit_code = 1


class VerificationError(Exception):
    """An exported model did not reproduce its checkpoint's outputs and was removed. Exit code 1."""

    exit_code = 1


class Preempted(Exception):
    """The process received SIGTERM and has saved its state. Exit code 42, which tells launchers to restart it."""

    exit_code = 42


def printable(text: str) -> str:
    """Returns the text with line ends and other unprintable characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(error: Exception) -> str:
    """Returns the type and the start of the message of another library's error on a single line."""
    return shortened(" ".join(f"{type(error).__name__}: {error}".split()), 200)


def field_error(field: str, message: str) -> UserError:
    """Returns an error that names a config field or other option as it is written on the command line."""
    return UserError(f"--{field.replace('_', '-')}: {message}")


def require(condition: bool, field: str, message: str) -> None:
    """Raises a `UserError` that names `field` unless `condition` holds."""
    if not condition:
        raise field_error(field, message)


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns a phrase with the known names closest to a misspelled `name`, or with the first few of them if none is close.

    Names that differ only in case or in surrounding blanks are close.
    """
    known = list(known)
    folded = [shortened(other.strip().casefold()) for other in known]
    close = difflib.get_close_matches(shortened(name.strip().casefold()), folded, n=3, cutoff=0.5)
    likely = [other for match in dict.fromkeys(close) for other, same in zip(known, folded, strict=True) if same == match]
    if likely:
        return f"did you mean {' or '.join(map(shortened, likely[:3]))}?"
    return f"known: {listed(known)}" if known else "there are none"


LISTED = 12
"""Maximum number of names that a message lists."""


def listed(names: Iterable[str]) -> str:
    """Returns the names, separated by commas. Long names are shortened, and only the first of many names are listed."""
    names = list(names)
    more = f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    return ", ".join(map(shortened, names[:LISTED])) + more


def shortened(text: str, length: int = 60) -> str:
    """Returns the text, or its beginning if it has more than `length` characters."""
    return text if len(text) <= length else f"{text[:length]}..."


def described(value: Any) -> str:
    """Returns a phrase for the type of a JSON value, for use in a message."""
    words = {str: "a string", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return words.get(type(value), "null" if value is None else f"a value of type {type(value).__name__}")
