"""Ranges of numbers, and their use as types of command-line options."""

import argparse
import math

import pytest

from gpt_jax.errors import UserError
from gpt_jax.inputs import numbers
from gpt_jax.inputs.numbers import NOT_NEGATIVE, POSITIVE, PROBABILITY, SEED, Range, number

RANGES = [value for value in vars(numbers).values() if isinstance(value, Range)]


@pytest.mark.parametrize("within", RANGES, ids=lambda within: within.words)
def test_no_range_contains_nan_or_infinity(within):
    for value in (math.nan, math.inf, -math.inf):
        assert not within.contains(value)
    with pytest.raises(UserError, match=r"^--some-field: must be finite, not inf$"):
        within.check("some_field", math.inf)


def test_a_number_out_of_range_names_the_field_and_the_rule():
    SEED.check("seed", 2**32 - 1)
    with pytest.raises(UserError) as error:
        SEED.check("seed", 10**400)
    assert str(error.value).startswith("--seed: must be in [0, 2^32), not 1000")


@pytest.mark.parametrize(
    ("kind", "within", "word", "message"),
    [
        (int, POSITIVE, "0", "must be positive, not 0"),
        (int, POSITIVE, "1.5", "'1.5' is not a whole number"),
        (int, POSITIVE, "1e3", "'1e3' is not a whole number"),
        (int, POSITIVE, "nan", "'nan' is not a whole number"),
        (int, POSITIVE, "", "'' is not a whole number"),
        (int, POSITIVE, "9" * 5000, f"'{'9' * 60}...' is not a whole number"),  # Python reads no number of so many digits.
        (int, POSITIVE, "-" + "9" * 4000, f"must be positive, not -{'9' * 59}..."),
        (float, NOT_NEGATIVE, "-1e-9", "must be at least 0, not -1e-9"),
        (float, NOT_NEGATIVE, "nan", "must be at least 0, not nan"),
        (float, NOT_NEGATIVE, "1e999", "must be finite, not 1e999"),
        (float, NOT_NEGATIVE, "one", "'one' is not a number"),
        (float, PROBABILITY, "0", "must be in (0, 1], not 0"),
    ],
)
def test_words_that_are_refused(kind, within, word, message):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        number(kind, within)(word)
    assert str(error.value) == message


def test_words_that_are_numbers():
    assert [number(int, POSITIVE)(word) for word in ("1", " 20 ", "1_000")] == [1, 20, 1000]
    assert [number(float, PROBABILITY)(word) for word in ("1", "1e-9", ".5")] == [1.0, 1e-9, 0.5]
