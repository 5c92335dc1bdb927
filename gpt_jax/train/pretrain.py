"""Pre-training on unlabelled text (section 3.1): the token store, its windows, and what is measured on the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gpt_jax.config import ModelConfig, PretrainConfig
from gpt_jax.data.prepare import check_recipe, prepare
from gpt_jax.data.store import Store
from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.data.windows import EvaluationWindows, Windows
from gpt_jax.model.decode import generate
from gpt_jax.model.loss import Batch, language_model_loss
from gpt_jax.model.transformer import Params
from gpt_jax.runtime import distributed, sharding
from gpt_jax.train import checkpoint
from gpt_jax.train.logging import PEAK_FLOPS, flops_per_token
from gpt_jax.train.loop import Work
from gpt_jax.train.run import Training, conduct, require_tokenizer, schedule, session
from gpt_jax.train.step import ByShape, State, abstract_state, init_state, lower_evaluation


def pretrain(config: PretrainConfig, workdir: Path, allow_changes: bool = False) -> dict[str, Any]:
    """Pre-trains in `workdir`, going on from its newest sound checkpoint if it has one; returns what result.json holds.

    Raises:
      UserError: config, store, workdir, mesh or checkpoint do not fit; the message says how.
      TrainingError, Preempted: as `loop.train`.
    """
    with session(config, workdir) as begun:
        begun.run.require_own()
        begun.run.check(config, allow_changes)
        mesh = sharding.make_mesh(config.mesh)
        sharding.check_divisibility(mesh, config.model, config.train.batch_size, config.train.grad_accum_steps)
        store = open_store(config, workdir, begun.log)
        tokenizer = store.tokenizer()
        work = plan_work(config, mesh, store, tokenizer, begun.log)
        tokens_per_step = config.train.batch_size * config.model.context_length
        peak = PEAK_FLOPS.get(mesh.devices.flat[0].device_kind)
        training = Training(
            work=work,
            tokenizer=tokenizer,
            data_digest=store.digest,
            title=f"{work.horizon.total * tokens_per_step:,} tokens, from {store.split('train').num_tokens:,},",
            unit="tokens",
            units_per_step=tokens_per_step,
            flops=flops_per_token(config.model) / (peak * mesh.size) if peak else 0.0,
            fresh=lambda: fresh_state(config, mesh, tokenizer, begun.log),
            conclude=lambda state, scores: {"tokens": int(state["step"]) * tokens_per_step, **scores},
        )
        result = conduct(config, mesh, training, begun, allow_changes)
        score = f", validation loss {result['loss']:.4f}" if "loss" in result else ""
        begun.log(f"done: {workdir} holds checkpoint {result['step']}{score}")
        return result


def open_store(config: PretrainConfig, workdir: Path, log: Callable[[str], None]) -> Store:
    """The config's token store, made by process 0 if it is not there yet.

    Raises:
      UserError: what `prepare` raises; or the store was made from another source, or with another tokenizer.
    """
    folder = Path(config.data.store) if config.data.store else workdir / "store"
    with distributed.first_alone("the token store", log):
        if distributed.is_primary() and not (folder / "index.json").exists():
            prepare(config, folder, log)
        store = Store.open(folder, config.data.verify)
        check_recipe(store, config)
    return store


def plan_work(config: PretrainConfig, mesh: Mesh, store: Store, tokenizer: Tokenizer, log: Callable[[str], None]) -> Work:
    """Turns durations into updates, and the store into batches and scores."""
    train, model = config.train, config.model
    windows = Windows(store.split("train"), model.context_length, train.batch_size, train.seed)
    rows = sharding.host_rows(mesh, train.batch_size)
    horizon, eval_every, save_every = schedule(config, model.context_length, windows.windows_per_epoch)

    def evidence(index: int) -> dict[str, Any]:
        epoch, window = windows.window_numbers(index, np.arange(train.batch_size))
        return {"epochs": epoch.tolist(), "windows": window.tolist()}

    return Work(
        horizon=horizon,
        eval_every=eval_every,
        save_every=save_every,
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
    score = ByShape(lambda batch: lower_evaluation(config, mesh, total_loss, batch=batch))

    def evaluate(step: int, params: Params) -> dict[str, float]:
        scores: dict[str, float] = {}
        if held_out is not None:
            total = weight = 0.0
            for index in range(held_out.num_batches):
                batch = sharding.place_batch(mesh, held_out.batch_at(index, rows), config.train.batch_size)
                part, count = score(params, batch)
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


def total_loss(model: ModelConfig, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Sum of weight x loss, and sum of weights, of a batch; without dropout."""
    return language_model_loss(model, params, batch, None), batch["loss_weights"].sum()


def samples(config: PretrainConfig, params: Params, tokenizer: Tokenizer, step: int) -> list[str]:
    """Continuations of the config's prompts, drawn from the forty likeliest tokens each time."""
    prompts = [tokenizer.encode(prompt) or [tokenizer.eos_id] for prompt in config.train.prompts]
    room = config.model.context_length - max(map(len, prompts))
    if room < 1:
        return ["" for _ in prompts]
    count = min(config.train.sample_tokens, room)
    drawn = generate(config.model, params, prompts, count, top_k=40, stop=tokenizer.eos_id, seed=step)
    return [tokenizer.decode(tokens) for tokens in drawn]


def fresh_state(config: PretrainConfig, mesh: Mesh, tokenizer: Tokenizer, log: Callable[[str], None]) -> tuple[State, str]:
    """Random parameters or those of another run (`--init.from`), and a line that says which."""
    state = init_state(config, mesh)
    if not config.init.from_:
        return state, "starting from random parameters"
    info = checkpoint.resolve(Path(config.init.from_), log)
    require_tokenizer(info, tokenizer, "--init.from")
    params = checkpoint.restore_part(info, abstract_state(config, mesh)["params"])
    return state | {"params": params}, f"starting from the parameters of {info.path}"
