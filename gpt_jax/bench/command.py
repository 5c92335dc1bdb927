"""`gpt-jax bench`: the benchmarks by name, from the options of the command to the report."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax.bench import attention, checkpoint, finetune, generate, loss, matmul, report, startup, tokenize, train
from gpt_jax.bench import input as input_
from gpt_jax.bench.contest import Contest, Outcome, Request, run_contest
from gpt_jax.bench.peers import usable_peers
from gpt_jax.config.load import load_config
from gpt_jax.errors import UserError, field_error
from gpt_jax.runtime.console import say


class Benchmark(NamedTuple):
    """A benchmark, its peers, and its own options."""

    contests: Callable[[Request], list[Contest]]
    peers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    """The options that it takes, besides those of all benchmarks."""
    config: str = ""
    """The config that is measured by default; empty: there is none."""
    batch_sizes: tuple[int, ...] = ()
    """Batch sizes for the default config."""


BENCHMARKS = {
    "train": Benchmark(train.contests, train.PEERS, ("config", "batch_size", "products"), "gpt1", (2,)),
    "attention": Benchmark(attention.contests, attention.PEERS, ("config", "batch_size"), "gpt1", (2,)),
    "loss": Benchmark(loss.contests, loss.PEERS, ("config", "batch_size"), "gpt1", (2,)),
    "generate": Benchmark(generate.contests, generate.PEERS, ("config", "batch_size"), "gpt1", (1, 8)),
    "finetune": Benchmark(finetune.contests, finetune.PEERS, ("config",)),
    "input": Benchmark(input_.contests, options=("batch_size", "store")),
    "tokenize": Benchmark(tokenize.contests),
    "checkpoint": Benchmark(checkpoint.contests, options=("config",), config="mini"),
    "startup": Benchmark(startup.contests),
    "matmul": Benchmark(matmul.contests, matmul.PEERS),
}
"""All benchmarks by their names on the command line."""
OPTIONS = ("config", "batch_size", "products", "store")
"""Options that only some benchmarks take."""
ALL = "all"


def check_options(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Checks that the options belong to the benchmark, and fills in its default config and batch sizes.

    Raises:
      UserError: an option or a peer belongs to other benchmarks.
    """
    benchmark = BENCHMARKS.get(options.name, Benchmark(train.contests, train.PEERS))
    for name in OPTIONS:
        if getattr(options, name) and name not in benchmark.options:
            takers = [other for other, known in BENCHMARKS.items() if name in known.options]
            raise field_error(name, f"belongs to {', '.join(takers)}, not to {options.name}")
    if overrides and not options.config and not benchmark.config:
        raise UserError(f"'{overrides[0]}' is not an argument of gpt-jax bench {options.name}")
    for peer in options.against:
        if peer not in benchmark.peers:
            known = f"its peers are {', '.join(benchmark.peers)}" if benchmark.peers else "it has none"
            raise field_error("against", f"'{peer}' is not a peer of {options.name}; {known}")
    if options.json and not Path(options.json).parent.is_dir():
        raise field_error("json", f"there is no folder '{Path(options.json).parent}'")
    if options.name == "finetune" and not options.config:
        raise field_error("config", "name the fine-tuning config to time, for example finetune/cola")
    if not options.config and benchmark.config:
        options.config, options.batch_size = benchmark.config, options.batch_size or list(benchmark.batch_sizes)


def bench(options: argparse.Namespace, config: Any) -> int:
    """Runs one benchmark or all of them, prints their tables, and returns the exit code: 1 if a program failed.

    Args:
      options: as `check_options` leaves them.
      config: the config that they name, with its overrides; None if there is none.
    """
    peers = usable_peers(options.against)
    if options.name == ALL:
        contests = all_contests(peers)
    else:
        request = Request(config, options.config or "", options.batch_size or (), peers, options.products, options.store)
        contests = BENCHMARKS[options.name].contests(request)
    facts = report.describe_run(peers)
    report.print_header(facts)
    outcomes: list[Outcome] = []
    for contest in contests:
        if options.json:  # Also before the first one, so that a path that cannot be written is reported at once.
            report.write_json(options.json, facts, outcomes)
        outcomes.append(run_contest(contest, options.rounds))
        report.print_outcome(outcomes[-1])
        sys.stdout.flush()
    if options.json:
        report.write_json(options.json, facts, outcomes)
    return 1 if any(timing.failure for outcome in outcomes for timing in outcome.timings.values()) else 0


def all_contests(peers: Sequence[str]) -> list[Contest]:
    """Returns the contests of all benchmarks, each with its default config and those of the peers that it knows."""
    contests = []
    for name, benchmark in BENCHMARKS.items():
        if name == "finetune":
            say("finetune is left out of `all`, because it needs a task: gpt-jax bench finetune --config finetune/cola")
            continue
        config = load_config(benchmark.config) if benchmark.config else None
        known = [peer for peer in peers if peer in benchmark.peers]
        contests += benchmark.contests(Request(config, benchmark.config, benchmark.batch_sizes, known, products=True))
    return contests
