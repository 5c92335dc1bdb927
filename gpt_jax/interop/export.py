"""`gpt-jax export`: a checkpoint in another framework's format, which proves itself before it is there.

Everything is written into a folder beside the wanted one, read back by the format's own framework, compared with the model, and
renamed. A failure on the way leaves nothing. Besides the format's own files each export holds

    parity.json     what was compared, and how close it was
    gpt_jax/        config.json, tokenizer/, and head.npz where the format keeps the head in another form: what `gpt-jax import`
                    makes the same checkpoint from again; and manifest.json with the SHA-256 of every file that it reads
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np

from gpt_jax.config import FinetuneRunConfig, ModelConfig, RunConfig
from gpt_jax.config.load import config_from_dict, config_to_dict
from gpt_jax.data import tokenizers
from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.errors import UserError, VerificationError, nearest
from gpt_jax.interop import graphs, huggingface, import_, param_map, parity, tensor_files, tokenizer_json, weights
from gpt_jax.interop.import_ import SIDE
from gpt_jax.runtime.rundir import sha256, staged
from gpt_jax.tasks.evaluate import best_checkpoint
from gpt_jax.tasks.finetune import head_of
from gpt_jax.tasks.head import Head
from gpt_jax.tasks.registry import Task, task_from_config
from gpt_jax.train import checkpoint
from gpt_jax.train.restore import Trained, load_model
from gpt_jax.train.step import LANGUAGE_MODEL

Dtype = Literal["float32", "bfloat16", "float16"]
TENSOR_FORMATS: dict[str, tuple[Dtype, ...]] = {
    "huggingface": get_args(Dtype),
    "npz": ("float32", "float16"),  # NumPy has no bfloat16
    "openai": ("float32",),  # as released
}
FORMATS = (*TENSOR_FORMATS, *graphs.FORMATS)
HUGGINGFACE_TOLERANCE = 1e-4
SHARD_BYTES = 5e9


class Subject(NamedTuple):
    """What is exported."""

    info: checkpoint.Info
    config: RunConfig
    model: ModelConfig
    tokenizer: Tokenizer
    task: Task | None
    head: Head | None


def export(
    path: Path, format_: str, out: Path, log: Callable[[str], None], *, dtype: Dtype = "float32", shard_bytes: float = SHARD_BYTES
) -> dict[str, Any]:
    """Writes a checkpoint in another format and returns what parity.json says.

    Args:
      path: a run's folder (of a fine-tuning its best checkpoint) or one checkpoint's.
      format_: one of FORMATS.
      out: the folder to be made; it may be there and empty.
      dtype: of the stored numbers, where the format has a choice.
      shard_bytes: a larger huggingface file is cut into several.

    Raises:
      UserError: no sound checkpoint; a format that cannot hold this model or type, or whose framework is not installed; `out`
        holds something already; no space left.
      VerificationError: what was written does not compute what the checkpoint computes; it is removed.
    """
    if format_ not in FORMATS:
        raise UserError(f"--format: there is no '{format_}'; {nearest(format_, FORMATS)}")
    if format_ in graphs.FORMATS:
        graphs.require(format_)
    allowed = TENSOR_FORMATS.get(format_, ("float32",))
    if dtype not in allowed:
        raise UserError(f"--dtype: {format_} is written in {' or '.join(allowed)}, not {dtype}")
    if not 1 <= shard_bytes < math.inf:
        raise UserError(f"--shard-bytes: must be a number of bytes, 1 or more, not {shard_bytes:g}")
    subject = find(path, log)
    if format_ in TENSOR_FORMATS:
        param_map.pieces(format_, subject.model, subject.head)  # type: ignore[arg-type]  # says at once what has no place there
    with staged(out, "out") as folder:
        log(f"writing {format_} ({dtype}) from {subject.info.path}")
        if format_ in TENSOR_FORMATS:
            _write_tensors(subject, format_, folder, dtype, shard_bytes)
        _write_side(subject, folder)
        found = _verified(subject, format_, folder, dtype, log)
        (folder / "parity.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        # Of what an import reads: the rest, the card for one, is the user's to change.
        read = [file for pattern in import_.READ for file in sorted(folder.glob(pattern)) if file.is_file()]
        listed = {str(file.relative_to(folder)): sha256(file) for file in read}
        (folder / SIDE / "manifest.json").write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
    log(f"done: {out}")
    return found


def find(path: Path, log: Callable[[str], None]) -> Subject:
    """Finds and verifies the checkpoint that a CHECKPOINT argument means."""
    info = checkpoint.resolve(best_checkpoint(path), log)
    config = config_from_dict(checkpoint.read_config(info))
    task = head = None
    if isinstance(config, FinetuneRunConfig):
        task = task_from_config(config.task)
        head = head_of(task, config)
    return Subject(info, config, config.model, tokenizers.load(info.path / "tokenizer"), task, head)


# -- writing ----------------------------------------------------------------------------------------------------------------


def _write_tensors(subject: Subject, format_: str, folder: Path, dtype: Dtype, shard_bytes: float) -> None:
    """One tensor at a time: little more memory than the largest one takes."""
    pieces = param_map.pieces(format_, subject.model, subject.head)  # type: ignore[arg-type]
    known = weights.described(pieces, dtype)
    tensors = weights.stream(subject.info, pieces, dtype)
    if format_ == "npz":
        tensor_files.write_npz(folder / "params.npz", tensors)
    elif format_ == "openai":
        tensor_files.write_openai(folder, known, tensors)
        if subject.tokenizer.kind == "gpt1":
            subject.tokenizer.save(folder)
            (folder / tokenizers.MANIFEST).unlink()  # the released folder has the two files alone
    else:
        if huggingface.architecture(subject.head) == huggingface.CLASSIFIER:
            score = _score_weight(subject)
            known[huggingface.SCORE] = tensor_files.Tensor(score.shape, score.dtype)
            tensors = _followed_by(tensors, (huggingface.SCORE, score))
        tensor_files.write_safetensors(folder, known, tensors, shard_bytes)
        _write_huggingface(subject, folder, dtype)


def _followed_by(tensors: Iterator[tuple[str, np.ndarray]], last: tuple[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    yield from tensors
    yield last


def _score_weight(subject: Subject) -> np.ndarray:
    """The classifier's weights with its bias inside; of a pair in both orders, whose scores are added, half of it."""
    arrays = checkpoint.open_arrays(subject.info)
    head = {name: checkpoint.read_array(array) for name, array in arrays["head"].items()}
    last = subject.model.num_layers - 1
    norm = {name: checkpoint.read_array(array[last]) for name, array in arrays["blocks"]["mlp_norm"].items()}
    orders = 2 if subject.task is not None and subject.task.kind == "similarity" else 1
    return huggingface.score_weight(head["kernel"], head["bias"] / orders, norm["gain"], norm["bias"])


def _write_huggingface(subject: Subject, folder: Path, dtype: Dtype) -> None:
    config, tokenizer, task, head = subject.config, subject.tokenizer, subject.task, subject.head
    names = _special_names(subject)
    manifest = checkpoint.read_manifest(subject.info)
    facts = {
        **{name: manifest[name] for name in ("step", "config_digest", "data_digest")},
        "dtype": dtype,
        "scores": {name: value for name, value in subject.info.metrics.items() if name != checkpoint.RANK},
        "config": config_to_dict(config),
    }
    for name, content in (
        ("config.json", huggingface.model_config(config, tokenizer, task, head, dtype)),
        ("tokenizer.json", tokenizer_json.convert(tokenizer, names)),
        ("tokenizer_config.json", tokenizer_json.tokenizer_config(tokenizer, names, subject.model.context_length)),
    ):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(huggingface.card(config, tokenizer, facts, task, head), encoding="utf-8")


def _special_names(subject: Subject) -> tuple[str, ...]:
    return huggingface.SPECIALS if subject.task is not None else ()


def _write_side(subject: Subject, folder: Path) -> None:
    side = folder / SIDE
    side.mkdir()
    shutil.copyfile(subject.info.path / "config.json", side / "config.json")
    shutil.copytree(subject.info.path / "tokenizer", side / "tokenizer")
    if subject.head is not None:
        heads = [piece for piece in param_map.pieces("npz", subject.model, subject.head) if piece.path[0] == "head"]
        tensor_files.write_npz(side / "head.npz", weights.stream(subject.info, heads, "float32"))


# -- verifying --------------------------------------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """What was written, loaded again."""

    framework: str
    tolerance: float
    logits: Callable[[np.ndarray], np.ndarray] | None
    """Next-token scores; None where the format gives a fine-tuned model's outputs alone."""
    outputs: Callable[..., np.ndarray] | None
    """(tokens, extract) -> a fine-tuned model's log-probabilities."""


def _verified(subject: Subject, format_: str, folder: Path, dtype: Dtype, log: Callable[[str], None]) -> dict[str, Any]:
    """Compares what was written with the model; a graph, which needs the parameters, is written here. Returns parity.json."""
    trained = load_model(subject.info.path, subject.head.model_fns() if subject.head else LANGUAGE_MODEL)
    reference = parity.Reference(subject.model, trained.params, dtype)
    if format_ in graphs.FORMATS:
        candidate = _graph(subject, format_, folder, trained)
    elif format_ == "huggingface" and huggingface.installed():
        candidate = Candidate(
            huggingface.installed(),
            HUGGINGFACE_TOLERANCE,
            huggingface.load_language_model(folder),
            huggingface.load_classifier(folder, subject.head) if subject.head else None,
        )
    else:
        candidate = _read_back(subject, format_, folder, trained)
    found: dict[str, Any] = {
        "format": format_,
        "dtype": dtype,
        "checkpoint_step": subject.info.step,
        "verified_with": candidate.framework,
    }
    log(f"verifying with {candidate.framework}")
    if candidate.logits is not None:
        logits = candidate.logits
        texts = parity.windows(subject.tokenizer, subject.model)
        difference = parity.compare((reference.logits(tokens), logits(tokens)) for tokens in texts)
        found["logits"] = _judged(difference, candidate.tolerance, "positions", log)
    if subject.head is not None and candidate.outputs is not None:
        inputs = parity.examples(subject.tokenizer, subject.model, sequences(subject.task))
        pair = (reference.log_probabilities(subject.head, *inputs), candidate.outputs(*inputs))
        found["outputs"] = _judged(parity.compare(iter([pair])), candidate.tolerance, "examples", log)
    if format_ == "huggingface":
        found["tokenizer"] = _tokenizer_parity(subject, folder, log)
    return found


def _graph(subject: Subject, format_: str, folder: Path, trained: Trained) -> Candidate:
    graph = graphs.FORMATS[format_]
    params = jax.tree.map(lambda x: x.astype(np.float32), trained.params)
    graph.write(folder, subject.model, params, subject.head, sequences(subject.task))
    run = graph.load(folder)
    logits, outputs = (run, None) if subject.head is None else (None, run)
    return Candidate(graph.framework(), graph.tolerance, logits, outputs)


def _read_back(subject: Subject, format_: Any, folder: Path, trained: Trained) -> Candidate:
    """The tensors in our own model again, for formats without a framework, and where theirs is not installed."""
    source = import_.Source(format_, trained.config, subject.model, subject.tokenizer, subject.head)
    params = import_.load(folder, source, trained.mesh)
    framework, tolerance = "the files, read back", 0.0
    if format_ == "huggingface":
        framework, tolerance = f"{framework} in our own model (transformers and torch are not installed)", HUGGINGFACE_TOLERANCE
        if huggingface.architecture(subject.head) == huggingface.CLASSIFIER:
            score = tensor_files.read_safetensors(folder).read(huggingface.SCORE)
            params |= {"head": {"kernel": score.T, "bias": np.zeros(len(score), np.float32)}}
    again = parity.Reference(subject.model, params, "float32")
    outputs = functools.partial(again.log_probabilities, subject.head) if subject.head else None
    return Candidate(framework, tolerance, again.logits, outputs)


def sequences(task: Task | None) -> int:
    """Sequences of one example (Figure 1)."""
    if task is None:
        return 1
    return {"similarity": 2, "multiple_choice": len(task.labels)}.get(task.kind, 1)


def _judged(difference: parity.Difference, tolerance: float, unit: str, log: Callable[[str], None]) -> dict[str, Any]:
    log(
        f"parity: largest difference {difference.largest:.2e} (at most {tolerance:g} is allowed), the likeliest is the same at "
        f"{difference.agreement:.2%} of {difference.compared:,} {unit}"
    )
    if not difference.largest <= tolerance:
        raise VerificationError(
            f"what was written differs from the checkpoint by {difference.largest:.2e} at {unit} of real text, and {tolerance:g} "
            "is allowed; it is removed"
        )
    return parity.summary(difference, tolerance, unit)


def _tokenizer_parity(subject: Subject, folder: Path, log: Callable[[str], None]) -> dict[str, Any]:
    """Compares tokenizer.json with the tokenizer on real text, if the `tokenizers` library is installed."""
    try:
        import tokenizers as theirs
    except ModuleNotFoundError:
        return {"verified_with": "nothing (tokenizers is not installed)"}
    tokenizer, names = subject.tokenizer, _special_names(subject)
    exported = theirs.Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [paragraph for document in parity.documents()[:100] for paragraph in document.split("\n\n")]
    claimed = [text for text in texts if tokenizer_json.claims_equality(tokenizer, text, names)]
    equal = [text for text in texts if exported.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)]
    wrong = [text for text in claimed if text not in set(equal)]
    log(
        f"parity: tokenizer.json gives the same ids for {len(equal):,} of {len(texts):,} texts, and promises it for "
        f"{len(claimed):,}"
    )
    if wrong:
        raise VerificationError(
            f"tokenizer.json promises the same ids as the tokenizer and breaks it for {wrong[0][:80]!r}; removed"
        )
    return {
        "verified_with": f"tokenizers {theirs.__version__}",
        "texts": len(texts),
        "promised": len(claimed),
        "equal": len(equal),
    }
