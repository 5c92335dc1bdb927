"""Benchmarks of this machine (`gpt-jax bench`): the input pipeline, a matrix product, and the padding of fine-tuning batches."""

import contextlib
import importlib.util
import itertools
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.config import FinetuneConfig
from gpt_jax.data.pipeline import iterate_batches
from gpt_jax.data.store import Store, TokenArray
from gpt_jax.data.windows import Windows
from gpt_jax.experiments.score_tables import format_table
from gpt_jax.runtime import sharding
from gpt_jax.runtime.console import say
from gpt_jax.tasks.batches import TaskBatches
from gpt_jax.tasks.dataset import load_dataset
from gpt_jax.tasks.finetune import find_init, make_head, resolve_config
from gpt_jax.tasks.registry import task_from_config
from gpt_jax.train.step import CompiledByShape, init_state, lower_step

RUNS = 3
RANDOM_TOKENS = 100_000_000
VOCABULARY = 40_478
PREFETCH = 4
LATE_STEP = 1_000_000

PipelineKind = Literal["tf", "threads"]


def bench_input(
    store: Path | None,
    *,
    context_length: int = 512,
    batch_sizes: Sequence[int] = (64, 256),
    seconds: float = 2.0,
    kinds: Sequence[PipelineKind] = (),
) -> None:
    """Measures how fast each kind of input pipeline delivers batches of windows as NumPy arrays, and prints a table.

    The columns "first batch" and "at step 1M" are the times from creating a pipeline to its first batch, for a new run and for a
    run that resumes at step 1,000,000. "start-up" is this time for the first pipeline of a process; most of it is spent on
    importing tensorflow.

    Args:
      store: the token store whose training split is read; None: a temporary memory-mapped file of random tokens.
      context_length: tokens in an example.
      batch_sizes: the batch sizes to measure.
      seconds: duration of each of the `RUNS` runs, of which the fastest is reported.
      kinds: pipelines to measure; empty: all that are installed.

    Raises:
      UserError: the store is damaged or shorter than one window, or tensorflow is requested but not installed.
    """
    if not kinds:
        kinds = ("tf", "threads") if importlib.util.find_spec("tensorflow") else ("threads",)
    with contextlib.ExitStack() as stack:
        if store is None:
            file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "tokens.bin"
            dtype = np.dtype("<u2")
            np.random.default_rng(0).integers(VOCABULARY, size=RANDOM_TOKENS, dtype=dtype).tofile(file)
            tokens, name = TokenArray([file], dtype, text_bytes=0), "a temporary memory-mapped file"
        else:
            tokens, name = Store.open(store).split("train"), str(store)
        windows = {size: Windows(tokens, context_length, size, seed=0) for size in batch_sizes}
        start_up = {kind: _seconds_to_first(kind, windows[batch_sizes[0]], np.arange(1), 0) for kind in kinds}
        table: list[Sequence[object]] = [("pipeline", "batch", "M tokens/s", "first batch, ms", "at step 1M, ms", "start-up, s")]
        for (size, source), kind in itertools.product(windows.items(), kinds):
            rows = np.arange(size)
            rate = max(_tokens_per_second(kind, source, rows, seconds) for _ in range(RUNS))
            first, late = (min(_seconds_to_first(kind, source, rows, step) for _ in range(RUNS)) for step in (0, LATE_STEP))
            figures = (rate / 1e6, first * 1e3, late * 1e3, start_up[kind])
            table.append((kind, size, *(f"{figure:.1f}" for figure in figures)))
    print(f"{name}, {tokens.num_tokens:,} tokens; windows of {context_length}; fastest of {RUNS} runs of {seconds:g} s")
    print(format_table(table))


def _tokens_per_second(kind: PipelineKind, windows: Windows, rows: np.ndarray, seconds: float) -> float:
    with contextlib.closing(iterate_batches(windows, 0, sys.maxsize, rows, kind=kind, prefetch=PREFETCH)) as batches:
        for _ in itertools.islice(batches, 2 * PREFETCH):  # The batches made ahead of time do not count.
            pass
        count, begin = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - begin) < seconds:
            count += next(batches)["tokens"].size
        return count / elapsed


def _seconds_to_first(kind: PipelineKind, windows: Windows, rows: np.ndarray, step: int) -> float:
    begin = time.perf_counter()
    with contextlib.closing(iterate_batches(windows, step, step + 1, rows, kind=kind, prefetch=PREFETCH)) as batches:
        next(batches)
        return time.perf_counter() - begin


def bench_matmul() -> None:
    """Prints the rate in FLOP/s of a 1024 x 768 x 3072 float32 product, as in GPT-1's feed-forward layer.

    A model's tokens/s times `logging.flops_per_token`, divided by this rate, is the share of the machine that training uses.
    """
    rows, inner, columns, repeats = 1024, 768, 3072, 4
    left, right = jnp.ones((rows, inner)), jnp.ones((inner, columns))
    product = jax.jit(jnp.matmul).lower(left, right).compile()
    durations = []
    for _ in range(10 * RUNS):
        begin = time.perf_counter()
        jax.block_until_ready([product(left, right) for _ in range(repeats)])
        durations.append(time.perf_counter() - begin)
    rate = repeats * 2 * rows * inner * columns / min(durations)
    print(f"{rows} x {inner} x {columns} float32 on {jax.devices()[0].device_kind}: {rate / 1e9:,.0f} GFLOP/s")


def bench_padding(config: FinetuneConfig, steps: int = 20) -> None:
    """Measures the speed of fine-tuning with batches padded in three ways, and prints a table.

    All three divide the same examples into the same number of batches:

    - grouped by length and padded to a few lengths, as in `finetune`;
    - in random order, padded to the longest example of each batch;
    - in random order, padded to the model's context length.

    Compilation is not timed, but the table shows the number of compilations that an epoch needs.

    Args:
      config: the fine-tuning config to measure.
      steps: number of batches to time, spread evenly over the first epoch.
    """
    source = find_init(config.init, say)
    resolved = resolve_config(config, task_from_config(config.task), source)
    size, context = resolved.train.batch_size, resolved.model.context_length
    mesh = sharding.make_mesh(resolved.mesh)
    data = load_dataset(resolved.task, source.tokenizer, context, size, say, ("train", "validation"))
    model = make_head(data.task, resolved).trainable_model()
    encoded, rows = data.encoded["train"], sharding.host_rows(mesh, size)
    paddings = {
        f"grouped, {len(data.lengths)} lengths": TaskBatches(encoded, size, 0, data.lengths, True),
        "longest of each batch": TaskBatches(encoded, size, 0, range(1, context + 1), False),
        f"the context of {context}": TaskBatches(encoded, size, 0, (context,), False),
    }
    table = [("padded to", "padding", "compilations", "examples/s")]
    for name, batches in paddings.items():
        update = CompiledByShape(lambda batch: lower_step(resolved, mesh, total_steps=1000, model=model, batch=batch))
        state = init_state(resolved, mesh, model)
        timed = np.linspace(0, batches.steps_per_epoch - 1, min(steps, batches.steps_per_epoch)).astype(int)
        placed = [sharding.place_batch(mesh, batches.batch_at(int(step), rows), size) for step in timed]
        with jax.set_mesh(mesh):
            for _ in range(2):  # The first pass compiles, and the second one is timed.
                begin = time.perf_counter()
                for batch in placed:
                    state, _ = update(state, batch)
                jax.block_until_ready(state)
        rate = len(placed) * size / (time.perf_counter() - begin)
        shapes = {batches.batch_at(step, rows[:1])["tokens"].shape for step in range(batches.steps_per_epoch)}
        table.append((name, f"{batches.padding_share():.1%}", str(len(shapes)), f"{rate:.1f}"))
    print(f"{data.task.title}: {len(encoded.lengths):,} examples in batches of {size}, {jax.devices()[0].device_kind}")
    print(format_table(table))
