"""Benchmark `matmul`: the product of 1,024 tokens with the matrix of GPT-1's feed-forward layer, in float32.

The rate is what a training step's FLOP/s can be compared with. `train --products` measures all products of a step.
"""

from gpt_jax.bench import torch_gpt
from gpt_jax.bench.comparison import Comparison, Request
from gpt_jax.bench.program import Program, ProgramSpec, start_jax

PEERS = ("torch",)
ROWS, INNER, COLUMNS = 1024, 768, 3072


def comparisons(request: Request) -> list[Comparison]:
    """Returns the only comparison."""
    programs = {"gpt_jax": ProgramSpec(f"{__name__}:ours", {})}
    programs |= {peer: ProgramSpec(f"{__name__}:peer", {}) for peer in request.peers}
    return [
        Comparison(f"matmul: {ROWS} x {INNER} x {COLUMNS}", "", 0, programs, tuple(request.peers), 2.0 * ROWS * INNER * COLUMNS)
    ]


def ours() -> Program:
    """Returns JAX's product."""
    device = start_jax()
    import jax
    import jax.numpy as jnp

    left, right = jnp.ones((ROWS, INNER)), jnp.ones((INNER, COLUMNS))
    product = jax.jit(jnp.matmul)

    def run(count: int) -> None:
        for _ in range(count):
            jax.block_until_ready(product(left, right))

    return Program(run, device=device)


def peer() -> Program:
    """Returns PyTorch's product."""
    device = torch_gpt.start_torch()
    import torch

    left, right = torch.ones(ROWS, INNER, device=device), torch.ones(INNER, COLUMNS, device=device)

    def run(count: int) -> None:
        for _ in range(count):
            torch.matmul(left, right)
        torch_gpt.synchronize(device)

    return Program(run, device=torch_gpt.device_kind(device))
