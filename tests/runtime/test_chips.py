"""The table of chips: figures that are independent of each other fit together."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from gpt_jax.plan.topology import ONE_HOST
from gpt_jax.runtime.chips import CHIPS, GIB

MULTIPLY_ADDS = {
    # Multiprocessors times multiply-adds of a multiprocessor and cycle, in bfloat16, from NVIDIA's white papers.
    "NVIDIA A100-SXM4-40GB": 108 * 1024,
    "NVIDIA A100-SXM4-80GB": 108 * 1024,
    "NVIDIA A100 80GB PCIe": 108 * 1024,
    "NVIDIA H100 80GB HBM3": 132 * 2048,
    "NVIDIA H100 PCIe": 114 * 2048,
    "NVIDIA H200": 132 * 2048,
    "NVIDIA L4": 58 * 512,
    "NVIDIA GeForce RTX 3090": 82 * 256,
    "NVIDIA GeForce RTX 4090": 128 * 256,
    # Two TensorCores with four matrix units of 128 x 128.
    "TPU v4": 2 * 4 * 128 * 128,
}


@pytest.mark.parametrize("kind", MULTIPLY_ADDS)
def test_the_peak_is_that_of_all_units_at_the_clock(kind):
    chip = CHIPS[kind]
    assert chip.peak_flops["bfloat16"] == pytest.approx(2 * MULTIPLY_ADDS[kind] * chip.clock, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "links", "gigabytes"),
    # Links and GB/s of one link in one direction. NVLink has 25 GB/s from its third generation on.
    [("TPU v4", 6, 50), ("NVIDIA A100-SXM4-80GB", 12, 25), ("NVIDIA H100 80GB HBM3", 18, 25), ("NVIDIA H200", 18, 25)],
)
def test_the_bandwidth_between_chips_is_that_of_all_links_in_both_directions(kind, links, gigabytes):
    assert CHIPS[kind].link_bandwidth == 2 * links * gigabytes * 1e9


def test_v6e_compares_with_v5e_as_announced():
    """From "Introducing Trillium": v6e has twice the memory and both bandwidths of v5e, and 4.7 times the peak."""
    before, after = CHIPS["TPU v5 lite"], CHIPS["TPU v6 lite"]
    assert after.memory == 2 * before.memory
    assert after.link_bandwidth == 2 * before.link_bandwidth
    assert after.memory_bandwidth == pytest.approx(2 * before.memory_bandwidth, rel=0.01)
    assert after.peak_flops["bfloat16"] == pytest.approx(4.7 * before.peak_flops["bfloat16"], rel=0.01)


@pytest.mark.parametrize("kind", ONE_HOST)
def test_the_memory_of_a_program_is_that_of_the_compiler(tpu_devices, kind):
    """Versions of libtpu differ in the last digit of the message."""
    sharding = SingleDeviceSharding(tpu_devices(ONE_HOST[kind])[0])
    array = jax.ShapeDtypeStruct((300, 2**28), jnp.float32, sharding=sharding)
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.jit(lambda x: x + 1).lower(array).compile()
    available = float(re.search(r"exceeds available HBM \(([\d.]+)G\)", str(caught.value))[1])
    assert CHIPS[kind].program_memory / GIB == pytest.approx(available, abs=0.011)


def test_jax_allocates_three_quarters_of_a_gpu():
    assert CHIPS["NVIDIA H100 80GB HBM3"].program_memory == 0.75 * 81_559 * 2**20


def test_the_network_between_slices_is_shared_by_the_devices_of_a_chip():
    """v6e and TPU7x have 100 Gbit/s a chip, and a TPU7x chip is two devices. v5e has two networks of 100 Gbit/s for 8 chips."""
    assert CHIPS["TPU v6 lite"].slice_bandwidth == 2 * CHIPS["TPU7x"].slice_bandwidth == 100e9 / 8
    assert CHIPS["TPU v5 lite"].slice_bandwidth == 2 * 100e9 / 8 / 8
    assert CHIPS["TPU v4"].slice_bandwidth == 0


def test_only_cards_without_other_links_need_pci_express():
    assert all((chip.link_bandwidth == 0) == (chip.pcie_bandwidth > 0) for chip in CHIPS.values())


@pytest.mark.parametrize("kind", CHIPS)
def test_units_are_right(kind):
    chip = CHIPS[kind]
    assert 50e12 < chip.peak_flops["bfloat16"] < 3e15
    assert 15 * GIB < chip.memory < 200 * GIB
    assert 0.7 < chip.program_memory / chip.memory < 1.01
    assert 2e11 < chip.memory_bandwidth < 1e13
    assert chip.link_bandwidth == 0 or 1e11 < chip.link_bandwidth < 2e12
    assert chip.clock == 0 or 1e9 < chip.clock < 3e9
    # Every chip needs many operations for each byte, and none of these more than a thousand.
    assert 50 < chip.peak_flops["bfloat16"] / chip.memory_bandwidth < 1000
