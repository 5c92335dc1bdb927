"""Numbers that users write in configs and on the command line, and the ranges that they must be in."""

import argparse
import math
from collections.abc import Callable
from typing import NamedTuple

from gpt_jax.errors import require, shortened


class Range(NamedTuple):
    """The allowed values of a number, as a phrase for messages and as a function. No range contains NaN or infinity."""

    words: str
    contains: Callable[[float], bool]

    def rule(self, number: float) -> str:
        """Returns the rule that a number outside of the range breaks, for messages."""
        return "must be finite" if abs(number) == math.inf else f"must {self.words}"

    def check(self, field: str, number: float) -> None:
        """Raises a `UserError` that names `field` unless the number is in the range."""
        require(self.contains(number), field, f"{self.rule(number)}, not {number!r}")


POSITIVE = Range("be positive", lambda x: 0 < x < math.inf)
NOT_NEGATIVE = Range("be at least 0", lambda x: 0 <= x < math.inf)
FRACTION = Range("be in [0, 1)", lambda x: 0 <= x < 1)
PROBABILITY = Range("be in (0, 1]", lambda x: 0 < x <= 1)
SEED = Range("be in [0, 2^32)", lambda x: 0 <= x < 2**32)
AXIS_SIZE = Range("be positive, or -1 for all remaining devices", lambda x: x == -1 or 0 < x < math.inf)
BLOCKS = Range("be -1 (all) or a number of blocks", lambda x: -1 <= x < math.inf)
BYTES = Range("be a number of bytes, 1 or more", lambda x: 1 <= x < math.inf)


def number(kind: type[int] | type[float], within: Range) -> Callable[[str], float]:
    """Returns a type for argparse: a function from a word of the command line to a number.

    The function raises an `argparse.ArgumentTypeError`, to which argparse adds the name of the option, if the word is not a
    number of this kind or is out of range.
    """

    def convert(word: str) -> float:
        try:
            value = kind(word)
        except ValueError:
            phrase = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"'{shortened(word)}' is not {phrase}") from None
        if not within.contains(value):
            raise argparse.ArgumentTypeError(f"{within.rule(value)}, not {shortened(word)}")
        return value

    return convert
