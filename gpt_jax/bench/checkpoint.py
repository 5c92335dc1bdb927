"""Benchmark `checkpoint`: saving and restoring a training state, beside reading and writing the same bytes as one plain file."""

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from gpt_jax.bench.comparison import Comparison, Request
from gpt_jax.bench.program import Program, ProgramSpec, start_jax
from gpt_jax.bench.train import read_config
from gpt_jax.config.load import config_to_dict

BYTES_PER_PARAMETER = 12
"""A float32 parameter and its two moments."""


def comparisons(request: Request) -> list[Comparison]:
    """Returns a comparison for saving and one for restoring."""
    gigabytes = request.config.model.num_parameters * BYTES_PER_PARAMETER / 1e9
    config = {"config": config_to_dict(request.config)}
    size = {"num_bytes": request.config.model.num_parameters * BYTES_PER_PARAMETER}
    return [
        Comparison(
            f"checkpoint, {verb} {request.config_name}: {gigabytes:.2f} GB",
            "GB",
            gigabytes,
            {"gpt_jax": ProgramSpec(f"{__name__}:{verb}", config), "a plain file": ProgramSpec(f"{__name__}:plain_{verb}", size)},
            peers=("a plain file",),
        )
        for verb in ("save", "restore")
    ]


def save(config: dict[str, Any]) -> Program:
    """Returns a program that saves a state and waits until its manifest is written. Old checkpoints are deleted as in a run.

    Its detail is the time after which `save` returns, so that training can continue.
    """
    start_jax()
    writer, state, _ = _start(config)
    interruptions, step = [], 0

    def run(count: int) -> None:
        nonlocal step
        for _ in range(count):
            step += 1
            begin = time.perf_counter()
            writer.save(step, state, {})
            interruptions.append(time.perf_counter() - begin)
            writer.wait()

    return Program(run, lambda: {"training is interrupted for, ms": 1e3 * statistics.median(interruptions)})


def restore(config: dict[str, Any]) -> Program:
    """Returns a program that finds a run's newest checkpoint, verifies its checksums, and restores it."""
    start_jax()
    import jax

    from gpt_jax.runtime.sharding import make_mesh
    from gpt_jax.train import checkpoint, checkpoint_info
    from gpt_jax.train.step import abstract_state

    writer, state, folder = _start(config)
    writer.save(1, state, {})
    writer.wait()
    settings = read_config(config)
    shapes = abstract_state(settings, make_mesh(settings.mesh))

    def run(count: int) -> None:
        for _ in range(count):
            info = checkpoint_info.find_checkpoint(folder, print)
            jax.block_until_ready(checkpoint.restore(info, shapes))

    return Program(run)


def _start(config: dict[str, Any]) -> tuple[Any, Any, Path]:
    """Returns a checkpoint writer, a state, and the folder of the checkpoints, which is deleted at the end."""
    from gpt_jax.runtime.sharding import make_mesh
    from gpt_jax.train.checkpoint import CheckpointWriter
    from gpt_jax.train.step import init_state

    settings, folder = read_config(config), Path(tempfile.mkdtemp()) / "checkpoints"
    return CheckpointWriter(folder, settings, "", None), init_state(settings, make_mesh(settings.mesh)), folder


def plain_save(num_bytes: int) -> Program:
    """Returns a program that writes a file and syncs it."""
    content, file = np.random.default_rng(0).bytes(num_bytes), Path(tempfile.mkdtemp()) / "state"

    def run(count: int) -> None:
        for _ in range(count):
            with open(file, "wb") as output:
                output.write(content)
                os.fsync(output.fileno())

    return Program(run)


def plain_restore(num_bytes: int) -> Program:
    """Returns a program that reads a file, which the system has in memory, as after saving it."""
    file = Path(tempfile.mkdtemp()) / "state"
    file.write_bytes(np.random.default_rng(0).bytes(num_bytes))

    def run(count: int) -> None:
        for _ in range(count):
            file.read_bytes()

    return Program(run)
