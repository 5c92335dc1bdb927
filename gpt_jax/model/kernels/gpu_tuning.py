"""Block sizes of the GPU attention kernels, and the options with which Triton compiles them."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl


class TuningConfig(NamedTuple):
    """The block sizes and the compiler options of one kernel. They affect speed, not results."""

    block_q: int
    """Number of queries in a tile."""
    block_kv: int
    """Number of keys in a tile."""
    num_warps: int
    num_stages: int
    """Number of tiles whose inputs are in shared memory at the same time."""


class Tuning(NamedTuple):
    """The tuning of each kernel."""

    forward: TuningConfig
    query_gradients: TuningConfig
    key_value_gradients: TuningConfig


def choose_tuning(time: int, dim: int, dtype: Any) -> Tuning:
    """Returns the tuning for a sequence length, a head size and a compute dtype.

    We chose it from the code that Triton 3.9 generates for compute capability 9.0, without running the kernels. Hardly any
    register is spilled, at least eight warps fit on a multiprocessor, and a program needs at most 97 KiB of shared memory, which
    every GPU has since capability 8.0. Among the block sizes that meet these conditions, we took those with few instructions per
    score. Exact float32 products do not use tensor cores, and their blocks are smaller.
    """
    if dtype == jnp.float32:
        tuning = Tuning(*3 * [TuningConfig(32, 32, 4 if dim <= 64 else 8, 2)])
    elif dim <= 64:
        tuning = Tuning(TuningConfig(128, 64, 4, 3), TuningConfig(64, 64, 4, 3), TuningConfig(64, 64, 4, 3))
    else:
        tuning = Tuning(TuningConfig(128, 64, 8, 2), TuningConfig(64, 64, 4, 2), TuningConfig(64, 64, 4, 2))
    # Dropout masks need a multiple of 16 queries, and tensor cores need at least 16 rows and columns.
    largest = max(16, pl.next_power_of_2(time))

    def shorten(config: TuningConfig) -> TuningConfig:
        return config._replace(block_q=min(config.block_q, largest), block_kv=min(config.block_kv, largest))

    return Tuning(*map(shorten, tuning))
