"""Freed memory is kept for the next arrays on CPUs."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp
from gpt_jax.runtime.environment import require_devices

if sys.argv[1] == "kept":
    require_devices()
step = jax.jit(lambda x: jnp.outer(x, x).at[0].add(1))  # a result of 34 MiB
x = jnp.ones(3000)
for _ in range(2):
    step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    step(x).block_until_ready()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / (50 * 4 * 3000**2))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="keeps memory of glibc only")
def test_a_step_reuses_the_memory_of_the_one_before():
    """The share of a step's memory that the system had to supply."""
    share = {
        mode: float(subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, check=True).stdout)
        for mode in ("kept", "returned")
    }
    assert share["returned"] > 0.95
    assert share["kept"] < 0.75
