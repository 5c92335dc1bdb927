"""The modeled and the measured time of a pre-training step on the attached devices, by part of the model.

On CPUs and GPUs, the model is `roofline.estimate`; on TPUs, it is the report of `gpt-jax plan`. The step that is measured is the
one that `gpt-jax pretrain` runs, on random tokens.
"""

import collections
import importlib.metadata
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gpt_jax.config import PretrainConfig
from gpt_jax.errors import TrainingError, UserError, field_error, one_line, require
from gpt_jax.plan.attribution import part_of
from gpt_jax.plan.rates import find_rates
from gpt_jax.plan.roofline import estimate
from gpt_jax.runtime.chips import GIB
from gpt_jax.runtime.console import say
from gpt_jax.runtime.environment import check_variables, require_devices
from gpt_jax.runtime.mesh import check_batch, check_model
from gpt_jax.runtime.processor import OtherLoad, num_cores, processor_name
from gpt_jax.runtime.sharding import host_rows, make_mesh, place_batch
from gpt_jax.train.choices import choose_for
from gpt_jax.train.flops import flops_per_token
from gpt_jax.train.memory_estimate import check_remat
from gpt_jax.train.profile import find_scopes, operations
from gpt_jax.train.step import init_state, lower_step

STEPS, SECONDS = (5, 50), 10.0
"""Least and greatest number of steps that are timed, and the time after which no more than the least number is."""
TRACED = 3
"""Number of steps that are traced to find the time of each part."""
Event = tuple[str, float, float]
"""Name, start and end of an operation, the latter in any unit."""


def measure(name: str, config: PretrainConfig) -> dict[str, Any]:
    """Runs the training step on the attached devices; returns its modeled and its measured time.

    Args:
      name: name of the config, for the text.

    Returns:
      Seconds: `measured` (the median), `fastest`, `slowest`, and `modeled` with its `error` relative to the median. `parts` has
      the modeled and the measured seconds of each part of the model, or nothing if a trace does not name the operations.
      `unmodeled` counts the instructions whose time is not modeled, by kind. `flops` are those of the products according to the
      program, and `expected_flops` those of the formula. `other_load` and `rates_load` are the mean numbers of cores that
      other programs used during the steps and while the rates were measured, or None if they are not known.

    Raises:
      UserError: the mesh does not divide the devices, the batch or the model, or the step does not fit into the memory.
      TrainingError: the step does not compile or run.
    """
    check_variables()
    require_devices()
    mesh = make_mesh(config.mesh)
    check_batch(mesh.shape, config.train.batch_size, config.train.grad_accum_steps)
    check_model(mesh.shape, config.model)
    config, device = choose_for(config, mesh), mesh.devices.flat[0]
    check_remat(config, mesh.shape, device.platform, device.device_kind)
    try:
        compiled = lower_step(config, mesh, total_steps=1_000_000).compile()
        _check_memory(compiled, device.platform)
        modeled = _model(name, config, mesh, compiled.as_text() or "")
        times, parts, other_load = _run(compiled, config, mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise field_error("measure", f"the step does not fit into the memory: {one_line(error)}") from None
        raise TrainingError(f"the step does not run on this machine: {one_line(error)}") from None
    measured = statistics.median(times)
    tokens = config.train.batch_size * config.model.context_length
    return {
        "config": name,
        "device": processor_name() if device.platform == "cpu" else device.device_kind,
        "cores": num_cores() if device.platform == "cpu" else None,
        "devices": mesh.size,
        "jax": importlib.metadata.version("jax"),
        "batch_size": config.train.batch_size,
        "context_length": config.model.context_length,
        "num_parameters": config.model.num_parameters,
        "steps": len(times),
        "measured": measured,
        "fastest": min(times),
        "slowest": max(times),
        "modeled": modeled["seconds"],
        "error": modeled["seconds"] / measured - 1,
        "parts": compare_parts(modeled["parts"], parts, measured),
        "unmodeled": modeled["unmodeled"],
        "flops": modeled["flops"],
        "expected_flops": flops_per_token(config.model) * tokens,
        "tokens_per_second": tokens / measured,
        "other_load": other_load,
        "rates_load": modeled["rates_load"],
    }


def _model(name: str, config: PretrainConfig, mesh: Mesh, text: str) -> dict[str, Any]:
    """Returns the modeled seconds of the compiled step, in all and by part, its FLOPs, and what is not modeled."""
    device = mesh.devices.flat[0]
    if device.platform == "tpu":
        return _model_tpu(name, config, mesh, text)
    rates = find_rates(say)
    found = estimate(text, rates)
    # The devices of a CPU share its cores.
    shared = mesh.size if device.platform == "cpu" else 1
    parts = {part: seconds * shared for part, seconds in found.by_part().items()}
    values = {"seconds": found.seconds * shared + rates.call, "parts": parts, "flops": found.flops * mesh.size}
    return values | {"unmodeled": found.unmodeled, "rates_load": rates.other_load}


def _model_tpu(name: str, config: PretrainConfig, mesh: Mesh, text: str) -> dict[str, Any]:
    """Returns what `_model` does, from the report of a plan for the slice that is attached."""
    from gpt_jax.plan.program import Program
    from gpt_jax.plan.report import make_report
    from gpt_jax.plan.workload import pretraining
    from gpt_jax.runtime.accelerators import ACCELERATORS

    kind, slices = mesh.devices.flat[0].device_kind, mesh.shape["slice"]
    matching = [each for each in ACCELERATORS.values() if each.device_kind == kind and each.devices * slices == mesh.size]
    if not matching:
        raise UserError(f"{mesh.size} x {kind} is not the size of a slice that can be planned")
    report = make_report(name, Program(text, mesh, pretraining(config), {"temporaries": 0}, 0.0), matching[0], slices)
    time = report["time"]
    cycles = {part: sum(by.values()) for part, by in report["cycles"].items()}
    parts = {part: count * time["compute"] / sum(cycles.values()) for part, count in cycles.items()}
    parts["collectives"] = time["exposed"]
    return {"seconds": time["step"], "parts": parts, "flops": report["flops"]["step"], "unmodeled": {}, "rates_load": None}


def _check_memory(compiled: jax.stages.Compiled, platform: str) -> None:
    """Checks that a CPU's memory suffices for the step. On other platforms, the compiler or the allocator does."""
    analysis: Any = compiled.memory_analysis()
    available = _available_memory()
    if platform != "cpu" or analysis is None or available is None:
        return
    needed = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    needed += analysis.temp_size_in_bytes
    message = f"the step needs {needed / GIB:.1f} GiB, but {available / GIB:.1f} GiB are available; use a smaller batch or model"
    require(needed <= available, "measure", message)


def _available_memory() -> int | None:
    """Returns the bytes of memory that programs can still take on this machine; None if it is not known."""
    try:
        text = Path("/proc/meminfo").read_text()
        return 1024 * int(text.partition("MemAvailable:")[2].split()[0])
    except (OSError, ValueError, IndexError):
        return None


def _run(compiled: jax.stages.Compiled, config: PretrainConfig, mesh: Mesh) -> tuple[list[float], dict[str, float], float | None]:
    """Runs the step on random tokens; returns the seconds of each step, shares of the parts, and the load by other programs."""
    state, batch = init_state(config, mesh), _random_batch(config, mesh)

    def run(least: int, most: int) -> list[float]:
        nonlocal state
        times: list[float] = []
        while len(times) < least or (len(times) < most and sum(times) < SECONDS):
            begin = time.perf_counter()
            state, _ = compiled(state, batch)
            jax.block_until_ready(state)
            times.append(time.perf_counter() - begin)
        return times

    run(2, 2)
    others = OtherLoad([os.getpid()])
    times = run(*STEPS)
    load = others.cores()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run(TRACED, TRACED)
        events = [event for trace in Path(folder).rglob("*.xplane.pb") for event in operations(trace)]
    return times, measured_parts(events, find_scopes([compiled.as_text() or ""]), part_of), load


def _random_batch(config: PretrainConfig, mesh: Mesh) -> Any:
    model, size = config.model, config.train.batch_size
    text = np.random.default_rng(0).integers(model.vocab_size, size=(size, model.context_length + 1), dtype=np.int32)
    batch = {
        "tokens": text[:, :-1],
        "targets": text[:, 1:],
        "loss_weights": np.ones((size, model.context_length), np.float32),
        "example_id": np.arange(size, dtype=np.int32),
    }
    rows = host_rows(mesh, size)
    return place_batch(mesh, {name: array[rows] for name, array in batch.items()}, size)


def measured_parts(events: Iterable[Event], scopes: Mapping[str, str], part: Callable[[str], str]) -> dict[str, float]:
    """Returns the share of each part in the time of the operations. Operations that run together divide the time among them.

    Args:
      scopes: paths of JAX scopes by the names of operations.
      part: returns the part that a path belongs to.
    """
    changes = sorted((when, step, name) for name, start, end in events for when, step in ((start, 1), (end, -1)))
    running: collections.Counter[str] = collections.Counter()
    seconds: dict[str, float] = collections.defaultdict(float)
    before = 0.0
    for when, step, name in changes:
        for each, count in running.items():
            seconds[part(scopes.get(each, ""))] += (when - before) * count / running.total()
        running[name] += step
        running += collections.Counter()  # drops those that have ended
        before = when
    total = sum(seconds.values())
    return {name: share / total for name, share in seconds.items()} if total else {}


def compare_parts(modeled: Mapping[str, float], shares: Mapping[str, float], measured: float) -> dict[str, dict[str, float]]:
    """Returns the modeled and measured seconds of each part; nothing if nothing was traced."""
    if not shares:
        return {}
    rows = {
        part: {"modeled": modeled.get(part, 0.0), "measured": shares.get(part, 0.0) * measured} for part in {**modeled, **shares}
    }
    return dict(sorted(rows.items(), key=lambda item: -item[1]["measured"]))


def describe_measured(result: Mapping[str, Any]) -> str:
    """Returns the result of `measure` as text."""
    cores = f", {result['cores']} cores" if result["cores"] else ""
    lines = [
        f"{result['config']}: {result['num_parameters']:,} parameters, batch of {result['batch_size']:,} x "
        f"{result['context_length']:,} tokens, on {result['devices']} x {result['device']}{cores}; jax {result['jax']}",
        f"modeled step:  {result['modeled'] * 1e3:10.2f} ms",
        f"measured step: {result['measured'] * 1e3:10.2f} ms, the median of {result['steps']} "
        f"({result['fastest'] * 1e3:.2f} to {result['slowest'] * 1e3:.2f}); {result['tokens_per_second']:,.0f} tokens/s",
        f"error of the model: {result['error']:+.1%}",
        f"FLOPs of products: {result['flops']:.4g} in the program, {result['expected_flops']:.4g} by the formula",
    ]
    if result["parts"]:
        lines += ["", f"{'ms by part':20}{'modeled':>10}{'measured':>10}{'difference':>12}"]
        for part, row in result["parts"].items():
            modeled, measured = row["modeled"] * 1e3, row["measured"] * 1e3
            share = (modeled - measured) / (result["measured"] * 1e3)
            lines.append(f"  {part.replace('_', ' '):18}{modeled:10.2f}{measured:10.2f}{share:+12.1%}")
        lines.append("  differences are shares of the step")
    lines += [_unmodeled_line(result["unmodeled"]), *_load_lines(result)]
    return "\n".join(lines)


def _unmodeled_line(unmodeled: Mapping[str, int]) -> str:
    if not unmodeled:
        return "every instruction is modeled"
    kinds = ", ".join(f"{count} x {name}" for name, count in unmodeled.items())
    return f"not modeled, and counted as 0 s: {kinds}"


def _load_lines(result: Mapping[str, Any]) -> list[str]:
    """Returns lines about other programs, which make the measured times longer."""
    lines = []
    for key, when in (("other_load", "the steps"), ("rates_load", "the measurement of the device's rates")):
        load = result[key]
        if load is None or math.isnan(load):
            lines.append(f"other programs during {when}: not known")
        else:
            lines.append(f"other programs during {when}: {load:.2f} cores busy on average")
    return lines
