"""Fine-tuning (section 3.2): a pre-trained network, a head for the task, the same loop; the best checkpoint is scored."""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from gpt_jax.config import (
    FinetuneConfig,
    FinetuneRunConfig,
    ModelConfig,
    ModelOptions,
    PretrainConfig,
    RunConfig,
    TokenizerConfig,
    TransferConfig,
)
from gpt_jax.config.load import config_from_dict, load_config
from gpt_jax.data import tokenizers
from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.errors import UserError, require
from gpt_jax.model.transformer import Params
from gpt_jax.runtime import distributed, sharding
from gpt_jax.runtime.rundir import RunDir, write_atomic
from gpt_jax.tasks import metrics
from gpt_jax.tasks.batches import ScoringBatches, TaskBatches
from gpt_jax.tasks.dataset import TaskDataset, load_dataset
from gpt_jax.tasks.head import Head, transfer
from gpt_jax.tasks.registry import Task, task_from_config
from gpt_jax.tasks.transforms import SpecialTokens
from gpt_jax.train import checkpoint
from gpt_jax.train.loop import Work
from gpt_jax.train.run import Training, conduct, schedule, session
from gpt_jax.train.step import ByShape, State, abstract_state, init_state, lower_evaluation, state_shardings


class Source(NamedTuple):
    """What a fine-tuning starts from."""

    model: ModelConfig
    """The architecture; its vocabulary may hold special tokens of an earlier fine-tuning."""
    tokenizer: Tokenizer
    info: checkpoint.Info | None
    """Where the parameters are; None: they are random."""


def finetune(config: FinetuneConfig, workdir: Path, allow_changes: bool = False) -> dict[str, Any]:
    """Fine-tunes in `workdir`, going on from its newest sound checkpoint if it has one; returns what result.json holds.

    Scores validation at every evaluation; in the end, the best checkpoint's scores on validation and test are the result, and its
    predictions are in `predictions/` (for hidden tests of GLUE also as its server takes them).

    Raises:
      UserError: config, task, checkpoint, workdir or mesh do not fit; the message says how.
      TrainingError, Preempted: as `loop.train`.
    """
    with session(config, workdir) as begun:
        run, log = begun.run, begun.log
        require(not any(workdir.glob("seed-*")), "workdir", f"{workdir} holds runs of several seeds; name another folder")
        task = task_from_config(config.task)  # a misspelt task is said before a checkpoint is looked for
        source = find_source(config.init, log)
        resolved = resolve(config, task, source)
        run.require_own()
        run.check(resolved, allow_changes)
        mesh = sharding.make_mesh(resolved.mesh)
        sharding.check_divisibility(mesh, resolved.model, resolved.train.batch_size, resolved.train.grad_accum_steps)
        with distributed.first_alone("the task's data", log):  # tensorflow-datasets may have to write them
            dataset = load_dataset(resolved.task, source.tokenizer, resolved.model.context_length, resolved.train.batch_size, log)
        head = head_of(dataset.task, resolved)
        scorer = Scorer(resolved, mesh, head, dataset)
        batches = TaskBatches(
            dataset.encoded["train"],
            resolved.train.batch_size,
            resolved.train.seed,
            dataset.lengths,
            resolved.task.bucket_by_length,
        )
        scoring_batches = ScoringBatches(dataset.encoded["validation"], resolved.train.batch_size, dataset.lengths)
        padding = {"train": batches.padding_share(), "validation": scoring_batches.padding_share()}
        log(
            f"padded to {', '.join(map(str, dataset.lengths))} tokens: {padding['train']:.1%} of the training tokens and "
            f"{padding['validation']:.1%} of validation's are padding"
        )

        def conclude(state: State, scores: dict[str, float]) -> dict[str, Any]:
            best, params = _best(run, resolved, mesh, head, state)
            written = [name for name in ("validation", "test") if name in dataset.splits]
            measured = {name: scorer.write(params, name, run.path / "predictions")[0] for name in written}
            return {
                "task": resolved.task.name,
                "seed": resolved.train.seed,
                "init": resolved.init.from_,
                "best_step": best,
                **{name: scores for name, scores in measured.items() if scores},
                "counts": dataset.counts,
                "padding": {split: round(share, 4) for split, share in padding.items()},
            }

        training = Training(
            work=_plan_work(resolved, mesh, head, dataset, batches, scorer, log),
            tokenizer=source.tokenizer,
            data_digest=dataset.digest,
            title=f"{dataset.task.title}: {len(dataset.splits['train'].examples):,} examples",
            unit="examples",
            units_per_step=resolved.train.batch_size,
            flops=0.0,  # examples differ in length
            fresh=lambda: _fresh_state(resolved, mesh, head, source),
            conclude=conclude,
        )
        result = conduct(resolved, mesh, training, begun, allow_changes)
        log(f"done: {workdir}: {summary(result)}")
        return result


def summary(result: dict[str, Any]) -> str:
    """The scores of a result in one line."""
    parts = []
    for split in ("validation", "test"):
        if split in result:
            scores = ", ".join(f"{name} {value:.4f}" for name, value in result[split].items() if name != "loss")
            parts.append(f"{split} {scores}")
    return f"checkpoint {result['best_step']} is the best: {'; '.join(parts)}"


def finetune_seeds(config: FinetuneConfig, workdir: Path, seeds: int, allow_changes: bool = False) -> dict[str, Any]:
    """Fine-tunes with `seeds` seeds, the config's and those after it, in `workdir`/seed-N; returns and writes what they scored.

    result.json gives for each split and metric the median, mean, standard deviation, minimum, maximum and all values.

    Raises:
      UserError, TrainingError, Preempted: as `finetune`.
    """
    require(seeds > 0, "seeds", f"must be positive, not {seeds}")
    require(not (workdir / "checkpoints").exists(), "workdir", f"{workdir} holds a run of one seed; name another folder")
    numbers = [config.train.seed + k for k in range(seeds)]
    results = []
    for seed in numbers:
        one = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
        results.append(finetune(one, workdir / f"seed-{seed}", allow_changes))
    collected: dict[str, Any] = {"task": config.task.name, "seeds": numbers, "init": config.init.from_}
    for split in ("validation", "test"):
        if split in results[0]:
            collected[split] = {name: spread([each[split][name] for each in results]) for name in results[0][split]}
    if distributed.is_primary():
        write_atomic(workdir / "config.json", (workdir / f"seed-{numbers[0]}" / "config.json").read_bytes())
        write_atomic(workdir / "result.json", json.dumps(collected, indent=1) + "\n")
    return collected


def spread(values: list[float]) -> dict[str, Any]:
    """Median, mean, sample standard deviation (0 of one value), least and greatest of some values, and the values."""
    return {
        "median": statistics.median(values),
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "min": min(values),
        "max": max(values),
        "values": values,
    }


def find_source(init: TransferConfig, log: Callable[[str], None]) -> Source:
    """What `--init.from` and `--init.like` name.

    Raises:
      UserError: no checkpoint there, one whose tokenizer is not its model's, or nothing that says which architecture and
        tokenizer to use.
    """
    require(bool(init.from_), "init.from", "say which run or checkpoint to fine-tune, or none for random parameters")
    if init.from_ != "none":
        require(not init.tokenizer, "init.tokenizer", "a checkpoint brings its own tokenizer")
        return _checkpoint_source(Path(init.from_), log)
    require(
        bool(init.like), "init.like", "say whose architecture the random parameters have: a run, a checkpoint or a config's name"
    )
    if Path(init.like).is_dir():
        require(not init.tokenizer, "init.tokenizer", "a checkpoint brings its own tokenizer")
        return _checkpoint_source(Path(init.like), log)._replace(info=None)
    config = load_config(init.like)
    if not isinstance(config, PretrainConfig):
        raise UserError(f"--init.like: '{init.like}' is a fine-tuning config, which has no architecture")
    kind = config.data.tokenizer.kind
    require(bool(init.tokenizer) or kind == "bytes", "init.tokenizer", f"give the folder of the {kind} tokenizer to use")
    wanted = TokenizerConfig(kind=kind, path=init.tokenizer)
    tokenizer = tokenizers.create(wanted, config.model.vocab_size, lambda: (), field="init.tokenizer")
    return Source(config.model, tokenizer, None)


def _checkpoint_source(path: Path, log: Callable[[str], None]) -> Source:
    info = checkpoint.resolve(path, log)
    model = config_from_dict(checkpoint.read_config(info)).model
    tokenizer = tokenizers.load(info.path / "tokenizer")
    if model.vocab_size - tokenizer.vocab_size not in (0, len(SpecialTokens._fields)):  # the latter: fine-tuned before
        raise UserError(
            f"{info.path}: its model has {model.vocab_size:,} entries and its tokenizer {tokenizer.vocab_size:,}; they do not go "
            "together, so name another checkpoint"
        )
    return Source(model, tokenizer, info)


def resolve(config: FinetuneConfig, task: Task, source: Source) -> FinetuneRunConfig:
    """The config with the source's architecture in place of mere options, with room for the special tokens, and with the labels
    of one's own task, which may have been read from its training rows."""
    options = {field.name: getattr(config.model, field.name) for field in dataclasses.fields(ModelOptions)}
    vocab_size = source.tokenizer.vocab_size + len(SpecialTokens._fields)
    model = dataclasses.replace(source.model, **options, vocab_size=vocab_size)
    layers = model.num_layers
    require(config.init.blocks <= layers, "init.blocks", f"the checkpoint has {layers} blocks, not {config.init.blocks}")
    require(model.kind != "lstm" or config.init.blocks <= 0, "init.blocks", "an LSTM is taken over whole (-1) or not at all (0)")
    sections = {field.name: getattr(config, field.name) for field in dataclasses.fields(FinetuneConfig)}
    labelled = config.task if config.task.name else dataclasses.replace(config.task, labels=task.labels)
    return FinetuneRunConfig(**sections | {"model": model, "task": labelled})


def head_of(task: Task, config: FinetuneRunConfig) -> Head:
    """How a task's outputs are read from the network."""
    choices = task.kind == "multiple_choice"
    return Head(len(task.labels), choices, config.task.lm_weight, config.task.classifier_dropout)


class Scorer:
    """Scores parameters on the splits of a dataset; compiles once for each shape."""

    def __init__(self, config: RunConfig, mesh: Mesh, head: Head, dataset: TaskDataset):
        self._mesh, self._dataset = mesh, dataset
        self._size = config.train.batch_size
        self._rows = sharding.host_rows(mesh, self._size)
        model_fns = head.model_fns()
        self._score = ByShape(
            lambda batch: lower_evaluation(config, mesh, head.log_probabilities, model_fns=model_fns, batch=batch)
        )

    def log_probabilities(self, params: Params, split: str) -> np.ndarray:
        """Of every example's outputs, float32 [examples, outputs]."""
        encoded = self._dataset.encoded[split]
        batches = ScoringBatches(encoded, self._size, self._dataset.lengths)
        result = np.zeros(encoded.labels.shape, np.float32)
        with jax.set_mesh(self._mesh):
            for step in range(batches.num_batches):
                batch = sharding.place_batch(self._mesh, batches.batch_at(step, self._rows), self._size)
                examples = batches.example_numbers(step)
                result[examples[examples >= 0]] = np.asarray(self._score(params, batch))[examples >= 0]
        return result

    def scores(self, log_probabilities: np.ndarray, split: str) -> dict[str, float]:
        """The task's metrics, and the mean of the task's loss in nats."""
        task, rows = self._dataset.task, self._dataset.splits[split].examples
        loss = -(self._dataset.encoded[split].labels * log_probabilities).sum(axis=1).mean()
        return metrics.score(task, rows, metrics.predict(task, np.exp(log_probabilities))) | {"loss": float(loss)}

    def write(self, params: Params, split: str, folder: Path) -> tuple[dict[str, float], list[Path]]:
        """Scores a split and writes its predictions; returns the scores, none where labels are hidden, and the files.

        Raises:
          UserError: as `metrics.write_glue`.
        """
        task, rows = self._dataset.task, self._dataset.splits[split].examples
        values = self.log_probabilities(params, split)
        labelled = self._dataset.is_labeled(split)
        files = []
        if distributed.is_primary():
            folder.mkdir(parents=True, exist_ok=True)
            files.append(folder / f"{split}.jsonl")
            metrics.write_predictions(files[0], task, rows, np.exp(values))
            if not labelled and task.name in metrics.GLUE_FILES:
                predictions = metrics.predict(task, np.exp(values))
                files += metrics.write_glue(folder, task, rows, predictions, self._dataset.splits[split].dropped_indices)
        return self.scores(values, split) if labelled else {}, files


def _plan_work(
    config: FinetuneRunConfig,
    mesh: Mesh,
    head: Head,
    dataset: TaskDataset,
    batches: TaskBatches,
    scorer: Scorer,
    log: Callable[[str], None],
) -> Work:
    size = config.train.batch_size
    horizon, eval_every, save_every = schedule(config, None, batches.steps_per_epoch * size)
    rows = sharding.host_rows(mesh, size)
    metric = dataset.task.metrics[0]

    def evaluate(step: int, params: Params) -> dict[str, float]:
        scores = scorer.scores(scorer.log_probabilities(params, "validation"), "validation")
        shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        log(f"step {step}, epoch {step / batches.steps_per_epoch:.3g}: validation {shown}")
        return scores | {checkpoint.RANK: -scores[metric]}

    return Work(
        horizon=horizon,
        eval_every=eval_every,
        save_every=save_every,
        batch_at=lambda step: batches.batch_at(step, rows),
        evaluate=evaluate,
        evidence=lambda step: {"examples": [dataset.splits["train"].examples[i].where for i in batches.example_numbers(step)]},
        model_fns=head.model_fns(),
        save_evaluated=True,
    )


def _fresh_state(config: FinetuneRunConfig, mesh: Mesh, head: Head, source: Source) -> tuple[State, str]:
    """Random parameters with the source's in the place of those that it has; and a line that says so."""
    model_fns = head.model_fns()
    state = init_state(config, mesh, model_fns)
    if source.info is None:
        return state, "starting from random parameters"
    pretrained = dataclasses.replace(config, model=source.model)
    trained = checkpoint.restore_part(source.info, abstract_state(pretrained, mesh)["params"])
    move = functools.partial(transfer, blocks=config.init.blocks, entries=min(source.model.vocab_size, config.model.vocab_size))
    with jax.set_mesh(mesh):
        params = jax.jit(move, out_shardings=state_shardings(config, mesh, model_fns)["params"])(state["params"], trained)
    blocks = "" if config.init.blocks == -1 else f"embeddings and the first {config.init.blocks} blocks of "
    return state | {"params": params}, f"starting from {blocks}{source.info.path}"


def _best(run: RunDir, config: FinetuneRunConfig, mesh: Mesh, head: Head, state: State) -> tuple[int, Params]:
    """The step and the parameters of the best checkpoint, or of the last state where none has a score."""
    ranked = checkpoint.best(checkpoint.inspect(run.checkpoints), 1) if distributed.is_primary() else []
    step = distributed.agree(ranked[0].step if ranked else -1)
    if step in (-1, int(state["step"])):
        return int(state["step"]), state["params"]
    info = checkpoint.resolve(run.checkpoints / str(step), lambda line: None)
    return step, checkpoint.restore_part(info, abstract_state(config, mesh, head.model_fns())["params"])
