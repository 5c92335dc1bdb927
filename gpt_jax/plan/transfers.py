"""A model of the time that collectives take: their bytes over the bandwidth of the links that they use.

The chips of a slice form a torus, with a link to each neighbor. Along an axis that is closed to a ring, a collective sends in
both directions at once. Along an open axis, the chips at the ends receive from one side only. A collective over several axes uses
the links of all of them. With B bytes on each device after a gather or before a scatter, n devices, and W bytes/s into a device,

    all-gather, reduce-scatter    B (n - 1) / n / W
    all-reduce                    twice as long: one of each
    all-to-all                    B n / (4 W), because the average path is a quarter of the ring
    collective-permute            B over the bandwidth of one link in one direction

Slices exchange data over the data center network, at `Chip.slice_bandwidth`. Latencies are not modeled. The axes that are closed,
and the bandwidths, are those of Google's documentation (runtime/chips.py).
"""

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
        """Returns the time of one execution of a collective that nothing delays."""
        axes = [axis for axis in collective.axes.split("+") if axis in self._mesh.shape]
        if SLICE in axes and len(axes) > 1:  # First within the slices, then each device sends its share to the other slices.
            inside = [axis for axis in axes if axis != SLICE]
            devices = math.prod(self._mesh.shape[axis] for axis in inside)
            between = collective._replace(axes=SLICE, devices=self._mesh.shape[SLICE], bytes=collective.bytes // devices)
            return self.seconds(collective._replace(axes="+".join(inside), devices=devices)) + self.seconds(between)
        if collective.kind == "collective-permute":
            return collective.bytes / (self._chip.slice_bandwidth if axes == [SLICE] else self.link)
        size, devices = collective.bytes / self.bandwidth(axes), max(collective.devices, 1)
        if collective.kind in ("all-to-all", "ragged-all-to-all"):
            return size * devices / 4
        return size * (devices - 1) / devices * (2 if collective.kind == "all-reduce" else 1)

    def bandwidth(self, axes: Sequence[str]) -> float:
        """Returns the bytes that a device can receive in a second from the other devices along mesh axes.

        If no axes are given, they are unknown, and the result is that of one link.
        """
        if list(axes) == [SLICE]:
            return self._chip.slice_bandwidth or math.inf
        directions = 0
        for size, extent in zip(self._spans(axes), self._extents, strict=True):
            closed = size == extent and (extent % 4 == 0 if self._chip.torus == 3 else extent == 16)
            directions += 0 if size == 1 else 2 if closed else 1
        if axes and not directions:  # the two devices of one chip
            return self._chip.link_bandwidth / 2
        return max(directions, 1) * self.link

    def _spans(self, axes: Sequence[str]) -> list[int]:
        """Returns the number of positions along each axis of the torus over which a group of devices extends."""
        index: tuple[Any, ...] = tuple(slice(None) if name in axes else 0 for name in self._mesh.axis_names)
        group = np.atleast_1d(np.array(self._mesh.devices[index], dtype=object)).flat
        return [len(set(positions)) for positions in zip(*(device.coords for device in group), strict=True)]


def exposed_seconds(collective: Collective, seconds: float, overlap: float) -> float:
    """Returns the part of a collective's time during which a device has nothing else to do.

    Args:
      seconds: time of one execution.
      overlap: time of what runs between its start and its end, if it is asynchronous.
    """
    return max(seconds - overlap, 0.0) if collective.asynchronous else seconds
