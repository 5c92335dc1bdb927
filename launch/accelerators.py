"""What a job can run on: how many hosts and devices, how much memory, and what each cloud product calls it.

An accelerator is named FAMILY-SIZE. Sizes are those of Cloud TPU: chips for v5e and v6e, TensorCores (two a chip) for v4, v5p and
7x; of GPUs and CPUs, the devices of one node. "cpu-4" is a node on which JAX simulates four devices.

Sources: "TPU architecture" with a page for each generation (HBM, chips a host, slice names), "Plan TPUs in GKE" (labels and
topologies), "GPU machine types" (Google Cloud documentation, 2026); TPU7x's names as in xpk's system characteristics.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

from gpt_jax.errors import UserError, nearest

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One TPU slice, or one node of GPUs or CPUs."""

    name: str
    kind: Literal["tpu", "gpu", "cpu"]
    family: str
    hosts: int
    """Machines; each runs one process, except where a target starts one for each GPU."""
    chips_per_host: int
    devices_per_host: int
    """What JAX calls devices."""
    memory: int = 0
    """Bytes of one device; 0: not known."""
    gcloud: str = ""
    """Accelerator type of Cloud TPU; xpk calls it TPU type."""
    gke: str = ""
    """Value of GKE's node label gke-tpu-accelerator or gke-accelerator."""
    topology: str = ""
    """Chips along the axes of the slice, as in GKE's node label gke-tpu-topology."""
    sky: str = ""
    """SkyPilot's name, without the number of GPUs."""

    @property
    def devices(self) -> int:
        """Of the whole slice or node."""
        return self.hosts * self.devices_per_host


class _Tpu(NamedTuple):
    gcloud: str
    gke: str
    memory: int  # GiB of one chip
    names_per_chip: int  # what a chip adds to the size in a name
    devices_per_chip: int
    topologies: str


_FLAT = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
_CUBES = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x12 8x8x16 8x16x16"
_TPUS = {
    "v4": _Tpu("v4", "tpu-v4-podslice", 32, 2, 1, _CUBES),
    "v5e": _Tpu("v5litepod", "tpu-v5-lite-podslice", 16, 1, 1, _FLAT),
    "v5p": _Tpu("v5p", "tpu-v5p-slice", 95, 2, 1, f"{_CUBES} 4x4x12 4x8x12 16x16x16 16x16x24"),
    "v6e": _Tpu("v6e", "tpu-v6e-slice", 32, 1, 1, _FLAT),
    "7x": _Tpu("tpu7x", "tpu7x", 192, 2, 2, f"1x1x1 {_CUBES} 4x4x12 12x16x16 16x16x16 16x16x24"),
}


RUNTIMES = {"v4": "tpu-ubuntu2204-base", "v5e": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e"}
"""Software version of a TPU VM, by family; those that are not here are not offered as such."""


class _Gpu(NamedTuple):
    memory: int  # GB of one, by its data sheet
    gke: str
    sky: str


_GPUS = {
    "l4": _Gpu(24, "nvidia-l4", "L4"),
    "a100": _Gpu(40, "nvidia-tesla-a100", "A100"),
    "a100-80gb": _Gpu(80, "nvidia-a100-80gb", "A100-80GB"),
    "h100": _Gpu(80, "nvidia-h100-80gb", "H100"),
    "h200": _Gpu(141, "nvidia-h200-141gb", "H200"),
    "b200": _Gpu(180, "nvidia-b200", "B200"),
}
_GPUS_PER_NODE = (1, 2, 4, 8)
_CPUS_PER_NODE = range(1, 257)
_ALIASES = {tpu.gcloud: family for family, tpu in _TPUS.items()}


def find(name: str) -> Accelerator:
    """The accelerator of this name, which may be Cloud TPU's own ("v5litepod-16").

    Raises:
      UserError: there is none; the message has the nearest names.
    """
    family, _, size = name.rpartition("-")
    if name in ("cpu", *_GPUS, *_TPUS, *_ALIASES):  # no size was given
        family, size = name, "1" if name == "cpu" else ""
    family = _ALIASES.get(family, family)
    if family in _TPUS:
        slices = {_size(_TPUS[family], topology): topology for topology in _TPUS[family].topologies.split()}
        return _tpu(family, slices[_checked(name, family, size, slices)])
    if family in _GPUS:
        gpu, count = _GPUS[family], _checked(name, family, size, _GPUS_PER_NODE)
        return Accelerator(
            name=f"{family}-{count}",
            kind="gpu",
            family=family,
            hosts=1,
            chips_per_host=count,
            devices_per_host=count,
            memory=gpu.memory * GIB,
            gke=gpu.gke,
            sky=gpu.sky,
        )
    if family == "cpu":
        count = _checked(name, family, size, _CPUS_PER_NODE)
        return Accelerator(f"cpu-{count}", "cpu", "cpu", hosts=1, chips_per_host=count, devices_per_host=count)
    hint = nearest(family or name, [*_TPUS, *_GPUS, "cpu"])
    raise UserError(f"--accelerator: '{name}' is of no known family (a name is FAMILY-SIZE, as in v5e-16); {hint}")


def smallest_of_several_hosts(family: str) -> Accelerator:
    """The smallest slice of a TPU family that has more than one host."""
    slices = (_tpu(family, topology) for topology in _TPUS[family].topologies.split())
    return min((each for each in slices if each.hosts > 1), key=lambda each: each.devices)


def _checked(name: str, family: str, size: str, known: Iterable[int]) -> int:
    sizes = sorted(known)
    if not size.isdecimal() or int(size) not in sizes:
        place = bisect.bisect(sizes, int(size)) if size.isdecimal() else 0
        near = ", ".join(f"{family}-{each}" for each in sizes[max(place - 2, 0) : place + 2])
        raise UserError(f"--accelerator: there is no '{name}'; nearest: {near}")
    return int(size)


def _size(tpu: _Tpu, topology: str) -> int:
    return math.prod(map(int, topology.split("x"))) * tpu.names_per_chip


def _tpu(family: str, topology: str) -> Accelerator:
    tpu = _TPUS[family]
    chips = math.prod(map(int, topology.split("x")))
    chips_per_host = chips if topology in ("1x1", "1x1x1", "2x4") else 4
    size = _size(tpu, topology)
    return Accelerator(
        name=f"{family}-{size}",
        kind="tpu",
        family=family,
        hosts=chips // chips_per_host,
        chips_per_host=chips_per_host,
        devices_per_host=chips_per_host * tpu.devices_per_chip,
        memory=tpu.memory * GIB // tpu.devices_per_chip,
        gcloud=f"{tpu.gcloud}-{size}",
        gke=tpu.gke,
        topology=topology,
        sky=f"tpu-{tpu.gcloud}-{size}",
    )
