"""Transformations of labeled examples into sequences of token ids (section 3.3, Figure 1).

    classification    start text extract
    entailment        start premise delimiter hypothesis extract
    similarity        start a delimiter b extract          and  start b delimiter a extract
    multiple choice   start context delimiter answer extract    for each answer

The model processes the sequences of an example independently of each other. The classifier reads the activations of the extract
tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64

from gpt_jax.config import TaskConfig
from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.errors import UserError, require
from gpt_jax.tasks.readers import Example
from gpt_jax.tasks.registry import TaskKind

Truncation = Literal["longest", "released"]


class SpecialTokens(NamedTuple):
    """Ids of the tokens that fine-tuning adds to the vocabulary."""

    start: int
    delimiter: int
    extract: int


def special_tokens(tokenizer: Tokenizer) -> SpecialTokens:
    """Returns the ids of the special tokens, which follow those of the tokenizer."""
    return SpecialTokens(*range(tokenizer.vocab_size, tokenizer.vocab_size + len(SpecialTokens._fields)))


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedSplit:
    """A split as token ids: n examples of S sequences each, with target distributions over the K outputs of the classifier."""

    tokens: Int32[np.ndarray, " total"]
    """All sequences one after the other, example by example."""
    begins: Int64[np.ndarray, "n S"]
    """Index in `tokens` at which each sequence begins."""
    lengths: Int32[np.ndarray, "n S"]
    """Length of each sequence in tokens, special tokens included."""
    labels: Float32[np.ndarray, "n K"]
    """A distribution over the outputs; zeros where the label is hidden."""
    num_truncated: int
    """Number of examples that lost tokens."""

    @property
    def longest(self) -> Int32[np.ndarray, " n"]:
        """Length in tokens of each example's longest sequence."""
        return self.lengths.max(axis=1)


SEGMENTS = {"classification": ((0,),), "entailment": ((0, 1),), "similarity": ((0, 1), (1, 0))}
"""For each sequence of an example, the indices of the texts that it contains. `encode_examples` handles multiple choice."""


def encode_examples(
    examples: Sequence[Example],
    kind: TaskKind,
    encode_text: Callable[[str], list[int]],
    special: SpecialTokens,
    output_values: Float64[np.ndarray, " K"],
    *,
    max_tokens: int,
    truncation: Truncation,
) -> EncodedSplit:
    """Applies the transformation of Figure 1 to every example. Each distinct text is encoded once.

    Args:
      examples: their texts are in the order of the transformation: the text; premise, hypothesis; the two texts; the context and
        each answer.
      kind: determines the transformation.
      encode_text: the tokenizer's `encode`.
      special: ids of the special tokens.
      output_values: the score or the index of the label that each output of the classifier stands for (`Task.output_values`).
      max_tokens: maximum length of a sequence, including special tokens.
      truncation: `longest` removes tokens from the end of the longest segment (in a tie the first), one at a time, until the
        sequence fits. `released` cuts every segment at `max_tokens // 2 - 2` tokens, as the released code does.

    Raises:
      UserError: a text has no tokens, or `max_tokens` leaves no room for text.
    """
    sequences = segments_of(kind, len(output_values))
    _check_room(kind, len(sequences[0]), max_tokens, truncation)
    ids_of = functools.cache(lambda text: np.array(encode_text(text), np.int32))
    start, delimiter, extract = np.array(special, np.int32)[:, None]
    pieces: list[np.ndarray] = [np.empty(0, np.int32)]
    lengths = np.empty((len(examples), len(sequences)), np.int32)
    num_truncated = 0
    for number, example in enumerate(examples):
        texts = [ids_of(text) for text in example.texts]
        if empty := [place for place, ids in enumerate(texts, start=1) if not ids.size]:
            message = f"text {empty[0]} of {len(texts)} has no tokens; give it at least one word, or remove the row"
            raise UserError(f"{example.where}: {message}")
        truncated = False
        for s, segments in enumerate(sequences):
            full = [len(texts[segment]) for segment in segments]
            kept = truncate(full, max_tokens, truncation)
            truncated |= kept != full
            for segment, length, before in zip(segments, kept, (start, delimiter), strict=False):
                pieces += before, texts[segment][:length]
            pieces.append(extract)
            lengths[number, s] = _num_special(len(segments)) + sum(kept)
        num_truncated += truncated
    ends = lengths.cumsum(dtype=np.int64).reshape(lengths.shape)
    labels = label_distributions([example.label for example in examples], output_values)
    return EncodedSplit(np.concatenate(pieces), ends - lengths, lengths, labels, num_truncated)


def segments_of(kind: str, outputs: int) -> tuple[tuple[int, ...], ...]:
    """Returns the texts of which each sequence of an example consists, by their numbers in the example.

    Args:
      kind: determines the transformation.
      outputs: number of outputs of the classifier, which in multiple choice is the number of answers.
    """
    return SEGMENTS.get(kind) or tuple((0, 1 + answer) for answer in range(outputs))


def longest_input(config: TaskConfig, kind: TaskKind, outputs: int, context_length: int) -> int:
    """Returns the maximum number of tokens in an input, including special tokens.

    Args:
      kind, outputs: as for `segments_of`.
      context_length: maximum number of tokens that the model processes at once.

    Raises:
      UserError: `max_tokens` is more than the context, or leaves no room for text.
    """
    problem = f"{config.max_tokens} is more than the model's context of {context_length} tokens"
    require(config.max_tokens <= context_length, "task.max_tokens", problem)
    length = config.max_tokens or context_length
    _check_room(kind, len(segments_of(kind, outputs)[0]), length, config.truncation)
    return length


def _num_special(num_segments: int) -> int:
    """Returns the number of special tokens in a sequence: start, extract, and a delimiter between segments."""
    return num_segments + 1


def truncate(lengths: Sequence[int], max_tokens: int, truncation: Truncation) -> list[int]:
    """Returns how many tokens to keep from each of a sequence's one or two segments; `max_tokens` includes special tokens."""
    if truncation == "released":
        return [min(length, max_tokens // 2 - 2) for length in lengths]
    room = max_tokens - _num_special(len(lengths))
    if len(lengths) == 1:
        return [min(lengths[0], room)]
    # Each segment gets half of the room (the second one gets the odd token), and what the other one leaves of its half.
    first = min(lengths[0], max(room // 2, room - lengths[1]))
    return [first, min(lengths[1], room - first)]


def label_distributions(labels: Sequence[float | None], output_values: Float64[np.ndarray, " K"]) -> Float32[np.ndarray, "n K"]:
    """Returns labels as distributions over the outputs, which stand for consecutive whole numbers (`Task.output_values`).

    The index of a label becomes a one-hot distribution. A score between two integers is divided between them: 4.2 puts 0.8 on
    output 4 and 0.2 on output 5, so that the expectation equals the score (Tai, Socher and Manning, 2015, section 4.2). The paper
    does not describe how it handles STS-B, but the released code contains traces of this method. A hidden label (None) becomes
    zeros.
    """
    scores = np.array([np.nan if label is None else label for label in labels], np.float64)
    shares = 1 - np.abs(scores[:, None] - output_values)
    return np.fmax(shares, 0).astype(np.float32)  # fmax turns NaN into 0


def _check_room(kind: TaskKind, num_segments: int, max_tokens: int, truncation: Truncation) -> None:
    # The smallest m with m // 2 - 2 >= 1 is 6.
    least = 6 if truncation == "released" else _num_special(num_segments) + num_segments
    if max_tokens < least:
        raise UserError(
            f"--task.max-tokens: {max_tokens} leaves no room for text; {kind} with {truncation} truncation needs {least} or more"
        )
