"""Accelerator chips: clock, peak throughput, memory and bandwidths, from their vendors' data sheets. It does not depend on JAX.

Sources:

- TPU v4 to TPU7x: the page of each generation in "Cloud TPU documentation: TPU architecture" (Google Cloud). Inter-chip bandwidth
  is that of all links of a chip in both directions. Google publishes no clocks except that of v4 (Jouppi et al., "TPU v4: An
  Optically Reconfigurable Supercomputer", 2023, table 4).
- A100: "NVIDIA A100 Tensor Core GPU" data sheet. H100: "NVIDIA H100 Tensor Core GPU Architecture" white paper, table 3. H200,
  B200, L4: their data sheets. GeForce: "NVIDIA Ampere GA102 GPU Architecture" and "NVIDIA Ada GPU Architecture" white papers.
  Peaks are without sparsity. Bandwidth between chips is that of NVLink in both directions.
"""

from collections.abc import Mapping
from typing import NamedTuple

GIB = 1 << 30


class Chip(NamedTuple):
    """One JAX device: a chip, or half of a TPU7x chip, which presents two devices."""

    peak_flops: Mapping[str, float]
    """Dense matrix products in FLOP/s by dtype: bfloat16, and where the chip has them int8, fp8, tf32 and float32."""
    memory: int
    """Memory in bytes. GPUs have slightly less than the vendor's figure."""
    memory_bandwidth: float
    """Bandwidth of the memory in bytes/s."""
    link_bandwidth: float = 0.0
    """Bandwidth to other chips of the same slice or node in bytes/s, both directions together; 0: only PCI Express."""
    clock: float = 0.0
    """Clock in Hz, for GPUs the boost clock; 0: not published."""


def _tpu(bfloat16: float, memory: int, bandwidth: float, link: float, clock: float = 0.0, **peaks: float) -> Chip:
    """Returns a TPU, with peaks in TFLOP/s, memory in GiB, and bandwidths in GB/s."""
    flops = {"bfloat16": bfloat16, **peaks}
    return Chip({dtype: peak * 1e12 for dtype, peak in flops.items()}, memory * GIB, bandwidth * 1e9, link * 1e9, clock)


def _gpu(bfloat16: float, tf32: float, float32: float, memory: int, bandwidth: float, link: float, mhz: float) -> Chip:
    """Returns a GPU, with peaks in TFLOP/s, memory in GB, bandwidths in GB/s, and the boost clock in MHz."""
    peaks = {"bfloat16": bfloat16 * 1e12, "tf32": tf32 * 1e12, "float32": float32 * 1e12}
    return Chip(peaks, memory * GIB, bandwidth * 1e9, link * 1e9, mhz * 1e6)


CHIPS = {
    "TPU v4": _tpu(275, 32, 1228, 300, clock=1.05e9, int8=275),
    "TPU v5 lite": _tpu(197, 16, 819, 400, int8=393),
    "TPU v5": _tpu(459, 95, 2765, 1200, int8=918),
    "TPU v6 lite": _tpu(918, 32, 1640, 800, int8=1836),
    "TPU7x": _tpu(1153.5, 96, 3690, 600, fp8=2307),
    "NVIDIA A100-SXM4-40GB": _gpu(312, 156, 19.5, 40, 1555, 600, 1410),
    "NVIDIA A100-SXM4-80GB": _gpu(312, 156, 19.5, 80, 2039, 600, 1410),
    "NVIDIA A100 80GB PCIe": _gpu(312, 156, 19.5, 80, 1935, 600, 1410),
    "NVIDIA H100 80GB HBM3": _gpu(989.4, 494.7, 66.9, 80, 3350, 900, 1830),
    "NVIDIA H100 PCIe": _gpu(756, 378, 51.2, 80, 2000, 600, 1620),
    "NVIDIA H200": _gpu(989.4, 494.7, 66.9, 141, 4800, 900, 1830),
    "NVIDIA B200": _gpu(2250, 1125, 75, 180, 8000, 1800, 0),
    "NVIDIA L4": _gpu(121, 60, 30.3, 24, 300, 0, 2040),
    "NVIDIA GeForce RTX 3090": _gpu(71, 35.6, 35.6, 24, 936, 112.5, 1695),
    "NVIDIA GeForce RTX 4090": _gpu(165.2, 82.6, 82.6, 24, 1008, 0, 2520),
}
"""Chips by their `device_kind` in JAX. Code that uses a figure does without it if the chip is not listed."""
