"""The demo (`gpt-jax demo`), which pre-trains a small GPT, samples from it, and evaluates, fine-tunes and exports it."""

import collections
import dataclasses
import functools
import json
import math
import operator
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from gpt_jax.config import (
    FinetuneConfig,
    FinetuneLoopConfig,
    ModelOptions,
    OptimConfig,
    PipelineConfig,
    PretrainConfig,
    TransferConfig,
)
from gpt_jax.config.load import load_config
from gpt_jax.data.dedup import is_held_out
from gpt_jax.data.installed_docs import InstalledDocs
from gpt_jax.data.store import Store
from gpt_jax.data.windows import EvaluationWindows
from gpt_jax.experiments.generate import continue_prompts
from gpt_jax.experiments.score_tables import format_table
from gpt_jax.experiments.synthetic_tasks import Passage, make_tasks
from gpt_jax.interop.export import export
from gpt_jax.runtime.console import format_duration, say
from gpt_jax.runtime.lock import locked
from gpt_jax.runtime.rundir import read_json, write_atomic
from gpt_jax.tasks.finetune import finetune
from gpt_jax.train.pretrain import pretrain

MARGIN = 0.05  # nats/token by which the model must beat the bigram model; a working installation reaches about 0.3
MIN_ERRORS = 2.0  # standard errors that a gain from pre-training must exceed to count
MIN_GAINS = 2  # tasks that must have such a gain; a working installation has four
TRAIN_ROWS, VALIDATION_ROWS = 480, 400  # maximum per synthetic task
MAX_TOKENS = 64  # of one sequence of a task


def demo(workdir: Path, seed: int = 0) -> int:
    """Runs the demo on the documentation installed on this machine and prints its results.

    The model is also fine-tuned on four tasks that are made from the same documentation.

    Args:
      workdir: the folder for all files. An interrupted demo continues.
      seed: the seed of both kinds of training and of the tasks' rows.

    Returns:
      The exit code: 0 if the model beats an interpolated bigram model by `MARGIN` nats/token and at least `MIN_GAINS` of the
      tasks gain more than `MIN_ERRORS` standard errors from pre-training, and 1 otherwise.
    """
    started = time.monotonic()
    say(f"demo: a small GPT learns from the documentation installed on this machine; all files are written to {workdir}")
    config = load_config("demo")
    documents = workdir / "documents.jsonl"
    with locked(workdir, say):
        passages = read_passages(documents, config.data.max_bytes)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, source=str(documents)), train=dataclasses.replace(config.train, seed=seed)
    )
    result = pretrain(config, workdir)
    store = Store.open(workdir / "store", verify=False)
    unigram, bigram = ngram_losses(config, store)

    say("\nThe model writes:")
    texts = continue_prompts(workdir, config.train.prompts, config.train.sample_tokens, temperature=0.8, top_k=40)
    for prompt, text in zip(config.train.prompts, texts, strict=True):
        say(f"    {prompt}|{text}".replace("\n", " "))
    say("\nFour tasks made from the same documentation, each fine-tuned from the pre-trained model and from random parameters:")
    exported = workdir / "huggingface"
    with locked(workdir, say):
        scores = finetune_synthetic_tasks(config, workdir, passages)

        say("\nThe model in the Hugging Face format:")
        parity = read_json(exported / "parity.json") if exported.exists() else export(workdir, "huggingface", exported, say)

    bits_per_byte = result["bits_per_byte"] / result["loss"]  # for each nat/token; equal for all models of these tokens
    losses = {"model": result["loss"], "interpolated bigram": bigram, "unigram": unigram}
    loss_rows = [(name, f"{loss:.3f}", f"{loss * bits_per_byte:.3f}") for name, loss in losses.items()]
    print("\n" + format_table([("validation loss", "nats/token", "bits/byte"), *loss_rows]))
    header = ("accuracy, %", "pre-trained", "from scratch", "gain", "standard error", "majority class")
    print("\n" + format_table([header, *((name, *score.cells()) for name, score in scores.items())]))
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
    failures = find_failures(result["loss"], bigram, list(scores.values()))
    for failure in failures:
        print(f"\nThe demo failed: {failure}.")
    return 1 if failures else 0


def read_passages(path: Path, max_bytes: int) -> list[Passage]:
    """Returns the installed documentation, which the first call writes to `path` and later ones read from there.

    So a resumed demo uses the same text, even if a package was upgraded in the meantime, and finds it faster.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # A lone surrogate, which is not a character, is replaced.
        passages = [(package, text.encode("utf-8", "replace").decode()) for package, text in InstalledDocs(max_bytes).passages]
        write_atomic(path, "".join(json.dumps({"package": package, "text": text}) + "\n" for package, text in passages))
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [(row["package"], row["text"]) for row in rows]


# -- the tasks --------------------------------------------------------------------------------------------------------------


class TaskScores(NamedTuple):
    """Validation accuracies of a task's two models on the same rows, in [0, 1]."""

    pretrained: float
    scratch: float
    error: float
    """Standard error of the difference between the two."""
    majority: float
    """Accuracy of always predicting the most frequent label."""

    @property
    def gain(self) -> float:
        """The gain from pre-training."""
        return self.pretrained - self.scratch

    def cells(self) -> tuple[str, ...]:
        """Returns the cells of the printed table."""
        values = (self.pretrained, self.scratch, self.gain, self.error, self.majority)
        return tuple(f"{100 * value:.1f}" for value in values)


def compare_predictions(pretrained: Path, scratch: Path) -> TaskScores:
    """Returns the scores of two files of predictions for the same rows.

    The error is that of a paired comparison. A row counts +1 if only the pre-trained model is right, -1 if only the other one is,
    and 0 otherwise. The gain is the mean of these numbers, and its standard error is their sample standard deviation divided by
    the square root of the number of rows. Rows on which the models agree do not add to the error.
    """
    rows = [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in (pretrained, scratch)]
    ours, theirs = ([int(row["gold"] == row["prediction"]) for row in of_model] for of_model in rows)
    error = statistics.stdev(map(operator.sub, ours, theirs)) / math.sqrt(len(ours))
    majority = max(collections.Counter(row["gold"] for row in rows[0]).values()) / len(ours)
    return TaskScores(statistics.fmean(ours), statistics.fmean(theirs), error, majority)


def finetune_synthetic_tasks(config: PretrainConfig, workdir: Path, passages: list[Passage]) -> dict[str, TaskScores]:
    """Fine-tunes the model in `workdir` on each synthetic task, in `workdir`/tasks, and returns the scores of each task.

    A task's other model has the same architecture, settings and batches, and starts from random parameters.
    """
    inits = {"pretrained": TransferConfig(str(workdir)), "nothing": TransferConfig("none", like=str(workdir))}
    held_out = functools.partial(is_held_out, validation_share=config.data.validation_share)
    folder, seed, scores = workdir / "tasks", config.train.seed, {}
    for name, task in make_tasks(passages, held_out, folder, TRAIN_ROWS, VALIDATION_ROWS, seed).items():
        tuning = FinetuneConfig(
            # As in pre-training, a model this small does not benefit from dropout.
            model=ModelOptions(embed_dropout=0.0, attention_dropout=0.0, residual_dropout=0.0),
            data=PipelineConfig(pipeline=config.data.pipeline),
            optim=OptimConfig(peak_lr=5e-4, schedule="linear", warmup="10%", b2=0.98, clip_norm=1.0),
            # The models are scored once, at the end, so that nothing is selected on the validation rows.
            train=FinetuneLoopConfig(
                batch_size=16, duration="2 epochs", eval_every="2 epochs", seed=seed, log_seconds=3.5, tensorboard=False
            ),
            task=dataclasses.replace(task, num_length_buckets=1, max_tokens=MAX_TOKENS),
        )
        for origin, init in inits.items():
            finetune(dataclasses.replace(tuning, init=init), folder / name / origin)
        files = [folder / name / origin / "predictions" / "validation.jsonl" for origin in inits]
        scores[f"{task.kind}: {name}"] = compare_predictions(*files)
    return scores


def find_failures(loss: float, bigram: float, scores: list[TaskScores]) -> list[str]:
    """Returns a phrase for each criterion of the demo's success that is not met."""
    failures = []
    if loss > bigram - MARGIN:
        failures.append(f"the model's loss must be at least {MARGIN} nats/token below that of the bigram model")
    gains = sum(score.gain > MIN_ERRORS * score.error for score in scores)
    if gains < MIN_GAINS:
        failures.append(f"at least {MIN_GAINS} tasks must gain more than {MIN_ERRORS:g} standard errors; {gains} did")
    return failures


# -- n-gram models ----------------------------------------------------------------------------------------------------------


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
