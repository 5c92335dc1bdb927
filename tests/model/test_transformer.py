"""The model against a NumPy transcription of the paper in float64, and what its parameters are."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config import MeshConfig, ModelConfig
from gpt_jax.model import dropout as masks
from gpt_jax.model import transformer
from gpt_jax.model.loss import embed_tokens, language_model_loss
from gpt_jax.plan.costs import read_costs
from gpt_jax.runtime.sharding import make_mesh, named_sharding
from tests.model import paper

TINY = ModelConfig(
    vocab_size=50,
    context_length=24,
    num_layers=3,
    embed_dim=16,
    num_heads=2,
    mlp_dim=40,
    embed_dropout=0.1,
    attention_dropout=0.2,
    residual_dropout=0.3,
    loss_chunk=8,
)
SEED, STEP, ROWS = 11, 22, np.array([5, 3], np.int32)

apply = jax.jit(transformer.apply, static_argnums=0)
initial = jax.jit(transformer.init, static_argnums=0)


# -- what is compared -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def params():
    """Parameters of which none is 0 or 1: a forgotten bias or gain shows."""
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(transformer.init, TINY), jax.random.key(0))
    return jax.tree.map(lambda leaf: (0.3 + 0.3 * draw.normal(size=leaf.shape)).astype(np.float32), shapes)


def wide(params):
    return jax.tree.map(lambda array: np.asarray(array, np.float64), params)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, 50, (2, 24)).astype(np.int32)


DROPOUT = masks.DropoutKey(SEED, STEP, ROWS)


def test_forward_pass(params, tokens):
    np.testing.assert_allclose(apply(TINY, params, tokens), paper.hidden(TINY, wide(params), tokens), atol=1e-5)


def test_forward_pass_with_dropout(params, tokens):
    expected = paper.hidden(TINY, wide(params), tokens, DROPOUT)
    np.testing.assert_allclose(apply(TINY, params, tokens, dropout_key=DROPOUT), expected, atol=1e-5)
    # Rates of 0 switch their own sites off.
    off = dataclasses.replace(TINY, embed_dropout=0.0, attention_dropout=0.0, residual_dropout=0.0)
    np.testing.assert_array_equal(apply(off, params, tokens, dropout_key=DROPOUT), apply(TINY, params, tokens))


def test_output_is_tied_to_the_embeddings_and_crops_the_padding(params, tokens):
    hidden = np.random.default_rng(2).normal(size=(2, 3, 16)).astype(np.float32)
    scores = jax.jit(transformer.logits, static_argnums=0)(TINY, params, hidden)
    assert scores.shape == (2, 3, 50)
    np.testing.assert_allclose(scores, hidden @ params["embedding"]["tokens"][:50].T, atol=1e-5)


def test_gradients_are_those_of_the_paper(params, tokens):
    """The derivative along random directions, against differences of the NumPy transcription, with dropout on."""
    targets = np.roll(tokens, 1, axis=1)
    batch = {"tokens": tokens, "targets": targets, "loss_weights": np.full((2, 24), 1 / 48, np.float32)}
    value, gradients = jax.jit(jax.value_and_grad(functools.partial(language_model_loss, TINY)))(params, batch, DROPOUT)
    np.testing.assert_allclose(value, paper.loss(TINY, wide(params), tokens, targets, DROPOUT), rtol=1e-5)
    draw = np.random.default_rng(3)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        direction = draw.normal(size=gradient.shape)
        along = []
        for distance in (1e-5, -1e-5):
            moved = jax.tree_util.tree_map_with_path(
                lambda at, array, path=path, change=distance * direction: array + change if at == path else array, wide(params)
            )
            along.append(paper.loss(TINY, moved, tokens, targets, DROPOUT))
        expected = (along[0] - along[1]) / 2e-5
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose((gradient * direction).sum(), expected, rtol=1e-3, atol=1e-5, err_msg=name)


def test_the_future_does_not_change_the_past(params, tokens):
    before = np.asarray(apply(TINY, params, tokens))
    for t in (0, 1, 17, 23):
        changed = tokens.copy()
        changed[:, t] = (changed[:, t] + 1) % 50
        after = np.asarray(apply(TINY, params, changed))
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert (after[:, t:] != before[:, t:]).any(-1).all(), "every later output sees the change"


def test_packed_examples_equal_separate_ones(params, tokens):
    segments = np.repeat([[4, 9, 4], [1, 2, 3]], [7, 12, 5], axis=1).astype(np.int32)
    packed = np.asarray(apply(dataclasses.replace(TINY, attention="plain"), params, tokens, segment_ids=segments))
    for row, (first, end) in [(0, (7, 19)), (1, (0, 7)), (1, (19, 24))]:
        alone = np.zeros((2, 24), np.int32)
        alone[0, : end - first] = tokens[row, first:end]
        np.testing.assert_allclose(packed[row, first:end], apply(TINY, params, alone)[0, : end - first], atol=1e-5)


# -- parameters -------------------------------------------------------------------------------------------------------------


def test_the_papers_model_has_116534784_parameters_in_146_arrays():
    paper_config = ModelConfig()
    assert paper_config.num_parameters == 116_534_784
    shapes = jax.eval_shape(functools.partial(transformer.init, paper_config), jax.random.key(0))
    assert len(jax.tree.leaves(shapes["embedding"])) + sum(leaf.shape[0] for leaf in jax.tree.leaves(shapes["blocks"])) == 146
    assert shapes["blocks"]["attention"]["qkv"]["kernel"].shape == (12, 768, 3, 12, 64)
    assert shapes["embedding"]["tokens"].shape == (40_576, 768)  # 317 x 128
    # ... and again by hand, with the padding of the vocabulary.
    layer = (768 * 2304 + 2304) + (768 * 768 + 768) + (768 * 3072 + 3072) + (3072 * 768 + 768) + 4 * 768
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == (40_576 + 512) * 768 + 12 * layer


def leaves_by_name(tree, **options):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree, **options)}


def test_initial_values():
    config = dataclasses.replace(TINY, vocab_size=300, context_length=64, embed_dim=64, mlp_dim=128, num_layers=2)
    values = leaves_by_name(initial(config, jax.random.key(1)))
    drawn = []
    for name, array in values.items():
        assert array.dtype == jnp.float32
        if name.endswith("['bias']"):
            assert not array.any(), name
        elif name.endswith("['gain']"):
            assert (array == 1).all(), name
        else:
            drawn.append(np.asarray(array[:300] if "tokens" in name else array, np.float64).ravel())
            assert abs(drawn[-1].mean()) < 5 * 0.02 / drawn[-1].size ** 0.5, name
            assert abs(drawn[-1].std() / 0.02 - 1) < 5 / (2 * drawn[-1].size) ** 0.5, name
    assert len(drawn) == 6
    assert not values["['embedding']['tokens']"][300:].any(), "rows that pad the vocabulary are zero"
    together = np.concatenate(drawn)
    assert abs((together / 0.02) ** 4).mean() == pytest.approx(3, abs=5 * (96 / together.size) ** 0.5)  # a normal distribution's
    assert np.unique(together).size > 0.98 * together.size, "no two arrays or layers share their values"


def test_param_dtype():
    config = dataclasses.replace(TINY, param_dtype="bfloat16")
    shapes = jax.eval_shape(functools.partial(transformer.init, config), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.bfloat16)}


def test_initial_values_do_not_depend_on_the_mesh():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    is_parameter = lambda leaf: isinstance(leaf, transformer.ParamSpec)  # noqa: E731
    description = transformer.param_specs(TINY)
    shardings = jax.tree.map(lambda parameter: named_sharding(mesh, parameter.axes), description, is_leaf=is_parameter)
    with jax.set_mesh(mesh):
        spread = jax.jit(functools.partial(transformer.init, TINY), out_shardings=shardings)(jax.random.key(7))
    kernel = spread["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    jax.tree.map(np.testing.assert_array_equal, spread, initial(TINY, jax.random.key(7)))


def test_description_fits_the_parameters():
    shapes = leaves_by_name(jax.eval_shape(functools.partial(transformer.init, TINY), jax.random.key(0)))
    described = leaves_by_name(transformer.param_specs(TINY), is_leaf=lambda leaf: isinstance(leaf, transformer.ParamSpec))
    assert {name: len(parameter.axes) for name, parameter in described.items()} == {name: x.ndim for name, x in shapes.items()}
    # Decay falls on matrices and embeddings, never on biases and gains, whatever dimensions stacking gives them.
    decayed = {name for name, parameter in described.items() if parameter.decay}
    assert decayed == {name for name in shapes if name.endswith(("['kernel']", "['tokens']", "['positions']"))}
    sizes = {"embed": 16, "heads": 2, "mlp": 40, "vocab": 128}
    for name, parameter in described.items():
        for axis, size in zip(parameter.axes, shapes[name].shape, strict=True):
            assert axis is None or sizes[axis] == size, name


# -- how it is computed -----------------------------------------------------------------------------------------------------


def test_bfloat16_activations_float32_parameters(params, tokens):
    config = dataclasses.replace(TINY, compute_dtype="bfloat16")
    hidden = apply(config, params, tokens)
    assert hidden.dtype == jnp.bfloat16
    assert np.abs(np.asarray(hidden, np.float64) - paper.hidden(TINY, wide(params), tokens)).mean() < 0.02
    batch = {"tokens": jnp.asarray(tokens), "targets": jnp.asarray(tokens), "loss_weights": jnp.ones((2, 24))}
    gradients = jax.eval_shape(jax.grad(functools.partial(language_model_loss, config)), params, batch, None)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}
    assert jax.eval_shape(functools.partial(transformer.logits, config), params, hidden).dtype == jnp.float32
    products = [line for line in apply.lower(config, params, tokens).as_text().splitlines() if "stablehlo.dot_general" in line]
    assert products
    assert all("(tensor<" in line and line.split(":")[-1].count("xbf16>") >= 2 for line in products)


def test_scoring_and_training_read_the_same_embeddings(params, tokens):
    """Training gathers the table in the compute dtype. A score from the parameters alone is of the same model."""
    config = dataclasses.replace(TINY, compute_dtype="bfloat16")
    rows, _ = jax.jit(embed_tokens, static_argnums=0)(config, params, tokens)
    np.testing.assert_array_equal(rows, params["embedding"]["tokens"].astype(jnp.bfloat16)[tokens].astype(jnp.float32))
    np.testing.assert_array_equal(apply(config, params, tokens), apply(config, params, tokens, token_rows=rows))


def test_auto_is_float32_on_a_cpu(params, tokens):
    assert jax.eval_shape(functools.partial(transformer.apply, TINY), params, tokens).dtype == jnp.float32


@pytest.mark.parametrize("precision", ["highest", "high", "default"])
def test_matmul_precision_reaches_every_product(precision, params, tokens):
    config = dataclasses.replace(TINY, matmul_precision=precision)
    batch = {"tokens": tokens, "targets": tokens, "loss_weights": np.ones((2, 24), np.float32)}
    loss = jax.jit(jax.value_and_grad(functools.partial(language_model_loss, config)))
    logits = jax.jit(functools.partial(transformer.logits, config))
    for lowered in (loss.lower(params, batch, DROPOUT), logits.lower(params, np.zeros((2, 24, 16), np.float32))):
        products = [line for line in lowered.as_text().splitlines() if "stablehlo.dot_general" in line]
        assert products
        named = f"precision = [{precision.upper()}, {precision.upper()}]"
        assert all(named in line or (precision == "default" and "precision" not in line) for line in products)


@pytest.mark.parametrize("remat", ["off", "dots"])
def test_unrolled_layers_have_the_same_gradients(params, tokens, remat):
    def gradients(unroll):
        config = dataclasses.replace(TINY, remat=remat, layer_unroll=unroll)
        batch = {"tokens": tokens, "targets": tokens, "loss_weights": np.ones((2, 24), np.float32)}
        program = jax.jit(jax.grad(functools.partial(language_model_loss, config))).lower(params, batch, DROPOUT)
        return program.as_text().count("stablehlo.while"), program.compile()(params, batch, DROPOUT)

    (loops, rolled), (fewer, unrolled) = gradients(1), gradients(TINY.num_layers)
    assert fewer < loops
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), unrolled, rolled)


def test_remat_saves_memory_and_changes_no_number():
    small = {"context_length": 32, "num_layers": 6, "embed_dim": 32, "mlp_dim": 128}
    base = dataclasses.replace(TINY, **small, embed_dropout=0.0, residual_dropout=0.0)
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(transformer.init, base), jax.random.key(0))
    params = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(np.float32) / 10, shapes)
    tokens, direction = draw.integers(0, 50, (4, 32)).astype(np.int32), draw.normal(size=(4, 32, 32)).astype(np.float32)
    dropout_key = masks.DropoutKey(SEED, STEP, np.arange(4, dtype=np.int32))
    results, memory = {}, {}
    for remat in ("off", "dots", "full"):
        config = dataclasses.replace(base, remat=remat)

        def loss(params, tokens, dropout_key, config=config):
            return (transformer.apply(config, params, tokens, dropout_key=dropout_key) * direction).sum()

        compiled = jax.jit(jax.value_and_grad(loss)).lower(params, tokens, dropout_key).compile()
        results[remat] = compiled(params, tokens, dropout_key)
        memory[remat] = compiled.memory_analysis().temp_size_in_bytes
    assert memory["full"] < 0.95 * memory["dots"] < 0.7 * memory["off"]
    for remat in ("dots", "full"):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3), results[remat], results["off"])


# -- what crosses the devices of a mesh -------------------------------------------------------------------------------------


# The matrices are large beside everything else, and their shards on eight devices are not a multiple of a TPU's 128 lanes.
LARGE = dataclasses.replace(TINY, context_length=128, num_layers=2, embed_dim=256, num_heads=4, mlp_dim=1024)


def sent(devices, attention, **sizes):
    """Returns the bytes that the layers of `LARGE` send for each entry of their parameters on eight TPUs, by kind and dtype."""
    config = dataclasses.replace(LARGE, compute_dtype="bfloat16", attention=attention)
    mesh = make_mesh(MeshConfig(**sizes), devices)

    def loss(blocks, hidden):
        params = {"embedding": {"positions": jnp.zeros((128, 256)), "tokens": None}, "blocks": blocks}
        return transformer.apply(config, params, jnp.zeros((16, 128), jnp.int32), token_rows=hidden).astype(jnp.float32).sum()

    shapes = jax.eval_shape(functools.partial(transformer.init, config), jax.random.key(0))["blocks"]
    is_spec = lambda leaf: isinstance(leaf, transformer.ParamSpec)  # noqa: E731
    specs = transformer.param_specs(config)["blocks"]
    shardings = jax.tree.map(lambda spec: named_sharding(mesh, spec.axes), specs, is_leaf=is_spec)
    blocks = jax.tree.map(lambda shape, sharding: shape.update(sharding=sharding), shapes, shardings)
    hidden = jax.ShapeDtypeStruct((16, 128, 256), jnp.float32, sharding=named_sharding(mesh, ("batch", None, None)))
    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(loss), out_shardings=shardings).lower(blocks, hidden).compile()
    entries, total = sum(shape.size for shape in jax.tree.leaves(shapes)), {}
    for each in read_costs(program.as_text(), mesh.shape).collectives:
        kind = each.kind, each.dtype
        total[kind] = total.get(kind, 0) + each.bytes * each.times / entries
    return total


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"data": 8}, {("all-reduce", "f32"): 4}),
        ({"data": 1, "fsdp": 8}, {("all-gather", "bf16"): 4, ("reduce-scatter", "f32"): 4}),
        ({"data": 2, "fsdp": 4}, {("all-gather", "bf16"): 4, ("reduce-scatter", "f32"): 4, ("all-reduce", "f32"): 1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("attention", ["plain", "pallas_tpu"])
def test_on_tpus_layers_are_gathered_twice_and_their_gradients_cross_once(tpu_devices, attention, sizes, expected):
    """`expected` is in bytes for each entry: two gathers in bfloat16 and one sum in float32. 5 % more are allowed for biases."""
    total = sent(tuple(tpu_devices("v5e:2x4")), attention, **sizes)
    assert {kind: round(size) for kind, size in total.items() if size > 0.05} == expected
    assert sum(total.values()) <= 1.05 * sum(expected.values())
