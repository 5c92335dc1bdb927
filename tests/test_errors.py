"""Errors that a user sees: their exit codes, and the hints in their messages."""

import pytest

from gpt_jax.errors import Preempted, TrainingError, UserError, VerificationError, field_error, nearest, require


def test_exit_codes():
    assert [error.exit_code for error in (UserError, TrainingError, VerificationError, Preempted)] == [2, 1, 1, 42]


def test_a_message_is_one_line_that_can_be_printed():
    assert str(UserError("a\nb\x1b[31m \ud800: naïve")) == "a\\nb\\x1b[31m \\ud800: naïve"


def test_nearest_offers_close_names_or_all():
    assert nearest("smok", ["smoke", "gpt1"]) == "did you mean smoke?"
    assert nearest("xyz", ["smoke", "gpt1"]) == "known: smoke, gpt1"


def test_field_errors_write_the_field_as_on_the_command_line():
    assert str(field_error("train.batch_size", "is odd")) == "--train.batch-size: is odd"
    require(True, "train.batch_size", "is odd")
    with pytest.raises(UserError, match=r"^--train\.batch-size: is odd$"):
        require(False, "train.batch_size", "is odd")
