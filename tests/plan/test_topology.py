"""Devices of absent TPUs have the kinds that `CHIPS` lists; a wrong name and a missing libtpu are errors in one line."""

import importlib.util

import jax
import pytest
from jax.experimental import topologies

from gpt_jax.errors import UserError
from gpt_jax.plan.topology import topology_devices
from gpt_jax.runtime.chips import CHIPS


@pytest.mark.parametrize(
    ("name", "number", "kind"), [("v5e:2x2", 4, "TPU v5 lite"), ("v5p:2x2x1", 4, "TPU v5"), ("v6e:2x4", 8, "TPU v6 lite")]
)
def test_devices_of_absent_slices(tpu_devices, name, number, kind):
    devices = tpu_devices(name)
    assert len(devices) == number
    assert {device.device_kind for device in devices} == {kind} <= CHIPS.keys()


@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "v5e:9x9", "two\nlines"])
def test_an_unknown_topology_is_an_error(tpu_devices, name):
    with pytest.raises(UserError, match=r"libtpu knows no topology .* \(names are like v5e:4x4, v5p:2x2x1, ") as caught:
        tpu_devices(name)
    assert "\n" not in str(caught.value)


def test_without_libtpu_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'gpt_jax\[tpu\]'"):
        topology_devices("v5e:2x2")


def test_a_lock_of_another_process_is_named(monkeypatch):
    def locked(*arguments, **options):
        message = 'ABORTED: Internal error when accessing libtpu multi-process lockfile. Run "$ sudo rm /tmp/libtpu_lockfile".'
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(topologies, "get_topology_desc", locked)
    with pytest.raises(
        UserError, match=r"^another process .* has locked libtpu; set ALLOW_MULTIPLE_LIBTPU_LOAD=1, or wait until"
    ):
        topology_devices("v5e:2x2")
