"""The device mesh, the table that maps logical axes to it, and what the model may ask of it.

Model code names what an axis of an array means ("batch", "embed", "heads", ...); `RULES` alone says which mesh axes split it.
The mesh has always the same four axes, of size 1 where unused, so that one program serves a laptop and a pod.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from gpt_jax.config import MeshConfig, ModelConfig, require

AXES = ("slice", "data", "fsdp", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("slice", "data", "fsdp"),  # examples
    "embed": ("fsdp",),  # a parameter's residual-stream dimension: storage is shared, the value is gathered where it is used
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the four-axis mesh over `devices` (all of this run's, by default).

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    shape = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "1"
    free = [axis for axis, size in sizes.items() if size == -1]
    if free:
        require(len(devices) % fixed == 0, "mesh", f"{shape}: {fixed} does not divide the {len(devices)} devices")
        sizes[free[0]] = len(devices) // fixed
    require(
        math.prod(sizes.values()) == len(devices),
        "mesh",
        f"{shape} asks for {fixed} devices and there {'is' if len(devices) == 1 else 'are'} {len(devices)}; "
        "set one axis to -1 to take all that are left",
    )
    inner = (1, *list(sizes.values())[1:])
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        require(sizes["slice"] == slices, "mesh.slice", f"the devices are on {slices} slices, so it must be {slices}")
        outer = (sizes["slice"], 1, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices=devices)
    elif devices[0].platform == "tpu":
        grid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices=devices)
    else:
        grid = np.asarray(devices).reshape(tuple(sizes.values()))
    # Explicit axes, jax.make_mesh's default, would make every gather and einsum of the model name its output sharding.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check(mesh: Mesh, model: ModelConfig, batch_size: int, micro_batches: int) -> None:
    """Checks that the model and the batch divide over the mesh.

    Raises:
      UserError: they do not; the message names sizes that would.
    """
    shards = axis_size(mesh, "batch") * micro_batches
    lower, upper = batch_size // shards * shards, -(-batch_size // shards) * shards
    require(
        batch_size % shards == 0,
        "train.batch_size",
        f"{batch_size} does not divide over slice x data x fsdp = {axis_size(mesh, 'batch')}"
        + (f" in {micro_batches} micro-batches" if micro_batches > 1 else "")
        + f"; {f'{lower} or ' if lower else ''}{upper} would",
    )
    widths = [("embed_dim", model.embed_dim, "embed"), ("vocab_size", model.padded_vocab_size, "vocab")]
    if model.kind == "lstm":
        widths += [("lstm_units", model.lstm_units, "mlp")]
    else:
        widths += [("num_heads", model.num_heads, "heads"), ("mlp_dim", model.mlp_dim, "mlp")]
    for name, dimension, axis in widths:
        size = axis_size(mesh, axis)
        fitting = [k for k in range(1, size) if dimension % k == 0]
        require(
            dimension % size == 0,
            f"mesh.{RULES[axis][0]}",
            f"{size} does not divide model.{name.replace('_', '-')} {dimension}; {', '.join(map(str, fitting[-3:]))} would",
        )


def axis_size(mesh: Mesh | AbstractMesh, axis: str) -> int:
    """Number of parts that the mesh splits a logical axis into."""
    return math.prod(mesh.shape[name] for name in RULES[axis])


def spec(names: Sequence[str | None]) -> PartitionSpec:
    """The partition of an array whose axes have these logical names (None: whole on every device)."""
    return PartitionSpec(*(RULES.get(name) if name else None for name in names))


def named(mesh: Mesh, names: Sequence[str | None]) -> NamedSharding:
    """The same, tied to a mesh."""
    return NamedSharding(mesh, spec(names))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pins the sharding of an intermediate array by its logical axes; nothing happens where no mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names))


def per_shard(function: Callable[..., Any], in_names: Sequence[Any], out_names: Any) -> Callable[..., Any]:
    """Runs `function` on each device's own piece of its arguments (shard_map); on whole arrays where no mesh is set.

    Args:
      function: sees local arrays; it combines them over devices with `all_sum`, `all_max` and `shard_index`.
      in_names: logical axis names of each argument.
      out_names: logical axis names of the result, or a tuple of them for a tuple of results.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function
    is_names = lambda x: isinstance(x, tuple) and all(name is None or isinstance(name, str) for name in x)  # noqa: E731
    specs = jax.tree.map(spec, (tuple(in_names), out_names), is_leaf=is_names)
    # Replication of the results is promised by the all_sum calls, and differentiation never goes through this function.
    return jax.shard_map(function, in_specs=specs[0], out_specs=specs[1], check_vma=False)


def all_sum(x: jax.Array, axis: str) -> jax.Array:
    """Inside `per_shard`: the sum over the devices that split a logical axis."""
    return x if _unsplit(axis) else jax.lax.psum(x, RULES[axis])


def all_max(x: jax.Array, axis: str) -> jax.Array:
    """Inside `per_shard`: the maximum over the devices that split a logical axis."""
    return x if _unsplit(axis) else jax.lax.pmax(x, RULES[axis])


def shard_index(axis: str) -> jax.Array | int:
    """Inside `per_shard`: which part of a logical axis this device holds."""
    return 0 if _unsplit(axis) else jax.lax.axis_index(RULES[axis])


def _unsplit(axis: str) -> bool:
    """Whether one device holds all of a logical axis. Not every compiler removes a collective of a device with itself."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or axis_size(mesh, axis) == 1


# -- batches ----------------------------------------------------------------------------------------------------------------


def host_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """int64 [n]: the rows of the global batch that this process's devices need, ascending."""
    slices = named(mesh, ("batch",)).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices]))


def place_batch(mesh: Mesh, batch: dict[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
    """Puts this host's rows (`host_rows` of them) of a global batch onto its devices, split along the first axis."""
    rows = host_rows(mesh, batch_size)

    def place(local: np.ndarray) -> jax.Array:
        sharding = named(mesh, ("batch", *[None] * (local.ndim - 1)))

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            wanted = np.arange(batch_size)[index[0]]
            first = int(np.searchsorted(rows, wanted[0]))
            return local[first : first + len(wanted)]  # A device's rows are consecutive, so they are here too.

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, shard)

    return {name: place(array) for name, array in batch.items()}
