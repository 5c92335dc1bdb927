"""Messages about JSON values that do not have the shape that their reader needs."""

import json

import pytest

from gpt_jax.inputs.json_shapes import mismatch

SHAPE = {
    "step": int,
    "loss?": float,
    "best": (float, None),
    "files": {str: {"size": int, "sha256": str}},
    "seeds?": [int],
    "other": (dict, list),
}
SOUND = {"step": 3, "best": None, "files": {"a/b": {"size": 0, "sha256": "f0"}}, "other": []}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"step": 0},
        {"step": 2**63 - 1},
        {"loss": 1},
        {"loss": -1e308},
        {"loss": float("nan")},
        {"best": 0.5},
        {"files": {}},
        {"seeds": []},
        {"seeds": [1, 2]},
        {"other": {"a": [1]}},
        {"unknown": {"a": None}},
    ],
)
def test_a_value_of_the_shape_has_no_mismatch(change):
    assert mismatch(SOUND | change, SHAPE) == ""


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"step": "3"}, "'step' is a string, not a whole number of at least 0"),
        ({"step": 3.0}, "'step' is a number, not a whole number of at least 0"),
        ({"step": -1}, "'step' is a number, not a whole number of at least 0"),
        ({"step": 2**63}, "'step' is a number, not a whole number of at least 0"),
        ({"step": 10**4000}, "'step' is a number, not a whole number of at least 0"),
        ({"step": True}, "'step' is true or false, not a whole number of at least 0"),
        ({"step": None}, "'step' is null, not a whole number of at least 0"),
        ({"loss": None}, "'loss' is null, not a floating-point number"),
        ({"loss": True}, "'loss' is true or false, not a floating-point number"),
        ({"loss": 10**400}, "'loss' is a number, not a floating-point number"),
        ({"loss": -(10**400)}, "'loss' is a number, not a floating-point number"),
        ({"best": "1"}, "'best' is a string, not a floating-point number"),
        ({"files": []}, "'files' is a list, not an object"),
        ({"files": {"a": {"size": 1}}}, "'files.a.sha256' is missing"),
        ({"files": {"a": {"size": [], "sha256": ""}}}, "'files.a.size' is a list, not a whole number of at least 0"),
        ({"files": {"a": {"size": 1, "sha256": 5}}}, "'files.a.sha256' is a number, not a string"),
        ({"files": {"a": 5}}, "'files.a' is a number, not an object"),
        ({"seeds": 5}, "'seeds' is a number, not a list"),
        ({"seeds": [1, "a"]}, "'seeds.1' is a string, not a whole number of at least 0"),
        ({"other": 5}, "'other' is a number, not an object"),
    ],
)
def test_the_first_part_of_another_shape_is_named(change, phrase):
    assert mismatch(json.loads(json.dumps(SOUND | change)), SHAPE) == phrase


@pytest.mark.parametrize("name", ["step", "best", "files", "other"])
def test_a_missing_field_is_named(name):
    assert mismatch({key: value for key, value in SOUND.items() if key != name}, SHAPE) == f"'{name}' is missing"


@pytest.mark.parametrize(
    ("value", "described"), [(None, "null"), ([], "a list"), ("x", "a string"), (5, "a number"), (True, "true or false")]
)
def test_a_file_that_holds_something_else(value, described):
    assert mismatch(value, SHAPE) == f"it is {described}, not an object"


def test_a_long_name_is_shortened():
    assert len(mismatch({"files": {"x" * 1000: 5}}, {"files": {str: str}})) < 130
