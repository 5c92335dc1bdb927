"""Zero-shot probes (section 5, "Zero-shot Behaviors"; Figure 2, right), which score a language model without fine-tuning.

Every probe compares the log-probabilities of continuations. Each text follows the tokenizer's end-of-document token, like a
document in the token store. Context and continuation are encoded separately and concatenated. The space between them belongs to
the continuation: SentencePiece makes it part of the next piece, `bytes` keeps it as a byte, and the released encoder has no
spaces.

    CoLA               mean log-probability of the sentence's tokens. A sentence is accepted if its score reaches a threshold. The
                       threshold is the score of a training sentence with which the Matthews correlation of the training split is
                       highest (in a tie the lowest, which accepts the most sentences)
    SST-2              the probabilities of the words " positive" and " negative" after the sentence and " very". The
                       log-probabilities of a word's pieces are summed
    RACE, Story Cloze  mean log-probability of each answer's tokens after the document (and the question)
    DPRD, WSC          mean log-probability of the tokens that follow the pronoun, after each candidate has replaced the pronoun

The paper does not evaluate Story Cloze and WSC. If k choices are tied for the highest score and one of them is correct, the
example counts 1 / k, because in some files of WSC the correct candidate is always the first. Scores are fractions, as in
`metrics`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64, Int64

from gpt_jax.config import ModelConfig
from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.errors import UserError, nearest
from gpt_jax.model.loss import pad_time, time_chunks
from gpt_jax.model.network import network
from gpt_jax.model.transformer import Params, Tokens
from gpt_jax.runtime.sharding import constrain
from gpt_jax.tasks.file_layouts import SplitName
from gpt_jax.tasks.metrics import compute_metric
from gpt_jax.tasks.readers import Example, TaskSplit
from gpt_jax.tasks.winograd import substitute

Choice = tuple[str, str]
"""A context, and the continuation whose log-probability after this context is the score."""

# -- probes -----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Probe:
    """A zero-shot task, which is one curve in the figure."""

    title: str
    choices: Callable[[Example], list[Choice]]
    """Returns an example's choices in the order of the labels. Their number may vary. A threshold decides whether a single choice
    is accepted."""
    best: float | None
    """The score of the best supervised model before the paper, which normalization maps to 1; None if there is none."""
    task: str = ""
    """The task in `registry` whose rows are used; empty if the rows are read from a file of Winograd schemas."""
    splits: tuple[SplitName, ...] = ("test",)
    """The splits that the probe needs. The last of them is scored."""
    metric: str = "accuracy"
    whole: bool = False
    """Whether choices are compared by the sum of their tokens' log-probabilities instead of the mean."""


def _sentence(example: Example) -> list[Choice]:
    return [("", example.texts[0])]


def _very(example: Example) -> list[Choice]:
    return [(f"{example.texts[0]} very", word) for word in (" negative", " positive")]


def _answers(example: Example) -> list[Choice]:
    context, *answers = example.texts
    return [(context, f" {answer}") for answer in answers]


def _substitutions(example: Example) -> list[Choice]:
    before, after, *candidates = example.texts
    return [(substitute(candidate, before), after) for candidate in candidates]


PROBES = {
    "cola": Probe("CoLA", _sentence, best=0.350, task="cola", splits=("train", "validation"), metric="matthews"),
    "sst2": Probe("SST-2", _very, best=0.932, task="sst2", splits=("validation",), whole=True),
    "race": Probe("RACE", _answers, best=0.533, task="race"),
    "story_cloze": Probe("Story Cloze", _answers, best=0.776, task="story_cloze"),
    "dprd": Probe("DPRD", _substitutions, best=0.7641),
    "wsc": Probe("WSC", _substitutions, best=None),
}
_SOURCES = {
    "cola": "single-task BiLSTM + ELMo + attention, test server (the paper's Table 4)",
    "sst2": "sparse byte mLSTM, test split (the paper's Table 4)",
    "race": "BiAttention MRU, test split (the paper's Table 3: an ensemble of nine; it has no single model's figure)",
    "story_cloze": "Hidden Coherence Model, test split (the paper's Table 3)",
    "dprd": "Peng, Khashabi and Roth (2015), test split; Rahman and Ng (2012) had 73.05 (the paper gives no figure)",
    "wsc": "not in the paper, which gives no figure to normalize by",
}
"""The source of each probe's `best`."""


def run_probe(
    name: str, config: ModelConfig, params: Params, tokenizer: Tokenizer, splits: Mapping[SplitName, TaskSplit]
) -> dict[str, Any]:
    """Scores a language model on one probe.

    Args:
      name: a name in `PROBES`.
      config: the model's config.
      params: the model's parameters.
      tokenizer: the tokenizer that the model was trained with.
      splits: the probe's splits, from `readers.read_split`, or {"test": `winograd.read_winograd`(file)}.

    Returns:
      `probe`, `split`, the metric under its own name, `normalized` (0 for a random guess, 1 for the best supervised model, or
      None), `random` (the score of a random guess), `best` and its `source`, `n` (number of examples scored), `truncated` (number
      of examples that lost their beginning, in all splits), and for CoLA `threshold`.

    Raises:
      UserError: there is no such probe; a split is missing, empty or unlabeled; or a split has only one class, but Matthews'
        correlation needs two.
    """
    if name not in PROBES:
        raise UserError(f"--zero-shot: there is no probe '{name}'; {nearest(name, PROBES)}")
    probe = PROBES[name]
    labels = {split: _labels(name, split, splits.get(split)) for split in probe.splits}
    scores, truncated = {}, 0
    for split in probe.splits:
        scores[split], num_truncated = _score_choices(config, params, tokenizer, probe, splits[split].examples)
        truncated += num_truncated
    scored = probe.splits[-1]
    threshold = {}
    if probe.metric == "matthews":
        threshold["threshold"] = best_threshold(scores["train"][:, 0], labels["train"])
        value = compute_metric("matthews", labels[scored], (scores[scored][:, 0] >= threshold["threshold"]).astype(np.int64))
        random = 0.0
    else:
        likeliest = scores[scored] == scores[scored].max(axis=1, keepdims=True)
        value = float((likeliest[np.arange(len(likeliest)), labels[scored]] / likeliest.sum(axis=1)).mean())
        random = float((1 / np.isfinite(scores[scored]).sum(axis=1)).mean())
    return {
        "probe": name,
        "split": scored,
        probe.metric: value,
        "normalized": None if probe.best is None else (value - random) / (probe.best - random),
        "random": random,
        "best": probe.best,
        "source": _SOURCES[name],
        "n": len(labels[scored]),
        "truncated": truncated,
        **threshold,
    }


def best_threshold(scores: Float64[np.ndarray, " n"], labels: Int64[np.ndarray, " n"]) -> float:
    """Returns the lowest score at which a sentence should be accepted.

    It is the given score for which accepting (1) or not (0) has the highest Matthews correlation with the labels; in a tie, it is
    the lowest such score.
    """
    thresholds, index = np.unique(scores, return_inverse=True)
    # The number of examples that each threshold accepts, and the number of those with label 1.
    accepted, true = (np.bincount(index, weights)[::-1].cumsum()[::-1] for weights in (None, labels))
    total, positive = float(len(labels)), float(labels.sum())
    # TP TN - FP FN, and the product of the four marginal sums, which is 0 if all examples or none are accepted.
    covariance = true * total - accepted * positive
    product = positive * (total - positive) * accepted * (total - accepted)
    correlation = np.divide(covariance, np.sqrt(product), out=np.zeros_like(product), where=product > 0)
    return float(thresholds[correlation.argmax()])


def _labels(name: str, split: str, content: TaskSplit | None) -> Int64[np.ndarray, " n"]:
    """Returns the labels of a split after checking it."""
    title, metric = PROBES[name].title, PROBES[name].metric
    if content is None or not content.examples:
        raise UserError(f"--zero-shot {name}: the {split} split of {title} is missing or empty; the probe needs it")
    for example in content.examples:
        if example.label is None:
            raise UserError(f"{example.where}: the row has no label, but the zero-shot probe '{name}' needs one")
    labels = np.array([example.label for example in content.examples], np.int64)
    if metric == "matthews" and np.unique(labels).size < 2:
        raise UserError(f"{content.examples[0].where}: the {split} split has only one class, but Matthews' correlation needs two")
    return labels


def _score_choices(
    config: ModelConfig, params: Params, tokenizer: Tokenizer, probe: Probe, examples: Sequence[Example]
) -> tuple[Float64[np.ndarray, "n choices"], int]:
    """Returns a score for each choice of each example, and the number of examples that lost their beginning.

    If some examples have fewer choices than others, their scores are padded with minus infinity.
    """
    encode = functools.lru_cache(maxsize=1024)(tokenizer.encode)  # an example's choices share a context or a continuation
    spans = []
    choices = [probe.choices(example) for example in examples]
    for example, pairs in zip(examples, choices, strict=True):
        for context, continuation in pairs:
            ids = encode(continuation)
            if not ids:
                raise UserError(f"{example.where}: '{continuation.strip()}' has no tokens, so there is nothing to score")
            spans.append(Span([tokenizer.eos_id, *encode(context), *ids], len(ids)))
    scores = score_spans(config, params, spans)
    counts = np.array([len(pairs) for pairs in choices])
    present = np.arange(counts.max()) < counts[:, None]
    values, truncated = np.full(present.shape, -np.inf), np.zeros(present.shape, bool)
    values[present] = scores.total if probe.whole else scores.mean
    truncated[present] = scores.truncated
    return values, int(truncated.any(axis=1).sum())


# -- log-probabilities of spans ---------------------------------------------------------------------------------------------

BATCH_SIZE = 32
"""Number of sequences in a batch. The size of the mesh's batch axes must divide it."""
MIN_LENGTH = 32
"""Sequences are padded to this many tokens times a power of two, so that at most log2(context / MIN_LENGTH) + 2 programs are
compiled."""


class Span(NamedTuple):
    """A sequence of ids, of which the last `num_scored` are scored. The first id is always context."""

    ids: list[int]
    num_scored: int


class SpanScores(NamedTuple):
    """Log-probabilities (nats) of n spans: the sum and the mean over their tokens."""

    total: Float64[np.ndarray, " n"]
    mean: Float64[np.ndarray, " n"]
    truncated: Bool[np.ndarray, " n"]
    """Whether the sequence lost its beginning."""


def score_spans(config: ModelConfig, params: Params, spans: Sequence[Span]) -> SpanScores:
    """Returns the log-probability of the end of each sequence given everything before it.

    If a sequence has more than `context_length` + 1 ids, the first ones are removed. They are usually part of the context.
    """
    sequences = [span.ids[-(config.context_length + 1) :] for span in spans]
    lengths = [len(ids) - 1 for ids in sequences]
    total, counts = np.zeros(len(spans)), np.zeros(len(spans), np.int64)
    for numbers, padded in _batches(lengths, config.context_length):
        tokens, targets = np.zeros((2, BATCH_SIZE, padded), np.int32)
        for row, number in enumerate(numbers):
            tokens[row, : lengths[number]] = sequences[number][:-1]
            targets[row, : lengths[number]] = sequences[number][1:]
        log_probabilities = np.asarray(token_log_probabilities(config, params, tokens, targets), np.float64)
        for row, number in enumerate(numbers):
            counts[number] = min(spans[number].num_scored, lengths[number])
            total[number] = log_probabilities[row, lengths[number] - counts[number] : lengths[number]].sum()
    truncated = np.array([len(span.ids) > len(ids) for span, ids in zip(spans, sequences, strict=True)], bool)
    return SpanScores(total, total / counts, truncated)


def _batches(lengths: Sequence[int], context_length: int) -> Iterator[tuple[list[int], int]]:
    """Yields the indices of the sequences of each batch, at most BATCH_SIZE, and the length that they are padded to."""

    def padded_length(number: int) -> int:
        return min(max(MIN_LENGTH, 1 << (lengths[number] - 1).bit_length()), context_length)

    for padded, group in itertools.groupby(sorted(range(len(lengths)), key=padded_length), key=padded_length):
        numbers = list(group)
        for start in range(0, len(numbers), BATCH_SIZE):
            yield numbers[start : start + BATCH_SIZE], padded


@functools.partial(jax.jit, static_argnums=0)
def token_log_probabilities(config: ModelConfig, params: Params, tokens: Tokens, targets: Tokens) -> Float[Array, "batch time"]:
    """Returns log softmax(logits)[target] (nats) at every position, float32, without dropout; `loss_chunk` time steps at once."""
    hidden = network(config).apply(config, params, tokens)
    table = constrain(params["embedding"]["tokens"], "vocab", None).astype(hidden.dtype)
    entries = jnp.arange(table.shape[0])
    batch, time = tokens.shape
    starts, chunk = time_chunks(time, config.loss_chunk, tokens.shape[0])
    hidden, targets = pad_time(hidden, len(starts) * chunk), pad_time(targets, len(starts) * chunk)

    def one_chunk(start: jax.Array) -> jax.Array:
        x, target = (jax.lax.dynamic_slice_in_dim(array, start, chunk, axis=1) for array in (hidden, targets))
        scores = jnp.einsum("bte,ve->btv", x, table, preferred_element_type=jnp.float32)
        scores = constrain(jnp.where(entries < config.vocab_size, scores, -jnp.inf), "batch", None, "vocab")
        target_score = jnp.where(entries == target[..., None], scores, 0).sum(axis=-1)
        return target_score - jax.nn.logsumexp(scores, axis=-1)

    with jax.default_matmul_precision(config.matmul_precision):
        pieces = jax.lax.map(one_chunk, starts)
    return constrain(jnp.moveaxis(pieces, 0, 1).reshape(batch, -1)[:, :time], "batch", None)
