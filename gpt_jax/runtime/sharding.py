"""The device mesh, shardings by logical axis names (`mesh.RULES`), and per-shard computations."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gpt_jax.config import MeshConfig
from gpt_jax.errors import require
from gpt_jax.runtime.mesh import AXES, RULES, resolve_mesh


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the four-axis mesh over `devices` (by default all devices of the run).

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = tuple(resolve_mesh(config, len(devices)).values())
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        require(shape[0] == slices, "mesh.slice", f"the devices are on {slices} slices, so it must be {slices}")
        within, between = (1, *shape[1:]), (slices, 1, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(within, between, devices=devices, allow_split_physical_axes=True)
    elif devices[0].platform == "tpu":
        # An axis of 8 devices may be half of a torus axis of 16.
        grid = mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
    else:
        grid = np.asarray(devices).reshape(shape)
    # With explicit axes, the default of jax.make_mesh, every gather and einsum in the model would have to specify its sharding.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec(names: Sequence[str | None]) -> PartitionSpec:
    """Returns the partition spec of an array whose axes have these logical names (None: not split)."""
    return PartitionSpec(*(RULES.get(name) if name else None for name in names))


def named_sharding(mesh: Mesh, names: Sequence[str | None]) -> NamedSharding:
    """Returns the sharding over a mesh of an array whose axes have these logical names (None: not split)."""
    return NamedSharding(mesh, spec(names))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains the sharding of an intermediate array by its logical axes; returns it unchanged if no mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names))


def per_shard(function: Callable[..., Any], in_names: Sequence[Any], out_names: Any) -> Callable[..., Any]:
    """Maps a function over the shards of its arguments (shard_map). If no mesh is set, each array is a single shard.

    Args:
      function: takes one device's shards and combines values across devices with `all_sum`, `all_max` and `shard_index`.
      in_names: logical axis names of each argument.
      out_names: logical axis names of the result, or a tuple of them for a tuple of results.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function
    is_names = lambda x: isinstance(x, tuple) and all(name is None or isinstance(name, str) for name in x)  # noqa: E731
    specs = jax.tree.map(spec, (tuple(in_names), out_names), is_leaf=is_names)
    # No check is needed: `all_sum` makes results equal on all devices where required, and this is never differentiated.
    return jax.shard_map(function, in_specs=specs[0], out_specs=specs[1], check_vma=False)


def all_sum(x: jax.Array, axis: str) -> jax.Array:
    """Returns, inside `per_shard`, the sum over the devices that split a logical axis."""
    return jax.lax.psum(x, RULES[axis]) if is_split(axis) else x


def all_max(x: jax.Array, axis: str) -> jax.Array:
    """Returns, inside `per_shard`, the maximum over the devices that split a logical axis."""
    return jax.lax.pmax(x, RULES[axis]) if is_split(axis) else x


def shard_index(axis: str) -> jax.Array | int:
    """Returns, inside `per_shard`, the index of this device's shard of a logical axis."""
    return jax.lax.axis_index(RULES[axis]) if is_split(axis) else 0


def all_gather(x: jax.Array, name: str, axis: int) -> jax.Array:
    """Returns, inside `per_shard`, the whole array along an axis that the mesh splits under this logical name."""
    return jax.lax.all_gather(x, RULES[name], axis=axis, tiled=True) if is_split(name) else x


def sum_and_split(x: jax.Array, summed: str, name: str, axis: int) -> jax.Array:
    """Returns, inside `per_shard`, this device's shard along `axis` of the sum over the devices that split the axis `summed`.

    The mesh axes that split the logical axis `name` must be among those of `summed`.
    """
    others = tuple(mesh_axis for mesh_axis in RULES[summed] if mesh_axis not in RULES[name])
    if is_split(name):
        # TPUs would sum and send the whole array if the shards were not along the first axis, each in one piece of memory.
        shards = x.reshape(*x.shape[:axis], shard_count(name), -1, *x.shape[axis + 1 :])
        x = jax.lax.psum_scatter(jnp.moveaxis(shards, axis, 0), RULES[name])
    return jax.lax.psum(x, others) if _size(others) > 1 else x


def shard_count(axis: str) -> int:
    """Returns the number of shards into which the mesh that is set splits a logical axis."""
    return _size(RULES[axis])


def is_split(axis: str) -> bool:
    """Returns whether the mesh that is set splits a logical axis. Not every compiler removes a collective over one device."""
    return shard_count(axis) > 1


def _size(mesh_axes: Sequence[str]) -> int:
    """Returns the number of devices along some axes of the mesh that is set, 1 if none is."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(name, 1) for name in mesh_axes)


# -- batches ----------------------------------------------------------------------------------------------------------------


def host_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Returns the rows of the global batch that this process's devices need, ascending, int64 [n]."""
    slices = named_sharding(mesh, ("batch",)).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices]))


def place_batch(mesh: Mesh, batch: dict[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
    """Places this host's rows of a global batch (those of `host_rows`) on its devices, split along the first axis."""
    rows, sharding = host_rows(mesh, batch_size), named_sharding(mesh, ("batch",))

    def place(local: np.ndarray) -> jax.Array:
        def shard(index: Any) -> np.ndarray:
            # A device's rows are consecutive in the global batch and therefore also in `local`.
            first, end = np.searchsorted(rows, index[0].indices(batch_size)[:2])
            return local[first:end]

        # Unlike jax.make_array_from_process_local_data, this allows hosts' rows to overlap partially.
        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, shard)

    return {name: place(array) for name, array in batch.items()}


def abstract_batch(
    mesh: Mesh, spec: Mapping[str, tuple[tuple[int | None, ...], np.dtype]], length: int | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes, dtypes and shardings of the arrays that `place_batch` returns for a batch of a source.

    Args:
      spec: the source's `element_spec` for the global batch.
      length: the size of the axes that the spec leaves open.
    """
    sharding = named_sharding(mesh, ("batch",))
    return {
        name: jax.ShapeDtypeStruct(tuple(length if size is None else size for size in shape), dtype, sharding=sharding)
        for name, (shape, dtype) in spec.items()
    }
