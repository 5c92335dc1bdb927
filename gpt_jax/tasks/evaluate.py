"""What a checkpoint scores: perplexity on text, a fine-tuned model's scores on a split of a task, zero-shot probes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from gpt_jax.config import DataConfig, FinetuneConfig, FinetuneRunConfig, TaskConfig
from gpt_jax.config.load import apply_overrides, config_from_dict
from gpt_jax.data.sources import open_source
from gpt_jax.data.windows import EvaluationWindows
from gpt_jax.errors import UserError, nearest
from gpt_jax.runtime import sharding
from gpt_jax.runtime.mesh import num_shards
from gpt_jax.runtime.rundir import read_json
from gpt_jax.tasks.dataset import load_dataset
from gpt_jax.tasks.file_layouts import SplitName
from gpt_jax.tasks.finetune import Scorer, head_of
from gpt_jax.tasks.metrics import require_scorable
from gpt_jax.tasks.readers import TaskSplit, read_split
from gpt_jax.tasks.registry import Task, get_task, task_from_config
from gpt_jax.tasks.winograd import read_winograd
from gpt_jax.tasks.zero_shot import PROBES, run_probe
from gpt_jax.train import checkpoint
from gpt_jax.train.pretrain import total_loss
from gpt_jax.train.restore import load_model
from gpt_jax.train.step import ByShape, lower_evaluation

BATCH_SIZE = 8


class TokenList:
    """Tokens in memory, to be read like a split of a store."""

    def __init__(self, tokens: list[int]):
        self._tokens = np.array(tokens, np.int32)
        self.num_tokens = len(tokens)

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        return self._tokens[starts[:, None] + np.arange(length)]


def evaluate_text(path: Path, source: str, text_field: str = "text", max_bytes: int = 0) -> dict[str, float]:
    """A language model's loss (nats a token), perplexity and bits a byte on text; windows do not overlap.

    Args:
      path: a run's folder or one checkpoint's.
      source: as `--data.source`: a file, a folder, a glob, `tfds:NAME` or `builtin:docs`.
      max_bytes: stop after the document that reaches it; 0: all of the text.

    Raises:
      UserError: no sound checkpoint, or no text there, or less than one window of it.
    """
    trained = load_model(path)
    tokens: list[int] = []
    size = 0
    for document in open_source(DataConfig(source=source, text_field=text_field)).documents():
        tokens += [*trained.tokenizer.encode(document), trained.tokenizer.eos_id]
        size += len(document.encode("utf-8", "replace"))
        if max_bytes and size >= max_bytes:
            break
    config, mesh = trained.config, trained.mesh
    batch_size = BATCH_SIZE * num_shards(mesh.shape, "batch")
    windows = EvaluationWindows(TokenList(tokens), config.model.context_length, batch_size, 0)
    score = ByShape(lambda batch: lower_evaluation(config, mesh, total_loss, batch=batch))
    rows = sharding.host_rows(mesh, batch_size)
    total = weight = 0.0
    with jax.set_mesh(mesh):
        for index in range(windows.num_batches):
            part, count = score(trained.params, sharding.place_batch(mesh, windows.batch_at(index, rows), batch_size))
            total, weight = total + float(part), weight + float(count)
    loss = total / weight
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": total / math.log(2) / size,
        "tokens": len(tokens),
        "bytes": size,
    }


def evaluate_task(
    path: Path, overrides: list[str], split: Literal["train", "validation", "test"], out: Path | None, log: Callable[[str], None]
) -> dict[str, Any]:
    """A fine-tuned model's scores on a split of its task, or of another task with the same outputs.

    Args:
      path: a fine-tuning's folder (its best checkpoint) or one checkpoint's.
      overrides: `--task.*` fields that differ from those it was fine-tuned with.
      out: folder to write predictions into, or None.

    Raises:
      UserError: no sound checkpoint of a fine-tuning there, or the task's data do not fit it.
    """
    path = best_checkpoint(path)
    config = config_from_dict(checkpoint.read_config(checkpoint.resolve(path, log)))
    if not isinstance(config, FinetuneRunConfig):
        raise UserError(f"{path} is a pre-trained model; give --text or --zero-shot, or fine-tune it first")
    for word in overrides:
        if word.startswith("--") and not word.startswith("--task."):
            raise UserError(f"{word}: is not an argument of gpt-jax evaluate; of the config, it takes --task.* fields")
    task = apply_overrides(FinetuneConfig(task=config.task), overrides, "gpt-jax evaluate CHECKPOINT").task
    learnt, wanted = task_from_config(config.task), task_from_config(task)
    if _outputs(learnt) != _outputs(wanted):
        raise UserError(
            f"--task.name: the checkpoint's outputs are those of {learnt.title} ({_outputs(learnt)}), not of {wanted.title} "
            f"({_outputs(wanted)})"
        )
    head = head_of(learnt, config)
    trained = load_model(path, head.model_fns())
    size = config.train.batch_size * num_shards(trained.mesh.shape, "batch")
    model = dataclasses.replace(trained.config, train=dataclasses.replace(trained.config.train, batch_size=size))
    dataset = load_dataset(task, trained.tokenizer, config.model.context_length, size, log, (split,))
    scorer = Scorer(model, trained.mesh, head, dataset)
    if out is None:
        require_scorable(dataset.task, dataset.splits[split].examples)
        return scorer.scores(scorer.log_probabilities(trained.params, split), split)
    scores, files = scorer.write(trained.params, split, out)
    if files:
        log(f"predictions: {', '.join(map(str, files))}")
    return scores


def best_checkpoint(path: Path) -> Path:
    """The checkpoint of a fine-tuning's folder that result.json names as the best; any other path as it is.

    Raises:
      UserError: that checkpoint is gone, or the folder is one of several seeds.
    """
    result = path / "result.json"
    if not result.is_file():
        return path
    found = read_json(result)
    if "seeds" in found:
        raise UserError(f"{path} holds runs of several seeds; name one of them, {path}/seed-{found['seeds'][0]}")
    if "best_step" not in found:
        return path
    best = path / "checkpoints" / str(found["best_step"])
    if not best.is_dir():
        raise UserError(f"{best}: the best checkpoint is gone; name another one of {best.parent}")
    return best


def _outputs(task: Task) -> str:
    """What a head's outputs are, in a few words."""
    kind = "answers" if task.kind == "multiple_choice" else "classes of a score" if task.regression else "classes"
    return f"{len(task.labels)} {kind}"


def sound_checkpoints(run: Path) -> list[checkpoint.Info]:
    """The sound checkpoints of a run, one of each step, by ascending step.

    Raises:
      UserError: there are none.
    """
    found = {info.step: info for info in checkpoint.inspect(run) if info.state == "sound" and info.step}
    if not found:
        raise UserError(f"{run}: no run with sound checkpoints; give a run's folder, not a checkpoint's")
    return list(found.values())


def zero_shot(
    paths: Sequence[Path], sources: Mapping[str, str], every_checkpoint: bool, log: Callable[[str], None]
) -> list[dict[str, Any]]:
    """What language models score on probes without fine-tuning (section 5, Figure 2, right).

    Args:
      paths: runs' folders or single checkpoints'.
      sources: for each probe's name (`zero_shot.PROBES`) where its rows are: a task's folder, "" for tensorflow-datasets, or a
        file of Winograd schemas.
      every_checkpoint: score all sound checkpoints that a run has kept (`--train.keep-latest`), not only the newest.

    Returns:
      `probe`'s result for each checkpoint and probe, with its `path` (as given) and `step`.

    Raises:
      UserError: no such probe, no sound checkpoint, a fine-tuned one, or rows that cannot be read.
    """
    splits: dict[str, dict[SplitName, TaskSplit]] = {}
    for name, source in sources.items():
        if name not in PROBES:
            raise UserError(f"--zero-shot: no probe is named '{name}'; {nearest(name, PROBES)}")
        splits[name] = _probe_rows(name, source)
        for split, read_rows in splits[name].items():
            log(f"{PROBES[name].title} {split}: {read_rows.describe_counts()}")
    kept = [(path, info) for path in paths for info in _checkpoints(path, every_checkpoint, log)]
    results = []
    for path, info in kept:
        trained = load_model(info.path)
        with jax.set_mesh(trained.mesh):
            for name, of_probe in splits.items():
                found = run_probe(name, trained.config.model, trained.params, trained.tokenizer, of_probe)
                results.append({"path": str(path), "step": info.step, **found})
                metric = PROBES[name].metric
                normalized = "" if found["normalized"] is None else f", normalised {found['normalized']:.3f}"
                log(f"{info.path}: {PROBES[name].title} {metric} {found[metric]:.4f}{normalized}")
    return results


def _checkpoints(path: Path, every: bool, log: Callable[[str], None]) -> list[checkpoint.Info]:
    """The checkpoints of a pre-trained model that are to be probed."""
    infos = sound_checkpoints(path) if every else [checkpoint.resolve(path, log)]
    if isinstance(config_from_dict(checkpoint.read_config(infos[-1])), FinetuneRunConfig):
        raise UserError(f"--zero-shot: {path} is a fine-tuned model; probes are for what pre-training alone has taught")
    return infos


def _probe_rows(name: str, source: str) -> dict[SplitName, TaskSplit]:
    """The splits that a probe needs."""
    chosen = PROBES[name]
    try:
        if chosen.task:
            config = TaskConfig(name=chosen.task, path=source)
            found = {split: read_split(get_task(chosen.task), config, split) for split in chosen.splits}
            return {split: rows for split, rows in found.items() if rows is not None}
        if not source:
            raise UserError(f"{chosen.title} is read from a file: write {name}=FILE")
        return {"test": read_winograd(Path(source))}
    except UserError as error:  # the readers know the folder as --task.path
        raise UserError(f"--zero-shot {name}: {str(error).removeprefix('--task.path: ')}") from None
