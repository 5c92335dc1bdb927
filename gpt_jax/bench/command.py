"""`gpt-jax bench`: the benchmarks by name, from the options of the command to the report."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax.bench import attention, checkpoint, finetune, generate, loss, matmul, report, startup, tokenize, train
from gpt_jax.bench import input as input_
from gpt_jax.bench.comparison import Comparison, Request, Result, failed, require_transformer, run_comparison
from gpt_jax.bench.peers import usable_peers
from gpt_jax.config import PretrainConfig
from gpt_jax.config.load import load_config
from gpt_jax.errors import UserError, field_error
from gpt_jax.runtime.console import say


class Benchmark(NamedTuple):
    """A benchmark, its peers, and its own options."""

    comparisons: Callable[[Request], list[Comparison]]
    peers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    """The options that it takes, besides those of all benchmarks."""
    config: str = ""
    """The config that is measured by default; empty: there is none."""
    batch_sizes: tuple[int, ...] = ()
    """Batch sizes for the default config."""


BENCHMARKS = {
    "train": Benchmark(train.comparisons, train.PEERS, ("config", "batch_size", "products"), "gpt1", (2,)),
    "attention": Benchmark(attention.comparisons, attention.PEERS, ("config", "batch_size"), "gpt1", (2,)),
    "loss": Benchmark(loss.comparisons, loss.PEERS, ("config", "batch_size"), "gpt1", (2,)),
    "generate": Benchmark(generate.comparisons, generate.PEERS, ("config", "batch_size"), "gpt1", (1, 8)),
    "finetune": Benchmark(finetune.comparisons, finetune.PEERS, ("config",)),
    "input": Benchmark(input_.comparisons, options=("batch_size", "store")),
    "tokenize": Benchmark(tokenize.comparisons),
    "checkpoint": Benchmark(checkpoint.comparisons, options=("config",), config="mini"),
    "startup": Benchmark(startup.comparisons),
    "matmul": Benchmark(matmul.comparisons, matmul.PEERS),
}
"""All benchmarks by their names on the command line."""
OPTIONS = ("config", "batch_size", "products", "store")
"""Options that only some benchmarks take."""
ALL = "all"


def check_options(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Checks that the options belong to the benchmark, splits its list of peers, and fills in its default config and batch sizes.

    Raises:
      UserError: an option or a peer belongs to other benchmarks.
    """
    benchmark = BENCHMARKS.get(options.name, Benchmark(train.comparisons, train.PEERS))
    for name in OPTIONS:
        if getattr(options, name) and name not in benchmark.options:
            takers = [other for other, known in BENCHMARKS.items() if name in known.options]
            raise field_error(name, f"belongs to {', '.join(takers)}, not to {options.name}")
    if overrides and not options.config and not benchmark.config:
        raise UserError(f"'{overrides[0]}' is not an argument of gpt-jax bench {options.name}")
    options.against = [peer for word in options.against for peer in word.split(",")]
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

    Each table is printed, and the file of `--json` is written, as soon as a comparison ends. With `all`, a comparison that ends
    with a `UserError` is reported as failed, and the others go on.

    Args:
      options: as `check_options` leaves them.
      config: the config that they name, with its overrides; None if there is none.

    Raises:
      UserError: an option is wrong or something is missing.
    """
    if isinstance(config, PretrainConfig):
        require_transformer(config.model)
    peers = usable_peers(options.against)
    if options.name == ALL:
        comparisons, results = all_comparisons(peers)
    else:
        request = Request(config, options.config or "", options.batch_size or (), peers, options.products, options.store)
        comparisons, results = BENCHMARKS[options.name].comparisons(request), []
    facts = report.describe_run(peers)
    report.print_header(facts)
    for result in results:
        report.print_result(result)
    if options.json:  # Before the first program starts, so that a path that cannot be written is reported at once.
        report.write_json(options.json, facts, results)
    for comparison in comparisons:
        try:
            result = run_comparison(comparison, options.rounds)
        except UserError as error:
            if options.name != ALL:
                raise
            result = failed(comparison.title, error)
        results.append(result)
        report.print_result(result)
        sys.stdout.flush()
        if options.json:
            report.write_json(options.json, facts, results)
    return 1 if any(result.has_failures for result in results) else 0


def all_comparisons(peers: Sequence[str]) -> tuple[list[Comparison], list[Result]]:
    """Returns the comparisons of all benchmarks but `finetune`, and a failed result for each that lacks something.

    Each benchmark has its default config, and those of the given peers that it supports.
    """
    say("finetune is left out of `all`, because it needs a task: gpt-jax bench finetune --config finetune/cola")
    comparisons: list[Comparison] = []
    failures: list[Result] = []
    for name, benchmark in BENCHMARKS.items():
        if name == "finetune":
            continue
        config = load_config(benchmark.config) if benchmark.config else None
        known = [peer for peer in peers if peer in benchmark.peers]
        try:
            comparisons += benchmark.comparisons(Request(config, benchmark.config, benchmark.batch_sizes, known, products=True))
        except UserError as error:
            failures.append(failed(name, error))
    return comparisons, failures
