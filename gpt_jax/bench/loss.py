"""Benchmark `loss`: the output layer and the cross-entropy of a batch, with the gradients of hidden states and embeddings."""

import dataclasses
from typing import Any

from gpt_jax.bench import torch_gpt
from gpt_jax.bench.comparison import Comparison, Request
from gpt_jax.bench.program import Program, ProgramSpec, start_jax
from gpt_jax.bench.train import random_batch, read_config
from gpt_jax.config.load import config_to_dict

PEERS = ("torch", "torch-compiled")


def comparisons(request: Request) -> list[Comparison]:
    """Returns a comparison for each batch size."""
    return [_comparison(request, size) for size in request.batch_sizes or (request.config.train.batch_size,)]


def _comparison(request: Request, batch_size: int) -> Comparison:
    config, model = request.config, request.config.model
    train = dataclasses.replace(config.train, batch_size=batch_size)
    settings = {"config": config_to_dict(dataclasses.replace(config, train=train))}
    programs = {"gpt_jax": ProgramSpec(f"{__name__}:ours", settings)}
    for peer in request.peers:
        programs[peer] = ProgramSpec(f"{__name__}:peer", {**settings, "compiled": peer.endswith("-compiled")})
    tokens = batch_size * model.context_length
    title = f"loss and gradients: batch {batch_size} x {model.context_length}, {model.embed_dim} x {model.vocab_size:,}"
    return Comparison(title, "tokens", tokens, programs, tuple(request.peers), 6.0 * tokens * model.embed_dim * model.vocab_size)


def ours(config: dict[str, Any]) -> Program:
    """Returns `loss.cross_entropy` with its gradients, in the chunks that a training step uses."""
    device = start_jax()
    import jax
    import jax.numpy as jnp

    from gpt_jax.model.loss import cross_entropy, normalize
    from gpt_jax.model.transformer import compute_dtype
    from gpt_jax.train.choices import choose

    settings = read_config(config)
    model = choose(settings.model, jax.default_backend())
    batch = normalize({name: jnp.asarray(array) for name, array in random_batch(model, settings.train.batch_size).items()})
    hidden = jax.random.normal(jax.random.key(0), (*batch["tokens"].shape, model.embed_dim), compute_dtype(model))
    table = model.init_stddev * jax.random.normal(jax.random.key(1), (model.padded_vocab_size, model.embed_dim))

    @jax.jit
    def compute(hidden: jax.Array, table: jax.Array) -> Any:
        def loss(hidden: jax.Array, table: jax.Array) -> jax.Array:
            return cross_entropy(hidden, table, batch["targets"], batch["loss_weights"], model.vocab_size, model.loss_chunk)

        with jax.default_matmul_precision(model.matmul_precision):
            return jax.value_and_grad(loss, argnums=(0, 1))(hidden, table)

    def run(count: int) -> None:
        for _ in range(count):
            jax.block_until_ready(compute(hidden, table))

    return Program(run, device=device)


def peer(config: dict[str, Any], compiled: bool) -> Program:
    """Returns PyTorch's linear layer and cross_entropy."""
    device = torch_gpt.start_torch()
    import torch
    from torch.nn import functional as F

    settings = read_config(config)
    model, size = settings.model, settings.train.batch_size
    targets = torch_gpt.to_torch(random_batch(model, size)["targets"], device).flatten()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden = torch.randn(len(targets), model.embed_dim, device=device, dtype=dtype, requires_grad=True)
    table = (model.init_stddev * torch.randn(model.vocab_size, model.embed_dim, device=device, dtype=dtype)).requires_grad_()

    def forward(hidden: Any, table: Any) -> Any:
        return F.cross_entropy(F.linear(hidden, table).float(), targets)

    loss = torch.compile(forward) if compiled else forward

    def run(count: int) -> None:
        for _ in range(count):
            torch.autograd.grad(loss(hidden, table), (hidden, table))
        torch_gpt.synchronize(device)

    return Program(run, device=torch_gpt.device_kind(device))
