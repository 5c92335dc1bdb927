"""Times of collectives are worked out by hand for devices that have nothing but a position in a torus."""

import dataclasses

import numpy as np
import pytest
from jax.sharding import Mesh

from gpt_jax.config import MeshConfig
from gpt_jax.plan.collectives import Collective
from gpt_jax.plan.transfers import Links, exposed_seconds
from gpt_jax.runtime.chips import CHIPS
from gpt_jax.runtime.mesh import AXES
from gpt_jax.runtime.sharding import make_mesh

V5E, V5P, IRONWOOD = "TPU v5 lite", "TPU v5", "TPU7x"
LINK = {V5E: 50e9, V5P: 100e9, IRONWOOD: 50e9}
"""Bytes/s of one link in one direction: both directions of a chip's 4 links are 400 GB/s, of its 6 links 1,200 GB/s.

A TPU7x chip has as much as a v5p, which its two devices share.
"""
MEGABYTE = 1_000_000


@dataclasses.dataclass(frozen=True)
class Device:
    device_kind: str
    coords: tuple[int, ...]
    core: int = 0
    slice_index: int = 0
    platform: str = "tpu"


def links(kind, extents, slices=1, cores=1, **sizes):
    """Returns the links of a torus whose chips a mesh numbers row by row; `sizes` are those of the mesh's axes."""
    places = [(number, place) for number in range(slices) for place in np.ndindex(*extents)]
    devices = [Device(kind, place, core, number) for number, place in places for core in range(cores)]
    shape = [{"slice": slices, **sizes}.get(axis, 1) for axis in AXES]
    return Links(Mesh(np.array(devices).reshape(shape), AXES))


def collective(kind, axes, devices, size=MEGABYTE):
    return Collective(kind, "f32", size, 1, axes, devices, "mlp", "forward")


FLAT, POD = (4, 4, 1), (16, 16, 1)


@pytest.mark.parametrize(
    ("kind", "extents", "sizes", "axes", "count"),
    [
        (V5E, POD, {"data": 16, "fsdp": 16}, "data", 2),  # closed to a ring
        (V5E, POD, {"data": 256}, "data", 4),  # both axes of the torus
        (V5E, POD, {"data": 16, "fsdp": 16}, "data+fsdp", 4),
        (V5E, POD, {"data": 32, "fsdp": 8}, "fsdp", 1),  # half of a ring is a line
        (V5E, POD, {"data": 8, "fsdp": 32}, "fsdp", 3),  # rows of 16, and two of them
        (V5E, POD, {"data": 8, "fsdp": 32}, "data", 2 / 2),  # every other row of a ring, whose links two groups share
        (V5E, POD, {"data": 32, "fsdp": 8}, "data", 2 + 2 / 8),
        (V5E, FLAT, {"data": 8, "fsdp": 2}, "data", 1 + 1 / 2),
        (V5P, (4, 4, 4), {"data": 32, "fsdp": 2}, "data", 2 + 2 + 2 / 2),
        (V5E, (8, 16, 1), {"data": 8, "fsdp": 16}, "data", 1),
        (V5E, (8, 16, 1), {"data": 8, "fsdp": 16}, "fsdp", 2),
        (V5E, FLAT, {"data": 4, "fsdp": 4}, "fsdp", 1),
        (V5E, FLAT, {"data": 16}, "data", 2),
        (V5P, (2, 2, 2), {"data": 8}, "data", 3),
        (V5P, (2, 2, 2), {"data": 4, "fsdp": 2}, "data", 2),
        (V5P, (4, 4, 4), {"data": 4, "fsdp": 16}, "data", 2),
        (V5P, (4, 4, 4), {"data": 4, "fsdp": 16}, "fsdp", 4),
        (V5P, (4, 4, 4), {"data": 64}, "data", 6),
        (V5P, (4, 4, 8), {"data": 16, "fsdp": 8}, "fsdp", 2),
        (V5P, (2, 4, 4), {"data": 2, "fsdp": 16}, "fsdp", 2),  # less than a cube has no links from end to end
        (IRONWOOD, (2, 2, 1), {"data": 8, "cores": 2}, "data", 2),
        (IRONWOOD, (2, 2, 1), {"data": 4, "fsdp": 2, "cores": 2}, "data", 2),
    ],
)
def test_a_device_receives_from_both_ends_of_rings_and_from_one_end_of_lines(kind, extents, sizes, axes, count):
    assert links(kind, extents, **sizes).bandwidth(axes.split("+")) == count * LINK[kind]


@pytest.mark.parametrize(
    ("kind", "shares"),
    [("all-gather", 15 / 16), ("reduce-scatter", 15 / 16), ("all-reduce", 2 * 15 / 16), ("all-to-all", 16 / 4)],
)
def test_the_time_on_a_ring_is_the_bytes_over_the_bandwidth(kind, shares):
    pod = links(V5E, POD, data=16, fsdp=16)
    assert pod.seconds(collective(kind, "data", 16)) == pytest.approx(shares * 1e6 / 100e9)


@pytest.mark.parametrize(("kind", "seconds"), [("all-gather", 3 / 4 / 50e3), ("all-reduce", 2 * 3 / 4 / 50e3)])
def test_the_time_on_a_line(kind, seconds):
    assert links(V5E, FLAT, data=4, fsdp=4).seconds(collective(kind, "data", 4)) == pytest.approx(seconds)


def test_all_to_all_crosses_the_middle_of_each_axis():
    """Half of the devices send half of their bytes across: 128 x 1/2 MB over 32 links of a pod, 8 x 1/2 MB over 4 of 4 x 4."""
    assert links(V5E, POD, data=256).seconds(collective("all-to-all", "data", 256)) == pytest.approx(128 / 2 * 1e6 / 32 / 50e9)
    assert links(V5E, FLAT, data=16).seconds(collective("all-to-all", "data", 16)) == pytest.approx(8 / 2 * 1e6 / 4 / 50e9)
    assert links(V5E, FLAT, data=4, fsdp=4).seconds(collective("all-to-all", "data", 4)) == pytest.approx(2 / 2 * 1e6 / 50e9)
    # Two groups of 8 in a ring of 16: 2 x 4 x 1/2 MB over 2 links.
    alternating = links(V5E, POD, data=8, fsdp=32)
    assert alternating.seconds(collective("all-to-all", "data", 8)) == pytest.approx(2 * 4 / 2 * 1e6 / 2 / 50e9)


def test_a_permute_takes_one_link():
    assert links(V5E, POD, data=256).seconds(collective("collective-permute", "data", 2)) == pytest.approx(1e6 / 50e9)
    assert links(V5P, (4, 4, 4), data=64).seconds(collective("collective-permute", "data", 2)) == pytest.approx(1e6 / 100e9)


def test_two_devices_of_one_chip_have_the_bandwidth_of_all_its_links():
    chip = links(IRONWOOD, (2, 2, 1), cores=2, data=4, fsdp=2)
    assert chip.seconds(collective("all-gather", "fsdp", 2)) == pytest.approx(1 / 2 * 1e6 / 300e9)
    assert chip.seconds(collective("all-to-all", "fsdp", 2)) == pytest.approx(1 / 2 * 1e6 / 300e9)


@pytest.mark.parametrize(
    ("kind", "shares"), [("all-reduce", 2 * 3 / 4), ("all-gather", 3 / 4), ("all-to-all", 3 / 4), ("collective-permute", 1)]
)
def test_slices_are_connected_by_the_network(kind, shares):
    """A pod of 256 v5e chips has 6,400 Gbit/s: 3.125 GB/s for a chip."""
    four = links(V5E, FLAT, slices=4, data=16)
    devices = 2 if kind == "collective-permute" else 4
    assert four.seconds(collective(kind, "slice", devices)) == pytest.approx(shares * 1e6 / 3.125e9)


def test_a_collective_over_slices_too_begins_inside_the_slices():
    """An all-reduce scatters 1 MB over 16 devices, each reduces its 1/16 MB with the other slice, and then they gather."""
    two = links(V5E, FLAT, slices=2, data=16)
    inside, between = 2 * 15 / 16 * 1e6 / 100e9, 2 * 1 / 2 * 1e6 / 16 / 3.125e9
    assert two.seconds(collective("all-reduce", "slice+data", 32)) == pytest.approx(inside + between)
    assert two.seconds(collective("collective-permute", "slice+data", 2)) == pytest.approx(1e6 / 3.125e9)


@pytest.mark.parametrize("kind", ["all-reduce", "collective-permute"])
def test_a_network_of_unknown_bandwidth_takes_no_time(kind):
    assert CHIPS["TPU v4"].slice_bandwidth == 0
    assert links("TPU v4", (2, 2, 1), slices=2, data=4).seconds(collective(kind, "slice", 2)) == 0


def test_a_collective_over_unknown_axes_has_one_link():
    pod = links(V5E, POD, data=16, fsdp=16)
    assert pod.seconds(collective("all-gather", "64 groups of 4", 4)) == pytest.approx(3 / 4 * 1e6 / 50e9)


def test_only_asynchronous_collectives_overlap():
    synchronous = collective("all-gather", "data", 16)
    asynchronous = synchronous._replace(asynchronous=True)
    assert exposed_seconds(synchronous, 3.0, 2.0) == 3
    assert exposed_seconds(asynchronous, 3.0, 2.0) == 1
    assert exposed_seconds(asynchronous, 2.0, 3.0) == 0


@pytest.mark.parametrize(
    ("topology", "slices", "sizes", "kind", "count"),
    [
        ("v5e:4x4", 2, {"slice": 2, "data": 16}, V5E, 2),
        ("v5e:16x16", 1, {"data": 8, "fsdp": 32}, V5E, 1),
        ("v5p:4x4x4", 1, {"data": 64}, V5P, 6),
        ("tpu7x:2x2x1", 1, {}, IRONWOOD, 2),
    ],
)
def test_devices_of_absent_slices_have_these_positions(tpu_devices, topology, slices, sizes, kind, count):
    mesh = make_mesh(MeshConfig(**{"data": -1} | sizes), tpu_devices(topology, slices))
    assert Links(mesh).bandwidth(["data"]) == count * LINK[kind]
