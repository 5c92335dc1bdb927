"""The verb `plan`: the memory, time and cost of training or generation on TPUs that are not attached."""

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gpt_jax.config import FinetuneConfig, PretrainConfig
from gpt_jax.config.schema import duration_to_steps, parse_duration
from gpt_jax.data.store import Store
from gpt_jax.errors import UserError, field_error, require
from gpt_jax.plan import cache
from gpt_jax.plan.describe import describe, run_line
from gpt_jax.plan.report_file import read_report
from gpt_jax.plan.workload import Workload, workload_of
from gpt_jax.runtime.accelerators import Accelerator, parse_accelerator
from gpt_jax.runtime.console import say

REFUSAL = "refusal"
"""Key of the message in the cache if a program does not fit."""
Config = PretrainConfig | FinetuneConfig


def plan(options: argparse.Namespace, config: Config) -> None:
    """Prints a report, the result of a search, or a measurement, and writes it to a file if one is named.

    For GPUs, and without libtpu, it prints estimates from the shapes of arrays.

    Raises:
      UserError: an option is wrong, or the config does not fit the topology.
      TrainingError: the program does not compile.
    """
    if options.json is not None:
        require(options.json.parent.is_dir(), "json", f"{options.json.parent}: no such folder")
        require(not options.json.is_dir(), "json", f"{options.json}: is a folder; name a file")
    if options.measure:
        _measure(options, config)
        return
    if options.search:
        _search(options, config)
        return
    accelerator, workload = _accelerator(options.topology, "tpu", "gpu"), workload_of(config, options.generate)
    steps = _steps(workload, options)
    sizes = workload.mesh_sizes(accelerator, options.slices)
    if accelerator.kind == "gpu" or importlib.util.find_spec("libtpu") is None:
        needs = "works only for TPU slices" if accelerator.kind == "gpu" else "needs libtpu: pip install 'gpt_jax[tpu]'"
        for name in ("json", "generate"):
            require(getattr(options, name) is None, name, needs)
        from gpt_jax.plan.arithmetic import check_fine_tuning, describe_arithmetic, estimate

        figures = estimate(workload.as_pretraining, accelerator, sizes)
        check_fine_tuning(workload, figures)
        run = {
            "verb": workload.verb,
            "duration": workload.config.train.duration,
            "time": {"step": figures.step},
            "chips": options.slices * accelerator.hosts * accelerator.chips_per_host,
            "device_kind": accelerator.device_kind,
        }
        print(describe_arithmetic(options.config, workload, figures, f"at least for the {run_line(run, options.price, steps)}"))
        return
    report = find_report(options.config, workload, accelerator, options.slices)
    print(describe(report, options.price, steps))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def _measure(options: argparse.Namespace, config: Config) -> None:
    """Prints the modeled and the measured time of a step on the attached devices, and writes them to a file if one is named."""
    for name in ("topology", "price", "corpus_tokens", "examples", "generate"):
        require(getattr(options, name) is None, name, "cannot be used with --measure, which runs steps on the attached devices")
    require(options.slices == 1, "slices", "cannot be used with --measure; set --mesh.slice")
    if isinstance(config, FinetuneConfig):
        raise UserError(f"--measure: measures steps of pre-training, but {options.config} is a fine-tuning config")
    from gpt_jax.plan.measure import describe_measured, measure

    result = measure(options.config, config)
    print(describe_measured(result))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def compare(options: argparse.Namespace, load: Callable[[str], Config]) -> None:
    """Prints two reports side by side.

    Args:
      options: `options.compare` contains two names, each of a report file or of a config.
      load: returns the config with a given name, with the command's overrides applied.

    Raises:
      UserError: a file is not a report of this version, or a config cannot be planned (see `plan`).
      TrainingError: a step does not compile.
    """
    configs = [name for name in options.compare if not name.endswith(".json")]
    for option in ("price", "corpus_tokens", "examples", "json") + (() if configs else ("topology", "generate")):
        require(getattr(options, option) is None, option, "cannot be used with --compare" + " of two files" * (not configs))
    if configs and importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--compare: planning {configs[0]} needs libtpu: pip install 'gpt_jax[tpu]'")

    def report_of(name: str) -> dict[str, Any]:
        if name not in configs:
            return read_report(Path(name))
        accelerator, workload = _accelerator(options.topology, "tpu"), workload_of(load(name), options.generate)
        workload.mesh_sizes(accelerator, options.slices)
        return find_report(name, workload, accelerator, options.slices)

    before, after = options.compare
    from gpt_jax.plan.compare import describe_comparison

    print(describe_comparison(report_of(before), report_of(after), (before, after)))


def _search(options: argparse.Namespace, config: Config) -> None:
    """Prints the best candidates for a topology, and writes the best one's report and config to files if they are named."""
    if isinstance(config, FinetuneConfig):
        raise UserError(f"--search: searches for the fastest pre-training, but {options.config} is a fine-tuning config")
    for name in ("price", "corpus_tokens", "examples", "generate"):
        require(getattr(options, name) is None, name, "cannot be used with --search; plan the config that it finds")
    if (write := options.write) is not None:
        require(write.suffix == ".py", "write", f"{write} is not the path of a .py file, such as configs/NAME.py")
        require(write.parent.is_dir(), "write", f"{write.parent}: no such folder")
        require(not write.exists(), "write", f"{write} exists; name a new file")
    accelerator = _accelerator(options.topology, "tpu")
    require(importlib.util.find_spec("libtpu") is not None, "search", "needs libtpu: pip install 'gpt_jax[tpu]'")
    from gpt_jax.plan.search import search

    report = search(options.config, config, accelerator, options.slices, options.write)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def find_report(name: str, workload: Workload, accelerator: Accelerator, slices: int) -> dict[str, Any]:
    """Returns the report from the cache, or else compiles the program and makes the report.

    Raises:
      UserError, TrainingError: see `plan`.
    """
    key = cache.cache_key(**workload.facts(), accelerator=accelerator.name, slices=slices)
    report = cache.read(key)
    if report is None:
        if isinstance(workload.config, PretrainConfig) and workload.verb == "pretrain":
            _check_memory(workload.config, accelerator, workload.mesh_sizes(accelerator, slices))
        where = f"{slices} x {accelerator.name}" if slices > 1 else accelerator.name
        program = "the generation" if workload.verb == "generate" else "the step"
        say(f"{time.strftime('%H:%M:%S')} compiling {program} for {where}, which takes minutes")
        from gpt_jax.plan.program import DoesNotFit, compile_program
        from gpt_jax.plan.report import make_report

        try:
            report = make_report(name, compile_program(workload, accelerator, slices), accelerator, slices)
        except DoesNotFit as error:
            cache.write(key, {REFUSAL: str(error)})
            raise
        cache.write(key, report)
    if REFUSAL in report:
        raise UserError(report[REFUSAL])
    return report | {"config": name}


def _check_memory(config: PretrainConfig, accelerator: Accelerator, sizes: Mapping[str, int]) -> None:
    """Checks that the batch fits according to the estimate that the run itself makes; the error says how many sequences fit."""
    from gpt_jax.train.choices import choose_on
    from gpt_jax.train.memory_estimate import check_remat

    kind = accelerator.device_kind
    check_remat(choose_on(config, sizes, "tpu", kind), sizes, "tpu", kind)


def _accelerator(name: str | None, *kinds: str) -> Accelerator:
    """Returns the TPU slice or GPU node with a given name, which must be of one of these kinds."""
    if name is None:
        raise field_error("topology", "name a TPU slice or a node with GPUs, for example v5e-256")
    accelerator = parse_accelerator(name, "--topology")
    wanted = "a TPU slice, such as v5e-256" + ", or a node with GPUs, such as h100-8" * ("gpu" in kinds)
    require(accelerator.kind in kinds, "topology", f"{accelerator.name} is not {wanted}")
    return accelerator


def _steps(workload: Workload, options: argparse.Namespace) -> float | None:
    """Returns the number of updates in the run, or None if it depends on the size of an unknown dataset."""
    own, other = ("examples", "corpus_tokens") if workload.verb == "finetune" else ("corpus_tokens", "examples")
    for name in (own, other) if workload.verb == "generate" else (other,):
        require(getattr(options, name) is None, name, f"does not apply to {workload.verb}")
    if workload.verb == "generate":
        return None
    train, length = workload.config.train, workload.config.model.context_length
    size = getattr(options, own)
    if parse_duration(train.duration, "train.duration")[1] != "epochs":
        size = 0
    elif size is None and isinstance(workload.config, PretrainConfig):
        store = Path(workload.config.data.store or "nowhere")  # It may exist only on the workers.
        size = Store.open(store, verify=False).split("train").num_tokens if store.is_dir() else None
    if size is None:
        return None
    tokens = None if workload.verb == "finetune" else length
    epoch = size // train.batch_size * train.batch_size if tokens is None else size // length
    steps = duration_to_steps(train.duration, "train.duration", batch_size=train.batch_size, context_length=tokens, epoch=epoch)
    of = f" of {size:,} {own.replace('corpus_', '')}" if size else ""
    require(steps >= 1, "train.duration", f"'{train.duration}'{of} is less than one update of {train.batch_size:,} examples")
    return steps
