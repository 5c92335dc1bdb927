"""The hardware that a job can request or be planned for: hosts, devices, memory, and the names that cloud products use.

An accelerator is named FAMILY-SIZE. TPU sizes are those of Cloud TPU: chips for v5e and v6e, TensorCores (two in a chip) for v4,
v5p and 7x. GPU and CPU sizes count the devices of one node; "cpu-4" is a node on which JAX simulates four devices.

Sources: "TPU architecture" and the page of each generation (chips in a host, slice names), "Plan TPUs in GKE" (labels and
topologies), "GPU machine types" (Google Cloud documentation, 2026); names of TPU7x from xpk's system characteristics. The
memory is from `runtime/chips.py`.
"""

import bisect
import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

from gpt_jax.errors import UserError, nearest
from gpt_jax.runtime.chips import CHIPS


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One TPU slice, or one node with GPUs or CPUs."""

    name: str
    kind: Literal["tpu", "gpu", "cpu"]
    family: str
    hosts: int
    """Number of machines. Each runs one process, unless a target starts a process for each GPU."""
    chips_per_host: int
    devices_per_host: int
    """Number of devices that JAX sees on one host."""
    device_kind: str = ""
    """Kind of its devices in JAX; "" for CPUs. `CHIPS` has their properties."""
    gcloud: str = ""
    """Accelerator type in Cloud TPU; xpk calls it the TPU type."""
    gke: str = ""
    """Value of the GKE node label gke-tpu-accelerator or gke-accelerator."""
    topology: str = ""
    """Chips along each axis of the slice, as in the GKE node label gke-tpu-topology."""
    sky: str = ""
    """Name in SkyPilot, without the number of GPUs."""

    @property
    def memory(self) -> int:
        """Memory of one device in bytes; 0 if it is not known."""
        return CHIPS[self.device_kind].memory if self.device_kind else 0

    @property
    def devices(self) -> int:
        """Number of JAX devices in the slice or node."""
        return self.hosts * self.devices_per_host

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that select the devices of one host.

        The platform is given so that a broken driver is an error. Otherwise, JAX would train on the CPU.
        """
        if self.kind == "cpu":
            return {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(self.devices_per_host)}
        return {"JAX_PLATFORMS": "tpu,cpu" if self.kind == "tpu" else "cuda,cpu"}

    @property
    def extras(self) -> str:
        """Extras of the package that hosts install: the device's runtime, and `gpt1` for the released tokenizer."""
        return {"tpu": "tpu,gpt1", "gpu": "cuda,gpt1", "cpu": "gpt1"}[self.kind]


_FLAT = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
_CUBES = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x12 8x8x16 8x16x16"
_TPUS = {  # name in gcloud, name in GKE, device kind in JAX, units of size per chip, devices per chip, topologies
    "v4": ("v4", "tpu-v4-podslice", "TPU v4", 2, 1, _CUBES),
    "v5e": ("v5litepod", "tpu-v5-lite-podslice", "TPU v5 lite", 1, 1, _FLAT),
    "v5p": ("v5p", "tpu-v5p-slice", "TPU v5", 2, 1, f"{_CUBES} 4x4x12 4x8x12 16x16x16 16x16x24"),
    "v6e": ("v6e", "tpu-v6e-slice", "TPU v6 lite", 1, 1, _FLAT),
    "7x": ("tpu7x", "tpu7x", "TPU7x", 2, 2, f"1x1x1 {_CUBES} 4x4x12 12x16x16 16x16x16 16x16x24"),
}
_ALIASES = {gcloud: family for family, (gcloud, *_) in _TPUS.items()}

RUNTIMES = {"v4": "tpu-ubuntu2204-base", "v5e": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e"}
"""Software version for each family that Cloud TPU offers as TPU VMs."""


_GPUS = {  # device kind in JAX, name in GKE, name in SkyPilot
    "l4": ("NVIDIA L4", "nvidia-l4", "L4"),
    "a100": ("NVIDIA A100-SXM4-40GB", "nvidia-tesla-a100", "A100"),
    "a100-80gb": ("NVIDIA A100-SXM4-80GB", "nvidia-a100-80gb", "A100-80GB"),
    "h100": ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb", "H100"),
    "h200": ("NVIDIA H200", "nvidia-h200-141gb", "H200"),
    "b200": ("NVIDIA B200", "nvidia-b200", "B200"),
}
_FAMILIES = [*_TPUS, *_GPUS, "cpu"]


def _tpu_slices() -> Iterator[Accelerator]:
    for family, (gcloud, gke, device_kind, size_per_chip, devices_per_chip, topologies) in _TPUS.items():
        for topology in topologies.split():
            chips = math.prod(map(int, topology.split("x")))
            chips_per_host = chips if topology in ("1x1", "1x1x1", "2x4") else 4
            size = chips * size_per_chip
            yield Accelerator(
                name=f"{family}-{size}",
                kind="tpu",
                family=family,
                hosts=chips // chips_per_host,
                chips_per_host=chips_per_host,
                devices_per_host=chips_per_host * devices_per_chip,
                device_kind=device_kind,
                gcloud=f"{gcloud}-{size}",
                gke=gke,
                topology=topology,
                sky=f"tpu-{gcloud}-{size}",
            )


def _nodes() -> Iterator[Accelerator]:
    for family, (device_kind, gke, sky) in _GPUS.items():
        for count in (1, 2, 4, 8):
            yield Accelerator(f"{family}-{count}", "gpu", family, 1, count, count, device_kind, gke=gke, sky=sky)
    for count in range(1, 257):
        yield Accelerator(f"cpu-{count}", "cpu", "cpu", 1, count, count)


ACCELERATORS = {accelerator.name: accelerator for accelerator in (*_tpu_slices(), *_nodes())}
"""All accelerators by name."""


def parse_accelerator(name: str, option: str = "--accelerator") -> Accelerator:
    """Returns the accelerator with the given name, which may be Cloud TPU's own ("v5litepod-16").

    Args:
      option: the option that the name comes from, for the message.

    Raises:
      UserError: the name is unknown; the message lists the nearest ones.
    """
    family, _, size = name.rpartition("-")
    if name in (*_FAMILIES, *_ALIASES):  # the size is missing
        family, size = name, "1" if name == "cpu" else ""
    family = _ALIASES.get(family, family)
    if f"{family}-{size}" in ACCELERATORS:
        return ACCELERATORS[f"{family}-{size}"]
    if family not in _FAMILIES:
        hint = nearest(family or name, _FAMILIES)
        raise UserError(f"{option}: '{name}' is not in a known family (write FAMILY-SIZE, such as v5e-16); {hint}")
    sizes = sorted(int(known.rpartition("-")[2]) for known, accelerator in ACCELERATORS.items() if accelerator.family == family)
    place = bisect.bisect(sizes, int(size)) if size.isdecimal() else 0
    neighbors = ", ".join(f"{family}-{neighbor}" for neighbor in sizes[max(place - 2, 0) : place + 2])
    raise UserError(f"{option}: '{name}' does not exist; the nearest sizes are {neighbors}")


def smallest_multi_host_slice(family: str) -> Accelerator:
    """Returns the smallest slice of a TPU family that has more than one host."""
    slices = (accelerator for accelerator in ACCELERATORS.values() if accelerator.family == family and accelerator.hosts > 1)
    return min(slices, key=lambda accelerator: accelerator.devices)


def largest_single_host_slice(family: str) -> str:
    """Returns the name of the largest slice or node of a family that has one host."""
    names = (accelerator for accelerator in ACCELERATORS.values() if accelerator.family == family and accelerator.hosts == 1)
    return max(names, key=lambda accelerator: accelerator.devices).name
