"""Whether an exported model computes what the checkpoint does: both read the same text, and their outputs are compared."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from gpt_jax.config import ModelConfig
from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.model import network
from gpt_jax.model.transformer import Params
from gpt_jax.tasks.dataset import specials
from gpt_jax.tasks.head import Head

POSITIONS = 2048
"""Positions of text at which next-token scores are compared, at least."""
EXAMPLES = 64
"""Examples at which a fine-tuned model's outputs are compared."""
LOGITS_AT_ONCE = 1 << 26


class Difference(NamedTuple):
    """How far apart two models' outputs are."""

    compared: int
    """Positions or examples."""
    largest: float
    """Largest absolute difference of a logit or log-probability."""
    agreement: float
    """Share of them at which the likeliest output is the same."""


def documents() -> list[str]:
    """Real text that is on every machine: the reference topics of the Python language."""
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items())]


def windows(tokenizer: Tokenizer, model: ModelConfig) -> Iterator[Int[np.ndarray, "batch time"]]:
    """Batches of whole contexts of text, of `POSITIONS` tokens or more in all."""
    context = model.context_length
    tokens = _tokens(tokenizer, -(-POSITIONS // context) * context).reshape(-1, context)
    at_once = max(LOGITS_AT_ONCE // (context * model.vocab_size), 1)
    for begin in range(0, len(tokens), at_once):
        yield tokens[begin : begin + at_once]


def examples(
    tokenizer: Tokenizer, model: ModelConfig, sequences: int
) -> tuple[Int[np.ndarray, "batch sequences time"], Int[np.ndarray, "batch sequences"]]:
    """Inputs of a fine-tuned model, of different lengths: start text extract padding; and where each extract token is."""
    start, _, extract = specials(tokenizer)
    longest = min(model.context_length, 64)
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, longest, size=(EXAMPLES, sequences), endpoint=True)
    tokens = np.zeros((EXAMPLES, sequences, longest), np.int32)
    text = _tokens(tokenizer, EXAMPLES * sequences * longest).reshape(tokens.shape)
    inside = np.arange(longest) < lengths[..., None] - 1
    tokens[inside] = text[inside]
    tokens[..., 0] = start
    np.put_along_axis(tokens, lengths[..., None] - 1, extract, axis=-1)
    return tokens, (lengths - 1).astype(np.int32)


def _tokens(tokenizer: Tokenizer, count: int) -> Int[np.ndarray, " count"]:
    tokens: list[int] = []
    while len(tokens) < count:
        for document in documents():
            tokens += [*tokenizer.encode(document), tokenizer.eos_id]
            if len(tokens) >= count:
                break
    return np.array(tokens[:count], np.int32)


class Reference:
    """The checkpoint's model in float32, with its parameters rounded to the exported type."""

    def __init__(self, model: ModelConfig, params: Params, dtype: str):
        self._model = dataclasses.replace(model, compute_dtype="float32", param_dtype="float32", matmul_precision="highest")
        self._params = jax.jit(functools.partial(jax.tree.map, lambda x: x.astype(dtype).astype(jnp.float32)))(params)

    @functools.cached_property
    def logits(self) -> Callable[[Int[np.ndarray, "batch time"]], Float[np.ndarray, "batch time vocab"]]:
        """Next-token scores."""
        model = self._model

        @jax.jit
        def compute(params: Params, tokens: jax.Array) -> jax.Array:
            return network.logits(model, params, network.apply(model, params, tokens))

        return lambda tokens: np.asarray(compute(self._params, tokens))

    def log_probabilities(self, head: Head, tokens: np.ndarray, extract: np.ndarray) -> Float[np.ndarray, "batch outputs"]:
        """A fine-tuned model's outputs."""
        batch = {"tokens": tokens, "extract": extract, "labels": np.zeros((len(tokens), head.outputs), np.float32)}
        return np.asarray(jax.jit(functools.partial(head.log_probabilities, self._model))(self._params, batch))


def compare(pairs: Iterator[tuple[np.ndarray, np.ndarray]]) -> Difference:
    """The difference over all pairs of outputs (ours, theirs), each [..., outputs]."""
    compared, agreeing, largest = 0, 0, 0.0
    for ours, theirs in pairs:
        if ours.shape != theirs.shape:
            raise AssertionError(f"outputs of shape {theirs.shape} instead of {ours.shape}")
        difference = float(np.abs(ours.astype(np.float64) - theirs).max())
        largest = max(largest, difference) if np.isfinite(difference) else float("inf")
        same = ours.argmax(-1) == theirs.argmax(-1)
        compared, agreeing = compared + same.size, agreeing + int(same.sum())
    return Difference(compared, largest, agreeing / compared)


def summary(difference: Difference, tolerance: float, unit: str) -> dict[str, Any]:
    """An entry of parity.json."""
    return {
        unit: difference.compared,
        "max_abs_difference": difference.largest,
        "top1_agreement": difference.agreement,
        "tolerance": tolerance,
    }
