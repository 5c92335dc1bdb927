"""A model of the time that collectives take: their bytes divided by the bandwidth of the links that they use.

The chips of a slice form a torus, with a link to each neighbor. Along an axis that is closed into a ring, a collective sends in
both directions at once. Along an open axis, the chips at the ends receive from one side only. A collective over several axes uses
the links of all of them. If the devices of several groups alternate along an axis, the groups share its links. With B bytes on
each device after a gather or before a scatter, n devices, and W bytes/s into a device, the times are

    all-gather, reduce-scatter    B (n - 1) / n / W
    all-reduce                    twice as long, because it consists of a reduce-scatter and an all-gather
    all-to-all                    B n / (4 W) along the slowest axis, because the average path is a quarter of a ring
    collective-permute            B over the bandwidth of one link in one direction

Slices exchange data over the data center network, which connects each slice to all others, at `Chip.slice_bandwidth`. If this
bandwidth is not published, the transfers take no time. Latencies are not modeled. The bandwidths are those of Google's
documentation (runtime/chips.py). According to it, an axis of a two-dimensional torus is closed if it has 16 chips, and all axes
of a three-dimensional torus are closed if the slice consists of whole cubes of 4 x 4 x 4 chips.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from gpt_jax.plan.collectives import SLICE, Collective
from gpt_jax.runtime.chips import CHIPS


class Links:
    """The links between the devices of a mesh, which need not be attached."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh, self._chip = mesh, CHIPS[mesh.devices.flat[0].device_kind]
        coordinates = np.array([device.coords for device in mesh.devices.flat])
        self._extents = coordinates.max(axis=0) + 1
        self.link = self._chip.link_bandwidth / (4 * self._chip.torus)
        """Bandwidth of one link in one direction, in bytes/s."""

    def seconds(self, collective: Collective) -> float:
        """Returns the time of one execution of a collective in seconds, if nothing delays it."""
        axes = [axis for axis in collective.axes.split("+") if axis in self._mesh.shape]
        if collective.kind == "collective-permute":
            return collective.bytes / (self.bandwidth([SLICE]) if SLICE in axes else self.link)
        if SLICE in axes and len(axes) > 1:  # First within the slices, then each device sends its share to the other slices.
            inside = [axis for axis in axes if axis != SLICE]
            devices = math.prod(self._mesh.shape[axis] for axis in inside)
            between = collective._replace(axes=SLICE, devices=self._mesh.shape[SLICE], bytes=collective.bytes // devices)
            return self.seconds(collective._replace(axes="+".join(inside), devices=devices)) + self.seconds(between)
        lines = self._lines(axes)
        if collective.kind in ("all-to-all", "ragged-all-to-all") and lines:
            return max(collective.bytes * length / (4 * count * self.link) for length, count in lines)
        size, devices = collective.bytes / self.bandwidth(axes), max(collective.devices, 1)
        return size * (devices - 1) / devices * (2 if collective.kind == "all-reduce" else 1)

    def bandwidth(self, axes: Sequence[str]) -> float:
        """Returns the bytes that a device can receive in a second from the other devices along mesh axes.

        Empty `axes` mean that the axes are unknown; the result is then the bandwidth of one link.
        """
        if list(axes) == [SLICE]:
            return self._chip.slice_bandwidth or math.inf
        lines = self._lines(axes)
        if axes and not lines:  # the two devices of one chip
            return self._chip.link_bandwidth / 2
        return (sum(count for _, count in lines) or 1) * self.link

    def _lines(self, axes: Sequence[str]) -> list[tuple[int, float]]:
        """Returns the axes of the torus over which a group of devices extends.

        For each axis, the result has the number of positions of the group, and the number of links from which a device receives
        along the axis. That number is a fraction if several groups share the links.
        """
        cubes = all(extent % 4 == 0 for extent in self._extents)
        lines = []
        for positions, extent in zip(self._positions(axes), self._extents, strict=True):
            if len(positions) > 1:
                distance = min(b - a for a, b in itertools.pairwise(positions))
                closed = len(positions) * distance == extent and (cubes if self._chip.torus == 3 else extent == 16)
                lines.append((len(positions), (2 if closed else 1) / distance))
        return lines

    def _positions(self, axes: Sequence[str]) -> list[list[int]]:
        """Returns the positions of a group of devices along each axis of the torus."""
        index: tuple[Any, ...] = tuple(slice(None) if name in axes else 0 for name in self._mesh.axis_names)
        group = np.atleast_1d(np.array(self._mesh.devices[index], dtype=object)).flat
        return [sorted(set(positions)) for positions in zip(*(device.coords for device in group), strict=True)]


def exposed_seconds(collective: Collective, seconds: float, overlap: float) -> float:
    """Returns the part of a collective's time during which a device has nothing else to do.

    Args:
      seconds: time of one execution.
      overlap: time of the work that runs between its start and its end, if it is asynchronous.
    """
    return max(seconds - overlap, 0.0) if collective.asynchronous else seconds
