"""One run from its start to its result, whatever is trained: the folder, the state to start from, the loop, the checkpoints."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from gpt_jax.config import RunConfig
from gpt_jax.config.load import config_digest, config_to_dict, flatten_config
from gpt_jax.config.schema import duration_to_steps
from gpt_jax.data.tokenizers import Tokenizer, load
from gpt_jax.errors import Preempted, UserError, require
from gpt_jax.model import network
from gpt_jax.model.attention import resolve
from gpt_jax.model.transformer import compute_dtype
from gpt_jax.runtime import distributed
from gpt_jax.runtime.console import say
from gpt_jax.runtime.rundir import RunDir, environment, read_json
from gpt_jax.train import checkpoint
from gpt_jax.train.logging import Progress
from gpt_jax.train.loop import Work, train
from gpt_jax.train.optimizer import Horizon
from gpt_jax.train.step import State, abstract_state


class Session(NamedTuple):
    """What a run has before it knows what it trains."""

    run: RunDir
    stop: distributed.StopRequest
    log: Callable[[str], None]
    """Prints a line, on process 0 alone."""


class Training(NamedTuple):
    """What there is to train, and what to make of it in the end."""

    work: Work
    tokenizer: Tokenizer
    data_digest: str
    """Of everything that the batches are made from."""
    title: str
    """Half a line that says what is trained on what."""
    unit: str
    """What the rate counts: "tokens" or "examples"."""
    units_per_step: int
    flops: float
    """FLOPs of one unit over the peak of all devices, or 0 where that is not known."""
    fresh: Callable[[], tuple[State, str]]
    """The state of a run that begins, and a line that says where it comes from."""
    conclude: Callable[[State, dict[str, float]], dict[str, Any]]
    """(last state, last scores) -> what result.json says besides the step, the parameters and the rate."""


@contextlib.contextmanager
def session(config: RunConfig, workdir: Path) -> Iterator[Session]:
    """Joins the other processes and watches for signals, from the first moment to the last, so that no save is cut short."""
    distributed.start(config.distributed, say)
    distributed.require_agreement(_facts(config, workdir), say)
    primary = distributed.is_primary()
    with distributed.StopRequest() as stop, contextlib.closing(RunDir(workdir, primary)) as run:
        yield Session(run, stop, say if primary else lambda line: None)
        if stop.asked:
            raise Preempted(f"told to stop when {workdir} was finished")


def _facts(config: RunConfig, workdir: Path) -> dict[str, str]:
    """What all processes of a run must have in common, by the names that a person knows it by."""
    found = environment()
    fields = flatten_config(config)
    return {
        "commit": found["commit"] or "unknown",
        **{f"{package}": version for package, version in found["versions"].items()},
        "XLA_FLAGS": found["xla_flags"],
        "LIBTPU_INIT_ARGS": found["libtpu_init_args"],
        "devices": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}",
        "devices in total": str(jax.device_count()),
        "--workdir": str(workdir.absolute()),
        # Those that differ by design, and those that change nothing but what is shown.
        **{
            f"--{name}": str(value)
            for name, (value, effect) in fields.items()
            if effect != "display" and not name.startswith("distributed.")
        },
    }


def conduct(config: RunConfig, mesh: Mesh, training: Training, session: Session, allow_changes: bool = False) -> dict[str, Any]:
    """Trains in the run's folder, going on from its newest sound checkpoint if it has one; returns what result.json holds.

    Raises:
      UserError: the folder, its checkpoint or its tokenizer do not fit; the message says how.
      TrainingError, Preempted: as `loop.train`.
    """
    started = time.monotonic()
    (run, stop, log), work = session, training.work
    primary = distributed.is_primary()
    run.check_data(training.data_digest, allow_changes)
    total = work.horizon.total
    found, step = _newest(run, log)
    if step > total:
        raise UserError(f"{run.path}: its checkpoint {step} lies beyond --train.duration ({total} steps)")
    if step == total and run.result.exists() and (result := read_json(run.result)).get("step") == step:
        log(f"{run.path}: finished at step {step} already; nothing to do")
        return result
    device = mesh.devices.flat[0]
    run.open(config, training.data_digest, platform=device.platform, devices=f"{mesh.size} x {device.device_kind}")
    if primary and not (run.tokenizer.exists() and load(run.tokenizer).fingerprint == training.tokenizer.fingerprint):
        training.tokenizer.save(run.tokenizer)

    if step:
        info = found or checkpoint.resolve(run.checkpoints / str(step), log)
        require_tokenizer(info, training.tokenizer, "--workdir")
        state, origin = checkpoint.restore(info, abstract_state(config, mesh, work.model_fns)), f"resuming at step {step}"
    else:
        state, origin = training.fresh()
    run.supersede(step)
    axes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "single device"
    log(
        f"{network.count(config.model):,} parameters | {training.title} in {total:,} steps | "
        f"{mesh.size} x {device.device_kind} | mesh {axes} | attention {resolve(config.model.attention)} | "
        f"{compute_dtype(config.model)} over {config.model.param_dtype}"
    )
    log(f"{origin}; compiling")
    run.record("event", step, event="start", origin=origin)

    progress = Progress(
        total,
        training.unit,
        training.units_per_step,
        training.flops,
        config.train.log_seconds,
        run.tensorboard if config.train.tensorboard else None,
        primary,
    )
    saver = checkpoint.Checkpoints(
        run.checkpoints,
        keep_latest=config.train.keep_latest,
        keep_best=config.train.keep_best,
        config_json=json.dumps(config_to_dict(config), indent=1),
        config_digest=config_digest(config),
        data_digest=training.data_digest,
        tokenizer=run.tokenizer,
    )
    try:
        with distributed.losing_peers():
            with saver:
                state, scores = train(config, work, mesh, state, run, saver, progress, stop)
            conclusion = training.conclude(state, scores)
    finally:
        progress.close()
    result = {
        "step": int(state["step"]),
        "parameters": network.count(config.model),
        **conclusion,
        f"{training.unit}_per_second": round(progress.rate, 1),
        "seconds": round(time.monotonic() - started, 1),
    }
    run.record("final", result["step"], **{name: value for name, value in result.items() if name != "step"})
    run.write_result(result)
    return result


def schedule(config: RunConfig, context_length: int | None, epoch: int) -> tuple[Horizon, int, int]:
    """The run's length and warm-up, and the updates between evaluations and between checkpoints.

    Args:
      context_length: tokens in an example, for durations in tokens; None where examples differ.
      epoch: examples in an epoch.

    Raises:
      UserError: the run is shorter than an update, or not longer than its warm-up.
    """
    train = config.train

    def updates(duration: str, field: str, total: int | None = None) -> float:
        return duration_to_steps(
            duration, field, batch_size=train.batch_size, context_length=context_length, epoch=epoch, total=total
        )

    total = int(updates(train.duration, "train.duration"))
    require(total > 0, "train.duration", f"'{train.duration}' is less than one update of {train.batch_size} examples")
    warmup = updates(config.optim.warmup, "optim.warmup", total)
    require(warmup < total, "optim.warmup", f"{warmup:g} steps of warm-up leave nothing of a run of {total} steps")
    eval_every = max(int(updates(train.eval_every, "train.eval_every", total)), 1)
    return Horizon(total, warmup), eval_every, max(int(updates(train.save_every, "train.save_every", total)), 1)


def _newest(run: RunDir, log: Callable[[str], None]) -> tuple[checkpoint.Info | None, int]:
    """The run's newest sound checkpoint, on process 0 alone, and its step on all of them; 0: there is none."""
    found = checkpoint.newest(run.checkpoints, log) if distributed.is_primary() and run.checkpoints.exists() else None
    return found, distributed.agree(0 if found is None else found.step)


def require_tokenizer(info: checkpoint.Info, tokenizer: Tokenizer, field: str) -> None:
    """Refuses a checkpoint that was trained with another tokenizer than the data's."""
    theirs = load(info.path / "tokenizer")
    if theirs.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{field}: {info.path} was trained with another tokenizer ({theirs.kind}, {theirs.vocab_size} entries, "
            f"fingerprint {theirs.fingerprint[:12]}) than the data ({tokenizer.kind}, {tokenizer.fingerprint[:12]})"
        )
