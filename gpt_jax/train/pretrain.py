"""Pre-training on unlabeled text (section 3.1): from a config to a trained language model."""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gpt_jax.config import ModelConfig, PretrainConfig, RunConfig
from gpt_jax.data.pipeline import DatasetFn
from gpt_jax.data.prepare import prepare
from gpt_jax.data.recipe import check_inputs, check_recipe
from gpt_jax.data.store import Store
from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.data.windows import EvaluationWindows, Windows
from gpt_jax.model.decode import generate
from gpt_jax.model.loss import Batch, language_model_loss
from gpt_jax.model.transformer import Params
from gpt_jax.runtime import console, distributed, sharding
from gpt_jax.runtime.mesh import check_batch, check_model
from gpt_jax.train import checkpoint, checkpoint_info
from gpt_jax.train.choices import keep_choices
from gpt_jax.train.loop import Evaluate, RunContext, Scores
from gpt_jax.train.restore import check_start, describe_start
from gpt_jax.train.run import require_tokenizer, run_training, start_run
from gpt_jax.train.schedule import resolve_schedule
from gpt_jax.train.step import LANGUAGE_MODEL, State, abstract_state, init_state, jit_evaluation


def pretrain(
    config: PretrainConfig,
    workdir: Path,
    allow_changes: bool = False,
    *,
    dataset_fn: DatasetFn | None = None,
    dataset_version: str = "",
) -> dict[str, Any]:
    """Pre-trains in `workdir`, resuming from its newest sound checkpoint if any; returns the contents of result.json.

    Args:
      allow_changes: continue a run even if its config or data have changed.
      dataset_fn: makes the tf.data.Dataset of training batches in place of `pipeline.make_dataset`.
      dataset_version: identifies a `dataset_fn` that changes results; empty if it does not. It becomes part of the data digest,
        so that a run cannot silently continue with a different one.

    Raises:
      UserError: the config, store, workdir, mesh or checkpoint do not match; the message explains why.
      TrainingError, Preempted: see `run.run_training`.
    """
    with start_run(config, workdir) as ctx:
        ctx.run.require_not_imported()
        ctx.run.check_config(config, allow_changes)
        check_start(ctx.run, config.init.from_, allow_changes)
        train, context_length = config.train, config.model.context_length
        mesh = sharding.make_mesh(config.mesh)
        check_batch(mesh.shape, train.batch_size, train.grad_accum_steps)
        check_model(mesh.shape, config.model)
        config = keep_choices(ctx.run, config, mesh)

        store = open_store(config, workdir, ctx.log, allow_changes)
        tokenizer = store.tokenizer()
        text = store.split("train")
        windows = Windows(text, context_length, train.batch_size, train.seed)
        schedule = resolve_schedule(config, context_length, windows.windows_per_epoch)
        digests = [store.content_digest, store.digest]
        if dataset_version:
            digests = [hashlib.sha256(f"{digest} {dataset_version}".encode()).hexdigest() for digest in digests]
        # Runs of earlier versions recorded the digest of the whole index, which includes the path of the text.
        stored = ctx.run.stored().get("data_digest")
        digest = next((digest for digest in digests if digest == stored), digests[0])

        tokens_per_step = train.batch_size * context_length
        result = run_training(
            ctx,
            config,
            mesh,
            LANGUAGE_MODEL,
            windows,
            schedule,
            tokenizer=tokenizer,
            data_digest=digest,
            title=f"{schedule.total_steps * tokens_per_step:,} tokens from a text of {text.num_tokens:,}",
            unit="tokens",
            initialize=lambda: initial_state(config, mesh, tokenizer, ctx),
            evaluate=make_evaluation(config, mesh, store, tokenizer, ctx.log),
            batch_provenance=windows.provenance,
            summarize=lambda state, scores: {"tokens": int(state["step"]) * tokens_per_step, **scores.metrics},
            dataset_fn=dataset_fn,
            allow_changes=allow_changes,
        )
        loss = f", validation loss {result['loss']:.4f}" if "loss" in result else ""
        ctx.log(f"done: {workdir} contains checkpoint {result['step']}{loss}")
        return result


def open_store(config: PretrainConfig, workdir: Path, log: console.Log, allow_changes: bool = False) -> Store:
    """Opens the config's token store, which process 0 creates if it does not exist yet.

    With `allow_changes`, the text and the tokenizer that the store was made from may have changed since.

    Raises:
      UserError: see `prepare`; or the store was made from a different source or with a different tokenizer.
    """
    folder = Path(config.data.store) if config.data.store else workdir / "store"
    with distributed.primary_first("the token store", log):
        made = distributed.is_primary() and not (folder / "index.json").exists()
        if made:
            prepare(config, folder, log, workdir)
        store = Store.open(folder, config.data.verify)
        check_recipe(folder, store.index["recipe"], config)
        if distributed.is_primary() and not made and not allow_changes:
            check_inputs(store, config, log, workdir, checksums=False)
    return store


def initial_state(config: PretrainConfig, mesh: Mesh, tokenizer: Tokenizer, ctx: RunContext) -> tuple[State, str]:
    """Returns a state with random parameters or those of another run (`--init.from`), and a line that says which."""
    state = init_state(config, mesh)
    if not config.init.from_:
        return state, "starting from random parameters"
    info = checkpoint_info.find_checkpoint(Path(config.init.from_), ctx.log)
    require_tokenizer(info, tokenizer, "--init.from")
    params = checkpoint.restore_params(info, abstract_state(config, mesh)["params"])
    ctx.run.start = describe_start(info)
    return state | {"params": params}, f"starting from the parameters of {info.path}"


# -- evaluation -------------------------------------------------------------------------------------------------------------


def make_evaluation(config: PretrainConfig, mesh: Mesh, store: Store, tokenizer: Tokenizer, log: console.Log) -> Evaluate:
    """Returns a function (step, params) -> scores on the validation split, which also logs continuations of the prompts."""
    split, model, train = store.split("validation"), config.model, config.train
    held_out = EvaluationWindows(split, model.context_length, train.batch_size, train.eval_windows) if split.num_tokens else None
    score_windows = make_window_scorer(config, mesh, train.batch_size)

    def evaluate(step: int, params: Params) -> Scores:
        scores = Scores({})
        if held_out is not None:
            total, weight = score_windows(params, held_out)
            metrics = language_model_metrics(total / weight, split.num_tokens / split.text_bytes)
            scores = Scores(metrics, metrics["loss"])
            log(f"step {step}: validation loss {metrics['loss']:.4f}, perplexity {metrics['perplexity']:.1f}")
        if train.sample_tokens and train.prompts:
            with jax.set_mesh(mesh):
                texts = sample_texts(config, params, tokenizer, seed=step)
            for prompt, text in zip(train.prompts, texts, strict=True):
                log(f"    {prompt}|{text}".replace("\n", " "))
        return scores

    return evaluate


def sample_texts(config: PretrainConfig, params: Params, tokenizer: Tokenizer, seed: int) -> list[str]:
    """Returns sampled continuations of the config's prompts, with each token drawn from the 40 most likely ones.

    They have at most `train.sample_tokens` tokens, and are empty if the context has no room. An empty prompt starts a new
    document.
    """
    prompts = [tokenizer.encode(prompt) or [tokenizer.eos_id] for prompt in config.train.prompts]
    num_tokens = min(config.train.sample_tokens, config.model.context_length - max(map(len, prompts)))
    if num_tokens < 1:
        return ["" for _ in prompts]
    drawn = generate(config.model, params, prompts, num_tokens, top_k=40, stop=tokenizer.eos_id, seed=seed)
    return [tokenizer.decode(tokens) for tokens in drawn]


def make_window_scorer(config: RunConfig, mesh: Mesh, batch_size: int) -> Callable[[Params, EvaluationWindows], list[float]]:
    """Returns a function (params, windows) -> [summed loss of all next tokens (nats), number of those tokens]."""
    score = jit_evaluation(config, mesh, total_loss)
    rows = sharding.host_rows(mesh, batch_size)

    def score_windows(params: Params, windows: EvaluationWindows) -> list[float]:
        totals = np.zeros(2)
        with jax.set_mesh(mesh):
            for index in range(windows.num_batches):
                batch = sharding.place_batch(mesh, windows.batch_at(index, rows), batch_size)
                totals += jax.device_get(score(params, batch))
        return totals.tolist()

    return score_windows


def total_loss(model: ModelConfig, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns a batch's sum of weight x loss (nats) and its sum of weights, both float32 scalars, without dropout."""
    return language_model_loss(model, params, batch, None), batch["loss_weights"].sum()


def language_model_metrics(loss: float, tokens_per_byte: float) -> dict[str, float]:
    """Returns the metrics of a mean loss in nats per token: the loss itself, perplexity and bits per byte of text."""
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "bits_per_byte": loss / math.log(2) * tokens_per_byte}
