"""Benchmark `train`: the whole training step of a pre-training config, on random tokens that are the same for all programs."""

import dataclasses
from typing import Any

import numpy as np

from gpt_jax.bench.comparison import Comparison, Request
from gpt_jax.bench.program import Program, ProgramSpec, start_jax
from gpt_jax.config import ModelConfig, PretrainConfig
from gpt_jax.config.load import config_from_dict, config_to_dict
from gpt_jax.errors import require

PRODUCTS = "products alone"
PEERS = ("transformers", "transformers-compiled", "torch", "torch-compiled")


def comparisons(request: Request) -> list[Comparison]:
    """Returns a comparison for each batch size.

    Raises:
      UserError: a peer cannot run the config.
    """
    config, model = request.config, request.config.model
    if any(peer.startswith("transformers") for peer in request.peers):
        inner = f"transformers' model has an inner width of 4 x {model.embed_dim}, not {model.mlp_dim}; leave it out"
        require(model.mlp_dim == 4 * model.embed_dim, "against", inner)
    trains = (dataclasses.replace(config.train, batch_size=size) for size in request.batch_sizes or (config.train.batch_size,))
    return [_comparison(dataclasses.replace(config, train=train), request) for train in trains]


def _comparison(config: PretrainConfig, request: Request) -> Comparison:
    from gpt_jax.train.flops import flops_per_token

    model, size, settings = config.model, config.train.batch_size, {"config": config_to_dict(config)}
    programs = {"gpt_jax": ProgramSpec(f"{__name__}:ours", settings)}
    for peer in request.peers:
        kind, _, suffix = peer.partition("-")
        programs[peer] = ProgramSpec(f"{__name__}:peer", {**settings, "kind": kind, "compiled": suffix == "compiled"})
    if request.products:
        programs[PRODUCTS] = ProgramSpec("gpt_jax.bench.products:step_products", settings)
    rates = dict.fromkeys((model.embed_dropout, model.attention_dropout, model.residual_dropout))
    shape = f"{model.num_layers} x {model.embed_dim}, batch {size} x {model.context_length}"
    title = f"train {request.config_name}: {shape}, dropout {'/'.join(f'{rate:g}' for rate in rates)}"
    tokens = size * model.context_length
    part = PRODUCTS if request.products else ""
    return Comparison(title, "tokens", tokens, programs, tuple(request.peers), tokens * flops_per_token(model), part)


def random_batch(model: ModelConfig, batch_size: int) -> dict[str, np.ndarray]:
    """Returns a pre-training batch of random tokens, as `Windows.batch_at` would."""
    text = np.random.default_rng(0).integers(model.vocab_size, size=(batch_size, model.context_length + 1), dtype=np.int32)
    weights = np.ones((batch_size, model.context_length), np.float32)
    rows = np.arange(batch_size, dtype=np.int32)
    return {"tokens": text[:, :-1], "targets": text[:, 1:], "loss_weights": weights, "example_id": rows}


def read_config(values: dict[str, Any]) -> PretrainConfig:
    """Returns the config that `config_to_dict` turned into JSON."""
    config = config_from_dict(values)
    assert isinstance(config, PretrainConfig)
    return config


def ours(config: dict[str, Any]) -> Program:
    """Returns the step that `gpt-jax pretrain` runs, with its guard and the norm of the gradient."""
    device = start_jax()
    import jax

    from gpt_jax.runtime import sharding
    from gpt_jax.runtime.mesh import check_batch, check_model
    from gpt_jax.train.step import init_state, lower_step

    settings = read_config(config)
    mesh, size = sharding.make_mesh(settings.mesh), settings.train.batch_size
    check_batch(mesh.shape, size, settings.train.grad_accum_steps)
    check_model(mesh.shape, settings.model)
    update = lower_step(settings, mesh, total_steps=1_000_000).compile()
    state = init_state(settings, mesh)
    rows = sharding.host_rows(mesh, size)
    local = {name: array[rows] for name, array in random_batch(settings.model, size).items()}
    batch = sharding.place_batch(mesh, local, size)

    def run(count: int) -> None:
        nonlocal state
        for _ in range(count):
            state, _ = update(state, batch)
        jax.block_until_ready(state)

    return Program(run, device=device, num_devices=mesh.size)


def peer(config: dict[str, Any], kind: str, compiled: bool) -> Program:
    """Returns the step of a PyTorch model.

    Args:
      kind: "torch" for `torch_gpt.plain_gpt`, or "transformers".
    """
    from gpt_jax.bench import torch_gpt

    device = torch_gpt.start_torch()
    settings = read_config(config)
    batch = random_batch(settings.model, settings.train.batch_size)
    tokens, targets = (torch_gpt.to_torch(batch[name], device) for name in ("tokens", "targets"))
    module = torch_gpt.plain_gpt(settings.model) if kind == "torch" else torch_gpt.transformers_gpt(settings.model)

    def loss(model: Any, tokens: Any, targets: Any) -> Any:
        from torch.nn import functional as F

        logits = model(tokens) if kind == "torch" else model(tokens).logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    step = torch_gpt.training_step(module, loss, settings.optim, device, compiled)

    def run(count: int) -> None:
        for _ in range(count):
            step(tokens, targets)
        torch_gpt.synchronize(device)

    return Program(run, device=torch_gpt.device_kind(device))
