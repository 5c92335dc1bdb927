"""The demo (`gpt-jax demo`), which pre-trains a small GPT, samples from it, and evaluates, fine-tunes and exports it."""

import collections
import dataclasses
import functools
import json
import time
from pathlib import Path

import jax
import numpy as np

from gpt_jax.config import FinetuneConfig, FinetuneLoopConfig, ModelOptions, OptimConfig, PretrainConfig, TransferConfig
from gpt_jax.config.load import load_config
from gpt_jax.data.dedup import is_held_out
from gpt_jax.data.installed_docs import InstalledDocs
from gpt_jax.data.store import Store
from gpt_jax.data.windows import EvaluationWindows
from gpt_jax.experiments.generate import continue_prompts
from gpt_jax.experiments.score_tables import format_table
from gpt_jax.experiments.synthetic_tasks import make_tasks
from gpt_jax.interop.export import export
from gpt_jax.runtime.console import format_duration, say
from gpt_jax.runtime.rundir import read_json
from gpt_jax.tasks.finetune import finetune
from gpt_jax.train.pretrain import pretrain

MARGIN = 1.5  # nats/token by which the model must beat the unigram model; a working installation reaches about 2
TRAIN_ROWS, VALIDATION_ROWS = 240, 160  # per synthetic task
MAX_TOKENS = {"classification": 48, "entailment": 64, "similarity": 64, "multiple_choice": 64}


def demo(workdir: Path) -> int:
    """Runs the demo on the documentation installed on this machine and prints its results.

    The model is also fine-tuned on four tasks that are made from the same documentation.

    Returns:
      The exit code: 1 if the model's loss is not `MARGIN` nats/token below that of a unigram model, 0 otherwise.
    """
    started = time.monotonic()
    config = load_config("demo")
    say(f"demo: a small GPT learns from the documentation installed on this machine; all files are written to {workdir}")
    result = pretrain(config, workdir)
    store = Store.open(workdir / "store", verify=False)
    unigram, bigram = ngram_losses(config, store)

    say("\nThe model writes:")
    texts = continue_prompts(workdir, config.train.prompts, config.train.sample_tokens, temperature=0.8, top_k=40)
    for prompt, text in zip(config.train.prompts, texts, strict=True):
        say(f"    {prompt}|{text}".replace("\n", " "))
    say("\nFour tasks made from the same documentation, each fine-tuned from the pre-trained model and from random parameters:")
    scores = finetune_synthetic_tasks(config, workdir)

    say("\nThe model in the Hugging Face format:")
    exported = workdir / "huggingface"
    parity = read_json(exported / "parity.json") if exported.exists() else export(workdir, "huggingface", exported, say)

    bits_per_byte = result["bits_per_byte"] / result["loss"]  # for each nat/token; equal for all models of these tokens
    losses = {"model": result["loss"], "interpolated bigram": bigram, "unigram": unigram}
    loss_rows = [(name, f"{loss:.3f}", f"{loss * bits_per_byte:.3f}") for name, loss in losses.items()]
    print("\n" + format_table([("validation loss", "nats/token", "bits/byte"), *loss_rows]))
    score_rows = [(name, *(f"{100 * accuracy:.1f}" for accuracy in accuracies)) for name, accuracies in scores.items()]
    print("\n" + format_table([("accuracy, %", "pre-trained", "from scratch", "majority class"), *score_rows]))
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
        print(f"\nThe demo failed: the model's loss must be at least {MARGIN} nats/token below that of the unigram model.")
        return 1
    return 0


def finetune_synthetic_tasks(config: PretrainConfig, workdir: Path) -> dict[str, tuple[float, float, float]]:
    """Fine-tunes the model in `workdir` on each synthetic task, in `workdir`/tasks.

    Returns:
      For each task, the validation accuracies of the model fine-tuned from pre-trained parameters, of the model fine-tuned from
      random parameters, and of always predicting the most frequent class.
    """
    # The two fine-tuning runs of a task compile the same programs.
    jax.config.update("jax_compilation_cache_dir", str(workdir / "tasks" / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    inits = {"pretrained": TransferConfig(str(workdir)), "nothing": TransferConfig("none", like=str(workdir))}
    passages = InstalledDocs(config.data.max_bytes).passages
    held_out = functools.partial(is_held_out, validation_share=config.data.validation_share)
    folder, scores = workdir / "tasks", {}
    for name, task in make_tasks(passages, held_out, folder, TRAIN_ROWS, VALIDATION_ROWS).items():
        tuning = FinetuneConfig(
            # As in pre-training, a model this small does not benefit from dropout.
            model=ModelOptions(embed_dropout=0.0, attention_dropout=0.0, residual_dropout=0.0),
            optim=OptimConfig(peak_lr=1e-3, schedule="linear", warmup="10%", b2=0.98, clip_norm=1.0),
            train=FinetuneLoopConfig(batch_size=16, duration="2 epochs", tensorboard=False),
            task=dataclasses.replace(task, num_length_buckets=1, max_tokens=MAX_TOKENS[task.kind]),
        )
        results = [finetune(dataclasses.replace(tuning, init=init), folder / name / origin) for origin, init in inits.items()]
        pretrained, random = (result["validation"]["accuracy"] for result in results)
        rows = Path(task.validation).read_text(encoding="utf-8").splitlines()
        labels = collections.Counter(json.loads(row)["label"] for row in rows)
        scores[f"{task.kind}: {name}"] = (pretrained, random, max(labels.values()) / labels.total())
    return scores


def ngram_losses(config: PretrainConfig, store: Store) -> tuple[float, float]:
    """Returns the validation losses in nats/token of a unigram and an interpolated bigram model of the training tokens.

    Both are scored on the same tokens as the GPT. The unigram model adds one to each count. The bigram model interpolates with
    the unigram model as proposed by Witten and Bell (1991), which needs no tuning:

        p(w | h) = (count(h w) + followers(h) p(w)) / (count(h) + followers(h))

    The memory needed is 8 bytes for each pair of vocabulary entries.
    """
    split = store.split("train")
    tokens = split.read(np.zeros(1, np.int64), split.num_tokens)[0].astype(np.int64)
    size = config.model.vocab_size
    unigram = (np.bincount(tokens, minlength=size) + 1) / (len(tokens) + size)
    pairs = np.bincount(tokens[:-1] * size + tokens[1:], minlength=size * size).reshape(size, size)
    counts = pairs.sum(axis=1)
    followers = np.maximum((pairs > 0).sum(axis=1), 1)  # 1 gives the unigram model for a history that was never seen
    validation, batch_size = store.split("validation"), config.train.batch_size
    windows = EvaluationWindows(validation, config.model.context_length, batch_size, config.train.eval_windows)
    losses, total_weight = np.zeros(2), 0.0
    for index in range(windows.num_batches):
        batch = windows.batch_at(index, np.arange(batch_size))
        history, word, weights = batch["tokens"], batch["targets"], batch["loss_weights"]
        bigram = (pairs[history, word] + followers[history] * unigram[word]) / (counts[history] + followers[history])
        losses -= [(weights * np.log(probability)).sum() for probability in (unigram[word], bigram)]
        total_weight += weights.sum()
    unigram_loss, bigram_loss = losses / total_weight
    return float(unigram_loss), float(bigram_loss)
