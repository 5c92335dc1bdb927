"""Benchmark `finetune`: training on a task, beside PyTorch loops that pad each batch to its longest example (`torch`) or to the
context (`torch-context`).

All programs divide the training split into the same number of batches. Ten of them are timed, which are spread evenly over the
padded lengths of an epoch: ours have examples of similar length, as in `gpt-jax finetune`, and the others random ones.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gpt_jax.bench import torch_gpt
from gpt_jax.bench.comparison import Comparison, Request, require_transformer
from gpt_jax.bench.program import Program, ProgramSpec, start_jax
from gpt_jax.config import FinetuneRunConfig
from gpt_jax.config.load import config_from_dict, config_to_dict
from gpt_jax.runtime.console import say

PADDINGS = {"torch": "longest", "torch-context": "context"}
PEERS = tuple(PADDINGS)
BATCHES = 10


def comparisons(request: Request) -> list[Comparison]:
    """Returns the only comparison.

    Raises:
      UserError: the task, or the model to start from, cannot be read, or the model is an LSTM.
    """
    from gpt_jax.tasks.init_source import find_init, resolve_config
    from gpt_jax.tasks.registry import task_from_config

    config = request.config
    resolved = resolve_config(config, task_from_config(config.task), find_init(config.init, say).architecture)
    require_transformer(resolved.model)
    settings = {"config": config_to_dict(resolved)}
    programs = {"gpt_jax": ProgramSpec(f"{__name__}:ours", settings)}
    for name in request.peers:
        programs[name] = ProgramSpec(f"{__name__}:peer", {**settings, "padding": PADDINGS[name]})
    model, size = resolved.model, resolved.train.batch_size
    title = f"finetune {request.config_name}: {model.num_layers} x {model.embed_dim}, {BATCHES} batches of {size}"
    return [Comparison(title, "examples", BATCHES * size, programs, tuple(request.peers))]


class _Data(NamedTuple):
    config: FinetuneRunConfig
    task: Any
    batches: list[dict[str, np.ndarray]]
    padding: float
    """Share of padding in an epoch."""


def _load(config: dict[str, Any], padding: str) -> _Data:
    """Reads the task and returns the batches to time.

    Args:
      padding: "buckets" for the config's own batches, "longest" for random batches padded to their longest example, and
        "context" for random batches padded to the model's context.
    """
    from gpt_jax.tasks.batches import TaskBatches
    from gpt_jax.tasks.dataset import load_dataset
    from gpt_jax.tasks.init_source import find_init

    settings = config_from_dict(config)
    assert isinstance(settings, FinetuneRunConfig)
    size, context = settings.train.batch_size, settings.model.context_length
    tokenizer = find_init(settings.init, say).tokenizer
    data = load_dataset(settings.task, tokenizer, context, say, ("train", "validation"))
    lengths: Sequence[int] = range(1, context + 1) if padding == "longest" else (context,)
    if padding == "buckets":
        lengths = _bucket_lengths(settings, data.encoded)
    bucketed = padding == "buckets" and settings.task.bucket_by_length
    batches = TaskBatches(data.encoded["train"], size, settings.train.seed, lengths, bucketed)
    one_row = np.arange(1)
    by_length = sorted(range(batches.steps_per_epoch), key=lambda step: batches.batch_at(step, one_row)["tokens"].shape[-1])
    chosen = (by_length[int((number + 0.5) / BATCHES * len(by_length))] for number in range(BATCHES))
    return _Data(settings, data.task, [batches.batch_at(step, np.arange(size)) for step in chosen], batches.padding_share())


def _bucket_lengths(config: FinetuneRunConfig, encoded: dict[str, Any]) -> tuple[int, ...]:
    """Returns the lengths that a run with this config pads its batches to on this machine."""
    import jax

    from gpt_jax.tasks.batches import count_steps
    from gpt_jax.tasks.finetune import task_schedule
    from gpt_jax.tasks.lengths import count_passes, resolve_lengths

    steps_per_epoch = count_steps(encoded["train"], config.train.batch_size)
    passes = count_passes(task_schedule(config, steps_per_epoch), steps_per_epoch)
    return resolve_lengths(config, encoded, passes, jax.default_backend(), jax.device_count())


def _details(data: _Data, compilations: int) -> dict[str, float]:
    return {"padding, %": 100 * data.padding, "compilations": compilations}


def ours(config: dict[str, Any]) -> Program:
    """Returns the updates of `gpt-jax finetune` on the batches, from random parameters."""
    device = start_jax()
    import jax

    from gpt_jax.runtime import sharding
    from gpt_jax.runtime.mesh import check_batch, check_model
    from gpt_jax.tasks.head import make_head
    from gpt_jax.train.step import init_state, lower_step

    data = _load(config, "buckets")
    settings = data.config
    mesh, size = sharding.make_mesh(settings.mesh), settings.train.batch_size
    check_batch(mesh.shape, size, settings.train.grad_accum_steps)
    check_model(mesh.shape, settings.model)
    model = make_head(data.task, settings).trainable_model()
    state = init_state(settings, mesh, model)
    rows = sharding.host_rows(mesh, size)
    local = [{name: array[rows] for name, array in batch.items()} for batch in data.batches]
    placed = [sharding.place_batch(mesh, batch, size) for batch in local]
    updates: dict[tuple[int, ...], jax.stages.Compiled] = {}
    for batch in placed:
        shape = batch["tokens"].shape
        if shape not in updates:
            arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batch)
            updates[shape] = lower_step(settings, mesh, total_steps=1_000_000, model=model, batch=arrays).compile()

    def run(count: int) -> None:
        nonlocal state
        for _ in range(count):
            for batch in placed:
                state, _ = updates[batch["tokens"].shape](state, batch)
        jax.block_until_ready(state)

    return Program(run, lambda: _details(data, len(updates)), device, mesh.size)


def peer(config: dict[str, Any], padding: str) -> Program:
    """Returns the updates of a PyTorch model with the same classifier and losses; `padding` is that of `_load`."""
    device = torch_gpt.start_torch()
    import torch
    from torch.nn import functional as F

    data = _load(config, padding)
    settings, model, task = data.config, data.config.model, data.config.task
    network = torch_gpt.plain_gpt(model)
    choices = data.task.kind == "multiple_choice"
    network.classifier = torch.nn.Linear(model.embed_dim, 1 if choices else len(data.task.labels))
    names = ("tokens", "targets", "loss_weights", "extract", "labels")

    def loss(network: Any, tokens: Any, targets: Any, weights: Any, extract: Any, labels: Any) -> Any:
        hidden = network.hidden(tokens.flatten(0, 1))
        extracted = hidden[torch.arange(len(hidden), device=device), extract.flatten()].view(*extract.shape, -1)
        if not choices:
            extracted = extracted.sum(1)
        scores = network.classifier(F.dropout(extracted, task.classifier_dropout))
        value = -(labels * torch.log_softmax(scores.view(labels.shape), -1)).sum() / len(labels)
        if task.lm_weight:
            losses = F.cross_entropy(network.logits(hidden).flatten(0, 1), targets.flatten(), reduction="none")
            value = value + task.lm_weight * (losses * weights.flatten()).sum() / weights.sum()
        return value

    step = torch_gpt.training_step(network, loss, settings.optim, device, compiled=False)
    placed = [[torch_gpt.to_torch(batch[name], device) for name in names] for batch in data.batches]

    def run(count: int) -> None:
        for _ in range(count):
            for batch in placed:
                step(*batch)
        torch_gpt.synchronize(device)

    return Program(run, lambda: _details(data, 0), torch_gpt.device_kind(device))
