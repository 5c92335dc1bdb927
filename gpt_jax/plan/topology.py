"""Devices of TPU slices that are not attached. Any machine can compile for them, because libtpu contains the compiler."""

import importlib.util
import os
from typing import Any

import jax
from jax.experimental import topologies

from gpt_jax.errors import UserError, one_line

ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # Otherwise only one process on a machine could load libtpu at a time.
    "TPU_SKIP_MDS_QUERY": "1",  # Only TPU VMs have the metadata server that libtpu would wait for.
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",  # Topologies do not depend on it, but libtpu logs a warning if it is unknown.
}
"""Environment variables that libtpu needs on a machine without TPUs. Variables that are already set keep their values."""

EXAMPLES = "v5e:4x4, v5p:2x2x1, v6e:2x4, v4:2x2x1 or tpu7x:2x2x1"

ONE_HOST = {
    "TPU v4": "v4:2x2x1",
    "TPU v5 lite": "v5e:2x2",
    "TPU v5": "v5p:2x2x1",
    "TPU v6 lite": "v6e:2x2",
    "TPU7x": "tpu7x:2x2x1",
}
"""A topology with one host for each kind of chip."""


def topology_devices(name: str, slices: int = 1) -> list[jax.Device]:
    """Returns the devices of one or more slices, to make a mesh to compile for. They cannot run anything.

    The function loads libtpu into this process but does not look for TPUs, and therefore works on machines without any. JAX
    cannot read programs for such devices back from its compilation cache, and logs a warning at each attempt.

    Args:
      name: the generation and the number of chips along each axis of a slice, such as "v5e:4x4" or "v5p:2x2x1".
      slices: number of slices.

    Raises:
      UserError: libtpu is not installed, is locked by another process, or does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for TPUs that are not attached needs libtpu: pip install 'gpt_jax[tpu]'")
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    generation, _, chips = name.partition(":")
    if generation == "v4":
        options["chip_config_name"] = "megacore"  # Both cores of a chip are one device, as on hosts with TPUs.
    elif chips in ("1x1", "1x1x1", "2x4"):  # These slices have one host.
        options["chips_per_host_bounds"] = (*map(int, chips.split("x")), 1)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if "lockfile" in str(error):
            hint = "set ALLOW_MULTIPLE_LIBTPU_LOAD=1, or wait until it has ended"
            raise UserError(f"another process on this machine has locked libtpu; {hint}") from None
        raise UserError(f"libtpu knows no topology {name!r} (names are like {EXAMPLES}): {one_line(error)}") from None
