"""Accelerators: what their names stand for, and the messages about names that do not exist."""

import math

import pytest

from gpt_jax.errors import UserError
from gpt_jax.runtime import accelerators
from gpt_jax.runtime.accelerators import parse_accelerator


@pytest.mark.parametrize(
    ("name", "gcloud", "topology", "hosts", "devices", "gib"),
    [
        ("v5e-256", "v5litepod-256", "16x16", 64, 256, 16),
        ("v5e-8", "v5litepod-8", "2x4", 1, 8, 16),
        ("v5e-1", "v5litepod-1", "1x1", 1, 1, 16),
        ("v5litepod-16", "v5litepod-16", "4x4", 4, 16, 16),
        ("v6e-32", "v6e-32", "4x8", 8, 32, 32),
        ("v5p-8", "v5p-8", "2x2x1", 1, 4, 95),  # The size counts TensorCores, two in a chip.
        ("v5p-16", "v5p-16", "2x2x2", 2, 8, 95),
        ("v4-32", "v4-32", "2x2x4", 4, 16, 32),
        ("7x-8", "tpu7x-8", "2x2x1", 1, 8, 96),  # Here each TensorCore is a device.
        ("7x-128", "tpu7x-128", "4x4x4", 16, 128, 96),
    ],
)
def test_tpu_slices(name, gcloud, topology, hosts, devices, gib):
    accelerator = parse_accelerator(name)
    assert (accelerator.gcloud, accelerator.topology) == (gcloud, topology)
    assert (accelerator.hosts, accelerator.devices, accelerator.memory) == (hosts, devices, gib << 30)


@pytest.mark.parametrize(
    ("name", "kind", "devices", "mib"),
    [
        ("h100-8", "gpu", 8, 81_559),
        ("a100-8", "gpu", 8, 40_960),
        ("a100-80gb-4", "gpu", 4, 81_920),
        ("cpu", "cpu", 1, 0),
        ("cpu-4", "cpu", 4, 0),
    ],
)
def test_nodes_of_gpus_and_cpus(name, kind, devices, mib):
    accelerator = parse_accelerator(name)
    assert (accelerator.kind, accelerator.hosts) == (kind, 1)
    assert (accelerator.devices, accelerator.memory) == (devices, mib << 20)


@pytest.mark.parametrize(
    ("name", "hints"),
    [
        ("v5e-17", ["v5e-8", "v5e-16", "v5e-32"]),
        ("v5e-99999", ["v5e-256"]),
        ("v5p", ["v5p-8"]),
        ("h100-3", ["h100-2", "h100-4"]),
        ("v5x-8", ["v5p", "v5e"]),
        ("h10-8", ["h100"]),
        ("", ["v5e-16"]),
    ],
)
def test_the_message_for_an_unknown_accelerator_lists_the_nearest(name, hints):
    with pytest.raises(UserError) as raised:
        parse_accelerator(name)
    assert f"'{name}'" in str(raised.value)
    assert all(hint in str(raised.value) for hint in hints)
    assert "\n" not in str(raised.value)


def test_the_hosts_of_a_slice_have_all_its_chips():
    slices = {name: accelerator for name, accelerator in accelerators.ACCELERATORS.items() if accelerator.kind == "tpu"}
    # No two slices of a family have the same name.
    assert len(slices) == sum(len(topologies.split()) for *_, topologies in accelerators._TPUS.values())
    for name, accelerator in slices.items():
        assert parse_accelerator(name) == parse_accelerator(accelerator.gcloud) == accelerator
        chips = math.prod(map(int, accelerator.topology.split("x")))
        assert accelerator.hosts * accelerator.chips_per_host == chips
        *_, devices_per_chip, _ = accelerators._TPUS[accelerator.family]
        assert accelerator.devices == chips * devices_per_chip


@pytest.mark.parametrize(("family", "least"), [("v4", "v4-16"), ("v5e", "v5e-16"), ("v5p", "v5p-16"), ("7x", "7x-16")])
def test_the_smallest_slice_with_several_hosts(family, least):
    assert accelerators.smallest_multi_host_slice(family) == parse_accelerator(least)
