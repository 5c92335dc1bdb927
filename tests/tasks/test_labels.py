"""Tests of labels as tables have them: written in several ways, with holes, and of values that are not classes."""

import math

import pytest

from gpt_jax.errors import UserError
from gpt_jax.tasks.labels import classes_of, is_missing, label_text
from gpt_jax.tasks.tables import Record


def records(values, column="label"):
    return [Record(f"my.csv:{line}", {column: value}) for line, value in enumerate(values, start=2)]


def error_of(values):
    with pytest.raises(UserError) as error:
        classes_of(records(values), "label")
    assert len(str(error.value)) < 800
    return str(error.value)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((0, 0.0, "0", "0.0", " 0 ", "0.", "0.000", -0.0, "-0", "-0.0"), "0"),
        ((1, 1.0, "1", "1.0", "\t1\n"), "1"),
        ((-1, -1.0, "-1", "-1.0"), "-1"),
        ((10, 10.0, "10", "10.00", 1e1), "10"),
        ((2**70, float(2**70), str(2**70)), str(2**70)),
        ((True, "True", "true", "TRUE "), "true"),
        ((False, "False", "false", "FALSE"), "false"),
        (("yes", " yes", "yes\r"), "yes"),
        ((0.5, "0.5", " 0.5"), "0.5"),
        (("007",), "007"),
        (("1.0.0",), "1.0.0"),
        (("+1",), "+1"),
        ((None, "", "  ", [], {}), ""),
    ],
)
def test_a_label_has_one_text_however_it_is_written(values, text):
    assert {label_text(value) for value in values} == {text}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["a"], "the label is a list; it must be one value"),
        ({"a": 1}, "the label is an object; it must be one value"),
        (math.inf, "the label is infinite; it must be a class or a score"),
    ],
)
def test_values_that_are_not_one_label(value, message):
    with pytest.raises(ValueError, match=message):
        label_text(value)
    assert error_of(["a", "b", value, value]) == f"my.csv:4: {message}; rows with errors: 2 (4, 5)"


@pytest.mark.parametrize(
    "hole",
    [
        None,
        "",
        " ",
        "nan",
        "NaN",
        math.nan,
        "-nan",
        "null",
        "NULL",
        "None",
        "NA",
        "n/a",
        "N/A",
        "#N/A",
        "#VALUE!",
        "<NA>",
        "-",
        "?",
        ".",
        "\\N",
        [],
        {},
    ],
)
def test_holes_are_missing_labels_and_not_classes(hole):
    assert is_missing(label_text(hole))
    assert error_of(["a", "b", hole, "a", hole]).startswith("my.csv:4: the label is missing")
    assert error_of(["a", "b", hole, "a", hole]).endswith("; rows with errors: 2 (4, 6)")


def test_many_holes_are_one_bounded_line():
    holes = ["", None, "nan", math.nan] * 1000
    assert error_of(["a", "b", *holes]) == (
        "my.csv:4: the label is missing, which is only allowed in a test split; rows with errors: 4,000 "
        "(4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 and 3,988 more)"
    )


def test_texts_for_missing_labels_that_may_be_classes_can_be_listed():
    assert error_of(["a", "\\N"]).endswith("; if '\\N' is a class, list the classes in --task.labels")
    assert error_of(["FAVOR", "AGAINST", "NONE"]) == (
        "my.csv:4: the label is missing ('NONE'), which is only allowed in a test split; if 'NONE' is a class, list the classes "
        "in --task.labels"
    )


def test_classes_are_sorted_by_value_or_alphabetically():
    assert classes_of(records(["10", 9, 10.0, "9.0"]), "label") == ("9", "10")
    assert classes_of(records(["1", "-1", "0"]), "label") == ("-1", "0", "1")
    assert classes_of(records(["10", "9", "x"]), "label") == ("10", "9", "x")
    assert classes_of(records(["+1", "-1"]), "label") == ("+1", "-1")
    assert classes_of(records([True, "False"]), "label") == ("false", "true")
    assert classes_of(records([f"intent {number}" for number in range(77)] * 2), "label")[:2] == ("intent 0", "intent 1")
    assert len(classes_of(records(list(range(20))), "label")) == 20
    assert classes_of(records(["GPT", "BERT", "3.5"]), "label") == ("3.5", "BERT", "GPT")


@pytest.mark.parametrize(
    ("values", "first"),
    [
        ([number / 7 for number in range(60)], "my.csv:3: the label '0.14285714285714285'"),
        (["0.5", "1", "1.5"], "my.csv:2: the label '0.5'"),
        (["4,5", "3,0"], "my.csv:2: the label '4,5'"),
        (["1e-3", "2"], "my.csv:2: the label '1e-3'"),
        ([".25", "1"], "my.csv:2: the label '.25'"),
        ([*(f"{number / 10}" for number in range(60)), "unknown", "inf"] * 10, "my.csv:3: the label '0.1'"),
    ],
)
def test_real_numbers_are_scores_and_not_classes(values, first):
    assert error_of(values) == (
        f"{first} is a real number, so 'label' holds scores and not classes; give their range (--task.score-range LOW HIGH) for "
        "a regression, or list the classes (--task.labels)"
    )


@pytest.mark.parametrize(
    "values",
    [
        [f"user{number}" for number in range(60)],
        list(range(1000, 1060)),
        list(range(1001)) * 2,
        ["9" * 5000, "1"],
        ["a text of many words " * 7000, "b"],
    ],
)
def test_identifiers_and_texts_are_not_classes(values):
    message = error_of(values)
    assert message.startswith(f"--task.label: 'label' has {len(set(values)):,} different values in {len(values):,} rows (")
    assert "which look like identifiers or texts" in message


def test_labels_that_differ_in_case_or_blanks_are_refused():
    assert error_of(["Yes", "no", "yes"]) == (
        "my.csv:4: the label 'yes' differs from 'Yes' (my.csv:2) only in case or blanks; write them the same way, or list both "
        "in --task.labels"
    )
    assert error_of(["not  sure", "no", "not sure"]).startswith(
        "my.csv:4: the label 'not sure' differs from 'not  sure' (my.csv:2)"
    )


def test_rows_with_the_wrong_number_of_cells_are_named_first():
    rows = [Record("my.csv:2", {"label": "a"}), Record("my.csv:3", {"text": "b"}, "1 columns; there must be 2: text, label")]
    with pytest.raises(UserError, match=r"^my.csv:3: 1 columns; there must be 2: text, label$"):
        classes_of(rows, "label")
