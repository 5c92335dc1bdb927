"""Freed memory is kept for the next arrays on CPUs, or returned on request."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="keeps memory of glibc only")

STEPS = """
import os, resource, sys
os.environ["JAX_PLATFORMS"] = "cpu"
from gpt_jax.runtime.environment import require_devices

if sys.argv[1] == "kept":
    require_devices()
import jax, jax.numpy as jnp

step = jax.jit(lambda x: jnp.outer(x, x).at[0].add(1))  # a result of 100 MB
x = jnp.ones(5000)
for _ in range(2):
    step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(60):
    step(x).block_until_ready()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / (60 * 4 * 5000**2))
"""


def run(program, *words):
    """Returns the number that a program prints."""
    return float(subprocess.run([sys.executable, "-c", program, *words], capture_output=True, check=True).stdout)


def test_a_step_reuses_the_memory_of_the_one_before():
    """The share of a step's memory that the system had to supply."""
    assert run(STEPS, "returned") > 0.95
    assert run(STEPS, "kept") < 0.3


RELEASE = """
import os
os.environ["JAX_PLATFORMS"] = "cpu"
from gpt_jax.runtime import memory
from gpt_jax.runtime.environment import require_devices

require_devices()
import jax.numpy as jnp

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (4 * 5000**2)

hole, kept = jnp.ones(5000**2).block_until_ready(), jnp.ones(5000).block_until_ready()
del hole
before = resident()
memory.return_freed_memory()
print(before - resident())
"""


def test_memory_is_returned_on_request():
    assert run(RELEASE) > 0.9
