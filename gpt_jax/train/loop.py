"""The training loop: updates, evaluations and saves from a state to the end of the schedule.

`run.run_training` prepares everything that the loop uses.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from gpt_jax.config import RunConfig
from gpt_jax.errors import Preempted, TrainingError, UserError
from gpt_jax.model import transformer
from gpt_jax.runtime import console, distributed, rundir, sharding
from gpt_jax.train import checkpoint_info
from gpt_jax.train.checkpoint import CheckpointWriter
from gpt_jax.train.compilation import BackgroundCompiler, CompiledByShape
from gpt_jax.train.logging import ProgressLogger
from gpt_jax.train.profile import Profiler
from gpt_jax.train.schedule import Schedule
from gpt_jax.train.step import State


class RunContext(NamedTuple):
    """A run's folder, stop request and log, all of which exist before its data are read."""

    run: rundir.RunDir
    stop: distributed.StopRequest
    log: console.Log
    """Prints a line, on process 0 only."""
    compiler: BackgroundCompiler


class Scores(NamedTuple):
    """The result of an evaluation."""

    metrics: dict[str, float]
    selection_metric: float | None = None
    """Selects the best checkpoint; lower is better."""


Evaluate = Callable[[int, transformer.Params], Scores]
"""A function (step, params) -> scores on the validation split."""


def train_loop(
    ctx: RunContext,
    config: RunConfig,
    mesh: Mesh,
    update: CompiledByShape,
    schedule: Schedule,
    state: State,
    batches: Iterator[Any],
    evaluate: Evaluate,
    batch_provenance: Callable[[int], dict[str, Any]],
    writer: CheckpointWriter,
    progress: ProgressLogger,
    save_evaluated: bool = False,
) -> tuple[State, Scores]:
    """Trains from `state` to the end of the schedule; returns the last state and its scores.

    Update s + 1 is dispatched before the metrics of update s are read, so that the devices never wait for Python. The guard
    inside the compiled step makes this safe: a non-finite update leaves the state unchanged.

    Raises:
      UserError: the batches ended before the schedule did.
      TrainingError, Preempted: see `run_training`.
    """
    run, total, scores = ctx.run, schedule.total_steps, Scores({})
    step = saved = int(state["step"])

    def log_metrics(step: int, metrics: dict[str, jax.Array]) -> None:
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        if not values.pop("ok"):
            raise _save_last_good(run, writer, state, step, values, batch_provenance(step - 1))
        run.record("train", step, **values)
        progress.update(step, values)

    profiled = schedule.profiled if distributed.is_primary() else range(0)
    pending: tuple[int, dict[str, jax.Array]] | None = None
    if step == total:  # The run was interrupted after its last save, before its result was written.
        scores = evaluate(total, state["params"])
    with contextlib.closing(Profiler(profiled, run.path / "profile", ctx.log)) as profiler:
        for batch in batches:
            num_shapes, placed = update.num_shapes, sharding.place_batch(mesh, batch, config.train.batch_size)
            if not update.wait(placed, lambda: ctx.stop.count > 0):  # Compiling may take longer than a preempted machine has.
                if pending is not None:
                    log_metrics(*pending)
                if step > saved:
                    run.sync()
                    writer.save(step, state, {})
                raise _preempted(run, writer, step, total)
            profiler.before(step + 1, state)
            state, metrics = update(state, placed)
            if update.num_shapes > num_shapes:  # The wait for the program of a new shape is not training time.
                progress.resume_clock(step)
            if pending is not None:
                log_metrics(*pending)
            step += 1
            pending = (step, metrics)
            if profiler.after(step, state, update.texts):
                progress.resume_clock(step)
            stopping = ctx.stop.after_update()
            evaluating = step % schedule.eval_every == 0 or step in schedule.extra_evals or step == total
            saving = step % schedule.save_every == 0 or step == total or stopping or (evaluating and save_evaluated)
            if evaluating or saving:
                log_metrics(*pending)
                pending = None
            if evaluating:
                scores = evaluate(step, state["params"])  # before the save, which records the selection metric
                if scores.metrics:
                    run.record("eval", step, **scores.metrics)
                progress.scalars("eval", step, scores.metrics)
            if saving:
                run.sync()  # before the checkpoint is sealed, so that no records are missing if the run resumes from it
                writer.save(step, state, *(scores if evaluating else Scores({})))
                saved = step
            if stopping and step != total:
                raise _preempted(run, writer, step, total)
            if evaluating or saving:
                progress.resume_clock(step)
    if step < total:
        raise UserError(f"dataset_fn: the dataset ended after step {step} of {total}")
    return state, scores


def _preempted(run: rundir.RunDir, writer: CheckpointWriter, step: int, total: int) -> Preempted:
    """Waits for the save of this step, and records the stop; returns the error to raise."""
    writer.wait()
    run.record("event", step, event="preempted")
    where = f"saved at step {step} of {total}" if step else "there is nothing to save before the first update"
    return Preempted(f"stop requested: {where}; run the same command again to continue")


def _save_last_good(
    run: rundir.RunDir, writer: CheckpointWriter, state: State, step: int, metrics: dict[str, float], provenance: dict[str, Any]
) -> TrainingError:
    """Saves the state before the non-finite update `step`, and records the update's batch; returns the error to raise."""
    writer.wait()
    good = int(state["step"])
    path = run.checkpoints / str(good)
    # Saving a sound checkpoint again would lose its scores.
    saved = distributed.is_primary() and checkpoint_info.inspect_checkpoint(path, checksums=True).state == "sound"
    if not distributed.broadcast(int(saved)):
        run.sync()
        writer.save(good, state | {"ok": jax.numpy.ones_like(state["ok"])}, {})
        writer.wait()
    # JSON has no NaN.
    values = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
    run.record("event", step, event="non-finite", **values, **provenance)
    problem = f"update {step} is not finite (loss {values['loss']}, gradient norm {values['grad_norm']})"
    evidence = f"the state before it was saved as checkpoint {good}, and its batch recorded in {run.path / 'metrics.jsonl'}"
    return TrainingError(f"{problem}; {evidence}")
