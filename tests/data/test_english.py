"""The words of the released encoder: the same in parts as in whole texts, with bounded memory, in threads."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from gpt_jax.data.english import EnglishWords

pytest.importorskip("ftfy", reason="ftfy (extra gpt1) is not installed")
spacy = pytest.importorskip("spacy", reason="spaCy (extra gpt1) is not installed")


@pytest.fixture(scope="module")
def english() -> EnglishWords:
    return EnglishWords()


@pytest.fixture(scope="module")
def whole():
    """A function that splits a standardized text with spaCy as a whole."""
    tokenizer = spacy.blank("en").tokenizer
    return lambda text: [word.text.lower() for word in tokenizer(text) if not word.is_space]


def words_of(english: EnglishWords, text: str) -> list[str]:
    """Returns the words of a text without newlines, as `whole` does."""
    return [word for part in english.parts(text) for word in english.words(part) if not word.isspace()]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", [""]),
        (" \n ", [""]),
        ("One  two,\tthree.\n\n Four", ["One", "two", ",", "three.", "\n", "Four"]),
        ("He said \u2018so\u2019 \u2014 twice\u2026", ["He", "said", "'so' -", "twice..."]),
        ("the end .", ["the", "end ."]),  # "d." is an exception, and only the last and the first character are compared.
    ],
)
def test_parts_of_texts(english, text, parts):
    assert english.parts(text) == parts


@pytest.mark.parametrize(
    ("text", "words"),
    [
        # In each text, an exception is left as several words, because spaces separate the words of another one that overlaps it.
        ("') :o''", ["'", ")", ":", "o", "''"]),
        ("'\u00b0 c.So", ["'", "\u00b0", "c", ".", "so"]),
        ("'''' ''a.", ["'", "''", "'", "'", "'", "a."]),
        ("': o.O=", ["'", ":", "o", ".", "o="]),
    ],
)
def test_exceptions_that_overlap_across_a_space(english, whole, text, words):
    assert words_of(english, text) == whole(" ".join(english.parts(text))) == words
    alone = [word for string in text.split(" ") for word in english.words(string)]
    assert alone != words  # So this text tests something.


def test_words_of_parts_are_the_words_of_the_text(english, whole):
    """The texts are made of spaCy's exceptions, which are glued together or separated at random."""
    rng = random.Random(0)
    exceptions = sorted(spacy.blank("en").tokenizer.rules)
    others = [*"':;=<>.-8o()[]|/\\$#&@^_x\u2019\u00b0\u00e9", "''", "'s", "n't", "US$", "http://a.b/c", "me@b.com", "Cat", "1868"]
    for _ in range(1500):
        pieces = [rng.choice(exceptions if rng.random() < 0.5 else others) for _ in range(rng.randrange(1, 12))]
        text = "".join(piece + rng.choice(["", " "]) for piece in pieces)
        assert words_of(english, text) == whole(" ".join(english.parts(text))), text


def test_words_that_were_read_are_not_kept(english):
    stored = english._split.vocab.strings
    english.words("once")
    before = len(stored)
    for number in range(200):
        english.words(f"word{number}")
    assert len(stored) == before


def test_a_failure_does_not_affect_later_texts(english):
    with pytest.raises(TypeError):
        english.words(None)
    assert english.words("don't") == ["do", "n't"]


def test_threads_split_at_the_same_time(english):
    parts = [f"{word}{number}'s." for number in range(300) for word in ("Ann", "Bob")]
    expected = [english.words(part) for part in parts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(english.words, parts)) == expected
