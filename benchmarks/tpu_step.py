"""Cycles, memory and communication of the training step on TPUs, as their compiler sees them; no TPU is needed.

    python -m benchmarks.tpu_step gpt1 --topology v5e:4x4 --per-device 32
    python -m benchmarks.tpu_step gpt1 --topology v5e:2x2 --per-device 8 --set model.remat=off model.attention=plain
    python -m benchmarks.tpu_step gpt1_1b5 --topology v5e:16x16 --per-device 2 --out report.json --hlo program.hlo

The step is that of `lower_step`, compiled by libtpu (`pip install 'gpt_jax[tpu]'`), and the cycles are the compiler's own
estimates, with the exceptions that gpt_jax/plan/costs.py states. gpt1 takes two to three minutes on two cores, or about one with
`--set model.layer_unroll=1`.
"""

import argparse
import collections
import importlib.metadata
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from gpt_jax.arguments import Parser
from gpt_jax.config import PretrainConfig
from gpt_jax.config.load import apply_overrides, load_config
from gpt_jax.errors import TrainingError, UserError, one_line
from gpt_jax.inputs.numbers import POSITIVE, number
from gpt_jax.plan.collectives import Collective
from gpt_jax.plan.costs import Costs, read_costs
from gpt_jax.plan.kernels import Kernel
from gpt_jax.plan.topology import topology_devices
from gpt_jax.runtime.sharding import make_mesh
from gpt_jax.train.step import lower_step

MIB, GIB = 1 << 20, 1 << 30
MEMORY = ("argument", "output", "alias", "temp", "generated_code")
"""Kinds of memory in `compiled.memory_analysis()`."""


def main() -> int:
    """Compiles, prints the tables, and writes the files; returns the exit code, which is 2 after a user's mistake."""
    jax.config.update("jax_platforms", "cpu")  # Do not look for a TPU.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        options = _parser().parse_args()
        report, text = measure(options)
    except (UserError, TrainingError) as error:
        print(f"benchmarks.tpu_step: {error}", file=sys.stderr)
        return error.exit_code
    print(describe(report))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    if options.hlo:
        options.hlo.write_text(text)
    return 0


def measure(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Compiles the step; returns the report and the optimized HLO.

    Raises:
      UserError: an option is wrong.
      TrainingError: the program does not compile, for example because it does not fit the chip's memory.
    """
    devices = topology_devices(options.topology)
    config = load_config(options.config)
    if not isinstance(config, PretrainConfig):
        raise UserError(f"{options.config} is not a config for pre-training")
    batch = [f"--train.batch-size={options.per_device * len(devices)}"]
    config = apply_overrides(config, batch + [f"--{setting}" for setting in options.set], "benchmarks.tpu_step")
    mesh = make_mesh(config.mesh, devices)
    started = time.monotonic()
    lowered = lower_step(config, mesh)
    lowering = time.monotonic() - started
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise TrainingError(f"it does not compile for {options.topology}: {one_line(error)}") from None
    compiling = time.monotonic() - started - lowering
    text, memory = compiled.as_text(), compiled.memory_analysis()
    report = {
        "config": options.config,
        "set": options.set,
        "topology": options.topology,
        "device": devices[0].device_kind,
        "mesh": dict(mesh.shape),
        "batch_size": config.train.batch_size,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
        "lower_seconds": round(lowering, 1),
        "compile_seconds": round(compiling, 1),
        "memory_bytes": {name: getattr(memory, f"{name}_size_in_bytes") for name in MEMORY},
    }
    return report | _summary(read_costs(text, mesh.shape)), text


def _summary(costs: Costs) -> dict[str, Any]:
    """Returns the costs as tables, most expensive first."""
    parts: dict[str, dict[str, int]] = collections.defaultdict(dict)
    for (part,), cycles in costs.by("part").items():
        parts[part]["all"] = cycles
    for (part, direction, kind), cycles in costs.by("part", "direction", "kind").items():
        parts[part][f"{direction} {kind}"] = cycles
    return {
        "cycles": costs.cycles,
        "parts": parts,
        "collectives": _sum_collectives(costs.collectives),
        "kernels": _sum_kernels(costs.kernels),
        "top": [cost._asdict() for cost in sorted(costs.costs, reverse=True)[:40]],
    }


def _sum_collectives(collectives: Iterable[Collective]) -> list[dict[str, Any]]:
    """Returns one row for collectives that differ only in size and overlap, with the sums over all their executions."""
    groups: dict[Collective, list[Collective]] = collections.defaultdict(list)
    for each in collectives:
        groups[each._replace(bytes=0, times=0, overlap_cycles=0, overlap_kernels=())].append(each)
    rows = []
    for alike, members in groups.items():
        kernels = collections.Counter[str]()
        for each in members:
            for kernel in each.overlap_kernels:
                kernels[kernel.name] += each.times * kernel.times
        sums = {
            "bytes": sum(each.times * each.bytes for each in members),
            "times": sum(each.times for each in members),
            "overlap_cycles": sum(each.times * each.overlap_cycles for each in members),
            "overlap_kernels": dict(kernels),
        }
        rows.append(alike._asdict() | sums)
    return sorted(rows, key=lambda row: row["bytes"], reverse=True)


def _sum_kernels(kernels: Iterable[Kernel]) -> list[dict[str, Any]]:
    """Returns one row for kernels that differ only in their number of executions."""
    executions = collections.Counter[Kernel]()
    for each in kernels:
        executions[each._replace(times=0)] += each.times
    return [each._replace(times=times)._asdict() for each, times in executions.items()]


def describe(report: dict[str, Any]) -> str:
    """Returns a report's tables as text: cycles in millions, memory in GiB, transfers in MiB."""
    per_device = report["batch_size"] / (report["mesh"]["slice"] * report["mesh"]["data"] * report["mesh"]["fsdp"])
    mesh = " x ".join(f"{axis}={size}" for axis, size in report["mesh"].items() if size > 1)
    memory = ", ".join(f"{name} {size / GIB:.2f}" for name, size in report["memory_bytes"].items())
    lines = [
        f"{report['config']} {' '.join(report['set'])} on {report['topology']} ({report['device']}, {mesh}), "
        f"{per_device:g} sequences a device",
        f"jax {report['versions']['jax']}, libtpu {report['versions']['libtpu']}; lowered in {report['lower_seconds']} s, "
        f"compiled in {report['compile_seconds']} s",
        f"GiB: {memory}",
        f"{report['cycles'] / 1e6:9.2f} M cycles, without Pallas kernels and collectives",
    ]
    for part, cycles in report["parts"].items():
        detail = ", ".join(f"{name} {count / 1e6:.1f}" for name, count in cycles.items() if name != "all" and count >= 5e4)
        lines.append(f"{cycles['all'] / 1e6:9.2f} {part:10}  {detail}")
    lines.append("collectives: MiB in all, executions, kind, dtype, axes; what runs while asynchronous ones are under way")
    for each in report["collectives"]:
        what = f"{each['kind']} {each['dtype']} over {each['axes']} ({each['part']}, {each['direction']})"
        lines.append(f"{each['bytes'] / MIB:9.2f} {each['times']:4} {what}{_overlap(each) if each['asynchronous'] else ''}")
    lines.append("Pallas kernels: executions, name, MiB of arrays in one" if report["kernels"] else "no Pallas kernels")
    for each in report["kernels"]:
        lines.append(f"{each['times']:9} {each['name']} ({each['part']}, {each['direction']}) {each['bytes'] / MIB:.2f}")
    return "\n".join(lines)


def _overlap(collective: dict[str, Any]) -> str:
    kernels = "".join(f", {times} {name}" for name, times in collective["overlap_kernels"].items())
    return f", asynchronous beside {collective['overlap_cycles'] / 1e6:.2f} M cycles{kernels}"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="benchmarks.tpu_step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", help="a pre-training config")
    parser.add_argument("--topology", default="v5e:4x4", help="the slice, such as v5e:4x4, v5p:2x2x1 or v6e:2x4")
    parser.add_argument("--per-device", type=number(int, POSITIVE), default=32, help="sequences for each device (32)")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="config fields, such as model.remat=off")
    parser.add_argument("--out", type=Path, help="file for the whole report, as JSON")
    parser.add_argument("--hlo", type=Path, help="file for the optimized HLO")
    return parser


if __name__ == "__main__":
    sys.exit(main())
