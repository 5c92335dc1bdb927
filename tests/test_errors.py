"""Errors that a user sees: their exit codes, and the hints in their messages."""

import pytest

from gpt_jax.errors import (
    Preempted,
    TrainingError,
    UserError,
    VerificationError,
    field_error,
    listed,
    nearest,
    require,
    shortened,
)


def test_exit_codes():
    assert [error.exit_code for error in (UserError, TrainingError, VerificationError, Preempted)] == [2, 1, 1, 42]


def test_a_message_is_one_line_that_can_be_printed():
    assert str(UserError("a\nb\x1b[31m \ud800: naïve")) == "a\\nb\\x1b[31m \\ud800: naïve"


def test_nearest_offers_close_names_or_all():
    assert nearest("smok", ["smoke", "gpt1"]) == "did you mean smoke?"
    assert nearest("xyz", ["smoke", "gpt1"]) == "known: smoke, gpt1"
    assert nearest("xyz", []) == "there are none"


def test_names_that_differ_in_case_or_blanks_are_close():
    assert nearest("text", ["id", "TEXT", "y"]) == "did you mean TEXT?"
    assert nearest("label ", ["Label", "id"]) == "did you mean Label?"
    assert nearest("text", ["id", "Text", "TEXT"]) == "did you mean Text or TEXT?"


def test_lists_and_names_in_messages_are_bounded():
    names = [f"{number}{'x' * 100_000}" for number in range(500)]
    assert listed(["a", "b"]) == "a, b"
    assert listed(map(str, range(13))) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 1 more"
    assert listed(names).endswith("x... and 488 more")
    assert shortened("x" * 60) == "x" * 60
    assert shortened("x" * 61) == "x" * 60 + "..."
    assert max(len(listed(names)), len(nearest("label", names)), len(nearest("0" + "x" * 99_000, names))) < 1000


def test_field_errors_write_the_field_as_on_the_command_line():
    assert str(field_error("train.batch_size", "is odd")) == "--train.batch-size: is odd"
    require(True, "train.batch_size", "is odd")
    with pytest.raises(UserError, match=r"^--train\.batch-size: is odd$"):
        require(False, "train.batch_size", "is odd")
