"""JSON from outside the project."""

import json
from pathlib import Path

import pytest

from gpt_jax.errors import UserError
from gpt_jax.inputs.json_values import parse_json, parse_json_object

PATH = Path("rows.jsonl")


@pytest.mark.parametrize("value", [{"a": "\U0001f600"}, ["\\ud800"], 10**4000, [[["deep"]]], {"text": "plain"}])
def test_a_value_survives(value: object) -> None:
    assert parse_json(json.dumps(value), PATH) == value


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "rows.jsonl:7: not valid JSON: Expecting property name enclosed in double quotes at the end"),
        ('{"a":\n\n}', "rows.jsonl:9: not valid JSON: Expecting value at '}' (in the value that begins in line 7)"),
        ('{"a":\n"b', "rows.jsonl:8: not valid JSON: Unterminated string starting at '\"b' (in the value that begins in line 7)"),
        ('{"a": 1}\n{"b": 2}', "rows.jsonl:8: not valid JSON: Extra data at '{\"b\": 2}'"),
        ('{"a":\n\n', "rows.jsonl:7: not valid JSON: Expecting value at the end"),
        ("1" * 5000, "rows.jsonl:7: not readable: a number has more than 4,300 digits"),
        ("[" * 100_000, "rows.jsonl:7: not readable: its brackets are nested too deeply"),
        ('{"a": "\\uD83D"}', "rows.jsonl:7: \\ud83d is half of a surrogate pair, which is not a character; remove it"),
        ('{"\\udc00": 1}', "rows.jsonl:7: \\udc00 is half of a surrogate pair, which is not a character; remove it"),
    ],
)
def test_a_defect_is_one_line_with_its_place(text: str, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_json(text, PATH, 7)
    assert str(caught.value) == problem


def test_other_values_are_not_objects() -> None:
    assert parse_json_object('{"a": 1}', PATH) == {"a": 1}
    with pytest.raises(UserError, match=r"rows.jsonl:3: a list, not a JSON object with named fields"):
        parse_json_object("[1]", PATH, 3)
