"""The terminal: lines, the progress line on a terminal and elsewhere, durations and tables."""

import io
import sys
import time

import pytest

from gpt_jax.runtime.console import ProgressLine, format_duration, say

ERASE = "\r\x1b[K"  # Return to the beginning of the line and erase it.


class Terminal(io.StringIO):
    def isatty(self):
        return True


def use_as_stderr(monkeypatch, stream):
    """Makes a stream standard error. A fixture would do this before pytest replaces standard error itself."""
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


@pytest.fixture
def clock(monkeypatch):
    """A function that lets seconds pass on the monotonic clock, which otherwise stands still."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    return advance


# -- lines ------------------------------------------------------------------------------------------------------------------


def test_a_line_goes_to_standard_error(capsys):
    say("one")
    say("two")
    assert capsys.readouterr() == ("", "one\ntwo\n")


def test_a_line_replaces_the_progress_line_on_a_terminal(monkeypatch):
    terminal = use_as_stderr(monkeypatch, Terminal())
    ProgressLine(10.0).show(lambda: "step 1", last=True)
    say("saved")
    assert terminal.getvalue() == f"{ERASE}step 1{ERASE}saved\n"


def test_on_a_terminal_the_progress_line_is_redrawn_in_place_five_times_a_second(monkeypatch, clock):
    terminal = use_as_stderr(monkeypatch, Terminal())
    logged = []
    progress = ProgressLine(10.0, logged.append)
    for step in range(1, 7):
        clock(0.125)
        progress.show(lambda step=step: f"step {step}")
    assert terminal.getvalue() == f"{ERASE}step 2{ERASE}step 4{ERASE}step 6"
    progress.clear()
    assert terminal.getvalue().endswith(f"step 6{ERASE}")
    assert logged == []


def test_elsewhere_a_new_progress_line_is_logged_every_so_many_seconds(clock, capsys):
    logged = []
    progress = ProgressLine(10.0, logged.append)
    for second in range(1, 32):
        clock(1)
        progress.show(lambda second=second: f"second {second}")
    assert logged == ["second 10", "second 20", "second 30"]
    progress.clear()
    assert capsys.readouterr() == ("", "")


def test_without_a_log_the_progress_line_goes_to_standard_error(clock, capsys):
    progress = ProgressLine(10.0)
    clock(10)
    progress.show(lambda: "half")
    assert capsys.readouterr() == ("", "half\n")


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_the_last_progress_line_is_always_shown_and_the_others_are_not_even_made(kind, clock, monkeypatch):
    stream = use_as_stderr(monkeypatch, kind())
    progress = ProgressLine(10.0)

    def fail():
        raise AssertionError("this line is not shown")

    progress.show(fail)
    clock(0.1)
    progress.show(fail)
    progress.show(lambda: "all", last=True)
    assert stream.getvalue() == (f"{ERASE}all" if kind is Terminal else "all\n")
    progress.show(fail)


# -- durations -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (8.4, "8 s"),
        (59.4, "59 s"),
        (59.6, "1:00 min"),
        (185, "3:05 min"),
        (3599.4, "59:59 min"),
        (3599.6, "1:00 h"),
        (7620, "2:07 h"),
        (360_000, "100:00 h"),
    ],
)
def test_durations_in_the_unit_that_fits(seconds, text):
    assert format_duration(seconds) == text
