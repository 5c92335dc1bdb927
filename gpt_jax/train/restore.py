"""Loading a trained model from a checkpoint, and recognizing the checkpoint that a run started from."""

import contextlib
import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from gpt_jax.config import MeshConfig, ModelConfig, RunConfig
from gpt_jax.config.load import config_digest, config_from_dict
from gpt_jax.data.tokenizers import Tokenizer, load_tokenizer
from gpt_jax.errors import UserError
from gpt_jax.model.transformer import Params
from gpt_jax.runtime import console, sharding
from gpt_jax.runtime.rundir import INTENDED, RunDir
from gpt_jax.train.checkpoint import restore_params
from gpt_jax.train.checkpoint_info import (
    CheckpointInfo,
    find_checkpoint,
    is_checkpoint,
    list_checkpoints,
    read_config,
    read_manifest,
)
from gpt_jax.train.choices import AUTOMATIC
from gpt_jax.train.step import LANGUAGE_MODEL, TrainableModel, abstract_state


class RestoredModel(NamedTuple):
    """A checkpoint's model, sharded over this machine's devices."""

    config: RunConfig
    """The checkpoint's config, with this machine's mesh."""
    mesh: Mesh
    params: Params
    tokenizer: Tokenizer
    info: CheckpointInfo


def load_model(path: Path, model: TrainableModel = LANGUAGE_MODEL) -> RestoredModel:
    """Loads the model of a checkpoint.

    Args:
      path: a run's folder, which stands for its newest sound checkpoint, or the folder of one checkpoint.
      model: determines which parameters are loaded; the language model can also be loaded from a fine-tuned model.

    Raises:
      UserError: there is no sound checkpoint.
    """
    info = find_checkpoint(path, console.say)
    config = read_config(info)
    mesh = local_mesh(config.model)
    model_config = dataclasses.replace(config.model, **AUTOMATIC)  # The run has made its choices for its own devices.
    config = dataclasses.replace(config, mesh=MeshConfig(), model=model_config)
    params = restore_params(info, abstract_state(config, mesh, model)["params"])
    return RestoredModel(config, mesh, params, load_tokenizer(info.path / "tokenizer"), info)


def local_mesh(model: ModelConfig) -> Mesh:
    """Returns a mesh that shards the parameters over as many of this machine's devices as the model's width allows."""
    spread = math.gcd(model.embed_dim, jax.device_count())
    return sharding.make_mesh(MeshConfig(data=1, fsdp=spread), jax.devices()[:spread])


# -- what a run starts from -------------------------------------------------------------------------------------------------

RANDOM = ("", "none")
"""The values of `--init.from` that stand for random parameters."""


def describe_start(info: CheckpointInfo) -> dict[str, Any]:
    """Returns what identifies a checkpoint that a run starts from, and its training, even if they are moved."""
    config, data_digest = read_config(info), read_manifest(info)["data_digest"]
    training = hashlib.sha256(f"{config_digest(config)} {data_digest} {config.init.from_}".encode()).hexdigest()
    # An imported model was not trained here, so another one may have the same config.
    return {"step": info.step, "fingerprint": info.fingerprint, "training": training if data_digest else info.fingerprint}


def check_start(run: RunDir, path: str, allow_changes: bool) -> None:
    """Checks that `--init.from` leads to the checkpoint that a run in the folder started from, whatever the path is.

    A run's folder may by now contain only other checkpoints of the same training. If nothing is found at the path, nothing is
    compared, because the run continues from its own checkpoints.

    Args:
      run: the folder. Its `start` is set to what it has recorded, or to what is found at the path if changes are allowed.
      path: the value of `--init.from`.
      allow_changes: whether the checkpoint may be another one.

    Raises:
      UserError: it is another one.
    """
    stored = run.stored()
    if not stored:
        return
    before = config_from_dict(stored["config"], run.path / "config.json").init.from_
    then = [stored["init"]] if stored.get("init") else _find_starts(before)  # Earlier versions recorded only the path.
    now = _find_starts(path)
    if path in RANDOM or before in RANDOM:
        same = path in RANDOM and before in RANDOM
    else:
        name = "fingerprint" if is_checkpoint(Path(path)) else "training"
        same = not (then and now) or any(found[name] == start[name] for found in now for start in then)
    if not same and not allow_changes:
        starts = f"started from {_name_start(before, then)}, but --init.from is {_name_start(path, now)}"
        raise UserError(f"{run.path} contains a run that {starts}. {INTENDED}")
    run.start = stored.get("init") if same else next(reversed(now), None)


def _find_starts(path: str) -> list[dict[str, Any]]:
    """Returns the descriptions of all sound checkpoints at a path, oldest first; none if nothing can be read there."""
    with contextlib.suppress(UserError, OSError):
        infos = [] if path in RANDOM else list_checkpoints(Path(path), checksums=False)
        return [describe_start(info) for info in infos if info.state == "sound"]
    return []


def _name_start(path: str, starts: list[dict[str, Any]]) -> str:
    details = [f" (checkpoint {start['step']}, fingerprint {start['fingerprint'][:12]})" for start in starts[-1:]]
    return "random parameters" if path in RANDOM else path + "".join(details)
