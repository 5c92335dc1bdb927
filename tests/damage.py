"""Hypothesis strategies that damage valid files: as bytes, and as JSON values."""

import copy
import json
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

TELLING_BYTES = (
    *(b"\0", b"\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\n", b"\r", b"\t", b" ", b",", b";", b"|"),
    *(b'"', b'""', b"\\", b"{", b"}", b"[" * 5000, b"]", b"null", b"NaN", b"-1", b"1e999", b"9" * 5000, b"\\ud800", b"_"),
    *("é".encode(), "\u2028".encode(), b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1", b"PK\x03\x04", b"x" * 140_000),
)
"""Bytes that mean something to one of the formats: signatures, separators, quotes, brackets, numbers, halves of characters."""

Edit = tuple[str, float, int, bytes]
"""One change of a file: its kind, its position as a fraction of the length, the number of bytes it affects, and the new bytes."""


def damaged_bytes(content: bytes) -> SearchStrategy[bytes]:
    """Returns a strategy for copies of a file's content with up to four edits; a copy without any is among them."""
    edit = st.tuples(
        st.sampled_from(("insert", "overwrite", "delete", "repeat", "truncate")),
        st.floats(0, 1),
        st.integers(0, 60),
        st.sampled_from(TELLING_BYTES) | st.binary(max_size=8),
    )
    return st.lists(edit, max_size=4).map(lambda edits: _apply(content, edits))


def _apply(content: bytes, edits: list[Edit]) -> bytes:
    for kind, position, size, new in edits:
        start = int(position * len(content))
        old, end = content[start : start + size], content[start + size :]
        middle = {"insert": new + old, "overwrite": new, "delete": b"", "repeat": old + old, "truncate": b""}[kind]
        content = content[:start] + middle + (b"" if kind == "truncate" else end)
    return content


JSON_VALUES: SearchStrategy[Any] = st.recursive(
    st.sampled_from((None, True, False, 0, -1, 1.5, 2**31, 2**63, 10**400, "", "x", "../x", "/etc/passwd", "~", "\0", "nan"))
    | st.integers()
    | st.floats()
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
"""Any JSON values, among them numbers that no float can hold, and the not-quite-numbers NaN and Infinity."""


def damaged_json(value: Any) -> SearchStrategy[Any]:
    """Returns a strategy for copies of a JSON value in which up to three of its parts were replaced, deleted or renamed."""
    edit = st.tuples(st.sampled_from(("replace", "delete", "rename")), st.sampled_from(_paths(value)), JSON_VALUES)
    return st.lists(edit, min_size=1, max_size=3).map(lambda edits: _apply_json(value, edits))


def _paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Returns the keys and indices that lead to each part of a JSON value, the whole first."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [prefix, *(path for key, part in parts for path in _paths(part, (*prefix, key)))]


def _apply_json(value: Any, edits: list[tuple[str, tuple[Any, ...], Any]]) -> Any:
    value = copy.deepcopy(value)
    for kind, path, new in edits:
        if not path:
            value = new if kind == "replace" else value
            continue
        parent = value
        try:
            for key in path[:-1]:
                parent = parent[key]
            if kind == "replace":
                parent[path[-1]] = new
            elif kind == "delete":
                del parent[path[-1]]
            else:
                parent[f"{path[-1]}_"] = parent.pop(path[-1])
        except (KeyError, IndexError, TypeError, AttributeError):  # An earlier edit has removed this part.
            continue
    return value


def damaged_json_file(content: bytes) -> SearchStrategy[bytes]:
    """Returns a strategy for copies of a JSON file: damaged as a value in one half of the cases, and as bytes in the other."""
    return damaged_json(json.loads(content)).map(lambda value: json.dumps(value).encode()) | damaged_bytes(content)
