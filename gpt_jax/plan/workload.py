"""The programs that can be planned: the step of a pre-training, the step of a fine-tuning, and the generation of text.

A workload describes its program by the shapes of its arrays, so it needs neither data nor JAX; program.py compiles it.
"""

import dataclasses
import math
import re
from typing import Any, Literal, NamedTuple

from gpt_jax.config import FinetuneConfig, FinetuneRunConfig, PretrainConfig
from gpt_jax.config.load import config_to_dict
from gpt_jax.errors import UserError, field_error, require
from gpt_jax.runtime.accelerators import Accelerator, largest_single_host_slice
from gpt_jax.runtime.console import say
from gpt_jax.runtime.mesh import check_batch, check_model, mesh_sizes
from gpt_jax.tasks.init_source import find_architecture, resolve_config
from gpt_jax.tasks.registry import Task, task_from_config
from gpt_jax.tasks.transforms import longest_input, segments_of
from gpt_jax.train.flops import flops_per_token


class Workload(NamedTuple):
    """A program, and the shape of its input."""

    verb: Literal["pretrain", "finetune", "generate"]
    config: PretrainConfig | FinetuneRunConfig
    rows: int
    """Sequences in one global batch, or prompts."""
    length: int
    """Tokens in each sequence or prompt."""
    task: Task | None = None
    """The task of a fine-tuning."""
    new_tokens: int = 0
    """Tokens that are appended to each prompt."""

    @property
    def examples(self) -> int:
        """Examples in one global batch; an example of a task may have several sequences."""
        return self.rows if self.verb == "generate" else self.config.train.batch_size

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches that the batch is divided into."""
        return 1 if self.verb == "generate" else self.config.train.grad_accum_steps

    @property
    def shape(self) -> dict[str, Any]:
        """The verb and the shape of the input, as JSON."""
        return {
            "verb": self.verb,
            "examples": self.examples,
            "sequences": self.rows,
            "length": self.length,
            "new_tokens": self.new_tokens,
            "micro_batches": self.micro_batches,
        }

    @property
    def as_pretraining(self) -> PretrainConfig | FinetuneRunConfig:
        """The config with the batch and the length of this program, as if each sequence were an example of a pre-training."""
        model = dataclasses.replace(self.config.model, context_length=self.length)
        train: Any = dataclasses.replace(self.config.train, batch_size=self.rows)
        return dataclasses.replace(self.config, model=model, train=train)

    @property
    def flops(self) -> float:
        """Floating-point operations of one execution: a step, or the generation of all tokens.

        Those of training are counted by `flops_per_token`, without the output layer if a fine-tuning has no language-model loss.
        Inference takes a third of that. A prompt does not need the output layer, and a new token attends only to the tokens
        before it.
        """
        model = self.config.model
        training = flops_per_token(dataclasses.replace(model, context_length=self.length))
        output = 6 * model.vocab_size * model.embed_dim
        if self.verb == "generate":
            middle = dataclasses.replace(model, context_length=self.length + self.new_tokens // 2)
            return self.rows * (self.length * (training - output) + self.new_tokens * flops_per_token(middle)) / 3
        unused = output if isinstance(self.config, FinetuneRunConfig) and not self.config.task.lm_weight else 0
        return self.rows * self.length * (training - unused)

    def mesh_sizes(self, accelerator: Accelerator, slices: int) -> dict[str, int]:
        """Returns the sizes of the mesh axes. For generation, only the parameters are sharded.

        Raises:
          UserError: the devices, the batch or the model cannot be divided evenly over the mesh, or generation would need several
            hosts.
        """
        if self.verb != "generate":
            sizes = mesh_sizes(self.config.mesh, accelerator, slices)
            problem = f"is {sizes['slice']}, but --slices is {slices}; both must be the number of slices or nodes"
            require(sizes["slice"] == slices, "mesh.slice", problem)
            check_batch(sizes, self.config.train.batch_size, self.config.train.grad_accum_steps)
            check_model(sizes, self.config.model)
            return sizes
        one_host = slices == accelerator.hosts == 1
        hosts = f"text is generated on one host, but {slices} x {accelerator.name} has {slices * accelerator.hosts}"
        require(
            one_host, "topology", f"{hosts}; the largest slice with one host is {largest_single_host_slice(accelerator.family)}"
        )
        return {"slice": 1, "data": 1, "fsdp": math.gcd(self.config.model.embed_dim, accelerator.devices), "tensor": 1}

    def facts(self) -> dict[str, Any]:
        """Returns everything that determines the program, as JSON."""
        shape = {"rows": self.rows, "length": self.length, "new_tokens": self.new_tokens}
        labels = len(self.task.labels) if self.task else 0
        return {"verb": self.verb, "config": config_to_dict(self.config), "labels": labels} | shape


def pretraining(config: PretrainConfig) -> Workload:
    """Returns the step of a pre-training."""
    return Workload("pretrain", config, config.train.batch_size, config.model.context_length)


def fine_tuning(config: FinetuneConfig) -> Workload:
    """Returns the step of a fine-tuning whose sequences have the greatest length that the task and the model allow.

    Raises:
      UserError: the task or the architecture is not known; see `task_from_config` and `find_architecture`.
    """
    task = task_from_config(config.task)
    resolved = resolve_config(config, task, find_architecture(config.init, say))
    sequences = len(segments_of(task.kind, len(task.labels)))
    length = longest_input(config.task, task.kind, len(task.labels), resolved.model.context_length)
    return Workload("finetune", resolved, config.train.batch_size * sequences, length, task)


def generation(config: PretrainConfig, shape: str) -> Workload:
    """Returns the generation of text.

    Args:
      shape: PROMPTSxLENGTH+TOKENS: the number of prompts, the tokens in each, and the tokens to append.

    Raises:
      UserError: the shape is malformed, or does not fit into the context.
    """
    match = re.fullmatch(r"([1-9]\d{0,6})x([1-9]\d{0,6})\+([1-9]\d{0,6})", shape)
    if match is None:
        raise field_error("generate", f"'{shape}' is not PROMPTSxLENGTH+TOKENS, such as 8x32+100")
    rows, length, tokens = map(int, match.groups())
    context = config.model.context_length
    excess = f"{length} + {tokens} tokens exceed the context of {context}"
    require(length + tokens <= context, "generate", excess)
    return Workload("generate", config, rows, length, new_tokens=tokens)


def workload_of(config: PretrainConfig | FinetuneConfig, generate: str | None) -> Workload:
    """Returns the step of the run that a config describes, or text generation with its model.

    Args:
      generate: the shape of the prompts (`generation`), or None for the run.

    Raises:
      UserError: as for `fine_tuning` and `generation`.
    """
    if isinstance(config, FinetuneConfig):
        if generate is not None:
            raise UserError("--generate: plans text generation with the model of a pre-training config; name one")
        return fine_tuning(config)
    return pretraining(config) if generate is None else generation(config, generate)
