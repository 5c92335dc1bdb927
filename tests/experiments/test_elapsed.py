"""The sign of life of a command whose steps are long."""

import re
import time

import pytest

from gpt_jax.experiments.elapsed import show_elapsed_time
from gpt_jax.runtime.console import say


def test_the_elapsed_time_is_shown_while_nothing_else_is(capsys):
    with show_elapsed_time(0.02):
        time.sleep(0.15)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 8
    assert all(re.fullmatch(r"    0 s", line) for line in lines)


def test_nothing_is_shown_between_lines_that_follow_each_other_closely(capsys):
    with show_elapsed_time(0.5):
        for number in range(30):
            say(f"line {number}")
            time.sleep(0.02)
    assert capsys.readouterr().err.splitlines() == [f"line {number}" for number in range(30)]


def test_the_clock_ends_with_the_block_and_errors_pass(capsys):
    with pytest.raises(KeyError), show_elapsed_time(0.02):
        raise KeyError
    time.sleep(0.1)
    assert capsys.readouterr().err == ""
