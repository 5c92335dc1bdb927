"""Pre-training, put together: the store, the mesh, the state to start from, and the loop."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from gpt_jax import config as configs
from gpt_jax import distributed, sharding
from gpt_jax.config import PretrainConfig, steps_of
from gpt_jax.data.prepare import check_recipe, prepare
from gpt_jax.data.store import Store
from gpt_jax.data.tokenizers import Tokenizer, load
from gpt_jax.data.windows import EvaluationWindows, Windows
from gpt_jax.errors import UserError
from gpt_jax.model import transformer
from gpt_jax.model.attention import resolve
from gpt_jax.model.decode import generate
from gpt_jax.rundir import RunDir, read_json
from gpt_jax.train import checkpoint
from gpt_jax.train.loop import Work, train
from gpt_jax.train.optimizer import Horizon
from gpt_jax.train.progress import PEAK_FLOPS, Progress, flops_per_token, say
from gpt_jax.train.step import State, abstract_state, init_state, lower_evaluation


def pretrain(config: PretrainConfig, workdir: Path, allow_changes: bool = False) -> dict[str, Any]:
    """Pre-trains in `workdir`, going on from its newest sound checkpoint if it has one; returns what result.json holds.

    Raises:
      UserError: config, store, workdir, mesh or checkpoint do not fit; the message says how.
      TrainingError, Preempted: as `loop.train`.
    """
    distributed.start(config.distributed, say)
    # From the first moment to the last, so that no save is cut short by a signal.
    with distributed.StopRequest() as stop, contextlib.closing(RunDir(workdir, distributed.is_primary())) as run:
        return _pretrain(config, run, stop, allow_changes)


def _pretrain(config: PretrainConfig, run: RunDir, stop: distributed.StopRequest, allow_changes: bool) -> dict[str, Any]:
    started = time.monotonic()
    workdir, primary = run.path, distributed.is_primary()
    log: Callable[[str], None] = say if primary else lambda line: None
    run.check(config, allow_changes)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check(mesh, config.model, config.train.batch_size, config.train.micro_batches)

    store = open_store(config, workdir, log)
    tokenizer = store.tokenizer()
    windows = Windows(store.split("train"), config.model.context_length, config.train.batch_size, config.train.seed)
    work = plan_work(config, mesh, store, windows, tokenizer, log)
    run.open(config, store.digest, allow_changes)
    if primary and not (run.tokenizer.exists() and load(run.tokenizer).fingerprint == tokenizer.fingerprint):
        _copy_whole(store.folder / "tokenizer", run.tokenizer)

    state, origin = initial_state(config, mesh, run, tokenizer, log)
    step = int(state["step"])
    run.supersede(step)
    if step > work.horizon.total:
        raise UserError(f"{workdir}: its checkpoint {step} lies beyond --train.duration ({work.horizon.total} steps)")
    header(config, mesh, store, work.horizon, log)
    if step == work.horizon.total and (workdir / "result.json").exists():
        log(f"{workdir}: finished at step {step} already; nothing to do")
        return read_json(workdir / "result.json")
    log(f"{origin}; compiling")
    run.record("event", step, event="start", origin=origin)

    progress = Progress(
        work.horizon.total,
        config.train.batch_size * config.model.context_length,
        _flops_over_peak(config, mesh),
        config.train.log_seconds,
        run.tensorboard if config.train.tensorboard else None,
        primary,
    )
    saver = checkpoint.Checkpoints(
        run.checkpoints,
        keep_latest=config.train.keep_latest,
        keep_best=config.train.keep_best,
        config_json=json.dumps(configs.to_dict(config), indent=1),
        config_digest=configs.digest(config),
        data_digest=store.digest,
        tokenizer=store.folder / "tokenizer",
    )
    try:
        with saver, distributed.losing_peers():
            state, scores = train(config, work, mesh, state, run, saver, progress, stop)
    finally:
        progress.close()
    result: dict[str, Any] = {
        "step": int(state["step"]),
        "tokens": int(state["step"]) * config.train.batch_size * config.model.context_length,
        "parameters": transformer.count(config.model),
        **scores,
        "tokens_per_second": round(progress.tokens_per_second),
        "seconds": round(time.monotonic() - started, 1),
    }
    run.record("final", result["step"], **{name: value for name, value in result.items() if name != "step"})
    run.write_result(result)
    score = f", validation loss {result['loss']:.4f}" if "loss" in result else ""
    log(f"done: {workdir} holds checkpoint {result['step']}{score}")
    return result


def open_store(config: PretrainConfig, workdir: Path, log: Callable[[str], None]) -> Store:
    """The config's token store, made by process 0 if it is not there yet.

    Raises:
      UserError: what `prepare` raises; or the store was made from another source, or with another tokenizer.
    """
    folder = Path(config.data.store) if config.data.store else workdir / "store"
    if distributed.is_primary() and not (folder / "index.json").exists():
        prepare(config, folder, log)
    distributed.barrier("the token store", log)
    store = Store.open(folder, config.data.verify)
    check_recipe(store, config)
    return store


def plan_work(
    config: PretrainConfig,
    mesh: Mesh,
    store: Store,
    windows: Windows,
    tokenizer: Tokenizer,
    log: Callable[[str], None],
) -> Work:
    """Turns durations into updates, and the store into batches and scores."""
    train, model = config.train, config.model

    def steps(duration: str, field: str, total: int | None = None) -> int:
        sizes = {"batch_size": train.batch_size, "context_length": model.context_length}
        return steps_of(duration, field, epoch=windows.windows_per_epoch, total=total, **sizes)

    total = steps(train.duration, "train.duration")
    configs.require(total > 0, "train.duration", f"'{train.duration}' is less than one update of {train.batch_size} windows")
    warmup = steps(config.optim.warmup, "optim.warmup", total)
    configs.require(warmup < total, "optim.warmup", f"{warmup} steps of warm-up leave nothing of a run of {total} steps")
    rows = sharding.host_rows(mesh, train.batch_size)

    def evidence(index: int) -> dict[str, Any]:
        epoch, window = windows.window_numbers(index, np.arange(train.batch_size))
        return {"epochs": epoch.tolist(), "windows": window.tolist()}

    return Work(
        horizon=Horizon(total, warmup),
        eval_every=max(steps(train.eval_every, "train.eval_every", total), 1),
        save_every=max(steps(train.save_every, "train.save_every", total), 1),
        batch_at=lambda index: windows.batch_at(index, rows),
        evaluate=make_evaluation(config, mesh, store, tokenizer, rows, log),
        evidence=evidence,
    )


def make_evaluation(
    config: PretrainConfig, mesh: Mesh, store: Store, tokenizer: Tokenizer, rows: np.ndarray, log: Callable[[str], None]
) -> Callable[[int, Any], dict[str, float]]:
    """(step, params) -> loss (nats a token), perplexity and bits a byte on the validation split; samples are shown besides."""
    split = store.split("validation")
    if split.num_tokens == 0:
        held_out = None
    else:
        held_out = EvaluationWindows(split, config.model.context_length, config.train.batch_size, config.train.eval_windows)
    compiled: Any = None

    def evaluate(step: int, params: transformer.Params) -> dict[str, float]:
        nonlocal compiled
        scores: dict[str, float] = {}
        if held_out is not None:
            compiled = compiled or lower_evaluation(config, mesh).compile()
            total = weight = 0.0
            for index in range(held_out.num_batches):
                batch = sharding.place_batch(mesh, held_out.batch_at(index, rows), config.train.batch_size)
                part, count = compiled(params, batch)
                total, weight = total + float(part), weight + float(count)
            loss = total / weight
            scores = {
                "loss": loss,
                "perplexity": math.exp(min(loss, 700.0)),
                "bits_per_byte": loss / math.log(2) * split.num_tokens / split.text_bytes,
            }
            log(f"step {step}: validation loss {loss:.4f}, perplexity {scores['perplexity']:.1f}")
        if config.train.sample_tokens and config.train.prompts:
            for prompt, text in zip(config.train.prompts, samples(config, params, tokenizer, step), strict=True):
                log(f"    {prompt}|{text}".replace("\n", " "))
        return scores

    return evaluate


def samples(config: PretrainConfig, params: transformer.Params, tokenizer: Tokenizer, step: int) -> list[str]:
    """Continuations of the config's prompts, drawn from the forty likeliest tokens each time."""
    prompts = [tokenizer.encode(prompt) or [tokenizer.separator] for prompt in config.train.prompts]
    room = config.model.context_length - max(map(len, prompts))
    if room < 1:
        return ["" for _ in prompts]
    count = min(config.train.sample_tokens, room)
    drawn = generate(config.model, params, prompts, count, top_k=40, stop=tokenizer.separator, seed=step)
    return [tokenizer.decode(tokens) for tokens in drawn]


def initial_state(
    config: PretrainConfig, mesh: Mesh, run: RunDir, tokenizer: Tokenizer, log: Callable[[str], None]
) -> tuple[State, str]:
    """The run's newest sound checkpoint, another run's parameters (`--init.from`) or random ones; and a line that says which."""
    found = checkpoint.newest(run.checkpoints, log) if distributed.is_primary() and run.checkpoints.exists() else None
    step = distributed.agree(-1 if found is None else found.step)
    if step >= 0:
        info = found or checkpoint.resolve(run.checkpoints / str(step), log)
        _require_tokenizer(info, tokenizer, "--data.store")
        return checkpoint.restore(info, abstract_state(config, mesh)), f"resuming at step {step}"
    state = init_state(config, mesh)
    if not config.init.from_:
        return state, "starting from random parameters"
    info = checkpoint.resolve(Path(config.init.from_), log)
    _require_tokenizer(info, tokenizer, "--init.from")
    params = checkpoint.restore_part(info, abstract_state(config, mesh)["params"])
    return state | {"params": params}, f"starting from the parameters of {info.path}"


def _require_tokenizer(info: checkpoint.Info, tokenizer: Tokenizer, field: str) -> None:
    """Refuses a checkpoint that was trained with another tokenizer than the token store's."""
    theirs = load(info.path / "tokenizer")
    if theirs.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{field}: {info.path} was trained with another tokenizer ({theirs.kind}, {theirs.vocab_size} entries, "
            f"fingerprint {theirs.fingerprint[:12]}) than this token store ({tokenizer.kind}, {tokenizer.fingerprint[:12]})"
        )


def header(config: PretrainConfig, mesh: Mesh, store: Store, horizon: Horizon, log: Callable[[str], None]) -> None:
    """One line that says what is trained on what."""
    axes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "single device"
    device = mesh.devices.flat[0]
    tokens = horizon.total * config.train.batch_size * config.model.context_length
    log(
        f"{transformer.count(config.model):,} parameters | {tokens:,} tokens in {horizon.total:,} steps, from "
        f"{store.split('train').num_tokens:,} | {mesh.size} x {device.device_kind} | mesh {axes} | attention "
        f"{resolve(config.model.attention)} | {transformer.compute_dtype(config.model)} over {config.model.param_dtype}"
    )


def _flops_over_peak(config: PretrainConfig, mesh: Mesh) -> float:
    peak = PEAK_FLOPS.get(mesh.devices.flat[0].device_kind)
    return flops_per_token(config.model) / (peak * mesh.size) if peak else 0.0


def _copy_whole(source: Path, target: Path) -> None:
    """Copies a folder under a temporary name first, so that a copy that was cut short is never taken for the folder."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
