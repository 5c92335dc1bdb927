"""A trained model, read back to be used."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from gpt_jax.config import MeshConfig, RunConfig
from gpt_jax.config.load import config_from_dict
from gpt_jax.data.tokenizers import Tokenizer, load
from gpt_jax.model.transformer import Params
from gpt_jax.runtime import sharding
from gpt_jax.runtime.console import say
from gpt_jax.train import checkpoint
from gpt_jax.train.step import LANGUAGE_MODEL, TrainableModel, abstract_state


class Trained(NamedTuple):
    """A checkpoint's config (with this machine's mesh), its parameters, its tokenizer, and where it lies."""

    config: RunConfig
    mesh: Mesh
    params: Params
    tokenizer: Tokenizer
    info: checkpoint.Info


def load_model(path: Path, model_fns: TrainableModel = LANGUAGE_MODEL) -> Trained:
    """Reads a checkpoint's model, spread over this machine's devices.

    Args:
      path: a run's folder (its newest sound checkpoint) or one checkpoint's.
      model_fns: says which parameters are read; of a fine-tuned model, too, the language model alone can be.

    Raises:
      UserError: no sound checkpoint there.
    """
    info = checkpoint.resolve(path, say)
    config = config_from_dict(checkpoint.read_config(info))
    spread = math.gcd(config.model.embed_dim, jax.device_count())
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=spread), jax.devices()[:spread])
    config = dataclasses.replace(config, mesh=MeshConfig())
    params = checkpoint.restore_part(info, abstract_state(config, mesh, model_fns)["params"])
    return Trained(config, mesh, params, load(info.path / "tokenizer"), info)
