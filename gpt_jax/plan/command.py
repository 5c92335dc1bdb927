"""The verb `plan`: the memory, time and cost of a run on TPUs that are not attached."""

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gpt_jax.config import PretrainConfig
from gpt_jax.config.load import config_to_dict
from gpt_jax.config.schema import duration_to_steps, parse_duration
from gpt_jax.data.store import Store
from gpt_jax.errors import field_error, require
from gpt_jax.plan import cache
from gpt_jax.plan.report_file import read_report
from gpt_jax.runtime.accelerators import Accelerator, parse_accelerator
from gpt_jax.runtime.console import say
from gpt_jax.runtime.mesh import check_batch, check_model, mesh_sizes


def plan(options: argparse.Namespace, config: PretrainConfig) -> None:
    """Prints the report of a pre-training, or the result of a search, and writes the report to a file if one is named.

    Without libtpu, it prints estimates from the shapes of arrays, and how to install libtpu.

    Raises:
      UserError: an option is wrong, or the config does not fit the topology.
      TrainingError: the step does not compile.
    """
    if options.json is not None:
        require(options.json.parent.is_dir(), "json", f"{options.json.parent}: no such folder")
        require(not options.json.is_dir(), "json", f"{options.json}: is a folder; name a file")
    if options.search:
        _search(options, config)
        return
    steps = _steps(config, options.corpus_tokens)
    accelerator, sizes = _hardware(options, config)
    if importlib.util.find_spec("libtpu") is None:
        from gpt_jax.plan.arithmetic import describe_arithmetic

        require(options.json is None, "json", "needs libtpu: pip install 'gpt_jax[tpu]'")
        _check_memory(config, accelerator, sizes)
        print(describe_arithmetic(options.config, config, accelerator, sizes))
        return
    report = find_report(options.config, config, accelerator, options.slices)
    from gpt_jax.plan.describe import describe

    print(describe(report, options.price, steps))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def compare(options: argparse.Namespace, load: Callable[[str], PretrainConfig]) -> None:
    """Prints two reports side by side.

    Args:
      options: `options.compare` contains two names, each of a report file or of a config.
      load: returns the config with a given name, with the command's overrides applied.

    Raises:
      UserError: a file is not a report of this version, or a config cannot be planned (see `plan`).
      TrainingError: a step does not compile.
    """

    def report_of(name: str) -> dict[str, Any]:
        if name.endswith(".json"):
            return read_report(Path(name))
        config = load(name)
        return find_report(name, config, _hardware(options, config)[0], options.slices)

    before, after = options.compare
    from gpt_jax.plan.compare import describe_comparison

    print(describe_comparison(report_of(before), report_of(after), (before, after)))


def _search(options: argparse.Namespace, config: PretrainConfig) -> None:
    """Prints the best candidates for a topology, and writes the best one's report and config to files if they are named."""
    for name in ("price", "corpus_tokens"):
        require(getattr(options, name) is None, name, "does not go with --search; plan the config that it finds")
    if (write := options.write) is not None:
        require(write.suffix == ".py", "write", f"{write} is not the path of a .py file, such as configs/NAME.py")
        require(write.parent.is_dir(), "write", f"{write.parent}: no such folder")
        require(not write.exists(), "write", f"{write} exists; name a new file")
    accelerator = _slice(options.topology)
    require(importlib.util.find_spec("libtpu") is not None, "search", "needs libtpu: pip install 'gpt_jax[tpu]'")
    from gpt_jax.plan.search import search

    report = search(options.config, config, accelerator, options.slices, options.write)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def find_report(name: str, config: PretrainConfig, accelerator: Accelerator, slices: int) -> dict[str, Any]:
    """Returns the report from the cache, or else compiles the step and makes the report.

    Raises:
      UserError, TrainingError: see `plan`.
    """
    key = cache.cache_key(config=config_to_dict(config), accelerator=accelerator.name, slices=slices)
    report = cache.read(key)
    if report is None:
        _check_memory(config, accelerator, mesh_sizes(config.mesh, accelerator, slices))
        where = f"{slices} x {accelerator.name}" if slices > 1 else accelerator.name
        say(f"{time.strftime('%H:%M:%S')} compiling the step for {where}, which takes minutes")
        from gpt_jax.plan.program import compile_step
        from gpt_jax.plan.report import make_report

        report = make_report(name, compile_step(config, accelerator, slices), accelerator, slices)
        cache.write(key, report)
    return report | {"config": name}


def _check_memory(config: PretrainConfig, accelerator: Accelerator, sizes: Mapping[str, int]) -> None:
    """Checks that the batch fits according to the estimate that the run itself makes; the error says how many sequences fit."""
    from gpt_jax.train.choices import choose_on
    from gpt_jax.train.memory_estimate import check_remat

    kind = accelerator.device_kind
    check_remat(choose_on(config, sizes, "tpu", kind), sizes, "tpu", kind)


def _hardware(options: argparse.Namespace, config: PretrainConfig) -> tuple[Accelerator, dict[str, int]]:
    """Returns the slice that the options name, and the sizes of its mesh axes, which divide the batch and the model."""
    accelerator = _slice(options.topology)
    sizes = mesh_sizes(config.mesh, accelerator, options.slices)
    check_batch(sizes, config.train.batch_size, config.train.grad_accum_steps)
    check_model(sizes, config.model)
    return accelerator, sizes


def _slice(name: str | None) -> Accelerator:
    """Returns the TPU slice with a given name."""
    if name is None:
        raise field_error("topology", "name the TPU slice, for example v5e-256")
    accelerator = parse_accelerator(name, "--topology")
    require(accelerator.kind == "tpu", "topology", f"{accelerator.name} is not a TPU slice, such as v5e-256")
    return accelerator


def _steps(config: PretrainConfig, corpus_tokens: int | None) -> float | None:
    """Returns the number of updates in the run, or None if it depends on an unknown number of tokens."""
    length, train = config.model.context_length, config.train
    if parse_duration(train.duration, "train.duration")[1] != "epochs":
        corpus_tokens = 0
    elif corpus_tokens is None and Path(config.data.store or "nowhere").is_dir():  # The store may exist only on the workers.
        corpus_tokens = Store.open(Path(config.data.store), verify=False).split("train").num_tokens
    if corpus_tokens is None:
        return None
    windows = corpus_tokens // length
    return duration_to_steps(train.duration, "train.duration", batch_size=train.batch_size, context_length=length, epoch=windows)
