"""The model that a fine-tuning run starts from, and the config that follows from it. It does not depend on JAX."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

from gpt_jax.config import (
    FinetuneConfig,
    FinetuneRunConfig,
    ModelConfig,
    ModelOptions,
    PretrainConfig,
    TokenizerConfig,
    TransferConfig,
)
from gpt_jax.config.load import load_config
from gpt_jax.data.tokenizers import Tokenizer, create_tokenizer, load_tokenizer
from gpt_jax.errors import UserError, require
from gpt_jax.runtime.console import Log
from gpt_jax.runtime.rundir import RunDir
from gpt_jax.tasks.registry import Task
from gpt_jax.tasks.transforms import SpecialTokens
from gpt_jax.train.checkpoint_info import CheckpointInfo, find_checkpoint, newest_checkpoint, read_config


class InitSource(NamedTuple):
    """The model that a fine-tuning run starts from."""

    model: ModelConfig
    """The architecture; its vocabulary may contain the special tokens of an earlier fine-tuning run."""
    tokenizer: Tokenizer
    info: CheckpointInfo | None
    """The checkpoint with the parameters; None: the parameters are random."""

    @property
    def architecture(self) -> ModelConfig:
        """The architecture with the vocabulary of the tokenizer."""
        return dataclasses.replace(self.model, vocab_size=self.tokenizer.vocab_size)


def find_init(init: TransferConfig, log: Log, run: RunDir | None = None) -> InitSource:
    """Finds the model that `--init.from` and `--init.like` name.

    If it cannot be read, a run that has a checkpoint of its own continues from that one, which contains all it needs.

    Raises:
      UserError: there is no checkpoint, its tokenizer does not fit its model, or the architecture or the tokenizer is not given.
    """
    require(bool(init.from_), "init.from", "name the run or checkpoint to fine-tune, or write none for random parameters")
    origin = init.like if init.from_ == "none" else init.from_
    require(bool(origin), "init.like", "name the run, checkpoint or config whose architecture the random parameters have")
    try:
        return _read_source(init, origin, log)
    except UserError as error:
        own = newest_checkpoint(run.checkpoints, log) if run else None
        if own is None:
            raise
        log(f"continuing with the model and the tokenizer of {own.path} ({error})")
        return _read_checkpoint(own)._replace(info=None)


def _read_source(init: TransferConfig, origin: str, log: Log) -> InitSource:
    if init.from_ != "none" or Path(origin).is_dir():
        require(not init.tokenizer, "init.tokenizer", "leave it out; a checkpoint has its own tokenizer")
        source = _read_checkpoint(find_checkpoint(Path(origin), log))
        return source._replace(info=None) if init.from_ == "none" else source
    config = _load_like(origin)
    kind = config.data.tokenizer.kind
    require(bool(init.tokenizer) or kind == "bytes", "init.tokenizer", f"name the folder of the {kind} tokenizer to use")
    wanted = TokenizerConfig(kind=kind, path=init.tokenizer)
    tokenizer = create_tokenizer(wanted, config.model.vocab_size, lambda: (), field="init.tokenizer")
    return InitSource(config.model, tokenizer, None)


def find_architecture(init: TransferConfig, log: Log) -> ModelConfig:
    """Returns the architecture of the model that `--init.from` and `--init.like` name; a config needs no tokenizer.

    Raises:
      UserError: as for `find_init`.
    """
    if init.from_ == "none" and init.like and not Path(init.like).is_dir():
        return _load_like(init.like).model
    return find_init(init, log).architecture


def _load_like(name: str) -> PretrainConfig:
    """Returns the pre-training config that `--init.like` names."""
    try:
        config = load_config(name)
    except UserError as error:
        raise UserError(f"--init.like: there is no folder '{name}', and {error}") from None
    if not isinstance(config, PretrainConfig):
        raise UserError(f"--init.like: '{name}' is a fine-tuning config, which has no architecture")
    return config


def _read_checkpoint(info: CheckpointInfo) -> InitSource:
    model = read_config(info).model
    tokenizer = load_tokenizer(info.path / "tokenizer")
    if model.vocab_size - tokenizer.vocab_size not in (0, len(SpecialTokens._fields)):  # The latter was fine-tuned before.
        raise UserError(
            f"{info.path}: its model has {model.vocab_size:,} entries and its tokenizer {tokenizer.vocab_size:,}; they do not "
            "fit together, so use another checkpoint"
        )
    return InitSource(model, tokenizer, info)


def resolve_config(config: FinetuneConfig, task: Task, architecture: ModelConfig) -> FinetuneRunConfig:
    """Returns the config with all fields that depend on the task and on the source of the parameters.

    These are the architecture (`InitSource.architecture`), with room for the special tokens, and the labels of a user-defined
    task, which may have been read from its training rows.

    Raises:
      UserError: `--init.blocks` does not fit the architecture.
    """
    options = {field.name: getattr(config.model, field.name) for field in dataclasses.fields(ModelOptions)}
    vocab_size = architecture.vocab_size + len(SpecialTokens._fields)
    model = dataclasses.replace(architecture, **options, vocab_size=vocab_size)
    blocks, layers = config.init.blocks, model.num_layers
    require(model.kind != "lstm" or blocks <= 0, "init.blocks", "an LSTM is transferred completely (-1) or not at all (0)")
    require(blocks <= layers, "init.blocks", f"the checkpoint has {layers} blocks, not {blocks}")
    sections = {field.name: getattr(config, field.name) for field in dataclasses.fields(FinetuneConfig)}
    own_classes = not (config.task.name or task.regression)
    labeled = dataclasses.replace(config.task, labels=task.labels) if own_classes else config.task
    return FinetuneRunConfig(**sections | {"model": model, "task": labeled})
