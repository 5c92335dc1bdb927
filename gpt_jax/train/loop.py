"""The training loop. It knows a loss, batches and an evaluation, and no task."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gpt_jax.config import RunConfig
from gpt_jax.data.pipeline import batches
from gpt_jax.errors import Preempted, TrainingError
from gpt_jax.runtime.distributed import StopRequest
from gpt_jax.runtime.rundir import RunDir
from gpt_jax.runtime.sharding import place_batch
from gpt_jax.train import checkpoint
from gpt_jax.train.checkpoint import Checkpoints
from gpt_jax.train.logging import Progress
from gpt_jax.train.optimizer import Horizon
from gpt_jax.train.step import LANGUAGE_MODEL, ByShape, State, TrainableModel, lower_step


class Work(NamedTuple):
    """What there is to do."""

    horizon: Horizon
    eval_every: int
    """Updates between evaluations."""
    save_every: int
    """Updates between checkpoints."""
    batch_at: Callable[[int], dict[str, np.ndarray]]
    """This host's rows of the batch of an update."""
    evaluate: Callable[[int, Any], dict[str, float]]
    """(step, params) -> scores, which rank the checkpoints (`checkpoint.best`)."""
    evidence: Callable[[int], dict[str, Any]]
    """What to note of the batch of an update that went wrong."""
    model_fns: TrainableModel = LANGUAGE_MODEL
    save_evaluated: bool = False
    """Save at every evaluation too, as the best of them will be chosen."""


class NonFinite(Exception):
    """The loss or the gradient of update `step` was not finite."""

    def __init__(self, step: int, values: dict[str, float]):
        super().__init__(step)
        self.step, self.values = step, values


def train(
    config: RunConfig,
    work: Work,
    mesh: Mesh,
    state: State,
    run: RunDir,
    checkpoints: Checkpoints,
    progress: Progress,
    stop: StopRequest,
) -> tuple[State, dict[str, float]]:
    """Trains from `state` to the end of the horizon; returns the last state and its scores.

    Update s + 1 is dispatched before the numbers of update s are read, so the devices never wait for Python. The guard inside
    the compiled step makes that safe: after a non-finite update the state stays what it was.

    Raises:
      TrainingError: a loss or gradient was not finite; the state before it is saved.
      Preempted: the process was told to stop; the state is saved.
    """
    total, scores = work.horizon.total, {}
    start = int(state["step"])
    saved = start or None  # the newest step on disk: beyond 0 a run starts from a checkpoint
    update = ByShape(lambda batch: lower_step(config, mesh, horizon=work.horizon, model_fns=work.model_fns, batch=batch))

    def account(step: int, metrics: dict[str, jax.Array]) -> None:
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        if not values.pop("ok"):
            raise NonFinite(step, values)
        run.record("train", step, **values)
        progress.update(step, values)

    stream = batches(work.batch_at, start, total, kind=config.data.pipeline, prefetch=config.data.prefetch)
    with contextlib.closing(stream), jax.set_mesh(mesh):
        if start == total:  # stopped between the last save and the result
            scores = work.evaluate(total, state["params"])
        pending: tuple[int, dict[str, jax.Array]] | None = None
        compilations = 0
        try:
            for index, batch in stream:
                state, metrics = update(state, place_batch(mesh, batch, config.train.batch_size))
                if len(update) > compilations:  # a batch of a new shape: the time that took is none of training
                    compilations = len(update)
                    progress.start(index)
                if pending is not None:
                    account(*pending)
                step, pending = index + 1, (index + 1, metrics)
                stopping = stop.now()
                evaluating = step % work.eval_every == 0 or step == total
                saving = step % work.save_every == 0 or step == total or stopping or (evaluating and work.save_evaluated)
                if evaluating or saving:
                    account(*pending)
                    pending = None
                if evaluating:
                    scores = work.evaluate(step, state["params"])  # before the save, which is ranked by it
                    measured = {name: value for name, value in scores.items() if name != checkpoint.RANK}
                    if measured:
                        run.record("eval", step, **measured)
                    progress.scalars("eval", step, measured)
                if saving:
                    run.sync()  # before the checkpoint is sealed: whoever goes on from it has the record up to there
                    checkpoints.save(step, state, scores if evaluating else {})
                    saved = step
                if stopping and step != total:
                    checkpoints.wait()
                    run.record("event", step, event="preempted")
                    raise Preempted(f"told to stop: saved at step {step} of {total}; the same command goes on from there")
                if evaluating or saving:
                    progress.start(step)
        except NonFinite as error:
            _keep_last_good(error, work, state, saved, run, checkpoints)
    return state, scores


def _keep_last_good(
    error: NonFinite, work: Work, state: State, saved: int | None, run: RunDir, checkpoints: Checkpoints
) -> NoReturn:
    """Saves the state before the update that went wrong, notes what its batch was, and ends the training."""
    step, values = error.step, error.values
    good = int(state["step"])
    if good != saved:  # saving it again would lose its scores
        run.sync()
        checkpoints.save(good, state | {"ok": jnp.ones_like(state["ok"])}, {})
    checkpoints.wait()
    evidence = {name: str(value) if not math.isfinite(value) else value for name, value in values.items()}
    run.record("event", step, event="non-finite", **evidence, **work.evidence(step - 1))
    raise TrainingError(
        f"update {step} is not finite (loss {values['loss']}, gradient norm {values['grad_norm']}); the state before it is saved "
        f"as checkpoint {good}, its batch is noted in {run.path / 'metrics.jsonl'}"
    ) from error
