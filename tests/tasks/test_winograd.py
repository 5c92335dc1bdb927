"""Tests of the reader of Winograd schemas on the layouts of its files."""

import pytest

from gpt_jax.errors import UserError
from gpt_jax.tasks.winograd import read_winograd
from gpt_jax.tasks.zero_shot import PROBES


def write_and_read(tmp_path, text):
    path = tmp_path / "schemas.txt"
    path.write_text(text)
    return read_winograd(path)


def substituted(example):
    return ["".join(choice) for choice in PROBES["dprd"].choices(example)]


def test_the_layout_of_the_definite_pronoun_resolution_dataset(tmp_path):
    text = (
        "The bee landed on the flower because it wanted pollen.\nit\nThe bee,the flower\nThe bee\n\n"
        "When Debbie splashed Tina, she got in trouble.\nshe\nDebbie,Tina\nTina\n"
    )
    split = write_and_read(tmp_path, text)
    assert (split.num_rows, split.dropped) == (2, {})
    first, second = split.examples
    assert first.texts == ("The bee landed on the flower because ", " wanted pollen.", "The bee", "the flower")
    assert (first.label, second.label) == (0.0, 1.0)
    assert second.where == f"{tmp_path}/schemas.txt:6"
    assert substituted(first) == [
        "The bee landed on the flower because the bee wanted pollen.",
        "The bee landed on the flower because the flower wanted pollen.",
    ]


def test_the_first_occurrence_as_a_whole_word_is_replaced(tmp_path):
    """The "he" in "The" and "when" is not a word, and the second "he" remains."""
    split = write_and_read(tmp_path, "The man fled when Tom said he thought he lied.\nhe\nthe man,Tom\nTom\n\n")
    assert substituted(split.examples[0])[1] == "The man fled when Tom said Tom thought he lied."


def test_a_placeholder_takes_precedence_over_the_pronoun(tmp_path):
    """Files of the Winograd Schema Challenge have them, with stray spaces, whether or not the pronoun is given."""
    text = (
        "The drain is clogged with hair.  [MASK]  has to be cleaned. \n[MASK]\n the drain , The hair \n The drain \n\n"
        "They left it there, since nobody could move _ .\nit\nA piano,the crate\nthe crate\n\n\n"
    )
    first, second = write_and_read(tmp_path, text).examples
    assert substituted(first) == [
        "The drain is clogged with hair. The drain has to be cleaned.",
        "The drain is clogged with hair. The hair has to be cleaned.",
    ]
    assert first.label == 0
    assert substituted(second) == [
        "They left it there, since nobody could move a piano.",
        "They left it there, since nobody could move the crate.",
    ]


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_there_are_two_to_five_candidates(tmp_path, count):
    """The pronoun disambiguation problems of the challenge of 2016 have up to five."""
    candidates = ["Mrs. March", "the mother", "the children", "Hannah", "the nurse"][:count]
    (example,) = write_and_read(
        tmp_path, f"It was late when she came.\nshe\n{', '.join(candidates)}\n{candidates[-1]}\n"
    ).examples
    assert example.texts == ("It was late when ", " came.", *candidates)
    assert example.label == count - 1
    assert substituted(example) == [f"It was late when {candidate} came." for candidate in candidates]


def test_only_line_ends_end_lines(tmp_path):
    """Texts from the web contain other separators, and files of old Macs have no line feeds."""
    lines = ["A\u2028b it\x0cc.", "it", "A,b", "A"]
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "schemas.txt").write_bytes(end.join(lines).encode())
        (example,) = read_winograd(tmp_path / "schemas.txt").examples
        assert example.texts == ("A b ", " c.", "A", "b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A b it c.\nit\nA,b\n", r":1: an example must have four lines \(.*\) before the blank one, not 3"),
        ("A b it c.\nit\nA,b\nA\n\nA b it c.\nit\nA,b\nA\nA b", ":6: .* not 5"),
        ("A bit c.\nit\nA,b\nA\n", ":2: the pronoun 'it' is not a word of the sentence 'A bit c.'"),
        ("A b it\nit\nA,b\nA\n", ":2: nothing follows 'it' in the sentence"),
        ("A b it c.\nit\nA,b,c,d,e,f\nA\n", ":3: 'A,b,c,d,e,f' must be two to five candidates, separated by commas$"),
        ("A b it c.\nit\nA\nA\n", ":3: 'A' must be two to five candidates"),
        ("A b it c.\nit\nA,,b\nA\n", ":3: 'A,,b' must be two to five candidates"),
        ("A b it c.\nit\nA,b,a\nA\n", ":3: a candidate occurs twice in 'A,b,a'$"),
        ("\nA b it c.\nit\nA,b\nc\n", ":5: the answer 'c' is not one of the candidates 'A,b'"),
    ],
)
def test_malformed_schemas_are_refused_with_their_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        write_and_read(tmp_path, text)
    assert "\n" not in str(error.value)


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.txt: No such file"):
        read_winograd(tmp_path / "nowhere.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"latin.txt:1: byte 0xe9 is not UTF-8; convert"):
        read_winograd(tmp_path / "latin.txt")
