"""Fine-tuning (section 3.2): trains a pre-trained network with a head for a task, and scores the best checkpoint."""

import dataclasses
import functools
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gpt_jax.config import FinetuneConfig, FinetuneRunConfig, RunConfig
from gpt_jax.errors import require
from gpt_jax.model.transformer import Params
from gpt_jax.runtime import distributed
from gpt_jax.runtime.console import say
from gpt_jax.runtime.mesh import check_batch, check_model
from gpt_jax.runtime.rundir import RunDir, write_atomic
from gpt_jax.runtime.sharding import abstract_batch, host_rows, make_mesh, place_batch
from gpt_jax.tasks.batches import TaskBatches, count_steps, largest_scoring_batches
from gpt_jax.tasks.dataset import TaskDataset, load_dataset
from gpt_jax.tasks.head import Head, make_head, transfer
from gpt_jax.tasks.init_source import InitSource, find_init, resolve_config
from gpt_jax.tasks.lengths import count_passes, keep_lengths
from gpt_jax.tasks.metrics import predict, score, write_glue, write_predictions
from gpt_jax.tasks.registry import task_from_config
from gpt_jax.train.checkpoint import restore_params
from gpt_jax.train.checkpoint_info import best_checkpoints, find_step, own_checkpoints
from gpt_jax.train.choices import keep_choices
from gpt_jax.train.compilation import AbstractBatch, BackgroundCompiler, CompiledByShape
from gpt_jax.train.loop import Scores
from gpt_jax.train.restore import check_start, describe_start
from gpt_jax.train.run import run_training, start_run
from gpt_jax.train.schedule import Schedule, resolve_schedule
from gpt_jax.train.step import State, abstract_state, init_state, jit_evaluation, state_shardings

RELEASED_EVALS = (1000, 2000, 4000, 8000, 16_000, 32_000)
"""Updates of the first epoch after which the released code scores the validation split, in addition to the end of each epoch."""


def finetune(config: FinetuneConfig, workdir: Path, allow_changes: bool = False) -> dict[str, Any]:
    """Fine-tunes in `workdir`, from its newest sound checkpoint if there is one; returns the contents of result.json.

    The validation split is scored at every evaluation. The result contains the best checkpoint's scores on the validation and
    test splits. Its predictions are written to `predictions/`; for GLUE's hidden test splits, they are also written in the format
    of GLUE's server.

    Raises:
      UserError: config, task, checkpoint, workdir or mesh do not fit together; the message says why.
      TrainingError, Preempted: as `run.run_training`.
    """
    with start_run(config, workdir) as ctx:
        require(not any(workdir.glob("seed-*")), "workdir", f"{workdir} contains runs of several seeds; use another folder")
        task = task_from_config(config.task)  # A misspelled task is reported before the checkpoint is read.
        ctx.run.require_not_imported()
        source = find_init(config.init, ctx.log, ctx.run)
        check_start(ctx.run, config.init.from_, allow_changes)
        resolved = resolve_config(config, task, source.architecture)
        ctx.run.check_config(resolved, allow_changes)
        train, batch_size = resolved.train, resolved.train.batch_size
        mesh = make_mesh(resolved.mesh)
        check_batch(mesh.shape, batch_size, train.grad_accum_steps)
        check_model(mesh.shape, resolved.model)
        platform = mesh.devices.flat[0].platform
        resolved = keep_choices(ctx.run, resolved, mesh)
        with distributed.primary_first("the task's data", ctx.log):  # tensorflow-datasets may have to write the data.
            dataset = load_dataset(resolved.task, source.tokenizer, resolved.model.context_length, ctx.log)
        steps_per_epoch = count_steps(dataset.encoded["train"], batch_size)
        schedule = task_schedule(resolved, steps_per_epoch)
        passes = count_passes(schedule, steps_per_epoch)
        lengths = ctx.run.lengths = keep_lengths(ctx.run.stored(), resolved, dataset.encoded, passes, platform, mesh.size)
        batches = TaskBatches(dataset.encoded["train"], batch_size, train.seed, lengths, resolved.task.bucket_by_length)
        head = make_head(dataset.task, resolved)
        scorer = TaskScorer(resolved, mesh, head, dataset, lengths, batches.padding_share())
        padding = {"train": batches.padding_share(), "validation": scorer.padding_share("validation")}
        ctx.log(_describe_padding(lengths, padding))
        examples = dataset.splits["train"].examples

        def evaluate(step: int, params: Params) -> Scores:
            metrics = scorer.scores(scorer.log_probabilities(params, "validation"), "validation")
            shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            ctx.log(f"step {step}, epoch {step / steps_per_epoch:.3g}: validation {shown}")
            return Scores(metrics, -metrics[dataset.task.metrics[0]])

        def summarize(state: State, scores: Scores) -> dict[str, Any]:
            best_step, params = _best_params(ctx.run, resolved, mesh, head, state)
            predictions = ctx.run.path / "predictions"
            scored = {split: scorer.write(params, split, predictions)[0] for split in dataset.splits if split != "train"}
            return {
                "task": resolved.task.name,
                "seed": train.seed,
                "init": resolved.init.from_,
                "best_step": best_step,
                **{split: metrics for split, metrics in scored.items() if metrics},
                "counts": dataset.counts,
                "padding": {split: round(share, 4) for split, share in padding.items()},
            }

        result = run_training(
            ctx,
            resolved,
            mesh,
            head.trainable_model(),
            batches,
            schedule,
            tokenizer=source.tokenizer,
            data_digest=dataset.digest,
            title=f"{dataset.task.title}: {len(examples):,} examples",
            unit="examples",
            initialize=lambda: _initial_state(resolved, mesh, head, source, ctx.run),
            evaluate=evaluate,
            batch_provenance=lambda step: {"examples": [examples[i].where for i in batches.example_numbers(step)]},
            summarize=summarize,
            save_evaluated=True,
            lengths_from=lambda step: batches.used_lengths(step, schedule.total_steps),
            compile_evaluation=scorer.compile_ahead,
            allow_changes=allow_changes,
        )
        ctx.log(f"done: {workdir}: {_describe_result(result)}")
        return result


def task_schedule(config: FinetuneRunConfig, steps_per_epoch: int) -> Schedule:
    """Returns the length and the intervals of a run, including the released code's evaluations if requested."""
    schedule = resolve_schedule(config, None, steps_per_epoch * config.train.batch_size)
    wanted = RELEASED_EVALS if config.train.eval_in_first_epoch else ()
    return schedule._replace(extra_evals=frozenset(step for step in wanted if step <= steps_per_epoch))


def _describe_padding(lengths: Sequence[int], shares: Mapping[str, float]) -> str:
    """Returns a line with the lengths of the batches and the share of padding in the training and validation splits."""
    return (
        f"padded to {', '.join(map(str, lengths))} tokens: {shares['train']:.1%} of the training tokens and "
        f"{shares['validation']:.1%} of the validation tokens are padding"
    )


def _describe_result(result: dict[str, Any]) -> str:
    """Returns the scores of a result as one line."""
    parts = []
    for split in ("validation", "test"):
        if split in result:
            scores = ", ".join(f"{name} {value:.4f}" for name, value in result[split].items() if name != "loss")
            parts.append(f"{split} {scores}")
    return f"checkpoint {result['best_step']} is the best: {'; '.join(parts)}"


# -- several seeds ----------------------------------------------------------------------------------------------------------


def finetune_seeds(config: FinetuneConfig, workdir: Path, seeds: int, allow_changes: bool = False) -> dict[str, Any]:
    """Fine-tunes with `seeds` consecutive seeds from the config's on, in `workdir`/seed-N; writes and returns the scores.

    For each split and metric, result.json contains the median, mean, standard deviation, minimum, maximum and all values.

    Raises:
      UserError, TrainingError, Preempted: as `finetune`.
    """
    require(seeds > 0, "seeds", f"must be positive, not {seeds}")
    last = config.train.seed + seeds - 1
    require(last < 2**32, "seeds", f"the last seed would be {last}, but a seed is at most 2^32 - 1")
    require(not (workdir / "checkpoints").exists(), "workdir", f"{workdir} contains a run of one seed; use another folder")
    numbers = [config.train.seed + k for k in range(seeds)]
    distributed.start(config.distributed, say)
    results = []
    with distributed.locked(workdir, say):
        for seed in numbers:
            seeded = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
            results.append(finetune(seeded, workdir / f"seed-{seed}", allow_changes))
        collected: dict[str, Any] = {"task": config.task.name, "seeds": numbers, "init": config.init.from_}
        for split in ("validation", "test"):
            if split in results[0]:
                names = [name for name in results[0][split] if all(name in result.get(split, ()) for result in results)]
                collected[split] = {name: spread([result[split][name] for result in results]) for name in names}
        if distributed.is_primary():
            write_atomic(workdir / "config.json", (workdir / f"seed-{numbers[0]}" / "config.json").read_bytes())
            write_atomic(workdir / "result.json", json.dumps(collected, indent=1) + "\n")
    return collected


def spread(values: list[float]) -> dict[str, Any]:
    """Returns the median, mean, sample standard deviation (0 for one value), minimum and maximum of values, and the values."""
    return {
        "median": statistics.median(values),
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "min": min(values),
        "max": max(values),
        "values": values,
    }


# -- the initial parameters -------------------------------------------------------------------------------------------------


def _initial_state(config: FinetuneRunConfig, mesh: Mesh, head: Head, source: InitSource, run: RunDir) -> tuple[State, str]:
    """Returns a state with the source's parameters, if there are any, and a line for the log that describes its origin."""
    model = head.trainable_model()
    state = init_state(config, mesh, model)
    if source.info is None:
        return state, "starting from random parameters"
    source_config = dataclasses.replace(config, model=source.model)
    pretrained = restore_params(source.info, abstract_state(source_config, mesh)["params"])
    entries = min(source.model.vocab_size, config.model.vocab_size)
    move = functools.partial(transfer, blocks=config.init.blocks, entries=entries)
    with jax.set_mesh(mesh):
        params = jax.jit(move, out_shardings=state_shardings(config, mesh, model)["params"])(state["params"], pretrained)
    run.start = describe_start(source.info)
    blocks = "" if config.init.blocks == -1 else f"embeddings and the first {config.init.blocks} blocks of "
    return state | {"params": params}, f"starting from {blocks}{source.info.path}"


# -- scoring ----------------------------------------------------------------------------------------------------------------


class TaskScorer:
    """Scores parameters on the splits of a dataset. It compiles once for each shape of a batch.

    Args:
      lengths: the lengths that batches are padded to (`lengths.resolve_lengths`).
      max_padding: maximum share of padding that larger batches may lead to; see `largest_scoring_batches`.
    """

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        head: Head,
        dataset: TaskDataset,
        lengths: Sequence[int],
        max_padding: float | None = None,
    ):
        self._mesh, self._dataset = mesh, dataset
        self._batches = {
            name: largest_scoring_batches(split, config.train.batch_size, lengths, max_padding)
            for name, split in dataset.encoded.items()
            if name != "train"
        }
        params = abstract_state(config, mesh, head.trainable_model())["params"]
        score = jit_evaluation(config, mesh, head.log_probabilities)

        def lower(batch: AbstractBatch) -> jax.stages.Lowered:
            with jax.set_mesh(mesh):
                return score.lower(params, batch)

        self._score = CompiledByShape(lower)

    def padding_share(self, split: str) -> float:
        """Returns the share of padding among the tokens of a split's batches."""
        return self._batches[split].padding_share()

    def compile_ahead(self, compiler: BackgroundCompiler) -> None:
        """Starts to compile the scoring of the validation split in the background."""
        batches = self._batches["validation"]
        shapes = dict.fromkeys(batches.shape_at(step) for step in range(batches.num_batches))
        named = {f"the scoring of {rows} x {length} tokens": (rows, length) for rows, length in shapes}
        ahead = {name: abstract_batch(self._mesh, batches.element_spec(rows), length) for name, (rows, length) in named.items()}
        self._score.compile_ahead(compiler, ahead)

    def log_probabilities(self, params: Params, split: str) -> np.ndarray:
        """Returns the log-probabilities of every example's outputs, float32 [examples, outputs]."""
        batches = self._batches[split]
        result = np.zeros(self._dataset.encoded[split].labels.shape, np.float32)
        for step in range(batches.num_batches):
            examples = batches.example_numbers(step)
            local = batches.batch_at(step, host_rows(self._mesh, examples.size))
            placed = place_batch(self._mesh, local, examples.size)
            result[examples[examples >= 0]] = np.asarray(self._score(params, placed))[examples >= 0]
        return result

    def scores(self, log_probabilities: np.ndarray, split: str) -> dict[str, float]:
        """Returns the task's metrics and its mean loss in nats."""
        task, examples = self._dataset.task, self._dataset.splits[split].examples
        loss = -(self._dataset.encoded[split].labels * log_probabilities).sum(axis=1).mean()
        return score(task, examples, predict(task, np.exp(log_probabilities))) | {"loss": float(loss)}

    def write(self, params: Params, split: str, folder: Path) -> tuple[dict[str, float], list[Path]]:
        """Scores a split and writes its predictions; returns the scores (empty if labels are hidden) and the files.

        Raises:
          UserError: as `metrics.write_glue`.
        """
        task, (examples, *_, dropped_indices) = self._dataset.task, self._dataset.splits[split]
        log_probabilities = self.log_probabilities(params, split)
        labeled = self._dataset.is_labeled(split)
        files = []
        if distributed.is_primary():
            folder.mkdir(parents=True, exist_ok=True)
            files.append(folder / f"{split}.jsonl")
            write_predictions(files[0], task, examples, np.exp(log_probabilities))
            if not labeled and task.glue_name:
                files += write_glue(folder, task, examples, predict(task, np.exp(log_probabilities)), dropped_indices)
        return self.scores(log_probabilities, split) if labeled else {}, files


def _best_params(run: RunDir, config: FinetuneRunConfig, mesh: Mesh, head: Head, state: State) -> tuple[int, Params]:
    """Returns the step and the parameters of the best checkpoint, or of the last state if no checkpoint has a score."""
    best = best_checkpoints(own_checkpoints(run.checkpoints), 1) if distributed.is_primary() else []
    step = distributed.broadcast(best[0].step if best else -1)
    if step in (-1, int(state["step"])):
        return int(state["step"]), state["params"]
    info = find_step(run.checkpoints, step)
    return step, restore_params(info, abstract_state(config, mesh, head.trainable_model())["params"])
