"""Benchmark `startup`: seconds from the command `gpt-jax pretrain smoke` to its first update."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from gpt_jax.bench.comparison import Comparison, Request
from gpt_jax.bench.program import Program, ProgramSpec
from gpt_jax.errors import TrainingError

POLL_SECONDS = 0.02


def comparisons(request: Request) -> list[Comparison]:
    """Returns a comparison of starts with a warm and with a cold compilation cache, and with text that is not yet prepared."""
    programs = {
        "warm cache": ProgramSpec(f"{__name__}:first_update", {"warm": True, "prepared": True}),
        "cold cache": ProgramSpec(f"{__name__}:first_update", {"warm": False, "prepared": True}),
        "cold cache, text to prepare": ProgramSpec(f"{__name__}:first_update", {"warm": False, "prepared": False}),
    }
    return [Comparison("startup: smoke, from the command to the first update", "", 0, programs)]


def first_update(warm: bool, prepared: bool) -> Program:
    """Returns a program that starts a run in a new folder and kills it after its first update.

    Args:
      warm: whether the runs share a compilation cache, which the first of them fills.
      prepared: whether the token store exists.
    """
    scratch = Path(tempfile.mkdtemp())
    shared, words = scratch / "cache", ["pretrain", "smoke"]
    if prepared:
        store = str(scratch / "store")
        subprocess.run(_command("prepare", "smoke", "--data.store", store), check=True, stdin=subprocess.DEVNULL)
        words += ["--data.store", store]

    def run(count: int) -> None:
        for _ in range(count):
            folder = Path(tempfile.mkdtemp(dir=scratch))
            cache = shared if warm else folder / "cache"
            _train(_command(*words, "--workdir", str(folder / "run")), folder / "run" / "metrics.jsonl", cache)

    return Program(run)


def _command(*words: str) -> list[str]:
    return [sys.executable, "-m", "gpt_jax", *words]


def _train(command: Sequence[str], metrics: Path, cache: Path) -> None:
    """Runs a command, with a folder for its compilation cache, until the metrics file has the record of an update."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"):  # The cache is the default one.
        environment.pop(name, None)
    with subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL) as process:
        try:
            while not metrics.is_file() or '"kind": "train"' not in metrics.read_text(encoding="utf-8"):
                if process.poll() is not None:
                    raise TrainingError(f"{' '.join(command)} ended with exit code {process.returncode}")
                time.sleep(POLL_SECONDS)
        finally:
            process.kill()
