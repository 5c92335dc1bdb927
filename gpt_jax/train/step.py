"""The compiled training step: sharded state, gradient accumulation, and a guard against non-finite values.

The training loop gets the step from `lower_step`, as does any code that only needs to know its cost.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from gpt_jax.config import ModelConfig, RunConfig
from gpt_jax.model.dropout import DropoutKey
from gpt_jax.model.loss import Batch, language_model_loss, normalize
from gpt_jax.model.network import network
from gpt_jax.model.transformer import Params, ParamSpec, compute_dtype
from gpt_jax.runtime.memory import return_freed_memory
from gpt_jax.runtime.sharding import constrain, named_sharding
from gpt_jax.train.choices import choose, choose_for
from gpt_jax.train.compilation import AbstractBatch
from gpt_jax.train.optimizer import init_moments, learning_rate, make_optimizer

State = dict[str, Any]
"""The training state, a nested dictionary of arrays: `params`, `moments` (`optimizer.Moments`), `step` (number of updates made,
int32) and `ok` (bool: whether every update so far was finite)."""


class TrainableModel(NamedTuple):
    """A model and its loss: everything the step and the loop need from a task. Pre-training uses `LANGUAGE_MODEL`."""

    loss: Callable[[ModelConfig, Params, Batch, DropoutKey | None], jax.Array]
    """(config, params, batch, dropout_key) -> float32 []: the loss summed over examples, with weights scaled by `normalize`."""
    normalize: Callable[[Batch], Batch]
    """Scales the weights of a global batch so that the losses of its micro-batches add up to the loss of the batch."""
    init: Callable[[ModelConfig, jax.Array], Params]
    """(config, key) -> random parameters."""
    param_specs: Callable[[ModelConfig], Any]
    """config -> a tree like the parameters, with a `ParamSpec` for each."""


LANGUAGE_MODEL = TrainableModel(
    loss=language_model_loss,
    normalize=normalize,
    init=lambda config, key: network(config).init(config, key),
    param_specs=lambda config: network(config).param_specs(config),
)


def state_shardings(config: RunConfig, mesh: Mesh, model: TrainableModel = LANGUAGE_MODEL) -> State:
    """Returns a `NamedSharding` for each array of the state; moments are sharded like their parameters."""
    params = _map_specs(lambda spec: named_sharding(mesh, spec.axes), model.param_specs(config.model))
    replicated = named_sharding(mesh, ())
    return {"params": params, "moments": {"mu": params, "nu": params}, "step": replicated, "ok": replicated}


def init_state(config: RunConfig, mesh: Mesh, model: TrainableModel = LANGUAGE_MODEL) -> State:
    """Returns a state with random parameters and zero moments, created in shards under jit, so no host ever holds all of it."""
    init = jax.jit(functools.partial(_init, config, model), out_shardings=state_shardings(config, mesh, model))
    with jax.set_mesh(mesh):
        state = init(np.uint32(config.train.seed))
    if mesh.devices.flat[0].platform == "cpu":
        jax.block_until_ready(state)
        return_freed_memory()  # Drawing the random numbers took as much memory as the state.
    return state


def abstract_state(config: RunConfig, mesh: Mesh, model: TrainableModel = LANGUAGE_MODEL) -> State:
    """Returns the shapes, dtypes and shardings of the state, without the arrays."""
    shapes = jax.eval_shape(functools.partial(_init, config, model), np.uint32(0))
    shardings = state_shardings(config, mesh, model)
    return jax.tree.map(lambda array, sharding: array.update(sharding=sharding), shapes, shardings)


def abstract_batch(config: RunConfig, mesh: Mesh) -> AbstractBatch:
    """Returns the shapes, dtypes and shardings of a pre-training batch."""
    shape = (config.train.batch_size, config.model.context_length)
    array = functools.partial(jax.ShapeDtypeStruct, sharding=named_sharding(mesh, ("batch",)))
    tokens, weights, rows = array(shape, jnp.int32), array(shape, jnp.float32), array(shape[:1], jnp.int32)
    return {"tokens": tokens, "targets": tokens, "loss_weights": weights, "example_id": rows}


def lower_step(
    config: RunConfig,
    mesh: Mesh,
    *,
    total_steps: int = 1,
    warmup_steps: float = 0.0,
    model: TrainableModel = LANGUAGE_MODEL,
    batch: AbstractBatch | None = None,
) -> jax.stages.Lowered:
    """Traces and lowers the training step for a mesh whose devices need not be attached. `.compile()` makes the result callable.

    The compiled function maps (state, batch) to (state, metrics) and donates the state's buffers. The metrics are scalars:
    `loss` (nats), `grad_norm` (global, before clipping), `learning_rate`, and `ok`, which becomes False at the first update
    whose loss or gradient is not finite. That update and all later ones leave the rest of the state unchanged.

    Args:
      total_steps, warmup_steps: length and warm-up of the run, in updates; the defaults suffice if only the cost matters.
      batch: abstract arrays of a batch; None means `abstract_batch`.
    """
    config = choose_for(config, mesh)
    config = dataclasses.replace(config, model=settle(config.model, mesh))
    update = functools.partial(train_step, config, model, total_steps, warmup_steps)
    shardings = state_shardings(config, mesh, model), named_sharding(mesh, ())
    step = jax.jit(update, out_shardings=shardings, donate_argnums=0)
    with jax.set_mesh(mesh):
        return step.lower(abstract_state(config, mesh, model), batch or abstract_batch(config, mesh))


def jit_evaluation(config: RunConfig, mesh: Mesh, function: Callable[[ModelConfig, Params, Batch], Any]) -> jax.stages.Wrapped:
    """Returns a jitted function (params, batch) -> `function(model_config, params, batch)`; call it under `jax.set_mesh`.

    The results of the jitted function are replicated on every device.
    """
    model_config = settle(config.model, mesh)
    return jax.jit(functools.partial(function, model_config), out_shardings=named_sharding(mesh, ()))


def train_step(
    config: RunConfig, model: TrainableModel, total_steps: int, warmup_steps: float, state: State, batch: Batch
) -> tuple[State, dict[str, jax.Array]]:
    """Makes one update, unless the loss or gradient of this or an earlier update is not finite; see `lower_step`."""
    params, step = state["params"], state["step"]
    batch = model.normalize(batch)

    def loss_fn(params: Params, part: Batch) -> jax.Array:
        return model.loss(config.model, params, part, DropoutKey(config.train.seed, step, part["example_id"]))

    loss, gradients = _accumulate(jax.value_and_grad(loss_fn), params, batch, config.train.grad_accum_steps)
    with jax.named_scope("optimizer"):
        grad_norm = optax.tree.norm(gradients)
        ok = state["ok"] & jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        rate = learning_rate(config.optim, total_steps, warmup_steps, step)
        optimizer = make_optimizer(config.optim, _map_specs(lambda spec: spec.decay, model.param_specs(config.model)))
        updates, moments = optimizer.update(gradients, state["moments"], params, step=step, learning_rate=rate)
        new = {"params": optax.apply_updates(params, updates), "moments": moments, "step": step + 1, "ok": ok}
        guarded = jax.tree.map(lambda after, before: jnp.where(ok, after, before), new, state | {"ok": ok})
    return guarded, {"loss": loss, "grad_norm": grad_norm, "learning_rate": rate, "ok": ok}


def _accumulate(value_and_grad: Callable[..., Any], params: Params, batch: Batch, parts: int) -> tuple[jax.Array, Any]:
    """Returns the loss and the gradients of a batch, summed over `parts` micro-batches.

    Micro-batch j takes rows j, j + parts, j + 2 parts, ..., so that each device splits its own rows and no rows move between
    devices.
    """
    if parts == 1:
        return value_and_grad(params, batch)
    strided = {name: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1) for name, x in batch.items()}
    strided = {name: constrain(x, None, "batch") for name, x in strided.items()}

    def add(total: tuple[jax.Array, Any], part: Batch) -> tuple[tuple[jax.Array, Any], None]:
        return jax.tree.map(jnp.add, total, value_and_grad(params, part)), None

    zero = (jnp.zeros(()), optax.tree.zeros_like(params, dtype=jnp.float32))
    return jax.lax.scan(add, zero, strided)[0]


def _init(config: RunConfig, model: TrainableModel, seed: jax.Array) -> State:
    params = model.init(config.model, jax.random.key(seed))
    return {"params": params, "moments": init_moments(params), "step": jnp.zeros((), jnp.int32), "ok": jnp.ones((), jnp.bool)}


def settle(model: ModelConfig, mesh: Mesh) -> ModelConfig:
    """Returns the model's config with all choices made for the devices of a mesh, including the dtype of activations.

    The devices need not be attached to this machine.
    """
    device = mesh.devices.flat[0]
    dtype: Any = str(compute_dtype(model, device.platform))
    return dataclasses.replace(choose(model, device.platform, device.device_kind), compute_dtype=dtype)


def _map_specs(function: Callable[[ParamSpec], Any], specs: Any) -> Any:
    return jax.tree.map(function, specs, is_leaf=lambda leaf: isinstance(leaf, ParamSpec))
