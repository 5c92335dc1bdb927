"""Known figures of accelerators: peak throughput, memory and bandwidths. This module does not depend on JAX.

Sources, last checked in November 2026:

- TPUs: the tables of key specifications on cloud.google.com/tpu/docs, pages v4, v5e, v5p, v6e and tpu7x. The memory bandwidth
  of v6e is from the page tpu7x, which compares generations. All figures there are for a chip, and a JAX device of TPU7x is half
  of one. v4's clock and links (6 of 50 GB/s in each direction) are in table 4 of Jouppi et al., "TPU v4: An Optically
  Reconfigurable Supercomputer for Machine Learning with Hardware Support for Embeddings" (2023). The bandwidth between slices is
  that of the data center network. The pages v5e and v6e give it for a pod of 256 chips, the pages v5p and tpu7x for one chip, and
  the page v4 not at all. The operations in a cycle are those of the matrix units. For a product of 8,192 x 8,192 matrices, the
  estimates of libtpu's compiler amount to 70 to 90 % of them.
- A100, H100, H200 and L4: the data sheet "NVIDIA ... Tensor Core GPU" of each; the figures were checked in copies of its
  tables. The clocks and peaks of H100 are in the white paper "NVIDIA H100 Tensor Core GPU Architecture". B200: the data sheets
  "NVIDIA HGX B200" and "NVIDIA DGX B200", divided by 8; sources differ about its other peaks. GeForce: the white papers "NVIDIA
  Ampere GA102 GPU Architecture" and "NVIDIA Ada GPU Architecture". They also give the generation of PCI Express, of
  which 16 lanes carry 64 GB/s (fourth) or 128 GB/s (fifth) in both directions together. Peaks are without sparsity; where a
  clock is given, the peaks are equal to multiprocessors x operations in a cycle x clock.
- Memory that a program can have: on TPUs, libtpu's compiler says it when it refuses a program ("exceeds available HBM
  (15.75G)"). For each generation, a program for one device with an array of 300 GiB was compiled with libtpu 0.0.42.1 and
  0.0.50.1. The figures differ by 0.01 GiB at most, and the lower ones are used; they do not depend on the size of the slice.
  v5p's is higher than the memory on its page. On GPUs, it is the three quarters of the memory that JAX allocates at first ("GPU
  memory allocation" in its documentation); newer versions can allocate more later.
- Memory of GPUs: as reported by nvidia-smi in MiB. An "80 GB" H100 has 81,559 MiB, which is 79.6 GiB or 85.5 GB.
"""

from collections.abc import Mapping
from typing import NamedTuple

MIB, GIB = 1 << 20, 1 << 30


class Chip(NamedTuple):
    """One JAX device: a chip, or half of a TPU7x chip, which presents two devices."""

    peak_flops: Mapping[str, float]
    """Dense matrix products in FLOP/s by dtype: bfloat16, and where they are published int8, fp8, tf32 and float32."""
    memory: int
    """Memory in bytes."""
    memory_bandwidth: float
    """Bandwidth of the memory in bytes/s."""
    program_memory: int
    """Memory in bytes that a program can have. The remainder is for the runtime."""
    link_bandwidth: float = 0.0
    """Bandwidth of all links to other chips of the same slice or node in bytes/s, the sum of both directions. 0: only PCI
    Express, apart from optional bridges between two cards."""
    pcie_bandwidth: float = 0.0
    """Bandwidth of PCI Express in bytes/s, the sum of both directions; only for cards that have no other links."""
    clock: float = 0.0
    """Clock in Hz at which the chip reaches its peak in bfloat16; 0: not published."""
    torus: int = 0
    """Number of dimensions of the TPU's torus. The chip has two links in each dimension. 0: not a TPU."""
    slice_bandwidth: float = 0.0
    """Bandwidth to other slices in each direction, in bytes/s; 0: not published."""
    flops_per_cycle: int = 0
    """Operations of a bfloat16 product in one cycle of the compiler's estimates; 0: not a TPU."""
    cores: int = 1
    """TensorCores that execute the grid of a kernel together."""

    @property
    def cycles_per_second(self) -> float:
        """Number of cycles of the compiler's estimates in a second; only for TPUs."""
        return self.peak_flops["bfloat16"] / self.flops_per_cycle


def _chip(
    bfloat16: float, memory: int, bandwidth: float, link: float, clock: float = 0.0, pcie: float = 0.0, **peaks: float
) -> Chip:
    """Returns a chip, with peaks in TFLOP/s, memory in bytes, bandwidths in GB/s, and the clock in MHz."""
    flops = {dtype: peak * 1e12 for dtype, peak in {"bfloat16": bfloat16, **peaks}.items()}
    return Chip(flops, memory, bandwidth * 1e9, memory * 3 // 4, link * 1e9, pcie * 1e9, clock * 1e6)


def _tpu(chip: Chip, usable: float, torus: int, flops_per_cycle: int, cores: int = 1, between_slices: float = 0.0) -> Chip:
    """Returns a chip with the properties of a TPU; the program's memory is in GiB, the bandwidth between slices in Gbit/s."""
    return chip._replace(
        program_memory=int(usable * GIB),
        torus=torus,
        flops_per_cycle=flops_per_cycle,
        cores=cores,
        slice_bandwidth=between_slices * 1e9 / 8,
    )


CHIPS = {
    "TPU v4": _tpu(_chip(275, 32 * GIB, 1200, 600, 1050, int8=275), 30.75, 3, 262_144, cores=2),
    "TPU v5 lite": _tpu(_chip(197, 16 * GIB, 819, 400, int8=393), 15.75, 2, 131_072, between_slices=6400 / 256),
    "TPU v5": _tpu(_chip(459, 95 * GIB, 2765, 1200, fp8=459), 95.73, 3, 262_144, cores=2, between_slices=50),
    "TPU v6 lite": _tpu(_chip(918, 32 * GIB, 1638, 800, int8=1836, fp8=918), 31.24, 2, 524_288, between_slices=25_600 / 256),
    "TPU7x": _tpu(_chip(2307 / 2, 192 * GIB // 2, 7380 / 2, 1200 / 2, fp8=4614 / 2), 94.74, 3, 524_288, between_slices=100 / 2),
    "NVIDIA A100-SXM4-40GB": _chip(312, 40_960 * MIB, 1555, 600, 1410, tf32=156, float32=19.5),
    "NVIDIA A100-SXM4-80GB": _chip(312, 81_920 * MIB, 2039, 600, 1410, tf32=156, float32=19.5),
    "NVIDIA A100 80GB PCIe": _chip(312, 81_920 * MIB, 1935, 0, 1410, pcie=64, tf32=156, float32=19.5),
    "NVIDIA H100 80GB HBM3": _chip(989.4, 81_559 * MIB, 3350, 900, 1830, tf32=494.7, float32=66.9),
    "NVIDIA H100 PCIe": _chip(756, 81_559 * MIB, 2000, 0, 1620, pcie=128, tf32=378, float32=51.2),
    "NVIDIA H200": _chip(989.4, 143_771 * MIB, 4800, 900, 1830, tf32=494.7, float32=66.9),
    "NVIDIA B200": _chip(2250, 183_359 * MIB, 8000, 1800),
    "NVIDIA L4": _chip(121, 23_034 * MIB, 300, 0, 2040, pcie=64, tf32=60.5, float32=30.3),
    "NVIDIA GeForce RTX 3090": _chip(71, 24_576 * MIB, 936, 0, 1695, pcie=64, tf32=35.6, float32=35.6),
    "NVIDIA GeForce RTX 4090": _chip(165.2, 24_564 * MIB, 1008, 0, 2520, pcie=64, tf32=82.6, float32=82.6),
}
"""Chips by their `device_kind` in JAX. Code that uses these figures must also work for chips that are not listed."""
