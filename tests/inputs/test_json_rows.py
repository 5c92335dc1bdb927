"""JSON objects on lines, in arrays and one after the other, in pieces of any size, and every defect with its line."""

import io
import json
import random
from pathlib import Path

import pytest

from gpt_jax.errors import UserError
from gpt_jax.inputs import json_rows
from gpt_jax.inputs.json_rows import json_objects

PATH = Path("rows.json")
VALUES = [
    {"text": "a"},
    {"text": 'with "quotes", [brackets] and \\ \n', "n": [1.5, -2e7, {}, [], None, True]},
    {"text": "", "deep": {"a": {"b": [[["c"]]]}}},
    {"text": "\u2028 日本 😀", "": 0},
    {"text": "x" * 3000},
]


def objects(content: str | bytes) -> list[tuple[int, dict]]:
    data = content.encode() if isinstance(content, str) else content
    return list(json_objects(io.BufferedReader(io.BytesIO(data)), PATH))


FORMS = {
    "array": json.dumps(VALUES),
    "array with line ends": json.dumps(VALUES, indent=2, ensure_ascii=False),
    "array, Windows": json.dumps(VALUES, indent="\t").replace("\n", "\r\n"),
    "objects on lines": "\n".join(json.dumps(value, ensure_ascii=False) for value in VALUES),
    "objects on one line": "".join(json.dumps(value) for value in VALUES),
    "objects with line ends": "\n\n".join(json.dumps(value, indent=1) for value in VALUES) + "\n",
    "after a byte-order mark": "\ufeff" + json.dumps(VALUES),
    "after blanks": " \r\n\t" + json.dumps(VALUES) + "\n\n",
    "files with byte-order marks, one after the other": "".join(f"\ufeff{json.dumps(value)}\r\n" for value in VALUES),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", [1, 7, 1000, 1 << 20])
def test_every_form_gives_the_objects_whatever_is_read_at_a_time(monkeypatch, form, chunk):
    monkeypatch.setattr(json_rows, "JSON_CHUNK", chunk)
    assert [value for _, value in objects(FORMS[form])] == VALUES


@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_each_object_has_the_line_in_which_it_begins(monkeypatch, chunk):
    monkeypatch.setattr(json_rows, "JSON_CHUNK", chunk)
    assert [line for line, _ in objects(json.dumps([{"a": 1, "b": 2}] * 3, indent=1))] == [2, 6, 10]
    assert [line for line, _ in objects('[{"a":\n1}, {"a": 2}\n,\n\n{"a": 3}]')] == [1, 2, 5]
    assert [line for line, _ in objects('\n{"a": 1}\n\n{"a": 2} {"a": 3}')] == [2, 4, 4]
    assert [line for line, _ in objects('\ufeff{"a": 1}\r\n\n  \t\n{"a": 2}\n\ufeff{"a": 3}')] == [1, 4, 5]


def test_nothing_is_nothing():
    assert objects("") == objects("  \n") == objects("[]") == objects(" [ \n ] ") == objects("\ufeff") == []


BAD = [
    ('[{"a": 1},\n{"a": 2]', ":2: not valid JSON: Expecting ',' delimiter at ']'"),
    ('[{"a": 1},\n{"a": ', ":2: not valid JSON: Expecting value at the end"),
    ('{"a": 1}\n{"a": \n', ":2: not valid JSON: Expecting value at the end"),
    ('[{"a": 1},\n{"a": "b', ":2: not valid JSON: Unterminated string starting at '\"b'"),
    ('{"a": "b\n{"a": 1}', ":1: not valid JSON: Invalid control character at '{\"a\": 1}'"),
    ('[{"a": 1},\n', ":2: not valid JSON: Expecting value at the end"),
    ('[{"a": 1}\n', ":2: not valid JSON: a comma or the end of the array is missing, or the file is incomplete"),
    ("[\n", ":2: not valid JSON: Expecting value at the end"),
    ('[{"a": 1},\n]', ":2: not valid JSON: Expecting value at ']'"),
    ('[{"a": 1}\n{"a": 2}]', ":2: not valid JSON: a comma or the end of the array is missing"),
    ('[,{"a": 1}]', ":1: not valid JSON: Expecting value at ',{\"a\": 1}]'"),
    ('[{"a": 1}]\n\n{"a": 2}', ":3: not valid JSON: something follows the array"),
    ('[{"a": 1}]]', ":1: not valid JSON: something follows the array"),
    ('{"a": 1}\n\na text', ":3: not valid JSON: Expecting value at 'a text'"),
    ('{"a":\n 1,\n b: 2}', ":3: not valid JSON: Expecting property name enclosed in double quotes at 'b: 2}'"),
    ("{'a': 1}", ":1: not valid JSON: Expecting property name"),
    ('["one", "two"]', ":1: a string, not a JSON object with named fields"),
    ('[{"a": 1},\n7]', ":2: a number, not a JSON object with named fields"),
    ("[[1]]", ":1: a list, not a JSON object with named fields"),
    ("null", ":1: null, not a JSON object with named fields"),
    ('[{"a": 1},\n{"a": ' + "9" * 5000 + "}]", ":2: not readable: a number has more than 4,300 digits"),
    ('[{"a": 1},\n{"a": ' + "[" * 100_000 + "]" * 100_000 + "}]", ":2: not readable: its brackets are nested too deeply"),
    ("[" * 100_000, ":1: not readable: its brackets are nested too deeply"),
    ('[{"a": 1},\n{"a": "\\ud800"}]', ":2: \\ud800 is half of a surrogate pair, which is not a character; remove it"),
    (b'[{"a": 1},\n{"a":\n"\xe9"}]', ":3: byte 0xe9 is not UTF-8; convert the file to UTF-8"),
    (b'[{"a": 1},\n{"a":\n"\xc3', ":3: byte 0xc3 is not UTF-8"),
]


@pytest.mark.parametrize("chunk", [1, 64, 1 << 20])
@pytest.mark.parametrize(("content", "message"), BAD)
def test_a_defect_is_named_with_its_line(monkeypatch, content, message, chunk):
    monkeypatch.setattr(json_rows, "JSON_CHUNK", chunk)
    with pytest.raises(UserError) as caught:
        objects(content)
    assert str(caught.value).startswith(f"rows.json{message}")
    assert len(str(caught.value)) < 200


def test_the_objects_before_a_defect_are_yielded_first():
    found = json_objects(io.BufferedReader(io.BytesIO(b'[{"a": 1}, {"a": 2}, oops')), PATH)
    assert [next(found), next(found)] == [(1, {"a": 1}), (1, {"a": 2})]
    with pytest.raises(UserError):
        next(found)


def test_an_endless_value_is_refused_before_it_fills_the_memory(monkeypatch):
    monkeypatch.setattr(json_rows, "MAX_JSON_BYTES", 10_000)
    monkeypatch.setattr(json_rows, "JSON_CHUNK", 1000)
    file = io.BufferedReader(io.BytesIO(b'{"a": 1}\n{"a": "' + b"x" * 1_000_000))
    with pytest.raises(UserError, match=r"rows.json:2: a JSON value is longer than 10,000 bytes; write one object per document"):
        list(json_objects(file, PATH))
    assert file.tell() < 50_000
    fits = b'{"a": "' + b"x" * (10_000 - 10) + b'"}\n'
    assert len(objects(fits * 3)) == 3


def test_damaged_arrays_end_in_a_result_or_one_line():
    rng = random.Random(0)
    content = json.dumps(VALUES[:4], indent=1).encode()
    for _ in range(500):
        place, new = (
            rng.randrange(len(content)),
            rng.choice([b"", b"}", b"[", b'"', b"\\", b",", b"\n", b"\xff", b"\\ud800", b"0"]),
        )
        damaged = content[:place] + new + content[place + rng.randrange(3) :]
        try:
            objects(damaged)
        except UserError as error:
            assert str(error).startswith("rows.json:")  # noqa: PT017 - Both outcomes are right.
