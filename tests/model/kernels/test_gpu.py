"""The GPU's kernels, interpreted, against attention by its definition; and what is compiled for a GPU."""

import dataclasses
import functools
import math
import re
import warnings
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from gpt_jax.config import DataConfig, MeshConfig, ModelConfig, PretrainConfig, TokenizerConfig, TrainConfig
from gpt_jax.errors import UserError
from gpt_jax.model import attention as implementations
from gpt_jax.model import transformer
from gpt_jax.model.attention import attention
from gpt_jax.model.dropout import DropoutKey, Site, keep, mask_stream, threshold
from gpt_jax.model.kernels import gpu_kernels
from gpt_jax.model.kernels.gpu import pallas_gpu_attention
from gpt_jax.model.kernels.gpu_tuning import Tuning, TuningConfig
from gpt_jax.runtime.mesh import AXES
from gpt_jax.runtime.sharding import make_mesh, place_batch
from gpt_jax.train.step import init_state, lower_step

BATCH = 2


def problem(time, heads=2, dim=16, rate=0.0, segment=0, dtype=jnp.float32):
    """Returns queries, keys, values and a gradient of the output, and the stream, rate and segments of the masks.

    Args:
      segment: length of a segment; 0 for no segments. The parts of the second example are half as long, and every other part
        belongs to the same segment, so that a query sees keys before and after keys that it does not see.
    """
    draw = np.random.default_rng(time).normal
    arrays = [jnp.asarray(draw(size=(BATCH, time, heads, dim)), dtype) for _ in range(4)]
    stream = mask_stream(1, 2, 3, Site.ATTENTION, jnp.array([[5], [9]]), jnp.arange(heads)) if rate else None
    positions = np.arange(time)
    segments = jnp.array([positions // segment, positions // (segment // 2) % 2]) if segment else None
    return arrays, (stream, rate, segments)


def results(compute, arrays):
    """Returns the output of `compute` and the gradients of query, key and value."""
    *arrays, direction = arrays

    @jax.jit
    def run(arrays):
        output, pull_back = jax.vjp(compute, *arrays)
        return output, *pull_back(direction)

    return run(arrays)


def kernel(masks, precision="highest"):
    return lambda query, key, value: pallas_gpu_attention(query, key, value, *masks, precision)


def plain(masks):
    stream, rate, segments = masks
    options = {"stream": stream, "rate": rate, "segment_ids": segments, "precision": "highest"}
    return lambda query, key, value: attention(query, key, value, **options, implementation="plain")


def distances(actual, expected):
    """Returns relative L2 distances; absolute ones where the expected array is zero, as are the gradients of a single score."""
    wide = [(np.asarray(ours, np.float64), np.asarray(theirs, np.float64)) for ours, theirs in zip(actual, expected, strict=True)]
    return [np.linalg.norm(ours - theirs) / (np.linalg.norm(theirs) or 1) for ours, theirs in wide]


def exact(arrays, masks):
    """Returns what `results` does, computed by the formulas in float64 with NumPy."""
    query, key, value, direction = (np.asarray(array, np.float64).swapaxes(1, 2) for array in arrays)
    stream, rate, segments = masks
    positions = np.arange(query.shape[2])
    allowed = positions[:, None] >= positions
    if segments is not None:
        allowed = allowed & np.equal(segments[:, :, None], segments[:, None, :])[:, None]
    scores = np.where(allowed, query @ key.swapaxes(2, 3) / math.sqrt(query.shape[3]), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    kept = (
        np.ones_like(weights)
        if stream is None
        else keep(np.asarray(stream), positions, positions, rate) / (1 - threshold(rate) / 65536)
    )
    weights_gradient = kept * (direction @ value.swapaxes(2, 3))
    scores_gradient = weights * (weights_gradient - (weights * weights_gradient).sum(-1, keepdims=True))
    scores_gradient /= math.sqrt(query.shape[3])
    transposed = scores_gradient.swapaxes(2, 3), (kept * weights).swapaxes(2, 3)
    parts = (kept * weights) @ value, scores_gradient @ key, transposed[0] @ query, transposed[1] @ direction
    return [part.swapaxes(1, 2) for part in parts]


def equations(jaxpr):
    """Yields the equations of a program and of all programs inside it, such as kernels."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


# -- results ----------------------------------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=12)
@given(
    time=st.sampled_from([1, 2, 15, 16, 17, 32, 40, 63, 65, 100, 129, 200]),
    heads=st.sampled_from([1, 3]),
    dim=st.sampled_from([16, 32]),
    rate=st.sampled_from([0.0, 0.1, 0.5]),
    segment=st.sampled_from([0, 6, 40, 70]),
)
def test_outputs_and_gradients(time, heads, dim, rate, segment):
    arrays, masks = problem(time, heads, dim, rate, segment)
    assert max(distances(results(kernel(masks), arrays), results(plain(masks), arrays))) < 1e-5


# Keys in wider blocks than queries and the reverse; blocks that divide the length and that do not.
@pytest.mark.parametrize("blocks", [(16, 16), (64, 32), (16, 64), (128, 64)])
def test_results_do_not_depend_on_blocks(monkeypatch, blocks):
    monkeypatch.setattr(gpu_kernels, "choose_tuning", lambda *_: Tuning(*3 * [TuningConfig(*blocks, 4, 2)]))
    arrays, masks = problem(96, rate=0.5, segment=70)
    assert max(distances(results(kernel(masks), arrays), results(plain(masks), arrays))) < 1e-5


@pytest.mark.parametrize(("time", "dim"), [(384, 64), (150, 128)])
def test_bfloat16(time, dim):
    arrays, masks = problem(time, 1, dim, 0.1, 100, "bfloat16")
    expected, actual = exact(arrays, masks), results(kernel(masks), arrays)
    assert {array.dtype.name for array in actual} == {"bfloat16"}
    ours, theirs = distances(actual, expected), distances(results(plain(masks), arrays), expected)
    assert max(ours) < 2e-2
    assert max(ours) < 1.05 * max(theirs)  # The same numbers are rounded, in another order.


def test_blocks_of_keys_without_a_visible_key_add_nothing():
    """The first queries of the last segment pass four blocks of keys that they do not see, and whose scores are the greatest."""
    (query, key, value, _), (_, _, segments) = problem(160, segment=140)
    key = key.at[:, :128].mul(100)
    value = value.at[0, :140].set(1e30)
    output = pallas_gpu_attention(query, key, value, None, 0.0, segments, "highest")
    assert np.abs(output[0, 140:]).max() < 5


def test_large_scores_do_not_overflow():
    query = jnp.full((1, 77, 1, 16), 300.0)
    compute = kernel((None, 0.0, None))
    output, gradient = jax.value_and_grad(lambda x: compute(x, x, x).sum())(query)
    assert np.isfinite(output)
    assert np.isfinite(gradient).all()


# -- inside the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mesh", "local"),
    [(MeshConfig(data=2, tensor=4), (1, 4)), (MeshConfig(slice=2, data=1, fsdp=4), (4, 1))],
    ids=["heads", "rows"],
)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masks"])
def test_shards_have_the_results_of_one_device(mesh, local, masked):
    """Each device computes its own heads and rows, `local` of them."""
    draw = np.random.default_rng(0).normal
    arrays = [jnp.asarray(draw(size=(8, 40, 4, 16)), jnp.bfloat16) for _ in range(4)]
    stream = mask_stream(1, 2, 3, Site.ATTENTION, jnp.arange(8)[:, None], jnp.arange(4))
    masks = (stream, 0.3, jnp.arange(8)[:, None] + jnp.arange(40) // 25) if masked else (None, 0.0, None)
    expected = results(kernel(masks), arrays)
    with jax.set_mesh(make_mesh(mesh)):
        actual = results(kernel(masks), arrays)
        program = jax.make_jaxpr(functools.partial(results, kernel(masks)))(arrays)
    kernels = [equation.params for equation in equations(program.jaxpr) if equation.primitive.name == "pallas_call"]
    assert {params["grid_mapping"].grid[1:] for params in kernels} == {local}
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def calls(jaxpr):
    """Returns how many times each compiled kernel is in a program; interpreted kernels are not counted."""
    kernels = [equation.params for equation in equations(jaxpr) if equation.primitive.name == "pallas_call"]
    return Counter(re.search(r"attention_\w+", str(kernel["name"]))[0] for kernel in kernels if not kernel["interpret"])


@pytest.mark.parametrize(("remat", "forward"), [("off", 1), ("dots", 1), ("full", 2)])
def test_the_forward_kernel_runs_once_unless_everything_is_recomputed(monkeypatch, remat, forward):
    """In the gradient of a scan over layers, each kernel occurs once in the body of a scan."""
    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "plain", pallas_gpu_attention)
    config = ModelConfig(
        vocab_size=64, context_length=32, num_layers=3, num_heads=2, embed_dim=32, mlp_dim=64, attention="plain", remat=remat
    )
    params = transformer.init(config, jax.random.key(0))
    tokens = jnp.zeros((2, 32), jnp.int32)

    def loss(params):
        return transformer.apply(config, params, tokens, DropoutKey(1, 2, jnp.arange(2))).sum()

    program = jax.make_jaxpr(jax.grad(loss))(params)
    assert calls(program.jaxpr) == {
        "attention_forward": forward,
        "attention_query_gradients": 1,
        "attention_key_value_gradients": 1,
    }
    rounded = re.findall(r":(\S+) = reduce_precision", str(program))
    assert "f32[2,32,32]" in rounded or remat != "dots"  # a residual sum
    assert not {"f32[2,32,2,16]", "f32[2,2,32]"} & set(rounded)


def train(implementation, mesh, accumulation):
    """Returns the losses and the gradient norms of three updates, [updates, 2]."""
    config = PretrainConfig(
        model=ModelConfig(
            vocab_size=257, context_length=80, num_layers=2, num_heads=4, embed_dim=64, mlp_dim=64, attention=implementation
        ),
        data=DataConfig(tokenizer=TokenizerConfig(kind="bytes")),
        train=TrainConfig(batch_size=8, grad_accum_steps=accumulation),
        mesh=mesh,
    )
    devices = make_mesh(mesh, jax.devices()[: math.prod(dataclasses.astuple(mesh))])
    state = init_state(config, devices)
    update = lower_step(config, devices, total_steps=3).compile()
    numbers = []
    for tokens in np.random.default_rng(0).integers(0, 257, (3, 8, 81), np.int32):
        examples = np.arange(8, dtype=np.int32) + 8 * len(numbers)
        batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_weights": np.ones((8, 80), np.float32)}
        state, metrics = update(state, place_batch(devices, batch | {"example_id": examples}, 8))
        numbers.append([metrics["loss"], metrics["grad_norm"]])
    return np.array(numbers)


def test_updates_do_not_depend_on_the_implementation(monkeypatch):
    """All dropout is on, and both implementations compute the same masks."""
    monkeypatch.setitem(implementations.PLATFORMS, "pallas_gpu", "cpu")
    expected = train("plain", MeshConfig(data=1), 1)
    actual = train("pallas_gpu", MeshConfig(data=2, tensor=2), 2)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


# -- for a GPU --------------------------------------------------------------------------------------------------------------

TRITON = "__gpu$xla.gpu.triton"
"""The custom call of a kernel, which comes with Triton's code."""


def lower_for_cuda(function, *arguments):
    """Returns what is compiled for an H100, in which the kernels have been lowered to Triton."""
    device = AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    mesh = AbstractMesh((1,) * len(AXES), AXES, (AxisType.Auto,) * len(AXES), abstract_device=device)
    with warnings.catch_warnings(), jax.sharding.use_abstract_mesh(mesh):
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        check = export.DisabledSafetyCheck.custom_call(TRITON)
        return export.export(jax.jit(function), platforms=["cuda"], disabled_checks=[check])(*arguments).mlir_module()


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("dtype", "time"), [("bfloat16", 512), ("bfloat16", 100), ("float32", 512)])
def test_kernels_are_lowered_for_gpus(dim, dtype, time):
    arrays, masks = problem(time, 3, dim, 0.1, 70, dtype)
    lowered = lower_for_cuda(functools.partial(results, kernel(masks, "default")), arrays)
    assert lowered.count(f"@{TRITON}") == 3
    assert "stablehlo.while" not in lowered  # which interpreted kernels have


@pytest.mark.parametrize(("time", "masked"), [(100, True), (128, False)])
def test_nothing_is_written_after_the_end(time, masked):
    """An interpreted kernel cannot do that, but a compiled one would change other arrays, unless the store has a mask."""
    arrays, masks = problem(time, dtype="bfloat16")
    program = jax.make_jaxpr(functools.partial(results, kernel(masks)))(arrays)
    stores = [equation for equation in equations(program.jaxpr) if equation.primitive.name == "masked_swap"]
    assert len(stores) == 2 * (3 + 2 + 2)  # compiled and interpreted
    for equation in stores:
        *_, mask = equation.params["args_tree"].unflatten(equation.invars)
        assert (mask is not None) == masked


@pytest.mark.parametrize("precision", ["default", "highest"])
def test_all_products_have_the_precision_that_is_asked_for(precision):
    arrays, masks = problem(64, rate=0.1)
    program = str(jax.make_jaxpr(functools.partial(results, kernel(masks, precision)))(arrays))
    expected = f"precision=({precision.upper()}, {precision.upper()})".replace("(D", "(Precision.D").replace("(H", "(Precision.H")
    assert program.count("dot_general[") > 10
    assert program.count("dot_general[") == program.count(expected.replace(", ", ", Precision."))


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 8, 2, 48), "float32", "pallas_gpu takes heads of size 16, 32, 64 or 128, not 48"),
        ((1, 8193, 1, 16), "float32", "pallas_gpu takes sequences of at most 8,192 tokens, not 8,193"),
        ((1, 8, 2, 64), "float16", "pallas_gpu computes in bfloat16 or float32, not float16"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused(shape, dtype, message):
    array = jnp.zeros(shape, dtype)
    with pytest.raises(UserError, match=f"^{message}$"):
        pallas_gpu_attention(array, array, array, None, 0.0, None, "default")
