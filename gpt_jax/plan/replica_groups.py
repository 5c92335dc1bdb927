"""Groups of devices between which a collective transfers data: parsed from HLO, and named after mesh axes."""

import collections
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

Partition = set[frozenset[int]]
"""Groups of devices, which are numbered in the order of the mesh."""

IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
"""Numbers 0, 1, 2, ... in an array of these dimensions, and optionally a new order of its axes."""
AXIS = r"'([^':]+)'?(?::\((\d+)\)(\d+)'?)?"
"""An axis of a mesh, or a part of an axis, such as `'data':(2)4`: 2 is the product of the parts before it, and 4 is its size."""


class Groups(NamedTuple):
    """Devices between which a collective transfers data."""

    axes: str
    """The mesh axes along which the devices of a group differ, joined by "+"; "4 groups of 2" if no axes give these groups."""
    devices: int
    """Devices in one group; 2 for a collective-permute, in which each device sends to one other."""


def read_groups(attributes: str, mesh: Mapping[str, int]) -> Groups:
    """Returns the groups of a collective.

    Args:
      attributes: the attributes of the instruction, as written in HLO.
      mesh: sizes of the mesh's axes by name. Devices are numbered in the order of the axes, and the last axis varies
        fastest.

    Raises:
      ValueError: the attributes do not contain groups in a known notation.
    """
    devices = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes):
        moves = [(int(source), int(target)) for source, target in re.findall(r"(\d+),(\d+)", pairs[1])]
        return Groups(_axes_of_moves(moves, devices, list(mesh)), 2)
    groups = _parse_groups(attributes, devices)
    size = max(map(len, groups))
    used = [axis for axis, (_, length) in enumerate(mesh.items()) if length > 1]
    for count in range(1, len(used) + 1):
        for axes in itertools.combinations(used, count):
            if groups == _partition(devices, axes):
                return Groups("+".join(list(mesh)[axis] for axis in axes), size)
    return Groups(f"{len(groups)} groups of {size}", size)


def _parse_groups(attributes: str, devices: np.ndarray) -> Partition:
    """Returns the groups that the attributes name in any of the notations of HLO."""
    if named := re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({IOTA}\))? \{{([^}}]*)\}}", attributes):
        return _parse_axes(*named.groups())
    if tiled := re.search(rf"replica_groups=\[(\d+),(\d+)\]<={IOTA}", attributes):
        return {frozenset(group) for group in _iota(tiled[3], tiled[4]).reshape(int(tiled[1]), int(tiled[2])).tolist()}
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]+\},?)*)\}", attributes):
        groups = {frozenset(map(int, group.split(","))) for group in re.findall(r"[\d,]*\d", listed[1])}
        return groups or {frozenset(devices.flat)}  # An empty list means one group of all devices.
    raise ValueError(f"replica groups in an unknown notation: {attributes.lstrip(', ')[:100]}")


def _parse_axes(mesh: str, dims: str | None, order: str | None, axes: str) -> Partition:
    """Returns the groups along axes, or parts of axes, of a mesh that HLO names."""
    sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    ranges: dict[str, list[tuple[int, int]]] = collections.defaultdict(list)
    for axis, before, size in re.findall(AXIS, axes):
        first = int(before or 1)
        ranges[axis].append((first, first * int(size or sizes[axis])))
    # Each axis is split where parts of it begin and end: an axis of 8 with the part (2)2 becomes 2 x 2 x 2, and
    # the second of these takes part.
    shape: list[int] = []
    positions: list[int] = []
    for axis, size in sizes.items():
        for start, end in itertools.pairwise(sorted({1, size, *itertools.chain(*ranges[axis])})):
            if any(first <= start and end <= last for first, last in ranges[axis]):
                positions.append(len(shape))
            shape.append(end // start)
    devices = _iota(dims or str(math.prod(sizes.values())), order)
    return _partition(devices.reshape(shape), positions)


def _iota(dims: str, order: str | None) -> np.ndarray:
    """Returns the numbers 0, 1, 2, ... in an array of these dimensions, with its axes in another order."""
    sizes = [int(size) for size in dims.split(",")]
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return numbers.transpose([int(axis) for axis in order.split(",")]) if order else numbers


def _partition(devices: np.ndarray, axes: Sequence[int]) -> Partition:
    """Returns the groups of devices that differ only in their positions along some axes."""
    size = math.prod(devices.shape[axis] for axis in axes)
    moved = np.moveaxis(devices, axes, range(-len(axes), 0))
    return {frozenset(group) for group in moved.reshape(-1, size).tolist()}


def _axes_of_moves(moves: Sequence[tuple[int, int]], devices: np.ndarray, names: Sequence[str]) -> str:
    """Returns the axes along which data moves between devices, joined by "+"."""
    places = {int(device): np.array(place) for place, device in np.ndenumerate(devices)}
    changed = np.any([places[source] != places[target] for source, target in moves], axis=0)
    return "+".join(name for name, change in zip(names, changed, strict=True) if change)
