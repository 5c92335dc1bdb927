"""Cycles of the Pallas kernels in a training step on TPUs, from the schedules that their compiler writes; no TPU is needed.

    python -m benchmarks.tpu_kernels --topology v5e:2x2
    python -m benchmarks.tpu_kernels --topology v5p:2x2x1 --time 512 --heads 12 --dim 64 --batch 32 --embed 768 --out FILE

A core issues one bundle of instructions in a cycle, in the order of the program, so the scheduled bundles of one grid point times
the number of grid points are close to the time in the core. A kernel takes the largest of

    bundles    scheduled bundles
    pops       8 cycles for each register that is read from a matrix unit, divided by 4 matrix units
    bytes      its arrays, read and written once, over the bandwidth of the memory

The attention kernels of sequences of more than 512 tokens loop over blocks of keys or queries. A block has from 0 to n - 1
others to visit, so the bundles of this loop count (n - 1) / 2 times. Each kernel is compiled in a process of its own, which takes
some five seconds.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax.arguments import Parser
from gpt_jax.errors import UserError
from gpt_jax.inputs.numbers import POSITIVE, number
from gpt_jax.model.kernels.tpu_attention import refusal
from gpt_jax.model.kernels.tpu_tiles import LANES
from gpt_jax.plan.topology import topology_devices
from gpt_jax.runtime.chips import CHIPS

FLOPS_PER_CYCLE = {"TPU v4": 262_144, "TPU v5 lite": 131_072, "TPU v5": 262_144, "TPU v6 lite": 524_288}
"""Peak number of bfloat16 multiplications and additions that a device does in a cycle, according to the compiler's estimates. The
published peak in FLOP/s divided by this number is the clock rate. TPU7x is missing, so its kernels have no count of bytes."""
CORES = {"TPU v4": 2, "TPU v5": 2}
"""Cores that divide the grid, for chips with several."""
KERNELS = ("attention_forward", "attention_backward", "layer_norm_forward", "layer_norm_backward")


class Sizes(NamedTuple):
    """The shapes on one device."""

    batch: int
    time: int
    heads: int
    dim: int
    rate: float
    segments: bool
    dtype: str

    @property
    def embed(self) -> int:
        """Width of the residual stream."""
        return self.heads * self.dim


def main() -> int:
    """Prints a table; returns the exit code, which is 2 after a user's mistake."""
    try:
        options = _parser().parse_args()
        if options.compile:
            _compile(options.compile, options.topology, Sizes(*json.loads(options.sizes)))
            return 0
        rows = measure(options)
    except UserError as error:
        print(f"benchmarks.tpu_kernels: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{options.topology}, {options.batch} x {options.time} tokens, {options.heads} heads of {options.dim}, {options.dtype}")
    print("thousand cycles of one call, and for attention bundles for each head and sequence")
    print(f"{'kernel':20} {'dropout':>7} {'bundles':>8} {'pops':>8} {'bytes':>8} {'cycles':>8} {'a head':>7}")
    for row in rows:
        columns = " ".join(f"{row[name] / 1e3:8.1f}" for name in ("bundles", "pops", "bytes", "cycles"))
        print(
            f"{row['kernel']:20} {row['rate']:7} {columns} {row['per_head']:7.0f}"
            if row["per_head"]
            else f"{row['kernel']:20} {row['rate']:7} {columns}"
        )
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the cycles of each kernel without dropout and at the given rate.

    Raises:
      UserError: the kernels do not take the sizes, the topology is unknown, or the compiler refuses a kernel.
    """
    if options.time % LANES:
        raise UserError(f"--time: must be a multiple of {LANES}, not {options.time}")
    if reason := refusal(options.dim, options.time, options.dtype):
        raise UserError(f"--dim: {reason}")
    topology_devices(options.topology)  # An unknown one is an error here.
    rows = []
    for kernel in KERNELS:
        rates = [0.0] if kernel == "layer_norm_forward" else [0.0, options.rate]
        for rate in rates:
            sizes = Sizes(options.batch, options.time, options.heads, options.dim, rate, options.segments, options.dtype)
            rows.append(measure_kernel(kernel, options.topology, sizes))
    return rows


def measure_kernel(kernel: str, topology: str, sizes: Sizes) -> dict[str, Any]:
    """Compiles one kernel and returns its cycles in one call.

    Raises:
      UserError: it does not compile.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_hlo_text=true --xla_jf_dump_llo_text=true"
        command = [sys.executable, "-m", "benchmarks.tpu_kernels", "--topology", topology, "--compile", kernel]
        environment = os.environ | {"LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run([*command, "--sizes", json.dumps(sizes)], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{kernel} does not compile for {topology}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
        compiled = json.loads(done.stdout)
        [program] = [path for path in Path(folder).glob(f"*-{kernel}*-final_bundles.txt") if "schedule-analysis" not in path.name]
        bundles, pops = _count(program.read_text(), compiled["loop_trips"])
    kind = compiled["device_kind"]
    points = compiled["grid_points"] / CORES.get(kind, 1)
    clock = CHIPS[kind].peak_flops["bfloat16"] / FLOPS_PER_CYCLE[kind] if kind in FLOPS_PER_CYCLE else 0.0
    counts = {
        "bundles": bundles * points,
        "pops": 8 * pops / 4 * points,
        "bytes": compiled["bytes"] / CHIPS[kind].memory_bandwidth * clock,
    }
    per_head = bundles * compiled["grid_points"] / (sizes.batch * sizes.heads) if kernel.startswith("attention") else 0
    return {"kernel": kernel, "rate": sizes.rate, **counts, "cycles": max(counts.values()), "per_head": per_head}


def _count(program: str, loop_trips: float) -> tuple[float, float]:
    """Returns the bundles of one grid point, and how many registers they read from the matrix units.

    Args:
      program: the text of the final bundles. Each begins with its address and one ">" for each loop around it; the outermost loop
        is that over the grid.
      loop_trips: trip count of the kernel's own loop.
    """
    bundles, pops, times = 0.0, 0.0, 1.0
    for line in program.splitlines():
        if bundle := re.match(r"\s*0x[0-9a-f]+\s+(?:\w+)?\s*: (>*)", line):
            times = loop_trips if len(bundle[1]) > 1 else 1.0
            bundles += times
        pops += times * len(re.findall(r"\bvpop\.f32\.mr[fb]\.", line))
    return bundles, pops


def _compile(kernel: str, topology: str, sizes: Sizes) -> None:
    """Compiles a kernel in this process, and prints the device kind, grid points, mean trip count of its loop, and bytes."""
    import jax
    import jax.numpy as jnp

    from gpt_jax.model.kernels import tpu, tpu_layer_norm
    from gpt_jax.model.kernels.tpu_tiles import Shape

    device = topology_devices(topology)[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    array = lambda shape, dtype=sizes.dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)  # noqa: E731
    batch, time, embed = sizes.batch, sizes.time, sizes.embed
    shape = Shape(time, sizes.heads, sizes.dim, sizes.rate, sizes.segments, jax.lax.Precision.HIGHEST)
    rows, vector = array((batch, time, embed)), array((embed,), "float32")
    words = array((batch, shape.groups, 1, 2 * shape.in_group), "uint32")
    segments = array((batch, 1, time), "int32") if sizes.segments else None
    qkv, logarithms = array((batch, 3, time, embed)), array((batch, shape.groups, shape.in_group, time), "float32")
    options = tpu_layer_norm.Options(1e-5, sizes.rate)
    calls: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "attention_forward": (lambda *arrays: tpu.forward(shape, *arrays), (qkv, words, segments)),
        "attention_backward": (lambda *arrays: tpu.backward(shape, *arrays), (qkv, words, segments, rows, logarithms, rows)),
        "layer_norm_forward": (lambda *arrays: tpu_layer_norm.normalize(*arrays, epsilon=1e-5), (rows, vector, vector)),
        "layer_norm_backward": (
            lambda *arrays: tpu_layer_norm.differentiate(options, *arrays),
            (rows, array((batch, 2), "uint32") if sizes.rate else None, vector, rows),
        ),
    }
    function, arguments = calls[kernel]
    traced = jax.jit(function).trace(*arguments)
    [call] = [equation for equation in _equations(traced.jaxpr.jaxpr) if equation.primitive.name == "pallas_call"]
    traced.lower().compile()
    # Queries, keys and values are in one array, and the kernel takes it as three arguments and reads a third of it through each.
    repeated = 2 * math.prod(qkv.shape) * jnp.dtype(sizes.dtype).itemsize if kernel.startswith("attention") else 0
    size = sum(math.prod(x.aval.shape) * x.aval.dtype.itemsize for x in [*call.invars, *call.outvars]) - repeated
    points = math.prod(call.params["grid_mapping"].grid)
    loop_trips = (time // shape.block - 1) / 2
    print(json.dumps({"device_kind": device.device_kind, "grid_points": points, "loop_trips": loop_trips, "bytes": size}))


def _equations(jaxpr: Any) -> Any:
    """Yields the equations of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", None)
            if inner is not None and equation.primitive.name != "pallas_call":
                yield from _equations(getattr(inner, "jaxpr", inner))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="benchmarks.tpu_kernels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--topology", default="v5e:2x2", help="a slice of the chips, such as v5e:2x2, v5p:2x2x1 or v6e:2x2")
    for name, default, text in (
        ("batch", 32, "sequences on each device"),
        ("time", 512, "tokens in a sequence"),
        ("heads", 12, "attention heads"),
        ("dim", 64, "size of a head"),
    ):
        parser.add_argument(f"--{name}", type=number(int, POSITIVE), default=default, help=f"{text} ({default})")
    parser.add_argument("--rate", type=float, default=0.1, help="dropout rate to measure in addition to 0 (0.1)")
    parser.add_argument("--segments", action="store_true", help="several examples in a sequence")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--out", type=Path, help="file for the table, as JSON")
    parser.add_argument("--compile", choices=KERNELS, help=argparse.SUPPRESS)
    parser.add_argument("--sizes", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
