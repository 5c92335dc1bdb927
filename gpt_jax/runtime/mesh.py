"""The shape of the device mesh, and the mapping from logical to mesh axes. Launchers use this module, so it does not need JAX.

Model code names the meaning of each array axis ("batch", "embed", "heads", ...); only `RULES` specifies which mesh axes split it.
The mesh always has the same four axes, and unused ones have size 1, so the same program runs on a laptop and on a pod.
"""

import dataclasses
import math
from collections.abc import Mapping

from gpt_jax.config import MeshConfig, ModelConfig
from gpt_jax.errors import require
from gpt_jax.runtime.accelerators import Accelerator

AXES = ("slice", "data", "fsdp", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("slice", "data", "fsdp"),  # examples
    "embed": ("fsdp",),  # a parameter's residual-stream dimension: stored in shards and gathered where it is used
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}


def resolve_mesh(config: MeshConfig, num_devices: int, where: str = "") -> dict[str, int]:
    """Returns the size of each mesh axis, with -1 replaced by the number of remaining devices.

    Args:
      config: the requested sizes.
      num_devices: number of devices in the whole run.
      where: the hardware of the devices, for messages (" on 2 x v5e-16").

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    sizes = dataclasses.asdict(config)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    devices = f"{num_devices} device{'s' * (num_devices != 1)}{where}"
    for axis, size in sizes.items():
        if size == -1:
            require(num_devices % fixed == 0, "mesh", f"the other axes multiply to {fixed}, which does not divide {devices}")
            sizes[axis] = num_devices // fixed
    shape = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    hint = "set one axis to -1 to use all remaining devices"
    require(
        math.prod(sizes.values()) == num_devices, "mesh", f"{shape} requires {fixed} devices, but the run has {devices}; {hint}"
    )
    return sizes


def mesh_sizes(mesh: MeshConfig, accelerator: Accelerator, slices: int) -> dict[str, int]:
    """Returns the size of each mesh axis on `slices` slices or nodes.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or the slice axis does not match `slices`.
    """
    where = f" on {f'{slices} x ' if slices > 1 else ''}{accelerator.name}"
    sizes = resolve_mesh(mesh, accelerator.devices * slices, where)
    # This keeps the other axes on the fast interconnect inside a slice or node. CPUs do not have such an interconnect.
    if accelerator.kind != "cpu" and slices > 1:
        parts = "TPU slices" if accelerator.kind == "tpu" else "nodes"
        require(sizes["slice"] == slices, "mesh.slice", f"there are {slices} {parts}, so set --mesh.slice {slices}")
    return sizes


def num_shards(sizes: Mapping[str, int], axis: str) -> int:
    """Returns the number of parts that a mesh of these sizes splits a logical axis into."""
    return math.prod(sizes[name] for name in RULES[axis])


def check_batch(sizes: Mapping[str, int], batch_size: int, grad_accum_steps: int) -> None:
    """Checks that a batch and its micro-batches split evenly over the mesh.

    Raises:
      UserError: the batch does not split evenly; the message suggests batch sizes that do.
    """
    shards = num_shards(sizes, "batch")
    unit = shards * grad_accum_steps
    lower, upper = batch_size // unit * unit, -(-batch_size // unit) * unit
    parts = f" in {grad_accum_steps} micro-batches" if grad_accum_steps > 1 else ""
    hint = f"{lower} or {upper} would" if lower else f"{upper} would"
    problem = f"{batch_size} does not split evenly over slice x data x fsdp = {shards}{parts}"
    require(batch_size % unit == 0, "train.batch_size", f"{problem}; {hint}")


def check_model(sizes: Mapping[str, int], model: ModelConfig) -> None:
    """Checks that the model's dimensions split evenly over the mesh.

    Raises:
      UserError: a dimension does not split evenly; the message suggests mesh sizes that work.
    """
    axes = {"lstm_units": "mlp"} if model.kind == "lstm" else {"num_heads": "heads", "mlp_dim": "mlp"}
    for name, axis in {"embed_dim": "embed", "vocab_size": "vocab", **axes}.items():
        dimension = model.padded_vocab_size if name == "vocab_size" else getattr(model, name)
        size = num_shards(sizes, axis)
        divisors = [str(k) for k in range(1, size) if dimension % k == 0]
        problem = f"{size} does not divide model.{name.replace('_', '-')} {dimension}"
        require(dimension % size == 0, f"mesh.{RULES[axis][0]}", f"{problem}; {', '.join(divisors[-3:])} would")
