"""Tests of the transformations of Figure 1 on token ids written by hand, of truncation, and of labels as distributions."""

import itertools

import numpy as np
import pytest

from gpt_jax.errors import UserError
from gpt_jax.tasks.readers import Example
from gpt_jax.tasks.transforms import SpecialTokens, encode_examples, label_distributions, truncate

START, DELIMITER, EXTRACT = SPECIALS = SpecialTokens(101, 102, 103)


def example(*texts, label=0.0):
    return Example(id="6", texts=texts, label=label, where="my.tsv:7")


def letters(text):
    """Encodes a as 1, b as 2, ..., and drops spaces."""
    return [ord(letter) - ord("a") + 1 for letter in text if letter != " "]


def transform(rows, kind, num_outputs=2, max_tokens=512, truncation="longest", encode_text=letters):
    outputs = np.arange(num_outputs, dtype=np.float64)
    return encode_examples(rows, kind, encode_text, SPECIALS, outputs, max_tokens=max_tokens, truncation=truncation)


def sequences(encoded):
    """Returns the ids of every sequence of every example, found with `begins` and `lengths`."""
    return [
        [encoded.tokens[begin : begin + length].tolist() for begin, length in zip(begins, lengths, strict=True)]
        for begins, lengths in zip(encoded.begins, encoded.lengths, strict=True)
    ]


# -- Figure 1 ---------------------------------------------------------------------------------------------------------------


def test_classification():
    encoded = transform([example("abc"), example("d")], "classification")
    assert sequences(encoded) == [[[101, 1, 2, 3, 103]], [[101, 4, 103]]]


def test_entailment_puts_the_premise_before_the_hypothesis():
    encoded = transform([example("ab", "cde"), example("f", "g")], "entailment", num_outputs=3)
    assert sequences(encoded) == [[[101, 1, 2, 102, 3, 4, 5, 103]], [[101, 6, 102, 7, 103]]]


def test_similarity_has_both_orders():
    encoded = transform([example("ab", "c"), example("d", "efg")], "similarity")
    assert sequences(encoded) == [
        [[101, 1, 2, 102, 3, 103], [101, 3, 102, 1, 2, 103]],
        [[101, 4, 102, 5, 6, 7, 103], [101, 5, 6, 7, 102, 4, 103]],
    ]


def test_multiple_choice_has_a_sequence_for_each_answer():
    encoded = transform([example("ab", "c", "de", "f"), example("g", "h", "i", "jk")], "multiple_choice", num_outputs=3)
    assert sequences(encoded) == [
        [[101, 1, 2, 102, 3, 103], [101, 1, 2, 102, 4, 5, 103], [101, 1, 2, 102, 6, 103]],
        [[101, 7, 102, 8, 103], [101, 7, 102, 9, 103], [101, 7, 102, 10, 11, 103]],
    ]


def test_encoded_splits_have_the_documented_form():
    encoded = transform([example("ab", "c", "de"), example("g", "h", "i")], "multiple_choice", num_outputs=2)
    assert (encoded.tokens.dtype, encoded.tokens.shape) == (np.int32, (6 + 7 + 5 + 5,))
    assert (encoded.begins.dtype, encoded.begins.tolist()) == (np.int64, [[0, 6], [13, 18]])
    assert (encoded.lengths.dtype, encoded.lengths.tolist()) == (np.int32, [[6, 7], [5, 5]])
    assert (encoded.labels.dtype, encoded.labels.shape) == (np.float32, (2, 2))
    assert encoded.longest.tolist() == [7, 5]
    assert encoded.num_truncated == 0


def test_a_repeated_text_is_encoded_once():
    encoded_texts = []

    def spy(text):
        encoded_texts.append(text)
        return letters(text)

    rows = [example("story", "yes", "no"), example("story", "no", "perhaps")]
    encoded = transform(rows, "multiple_choice", encode_text=spy)
    assert sorted(encoded_texts) == ["no", "perhaps", "story", "yes"]
    assert sequences(encoded)[1][0] == [START, *letters("story"), DELIMITER, *letters("no"), EXTRACT]


# -- truncation -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [
        (12, [101, 1, 2, 3, 4, 5, 6, 102, 7, 8, 9, 103]),  # fits
        (11, [101, 1, 2, 3, 4, 5, 102, 7, 8, 9, 103]),
        (9, [101, 1, 2, 3, 102, 7, 8, 9, 103]),
        (8, [101, 1, 2, 102, 7, 8, 9, 103]),  # both three: the first loses
        (7, [101, 1, 2, 102, 7, 8, 103]),
        (5, [101, 1, 102, 7, 103]),
    ],
)
def test_the_longest_segment_loses_tokens_at_its_end(max_tokens, expected):
    encoded = transform([example("abcdef", "ghi")], "entailment", max_tokens=max_tokens)
    assert sequences(encoded) == [[expected]]
    assert encoded.num_truncated == (max_tokens < 12)


def test_a_single_text_loses_its_end():
    encoded = transform([example("abcdef"), example("ab")], "classification", max_tokens=4)
    assert sequences(encoded) == [[[101, 1, 2, 103]], [[101, 1, 2, 103]]]
    assert encoded.num_truncated == 1


def test_each_choice_is_cut_on_its_own_and_its_example_counted_once():
    rows = [example("abcd", "efgh", "efg", "e"), example("a", "b", "c", "d")]
    encoded = transform(rows, "multiple_choice", num_outputs=3, max_tokens=8)
    assert sequences(encoded)[0] == [
        [101, 1, 2, 102, 5, 6, 7, 103],
        [101, 1, 2, 102, 5, 6, 7, 103],
        [101, 1, 2, 3, 4, 102, 5, 103],
    ]
    assert encoded.num_truncated == 1


def test_either_order_of_a_pair_is_cut_on_its_own():
    encoded = transform([example("abcd", "efgh")], "similarity", max_tokens=8)
    assert sequences(encoded)[0] == [[101, 1, 2, 102, 5, 6, 7, 103], [101, 5, 6, 102, 1, 2, 3, 103]]


def test_released_truncation_cuts_each_segment_at_a_fixed_length():
    """10 // 2 - 2 = 3, although the first sequence would fit into 10 tokens uncut."""
    encoded = transform([example("abcde", "f"), example("abcd", "efgh")], "entailment", max_tokens=10, truncation="released")
    assert sequences(encoded) == [[[101, 1, 2, 3, 102, 6, 103]], [[101, 1, 2, 3, 102, 5, 6, 7, 103]]]
    assert encoded.num_truncated == 2


@pytest.mark.parametrize("max_tokens", range(5, 14))
def test_two_segments_are_cut_as_if_token_by_token(max_tokens):
    for lengths in itertools.product(range(1, 12), repeat=2):
        kept = list(lengths)
        while sum(kept) + 3 > max_tokens:
            kept[kept.index(max(kept))] -= 1
        assert truncate(lengths, max_tokens, "longest") == kept


# -- labels -----------------------------------------------------------------------------------------------------------------


def test_classes_and_choices_are_one_hot_and_hidden_labels_zeros():
    rows = [example("a", label=2), example("b", label=None), example("c", label=0)]
    assert transform(rows, "classification", num_outputs=3).labels.tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    rows = [example("a", "b", "c", label=1), example("a", "b", "c", label=0)]
    assert transform(rows, "multiple_choice").labels.tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("low", [0, 1, -3])
def test_scores_are_shared_between_neighboring_outputs(low):
    scores = [None if score is None else low + score for score in (4.2, 0.0, 5.0, 2.75, 3.0, None)]
    labels = label_distributions(scores, low + np.arange(6.0))
    expected = [
        [0, 0, 0, 0, 0.8, 0.2],
        [1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 1],
        [0, 0, 0.25, 0.75, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    np.testing.assert_allclose(labels, expected, atol=1e-6)


# -- mistakes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "texts", "which"),
    [
        ("classification", (" ",), "text 1 of 1"),
        ("entailment", ("ab", ""), "text 2 of 2"),
        ("multiple_choice", ("ab", " ", "c"), "text 2 of 3"),
    ],
)
def test_a_text_without_tokens_is_named_by_its_place(kind, texts, which):
    with pytest.raises(UserError, match=rf"^my\.tsv:7: {which} has no tokens; [^\n]*$"):
        transform([example(*texts)], kind)


@pytest.mark.parametrize(
    ("kind", "truncation", "least"),
    [("classification", "longest", 3), ("similarity", "longest", 5), ("multiple_choice", "released", 6)],
)
def test_too_few_tokens_for_any_text_are_refused(kind, truncation, least):
    rows = [example(*["abc"] * (1 if kind == "classification" else 3))]
    with pytest.raises(UserError, match=rf"^--task\.max-tokens: {least - 1} [^\n]* needs {least} or more$"):
        transform(rows, kind, max_tokens=least - 1, truncation=truncation)
    assert transform(rows, kind, max_tokens=least, truncation=truncation).longest.tolist() == [5 if least > 3 else 3]
