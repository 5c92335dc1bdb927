"""From the rows of a labelled task to sequences of token ids (section 3.3, Figure 1).

    classification    start text extract
    entailment        start premise delimiter hypothesis extract
    similarity        start a delimiter b extract          and  start b delimiter a extract
    multiple choice   start context delimiter answer extract    for each answer

A model reads an example's sequences independently of each other; the classifier reads what it makes of the extract token.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64

from gpt_jax.errors import UserError

if TYPE_CHECKING:
    from gpt_jax.tasks.readers import Row
    from gpt_jax.tasks.registry import Kind

Truncation = Literal["longest", "released"]


class Specials(NamedTuple):
    """Ids of the tokens that fine-tuning adds to the vocabulary."""

    start: int
    delimiter: int
    extract: int


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """A split as token ids: n examples of S sequences each, and what the K outputs of the classifier should be."""

    tokens: Int32[np.ndarray, " total"]
    """All sequences one after the other, example by example."""
    begins: Int64[np.ndarray, "n S"]
    """Where each sequence begins in `tokens`."""
    lengths: Int32[np.ndarray, "n S"]
    """Tokens of each sequence, special ones included."""
    labels: Float32[np.ndarray, "n K"]
    """A distribution over the outputs; zeros where the label is hidden."""
    truncated: int
    """Examples of which something was cut."""

    @property
    def longest(self) -> Int32[np.ndarray, " n"]:
        """Tokens of each example's longest sequence."""
        return self.lengths.max(axis=1)


def encode(
    rows: Sequence[Row],
    kind: Kind,
    encode_text: Callable[[str], list[int]],
    specials: Specials,
    num_outputs: int,
    *,
    max_tokens: int,
    truncation: Truncation,
) -> Encoded:
    """Applies Figure 1's transformation to every row. Each distinct text is encoded once.

    Args:
      rows: texts in the order of the transformation: the text; premise, hypothesis; the two texts; the context and each answer.
      kind: the transformation.
      encode_text: the tokenizer.
      specials: ids of the special tokens.
      num_outputs: K, outputs of the classifier; in a multiple choice the number of answers.
      max_tokens: most tokens of a sequence, special ones included.
      truncation: `longest`: tokens are taken off the end of whichever segment is longest, of the first if both are, until the
        sequence fits; `released`: every segment is cut at `max_tokens // 2 - 2` tokens, as in the released code.

    Raises:
      UserError: a text without tokens, or `max_tokens` leaves no room for any.
    """
    sequences = _segments(kind, num_outputs)
    _require_room(kind, len(sequences[0]), max_tokens, truncation)
    ids_of = functools.cache(lambda text: np.array(encode_text(text), np.int32))
    start, delimiter, extract = np.array(specials, np.int32)[:, None]
    pieces: list[np.ndarray] = [np.empty(0, np.int32)]
    lengths = np.empty((len(rows), len(sequences)), np.int32)
    truncated = 0
    for number, row in enumerate(rows):
        texts = [ids_of(text) for text in row.texts]
        _require_tokens(row, texts)
        cut = False
        for s, sequence in enumerate(sequences):
            full = [len(texts[segment]) for segment in sequence]
            kept = truncate(full, max_tokens, truncation)
            cut |= kept != full
            for segment, length, before in zip(sequence, kept, (start, delimiter), strict=False):
                pieces += before, texts[segment][:length]
            pieces.append(extract)
            lengths[number, s] = _num_specials(len(sequence)) + sum(kept)
        truncated += cut
    ends = lengths.cumsum(dtype=np.int64).reshape(lengths.shape)
    labels = distributions([row.label for row in rows], num_outputs)
    return Encoded(np.concatenate(pieces), ends - lengths, lengths, labels, truncated)


def _segments(kind: Kind, num_outputs: int) -> tuple[tuple[int, ...], ...]:
    """For each sequence of an example, which of the row's texts it holds, in order."""
    if kind == "classification":
        return ((0,),)
    if kind == "entailment":
        return ((0, 1),)
    if kind == "similarity":
        return ((0, 1), (1, 0))
    return tuple((0, 1 + answer) for answer in range(num_outputs))


def _num_specials(num_segments: int) -> int:
    """Start, extract, and delimiters between segments."""
    return num_segments + 1


def truncate(lengths: Sequence[int], max_tokens: int, truncation: Truncation) -> list[int]:
    """How many tokens to keep of the one or two segments of a sequence that may have `max_tokens` with its special tokens."""
    if truncation == "released":
        return [min(length, max_tokens // 2 - 2) for length in lengths]
    room = max_tokens - _num_specials(len(lengths))
    if len(lengths) == 1:
        return [min(lengths[0], room)]
    # Each segment may have half of the room (the second the odd token), and whatever the other one leaves of its half.
    first = min(lengths[0], max(room // 2, room - lengths[1]))
    return [first, min(lengths[1], room - first)]


def distributions(labels: Sequence[float | None], num_outputs: int) -> Float32[np.ndarray, "n K"]:
    """Labels as distributions over the outputs: an index is one-hot, a score in between is shared by its neighbours.

    So the score 4.2 is 0.8 on output 4 and 0.2 on output 5, and their expectation is the score again (Tai, Socher and Manning,
    2015, section 4.2; the paper does not say how it treats STS-B, the released code has traces of this). None, a hidden label, is
    all zeros.
    """
    scores = np.array([np.nan if label is None else label for label in labels], np.float64)
    shares = 1 - np.abs(scores[:, None] - np.arange(num_outputs))
    return np.fmax(shares, 0).astype(np.float32)  # of NaN and 0, fmax takes 0


def _require_room(kind: Kind, num_segments: int, max_tokens: int, truncation: Truncation) -> None:
    # The smallest m with m // 2 - 2 >= 1 is 6.
    least = 6 if truncation == "released" else _num_specials(num_segments) + num_segments
    if max_tokens < least:
        raise UserError(
            f"--task.max-tokens: {max_tokens} leaves no room for text; {kind} with {truncation} truncation needs {least} or more"
        )


def _require_tokens(row: Row, texts: Sequence[np.ndarray]) -> None:
    for number, ids in enumerate(texts, 1):
        if not ids.size:
            raise UserError(f"{row.where}: text {number} of {len(texts)} is empty; give it at least one word or take the row out")
