"""The settings that a run chooses where the config says "auto". They change results only by rounding.

A choice is a pure function of the config and the devices; it never depends on a timing. The run's config.json records the choice,
and a resumed run uses it again, even if a later version would choose differently.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from jax.sharding import Mesh

from gpt_jax.config import ModelConfig, PretrainConfig, RunConfig
from gpt_jax.config.load import config_from_dict
from gpt_jax.model.attention import check_attention, choose_attention
from gpt_jax.model.remat import choose_remat
from gpt_jax.model.transformer import compute_dtype
from gpt_jax.runtime.rundir import RunDir
from gpt_jax.train.memory_estimate import check_remat, remat_that_fits

Config = TypeVar("Config", bound=RunConfig)

AUTOMATIC: dict[str, Any] = {"attention": "auto", "remat": "auto", "layer_unroll": 0, "loss_chunk": 0}
"""The fields of `ModelConfig` that a run can choose, and the values that leave the choice to the run."""
EARLIER: dict[str, Any] = {"attention": "plain"}
"""The meaning of "auto" in runs that did not record their choices."""
UNROLLED_ON_TPUS = 12
"""Maximum number of layers that are unrolled in pre-training on TPUs. Each layer takes about ten seconds to compile."""


def choose(model: ModelConfig, platform: str, device_kind: str = "") -> ModelConfig:
    """Returns the model's config with all choices made for a platform ("cpu", "gpu" or "tpu") and a kind of device.

    Attention is chosen for sequences that fill the context, even if a task's batches are shorter.

    Raises:
      UserError: the attention that the config names does not run on these devices.
    """
    sizes = model.context_length, model.head_dim, compute_dtype(model, platform), device_kind
    chosen: Any = choose_attention(platform, *sizes).name
    attention = chosen if model.attention == "auto" else model.attention
    check_attention(attention, platform, *sizes)
    remat: Any = choose_remat(model)
    loss_chunk = model.loss_chunk or (0 if platform == "cpu" else 128)
    unroll = model.layer_unroll or 1
    return dataclasses.replace(model, attention=attention, remat=remat, layer_unroll=unroll, loss_chunk=loss_chunk)


def choose_for(config: Config, mesh: Mesh) -> Config:
    """Returns the config with all choices made for the devices of a mesh; see `choose_on`."""
    device = mesh.devices.flat[0]
    return choose_on(config, mesh.shape, device.platform, device.device_kind)


def choose_on(config: Config, sizes: Mapping[str, int], platform: str, kind: str) -> Config:
    """Returns the config with all choices made for a mesh of these sizes, whose devices have a platform and a kind in JAX.

    In pre-training, `model.remat` depends on the memory of a device, and models with few layers are unrolled on TPUs. Fine-tuning
    has batches of several lengths and compiles the step for each, so it uses the choices of `choose`.

    Raises:
      UserError: as for `choose`, or because the batch does not fit into the devices' memory.
    """
    chosen = choose(config.model, platform, kind)
    if isinstance(config, PretrainConfig):
        automatic = dataclasses.replace(config, model=dataclasses.replace(chosen, remat=config.model.remat))
        remat: Any = remat_that_fits(automatic, sizes, platform, kind)
        few = platform == "tpu" and chosen.kind == "transformer" and chosen.num_layers <= UNROLLED_ON_TPUS
        # Without a loop, the compiler merges a full recomputation with the forward pass, and no memory is saved.
        unroll = config.model.layer_unroll or (chosen.num_layers if few and remat != "full" else 1)
        chosen = dataclasses.replace(chosen, remat=remat, layer_unroll=unroll)
    return dataclasses.replace(config, model=chosen)


def keep_choices(run: RunDir, config: Config, mesh: Mesh) -> Config:
    """Returns the config with all choices made: those recorded by the run in this folder, or new ones if there is no run.

    Fields that are not "auto" are unchanged. If the platform has changed, all choices are made again. If the devices, the mesh or
    the micro-batches have changed, `model.remat` is chosen again.

    Raises:
      UserError: as for `choose_for`, or because the batch does not fit with the choices of the config or the run.
    """
    device, stored = mesh.devices.flat[0], run.stored()
    recorded = _recorded(run, device.platform)
    same_memory = False
    if recorded is not None and stored.get("platform", device.platform) == device.platform:
        same_devices = stored.get("devices") == f"{mesh.size} x {device.device_kind}"
        same_memory = same_devices and _batch_layout(config) == _batch_layout(recorded)
        automatic = {name for name in AUTOMATIC if getattr(config.model, name) in ("auto", 0)}
        if not same_memory and device.platform != "cpu":
            automatic.discard("remat")
        kept: dict[str, Any] = {name: getattr(recorded.model, name) for name in automatic}
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, **kept))
        same_memory = same_memory and config.model == recorded.model
    config = choose_for(config, mesh)
    if isinstance(config, PretrainConfig) and not same_memory:
        check_remat(config, mesh.shape, device.platform, device.device_kind)
    return config


def _batch_layout(config: RunConfig) -> tuple[Any, ...]:
    """Returns the settings that determine how many sequences a device processes at once."""
    return config.mesh, config.train.batch_size, config.train.grad_accum_steps


def changed_choices(run: RunDir, config: RunConfig, platform: str) -> dict[str, str]:
    """Returns a phrase for each choice that differs from the one recorded by the run in this folder, keyed by field."""
    recorded = _recorded(run, platform)
    if recorded is None:
        return {}
    values = {name: (getattr(config.model, name), getattr(recorded.model, name)) for name in AUTOMATIC}
    changes = {f"model.{name.replace('_', '-')}": f"{now} instead of {old}" for name, (now, old) in values.items() if now != old}
    before, now = run.stored().get("lengths"), list(run.lengths or ())
    if before and now and before != now:
        changes["task.num-length-buckets"] = f"{len(now)} ({now}) instead of {len(before)} ({before})"
    return changes


def _recorded(run: RunDir, platform: str) -> RunConfig | None:
    """Returns the config of the run in this folder with its choices, or None if there is no run.

    Runs of the first version did not record their platform; `platform` stands in for it.
    """
    stored = run.stored()
    if not stored:
        return None
    config = config_from_dict(stored["config"], run.path / "config.json")
    earlier: dict[str, Any] = {name: value for name, value in EARLIER.items() if getattr(config.model, name) == "auto"}
    model = choose(dataclasses.replace(config.model, **earlier), stored.get("platform", platform))
    return dataclasses.replace(config, model=model)
