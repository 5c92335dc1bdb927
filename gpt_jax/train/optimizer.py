"""The paper's Adam and learning rate schedules (section 4.1), and Optax's AdamW. The state of both is Adam's two moments."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from gpt_jax.config import OptimConfig

Moments = dict[str, Any]
"""`mu` and `nu`: Adam's first and second moments, each a tree like the parameters, float32."""


def learning_rate(config: OptimConfig, total_steps: int, warmup_steps: float, step: Int[Array, ""] | int) -> Float[Array, ""]:
    """Returns the learning rate of update `step`, counted from 0, as a function of x = step / total_steps.

    With the warm-up fraction w = warmup_steps / total_steps, the schedules are those of the paper's released code:

        cosine    peak x/w up to and including w, then peak 0.5 (1 + cos(pi x)), which is not restarted after the warm-up
        linear    peak min(x/w, 1) (1 - x)

    With a warm-up, the first update has learning rate 0. Without one, it has the peak.

    Args:
      total_steps: number of updates in the whole run.
      warmup_steps: number of warm-up updates; may be fractional.
    """
    # Whole updates are compared. The small term is for warm-ups such as 0.57 % of 10,000 updates: 56.99999999999999 in floats.
    in_warmup = jnp.asarray(step) <= math.floor(warmup_steps + 1e-6)
    step = jnp.asarray(step, jnp.float32)
    x = step / total_steps
    warming = jnp.minimum(step / warmup_steps, 1.0) if warmup_steps else jnp.ones(())
    if config.schedule == "linear":
        return config.peak_lr * warming * (1 - x)
    return config.peak_lr * jnp.where(in_warmup, warming, 0.5 * (1 + jnp.cos(jnp.pi * x)))


def init_moments(params: Any) -> Moments:
    """Returns zero moments in float32, regardless of the parameters' dtype: in bfloat16, b2 = 0.999 would round to 1."""
    # Two separate trees: the step donates its state, and a buffer can be donated only once.
    return {name: optax.tree.zeros_like(params, dtype=jnp.float32) for name in ("mu", "nu")}


def make_optimizer(config: OptimConfig, decay_mask: Any) -> optax.GradientTransformationExtraArgs:
    """Returns the configured optimizer, preceded by gradient clipping if that is enabled.

    Its state is `Moments`. `update` takes the step (counted from 0) and the learning rate as keyword arguments, so that a run
    has a single step counter and computes the learning rate in one place. It computes in float32, regardless of the
    parameters' dtype.

    Args:
      decay_mask: a tree of booleans like the parameters, True where weight decay applies. It depends on a parameter's role, not
        on its rank, because stacked biases have two dimensions.
    """
    precondition = {"adam_gpt1": _adam_gpt1, "adamw": _adamw}[config.kind]

    def update(gradients: Any, moments: Moments, params: Any, *, step: Array, learning_rate: Array) -> tuple[Any, Moments]:
        gradients, params = optax.tree.cast((gradients, params), jnp.float32)
        if config.clip_norm:
            gradients, _ = optax.clip_by_global_norm(config.clip_norm).update(gradients, optax.EmptyState())
        scaled, moments, rate = precondition(config, gradients, moments, step, learning_rate)

        def change(x: jax.Array, w: jax.Array, decays: bool) -> jax.Array:
            return -rate * (x + config.weight_decay * w if decays else x)

        return jax.tree.map(change, scaled, params, decay_mask), moments

    return optax.GradientTransformationExtraArgs(init_moments, update)


def _adam_gpt1(config: OptimConfig, gradients: Any, moments: Moments, step: Any, learning_rate: Any) -> tuple[Any, Moments, Any]:
    """Returns the gradients scaled by the paper's released Adam, the new moments and the bias-corrected learning rate.

    With t counted from 0:

        m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
        rate = learning_rate sqrt(1 - b2^(t+1)) / (1 - b1^(t+1))
        w <- w - rate (m / (sqrt(v) + epsilon) + weight_decay w)

    Unlike in Optax's AdamW, epsilon is outside the bias correction, and weight decay is scaled by the corrected rate.
    """
    b1, b2 = config.b1, config.b2
    mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, moments["mu"], gradients)
    nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), moments["nu"], gradients)
    t = (step + 1).astype(jnp.float32)
    rate = learning_rate * jnp.sqrt(1 - b2**t) / (1 - b1**t)
    return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + config.epsilon), mu, nu), {"mu": mu, "nu": nu}, rate


def _adamw(config: OptimConfig, gradients: Any, moments: Moments, step: Any, learning_rate: Any) -> tuple[Any, Moments, Any]:
    """Returns the gradients scaled by Optax's Adam with the run's step counter, the new moments and the given learning rate."""
    adam = optax.scale_by_adam(config.b1, config.b2, config.epsilon)
    scaled, state = adam.update(gradients, optax.ScaleByAdamState(step, moments["mu"], moments["nu"]))
    return scaled, {"mu": state.mu, "nu": state.nu}, learning_rate
