"""`gpt-jax bench`: the benchmarks by name, from the options of the command to the report."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from gpt_jax.bench import report, train
from gpt_jax.bench.contest import Contest, Request, run_contest
from gpt_jax.bench.peers import usable_peers
from gpt_jax.errors import UserError, field_error


class Benchmark(NamedTuple):
    """A benchmark, its peers, and its own options."""

    contests: Callable[[Request], list[Contest]]
    peers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    """The options that it takes: some of `OPTIONS`."""
    config: str = ""
    """The config that is measured by default; empty: there is none."""
    batch_sizes: tuple[int, ...] = ()
    """Batch sizes for the default config."""


OPTIONS = ("config", "batch_size", "products")
"""Options that only some benchmarks take."""

BENCHMARKS = {"train": Benchmark(train.contests, train.PEERS, ("config", "batch_size", "products"), "gpt1", (2,))}
"""All benchmarks by their names on the command line."""


def check_options(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Checks that the options belong to the benchmarks, and fills in the default config and batch sizes.

    Raises:
      UserError: an option or a peer belongs to other benchmarks.
    """
    benchmark = BENCHMARKS[options.name]
    for name in OPTIONS:
        if getattr(options, name) and name not in benchmark.options:
            takers = [other for other, known in BENCHMARKS.items() if name in known.options]
            raise field_error(name, f"belongs to {' and '.join(takers)}, not to {options.name}")
    if overrides and "config" not in benchmark.options:
        raise UserError(f"'{overrides[0]}' is not an argument of gpt-jax bench {options.name}")
    for peer in options.against:
        if peer not in benchmark.peers:
            known = f"its peers are {', '.join(benchmark.peers)}" if benchmark.peers else "it has no peers"
            raise field_error("against", f"'{peer}' is not a peer of {options.name}; {known}")
    if not options.config and benchmark.config:
        options.config, options.batch_size = benchmark.config, options.batch_size or list(benchmark.batch_sizes)


def bench(options: argparse.Namespace, config: Any) -> int:
    """Runs one benchmark, prints its tables, and returns the exit code: 1 if a program failed."""
    benchmark = BENCHMARKS[options.name]
    peers = usable_peers(options.against)
    request = Request(config, options.config or "", options.batch_size or (), peers, options.products)
    facts = report.describe_run(peers)
    report.print_header(facts)
    outcomes = []
    for contest in benchmark.contests(request):
        outcomes.append(run_contest(contest, options.rounds))
        report.print_outcome(outcomes[-1])
    if options.json:
        report.write_json(options.json, facts, outcomes)
    return 1 if any(timing.failure for outcome in outcomes for timing in outcome.timings.values()) else 0
