"""The compiled update: sharded state, micro-batches, and the guard against non-finite numbers.

Both the training loop and anyone who only wants to know what a step would cost get it from `lower_step`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt_jax.config import ModelConfig, RunConfig
from gpt_jax.model import network, transformer
from gpt_jax.model.loss import Batch, language_model_loss, normalize
from gpt_jax.runtime.sharding import constrain, named_sharding
from gpt_jax.train.optimizer import Horizon, learning_rate, make_optimizer

# Plain nested dictionaries of arrays: params, optimizer, step (updates made, int32) and ok (bool: no update was ever non-finite).
State = dict[str, Any]

Abstract = dict[str, jax.ShapeDtypeStruct]


class TrainableModel(NamedTuple):
    """What is minimised. Pre-training's is `LANGUAGE_MODEL`; the loop and the step know no other property of a task."""

    loss: Callable[[ModelConfig, transformer.Params, Batch, transformer.DropoutKey | None], jax.Array]
    """(config, params, batch, dropout) -> float32 []: a sum over the batch's examples, whose weights `normalize` has scaled."""
    normalize: Callable[[Batch], Batch]
    """Scales a global batch's weights so that the losses of its micro-batches add up to the loss of the whole."""
    init: Callable[[ModelConfig, jax.Array], transformer.Params]
    """(config, key) -> parameters."""
    describe: Callable[[ModelConfig], Any]
    """config -> a tree like the parameters' with a `transformer.ParamSpec` for each."""


LANGUAGE_MODEL = TrainableModel(language_model_loss, normalize, network.init, network.param_specs)


def state_shardings(config: RunConfig, mesh: Mesh, model_fns: TrainableModel = LANGUAGE_MODEL) -> State:
    """A `NamedSharding` for each array of the state; the optimiser's moments lie like their parameters."""
    is_parameter = lambda leaf: isinstance(leaf, transformer.ParamSpec)  # noqa: E731
    description = model_fns.describe(config.model)
    params = jax.tree.map(lambda parameter: named_sharding(mesh, parameter.axes), description, is_leaf=is_parameter)
    everywhere = NamedSharding(mesh, PartitionSpec())
    optimizer = _optimizer(config, Horizon(1, 0), model_fns)
    shapes = jax.eval_shape(lambda: model_fns.init(config.model, jax.random.key(0)))
    moments = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, shapes),
        params,
        transform_non_params=lambda _: everywhere,
    )
    return {"params": params, "optimizer": flax.serialization.to_state_dict(moments), "step": everywhere, "ok": everywhere}


def init_state(config: RunConfig, mesh: Mesh, model_fns: TrainableModel = LANGUAGE_MODEL) -> State:
    """Random parameters and zero moments, made under jit on the devices that keep them: no host ever holds the whole."""
    create = functools.partial(_create, config, model_fns)
    with jax.set_mesh(mesh):
        return jax.jit(create, out_shardings=state_shardings(config, mesh, model_fns))(np.uint32(config.train.seed))


def abstract_state(config: RunConfig, mesh: Mesh, model_fns: TrainableModel = LANGUAGE_MODEL) -> State:
    """The state's shapes, dtypes and shardings, without the arrays."""
    shapes = jax.eval_shape(functools.partial(_create, config, model_fns), np.uint32(0))
    with_sharding = lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(with_sharding, shapes, state_shardings(config, mesh, model_fns))


def abstract_batch(config: RunConfig, mesh: Mesh) -> Abstract:
    """Shapes, dtypes and shardings of a pre-training batch."""
    size, time = config.train.batch_size, config.model.context_length

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(mesh, ("batch", None)[: len(shape)]))

    return {
        "tokens": array(jnp.int32, size, time),
        "targets": array(jnp.int32, size, time),
        "loss_weights": array(jnp.float32, size, time),
        "example_id": array(jnp.int32, size),
    }


def lower_step(
    config: RunConfig,
    mesh: Mesh,
    *,
    horizon: Horizon | None = None,
    model_fns: TrainableModel = LANGUAGE_MODEL,
    batch: Abstract | None = None,
) -> jax.stages.Lowered:
    """Traces and lowers the update for a mesh, whose devices need not be attached. `.compile()` makes it callable.

    The compiled function maps (state, batch) to (state, metrics) and takes the state's buffers over. Metrics, all scalars:
    `loss` (nats), `grad_norm` (global, before clipping), `learning_rate`, and `ok`, which is False from the first update on whose
    loss or gradient is not finite: that update and all later ones leave the state as it was.

    Args:
      horizon: length and warm-up of the run, in updates; None where only the cost of a step is asked for.
      batch: abstract arrays of a batch; None: those of pre-training.
    """
    config = _for_devices(config, mesh)
    shardings = state_shardings(config, mesh, model_fns)
    everywhere = NamedSharding(mesh, PartitionSpec())
    step = jax.jit(
        functools.partial(_update, config, horizon or Horizon(1, 0), model_fns),
        out_shardings=(shardings, dict.fromkeys(("loss", "grad_norm", "learning_rate", "ok"), everywhere)),
        donate_argnums=0,
    )
    with jax.set_mesh(mesh):
        return step.lower(abstract_state(config, mesh, model_fns), batch or abstract_batch(config, mesh))


def lower_evaluation(
    config: RunConfig,
    mesh: Mesh,
    function: Callable[[ModelConfig, transformer.Params, Batch], Any],
    *,
    model_fns: TrainableModel = LANGUAGE_MODEL,
    batch: Abstract | None = None,
) -> jax.stages.Lowered:
    """Traces and lowers what scores parameters. The compiled function maps (params, batch) to `function(model, params, batch)`,
    whose arrays are whole on every device.
    """
    config = _for_devices(config, mesh)
    params = abstract_state(config, mesh, model_fns)["params"]
    evaluate = jax.jit(functools.partial(function, config.model), out_shardings=NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        return evaluate.lower(params, batch or abstract_batch(config, mesh))


class ByShape:
    """A function of (state or parameters, batch) that is compiled once for each shape of a batch, when the first one comes."""

    def __init__(self, lower: Callable[[Abstract], jax.stages.Lowered]):
        self._lower = lower
        self._programs: dict[tuple[tuple[int, ...], ...], jax.stages.Compiled] = {}

    def __len__(self) -> int:
        """Compilations so far."""
        return len(self._programs)

    def __call__(self, first: Any, batch: Batch) -> Any:
        key = tuple(batch[name].shape for name in sorted(batch))
        if key not in self._programs:
            abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in batch.items()}
            self._programs[key] = self._lower(abstract).compile()
        return self._programs[key](first, batch)


def _for_devices(config: RunConfig, mesh: Mesh) -> RunConfig:
    """Settles what depends on the mesh's devices, which need not be those of this machine."""
    platform = mesh.devices.flat[0].platform
    dtype: Any = str(transformer.compute_dtype(config.model, platform))
    chunk = config.model.loss_chunk or (0 if platform == "cpu" else 128)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, compute_dtype=dtype, loss_chunk=chunk))


def _create(config: RunConfig, model_fns: TrainableModel, seed: jax.Array) -> State:
    params = model_fns.init(config.model, jax.random.key(seed))
    moments = _optimizer(config, Horizon(1, 0), model_fns).init(params)
    return {
        "params": params,
        "optimizer": flax.serialization.to_state_dict(moments),
        "step": jnp.zeros((), jnp.int32),
        "ok": jnp.ones((), jnp.bool),
    }


def _update(
    config: RunConfig, horizon: Horizon, model_fns: TrainableModel, state: State, batch: Batch
) -> tuple[State, dict[str, jax.Array]]:
    params, step = state["params"], state["step"]
    batch = model_fns.normalize(batch)

    def loss_of(params: transformer.Params, part: Batch) -> jax.Array:
        return model_fns.loss(config.model, params, part, transformer.DropoutKey(config.train.seed, step, part["example_id"]))

    loss, gradients = _accumulate(jax.value_and_grad(loss_of), params, batch, config.train.grad_accum_steps)
    norm = optax.tree.norm(gradients)
    ok = state["ok"] & jnp.isfinite(loss) & jnp.isfinite(norm)

    optimizer = _optimizer(config, horizon, model_fns)
    moments = flax.serialization.from_state_dict(jax.eval_shape(optimizer.init, params), state["optimizer"])
    updates, moments = optimizer.update(gradients, moments, params)
    new = {
        "params": optax.apply_updates(params, updates),
        "optimizer": flax.serialization.to_state_dict(moments),
        "step": step + 1,
        "ok": ok,
    }
    guarded = jax.tree.map(lambda after, before: jnp.where(ok, after, before), new, state | {"ok": ok})
    rate = learning_rate(config.optim, horizon, step)
    return guarded, {"loss": loss, "grad_norm": norm, "learning_rate": rate, "ok": ok}


def _accumulate(
    value_and_grad: Callable[..., Any], params: transformer.Params, batch: Batch, parts: int
) -> tuple[jax.Array, Any]:
    """Loss and gradients of a batch, summed over `parts` micro-batches.

    Micro-batch j takes rows j, j + parts, j + 2 parts, ...: each device cuts its own rows, and nothing moves between devices.
    """
    if parts == 1:
        return value_and_grad(params, batch)
    strided = {
        name: array.reshape(array.shape[0] // parts, parts, *array.shape[1:]).swapaxes(0, 1) for name, array in batch.items()
    }
    strided = {name: constrain(array, None, "batch", *[None] * (array.ndim - 2)) for name, array in strided.items()}

    def add(total: tuple[jax.Array, Any], part: Batch) -> tuple[tuple[jax.Array, Any], None]:
        return jax.tree.map(jnp.add, total, value_and_grad(params, part)), None

    zero = (jnp.zeros(()), jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))
    return jax.lax.scan(add, zero, strided)[0]


def _optimizer(config: RunConfig, horizon: Horizon, model_fns: TrainableModel) -> optax.GradientTransformation:
    is_parameter = lambda leaf: isinstance(leaf, transformer.ParamSpec)  # noqa: E731
    decay = jax.tree.map(lambda parameter: parameter.decay, model_fns.describe(config.model), is_leaf=is_parameter)
    return make_optimizer(config.optim, horizon, decay)
