"""Cycles of the Pallas kernels on TPUs, from the schedules that libtpu writes; no TPU is needed.

A TensorCore issues one bundle of instructions in a cycle, in the order of the program. The scheduled bundles of one grid point
times the number of grid points are therefore close to the time in the core. A kernel takes the largest of

    bundles    scheduled bundles
    pops       8 cycles for each register that is read from a matrix unit, divided by 4 matrix units (not counted on TPU7x)
    bytes      the bytes of its arrays, each read or written once, divided by the bandwidth of the memory

If a sequence consists of n > 1 blocks, the attention kernels contain a loop over other blocks, with 0 to n - 1 iterations for
each block. The bundles in the loop therefore count (n - 1) / 2 times.

Compiling a kernel for its schedule takes some five seconds, in a process of its own. `TABLE` has the schedules for the configs
that come with the project; benchmarks/tpu_kernels.py writes it. An entry is valid for one version of libtpu and one version of
the kernel's source code.
"""

import ast
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gpt_jax.errors import TrainingError
from gpt_jax.model import dropout
from gpt_jax.model.kernels import tpu, tpu_layer_norm, tpu_tiles
from gpt_jax.plan.topology import ONE_HOST, topology_devices
from gpt_jax.runtime.chips import CHIPS

ATTENTION, LAYER_NORM = ("attention_forward", "attention_backward"), ("layer_norm_forward", "layer_norm_backward")
"""The names of the kernels in a program."""
SOURCES = dict.fromkeys(ATTENTION, (dropout, tpu, tpu_tiles)) | dict.fromkeys(LAYER_NORM, (dropout, tpu_layer_norm))
"""The modules that define the program of each kernel."""
TABLE = Path(__file__).with_name("kernel_schedules.json")
"""Known schedules: a list of objects with the fields of `Variant` and `Schedule`, and the digest of the source."""
RATE = 0.1
"""The dropout rate with which kernels are compiled. It is only a number in their programs and does not change the schedule."""


class Variant(NamedTuple):
    """A kernel, with everything that its schedule depends on other than its source code."""

    name: str
    chip: str
    """The `device_kind` in JAX."""
    libtpu: str
    """The version of libtpu."""
    dtype: str
    dropout: bool
    segments: bool
    """Whether sequences consist of several examples; False for layer norms."""
    time: int
    """Tokens in a sequence."""
    dim: int
    """Size of a head; 0 for layer norms."""
    lacks_head: bool
    """Whether the last group of heads is not full; False for layer norms."""
    embed: int
    """Width of the residual stream; 0 for attention."""


class Schedule(NamedTuple):
    """Counts for one grid point."""

    bundles: float
    pops: float
    """Number of registers that are read from the matrix units."""


def kernel_cycles(kernel: Variant, batch: int, heads: int, size: int, schedule: Schedule) -> float:
    """Returns the cycles of one call on a device.

    Args:
      batch: sequences on the device.
      heads: attention heads on the device.
      size: bytes of the operands and results.
      schedule: the schedule of the kernel.
    """
    chip = CHIPS[kernel.chip]
    if kernel.name in ATTENTION:
        config = _kernel_config(kernel, heads)
        points = batch * config.groups * (config.time // config.block)
    else:
        points = batch * (kernel.time // tpu_layer_norm.block_rows(kernel.time, kernel.embed, jnp.dtype(kernel.dtype).itemsize))
    in_memory = size / chip.memory_bandwidth * chip.cycles_per_second
    return max(schedule.bundles * points / chip.cores, 2 * schedule.pops * points / chip.cores, in_memory)


def find_schedule(kernel: Variant) -> Schedule:
    """Returns the schedule of a kernel from the table, or else from compiling the kernel.

    Raises:
      TrainingError: the kernel does not compile.
    """
    return read_table().get(kernel) or compile_schedule(kernel)


@functools.cache
def read_table(all_sources: bool = False) -> Mapping[Variant, Schedule]:
    """Returns the table's entries for the current source code of the kernels, or with `all_sources` all entries."""
    rows = json.loads(TABLE.read_text()) if TABLE.exists() else []
    chosen = (row for row in rows if all_sources or row["source"] == source_hash(row["name"]))
    return {Variant(*(row[key] for key in Variant._fields)): Schedule(row["bundles"], row["pops"]) for row in chosen}


def write_table(schedules: Mapping[Variant, Schedule]) -> None:
    """Writes the table, one line for each kernel."""
    rows = [{**k._asdict(), **s._asdict(), "source": source_hash(k.name)} for k, s in sorted(schedules.items())]
    TABLE.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    read_table.cache_clear()


@functools.cache
def source_hash(name: str) -> str:
    """Returns a digest of the source code of a kernel, without comments and docstrings."""
    code = ""
    for module in SOURCES[name]:
        tree = ast.parse(Path(module.__file__ or "").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                node.body = [line for line in node.body if not _is_text(line)] or [ast.Pass()]
        code += ast.unparse(tree)
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def libtpu_version() -> str:
    return importlib.metadata.version("libtpu")


# -- compilation in a process of its own --------------------------------------------------------------------------------------


def compile_schedule(kernel: Variant) -> Schedule:
    """Compiles a kernel, and returns the counts of its schedule for one grid point.

    Raises:
      TrainingError: the kernel does not compile.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_hlo_text=true --xla_jf_dump_llo_text=true"
        command = [sys.executable, "-m", "gpt_jax.plan.kernel_schedules", json.dumps(kernel)]
        environment = os.environ | {"LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
        if done.returncode:
            reason = (done.stderr.strip() or "no message").splitlines()[-1]
            raise TrainingError(f"the kernel {kernel.name} does not compile for a {kernel.chip}: {reason}")
        names = Path(folder).glob(f"*-{kernel.name}*-final_bundles.txt")
        [program] = [path for path in names if "schedule-analysis" not in path.name]
        config = _kernel_config(kernel, heads=1)
        return count(program.read_text(), (config.time // config.block - 1) / 2)


def count(program: str, loop_trips: float) -> Schedule:
    """Counts the bundles of a grid point, and the registers that they read from the matrix units.

    Args:
      program: the text of the final bundles. Each begins with its address and one ">" for each loop around it; the outermost loop
        is the one over the grid.
      loop_trips: mean trip count of the kernel's own loop.
    """
    bundles, pops, times = 0.0, 0.0, 1.0
    for line in program.splitlines():
        if bundle := re.match(r"\s*0x[0-9a-f]+\s+(?:\w+)?\s*: (>*)", line):
            times = loop_trips if len(bundle[1]) > 1 else 1.0
            bundles += times
        pops += times * len(re.findall(r"\bvpop\.f32\.mr[fb]\.", line))
    return Schedule(bundles, pops)


def _kernel_config(kernel: Variant, heads: int) -> tpu_tiles.KernelConfig:
    time, rate = kernel.time + -kernel.time % tpu_tiles.LANES, RATE * kernel.dropout
    return tpu_tiles.KernelConfig(time, heads, kernel.dim or 128, rate, kernel.segments, jax.lax.Precision.HIGHEST)


def _compile(kernel: Variant) -> None:
    """Compiles a kernel in this process, whose environment tells libtpu where to write the schedule."""
    sharding = jax.sharding.SingleDeviceSharding(topology_devices(ONE_HOST[kernel.chip])[0])
    array = lambda config, dtype=kernel.dtype: jax.ShapeDtypeStruct(config, dtype, sharding=sharding)  # noqa: E731
    group = tpu_tiles.LANES // (kernel.dim or 128)
    # Several sequences and groups, because the compiler simplifies loops of one iteration.
    batch, config = 2, _kernel_config(kernel, heads=3 * group - kernel.lacks_head)
    width = kernel.embed or config.heads * config.dim
    rows, vector, qkv = array((batch, config.time, width)), array((width,), "float32"), array((batch, 3, config.time, width))
    words = array((batch, config.groups, 1, 2 * config.in_group), "uint32")
    segments = array((batch, 1, config.time), "int32") if kernel.segments else None
    logarithms = array((batch, config.groups, config.in_group, config.time), "float32")
    stream = array((batch, 2), "uint32") if kernel.dropout else None
    options = tpu_layer_norm.Options(1e-5, RATE * kernel.dropout)
    calls: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "attention_forward": (functools.partial(tpu.forward, config), (qkv, words, segments)),
        "attention_backward": (functools.partial(tpu.backward, config), (qkv, words, segments, rows, logarithms, rows)),
        "layer_norm_forward": (functools.partial(tpu_layer_norm.normalize, epsilon=1e-5), (rows, vector, vector)),
        "layer_norm_backward": (functools.partial(tpu_layer_norm.differentiate, options), (rows, stream, vector, rows)),
    }
    function, arguments = calls[kernel.name]
    jax.jit(function).lower(*arguments).compile()


if __name__ == "__main__":
    _compile(Variant(*json.loads(sys.argv[1])))
