"""Generation with a cache: greedy, temperature, top-k and nucleus sampling, in one compiled program.

With few rows, the time per token is the time to read the weights from memory. The loop over tokens therefore neither copies
weights or cache nor sorts the scores of the vocabulary.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

from gpt_jax.config import ModelConfig
from gpt_jax.errors import field_error, require
from gpt_jax.inputs.numbers import NOT_NEGATIVE, POSITIVE, PROBABILITY, SEED
from gpt_jax.model.network import network
from gpt_jax.model.transformer import Params, Tokens, logits
from gpt_jax.runtime.sharding import constrain

Scalar = Float[Array, ""]

MAX_TEMPERATURE = float(np.finfo(np.float32).max)


def generate(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    stop: int | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """Generates continuations of prompts, which may differ in length.

    Args:
      prompts: token ids, at least one per prompt.
      num_tokens: maximum number of tokens to append to each prompt.
      temperature: divisor of the logits; 0 always takes the most likely token (greedy decoding).
      top_k: number of most likely tokens to sample from; None means all. See `sample` for ties.
      top_p: total probability of the most likely tokens to sample from, in (0, 1].
      stop: token that ends a continuation and is not returned; None means no such token.
      seed: equal seeds give equal text, row by row.

    Returns:
      The continuations without their prompts.

    Raises:
      UserError: a prompt is empty or leaves too little room in the context, or a setting is out of range.
    """
    POSITIVE.check("tokens", num_tokens)
    NOT_NEGATIVE.check("temperature", temperature)
    POSITIVE.check("top_k", 1 if top_k is None else top_k)
    PROBABILITY.check("top_p", top_p)
    SEED.check("seed", seed)
    longest = _longest_prompt(prompts, num_tokens, config.context_length)
    capacity = _bucket(longest + num_tokens, config.context_length)
    tokens = np.zeros((len(prompts), _bucket(longest, config.context_length)), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    top_k = min(top_k or config.vocab_size, config.vocab_size)
    settings = (np.float32(min(temperature, MAX_TEMPERATURE)), np.int32(top_k), np.float32(top_p))
    stop_or_none = np.int32(-1 if stop is None else stop)
    drawn = _generate(config, capacity, params, tokens, lengths, np.int32(num_tokens), settings, stop_or_none, np.uint32(seed))
    rows = np.asarray(drawn)[:, :num_tokens].tolist()
    return [row[: row.index(stop)] if stop in row else row for row in rows]


def lower_generation(config: ModelConfig, params: Params, rows: int, length: int, num_tokens: int) -> jax.stages.Lowered:
    """Lowers the program with which `generate` continues prompts, for the devices of the parameters.

    Args:
      config: the model's config, with the dtype of activations.
      params: the parameters, or their shapes, dtypes and shardings.
      rows: number of prompts.
      length: number of tokens in the longest prompt.
      num_tokens: number of tokens to append to each prompt.
    """
    capacity = _bucket(length + num_tokens, config.context_length)
    tokens = np.zeros((rows, _bucket(length, config.context_length)), np.int32)
    lengths, settings = np.full(rows, length, np.int32), (np.float32(0), np.int32(config.vocab_size), np.float32(1))
    return _generate.lower(config, capacity, params, tokens, lengths, np.int32(num_tokens), settings, np.int32(-1), np.uint32(0))


def _bucket(length: int, context: int) -> int:
    """Returns the padded length of prompts or cache, a power of two or the context, so that few executables serve all lengths."""
    return min(max(32, 1 << (length - 1).bit_length()), context)


def _longest_prompt(prompts: Sequence[Sequence[int]], num_tokens: int, context: int) -> int:
    """Returns the length of the longest prompt after checking that all of them fit into the context.

    Raises:
      UserError: a prompt is empty, or leaves too little room for the new tokens.
    """
    lengths = [len(prompt) for prompt in prompts]
    require(bool(lengths) and min(lengths) > 0, "prompt", "is empty; the model needs at least one token to continue")
    longest = max(lengths)
    excess = longest + num_tokens - context
    if excess > 0:
        size, surplus = (f"{number} token{'s' if number > 1 else ''}" for number in (longest, excess))
        prompt = "the prompt" if len(prompts) == 1 else f"prompt {lengths.index(longest) + 1}"
        problem = f"{prompt} has {size}, which with --tokens {num_tokens} exceeds the context of {context} by {surplus}"
        remedies = [f"cut {surplus} from it"] if num_tokens < context else []
        remedies += [f"set --tokens to {context - longest} or less"] if longest < context else []
        raise field_error("prompt", f"{problem}; {' or '.join(remedies) or 'cut the prompt and lower --tokens'}")
    return longest


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(
    config: ModelConfig,
    capacity: int,
    params: Params,
    tokens: Tokens,
    lengths: Int[Array, "batch"],
    num_tokens: Int[Array, ""],
    settings: tuple[Array, Array, Array],
    stop: Int[Array, ""],
    seed: UInt32[Array, ""],
) -> Int[Array, "batch capacity"]:
    """Processes the prompts in one pass, then draws one token at a time, up to `num_tokens` or until every row has stopped.

    Row i continues after the `lengths[i]` tokens of its prompt. `capacity` is the number of positions in the cache. `settings`
    are the last three arguments of `sample`; a negative `stop` means no stop token. In each row of the result, only the first
    `num_tokens` tokens are meaningful, and only up to the stop token.
    """
    net, batch, key = network(config), tokens.shape[0], jax.random.key(seed)
    # Padding is written into the cache after each prompt; the row's own tokens overwrite it before any query can attend to it.
    _, cache = net.apply_cached(config, params, tokens, net.empty_cache(config, batch, capacity), jnp.zeros(batch, jnp.int32))
    params, cache = net.unstack_layers(config, params, cache)

    def unfinished(carry: tuple) -> jax.Array:
        number, *_, finished = carry
        return (number < num_tokens) & ~finished.all()

    def extend(carry: tuple) -> tuple:
        number, previous, cache, drawn, finished = carry
        hidden, cache = net.apply_cached(config, params, previous[:, None], cache, lengths + number - 1)
        scores = logits(config, params, hidden)[:, 0]
        token = sample(scores, jax.random.fold_in(key, number), *settings)
        # A stopped row continues until all have stopped; `generate` truncates it.
        return number + 1, token, cache, drawn.at[:, number].set(token), finished | (token == stop)

    # The loop processes the last token of each prompt again, so that the first new token is drawn like all others.
    last = jnp.take_along_axis(tokens, (lengths - 1)[:, None], axis=1)[:, 0]
    start = jnp.int32(0), last, cache, jnp.full((batch, capacity), stop), jnp.zeros(batch, bool)
    drawn = jax.lax.while_loop(unfinished, extend, start)[3]
    return constrain(drawn, None, None)  # All hosts return the whole result.


def sample(
    scores: Float[Array, "batch vocab"], key: PRNGKeyArray, temperature: Scalar, top_k: Int[Array, ""], top_p: Scalar
) -> Int[Array, "batch"]:
    """Draws a token for each row from softmax(scores / temperature), restricted to the top k and to the nucleus of mass p.

    The top k are exactly k tokens, and the nucleus has as few tokens as possible. Among tokens with equal scores, those with
    lower ids are taken first. At temperature 0, the most likely token is taken, by the same rule.
    """

    def draw() -> Int[Array, "batch"]:
        # Without the subtraction, a very low temperature would make several scores infinite.
        scaled = (scores - scores.max(axis=-1, keepdims=True)) / temperature
        scaled = jax.lax.cond(top_k < scores.shape[-1], lambda: _keep(scaled, jnp.ones_like(scaled), top_k), lambda: scaled)
        scaled = jax.lax.cond(top_p < 1, lambda: _keep(scaled, jax.nn.softmax(scaled, axis=-1), top_p), lambda: scaled)
        # Each row has its own key, so that its draws do not depend on the other rows.
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(scores.shape[0]))
        return jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)

    return jax.lax.cond(temperature > 0, draw, lambda: scores.argmax(axis=-1).astype(jnp.int32))


def _keep(scores: Float[Array, "batch vocab"], weights: Float[Array, "batch vocab"], limit: Array) -> Float[Array, "batch vocab"]:
    """Returns the scores of the fewest most likely tokens whose total weight is at least `limit`, and -inf for all others.

    No score may be positive. Among tokens with equal scores, those with lower ids come first. A binary search finds the last
    token that is kept. Its passes over the scores, one for each bit, together take about a tenth of the time of a sort.
    """
    # The bits of nonnegative floats, read as integers, have the same order as the floats. `abs`, since -score may be -0.0.
    distance = jax.lax.bitcast_convert_type(jnp.abs(scores), jnp.int32)
    ids = jnp.arange(scores.shape[-1])

    def weigh_less(kept: Bool[Array, "batch vocab"]) -> Bool[Array, "batch 1"]:
        return jnp.where(kept, weights, 0).sum(axis=-1, keepdims=True) < limit

    # The last token that is kept is the one before which the total weight is still below the limit.
    zero = jnp.zeros((len(scores), 1), jnp.int32)
    edge = _search(31, lambda value: weigh_less(distance < value), zero)
    last = _search(len(ids).bit_length(), lambda end: weigh_less((distance < edge) | ((distance == edge) & (ids < end))), zero)
    return jnp.where((distance < edge) | ((distance == edge) & (ids <= last)), scores, -jnp.inf)


def _search(bits: int, holds: Callable[[Array], Array], zero: Array) -> Array:
    """Returns, elementwise, the largest integer of `bits` bits for which `holds` is True, as it must be for all smaller ones."""

    def set_bit(number: Array, found: Array) -> Array:
        larger = found | (1 << (bits - 1 - number))
        return jnp.where(holds(larger), larger, found)

    return jax.lax.fori_loop(0, bits, set_bit, zero)
