"""The optimizers and the schedules against transcriptions of their definitions and numbers worked out by hand."""

import dataclasses
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config import LoopConfig, ModelConfig, OptimConfig, RunConfig
from gpt_jax.model import transformer
from gpt_jax.train.optimizer import init_moments, learning_rate, make_optimizer
from gpt_jax.train.schedule import resolve_schedule

TOTAL, WARMUP = 100, 10.0

# Layers are stacked, so a bias has two dimensions. Only its role shows that it does not decay.
SHAPES = {"table": (11, 4), "kernel": (3, 4, 5), "bias": (3, 5), "gain": (3, 4)}
DECAY = {"table": True, "kernel": True, "bias": False, "gain": False}


def start():
    rng = np.random.default_rng(0)
    return {name: rng.normal(0, 0.5, shape) for name, shape in SHAPES.items()}


def gradient(step):
    rng = np.random.default_rng(1000 + step)
    return {name: rng.normal(0.1, 10.0 ** rng.integers(-4, 2), shape) for name, shape in SHAPES.items()}


def as_float32(tree):
    return jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), tree)


def released_rate(schedule, total, warmup, step):
    """Transcribes the released schedules, with peak 1; `warmup` is exact. Without a warm-up, they would divide by zero."""
    x, w = step / total, warmup / total
    decay = {"cosine": 0.5 * (1 + math.cos(math.pi * x)), "linear": 1 - x}[schedule]
    if not warmup:
        return decay
    rising = step <= warmup
    if schedule == "linear":
        return (x / w if rising else 1.0) * decay
    return x / w if rising else decay


def cosine(step):
    return released_rate("cosine", TOTAL, WARMUP, step)


def adam_gpt1(w, m, v, g, t, config, decays):
    """Transcribes the paper's released optimizer, with t counted from 0."""
    m = config.b1 * m + (1 - config.b1) * g
    v = config.b2 * v + (1 - config.b2) * g * g
    rate = config.peak_lr * cosine(t) * math.sqrt(1 - config.b2 ** (t + 1)) / (1 - config.b1 ** (t + 1))
    return w - rate * (m / (np.sqrt(v) + config.epsilon) + (config.weight_decay * w if decays else 0)), m, v


def adamw(w, m, v, g, t, config, decays):
    """Transcribes Loshchilov and Hutter's algorithm 2 without restarts, with t counted from 0."""
    m = config.b1 * m + (1 - config.b1) * g
    v = config.b2 * v + (1 - config.b2) * g * g
    m_hat, v_hat = m / (1 - config.b1 ** (t + 1)), v / (1 - config.b2 ** (t + 1))
    rate = config.peak_lr * cosine(t)
    return w - rate * (m_hat / (np.sqrt(v_hat) + config.epsilon) + (config.weight_decay * w if decays else 0)), m, v


def update_at(config, t, decay_mask, gradients, moments, params):
    """Makes update `t` of the schedule; returns its changes of the parameters and the new moments."""
    step = jnp.asarray(t, jnp.int32)
    rate = learning_rate(config, TOTAL, WARMUP, step)
    return make_optimizer(config, decay_mask).update(gradients, moments, params, step=step, learning_rate=rate)


@pytest.mark.parametrize("transcription", [adam_gpt1, adamw])
def test_a_hundred_updates_follow_the_published_definition(transcription):
    # Epsilon and decay are large, so that a misplaced one shows.
    config = OptimConfig(kind=transcription.__name__, peak_lr=0.02, epsilon=1e-3, weight_decay=0.3)
    params = as_float32(start())
    moments = init_moments(params)

    @jax.jit
    def update(t, gradients, moments, params):
        changes, moments = update_at(config, t, DECAY, gradients, moments, params)
        return jax.tree.map(jnp.add, params, changes), moments

    expected = {name: (w, np.zeros_like(w), np.zeros_like(w)) for name, w in start().items()}
    for t in range(TOTAL):
        g = gradient(t)
        params, moments = update(t, as_float32(g), moments, params)
        expected = {name: transcription(*expected[name], g[name], t, config, DECAY[name]) for name in SHAPES}
    for name, (w, m, v) in expected.items():
        moved = np.abs(w - start()[name]).max()
        assert moved > 0.1
        np.testing.assert_allclose(params[name], w, atol=2e-5 * moved, rtol=0, err_msg=name)
        np.testing.assert_allclose(moments["mu"][name], m, atol=1e-5 * np.abs(m).max(), rtol=0, err_msg=name)
        np.testing.assert_allclose(moments["nu"][name], v, atol=1e-5 * np.abs(v).max(), rtol=0, err_msg=name)


@pytest.mark.parametrize("kind", ["adam_gpt1", "adamw"])
def test_the_first_update_of_a_warm_up_changes_nothing(kind):
    params = as_float32(start())
    changes, _ = update_at(OptimConfig(kind=kind), 0, DECAY, as_float32(gradient(0)), init_moments(params), params)
    assert all(not np.any(change) for change in changes.values())


@pytest.mark.parametrize("kind", ["adam_gpt1", "adamw"])
def test_only_matrices_and_embeddings_decay(kind):
    model = ModelConfig(vocab_size=50, context_length=8, num_layers=2, embed_dim=8, num_heads=2, mlp_dim=16, loss_chunk=8)
    is_spec = lambda leaf: isinstance(leaf, transformer.ParamSpec)  # noqa: E731
    decay = jax.tree.map(lambda spec: spec.decay, transformer.param_specs(model), is_leaf=is_spec)
    shapes = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)

    @jax.jit
    def update(params):
        config = OptimConfig(kind=kind, peak_lr=1.0)
        return update_at(config, 5, decay, jax.tree.map(jnp.zeros_like, params), init_moments(params), params)[0]

    leaves = jax.tree_util.tree_leaves_with_path(update(params))
    changed = {jax.tree_util.keystr(path, simple=True, separator="/"): np.any(change) for path, change in leaves}
    assert {name for name, moved in changed.items() if moved} == {
        "embedding/tokens",
        "embedding/positions",
        "blocks/attention/qkv/kernel",
        "blocks/attention/out/kernel",
        "blocks/mlp/up/kernel",
        "blocks/mlp/down/kernel",
    }
    assert {name.rsplit("/", 1)[1] for name, moved in changed.items() if not moved} == {"bias", "gain"}


@pytest.mark.parametrize(
    ("schedule", "warmup", "points"),
    [
        # x/w up to and including w = 0.1, then 0.5 (1 + cos(pi x)) with x counted from the start of the run.
        ("cosine", 10, {0: 0, 1: 0.1, 9: 0.9, 10: 1, 11: 0.97044038, 25: 0.85355339, 50: 0.5, 75: 0.14644661, 100: 0}),
        ("cosine", 9.5, {0: 0, 9: 0.94736842, 10: 0.97552826}),
        ("cosine", 0, {0: 1, 50: 0.5, 100: 0}),
        ("linear", 10, {0: 0, 1: 0.099, 5: 0.475, 10: 0.9, 50: 0.5, 99: 0.01, 100: 0}),
        ("linear", 0, {0: 1, 1: 0.99, 100: 0}),
    ],
)
def test_schedules_at_points_worked_out_by_hand(schedule, warmup, points):
    config = OptimConfig(schedule=schedule, peak_lr=2.5e-4)
    for step, share in points.items():
        np.testing.assert_allclose(learning_rate(config, 100, float(warmup), step), 2.5e-4 * share, rtol=2e-6, atol=2e-11)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize(
    ("duration", "warmup", "exact"),
    [
        ("100 steps", "0 steps", 0),
        ("100 steps", "10 steps", 10),
        ("4321 steps", "2000 steps", 2000),
        ("231 steps", "0.2%", Fraction(231, 500)),  # RTE: no whole update is within the warm-up.
        ("1750 steps", "0.2%", Fraction(7, 2)),
        ("10000 steps", "0.57%", 57),  # As floats, 0.57 * 10000 / 100 is 56.99999999999999,
        ("10000 steps", "0.07%", 7),  # and 0.07 * 10000 / 100 is 7.000000000000001.
        ("3 epochs", "0.29 epochs", 290),
        ("3 epochs", "5e5 tokens", Fraction(500_000, 64 * 512)),
        ("3 epochs", "65536 tokens", 2),
        ("100 steps", "99.9 steps", Fraction(999, 10)),
    ],
)
def test_every_rate_of_a_run_is_the_released_one(schedule, duration, warmup, exact):
    config = RunConfig(
        optim=OptimConfig(schedule=schedule, peak_lr=1.0, warmup=warmup), train=LoopConfig(batch_size=64, duration=duration)
    )
    total, warmup_steps, *_ = resolve_schedule(config, 512, 64_000)
    rates = jax.jit(jax.vmap(lambda step: learning_rate(config.optim, total, warmup_steps, step)))(jnp.arange(total))
    expected = np.array([released_rate(schedule, total, exact, step) for step in range(total)], np.float64)
    np.testing.assert_allclose(rates, expected, rtol=0, atol=1e-6)
    assert rates[0] == (0 if exact else 1)
    if schedule == "cosine" and exact == int(exact):
        assert rates[int(exact)] == 1


@pytest.mark.parametrize(("clip_norm", "expected"), [(1.0, (0.6, 0.8)), (10.0, (3.0, 4.0)), (0.0, (3.0, 4.0))])
def test_gradients_are_clipped_by_their_norm_over_all_arrays(clip_norm, expected):
    # With b1 = b2 = 0 and an epsilon that dwarfs the gradient, the update is minus the gradient: 3 and 4, of norm 5.
    config = OptimConfig(peak_lr=1e6, b1=0.0, b2=0.0, epsilon=1e6, weight_decay=0.0, clip_norm=clip_norm)
    gradients = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[0.0], [4.0]])}
    optimizer = make_optimizer(config, {"a": True, "b": True})
    params = jax.tree.map(jnp.zeros_like, gradients)
    changes, _ = optimizer.update(
        gradients, optimizer.init(params), params, step=jnp.int32(0), learning_rate=learning_rate(config, 10, 0.0, 0)
    )
    np.testing.assert_allclose(changes["a"], [-expected[0], 0], rtol=1e-5)
    np.testing.assert_allclose(changes["b"], [[0], [-expected[1]]], rtol=1e-5)


def test_defaults_are_the_papers():
    assert dataclasses.asdict(OptimConfig()) == {
        "kind": "adam_gpt1",
        "peak_lr": 2.5e-4,
        "schedule": "cosine",
        "warmup": "2000 steps",
        "b1": 0.9,
        "b2": 0.999,
        "epsilon": 1e-8,
        "weight_decay": 0.01,
        "clip_norm": 0.0,
    }
