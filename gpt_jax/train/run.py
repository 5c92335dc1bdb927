"""A training run from start to result, for pre-training and fine-tuning: folder, state, loop, evaluations, checkpoints.

`train.pretrain` and `tasks.finetune` call `start_run`, prepare their data and model, and pass both to `run_training`.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from gpt_jax.config import RunConfig, load
from gpt_jax.data.pipeline import BatchSource, DatasetFn, iterate_batches
from gpt_jax.data.tokenizers import Tokenizer, load_tokenizer
from gpt_jax.errors import Preempted, UserError
from gpt_jax.model import transformer
from gpt_jax.model.attention import choose_attention
from gpt_jax.runtime import console, distributed, rundir, sharding
from gpt_jax.train import checkpoint, checkpoint_info
from gpt_jax.train.checkpoint import CheckpointWriter
from gpt_jax.train.checkpoint_info import CheckpointInfo
from gpt_jax.train.choices import changed_choices
from gpt_jax.train.compilation import AbstractBatch, BackgroundCompiler, CompiledByShape
from gpt_jax.train.logging import ProgressLogger, Unit
from gpt_jax.train.loop import Evaluate, RunContext, Scores, train_loop
from gpt_jax.train.schedule import Schedule
from gpt_jax.train.step import State, TrainableModel, abstract_state, lower_step


@contextlib.contextmanager
def start_run(config: RunConfig, workdir: Path) -> Iterator[RunContext]:
    """Joins the run's other processes, locks its folder, and handles signals until the block exits, so that no save is cut short.

    Raises:
      UserError: the processes differ in code, devices or settings; or another run uses the folder.
      TrainingError: the other processes did not connect in time.
      Preempted: a stop was requested while waiting for the folder, or too late to interrupt the run, which is finished.
    """
    distributed.start(config.distributed, console.say)
    distributed.require_agreement(_facts(config, workdir), console.say)
    primary = distributed.is_primary()
    with (
        distributed.locked(workdir, console.say),
        distributed.StopRequest() as stop,
        contextlib.closing(rundir.RunDir(workdir, primary)) as run,
        distributed.exit_if_peer_lost(),
    ):
        log = console.say if primary else lambda line: None
        with contextlib.closing(BackgroundCompiler(log)) as compiler:
            yield RunContext(run, stop, log, compiler)
        if stop.count:
            raise Preempted(f"stop requested; {workdir} is already finished")


def _facts(config: RunConfig, workdir: Path) -> dict[str, str]:
    """Returns the settings that must be equal on all processes of a run, keyed by human-readable names."""
    env = rundir.environment()
    facts = {"commit": env["commit"] or "unknown", **env["versions"]}
    facts |= {"XLA_FLAGS": env["xla_flags"], "LIBTPU_INIT_ARGS": env["libtpu_init_args"]}
    facts["devices"] = f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}"
    facts |= {"devices in total": str(jax.device_count()), "--workdir": str(workdir.absolute())}
    fields = {f"--{name}": str(value) for name, (value, affects) in load.flatten_config(config).items() if affects != "display"}
    # Processes differ in distributed.* by design, and display settings do not affect training.
    return facts | {name: value for name, value in fields.items() if not name.startswith("--distributed.")}


def run_training(
    ctx: RunContext,
    config: RunConfig,
    mesh: Mesh,
    model: TrainableModel,
    source: BatchSource,
    schedule: Schedule,
    *,
    tokenizer: Tokenizer,
    data_digest: str,
    title: str,
    unit: Unit,
    initialize: Callable[[], tuple[State, str]],
    evaluate: Evaluate,
    batch_provenance: Callable[[int], dict[str, Any]],
    summarize: Callable[[State, Scores], dict[str, Any]],
    save_evaluated: bool = False,
    lengths_from: Callable[[int], Sequence[int | None]] = lambda step: (None,),
    compile_evaluation: Callable[[BackgroundCompiler], None] = lambda compiler: None,
    dataset_fn: DatasetFn | None = None,
    allow_changes: bool = False,
) -> dict[str, Any]:
    """Trains in the run's folder, resuming from its newest sound checkpoint if any; returns the contents of result.json.

    Args:
      source: the training batches.
      tokenizer, data_digest: the tokenizer and the digest of the training data.
      title: describes the training data in the header line.
      unit: the unit of the throughput.
      initialize: returns the initial state of a new run, and a line that describes its origin.
      evaluate: scores parameters on the validation split.
      batch_provenance: step -> the origin of its batch, recorded if the update is not finite.
      summarize: (last state, last scores) -> entries of result.json besides step, parameters and throughput.
      save_evaluated: also save at every evaluation, so that the best of these checkpoints can be selected.
      lengths_from: step -> the padded lengths of the batches from this step on, in the order of their first use, in which the
        update is compiled for them; None stands for a fixed length.
      compile_evaluation: gives the programs of `evaluate` to a compiler, after those of the update.
      dataset_fn: makes the tf.data.Dataset of training batches in place of `pipeline.make_dataset`.
      allow_changes: continue even if the data have changed.

    Raises:
      UserError: the folder, its checkpoint or its tokenizer does not match this run; the message explains why.
      TrainingError: a loss or gradient was not finite; the last good state was saved.
      Preempted: a stop was requested; the state was saved if there was an update.
    """
    started = time.monotonic()
    run, log, total = ctx.run, ctx.log, schedule.total_steps
    newest = _newest_checkpoint(run, log)
    if newest:
        require_tokenizer(newest, tokenizer, "--workdir")
    run.check_data(data_digest, allow_changes)
    step = newest.step if newest else 0
    if step > total:
        raise UserError(f"{run.path}: checkpoint {step} is beyond --train.duration ({total} steps)")
    if step == total and run.result.exists() and (result := run.read_result(save_evaluated)).get("step") == step:
        log(f"{run.path}: already finished at step {step}; nothing to do")
        return result
    update = _start_compiling(ctx, config, mesh, model, source, schedule, lengths_from(step) if step < total else ())
    compile_evaluation(ctx.compiler)
    resumed = newest and (checkpoint.restore(newest, abstract_state(config, mesh, model)), f"resuming at step {step}")
    state, origin = resumed or initialize()
    log(_header(config, mesh, title, total))
    _start_attempt(ctx, config, mesh, data_digest, tokenizer, step, origin)

    progress = ProgressLogger(config, mesh, total, unit, run.tensorboard, log if distributed.is_primary() else None)
    rows, data = sharding.host_rows(mesh, config.train.batch_size), config.data
    batches = iterate_batches(source, step, total, rows, kind=data.pipeline, prefetch=data.prefetch, dataset_fn=dataset_fn)
    with contextlib.closing(progress), contextlib.closing(batches):
        with CheckpointWriter(run.checkpoints, config, data_digest, run.tokenizer) as writer:
            state, scores = train_loop(
                ctx, config, mesh, update, schedule, state, batches, evaluate, batch_provenance, writer, progress, save_evaluated
            )
        summary = summarize(state, scores)
    speed = {f"{unit}_per_second": round(progress.rate, 1), "seconds": round(time.monotonic() - started, 1)}
    result = {"step": total, "parameters": config.model.num_parameters, **summary, **speed}
    run.record("final", **result)
    run.write_result(result)
    return result


def _start_compiling(
    ctx: RunContext,
    config: RunConfig,
    mesh: Mesh,
    model: TrainableModel,
    source: BatchSource,
    schedule: Schedule,
    lengths: Sequence[int | None],
) -> CompiledByShape:
    """Returns the update, and starts to compile it for batches of these lengths (None: a fixed one), in this order."""

    def lower(batch: AbstractBatch) -> jax.stages.Lowered:
        total, warmup = schedule.total_steps, schedule.warmup_steps
        return lower_step(config, mesh, total_steps=total, warmup_steps=warmup, model=model, batch=batch)

    update, spec = CompiledByShape(lower), source.element_spec(config.train.batch_size)
    names = ("the update" if length is None else f"the update for {length} tokens" for length in lengths)
    batches = (sharding.abstract_batch(mesh, spec, length) for length in lengths)
    update.compile_ahead(ctx.compiler, dict(zip(names, batches, strict=True)))
    return update


def _start_attempt(
    ctx: RunContext, config: RunConfig, mesh: Mesh, data_digest: str, tokenizer: Tokenizer, step: int, origin: str
) -> None:
    """Records what an attempt that starts at `step` consists of, and the choices that differ from the attempt before."""
    run, device = ctx.run, mesh.devices.flat[0]
    changes = changed_choices(run, config, device.platform) if step else {}
    run.open(config, data_digest, platform=device.platform, devices=f"{mesh.size} x {device.device_kind}")
    if distributed.is_primary():
        tokenizer.save(run.tokenizer)
    run.supersede(step)
    ctx.log(f"{origin}; compiling")
    run.record("event", step, event="start", origin=origin)
    for name, change in changes.items():
        ctx.log(f"--{name} is {change}, so this run is equal to an uninterrupted one only up to rounding")
        run.record("event", step, event="choice", field=name, change=change)


def _newest_checkpoint(run: rundir.RunDir, log: console.Log) -> CheckpointInfo | None:
    """Returns the run's newest sound checkpoint, if any. Process 0 finds it, and all processes use the same one."""
    newest = checkpoint_info.newest_checkpoint(run.checkpoints, log) if distributed.is_primary() else None
    step = distributed.broadcast(newest.step if newest else -1)
    if newest is None and step >= 0:
        newest = checkpoint_info.find_step(run.checkpoints, step)
    return newest


def _header(config: RunConfig, mesh: Mesh, title: str, total_steps: int) -> str:
    """Returns the line that describes a run before it starts."""
    model, device = config.model, mesh.devices.flat[0]
    axes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "single device"
    dtype = transformer.compute_dtype(model, device.platform)
    parts = [f"{model.num_parameters:,} parameters", f"{title} in {total_steps:,} steps"]
    parts += [f"{mesh.size} x {device.device_kind}", f"mesh {axes}"]
    if model.kind == "transformer":
        choice = choose_attention(device.platform, model.context_length, model.head_dim, dtype, device.device_kind)
        parts.append(f"attention {model.attention}" + (f" ({choice.reason})" if choice.name == model.attention else ""))
    return " | ".join([*parts, f"{dtype} over {model.param_dtype}"])


def require_tokenizer(info: CheckpointInfo, tokenizer: Tokenizer, field: str) -> None:
    """Checks that a checkpoint was trained with the tokenizer of the data.

    Raises:
      UserError: it was trained with a different one.
    """
    other = load_tokenizer(info.path / "tokenizer")
    if other.fingerprint != tokenizer.fingerprint:
        theirs = f"{other.kind}, {other.vocab_size} entries, fingerprint {other.fingerprint[:12]}"
        ours = f"{tokenizer.kind}, {tokenizer.fingerprint[:12]}"
        raise UserError(f"{field}: {info.path} was trained with a different tokenizer ({theirs}) from the data's ({ours})")
