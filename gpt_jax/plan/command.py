"""The verb `plan`: the memory, time and cost of a run on TPUs that are not attached."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from gpt_jax.config import PretrainConfig
from gpt_jax.config.load import config_to_dict
from gpt_jax.config.schema import duration_to_steps, parse_duration
from gpt_jax.errors import UserError, field_error, require
from gpt_jax.inputs.numbers import NOT_NEGATIVE, POSITIVE, number
from gpt_jax.plan import cache
from gpt_jax.runtime.accelerators import Accelerator, parse_accelerator
from gpt_jax.runtime.console import say


def add_plan(sub: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    sub.add_argument("--topology", metavar="NAME", help="the TPU slice by its name in the cloud, such as v5e-256 or v5p-128")
    sub.add_argument("--slices", type=number(int, POSITIVE), default=1, metavar="N", help="number of slices (default: 1)")
    text = "cost of one chip for an hour, in any currency, to print that of the run"
    sub.add_argument("--price", type=number(float, NOT_NEGATIVE), metavar="PRICE", help=text)
    text = "tokens in the training text, for runs whose length the config gives in epochs (default: those of --data.store)"
    sub.add_argument("--corpus-tokens", type=number(int, POSITIVE), metavar="N", help=text)
    sub.add_argument("--json", type=Path, metavar="FILE", help="also write the report to this file")


def plan(options: argparse.Namespace, name: str, config: PretrainConfig) -> None:
    """Prints the report of a pre-training, and writes it to a file if one is named.

    Raises:
      UserError: the topology does not exist, the config does not fit it, or libtpu is not installed.
      TrainingError: the step does not compile.
    """
    if options.topology is None:
        raise field_error("topology", "name the TPU slice, for example v5e-256")
    accelerator = parse_accelerator(options.topology, "--topology")
    require(accelerator.kind == "tpu", "topology", f"{accelerator.name} is not a TPU slice, such as v5e-256")
    if options.json is not None:
        require(options.json.parent.is_dir(), "json", f"{options.json.parent}: no such folder")
    steps = _steps(config, options.corpus_tokens)
    report = find_report(name, config, accelerator, options.slices)
    from gpt_jax.plan.describe import describe

    print(describe(report, options.price, steps))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def find_report(name: str, config: PretrainConfig, accelerator: Accelerator, slices: int) -> dict[str, Any]:
    """Returns the report from the cache, or else compiles the step for it.

    Raises:
      UserError, TrainingError: see `plan`.
    """
    key = cache.cache_key(config=config_to_dict(config), accelerator=accelerator.name, slices=slices)
    report = cache.read(key)
    if report is None:
        from gpt_jax.plan.program import compile_step
        from gpt_jax.plan.report import make_report

        say(f"{time.strftime('%H:%M:%S')} compiling for {f'{slices} x ' if slices > 1 else ''}{accelerator.name}; takes minutes")
        report = make_report(name, compile_step(config, accelerator, slices), accelerator, slices)
        cache.write(key, report)
    return report | {"config": name}


def _steps(config: PretrainConfig, corpus_tokens: int | None) -> float | None:
    """Returns the number of updates in the run, or None if it depends on an unknown number of tokens."""
    length, train = config.model.context_length, config.train
    _, unit = parse_duration(train.duration, "train.duration")
    if unit == "epochs" and corpus_tokens is None:
        corpus_tokens = _tokens_of_store(config.data.store)
        if corpus_tokens is None:
            return None
    windows = (corpus_tokens or 0) // length
    return duration_to_steps(train.duration, "train.duration", batch_size=train.batch_size, context_length=length, epoch=windows)


def _tokens_of_store(folder: str) -> int | None:
    """Returns the number of tokens in the training split of a store, or None if there is no store."""
    if not folder:
        return None
    from gpt_jax.data.store import Store

    try:
        return Store.open(Path(folder), verify=False).split("train").num_tokens
    except UserError as error:
        raise field_error("data.store", str(error)) from None
