"""Benchmark `attention`: the implementations of attention, and PyTorch's, on queries, keys and values of one layer."""

import contextlib
import dataclasses
import functools
import subprocess
import sys
from typing import Any

from gpt_jax.bench import torch_gpt
from gpt_jax.bench.comparison import Comparison, Request
from gpt_jax.bench.program import Program, ProgramSpec, start_jax
from gpt_jax.bench.train import read_config
from gpt_jax.config import ModelConfig
from gpt_jax.config.load import config_to_dict
from gpt_jax.errors import UserError

PEERS = ("torch",)
OUTPUT_ERROR = "relative error of the output"
GRADIENT_ERROR = "largest relative error of a gradient"


def implementations(model: ModelConfig) -> list[str]:
    """Returns the names of the implementations of attention that run on this machine's devices and take the model's sizes."""
    from gpt_jax.model.attention import IMPLEMENTATIONS, check_attention
    from gpt_jax.model.transformer import compute_dtype

    platform, names = default_platform(), []
    sizes = model.context_length, model.head_dim, compute_dtype(model, platform), ""
    for name in IMPLEMENTATIONS:
        with contextlib.suppress(UserError):
            check_attention(name, platform, *sizes)
            names.append(name)
    return names


@functools.cache
def default_platform() -> str:
    """Returns the platform of this machine's devices: "cpu", "gpu" or "tpu".

    Another process asks JAX, because a process that has asked holds the devices, and the programs could not use them. It is "cpu"
    if JAX does not start; the first program then reports the reason.
    """
    code = "from gpt_jax.bench.program import start_jax; start_jax(); import jax; print(jax.default_backend())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, errors="replace")
    return (done.stdout.split() or ["cpu"])[-1]


def comparisons(request: Request) -> list[Comparison]:
    """Returns two comparisons for each batch size: the output without dropout, and output and gradients with it."""
    return [
        _comparison(request, size, gradients)
        for size in request.batch_sizes or (request.config.train.batch_size,)
        for gradients in (False, True)
    ]


def _comparison(request: Request, batch_size: int, gradients: bool) -> Comparison:
    config, model = request.config, request.config.model
    train = dataclasses.replace(config.train, batch_size=batch_size)
    settings = {"config": config_to_dict(dataclasses.replace(config, train=train)), "gradients": gradients}
    programs = {name: ProgramSpec(f"{__name__}:ours", {**settings, "implementation": name}) for name in implementations(model)}
    programs |= {peer: ProgramSpec(f"{__name__}:peer", settings) for peer in request.peers}
    shape = f"batch {batch_size} x {model.context_length}, {model.num_heads} heads of {model.head_dim}"
    work = f"output and gradients, dropout {model.attention_dropout:g}" if gradients else "output, no dropout"
    products = 6 if gradients else 2
    flops = products * 2 * batch_size * model.context_length**2 * model.embed_dim
    return Comparison(f"attention, {work}: {shape}", "", 0, programs, tuple(request.peers), flops)


def ours(config: dict[str, Any], implementation: str, gradients: bool) -> Program:
    """Returns a program that computes attention once.

    Its details are the relative L2 distances of its results from those of "plain" in float32, with the same dropout masks; for
    the gradients, it is the largest of the three.
    """
    device = start_jax()
    import jax
    import jax.numpy as jnp

    from gpt_jax.model.attention import attention
    from gpt_jax.model.dropout import Site, mask_stream
    from gpt_jax.model.transformer import compute_dtype

    settings = read_config(config)
    model, batch = settings.model, settings.train.batch_size
    shape = (batch, model.context_length, model.num_heads, model.head_dim)
    *arrays, cotangent = [jax.random.normal(key, shape, compute_dtype(model)) for key in jax.random.split(jax.random.key(0), 4)]

    def compute(implementation: str, precision: str, arrays: list[jax.Array], cotangent: jax.Array) -> tuple[jax.Array, ...]:
        def attend(*arrays: jax.Array) -> jax.Array:
            rate = model.attention_dropout if gradients else 0.0
            rows = jnp.arange(batch)[:, None]
            stream = mask_stream(0, 0, 0, Site.ATTENTION, rows, jnp.arange(model.num_heads)) if rate else None
            return attention(*arrays, stream=stream, rate=rate, implementation=implementation, precision=precision)

        if not gradients:
            return (attend(*arrays),)
        output, backward = jax.vjp(attend, *arrays)
        return output, *backward(cotangent)

    measured = jax.jit(functools.partial(compute, implementation, model.matmul_precision))

    def run(count: int) -> None:
        for _ in range(count):
            jax.block_until_ready(measured(arrays, cotangent))

    def errors() -> dict[str, float]:
        exact = jax.jit(functools.partial(compute, "plain", "highest"))
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), (arrays, cotangent))
        pairs = zip(measured(arrays, cotangent), exact(*wide), strict=True)
        output, *rest = (float(jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs)) for ours, theirs in pairs)
        return {OUTPUT_ERROR: output} | ({GRADIENT_ERROR: max(rest)} if gradients else {})

    return Program(run, errors, device)


def peer(config: dict[str, Any], gradients: bool) -> Program:
    """Returns PyTorch's scaled_dot_product_attention."""
    device = torch_gpt.start_torch()
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    settings = read_config(config)
    model = settings.model
    shape = (settings.train.batch_size, model.num_heads, model.context_length, model.head_dim)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    arrays = [torch.randn(shape, device=device, dtype=dtype, requires_grad=gradients) for _ in range(3)]
    rate = model.attention_dropout if gradients else 0.0

    def run(count: int) -> None:
        for _ in range(count):
            output = scaled_dot_product_attention(*arrays, dropout_p=rate, is_causal=True)
            if gradients:
                torch.autograd.grad(output, arrays, output.detach())
        torch_gpt.synchronize(device)

    return Program(run, device=torch_gpt.device_kind(device))
