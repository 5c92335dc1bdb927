"""The report of a planned program: memory, cycles by part of the model, collectives, modeled time, and the whole run.

    step = cycles / clock + the time of collectives that no other work overlaps

The cycles are the compiler's estimates for XLA's instructions plus the cycles of the Pallas kernels (kernel_schedules.py).
transfers.py models the time of collectives. docs/planning.md lists what this model leaves out.
"""

import collections
import functools
import importlib.metadata
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

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
from gpt_jax.train.memory_estimate import step_memory

PROMPTS, NEW_TOKENS = "prompts", "tokens"
"""The directions of generation: the pass over the prompts, and the loop over the new tokens."""


def make_report(name: str, program: Program, accelerator: Accelerator, slices: int) -> Report:
    """Returns the report of a compiled program; `name` is the name of its config.

    Raises:
      TrainingError: a Pallas kernel of the program does not compile on its own.
    """
    workload, mesh = program.workload, program.mesh
    config, chip = workload.config, CHIPS[accelerator.device_kind]
    costs = read_costs(program.text, mesh.shape, workload.new_tokens or None)
    kernels = _KernelCycles(program, accelerator.device_kind)
    tokens = workload.rows * (workload.new_tokens or workload.length)
    estimate, prompts = _estimate(costs, mesh, kernels, chip.cycles_per_second), 0.0
    if workload.new_tokens:
        before = _estimate(read_costs(program.text, mesh.shape, 0), mesh, kernels, chip.cycles_per_second)
        estimate, prompts = _split(estimate, before), before.compute + before.exposed
    step = estimate.compute + estimate.exposed
    return {
        "version": REPORT_VERSION,
        **workload.shape,
        "model": config.model.kind,
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
        "sequences_per_device": workload.rows // (1 if workload.verb == "generate" else num_shards(mesh.shape, "batch")),
        "num_parameters": config.model.num_parameters,
        "memory": {**program.memory, "activations": _activations(program), "available": chip.program_memory},
        "flops": {"token": workload.flops / tokens, "step": workload.flops},
        "cycles": estimate.cycles,
        "product_cycles": costs.by("kind").get(("product",), 0) + kernels.of_attention(costs),
        "cycles_of_xla": {" ".join(key): cycles for key, cycles in costs.by("part", "direction", "kind").items()},
        "recomputed_cycles": sum(part.get(RECOMPUTED, 0.0) for part in estimate.cycles.values()),
        "kernels": kernels.rows(costs),
        "collectives": estimate.collectives,
        "links": {"inside": chip.link_bandwidth / (4 * chip.torus), "between_slices": chip.slice_bandwidth},
        "time": {
            "compute": estimate.compute,
            "exposed": estimate.exposed,
            "step": step,
            "prompts": prompts,
            "tokens_per_second": tokens / (step - prompts),
            "utilization": workload.flops / step / (chip.peak_flops["bfloat16"] * mesh.size),
            "utilization_by_computation": workload.flops / estimate.compute / (chip.peak_flops["bfloat16"] * mesh.size),
        },
        "duration": "" if workload.verb == "generate" else config.train.duration,
        "compile_seconds": program.seconds,
    }


def _activations(program: Program) -> int:
    """Returns the estimated bytes of activations among the temporaries; 0 if there is no estimate."""
    step, workload = program.workload.as_pretraining, program.workload
    if workload.verb == "generate" or step.model.kind != "transformer":
        return 0
    kept = step_memory(step, program.mesh.shape, "tpu", step.model.remat).activations
    return min(kept, program.memory["temporaries"])


class _Estimate(NamedTuple):
    """The modeled costs of one execution of a program."""

    cycles: dict[str, dict[str, float]]
    """Cycles by part and direction."""
    collectives: list[dict[str, Any]]
    compute: float
    """Time of the cycles in seconds."""
    exposed: float
    """Time of waiting for collectives in seconds."""


def _estimate(costs: Costs, mesh: Mesh, kernels: "_KernelCycles", clock: float) -> _Estimate:
    cycles, collectives = _cycles(costs, kernels), _collectives(costs, Links(mesh), kernels, clock)
    compute = sum(sum(part.values()) for part in cycles.values()) / clock
    return _Estimate(cycles, collectives, compute, sum(each["exposed_seconds"] for each in collectives))


def _split(total: _Estimate, prompts: _Estimate) -> _Estimate:
    """Returns the estimate of a generation, with the cycles of each part split into those for prompts and for new tokens."""
    cycles = {}
    for part, by_direction in total.cycles.items():
        before = sum(prompts.cycles.get(part, {}).values())
        cycles[part] = {PROMPTS: before, NEW_TOKENS: sum(by_direction.values()) - before}
    return total._replace(cycles=cycles)


class _KernelCycles:
    """The cycles that a program spends in Pallas kernels."""

    def __init__(self, program: Program, chip: str) -> None:
        self._workload, self._chip, sizes = program.workload, chip, program.mesh.shape
        self._heads = self._workload.config.model.num_heads // num_shards(sizes, "heads")
        self._batch = self._workload.rows // self._workload.micro_batches // num_shards(sizes, "batch")
        self._find_schedule = functools.cache(find_schedule)  # It takes seconds if the table lacks the kernel.

    def call(self, kernel: Kernel) -> float:
        """Returns the cycles of one call."""
        variant = self._variant(kernel.name)
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

    def _variant(self, name: str) -> Variant:
        model, attention = self._workload.config.model, name in ATTENTION
        rate = model.attention_dropout if attention else model.residual_dropout
        return Variant(
            name=name,
            chip=self._chip,
            libtpu=libtpu_version(),
            dtype=str(jnp.dtype(compute_dtype(model, "tpu"))),
            dropout=rate > 0 and name != "layer_norm_forward",  # The sum and its dropout are computed outside of that kernel.
            segments=False,
            time=self._workload.length,
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
