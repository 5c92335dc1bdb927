"""Terminal output: log lines, a live progress line, and formatted durations."""

import contextlib
import sys
import time
from collections.abc import Callable

Log = Callable[[str], None]
"""A function that shows one line of text to the user."""

ERASE_LINE = "\r\x1b[K"

last_shown = time.monotonic()
"""The time on the monotonic clock at which something was last shown."""


def say(line: str) -> None:
    """Prints a line to standard error. On a terminal, it replaces the live progress line."""
    # The newline is part of the text, so that lines from several processes do not run together.
    _show((ERASE_LINE if sys.stderr.isatty() else "") + line + "\n")


def _show(text: str) -> None:
    global last_shown
    last_shown = time.monotonic()
    with contextlib.suppress(OSError):  # A closed terminal, or a log on a full disk, does not end a run.
        print(text, end="", file=sys.stderr, flush=True)


class ProgressLine:
    """A progress line that is redrawn in place on a terminal. Elsewhere, a new line is logged every `seconds`.

    Args:
      seconds: time between lines if standard error is not a terminal.
      log: receives those lines.
    """

    def __init__(self, seconds: float, log: Log = say):
        self._live = sys.stderr.isatty()
        self._interval = 0.2 if self._live else seconds
        self._log = log
        self._shown = time.monotonic()

    def show(self, line: Callable[[], str], last: bool = False) -> None:
        """Shows `line()` if the interval has passed or if it is the last one."""
        now = time.monotonic()
        if not last and now - self._shown < self._interval:
            return
        self._shown = now
        if self._live:
            _show(ERASE_LINE + line())
        else:
            self._log(line())

    def clear(self) -> None:
        """Erases the line on a terminal."""
        if self._live:
            _show(ERASE_LINE)


def format_duration(seconds: float) -> str:
    """Returns a duration as "8 s", "3:05 min" or "2:07 h"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60}:{seconds % 60:02d} min"
    return f"{seconds // 3600}:{seconds % 3600 // 60:02d} h"
