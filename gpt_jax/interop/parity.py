"""The function that an exported model computes, and its comparison with the checkpoint on real text.

A language model computes

    tokens int32 [batch, time] -> logits float32 [batch, time, vocabulary]

and a fine-tuned model computes

    tokens int32 [batch, sequences, time], extract int32 [batch, sequences] -> log_probabilities float32 [batch, outputs]

where `extract` contains the positions of the extract tokens. The sizes of the axes `batch` and `time` are free, except that the
time of a Transformer cannot exceed its context length. All arithmetic is in float32, regardless of the config. If an id or a
position of an example is out of range, the outputs of the example are NaN, because XLA would use the nearest entry instead.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Int

from gpt_jax.config import ModelConfig
from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.errors import VerificationError
from gpt_jax.interop.tokenizer_json import pad_id
from gpt_jax.model import transformer
from gpt_jax.model.network import network
from gpt_jax.model.transformer import Params
from gpt_jax.runtime.console import Log
from gpt_jax.tasks.head import Head
from gpt_jax.tasks.transforms import special_tokens

POSITIONS = 2048
"""Minimum number of positions of text at which next-token logits are compared."""
EXAMPLES = 64
"""Number of examples for which the outputs of a fine-tuned model are compared."""
LOGITS_AT_ONCE = 1 << 26
"""Maximum number of logits in one batch, which limits memory."""

Shape = tuple[str | int, ...]
"""A shape in which a string is the name of a free dimension."""
Inputs = tuple[np.ndarray, ...]
Computation = Callable[..., np.ndarray]
"""A function of tokens, or of tokens and extract, that returns the output of an exported model."""


@dataclasses.dataclass(frozen=True)
class ExportedFunction:
    """The function of parameters and inputs that a language model or a fine-tuned model computes."""

    model: ModelConfig
    head: Head | None = None
    sequences: int = 1
    """Number of sequences in an example; 1 without a head."""

    def __call__(self, params: Params, tokens: jax.Array, *extract: jax.Array) -> jax.Array:
        """Returns the logits, or the log-probabilities of a model with a head."""
        model = dataclasses.replace(
            self.model, compute_dtype="float32", matmul_precision="highest", attention="plain", remat="off", layer_unroll=1
        )
        valid = _in_range(tokens, model.vocab_size)
        if self.head is None:
            output = transformer.logits(model, params, network(model).apply(model, params, tokens))
        else:
            valid &= _in_range(extract[0], tokens.shape[-1])
            labels = jnp.zeros((tokens.shape[0], self.head.outputs), jnp.float32)  # Only the shape of the labels is used.
            batch = {"tokens": tokens, "extract": extract[0], "labels": labels}
            output = self.head.log_probabilities(model, params, batch)
        return jnp.where(jnp.expand_dims(valid, range(1, output.ndim)), output, jnp.nan)

    def bind(self, params: Params) -> Computation:
        """Returns the compiled function of the inputs alone."""
        compiled = jax.jit(self)
        return lambda *inputs: np.asarray(compiled(params, *inputs))

    @property
    def inputs(self) -> dict[str, Shape]:
        """Names and shapes of the int32 inputs, in order."""
        if self.head is None:
            return {"tokens": ("batch", "time")}
        return {"tokens": ("batch", self.sequences, "time"), "extract": ("batch", self.sequences)}

    @property
    def output(self) -> tuple[str, Shape]:
        """Name and shape of the float32 output."""
        if self.head is None:
            return "logits", ("batch", "time", self.model.vocab_size)
        return "log_probabilities", ("batch", self.head.outputs)

    @property
    def limits(self) -> list[str]:
        """Conditions on the free dimensions, in the notation of `jax.export.SymbolicScope`."""
        return [f"time <= {self.model.context_length}"] if self.model.kind == "transformer" else []

    def named_parameters(self, params: Params) -> dict[str, np.ndarray]:
        """Returns float32 parameters on the host, sorted by path. An example of a path is "params/blocks/mlp/up/kernel".

        The rows that pad the vocabulary are left out.
        """
        flat = traverse_util.flatten_dict({"params": jax.device_get(params)}, sep="/")
        arrays = {name: array.astype(np.float32, copy=False) for name, array in sorted(flat.items())}
        return arrays | {"params/embedding/tokens": arrays["params/embedding/tokens"][: self.model.vocab_size]}


def _in_range(indices: jax.Array, size: Any) -> jax.Array:
    """Returns for each example whether all of its indices are in [0, size)."""
    return ((indices >= 0) & (indices < size)).all(axis=tuple(range(1, indices.ndim)))


# -- comparing --------------------------------------------------------------------------------------------------------------


def documents() -> list[str]:
    """Returns real text that is installed with Python: the reference topics of the language."""
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items())]


def windows(tokenizer: Tokenizer, model: ModelConfig) -> Iterator[tuple[Int[np.ndarray, "batch time"]]]:
    """Yields inputs for a language model: batches of full contexts of text, with at least `POSITIONS` tokens in total."""
    context = model.context_length
    tokens = _read_tokens(tokenizer, -(-POSITIONS // context) * context).reshape(-1, context)
    batch = max(LOGITS_AT_ONCE // (context * model.vocab_size), 1)
    for begin in range(0, len(tokens), batch):
        yield (tokens[begin : begin + batch],)


def examples(
    tokenizer: Tokenizer, model: ModelConfig, sequences: int
) -> tuple[Int[np.ndarray, "batch sequences time"], Int[np.ndarray, "batch sequences"]]:
    """Returns inputs for a fine-tuned model: sequences of different lengths, padded, and the positions of the extract tokens.

    Each sequence consists of a start token, text and an extract token.
    """
    start, _, extract = special_tokens(tokenizer)
    longest = min(model.context_length, 64)
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, longest, size=(EXAMPLES, sequences), endpoint=True)
    tokens = np.full((EXAMPLES, sequences, longest), pad_id(tokenizer), np.int32)
    text = _read_tokens(tokenizer, tokens.size).reshape(tokens.shape)
    inside = np.arange(longest) < lengths[..., None] - 1
    tokens[inside] = text[inside]
    tokens[..., 0] = start
    np.put_along_axis(tokens, lengths[..., None] - 1, extract, axis=-1)
    return tokens, (lengths - 1).astype(np.int32)


def _read_tokens(tokenizer: Tokenizer, count: int) -> Int[np.ndarray, " count"]:
    tokens: list[int] = []
    while len(tokens) < count:
        for document in documents():
            tokens += [*tokenizer.encode(document), tokenizer.eos_id]
            if len(tokens) >= count:
                break
    return np.array(tokens[:count], np.int32)


def compare(
    ours: Computation, theirs: Computation, batches: Iterable[Inputs], unit: str, tolerance: float, log: Log
) -> dict[str, Any]:
    """Compares the outputs of two models, [..., outputs], on the same inputs.

    Args:
      unit: "positions" or "examples", the unit in which the outputs are counted.
      tolerance: largest absolute difference of a logit or log-probability that counts as equal.

    Returns:
      An entry of parity.json: the number of positions or examples, the largest difference, and the share of positions or examples
      with the same most likely output.

    Raises:
      VerificationError: the difference is larger than `tolerance`, or the shapes differ.
    """
    compared, agreeing, largest = 0, 0, 0.0
    for inputs in batches:
        expected, actual = ours(*inputs), theirs(*inputs)
        if expected.shape != actual.shape:
            raise VerificationError(
                f"the exported model's outputs have shape {actual.shape}, not {expected.shape}; the export is removed"
            )
        difference = float(np.abs(expected.astype(np.float64) - actual).max())
        largest = max(largest, difference) if np.isfinite(difference) else float("inf")
        same = expected.argmax(-1) == actual.argmax(-1)
        compared, agreeing = compared + same.size, agreeing + int(same.sum())
    log(
        f"parity: the largest difference is {largest:.2e} (allowed: {tolerance:g}), and the most likely output is the same at "
        f"{agreeing / compared:.2%} of {compared:,} {unit}"
    )
    if largest > tolerance:
        raise VerificationError(
            f"the exported model differs from the checkpoint by {largest:.2e} at {unit} of real text (allowed: {tolerance:g}); "
            "the export is removed"
        )
    return {unit: compared, "max_abs_difference": largest, "top1_agreement": agreeing / compared, "tolerance": tolerance}
