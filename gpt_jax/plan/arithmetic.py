"""Estimates that need no compiler: FLOPs, memory from the shapes of arrays, and the shortest possible time of a step."""

import math
from collections.abc import Mapping

from gpt_jax.config import PretrainConfig
from gpt_jax.runtime.accelerators import Accelerator
from gpt_jax.runtime.chips import CHIPS, GIB
from gpt_jax.runtime.mesh import num_shards
from gpt_jax.train.choices import choose_on
from gpt_jax.train.logging import flops_per_token
from gpt_jax.train.memory_estimate import step_bytes


def describe_arithmetic(name: str, config: PretrainConfig, accelerator: Accelerator, sizes: Mapping[str, int]) -> str:
    """Returns the estimates as text.

    Raises:
      UserError: the batch does not fit into the memory of the devices; the message says how many sequences fit.
    """
    chip = CHIPS[accelerator.device_kind]
    config = choose_on(config, sizes, "tpu", accelerator.device_kind)
    remat = config.model.remat
    total = step_bytes(config, sizes, "tpu", remat)
    flops = flops_per_token(config.model) * config.train.batch_size * config.model.context_length
    devices = math.prod(sizes.values())
    shortest = flops / (chip.peak_flops["bfloat16"] * devices)
    where = f"{sizes['slice']} x {accelerator.name}" if sizes["slice"] > 1 else accelerator.name
    mesh = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "one device"
    return "\n".join(
        [
            f"{name}: {config.model.num_parameters:,} parameters on {where} ({accelerator.device_kind}), mesh {mesh}",
            f"{config.train.batch_size // num_shards(sizes, 'batch'):,} sequences a device; remat {remat}",
            f"memory of a device by the arithmetic of shapes: {total / GIB:.2f} of {chip.memory / GIB:.2f} GiB",
            f"{flops:.4g} FLOPs a step, which take at least {shortest * 1e3:.1f} ms",
            "libtpu is not installed, so nothing was compiled; for cycles, collectives and time: pip install 'gpt_jax[tpu]'",
        ]
    )
