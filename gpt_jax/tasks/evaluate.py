"""Scoring of checkpoints: perplexity on text, a fine-tuned model's metrics on a split of a task, and zero-shot probes."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from gpt_jax.config import DataConfig, FinetuneConfig, FinetuneRunConfig, PretrainConfig, TaskConfig
from gpt_jax.config.load import apply_overrides
from gpt_jax.data.sources import open_source
from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.data.windows import EvaluationWindows
from gpt_jax.errors import UserError, nearest, require
from gpt_jax.runtime.console import Log
from gpt_jax.runtime.mesh import num_shards
from gpt_jax.runtime.rundir import read_json
from gpt_jax.tasks.dataset import load_dataset
from gpt_jax.tasks.file_layouts import SplitName
from gpt_jax.tasks.finetune import TaskScorer
from gpt_jax.tasks.head import make_head
from gpt_jax.tasks.lengths import SCORING_PASS, resolve_lengths
from gpt_jax.tasks.metrics import require_scorable
from gpt_jax.tasks.readers import TaskSplit, read_split
from gpt_jax.tasks.registry import Task, get_task, task_from_config
from gpt_jax.tasks.winograd import read_winograd
from gpt_jax.tasks.zero_shot import PROBES, run_probe
from gpt_jax.train.checkpoint_info import CheckpointInfo, find_checkpoint, find_step, is_checkpoint, own_checkpoints, read_config
from gpt_jax.train.pretrain import language_model_metrics, make_window_scorer
from gpt_jax.train.restore import load_model

BATCH_SIZE = 8
"""Number of windows of text that each shard of the batch scores at once."""
READING_FIELDS = ("format", "text_field", "allow_skipped")
"""Names of the `--data.*` fields that determine how a source is read, and that also apply to a text to evaluate."""


class TokenList:
    """Tokens in memory that can be read like a split of a store."""

    def __init__(self, tokens: np.ndarray):
        self._tokens = tokens
        self.num_tokens = tokens.size

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        return self._tokens[starts[:, None] + np.arange(length)]


def text_config(source: str, overrides: list[str]) -> DataConfig:
    """Returns the config of a text to evaluate.

    Args:
      source: as for `--data.source`: a file, a folder, a glob, `tfds:NAME` or `builtin:docs`.
      overrides: words that set the fields in `READING_FIELDS`, such as `--data.text-field body`.

    Raises:
      UserError: a word sets another field, or a value is not allowed.
    """
    allowed = [f"--data.{name.replace('_', '-')}" for name in READING_FIELDS]
    for word in overrides:
        if word.startswith("--") and word.partition("=")[0].replace("_", "-") not in allowed:
            raise UserError(f"'{word}' is not an argument of gpt-jax evaluate with --text, which takes {', '.join(allowed)}")
    config = PretrainConfig(data=DataConfig(source=source))
    return apply_overrides(config, overrides, "gpt-jax evaluate CHECKPOINT --text SOURCE").data


def evaluate_text(
    path: Path, data: DataConfig, log: Log, *, stride: int | None = None, max_bytes: int | None = None
) -> dict[str, float]:
    """Returns a language model's loss (nats per token), perplexity and bits per byte on text of at least two tokens.

    As in a token store, each document is followed by the end-of-document token, and blank documents are left out. The text is the
    sequence of all documents in the order of the source. Every token but the first is scored once, in windows of the context
    length, or of the whole text if it is shorter. Bits per byte are the bits of the scored tokens, divided by the bytes of the
    whole text in UTF-8.

    Args:
      path: a run's folder or one checkpoint's; for a fine-tuning run, its best checkpoint is used.
      data: the text, as `text_config` returns it.
      stride: number of tokens that are scored in each window after the first, in [1, context length]; the other tokens of the
        window are only context. None: the context length, so that windows do not overlap.
      max_bytes: stop after the document that reaches this size; None: all of the text.

    Raises:
      UserError: there is no sound checkpoint, no text or only a single token, or the stride is longer than the context.
    """
    restored = load_model(best_checkpoint(path))
    config, mesh = restored.config, restored.mesh
    context = config.model.context_length
    stride = context if stride is None else stride
    require(1 <= stride <= context, "stride", f"must be at least 1 and at most the model's context of {context}, not {stride}")
    tokens, size, count = _read_text(data, restored.tokenizer, max_bytes)
    batch_size = BATCH_SIZE * num_shards(mesh.shape, "batch")
    length = min(context, tokens.size - 1)
    windows = EvaluationWindows(TokenList(tokens), length, batch_size, 0, min(stride, length))
    overlap = "without overlap" if stride >= length else f"with a stride of {stride} tokens"
    plural = "s" if windows.num_windows > 1 else ""
    log(f"{restored.info.path}: scoring {windows.num_windows:,} window{plural} of {length} tokens {overlap}")
    total, weight = make_window_scorer(config, mesh, batch_size)(restored.params, windows)
    scores = language_model_metrics(total / weight, weight / size)
    sizes = {"tokens": tokens.size, "scored_tokens": round(weight), "documents": count, "bytes": size}
    return scores | sizes | {"context": context, "stride": stride}


def _read_text(data: DataConfig, tokenizer: Tokenizer, max_bytes: int | None) -> tuple[np.ndarray, int, int]:
    """Returns the tokens of a text, its size in bytes, and the number of its documents."""
    pieces: list[np.ndarray] = []
    size = 0
    try:
        for document in filter(str.strip, open_source(data).documents()):
            pieces.append(np.array([*tokenizer.encode(document), tokenizer.eos_id], np.int32))
            size += len(document.encode("utf-8", "replace"))
            if max_bytes is not None and size >= max_bytes:
                break
    except UserError as error:  # The message names the option of a config.
        raise UserError(str(error).replace("--data.source", "--text")) from None
    tokens = np.concatenate([*pieces, np.empty(0, np.int32)])
    if tokens.size < 2:
        raise UserError(f"--text: {data.source} has no tokens to score; the first token of a text only serves as context")
    return tokens, size, len(pieces)


def evaluate_task(
    path: Path, overrides: list[str], split: Literal["train", "validation", "test"], out: Path | None, log: Log
) -> dict[str, Any]:
    """Returns a fine-tuned model's scores on a split of its task, or of another task with the same outputs.

    Args:
      path: the folder of a fine-tuning run, whose best checkpoint is used, or of one checkpoint.
      overrides: `--task.*` fields that differ from those of the fine-tuning run.
      out: folder to write predictions into, or None.

    Raises:
      UserError: there is no sound checkpoint of a fine-tuned model, or the task's data does not fit it.
    """
    path = best_checkpoint(path)
    config = read_config(find_checkpoint(path, log))
    if not isinstance(config, FinetuneRunConfig):
        raise UserError(f"{path} is a pre-trained model; give --text or --zero-shot, or fine-tune it first")
    for word in overrides:
        if word.startswith("--") and not word.startswith("--task."):
            raise UserError(f"{word}: is not an argument of gpt-jax evaluate, which takes the --task.* fields of the config")
    task_config = apply_overrides(FinetuneConfig(task=config.task), overrides, "gpt-jax evaluate CHECKPOINT").task
    trained, wanted = task_from_config(config.task), task_from_config(task_config)
    if _describe_outputs(trained) != _describe_outputs(wanted):
        raise UserError(
            f"--task.name: the checkpoint's outputs are those of {trained.title} ({_describe_outputs(trained)}), not of "
            f"{wanted.title} ({_describe_outputs(wanted)})"
        )
    head = make_head(trained, config)
    restored = load_model(path, head.trainable_model())
    batch_size = config.train.batch_size * num_shards(restored.mesh.shape, "batch")
    run_config = dataclasses.replace(restored.config, train=dataclasses.replace(restored.config.train, batch_size=batch_size))
    dataset = load_dataset(task_config, restored.tokenizer, config.model.context_length, log, (split,))
    platform = restored.mesh.devices.flat[0].platform
    settings = dataclasses.replace(config, task=task_config, train=dataclasses.replace(config.train, batch_size=batch_size))
    lengths = resolve_lengths(settings, dataset.encoded, {split: SCORING_PASS}, platform, restored.mesh.size)
    scorer = TaskScorer(run_config, restored.mesh, head, dataset, lengths)
    if out is None:
        require_scorable(dataset.task, dataset.splits[split].examples)
        return scorer.scores(scorer.log_probabilities(restored.params, split), split)
    scores, files = scorer.write(restored.params, split, out)
    if files:
        log(f"predictions: {', '.join(map(str, files))}")
    return scores


def best_checkpoint(path: Path) -> Path:
    """Returns the best checkpoint of a fine-tuning run's folder according to result.json; returns any other path unchanged.

    Raises:
      UserError: that checkpoint no longer exists, or the folder contains runs of several seeds.
    """
    file = path / "result.json"
    if not file.is_file():
        return path
    result = read_json(file, {"seeds?": [int], "best_step?": int})
    if "seeds" in result:
        first = f"{path}/seed-{min(result['seeds'], default=0)}"
        raise UserError(f"{path} contains runs of several seeds; name one of them, such as {first}")
    return find_step(path, result["best_step"], checksums=False).path if "best_step" in result else path


def _describe_outputs(task: Task) -> str:
    """Returns a phrase with the number and the kind of a head's outputs, or with the range of their scores."""
    if task.regression:
        return f"scores from {task.labels[0]} to {task.labels[-1]}"
    return f"{len(task.labels)} {'answers' if task.kind == 'multiple_choice' else 'classes'}"


def sound_checkpoints(run: Path) -> list[CheckpointInfo]:
    """Returns the sound checkpoints of a run after step 0, one per step, in the order of their steps.

    Raises:
      UserError: there are none.
    """
    infos = [] if is_checkpoint(run) else own_checkpoints(run)
    sound = {info.step: info for info in infos if info.state == "sound" and info.step}
    if not sound:
        raise UserError(f"{run}: no run with sound checkpoints; give a run's folder, not a checkpoint's")
    return list(sound.values())


def zero_shot(paths: Sequence[Path], sources: Mapping[str, str], every_checkpoint: bool, log: Log) -> list[dict[str, Any]]:
    """Scores language models on probes without fine-tuning (section 5, Figure 2, right).

    Args:
      paths: folders of runs or of single checkpoints.
      sources: the location of the rows for the name of each probe (`zero_shot.PROBES`): a task's folder, "" for
        tensorflow-datasets, or a file of Winograd schemas.
      every_checkpoint: score all sound checkpoints that a run has kept (`--train.keep-latest`), not only the newest.

    Returns:
      The result of `run_probe` for each checkpoint and probe, with the checkpoint's `path` (as given) and `step`.

    Raises:
      UserError: there is no such probe or no sound checkpoint, the model was fine-tuned, or the rows cannot be read.
    """
    splits: dict[str, dict[SplitName, TaskSplit]] = {}
    for name, source in sources.items():
        if name not in PROBES:
            raise UserError(f"--zero-shot: there is no probe '{name}'; {nearest(name, PROBES)}")
        splits[name] = _read_probe(name, source)
        for split, content in splits[name].items():
            log(f"{PROBES[name].title} {split}: {content.describe_counts()}")
    checkpoints = [(path, info) for path in paths for info in _probed_checkpoints(path, every_checkpoint, log)]
    results = []
    for path, info in checkpoints:
        restored = load_model(info.path)
        with jax.set_mesh(restored.mesh):
            for name, probe_splits in splits.items():
                result = run_probe(name, restored.config.model, restored.params, restored.tokenizer, probe_splits)
                results.append({"path": str(path), "step": info.step, **result})
                metric = PROBES[name].metric
                normalized = "" if result["normalized"] is None else f", normalized {result['normalized']:.3f}"
                log(f"{info.path}: {PROBES[name].title} {metric} {result[metric]:.4f}{normalized}")
    return results


def _probed_checkpoints(path: Path, every: bool, log: Log) -> list[CheckpointInfo]:
    """Returns the checkpoints of a pre-trained model that are to be probed."""
    infos = sound_checkpoints(path) if every else [find_checkpoint(path, log)]
    if isinstance(read_config(infos[-1]), FinetuneRunConfig):
        raise UserError(f"--zero-shot: {path} is a fine-tuned model; probes are for models that were only pre-trained")
    return infos


def _read_probe(name: str, source: str) -> dict[SplitName, TaskSplit]:
    """Reads the splits that a probe needs."""
    probe = PROBES[name]
    try:
        if probe.task:
            config = TaskConfig(name=probe.task, path=source)
            contents = {split: read_split(get_task(probe.task), config, split) for split in probe.splits}
            return {split: content for split, content in contents.items() if content is not None}
        if not source:
            raise UserError(f"{probe.title} is read from a file: write {name}=FILE")
        return {"test": read_winograd(Path(source))}
    except UserError as error:  # The readers call the folder --task.path.
        problem = str(error).removeprefix("--task.path: ").replace("--task.path", f"{name}=PATH")
        raise UserError(f"--zero-shot {name}: {problem}") from None
