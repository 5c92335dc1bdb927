"""Zero-shot probes (section 5, "Zero-shot Behaviors"; Figure 2, right): what a language model can do without fine-tuning.

Every probe compares log-probabilities of continuations. A text follows the tokenizer's separator, as a document does in the
token store; context and continuation are encoded apart and put together, and the space between them belongs to the
continuation: SentencePiece makes it part of the next piece, bytes keep it as a byte, and the released encoder has no spaces.

    CoLA               mean log-probability of the sentence's tokens; acceptable from a threshold on: the training sentence's
                       score that has the highest Matthews correlation there (of equal ones the lowest, which accepts most)
    SST-2              the probabilities of " positive" and " negative" after the sentence and " very": of the whole word, so the
                       log-probabilities of its pieces are summed
    RACE, Story Cloze  mean log-probability of each answer's tokens after the document (and the question)
    DPRD, WSC          the pronoun is replaced by each candidate; mean log-probability of the tokens after it

Story Cloze and WSC are ours. Equal choices share the point, since some files of WSC list the right candidate always first.
Scores are fractions, as in `scoring`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float64, Int64

from gpt_jax.config import ModelConfig
from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.errors import UserError, nearest
from gpt_jax.model.loss import token_log_probabilities
from gpt_jax.model.transformer import Params
from gpt_jax.tasks import metrics
from gpt_jax.tasks.file_layouts import SplitName
from gpt_jax.tasks.readers import Row, Split

Choice = tuple[str, str]
"""A context, and the continuation that is scored after it."""

# -- the probes -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Probe:
    """One column of the figure."""

    title: str
    task: str
    """The task in `registry` whose rows it takes; empty: those of a file that `read_winograd` reads, as the only split."""
    splits: tuple[SplitName, ...]
    """The splits it needs; the last one is scored."""
    choices: Callable[[Row], list[Choice]]
    """A row's choices in the order of the labels; a single one is accepted or not by a threshold."""
    metric: Literal["accuracy", "matthews"]
    random: float
    """What guessing scores: 0 after normalisation."""
    best: float | None
    """The best supervised model when the paper was written: 1 after normalisation; None: not normalised."""
    source: str
    """Where `best` is from."""
    whole: bool = False
    """Choices are compared by the sum of their tokens' log-probabilities rather than by the mean."""


def _sentence(row: Row) -> list[Choice]:
    return [("", row.texts[0])]


def _very(row: Row) -> list[Choice]:
    return [(f"{row.texts[0]} very", word) for word in (" negative", " positive")]


def _answers(row: Row) -> list[Choice]:
    context, *answers = row.texts
    return [(context, f" {answer}") for answer in answers]


def _substitutions(row: Row) -> list[Choice]:
    before, after, *candidates = row.texts
    return [(before + _in_place(candidate, before), after) for candidate in candidates]


PROBES = {
    "cola": Probe(
        "CoLA",
        "cola",
        ("train", "validation"),
        _sentence,
        "matthews",
        random=0.0,
        best=0.350,
        source="single-task BiLSTM + ELMo + attention, test server (the paper's Table 4)",
    ),
    "sst2": Probe(
        "SST-2",
        "sst2",
        ("validation",),
        _very,
        "accuracy",
        random=0.5,
        best=0.932,
        source="sparse byte mLSTM, test split (the paper's Table 4)",
        whole=True,
    ),
    "race": Probe(
        "RACE",
        "race",
        ("test",),
        _answers,
        "accuracy",
        random=0.25,
        best=0.533,
        source="BiAttention MRU, test split (the paper's Table 3: an ensemble of nine; it has no single model's figure)",
    ),
    "story_cloze": Probe(
        "Story Cloze",
        "story_cloze",
        ("test",),
        _answers,
        "accuracy",
        random=0.5,
        best=0.776,
        source="Hidden Coherence Model, test split (the paper's Table 3)",
    ),
    "dprd": Probe(
        "DPRD",
        "",
        ("test",),
        _substitutions,
        "accuracy",
        random=0.5,
        best=0.7641,
        source="Peng, Khashabi and Roth (2015), test split; Rahman and Ng (2012) had 73.05 (the paper gives no figure)",
    ),
    "wsc": Probe(
        "WSC",
        "",
        ("test",),
        _substitutions,
        "accuracy",
        random=0.5,
        best=None,
        source="not in the paper, which gives no figure to normalise by",
    ),
}


def probe(
    name: str, config: ModelConfig, params: Params, tokenizer: Tokenizer, splits: Mapping[SplitName, Split]
) -> dict[str, Any]:
    """Scores a language model on one probe.

    Args:
      name: a name in PROBES.
      config: the model's.
      params: its parameters.
      tokenizer: the one it was trained with.
      splits: `readers.read`'s, or {"test": read_winograd(file)}; the probe's `splits` are looked up.

    Returns:
      `probe`, `split`, the metric under its own name, `normalized` (0: a random guess, 1: the best supervised model; None where
      there is none), `random`, `best` and its `source`, `n` (rows scored), `truncated` (rows of which the beginning was cut off,
      over all splits), and for CoLA `threshold`.

    Raises:
      UserError: no such probe; a split is missing, empty, unlabelled, or of one class where Matthews' correlation needs two.
    """
    if name not in PROBES:
        raise UserError(f"no zero-shot probe is named '{name}'; {nearest(name, PROBES)}")
    chosen = PROBES[name]
    scored = chosen.splits[-1]
    threshold, truncated = {}, 0
    for split in chosen.splits:
        labels = _labels(name, chosen, split, splits.get(split))
        scores, cut = _score_choices(config, params, tokenizer, chosen, splits[split].rows)
        truncated += cut
        if split != scored:
            threshold = {"threshold": best_threshold(scores[:, 0], labels)}
    if threshold:
        value = metrics.matthews(labels, (scores[:, 0] >= threshold["threshold"]).astype(np.int64))
    else:
        likeliest = scores == scores.max(axis=1, keepdims=True)
        value = float((likeliest[np.arange(len(labels)), labels] / likeliest.sum(axis=1)).mean())
    return {
        "probe": name,
        "split": scored,
        chosen.metric: value,
        "normalized": None if chosen.best is None else (value - chosen.random) / (chosen.best - chosen.random),
        "random": chosen.random,
        "best": chosen.best,
        "source": chosen.source,
        "n": len(labels),
        "truncated": truncated,
        **threshold,
    }


def best_threshold(scores: Float64[np.ndarray, " n"], labels: Int64[np.ndarray, " n"]) -> float:
    """The lowest of the scores s for which "label 1 from s on" has the highest Matthews correlation with the labels (0 and 1)."""
    order = np.argsort(scores, kind="stable")
    thresholds, first = np.unique(scores[order], return_index=True)
    below = np.concatenate([[0], np.cumsum(labels[order])])[first].astype(np.float64)  # sentences of label 1 that are refused
    positive, negative = float(labels.sum()), float(len(labels) - labels.sum())
    true, refused = positive - below, first.astype(np.float64)
    product = positive * negative * refused * (len(labels) - refused)
    # Up to a positive factor TP TN - FP FN is the covariance of prediction and label; refusing nothing correlates with nothing.
    covariance = true * (refused - below) - (negative - refused + below) * below
    correlation = np.divide(covariance, np.sqrt(product), out=np.zeros_like(product), where=product > 0)
    return float(thresholds[correlation.argmax()])


def _labels(name: str, chosen: Probe, split: str, found: Split | None) -> Int64[np.ndarray, " n"]:
    """The labels of a split, after it was checked."""
    if found is None or not found.rows:
        raise UserError(f"the zero-shot probe '{name}' needs the {split} split of {chosen.title}, which is missing or empty")
    for row in found.rows:
        if row.label is None:
            raise UserError(f"{row.where}: has no label, which the zero-shot probe '{name}' needs")
    labels = np.array([row.label for row in found.rows], np.int64)
    if chosen.metric == "matthews" and np.unique(labels).size < 2:
        raise UserError(f"{found.rows[0].where}: the {split} split has one class only; Matthews' correlation needs two")
    return labels


def _score_choices(
    config: ModelConfig, params: Params, tokenizer: Tokenizer, chosen: Probe, rows: Sequence[Row]
) -> tuple[Float64[np.ndarray, "n choices"], int]:
    """A score for each choice of each row, and the number of rows of which something was cut off."""
    encode = functools.lru_cache(maxsize=1024)(tokenizer.encode)  # the choices of a row share a context or a continuation
    spans = []
    for row in rows:
        for context, continuation in chosen.choices(row):
            ids = encode(continuation)
            if not ids:
                raise UserError(f"{row.where}: '{continuation.strip()}' becomes no token, so there is nothing to score")
            spans.append(Span([tokenizer.eos_id, *encode(context), *ids], len(ids)))
    scores = score_spans(config, params, spans)
    values = scores.total if chosen.whole else scores.mean
    return values.reshape(len(rows), -1), int(scores.truncated.reshape(len(rows), -1).any(axis=1).sum())


# -- the core: log-probabilities of spans -----------------------------------------------------------------------------------

BATCH_SIZE = 32
"""Sequences in a batch; on a mesh, its batch axes must divide it."""
SHORTEST = 32
"""Sequences are padded to this many tokens, or twice, four times, ... as many: at most log2(context / SHORTEST) + 2 programs."""


class Span(NamedTuple):
    """A sequence of ids, the last `scored` of which are scored. The first id is only ever context."""

    ids: list[int]
    scored: int


class SpanScores(NamedTuple):
    """Log-probabilities (nats) of spans: their tokens' sum and mean, and whether the sequence's beginning was cut off."""

    total: Float64[np.ndarray, " n"]
    mean: Float64[np.ndarray, " n"]
    truncated: Bool[np.ndarray, " n"]


def score_spans(config: ModelConfig, params: Params, spans: Sequence[Span]) -> SpanScores:
    """Scores the end of each sequence given all that comes before it.

    A sequence of more than `context_length` + 1 ids loses its first ones, which is context unless the span itself is as long.
    """
    sequences = [span.ids[-(config.context_length + 1) :] for span in spans]
    lengths = [len(ids) - 1 for ids in sequences]
    total, counts = np.zeros(len(spans)), np.zeros(len(spans), np.int64)
    for numbers, size in _batches(lengths, config.context_length):
        tokens, targets = np.zeros((2, BATCH_SIZE, size), np.int32)
        for row, number in enumerate(numbers):
            tokens[row, : lengths[number]] = sequences[number][:-1]
            targets[row, : lengths[number]] = sequences[number][1:]
        log_probabilities = np.asarray(_token_log_probabilities(config, params, tokens, targets), np.float64)
        for row, number in enumerate(numbers):
            counts[number] = min(spans[number].scored, lengths[number])
            total[number] = log_probabilities[row, lengths[number] - counts[number] : lengths[number]].sum()
    truncated = np.array([len(span.ids) > len(ids) for span, ids in zip(spans, sequences, strict=True)], bool)
    return SpanScores(total, total / counts, truncated)


def _batches(lengths: Sequence[int], longest: int) -> Iterator[tuple[list[int], int]]:
    """Numbers of sequences that go into one batch, at most BATCH_SIZE, and the length they are padded to."""

    def size(number: int) -> int:
        return min(max(SHORTEST, 1 << (lengths[number] - 1).bit_length()), longest)

    for padded, group in itertools.groupby(sorted(range(len(lengths)), key=size), key=size):
        numbers = list(group)
        for start in range(0, len(numbers), BATCH_SIZE):
            yield numbers[start : start + BATCH_SIZE], padded


_token_log_probabilities = jax.jit(token_log_probabilities, static_argnums=0)

# -- Winograd schemas -------------------------------------------------------------------------------------------------------

PLACEHOLDER = re.compile(r"\[MASK\]|(?<!\w)_+(?!\w)")
"""What some files of Winograd schemas have in the pronoun's place."""


def read_winograd(path: Path) -> Split:
    """Reads Winograd schemas in the layout of the Definite Pronoun Resolution Dataset (Rahman and Ng, 2012; test.c.txt).

    An example is four lines and a blank one: the sentence, the pronoun, the two candidates with a comma between, the right one.
    Where the pronoun occurs several times, its first occurrence is meant, as that data set says: as a whole word, and in the case
    in which it is given. A placeholder ("[MASK]" or "_") in the sentence goes before any pronoun. Runs of white space become one
    space.

    Returns:
      Rows whose texts are what stands before the pronoun, what stands after it, and the two candidates; the label is the number
      of the right one.

    Raises:
      UserError: the file cannot be read; or, with file and line, an example of another number of lines or candidates, a
        pronoun that is not in its sentence or that ends it, or an answer that is no candidate.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a file of Winograd schemas") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None
    filled = [(number, " ".join(line.split())) for number, line in enumerate(lines, start=1)]
    examples = [list(group) for blank, group in itertools.groupby(filled, lambda line: not line[1]) if not blank]
    rows = [_winograd_row(path, str(number), example) for number, example in enumerate(examples)]
    return Split(rows, len(rows), {})


def _winograd_row(path: Path, identifier: str, lines: list[tuple[int, str]]) -> Row:
    def require(condition: object, line: int, message: str) -> None:
        if not condition:
            raise UserError(f"{path}:{lines[line][0]}: {message}")

    parts = "sentence, pronoun, the two candidates, answer"
    require(len(lines) == 4, 0, f"an example must have four lines ({parts}) before the blank one, not {len(lines)}")
    sentence, pronoun, listed, answer = (text for _, text in lines)
    found = PLACEHOLDER.search(sentence) or re.search(rf"(?<!\w){re.escape(pronoun)}(?!\w)", sentence)
    require(found, 1, f"the pronoun '{pronoun}' is no word of the sentence '{sentence}'")
    assert found is not None
    before, after = sentence[: found.start()], re.sub(r"^ (?=[.,;:!?])", "", sentence[found.end() :])
    require(after, 1, f"'{pronoun}' ends the sentence, and what follows it is what would be scored")
    candidates = [candidate.strip() for candidate in listed.split(",")]
    require(len(candidates) == 2 and all(candidates), 2, f"'{listed}' must be the two candidates with a comma between them")
    folded = [candidate.casefold() for candidate in candidates]
    require(answer.casefold() in folded, 3, f"the answer '{answer}' is no candidate of '{listed}'")
    label = folded.index(answer.casefold())
    return Row(identifier, (before, after, *candidates), float(label), f"{path}:{lines[0][0]}")


def _in_place(candidate: str, before: str) -> str:
    """A candidate in the pronoun's place: upper case at the beginning of a sentence, and elsewhere no article in upper case."""
    if not before.strip() or before.rstrip()[-1] in ".!?":
        return candidate[0].upper() + candidate[1:]
    return re.sub(r"^(The|An|A)(?= )", lambda article: article[0].lower(), candidate)
