"""Benchmark `input`: how fast the input pipelines deliver batches of windows as NumPy arrays."""

import contextlib
import importlib.util
import itertools
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from gpt_jax.bench.comparison import Comparison, Request
from gpt_jax.bench.program import Program, ProgramSpec
from gpt_jax.data.pipeline import iterate_batches
from gpt_jax.data.store import Store, TokenArray
from gpt_jax.data.windows import Windows

RANDOM_TOKENS = 100_000_000
VOCABULARY = 40_478
CONTEXT_LENGTH = 512
PREFETCH = 4
LATE_STEP = 1_000_000


def comparisons(request: Request) -> list[Comparison]:
    """Returns a comparison of the installed pipelines for each batch size.

    Raises:
      UserError: the store is damaged or shorter than one window.
    """
    kinds = ("threads", "tf") if importlib.util.find_spec("tensorflow") else ("threads",)
    if request.store:
        Windows(Store.open(request.store).split("train"), CONTEXT_LENGTH, 1, seed=0)
    result = []
    for size in request.batch_sizes or (64, 256):
        settings = {"store": str(request.store or ""), "batch_size": size}
        programs = {kind: ProgramSpec(f"{__name__}:pipeline", {**settings, "kind": kind}) for kind in kinds}
        title = f"input from {request.store or 'a memory-mapped file of random tokens'}: batch {size} x {CONTEXT_LENGTH}"
        result.append(Comparison(title, "tokens", size * CONTEXT_LENGTH, programs))
    return result


def pipeline(kind: str, store: str, batch_size: int) -> Program:
    """Returns a program that takes one batch from a pipeline.

    Its details are the times from creating a pipeline to its first batch: of the first pipeline of the process, which imports
    tensorflow if it needs it, of a later one, and of a later one for a run that resumes at step 1,000,000.

    Args:
      store: a token store whose training split is read; empty: a temporary file of random tokens.
    """
    windows = Windows(_tokens(store), CONTEXT_LENGTH, batch_size, seed=0)
    rows = np.arange(batch_size)
    seconds = {
        "first batch of the process, ms": _seconds_to_first(kind, windows, rows, 0),
        "first batch, ms": _seconds_to_first(kind, windows, rows, 0),
        "first batch at step 1,000,000, ms": _seconds_to_first(kind, windows, rows, LATE_STEP),
    }
    batches = iterate_batches(windows, 0, sys.maxsize, rows, kind=kind, prefetch=PREFETCH)

    def run(count: int) -> None:
        for _ in itertools.islice(batches, count):
            pass

    run(2 * PREFETCH)  # The batches made ahead of time do not count.
    return Program(run, lambda: {name: 1e3 * value for name, value in seconds.items()})


def _tokens(store: str) -> TokenArray:
    if store:
        return Store.open(Path(store)).split("train")
    file = Path(tempfile.mkdtemp()) / "tokens.bin"  # in the program's scratch folder, which is deleted at the end
    dtype = np.dtype("<u2")
    np.random.default_rng(0).integers(VOCABULARY, size=RANDOM_TOKENS, dtype=dtype).tofile(file)
    return TokenArray([file], dtype, text_bytes=0)


def _seconds_to_first(kind: str, windows: Windows, rows: np.ndarray, step: int) -> float:
    begin = time.perf_counter()
    with contextlib.closing(iterate_batches(windows, step, step + 1, rows, kind=kind, prefetch=PREFETCH)) as batches:
        next(batches)
        return time.perf_counter() - begin
