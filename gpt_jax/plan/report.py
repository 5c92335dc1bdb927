"""The report of a planned training run: memory, cycles by part of the model, collectives, modeled time, and the whole run.

    step = cycles / clock + the time of collectives that no other work overlaps

The cycles are the compiler's estimates for XLA's instructions plus the cycles of the Pallas kernels (kernel_schedules.py).
transfers.py models the time of collectives. docs/planning.md lists what this model leaves out.
"""

import collections
import functools
import importlib.metadata
from typing import Any

import jax.numpy as jnp

from gpt_jax.config import PretrainConfig
from gpt_jax.model.transformer import compute_dtype
from gpt_jax.plan.attribution import RECOMPUTED
from gpt_jax.plan.collectives import Collective
from gpt_jax.plan.costs import Costs, read_costs
from gpt_jax.plan.kernel_schedules import ATTENTION, Variant, find_schedule, kernel_cycles, libtpu_version
from gpt_jax.plan.kernels import Kernel
from gpt_jax.plan.program import Program
from gpt_jax.plan.report_file import REPORT_VERSION, Report
from gpt_jax.plan.transfers import Links, exposed_seconds
from gpt_jax.runtime.accelerators import Accelerator
from gpt_jax.runtime.chips import CHIPS
from gpt_jax.runtime.mesh import num_shards
from gpt_jax.train.choices import AUTOMATIC
from gpt_jax.train.flops import flops_per_token


def make_report(name: str, program: Program, accelerator: Accelerator, slices: int) -> Report:
    """Returns the report of a compiled step; `name` is the name of its config.

    Raises:
      TrainingError: a Pallas kernel of the program does not compile on its own.
    """
    config, mesh = program.config, program.mesh
    chip, costs = CHIPS[accelerator.device_kind], read_costs(program.text, mesh.shape)
    kernels = _KernelCycles(program, accelerator.device_kind)
    tokens = config.train.batch_size * config.model.context_length
    flops = flops_per_token(config.model) * tokens
    collectives = _collectives(costs, Links(mesh), kernels, chip.cycles_per_second)
    cycles = _cycles(costs, kernels)
    compute = sum(sum(part.values()) for part in cycles.values()) / chip.cycles_per_second
    exposed = sum(each["exposed_seconds"] for each in collectives)
    step = compute + exposed
    return {
        "version": REPORT_VERSION,
        "config": name,
        "accelerator": accelerator.name,
        "slices": slices,
        "chips": slices * accelerator.hosts * accelerator.chips_per_host,
        "device_kind": accelerator.device_kind,
        "devices": mesh.size,
        "versions": {"jax": importlib.metadata.version("jax"), "libtpu": libtpu_version()},
        "mesh": dict(mesh.shape),
        "choices": {field: getattr(config.model, field) for field in AUTOMATIC},
        "dtype": str(compute_dtype(config.model, "tpu")),
        "batch_size": config.train.batch_size,
        "micro_batches": config.train.grad_accum_steps,
        "sequences_per_device": config.train.batch_size // num_shards(mesh.shape, "batch"),
        "context_length": config.model.context_length,
        "num_parameters": config.model.num_parameters,
        "memory": {**program.memory, "available": chip.memory},
        "flops": {"token": flops_per_token(config.model), "step": flops},
        "cycles": cycles,
        "product_cycles": costs.by("kind").get(("product",), 0) + kernels.of_attention(costs),
        "cycles_of_xla": {" ".join(key): cycles for key, cycles in costs.by("part", "direction", "kind").items()},
        "recomputed_cycles": sum(part.get(RECOMPUTED, 0.0) for part in cycles.values()),
        "kernels": kernels.rows(costs),
        "collectives": collectives,
        "time": {
            "compute": compute,
            "exposed": exposed,
            "step": step,
            "tokens_per_second": tokens / step,
            "utilization": flops / step / (chip.peak_flops["bfloat16"] * mesh.size),
            "utilization_by_computation": flops / compute / (chip.peak_flops["bfloat16"] * mesh.size),
        },
        "duration": config.train.duration,
        "compile_seconds": program.seconds,
    }


class _KernelCycles:
    """The cycles that a program spends in Pallas kernels."""

    def __init__(self, program: Program, chip: str) -> None:
        self._config, self._chip, sizes = program.config, chip, program.mesh.shape
        self._heads = self._config.model.num_heads // num_shards(sizes, "heads")
        rows = self._config.train.batch_size // self._config.train.grad_accum_steps
        self._batch = rows // num_shards(sizes, "batch")
        self._find_schedule = functools.cache(find_schedule)  # It takes seconds if the table lacks the kernel.

    def call(self, kernel: Kernel) -> float:
        """Returns the cycles of one call."""
        variant = self._variant(self._config, kernel.name)
        return kernel_cycles(variant, self._batch, self._heads, kernel.bytes, self._find_schedule(variant))

    def of_attention(self, costs: Costs) -> float:
        """Returns the cycles of all calls of the attention kernels, which are products and work that overlaps with them."""
        return sum(kernel.times * self.call(kernel) for kernel in costs.kernels if kernel.name in ATTENTION)

    def rows(self, costs: Costs) -> list[dict[str, Any]]:
        """Returns the kernels, each with the number and the cycles of all its executions."""
        times: collections.Counter[str] = collections.Counter()
        cycles: collections.Counter[str] = collections.Counter()
        for kernel in costs.kernels:
            times[kernel.name] += kernel.times
            cycles[kernel.name] += round(kernel.times * self.call(kernel))
        return [{"name": name, "times": times[name], "cycles": count} for name, count in cycles.most_common()]

    def _variant(self, config: PretrainConfig, name: str) -> Variant:
        model, attention = config.model, name in ATTENTION
        rate = model.attention_dropout if attention else model.residual_dropout
        return Variant(
            name=name,
            chip=self._chip,
            libtpu=libtpu_version(),
            dtype=str(jnp.dtype(compute_dtype(model, "tpu"))),
            dropout=rate > 0 and name != "layer_norm_forward",  # The sum and its dropout are computed outside of that kernel.
            segments=False,
            time=model.context_length,
            dim=model.head_dim if attention else 0,
            lacks_head=attention and self._heads * model.head_dim % 128 > 0,
            embed=0 if attention else model.embed_dim,
        )


def _cycles(costs: Costs, kernels: _KernelCycles) -> dict[str, dict[str, float]]:
    """Returns the cycles by part and direction, kernels included, the most expensive part first."""
    parts: dict[str, dict[str, float]] = collections.defaultdict(lambda: collections.defaultdict(float))
    for (part, direction), cycles in costs.by("part", "direction").items():
        parts[part][direction] += cycles
    for kernel in costs.kernels:
        parts[kernel.part][kernel.direction] += kernel.times * kernels.call(kernel)
    ordered = sorted(parts.items(), key=lambda item: -sum(item[1].values()))
    return {part: {direction: round(cycles) for direction, cycles in by.items()} for part, by in ordered}


def _collectives(costs: Costs, links: Links, kernels: _KernelCycles, clock: float) -> list[dict[str, Any]]:
    """Returns the collectives, the longest first. Those that agree in all fields of `_named` are added up."""
    rows: dict[Any, dict[str, Any]] = {}
    for each in costs.collectives:
        seconds = links.seconds(each)
        overlap = each.overlap_cycles + sum(kernel.times * kernels.call(kernel) for kernel in each.overlap_kernels)
        key = each.kind, each.dtype, each.axes, each.part, each.direction, each.asynchronous
        row = rows.setdefault(key, _named(each) | {"times": 0, "bytes": 0, "seconds": 0.0, "exposed_seconds": 0.0})
        row["times"] += each.times
        row["bytes"] += each.times * each.bytes
        row["seconds"] += each.times * seconds
        row["exposed_seconds"] += each.times * exposed_seconds(each, seconds, overlap / clock)
    return sorted(rows.values(), key=lambda row: -row["seconds"])


def _named(collective: Collective) -> dict[str, Any]:
    fields = ("kind", "dtype", "axes", "part", "direction", "asynchronous")
    return {field: getattr(collective, field) for field in fields}
