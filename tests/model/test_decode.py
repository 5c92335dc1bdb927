"""Generation from a cache against doing it the long way, and sampling against its definition."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config import MeshConfig, ModelConfig
from gpt_jax.errors import UserError
from gpt_jax.model import decode, transformer
from gpt_jax.model.decode import generate, sample
from gpt_jax.runtime.sharding import make_mesh

TINY = ModelConfig(vocab_size=60, context_length=48, num_layers=2, embed_dim=16, num_heads=2, mlp_dim=32)
PROMPTS = [[5, 9, 2], [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]]
NEW = 8


@pytest.fixture(scope="module")
def params():
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(transformer.init, TINY), jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape) / 3, jnp.float32), shapes)


@functools.partial(jax.jit, static_argnums=0)
def score(config, params, tokens):
    """Scores at every position, without a cache."""
    return transformer.logits(config, params, transformer.apply(config, params, tokens))


def continued(params, prompt, number):
    """Greedy continuation: the whole text again for every token."""
    text = list(prompt)
    for _ in range(number):
        padded = np.zeros((1, TINY.context_length), np.int32)
        padded[0, : len(text)] = text
        text.append(int(np.argmax(score(TINY, params, padded)[0, len(text) - 1])))
    return text[len(prompt) :]


# -- the cache --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unstacked", [False, True])
def test_cached_scores_equal_uncached_ones_at_every_position(params, unstacked):
    """Rows of differing length are padded at their end; then each goes on from its own position."""
    texts = np.random.default_rng(1).integers(0, 60, (3, 48)).astype(np.int32)
    lengths, width = np.array([11, 1, 16], np.int32), 16
    expected = np.asarray(score(TINY, params, texts))

    @jax.jit
    def step(params, tokens, cache, start):
        hidden, cache = transformer.apply_cached(TINY, params, tokens, cache, start)
        return transformer.logits(TINY, params, hidden), cache

    padded = np.where(np.arange(width) < lengths[:, None], texts[:, :width], 59).astype(np.int32)
    scores, cache = step(params, padded, transformer.empty_cache(TINY, 3, 40), np.zeros(3, np.int32))
    assert cache["key"].shape == (2, 3, 2, 40, 8)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(scores[row, :length], expected[row, :length], atol=1e-5)
    rows = np.arange(3)
    if unstacked:
        params, cache = transformer.unstack_layers(TINY, params, cache)
        assert [layer["key"].shape for layer in cache] == [(3, 2, 40, 8)] * 2
    for number in range(20):
        at = lengths + number
        scores, cache = step(params, texts[rows, at][:, None], cache, at)
        np.testing.assert_allclose(scores[:, 0], expected[rows, at], atol=1e-5)


# -- generation -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def greedy(params):
    return generate(TINY, params, PROMPTS, NEW, temperature=0.0)


def test_greedy_generation_equals_the_long_way(params, greedy):
    assert greedy == [continued(params, prompt, NEW) for prompt in PROMPTS]
    assert len({token for row in greedy for token in row}) > 4, "a model that repeats itself would prove little"


def test_generation_fills_the_context_to_its_end(params):
    prompt = list(range(40))
    assert generate(TINY, params, [prompt], 8, temperature=0.0) == [continued(params, prompt, 8)]


def test_the_likeliest_alone_is_greedy(params, greedy):
    assert generate(TINY, params, PROMPTS, NEW, top_k=1, seed=3) == greedy
    assert generate(TINY, params, PROMPTS, NEW, top_p=1e-6, seed=3) == greedy


def test_one_program_serves_prompts_numbers_of_tokens_and_settings(params, greedy):
    before = decode._generate._cache_size()
    generate(TINY, params, [[1, 2], [3] * 20, [4]], NEW + 4, temperature=0.5, top_k=7, top_p=0.9, stop=2, seed=9)
    for number in (1, 2, NEW - 1, 21):
        text = generate(TINY, params, PROMPTS, number, temperature=0.0)
        assert [row[:NEW] for row in text] == [row[:number] for row in greedy]
        assert {len(row) for row in text} == {number}
    assert decode._generate._cache_size() == before
    generate(TINY, params, PROMPTS, 22, temperature=0.0)  # 33 positions: the cache fills the context of 48.
    before = decode._generate._cache_size()
    for number in (29, 37):
        assert [row[:NEW] for row in generate(TINY, params, PROMPTS, number, temperature=0.0)] == greedy
    assert decode._generate._cache_size() == before


def test_few_programs_serve_all_lengths():
    """Prompt and cache have a power of two of positions, or fill the context."""
    for context in (1, 31, 48, 512, 1000):
        lengths = [decode._bucket(length, context) for length in range(1, context + 1)]
        assert all(length <= bucket <= context for length, bucket in enumerate(lengths, 1))
        assert all(bucket < max(2 * length, 33) for length, bucket in enumerate(lengths, 1))
    assert set(lengths) == {32, 64, 128, 256, 512, 1000}


def test_a_token_copies_no_weights(params):
    """No instruction of the compiled loop over tokens has a result with as many elements as a matrix of weights has."""
    settings = np.float32(1), np.int32(5), np.float32(0.9)
    arguments = np.zeros((3, 32), np.int32), np.full(3, 5, np.int32), np.int32(4), settings, np.int32(2), np.uint32(0)
    program = decode._generate.lower(TINY, 32, params, *arguments).compile().as_text()
    computations = dict(re.findall(r"^%?([\w.-]+) \(.*\{\n((?:  .*\n)+)\}", program, re.MULTILINE))
    loop = max((computations[name] for name in re.findall(r"body=%([\w.-]+)", program)), key=len)
    results = {"forwarded": set(), "computed": set()}
    for dimensions, operation in re.findall(r"= \w+\[([\d,]+)\]\S* ([\w-]+)\(", loop):
        kind = "forwarded" if operation in ("get-tuple-element", "bitcast") else "computed"
        results[kind].add(math.prod(map(int, dimensions.split(","))))
    matrices = {leaf[0].size for leaf in jax.tree.leaves(params["blocks"])} | {params["embedding"]["tokens"].size}
    matrices -= set(range(100))  # gains and biases
    assert matrices == {16 * 48, 16 * 16, 16 * 32, 128 * 16}
    assert matrices <= results["forwarded"], "the loop over tokens contains the products of all layers"
    assert not matrices & results["computed"]


def test_a_stop_token_ends_its_row_alone(params, greedy):
    """Every token that greedy generation meets, as the stop token."""
    for stop in {token for row in greedy for token in row}:
        expected = [row[: row.index(stop)] if stop in row else row for row in greedy]
        assert generate(TINY, params, PROMPTS, NEW, temperature=0.0, stop=stop) == expected


def test_seeds(params):
    draw = functools.partial(generate, TINY, params, PROMPTS, NEW)
    assert draw(seed=1) == draw(seed=1)
    assert all(one != two for one, two in zip(draw(seed=1), draw(seed=2), strict=True))
    assert draw(seed=1)[0] != generate(TINY, params, [PROMPTS[0]] * 3, NEW, seed=1)[1], "equal prompts differ by row"


def test_sampled_generation_equals_the_long_way(params):
    """The random numbers of a token depend on the seed, its number and its row; equal seeds give the text of all versions."""
    temperature, top_k, seed = 0.8, 9, 11
    expected = []
    for row, prompt in enumerate(PROMPTS):
        text = list(prompt)
        for number in range(NEW):
            padded = np.zeros((1, TINY.context_length), np.int32)
            padded[0, : len(text)] = text
            scores = np.asarray(score(TINY, params, padded)[0, len(text) - 1]) / temperature
            scores[np.argsort(-scores)[top_k:]] = -np.inf
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), row)
            text.append(int(jax.random.categorical(key, scores)))
        expected.append(text[len(prompt) :])
    assert generate(TINY, params, PROMPTS, NEW, temperature=temperature, top_k=top_k, seed=seed) == expected


def test_each_token_is_drawn_anew(params):
    """Where all scores are equal, a text shows its random numbers: no token of a row follows from another one's."""
    even = params | {"embedding": jax.tree.map(jnp.zeros_like, params["embedding"])}
    rows = np.array([generate(TINY, even, PROMPTS, NEW, seed=seed) for seed in range(40)])
    assert rows.shape == (40, 3, NEW)
    assert set(np.unique(rows)) == set(range(60)), "960 draws miss one of 60 entries once in 200,000 times"
    flat = rows.reshape(120, NEW)
    for first in range(NEW):
        for second in range(first):
            assert (flat[:, first] == flat[:, second]).sum() < 15, "two would be usual"


def test_a_row_does_not_depend_on_the_others(params):
    together = generate(TINY, params, PROMPTS, NEW, seed=5)
    assert generate(TINY, params, [PROMPTS[0], [8, 8, 8, 8], [1]], NEW, seed=5)[0] == together[0]
    assert generate(TINY, params, PROMPTS[:1], NEW, seed=5) == together[:1]


def test_on_a_mesh(params, greedy):
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        assert generate(TINY, params, PROMPTS, NEW, temperature=0.0) == greedy


def test_during_training_on_tpus():
    """A run samples with its own config and mesh. Kernels would refuse prompts that do not split evenly over the devices."""
    model = dataclasses.replace(TINY, embed_dim=128, num_heads=2)
    params = transformer.init(model, jax.random.key(0))
    expected = generate(model, params, PROMPTS, NEW, temperature=0.0)
    with jax.set_mesh(make_mesh(MeshConfig(data=8))):
        assert generate(dataclasses.replace(model, attention="pallas_tpu"), params, PROMPTS, NEW, temperature=0.0) == expected


@pytest.mark.parametrize(
    ("prompts", "number", "message"),
    [
        ([], 1, "is empty; the model needs at least one token"),
        ([[1], []], 1, "is empty; the model needs at least one token"),
        (
            [[1], [1] * 41],
            8,
            "prompt 2 has 41 tokens, which with --tokens 8 exceeds the context of 48 by 1 token; "
            "cut 1 token from it or set --tokens to 7 or less",
        ),
        (
            [[1]],
            48,
            "the prompt has 1 token, which with --tokens 48 exceeds the context of 48 by 1 token; set --tokens to 47 or less",
        ),
        (
            [[1] * 50],
            8,
            "the prompt has 50 tokens, which with --tokens 8 exceeds the context of 48 by 10 tokens; cut 10 tokens from it",
        ),
        ([[1] * 48], 48, "exceeds the context of 48 by 48 tokens; cut the prompt and lower --tokens"),
    ],
)
def test_prompts_that_do_not_fit(params, prompts, number, message):
    with pytest.raises(UserError) as error:
        generate(TINY, params, prompts, number)
    assert str(error.value).startswith("--prompt: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "--temperature: must be at least 0, not -0.1"),
        ({"temperature": float("nan")}, "--temperature: must be at least 0, not nan"),
        ({"temperature": float("inf")}, "--temperature: must be finite, not inf"),
        ({"top_k": -1}, "--top-k: must be positive, not -1"),
        ({"top_k": 0}, "--top-k: must be positive, not 0"),
        ({"top_p": 0.0}, "--top-p: must be in (0, 1], not 0.0"),
        ({"top_p": 1.1}, "--top-p: must be in (0, 1], not 1.1"),
        ({"top_p": float("nan")}, "--top-p: must be in (0, 1], not nan"),
        ({"seed": -1}, "--seed: must be in [0, 2^32), not -1"),
        ({"seed": 2**32}, "--seed: must be in [0, 2^32), not 4294967296"),
    ],
)
def test_settings_out_of_range(params, settings, message):
    with pytest.raises(UserError) as error:
        generate(TINY, params, [[1]], 1, **settings)
    assert str(error.value) == message


def test_at_least_one_token_is_generated(params):
    for number in (0, -1):
        with pytest.raises(UserError, match="--tokens: must be positive"):
            generate(TINY, params, [[1]], number)


def test_extreme_settings_are_their_limits(params, greedy):
    """A low temperature is greedy, a high one is uniform, and more tokens than the vocabulary has are all of them."""
    draw = functools.partial(generate, TINY, params, PROMPTS, NEW, seed=3)
    assert draw(temperature=1e-37) == draw(temperature=1e-300) == greedy
    assert draw(temperature=1e30) == draw(temperature=1e300)
    assert draw(top_k=2**40) == draw(top_k=60) == draw()


# -- sampling ---------------------------------------------------------------------------------------------------------------

SCORES = np.log([0.3, 0.02, 0.25, 0.01, 0.2, 0.07, 0.15]).astype(np.float32)  # likeliest first: 0, 2, 4, 6, 5, 1, 3
DRAWS = 20_000


def chances(temperature, top_k, top_p):
    """The definition: a softmax, the k likeliest of it, of these the fewest that reach mass p, and what remains scaled to 1."""
    probabilities = np.exp(np.asarray(SCORES, np.float64) / temperature)
    order = np.argsort(-probabilities)
    probabilities[order[top_k:]] = 0
    probabilities /= probabilities.sum()
    reached = np.cumsum(probabilities[order])
    probabilities[order[np.argmax(reached >= top_p) + 1 :]] = 0
    return probabilities / probabilities.sum()


sample_many = jax.jit(jax.vmap(sample, (None, 0, None, None, None)))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "allowed"),
    [
        (1.0, 7, 1.0, {0, 1, 2, 3, 4, 5, 6}),
        (1.0, 3, 1.0, {0, 2, 4}),
        (1.0, 7, 0.7, {0, 2, 4}),  # 0.3 + 0.25 falls short of 0.7, with 0.2 it is reached
        (1.0, 7, 0.76, {0, 2, 4, 6}),
        (1.0, 3, 0.7, {0, 2}),  # 0.55 of the 0.75 that top-k leaves is 0.73
        (2.0, 7, 0.7, {0, 2, 4, 6}),  # a higher temperature flattens
        (0.5, 7, 0.7, {0, 2, 4}),
        (1.0, 1, 1.0, {0}),
        (1.0, 7, 0.01, {0}),
        (0.0, 7, 1.0, {0}),
    ],
)
def test_sampling(temperature, top_k, top_p, allowed):
    keys = jax.random.split(jax.random.key(0), DRAWS // 10)
    settings = np.float32(temperature), np.int32(top_k), np.float32(top_p)
    tokens = sample_many(np.broadcast_to(SCORES, (10, 7)), keys, *settings)
    assert tokens.dtype == jnp.int32
    counts = np.bincount(np.asarray(tokens).ravel(), minlength=7)
    assert set(np.flatnonzero(counts)) == allowed
    if temperature:
        expected = chances(temperature, top_k, top_p)
        assert set(np.flatnonzero(expected)) == allowed
        assert (np.abs(counts - DRAWS * expected) <= 5 * np.sqrt(DRAWS * expected * (1 - expected))).all()


# Two tokens share the highest score, three the next one, and two the lowest; their ids are mixed.
TIED = np.array([1.0, 3.0, 2.0, 2.0, 3.0, 1.0, 2.0], np.float32)


@pytest.mark.parametrize(
    ("top_k", "top_p", "allowed"),
    [
        (1, 1.0, {1}),
        (2, 1.0, {1, 4}),
        (3, 1.0, {1, 4, 2}),
        (4, 1.0, {1, 4, 2, 3}),
        (6, 1.0, {1, 4, 2, 3, 6, 0}),
        (7, 1e-6, {1}),
        (7, 0.4, {1, 4}),  # The probabilities are 0.30 (twice), 0.11 (three times) and 0.04 (twice).
        (7, 0.65, {1, 4, 2}),
        (7, 0.75, {1, 4, 2, 3}),
    ],
)
def test_of_equally_likely_tokens_those_with_lower_ids_are_taken(top_k, top_p, allowed):
    keys = jax.random.split(jax.random.key(0), 100)
    tokens = sample_many(np.broadcast_to(TIED, (10, 7)), keys, np.float32(1), np.int32(top_k), np.float32(top_p))
    assert set(np.unique(tokens)) == allowed


def test_the_search_keeps_what_a_sort_keeps():
    """Weights are multiples of 1/64, so that sums in any order are exact; many scores are equal, and some are infinite."""
    draw, keep = np.random.default_rng(0), jax.jit(decode._keep)
    for ties in (2, 5, 1000):
        scores = -draw.integers(0, ties, (20, 300)).astype(np.float32) / 7
        scores[draw.random(scores.shape) < 0.1] = -np.inf
        weights = draw.integers(0, 4, scores.shape).astype(np.float32) / 64
        order = np.argsort(-scores, axis=-1, kind="stable")
        sorted_weights = np.take_along_axis(weights, order, axis=-1)
        before = np.cumsum(sorted_weights, axis=-1) - sorted_weights
        for limit in (1 / 64, 0.5, 1.0, 3.25, 100.0):
            kept = np.zeros(scores.shape, bool)
            np.put_along_axis(kept, order, before < limit, axis=-1)
            np.testing.assert_array_equal(keep(scores, weights, np.float32(limit)), np.where(kept, scores, -np.inf))


def test_the_most_likely_one_is_greedy_even_if_it_is_not_alone():
    keys = jax.random.split(jax.random.key(0), 100)
    for temperature, top_k in ((0.0, 7), (1.0, 1)):
        tokens = sample_many(np.broadcast_to(TIED, (10, 7)), keys, np.float32(temperature), np.int32(top_k), np.float32(1))
        assert (tokens == 1).all()
