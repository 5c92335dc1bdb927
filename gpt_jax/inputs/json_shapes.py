"""Shapes of JSON values: the fields that a file written by a program must have, and their types."""

import sys
from typing import Any

from gpt_jax.errors import described, shortened

Shape = Any
"""The shape of a JSON value, which is one of these:

    int                    a whole number in [0, 2^63)
    float                  a number that a float can represent
    str, dict, list        any string; any object; any list
    None                   null
    (shape, shape, ...)    one of several
    [shape]                a list of such values
    {str: shape}           an object whose fields all have such values
    {"name": shape, ...}   an object with these fields and perhaps others; a field whose name ends with "?" may be missing
"""

_WORDS: dict[Any, str] = {
    int: "a whole number of at least 0",
    float: "a floating-point number",
    str: "a string",
    dict: "an object",
    list: "a list",
    None: "null",
}
_MISSING = object()


def mismatch(value: Any, shape: Shape, name: str = "") -> str:
    """Returns a phrase that names the first part of a JSON value with the wrong shape; empty if there is none.

    Args:
      value: as returned by `json.loads`.
      shape: see `Shape`.
      name: the name of the value in the phrase; empty for the value of a whole file.
    """
    shown = f"'{shortened(name.removesuffix('?'))}'" if name else "it"
    prefix = f"{name.removesuffix('?')}." if name else ""
    if value is _MISSING:
        return "" if name.endswith("?") else f"{shown} is missing"
    parts: list[tuple[Any, Shape, str]]
    match shape:
        case tuple():
            found = [mismatch(value, one, name) for one in shape]
            return found[0] if all(found) else ""
        case [one] if isinstance(value, list):
            parts = [(part, one, f"{prefix}{number}") for number, part in enumerate(value)]
        case dict() if isinstance(value, dict) and str in shape:
            parts = [(part, shape[str], prefix + key) for key, part in value.items()]
        case dict() if isinstance(value, dict):
            parts = [(value.get(key.removesuffix("?"), _MISSING), one, prefix + key) for key, one in shape.items()]
        case list() | dict():
            return f"{shown} is {described(value)}, not {_WORDS[type(shape)]}"
        case _:
            return "" if _has_type(value, shape) else f"{shown} is {described(value)}, not {_WORDS[shape]}"
    return next(filter(None, (mismatch(*part) for part in parts)), "")


def _has_type(value: Any, kind: Any) -> bool:
    if isinstance(value, bool) or kind is None:
        return value is kind
    if kind is int:
        return isinstance(value, int) and 0 <= value < 2**63
    if kind is float and isinstance(value, int):
        return abs(value) <= sys.float_info.max
    return isinstance(value, kind)
