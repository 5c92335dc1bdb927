"""The paper's optimiser and schedules (section 4.1), and plain AdamW, as optax transformations."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from gpt_jax.config import OptimConfig


class Horizon(NamedTuple):
    """The run's length and its warm-up, in updates."""

    total: int
    warmup: float
    """A share of a short run need not be a whole number of updates."""


def learning_rate(config: OptimConfig, horizon: Horizon, step: Int[Array, ""] | int) -> Float[Array, ""]:
    """The rate of update `step`, counted from 0, as a function of x = step / total and the warm-up's share w of the run.

    cosine: peak x/w up to w, then peak 0.5 (1 + cos(pi x)), which is not restarted after the warm-up.
    linear: peak min(x/w, 1) (1 - x).
    Both are the released code's; the first update has rate 0 when there is a warm-up.
    """
    step = jnp.asarray(step, jnp.float32)
    x = step / horizon.total
    warming = jnp.minimum(step / horizon.warmup, 1.0) if horizon.warmup else jnp.ones(())
    if config.schedule == "linear":
        return config.peak_lr * warming * (1 - x)
    return config.peak_lr * jnp.where(warming < 1, warming, 0.5 * (1 + jnp.cos(jnp.pi * x)))


def make_optimizer(config: OptimConfig, horizon: Horizon, decay: Any) -> optax.GradientTransformation:
    """The configured optimiser, with gradient clipping in front where it is on.

    Args:
      decay: a tree of booleans like the parameters': where weight decay falls (by role, not by rank: stacked biases have two
        dimensions).
    """

    def schedule(step: Any) -> Any:
        return learning_rate(config, horizon, step)

    if config.kind == "adam_gpt1":
        optimizer = adam_gpt1(schedule, config.b1, config.b2, config.epsilon, config.weight_decay, decay)
    else:
        optimizer = optax.adamw(schedule, config.b1, config.b2, config.epsilon, weight_decay=config.weight_decay, mask=decay)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return in_float32(optax.chain(clip, optimizer))  # always a chain, so that a checkpoint's layout does not depend on clipping


def in_float32(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Computes and keeps moments in float32 whatever the parameters' type: in bfloat16 a b2 of 0.999 would be 1."""

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return optimizer.update(wide(gradients), state, wide(params))

    return optax.GradientTransformation(lambda params: optimizer.init(wide(params)), update)


class AdamState(NamedTuple):
    """`step`: updates made; `mu` and `nu`: first and second moments, like the parameters."""

    step: Int[Array, ""]
    mu: Any
    nu: Any


def adam_gpt1(
    schedule: optax.Schedule, b1: float, b2: float, epsilon: float, weight_decay: float, decay: Any
) -> optax.GradientTransformation:
    """Adam as the released code has it. With t counted from 0:

        m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
        rate = schedule(t) sqrt(1 - b2^(t+1)) / (1 - b1^(t+1))
        w <- w - rate (m / (sqrt(v) + epsilon) + weight_decay w)

    So epsilon stands outside the bias correction, and decay is scaled by the corrected rate: neither is optax's AdamW.
    """

    def init(params: Any) -> AdamState:
        # Two trees of arrays of their own: the step donates its state, and a buffer can be given away only once.
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
        return AdamState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(gradients: Any, state: AdamState, params: Any = None) -> tuple[Any, AdamState]:
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, gradients)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.nu, gradients)
        t = (state.step + 1).astype(jnp.float32)
        rate = schedule(state.step) * jnp.sqrt(1 - b2**t) / (1 - b1**t)

        def change(m: jax.Array, v: jax.Array, w: jax.Array, decays: bool) -> jax.Array:
            return -rate * (m / (jnp.sqrt(v) + epsilon) + (weight_decay * w if decays else 0))

        return jax.tree.map(change, mu, nu, params, decay), AdamState(state.step + 1, mu, nu)

    return optax.GradientTransformation(init, update)
