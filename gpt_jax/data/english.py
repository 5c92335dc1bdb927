"""The words of the released encoder: ftfy's repairs, the released replacements, and spaCy's rules for English."""

import itertools
import re
import threading
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from gpt_jax.errors import UserError

PUNCTUATION = re.compile(r'([-~!";?+,)(/*\[\]}{|_])\1*')
"""Runs of one character that are surrounded with spaces before spaCy splits the text. The backslash is not one of the characters,
because it only escapes the next character in the released pattern."""
PLAIN = str.maketrans({"\u2014": "-", "\u2013": "-", "\u2015": "-", "\u2026": "...", "\u00b4": "'"})
"""Replacements for dashes, the ellipsis and the acute accent, as in the released code."""


class EnglishWords:
    """Splits text into lowercase words as the released encoder does (openai/finetune-transformer-lm, text_utils.py).

    spaCy is slow, and most words are frequent. So a text is first cut into parts that can be split independently, and a caller
    can cache the words of frequent parts.

    Raises:
      UserError: ftfy or spaCy is not installed.
    """

    def __init__(self) -> None:
        try:
            import ftfy
            import spacy
        except ModuleNotFoundError as error:
            raise UserError(f"the gpt1 tokenizer needs {error.name}: pip install 'gpt_jax[gpt1]'") from None
        self._fix_text = ftfy.fix_text
        english: Any = spacy.blank("en")
        self._split = english.tokenizer
        self._split.vocab.lex_attr_getters = {}  # The attributes of words are not needed and take long to compute.
        self._independent_space = _independent_space(self._split)
        self._lock = threading.Lock()

    def parts(self, text: str) -> list[str]:
        """Repairs and standardizes a text, and cuts it into its parts, most of which are strings without spaces."""
        text = PUNCTUATION.sub(r" \g<0> ", self._fix_text(text).translate(PLAIN))
        text = re.sub(r"[^\S\n]+", " ", re.sub(r"\s*\n\s*", " \n ", text)).strip()
        return self._independent_space.split(text)

    def words(self, part: str) -> list[str]:
        """Returns the words of a part of a text. A newline is a word."""
        # Without a memory zone, spaCy would keep every word of the corpus. Zones of several threads must not overlap.
        with self._lock, self._split.vocab.memory_zone():
            return [word.text.lower() for word in self._split(part)]


def _independent_space(split: Any) -> re.Pattern[str]:
    """Returns a pattern for the spaces at which a standardized text can be cut without changing spaCy's words.

    spaCy cuts a text at spaces and splits each string between them on its own. Then it searches the words of the whole text for
    sequences that are exceptions when written without spaces, such as "a.m." and ":-)", and makes each of them one word. A
    sequence with a space inside stays as it is, but it can keep a shorter one that overlaps it from becoming a word. So a space
    matters only if a word of some exception may end before it and the next word of that exception may begin after it. The pattern
    compares only the last and the first character of these words, and so keeps a few more parts together than necessary.
    """
    rules = {
        name: getattr(split, name) for name in ("prefix_search", "suffix_search", "infix_finditer", "token_match", "url_match")
    }
    split_without_exceptions = type(split)(split.vocab, **rules)
    ends: dict[str, set[str]] = defaultdict(set)
    for exception in split.rules:
        for word, following in itertools.pairwise(word.text for word in split_without_exceptions(exception)):
            ends[following[0]].add(word[-1])

    def characters(chosen: Iterable[str]) -> str:
        return f"[{''.join(map(re.escape, sorted(chosen)))}]"

    # The next character is compared first, because it usually decides.
    dependent = "|".join(f"{characters(before)} {re.escape(start)}" for start, before in sorted(ends.items()))
    return re.compile(f" (?!{characters(ends)}(?<={dependent}))")
