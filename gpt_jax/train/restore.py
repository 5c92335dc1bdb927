"""Loading a trained model from a checkpoint."""

import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from gpt_jax.config import MeshConfig, ModelConfig, RunConfig
from gpt_jax.data.tokenizers import Tokenizer, load_tokenizer
from gpt_jax.model.transformer import Params
from gpt_jax.runtime import console, sharding
from gpt_jax.train.checkpoint import CheckpointInfo, find_checkpoint, read_config, restore_params
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
    config = dataclasses.replace(config, mesh=MeshConfig())
    params = restore_params(info, abstract_state(config, mesh, model)["params"])
    return RestoredModel(config, mesh, params, load_tokenizer(info.path / "tokenizer"), info)


def local_mesh(model: ModelConfig) -> Mesh:
    """Returns a mesh that shards the parameters over as many of this machine's devices as the model's width allows."""
    spread = math.gcd(model.embed_dim, jax.device_count())
    return sharding.make_mesh(MeshConfig(data=1, fsdp=spread), jax.devices()[:spread])
