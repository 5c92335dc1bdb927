"""Whole stories told with the parts below: the demo, and what a trained model says."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from gpt_jax.config import FinetuneConfig, FinetuneLoopConfig, ModelOptions, OptimConfig, PretrainConfig, TransferConfig
from gpt_jax.config.load import load_config
from gpt_jax.data.dedup import is_held_out
from gpt_jax.data.sources import InstalledDocs
from gpt_jax.data.store import Store
from gpt_jax.data.windows import EvaluationWindows
from gpt_jax.experiments.synthetic_tasks import make_tasks
from gpt_jax.interop.export import export
from gpt_jax.model.decode import generate
from gpt_jax.runtime.console import format_duration, say
from gpt_jax.runtime.rundir import read_json
from gpt_jax.tasks.finetune import finetune
from gpt_jax.train.pretrain import pretrain
from gpt_jax.train.restore import load_model

MARGIN = 1.5  # nats by which the demo's model must beat a unigram model, or else something is broken
TRAIN_ROWS, VALIDATION_ROWS = 240, 160  # of each of the demo's tasks
MAX_TOKENS = {"classification": 48, "entailment": 64, "similarity": 64, "multiple_choice": 64}


def demo(workdir: Path) -> int:
    """Pre-trains a small GPT on the documentation of this machine, samples from it, compares it with counting, and fine-tunes it
    on four tasks made from the same documentation.

    Returns:
      The exit code: 1 if the model is not `MARGIN` nats better than a unigram model of the same tokens.
    """
    started = time.monotonic()
    config = load_config("demo")
    say(f"demo: a small GPT learns from the documentation installed on this machine; everything goes to {workdir}")
    result = pretrain(config, workdir)
    store = Store.open(workdir / "store", verify=False)
    unigram, bigram = ngram_losses(config, store)
    per_byte = result["bits_per_byte"] / result["loss"]  # bits a byte for each nat a token: the same for all three models

    say("\nWhat it writes:")
    prompts = list(config.train.prompts)
    for prompt, text in continue_prompts(workdir, prompts, config.train.sample_tokens, temperature=0.8, top_k=40):
        say(f"    {prompt}|{text}".replace("\n", " "))
    say("\nFour tasks made from the same documentation, each fine-tuned from the model and from nothing:")
    scores = fine_tune_made_tasks(config, workdir)

    say("\nFor other frameworks:")
    exported = workdir / "huggingface"
    parity = read_json(exported / "parity.json") if exported.exists() else export(workdir, "huggingface", exported, say)

    rows = [("model", result["loss"]), ("interpolated bigram", bigram), ("unigram", unigram)]
    print(f"\n{'validation loss':<24}{'nats/token':>12}{'bits/byte':>12}")
    for name, loss in rows:
        print(f"{name:<24}{loss:>12.3f}{loss * per_byte:>12.3f}")
    print(f"\n{'accuracy, %':<32}{'pre-trained':>12}{'from nothing':>14}{'majority class':>16}")
    for name, (pretrained, nothing, majority) in scores.items():
        print(f"{name:<32}{100 * pretrained:>12.1f}{100 * nothing:>14.1f}{100 * majority:>16.1f}")
    print(
        f"\nparameters   {result['parameters']:,}\n"
        f"tokens seen  {result['tokens']:,} (the corpus has {store.split('train').num_tokens:,})\n"
        f"speed        {result['tokens_per_second']:,.0f} tokens/s on {jax.device_count()} x {jax.devices()[0].device_kind}\n"
        f"run          {workdir} (metrics.jsonl, checkpoints/, tensorboard/, result.json, tasks/)\n"
        f"exported     {exported}: logits within {parity['logits']['max_abs_difference']:.1e} at "
        f"{parity['logits']['positions']:,} positions ({parity['verified_with']})\n"
        f"time         {format_duration(time.monotonic() - started)}\n\n"
        f'next         gpt-jax generate {workdir} --prompt "The function"'
    )
    if result["loss"] > unigram - MARGIN:
        print(f"\nThe demo failed: the loss must end {MARGIN} nats under the unigram model's.")
        return 1
    return 0


def fine_tune_made_tasks(config: PretrainConfig, workdir: Path) -> dict[str, tuple[float, float, float]]:
    """Fine-tunes the model in `workdir` on each of `made`'s tasks, in `workdir`/tasks.

    Returns:
      For each task the validation accuracy from the pre-trained model and from random parameters, and the majority class's.
    """
    # From the model and from nothing, the same programs are compiled.
    jax.config.update("jax_compilation_cache_dir", str(workdir / "tasks" / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    passages = InstalledDocs(config.data.max_bytes).passages
    scores = {}
    held_out = functools.partial(is_held_out, validation_share=config.data.validation_share)
    for name, task in make_tasks(passages, held_out, workdir / "tasks", TRAIN_ROWS, VALIDATION_ROWS).items():
        tuning = FinetuneConfig(
            # As in the demo's pre-training: a model this small has nothing to drop.
            model=ModelOptions(embed_dropout=0.0, attention_dropout=0.0, residual_dropout=0.0),
            optim=OptimConfig(peak_lr=1e-3, schedule="linear", warmup="10%", b2=0.98, clip_norm=1.0),
            train=FinetuneLoopConfig(
                batch_size=16, duration="2 epochs", eval_every="1 epochs", save_every="1 epochs", tensorboard=False
            ),
            task=dataclasses.replace(task, num_length_buckets=1, max_tokens=MAX_TOKENS[task.kind]),
        )
        accuracies = []
        for origin in ("pretrained", "nothing"):
            whence = TransferConfig(str(workdir)) if origin == "pretrained" else TransferConfig("none", like=str(workdir))
            folder = workdir / "tasks" / name / origin
            result = finetune(dataclasses.replace(tuning, init=whence), folder)
            accuracies.append(result["validation"]["accuracy"])
        rows = Path(task.validation).read_text(encoding="utf-8").splitlines()
        labels = collections.Counter(json.loads(row)["label"] for row in rows)
        scores[f"{task.kind}: {name}"] = (accuracies[0], accuracies[1], max(labels.values()) / labels.total())
    return scores


def continue_prompts(
    path: Path,
    prompts: Sequence[str],
    num_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[tuple[str, str]]:
    """Yields each prompt with its continuation by a checkpoint's model.

    Args:
      path: a run's folder, or one checkpoint's.

    Raises:
      UserError: no sound checkpoint there, or the prompt and `num_tokens` do not fit the context.
    """
    config, _, params, tokenizer, _ = load_model(path)
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    drawn = generate(
        config.model,
        params,
        encoded,
        num_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop=tokenizer.eos_id,
        seed=seed,
    )
    for prompt, tokens in zip(prompts, drawn, strict=True):
        yield prompt, tokenizer.decode(tokens)


def ngram_losses(config: PretrainConfig, store: Store) -> tuple[float, float]:
    """Validation losses in nats a token of a unigram and an interpolated bigram model of the training tokens.

    They are scored on the very tokens that the model is scored on. The unigram adds one to each count; the bigram is
    interpolated with it after Witten and Bell (1991), so that nothing is tuned:

        p(w | h) = (count(h w) + followers(h) p(w)) / (count(h) + followers(h))
    """
    split = store.split("train")
    train = split.read(np.zeros(1, np.int64), split.num_tokens)[0].astype(np.int64)
    size = config.model.vocab_size
    counts = np.bincount(train, minlength=size)
    unigram = (counts + 1) / (len(train) + size)
    pairs, pair_counts = np.unique(train[:-1] * size + train[1:], return_counts=True)
    followers = np.bincount(pairs // size, minlength=size)
    histories = np.bincount(train[:-1], minlength=size)

    held_out = EvaluationWindows(
        store.split("validation"), config.model.context_length, config.train.batch_size, config.train.eval_windows
    )
    totals = np.zeros(3)
    for index in range(held_out.num_batches):
        batch = held_out.batch_at(index, np.arange(config.train.batch_size))
        history, word = (batch[name].astype(np.int64) for name in ("tokens", "targets"))
        found = np.minimum(np.searchsorted(pairs, history * size + word), len(pairs) - 1)
        together = np.where(pairs[found] == history * size + word, pair_counts[found], 0)
        novel = np.maximum(followers[history], 1)  # after a history never seen, all weight is the unigram's
        bigram = (together + novel * unigram[word]) / (histories[history] + novel)
        weights = batch["loss_weights"]
        totals += [-(weights * np.log(unigram[word])).sum(), -(weights * np.log(bigram)).sum(), weights.sum()]
    return float(totals[0] / totals[2]), float(totals[1] / totals[2])
