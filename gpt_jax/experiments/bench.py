"""Measured tables: what this machine does (`gpt-jax bench`), and what a model does without fine-tuning."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gpt_jax.config import FinetuneConfig
from gpt_jax.data.pipeline import batches
from gpt_jax.data.store import MappedShards, Store, TokenArray
from gpt_jax.data.windows import Batch, Windows
from gpt_jax.experiments.plots import Curve, Point, curves
from gpt_jax.runtime.rundir import write_atomic

RUNS = 3
RANDOM_TOKENS = 100_000_000
VOCABULARY = 40_478
PREFETCH = 4
LATE_STEP = 1_000_000


@dataclasses.dataclass(frozen=True)
class InputRow:
    """One pipeline's speed."""

    kind: str
    batch_size: int
    tokens_per_second: float
    """Of the fastest run."""
    first_at_start: float
    """Seconds from nothing to the batch of step 0."""
    first_at_late_step: float
    """Seconds from nothing to the batch of step `LATE_STEP`: what a resumed run waits for."""
    start_up: float
    """Seconds that the kind needs once per process, mostly to import tensorflow."""


def bench_input(
    store: Path | None,
    *,
    context_length: int = 512,
    batch_sizes: Sequence[int] = (64, 256),
    seconds: float = 2.0,
    kinds: Sequence[Literal["tf", "threads"]] = (),
) -> list[InputRow]:
    """Measures how fast batches of windows come out of each kind of pipeline, and prints a table.

    Args:
      store: a token store, whose training split is read; None: a temporary memory-mapped file of random tokens.
      context_length: tokens in an example.
      batch_sizes: examples in a batch; each is measured.
      seconds: length of each of the `RUNS` runs, of which the fastest counts.
      kinds: pipelines to measure; empty: all that are installed.

    Raises:
      UserError: the store is not sound or shorter than one window; tensorflow is asked for and not installed.
    """
    if not kinds:
        kinds = ("tf", "threads") if importlib.util.find_spec("tensorflow") else ("threads",)
    with contextlib.ExitStack() as stack:
        if store is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            tokens = _random_tokens(folder / "tokens.bin")
            source = f"a temporary memory-mapped file of {RANDOM_TOKENS:,} random tokens"
        else:
            tokens = Store.open(store).split("train")
            source = f"{store}, {tokens.num_tokens:,} tokens"
        windows = {size: Windows(tokens, context_length, size, seed=0) for size in batch_sizes}
        start_up = {kind: _seconds_to_first(kind, lambda step: {}, 0) for kind in kinds}
        rows = [_measure(kind, windows[size], size, seconds, start_up[kind]) for size in batch_sizes for kind in kinds]
    print(f"{source}; windows of {context_length}; fastest of {RUNS} runs of {seconds:g} s")
    late = f"at step {LATE_STEP:,}, ms"
    print(f"{'pipeline':10}{'batch':>6}{'M tokens/s':>12}{'first batch, ms':>17}{late:>23}{'start-up, s':>13}")
    for row in rows:
        print(
            f"{row.kind:10}{row.batch_size:6}{row.tokens_per_second / 1e6:12.1f}{row.first_at_start * 1e3:17.1f}"
            f"{row.first_at_late_step * 1e3:23.1f}{row.start_up:13.1f}"
        )
    sys.stdout.flush()
    return rows


def _random_tokens(file: Path) -> TokenArray:
    """A split of random tokens, written to `file`."""
    dtype = np.dtype("<u2")
    np.random.default_rng(0).integers(VOCABULARY, size=RANDOM_TOKENS, dtype=dtype).tofile(file)
    return TokenArray(MappedShards([file], dtype), [RANDOM_TOKENS], text_bytes=0, documents=1)


def _measure(kind: Literal["tf", "threads"], windows: Windows, batch_size: int, seconds: float, start_up: float) -> InputRow:
    rows = np.arange(batch_size)

    def batch_at(step: int) -> Batch:
        return windows.batch_at(step, rows)

    rates = []
    for _ in range(RUNS):
        with contextlib.closing(batches(batch_at, 0, sys.maxsize, kind=kind, prefetch=PREFETCH)) as stream:
            for _ in itertools.islice(stream, 2 * PREFETCH):  # What was made ahead of time does not count.
                pass
            count, begin = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - begin) < seconds:
                count += next(stream)[1]["tokens"].size
            rates.append(count / elapsed)
    first, late = (min(_seconds_to_first(kind, batch_at, step) for _ in range(RUNS)) for step in (0, LATE_STEP))
    return InputRow(kind, batch_size, max(rates), first, late, start_up)


def _seconds_to_first(kind: Literal["tf", "threads"], batch_at: Callable[[int], Batch], step: int) -> float:
    begin = time.perf_counter()
    with contextlib.closing(batches(batch_at, step, step + 1, kind=kind, prefetch=PREFETCH)) as stream:
        next(stream)
        return time.perf_counter() - begin


def bench_matmul() -> float:
    """Prints and returns this machine's rate of a 1024 x 768 x 3072 float32 product, GPT-1's feed-forward one, in FLOP/s.

    A model's tokens/s times `progress.flops_per_token`, over this, is the share of the machine that training uses.
    """
    import jax
    import jax.numpy as jnp

    rows, inner, columns = 1024, 768, 3072
    left, right = jnp.ones((rows, inner)), jnp.ones((inner, columns))
    product = jax.jit(jnp.matmul).lower(left, right).compile()
    best = float("inf")
    for _ in range(10 * RUNS):
        begun = time.perf_counter()
        jax.block_until_ready([product(left, right) for _ in range(4)])
        best = min(best, (time.perf_counter() - begun) / 4)
    rate = 2 * rows * inner * columns / best
    print(f"{rows} x {inner} x {columns} float32 on {jax.devices()[0].device_kind}: {rate / 1e9:,.0f} GFLOP/s")
    return rate


def bench_padding(config: FinetuneConfig, steps: int = 20) -> dict[str, float]:
    """Prints and returns examples/s of fine-tuning with batches padded in three ways, in one run, without compilation; and prints
    how many compilations an epoch of each needs.

    The same examples, in the same number of batches: grouped by length and padded to a few lengths, as `finetune` does; at random
    and padded to the longest of each batch; at random and padded to the model's context.

    Args:
      steps: batches of the first epoch that are timed, spread evenly over it.
    """
    import jax

    from gpt_jax.runtime import sharding
    from gpt_jax.runtime.console import say
    from gpt_jax.tasks.batches import TaskBatches
    from gpt_jax.tasks.dataset import load_dataset, task_of
    from gpt_jax.tasks.finetune import find_source, head_of, resolve
    from gpt_jax.train.optimizer import Horizon
    from gpt_jax.train.step import ByShape, init_state, lower_step

    source = find_source(config.init, say)
    resolved = resolve(config, task_of(config.task), source)
    size, context = resolved.train.batch_size, resolved.model.context_length
    mesh = sharding.make_mesh(resolved.mesh)
    data = load_dataset(resolved.task, source.tokenizer, context, size, say, ("train", "validation"))
    model_fns = head_of(data.task, resolved).model_fns()
    encoded, rows = data.encoded["train"], sharding.host_rows(mesh, size)
    every_length = range(1, context + 1)
    kinds = {
        f"grouped, {len(data.lengths)} lengths": TaskBatches(encoded, size, 0, data.lengths, True),
        "longest of each batch": TaskBatches(encoded, size, 0, every_length, False),
        f"the context of {context}": TaskBatches(encoded, size, 0, (context,), False),
    }
    rates = {}
    print(f"{data.task.title}: {len(encoded.lengths):,} examples in batches of {size}, {jax.devices()[0].device_kind}")
    print(f"{'padded to':<26}{'padding':>10}{'compilations':>14}{'examples/s':>12}")
    for name, made in kinds.items():
        update = ByShape(lambda batch: lower_step(resolved, mesh, horizon=Horizon(1000, 0), model_fns=model_fns, batch=batch))
        state = init_state(resolved, mesh, model_fns)
        chosen = np.linspace(0, made.steps_per_epoch - 1, min(steps, made.steps_per_epoch)).astype(int)
        placed = [sharding.place_batch(mesh, made.batch_at(int(step), rows), size) for step in chosen]
        with jax.set_mesh(mesh):
            for batch in placed:  # compiles
                state, _ = update(state, batch)
            jax.block_until_ready(state)
            begun = time.perf_counter()
            for batch in placed:
                state, _ = update(state, batch)
            jax.block_until_ready(state)
        rates[name] = len(placed) * size / (time.perf_counter() - begun)
        shapes = {made.batch_at(step, rows[:1])["tokens"].shape for step in range(made.steps_per_epoch)}
        print(f"{name:<26}{made.padding_share():>10.1%}{len(shapes):>14}{rates[name]:>12.1f}", flush=True)
    return rates


def show_zero_shot(results: Sequence[dict[str, Any]], out: Path | None) -> None:
    """Prints zero-shot scores; with a folder, writes them to zero_shot.json and, of several checkpoints, draws zero_shot.png."""
    head = ("step", "probe", "split", "metric", "score, %", "normalised", "rows", "cut")
    print(f"{head[0]:>9}  {head[1]:<13}{head[2]:<12}{head[3]:<10}{head[4]:>9}{head[5]:>12}{head[6]:>8}{head[7]:>8}")
    for path, rows in itertools.groupby(results, lambda found: found["path"]):
        print(path)
        for found in rows:
            metric = "matthews" if "matthews" in found else "accuracy"
            normalized = "-" if found["normalized"] is None else f"{found['normalized']:.3f}"
            print(
                f"{found['step']:>9}  {found['probe']:<13}{found['split']:<12}{metric:<10}{100 * found[metric]:>9.1f}"
                f"{normalized:>12}{found['n']:>8,}{found['truncated']:>8,}"
            )
    print("normalised: 0 is a random guess, 1 the best supervised model; cut: rows (of all splits read) without their beginning")
    for name, best, source in dict.fromkeys((found["probe"], found["best"], found["source"]) for found in results):
        print(f"    {name}: {'' if best is None else f'{100 * best:.1f}, '}{source}")
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    data, figure = out / "zero_shot.json", out / "zero_shot.png"
    write_atomic(data, json.dumps(list(results), indent=1) + "\n")
    lines: dict[tuple[str, str], list[Point]] = {}
    for found in results:
        if (y := found["normalized"]) is not None:
            lines.setdefault((found["probe"], found["path"]), []).append(Point(found["step"], y, y, y))
    if any(len(points) > 1 for points in lines.values()):
        probes, paths = (list(dict.fromkeys(names)) for names in zip(*lines, strict=True))
        short = [Path(path).name for path in paths]
        labels = dict(zip(paths, short if len(set(short)) == len(short) else paths, strict=True))
        drawn = [
            Curve(probe if len(paths) == 1 else f"{probe}, {labels[path]}", points, probes.index(probe), paths.index(path))
            for (probe, path), points in lines.items()
        ]
        label = "score (0: random guess, 1: best supervised)"
        curves(figure, "Zero-shot scores along pre-training", "pre-training steps", label, drawn)
        print(f"{data}, {figure}")
    else:
        figure.unlink(missing_ok=True)  # an earlier one would show other scores than the file beside it
        print(data)


def show_spread(result: dict[str, Any]) -> None:
    """Prints what several seeds of a fine-tuning scored: `finetune_seeds`' result."""
    columns = ("median", "mean", "std", "min", "max")
    named = ("median", "mean", "deviation", "lowest", "highest")
    print(f"{'of ' + str(len(result['seeds'])) + ' seeds':<12}{'metric':<22}" + "".join(f"{name:>11}" for name in named))
    for split in ("validation", "test"):
        for metric, spread in result.get(split, {}).items():
            shown = f"{metric}, nats" if metric == "loss" else f"{metric}, %"
            values = [spread[column] * (1 if metric == "loss" else 100) for column in columns]
            digits = 3 if metric == "loss" else 1
            print(f"{split:<12}{shown:<22}" + "".join(f"{value:>11.{digits}f}" for value in values))
