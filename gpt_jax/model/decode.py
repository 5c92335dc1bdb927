"""Generation with a cache: greedy, temperature, top-k and nucleus sampling, in one compiled program."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gpt_jax.config import ModelConfig
from gpt_jax.errors import field_error, require
from gpt_jax.inputs.numbers import NOT_NEGATIVE, POSITIVE, PROBABILITY, SEED
from gpt_jax.model.network import network
from gpt_jax.model.transformer import Params, Starts, Tokens, logits
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
      top_k: number of most likely tokens to sample from; None means all. See `sample` for tokens that are equally likely.
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
    # Prompts are padded at the end to a multiple of 32, if the context allows, so that similar lengths share one executable.
    width = min(-(-longest // 32) * 32, config.context_length - num_tokens)
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    top_k = min(top_k or config.vocab_size, config.vocab_size)
    settings = (np.float32(min(temperature, MAX_TEMPERATURE)), np.int32(top_k), np.float32(top_p))
    stop_or_none = np.int32(-1 if stop is None else stop)
    drawn = _generate(config, num_tokens, params, tokens, lengths, settings, stop_or_none, np.uint32(seed))
    return [row[: row.index(stop)] if stop in row else row for row in np.asarray(drawn).tolist()]


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
    config: ModelConfig, num_tokens: int, params: Params, tokens: Tokens, start: Starts, settings: tuple, stop: Array, seed: Array
) -> Int[Array, "batch new"]:
    """Processes the prompts in one pass, then draws one token at a time, up to `num_tokens` or until every row has stopped.

    Row i continues at position `start[i]`, after its prompt. `settings` are the last three arguments of `sample`; a negative
    `stop` means no stop token.
    """
    batch, width = tokens.shape
    key = jax.random.key(seed)
    cache = network(config).empty_cache(config, batch, width + num_tokens)
    hidden, cache = network(config).apply_cached(config, params, tokens, cache, jnp.zeros(batch, jnp.int32))
    # Padding was written into the cache after each prompt; the row's own tokens overwrite it before any query can attend to it.
    last = jnp.take_along_axis(hidden, (start - 1)[:, None, None], axis=1)

    def pick(hidden: jax.Array, number: jax.Array | int) -> jax.Array:
        scores = logits(config, params, hidden)[:, 0]
        return sample(scores, jax.random.fold_in(key, number), *settings)

    first = pick(last, 0)
    drawn = jnp.full((batch, num_tokens), stop, jnp.int32).at[:, 0].set(first)

    def unfinished(carry: tuple) -> jax.Array:
        number, _, _, finished = carry
        return (number < num_tokens) & ~finished.all()

    def extend(carry: tuple) -> tuple:
        number, cache, drawn, finished = carry
        previous = jax.lax.dynamic_slice_in_dim(drawn, number - 1, 1, axis=1)
        hidden, cache = network(config).apply_cached(config, params, previous, cache, start + number - 1)
        token = pick(hidden, number)  # A stopped row continues until all have stopped; `generate` truncates it.
        return number + 1, cache, drawn.at[:, number].set(token), finished | (token == stop)

    drawn = jax.lax.while_loop(unfinished, extend, (jnp.int32(1), cache, drawn, first == stop))[2]
    return constrain(drawn, None, None)  # All hosts return the whole result.


def sample(
    scores: Float[Array, "batch vocab"], key: PRNGKeyArray, temperature: Scalar, top_k: Int[Array, ""], top_p: Scalar
) -> Int[Array, "batch"]:
    """Draws a token for each row from softmax(scores / temperature), restricted to the top k and to the nucleus of mass p.

    Exactly k tokens are in the top k, and the nucleus has as few tokens as possible. Of tokens with equal scores, those with
    lower ids are taken first. A temperature of 0 takes the most likely token, by the same rule.
    """
    # Without the subtraction, a very low temperature would make several scores infinite.
    scaled = (scores - scores.max(axis=-1, keepdims=True)) / jnp.where(temperature > 0, temperature, 1.0)
    order = jnp.argsort(-scaled, axis=-1)
    descending = jnp.take_along_axis(scaled, order, axis=-1)
    probabilities = jax.nn.softmax(jnp.where(jnp.arange(scores.shape[-1]) < top_k, descending, -jnp.inf), axis=-1)
    # A token is in the nucleus if the tokens before it do not yet add up to p, so the first token always is.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    within = (before < top_p) | (top_p == 1)  # A float32 sum may reach 1 before the last token.
    kept = jnp.put_along_axis(jnp.zeros(scores.shape, bool), order, within & (probabilities > 0), axis=-1, inplace=False)
    # Each row has its own key, so that its draws do not depend on the other rows.
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(scores.shape[0]))
    drawn = jax.vmap(jax.random.categorical)(keys, jnp.where(kept, scaled, -jnp.inf))
    return jnp.where(temperature > 0, drawn, scores.argmax(axis=-1)).astype(jnp.int32)
