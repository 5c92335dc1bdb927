"""The settings that a run chooses for itself where the config says "auto". They change the numbers only by rounding.

A choice is a pure function of the config and the platform, never of a timing. The run's config.json records it, and a run that
resumes uses it again, even if a later version would choose differently.
"""

import dataclasses
from typing import Any, TypeVar

from gpt_jax.config import ModelConfig, RunConfig
from gpt_jax.config.load import config_from_dict
from gpt_jax.model.attention import check_attention, choose_attention
from gpt_jax.model.transformer import choose_remat
from gpt_jax.runtime.rundir import RunDir

Config = TypeVar("Config", bound=RunConfig)

CHOICES = ("attention", "remat", "loss_chunk")
"""Fields of `ModelConfig`."""
EARLIER: dict[str, Any] = {"attention": "plain"}
"""The meaning of "auto" in runs that did not record their choices."""


def choose(model: ModelConfig, platform: str) -> ModelConfig:
    """Returns the model's config with all choices made for the devices of a platform ("cpu", "gpu" or "tpu").

    Attention is chosen for sequences that fill the context, also if a task's batches are shorter.

    Raises:
      UserError: the attention that the config names does not run on these devices.
    """
    chosen: Any = choose_attention(platform, model.context_length, model.head_dim).name
    attention = chosen if model.attention == "auto" else model.attention
    check_attention(attention, platform, model.context_length, model.head_dim)
    remat: Any = choose_remat(model)
    loss_chunk = model.loss_chunk or (0 if platform == "cpu" else 128)
    return dataclasses.replace(model, attention=attention, remat=remat, loss_chunk=loss_chunk)


def keep_choices(run: RunDir, config: Config, platform: str) -> Config:
    """Returns the config with all choices made: those of the run in this folder, if there is one, otherwise new ones.

    Fields that are not "auto" stay as they are. On another platform than before, the choices are made anew.
    """
    recorded = _recorded(run, platform)
    if recorded is not None and run.stored().get("platform", platform) == platform:
        automatic = {name for name in CHOICES if getattr(config.model, name) in ("auto", 0)}
        kept: dict[str, Any] = {name: getattr(recorded, name) for name in automatic}
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, **kept))
    return dataclasses.replace(config, model=choose(config.model, platform))


def changed_choices(run: RunDir, config: RunConfig, platform: str) -> dict[str, str]:
    """Returns a phrase for each choice that differs from the one that the run in this folder has made, keyed by field."""
    recorded = _recorded(run, platform)
    if recorded is None:
        return {}
    names = [name for name in CHOICES if getattr(config.model, name) != getattr(recorded, name)]
    changes = {
        f"model.{name.replace('_', '-')}": f"{getattr(config.model, name)} instead of {getattr(recorded, name)}" for name in names
    }
    before, now = run.stored().get("lengths"), list(run.lengths or ())
    if before and now and before != now:
        changes["task.num-length-buckets"] = f"{len(now)} ({now}) instead of {len(before)} ({before})"
    return changes


def _recorded(run: RunDir, platform: str) -> ModelConfig | None:
    """Returns the model's config with the choices that a run has made, or None if there is no run.

    The first version recorded no platform. `platform` is then taken for it.
    """
    stored = run.stored()
    if not stored:
        return None
    model = config_from_dict(stored["config"], run.path / "config.json").model
    earlier: dict[str, Any] = {name: value for name, value in EARLIER.items() if getattr(model, name) == "auto"}
    return choose(dataclasses.replace(model, **earlier), stored.get("platform", platform))
