"""The LSTM against a NumPy transcription of its equations in float64, and the things it must share with the Transformer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt_jax.config import MeshConfig, ModelConfig
from gpt_jax.model import dropout as masks
from gpt_jax.model import lstm, transformer
from gpt_jax.model.decode import generate
from gpt_jax.model.loss import language_model_loss
from gpt_jax.runtime.sharding import make_mesh, named_sharding

TINY = ModelConfig(
    kind="lstm",
    vocab_size=50,
    context_length=24,
    embed_dim=12,
    num_heads=1,
    lstm_units=20,
    embed_dropout=0.1,
    residual_dropout=0.3,
    loss_chunk=8,
)
SEED, STEP, ROWS = 11, 22, np.array([5, 3], np.int32)
DROPOUT = masks.DropoutKey(SEED, STEP, ROWS)

apply = jax.jit(lstm.apply, static_argnums=0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def kept(shape, rate, site):
    """Returns the factors by which dropout multiplies an array [2, time, channels] whose rows have the numbers ROWS."""
    stream = np.asarray(masks.mask_stream(SEED, STEP, 0, site, ROWS, 0))
    return masks.keep(stream, np.arange(shape[1]), np.arange(shape[2]), rate) / (1 - round(rate * 65536) / 65536)


def by_hand(params, tokens, dropout=False):
    """Output [batch, time, embed], one step after the other, one gate after the other."""
    params = jax.tree.map(lambda array: np.asarray(array, np.float64), params)
    layer = params["lstm"]
    x = params["embedding"]["tokens"][tokens]
    x = x * kept(x.shape, 0.1, masks.Site.EMBEDDING) if dropout else x
    hidden = cell = np.zeros((len(tokens), 20))
    outputs = []
    for t in range(tokens.shape[1]):
        i, f, g, o = (
            x[:, t] @ layer["input"]["kernel"][:, gate] + hidden @ layer["recurrent"][:, gate] + layer["input"]["bias"][gate]
            for gate in range(4)
        )
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        hidden = sigmoid(o) * np.tanh(cell)
        outputs.append(hidden @ layer["output"]["kernel"] + layer["output"]["bias"])
    output = np.stack(outputs, axis=1)
    return output * kept(output.shape, 0.3, masks.Site.RESIDUAL_MLP) if dropout else output


@pytest.fixture(scope="module")
def params():
    """Parameters of which none is 0 or 1: a forgotten bias shows."""
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(lstm.init, TINY), jax.random.key(0))
    return jax.tree.map(lambda leaf: (0.1 + 0.5 * draw.normal(size=leaf.shape)).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, 50, (2, 24)).astype(np.int32)


# -- values -----------------------------------------------------------------------------------------------------------------


def test_forward_pass(params, tokens):
    expected = by_hand(params, tokens)
    np.testing.assert_allclose(apply(TINY, params, tokens), expected, atol=1e-5)
    assert expected.std(axis=1).min() > 0.01, "outputs that hardly change would prove little"


def test_forward_pass_with_dropout(params, tokens):
    expected = by_hand(params, tokens, dropout=True)
    np.testing.assert_allclose(apply(TINY, params, tokens, dropout_key=DROPOUT), expected, atol=1e-5)
    off = dataclasses.replace(TINY, embed_dropout=0.0, residual_dropout=0.0)
    np.testing.assert_array_equal(apply(off, params, tokens, dropout_key=DROPOUT), apply(TINY, params, tokens))


def test_output_is_tied_to_the_embeddings(params, tokens):
    hidden = np.asarray(apply(TINY, params, tokens))
    scores = jax.jit(transformer.logits, static_argnums=0)(TINY, params, hidden)
    np.testing.assert_allclose(scores, hidden @ params["embedding"]["tokens"][:50].T, atol=1e-5)


def test_state_restarts_with_each_segment(params, tokens):
    segments = np.repeat([[4, 9, 4], [1, 2, 3]], [7, 12, 5], axis=1).astype(np.int32)
    packed = np.asarray(apply(TINY, params, tokens, segment_ids=segments))
    for first, end in [(0, 7), (7, 19), (19, 24)]:
        np.testing.assert_allclose(packed[:, first:end], by_hand(params, tokens[:, first:end]), atol=1e-5)


def test_cell_is_float32_and_products_are_in_the_compute_dtype(params, tokens):
    config = dataclasses.replace(TINY, compute_dtype="bfloat16")
    hidden = apply(config, params, tokens)
    assert hidden.dtype == jnp.bfloat16
    assert np.abs(np.asarray(hidden, np.float64) - by_hand(params, tokens)).mean() < 0.03
    text = apply.lower(config, params, tokens).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) == 3, "inputs, recurrence, output"
    assert all(line.split(":")[-1].count("xbf16>") == 3 for line in products)
    assert all("xf32>" in line for line in text.splitlines() if "stablehlo.tanh" in line)
    assert {name: array.dtype.name for name, array in lstm.empty_cache(config, 2, 3).items()} == {
        "hidden": "bfloat16",
        "cell": "float32",
    }


# -- cached -----------------------------------------------------------------------------------------------------------------


def test_cached_outputs_equal_uncached_ones(params):
    """Rows of differing length are padded at their end; then each goes on from its own position, two tokens at a time."""
    texts = np.random.default_rng(1).integers(0, 50, (3, 24)).astype(np.int32)
    lengths = np.array([7, 1, 10], np.int32)
    expected = by_hand(params, texts)
    step = jax.jit(functools.partial(lstm.apply_cached, TINY))
    padded = np.where(np.arange(10) < lengths[:, None], texts[:, :10], 49).astype(np.int32)
    output, cache = step(params, padded, lstm.empty_cache(TINY, 3, 20), np.zeros(3, np.int32))
    assert cache["cell"].shape == (3, 20, 20)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(output[row, :length], expected[row, :length], atol=1e-5)
    for start in (lengths, lengths + 2, lengths + 4):
        at = start[:, None] + np.arange(2)
        output, cache = step(params, np.take_along_axis(texts, at, 1), cache, start)
        np.testing.assert_allclose(output, np.take_along_axis(expected, at[..., None], 1), atol=1e-5)
    again, _ = step(params, padded, cache, np.zeros(3, np.int32))
    np.testing.assert_allclose(again[0, :7], expected[0, :7], atol=1e-5, err_msg="a row begun anew forgets what the cache holds")


def test_greedy_generation_equals_the_long_way(params):
    prompts = [[5, 9, 2], [7], [3, 1, 4, 1, 5, 9]]
    expected = []
    for prompt in prompts:
        text = np.zeros((1, 24), np.int32)
        text[0, : len(prompt)] = prompt
        for end in range(len(prompt), len(prompt) + 6):
            scores = by_hand(params, text)[0, end - 1] @ np.asarray(params["embedding"]["tokens"][:50], np.float64).T
            text[0, end] = scores.argmax()
        expected.append(text[0, len(prompt) : len(prompt) + 6].tolist())
    assert generate(TINY, params, prompts, 6, temperature=0.0) == expected
    assert len({token for row in expected for token in row}) > 3


# -- training ---------------------------------------------------------------------------------------------------------------

BATCH = 8


@pytest.fixture(scope="module")
def batch():
    tokens = np.random.default_rng(2).integers(0, 50, (BATCH, 24)).astype(np.int32)
    weights = np.full((BATCH, 24), 1 / (BATCH * 24), np.float32)
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, 1),
        "loss_weights": weights,
        "example_id": np.arange(BATCH, dtype=np.int32),
    }


def loss(config, params, batch):
    return language_model_loss(config, params, batch, masks.DropoutKey(3, 4, batch["example_id"]))


value_and_grad = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)


@pytest.fixture(scope="module")
def gradients(params, batch):
    return value_and_grad(TINY, params, batch)


def assert_close(actual, expected):
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), actual, expected)


def test_gradients_follow_the_equations(params, batch, gradients):
    """The derivative along random directions, against differences of the transcription."""
    draw = np.random.default_rng(3)
    config = dataclasses.replace(TINY, embed_dropout=0.0, residual_dropout=0.0)
    value, gradients = value_and_grad(config, params, batch)

    def transcribed(params):
        scores = by_hand(params, batch["tokens"]) @ np.asarray(params["embedding"]["tokens"][:50], np.float64).T
        chosen = np.take_along_axis(scores, batch["targets"][..., None], -1)[..., 0]
        return (np.log(np.exp(scores).sum(-1)) - chosen).mean()

    np.testing.assert_allclose(value, transcribed(params), rtol=1e-5)
    wide = jax.tree.map(lambda array: np.asarray(array, np.float64), params)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        direction = draw.normal(size=gradient.shape)
        along = []
        for distance in (1e-5, -1e-5):
            moved = jax.tree_util.tree_map_with_path(
                lambda at, array, path=path, change=distance * direction: array + change if at == path else array, wide
            )
            along.append(transcribed(moved))
        expected = (along[0] - along[1]) / 2e-5
        np.testing.assert_allclose((gradient * direction).sum(), expected, rtol=1e-3, atol=1e-5, err_msg=str(path))


def test_micro_batches_add_to_the_whole(params, batch, gradients):
    """Rows j::4 with their own numbers see the masks that they see in the whole batch."""
    parts = [value_and_grad(TINY, params, {name: array[j::4] for name, array in batch.items()}) for j in range(4)]
    assert_close(jax.tree.map(lambda *leaves: sum(leaves), *parts), gradients)


def test_equal_on_a_mesh(params, batch, gradients):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    is_parameter = lambda leaf: isinstance(leaf, transformer.ParamSpec)  # noqa: E731
    shardings = jax.tree.map(lambda leaf: named_sharding(mesh, leaf.axes), lstm.param_specs(TINY), is_leaf=is_parameter)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings)
        assert placed["lstm"]["recurrent"].addressable_shards[0].data.shape == (20, 4, 10)
        assert_close(value_and_grad(TINY, placed, batch), gradients)
        spread = jax.jit(functools.partial(lstm.init, TINY), out_shardings=shardings)(jax.random.key(7))
    jax.tree.map(np.testing.assert_array_equal, spread, jax.jit(functools.partial(lstm.init, TINY))(jax.random.key(7)))


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_number(params, batch, gradients, remat):
    assert_close(value_and_grad(dataclasses.replace(TINY, remat=remat), params, batch), gradients)


def test_remat_saves_memory(params, batch):
    memory = {}
    for remat in ("off", "dots", "full"):
        config = dataclasses.replace(TINY, remat=remat, embed_dropout=0.0, residual_dropout=0.0, lstm_units=64)
        shapes = jax.eval_shape(functools.partial(lstm.init, config), jax.random.key(0))
        compiled = value_and_grad.lower(config, shapes, batch).compile()
        memory[remat] = compiled.memory_analysis().temp_size_in_bytes
    assert memory["full"] < memory["dots"] < memory["off"]


# -- parameters -------------------------------------------------------------------------------------------------------------


def test_the_papers_lstm_by_hand():
    config = ModelConfig(kind="lstm")
    assert config.num_parameters == 40_478 * 768 + (768 + 2048 + 1) * 4 * 2048 + 2048 * 768 + 768
    assert ModelConfig().num_parameters == 116_534_784


def test_initial_values():
    """N(0, 1 / inputs), the forget gate's bias (the second) 1, and embeddings as the Transformer's."""
    config = dataclasses.replace(TINY, vocab_size=300, embed_dim=64, lstm_units=100)
    params = jax.jit(functools.partial(lstm.init, config))(jax.random.key(1))
    kernels = {"input": 64, "output": 100}
    drawn = [(params["lstm"][name]["kernel"], inputs**-0.5) for name, inputs in kernels.items()]
    drawn += [(params["lstm"]["recurrent"], 0.1), (params["embedding"]["tokens"][:300], 0.02)]
    for array, stddev in drawn:
        assert abs(float(array.std()) / stddev - 1) < 5 / (2 * array.size) ** 0.5
        assert abs(float(array.mean())) < 5 * stddev / array.size**0.5
    bias = params["lstm"]["input"]["bias"]
    assert (bias[1] == 1).all()
    assert not bias[jnp.array([0, 2, 3])].any()
    assert not params["lstm"]["output"]["bias"].any()
    assert not params["embedding"]["tokens"][300:].any()


def test_description_fits_the_parameters():
    shapes = jax.eval_shape(functools.partial(lstm.init, TINY), jax.random.key(0))
    described = lstm.param_specs(TINY)
    sizes = {"embed": 12, "mlp": 20, "vocab": 128}
    is_parameter = lambda leaf: isinstance(leaf, transformer.ParamSpec)  # noqa: E731
    for (path, parameter), (at, shape) in zip(
        jax.tree_util.tree_leaves_with_path(described, is_leaf=is_parameter),
        jax.tree_util.tree_leaves_with_path(shapes),
        strict=True,
    ):
        assert path == at
        assert parameter.decay == (path[-1].key != "bias")
        assert len(parameter.axes) == shape.ndim
        assert all(name is None or sizes[name] == size for name, size in zip(parameter.axes, shape.shape, strict=True))


def test_it_learns(batch):
    """Adam from the initial values, on eight sentences: the signal does not vanish."""
    config = dataclasses.replace(TINY, embed_dropout=0.0, residual_dropout=0.0)
    batch = jax.tree.map(jnp.asarray, batch)
    params = jax.jit(functools.partial(lstm.init, config))(jax.random.key(0))
    optimizer = optax.adam(1e-2)
    moments = optimizer.init(params)

    @jax.jit
    def update(params, moments):
        value, gradients = jax.value_and_grad(functools.partial(loss, config))(params, batch)
        updates, moments = optimizer.update(gradients, moments)
        return value, optax.apply_updates(params, updates), moments

    losses = []
    for _ in range(200):
        value, params, moments = update(params, moments)
        losses.append(float(value))
    assert losses[0] == pytest.approx(np.log(50), abs=0.01)
    assert losses[-1] < 1.0
