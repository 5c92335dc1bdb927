"""Exports (`gpt-jax export`): writes a checkpoint in another format, and verifies the export before it appears under its name.

All files are written into a hidden folder next to the final one. They are loaded with the target framework and compared with the
checkpoint, and the folder is renamed. A failure leaves nothing behind. In addition to the format's own files, an export contains

    README.md       a card that describes the model and shows how to use it (`cards`)
    labels.json     the meaning of the outputs of a fine-tuned model (`cards`)
    parity.json     the results of the comparison
    gpt_jax/        files from which `gpt-jax import` restores the same checkpoint: config.json, tokenizer/, head.npz for a
                    fine-tuned model, and manifest.json, which has the SHA-256 of every file that an import reads
"""

import importlib
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gpt_jax.config import FinetuneRunConfig, RunConfig
from gpt_jax.data import tokenizers
from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.errors import UserError, VerificationError, field_error, nearest
from gpt_jax.inputs.numbers import BYTES
from gpt_jax.interop import cards, huggingface, import_, param_map, parity, tensor_files, tokenizer_json
from gpt_jax.interop.import_ import RUN_FILES
from gpt_jax.interop.onnx import load_onnx, write_onnx
from gpt_jax.interop.parity import Computation, ExportedFunction
from gpt_jax.interop.stablehlo import load_savedmodel, load_stablehlo, write_savedmodel, write_stablehlo
from gpt_jax.interop.staging import staged_folder
from gpt_jax.interop.usage import LABELS
from gpt_jax.model.transformer import Params
from gpt_jax.runtime.console import Log
from gpt_jax.runtime.rundir import sha256
from gpt_jax.tasks.evaluate import best_checkpoint
from gpt_jax.tasks.head import Head, make_head
from gpt_jax.tasks.registry import Task, task_from_config
from gpt_jax.tasks.transforms import SEGMENTS
from gpt_jax.train.checkpoint_info import CheckpointInfo, find_checkpoint, read_config
from gpt_jax.train.restore import load_model
from gpt_jax.train.step import LANGUAGE_MODEL

Dtype = Literal["float32", "bfloat16", "float16"]
SHARD_BYTES = 5e9


class Format(NamedTuple):
    """An export format. Formats without `write` and `load` are files of tensors (`param_map`)."""

    tolerance: float
    """Largest difference from the checkpoint's float32 outputs that counts as equal."""
    dtypes: tuple[Dtype, ...] = ("float32",)
    """Types in which the numbers can be stored."""
    packages: tuple[str, ...] = ()
    """Packages that must be installed; the last one runs the graph."""
    install: str = ""
    """Argument of `pip install` for `packages`."""
    write: Callable[[Path, ExportedFunction, dict[str, np.ndarray]], None] | None = None
    load: Callable[[Path], Computation] | None = None


FORMATS = {
    "huggingface": Format(1e-4, get_args(Dtype)),
    "npz": Format(0.0, ("float32", "float16")),  # NumPy has no bfloat16.
    "openai": Format(0.0),
    # jax.export serializes with flatbuffers but does not require it.
    "stablehlo": Format(1e-4, ("float32",), ("flatbuffers", "jax"), "flatbuffers", write_stablehlo, load_stablehlo),
    "savedmodel": Format(1e-3, ("float32",), ("tensorflow",), "tensorflow", write_savedmodel, load_savedmodel),
    "onnx": Format(1e-3, ("float32",), ("onnx", "onnxruntime"), "'gpt_jax[onnx]'", write_onnx, load_onnx),
}


class ExportedModel(NamedTuple):
    """A checkpoint's model with everything that an export needs."""

    info: CheckpointInfo
    config: RunConfig
    mesh: Mesh
    params: Params
    tokenizer: Tokenizer
    task: Task | None
    head: Head | None

    @property
    def function(self) -> ExportedFunction:
        """The function that a graph computes: that of the fine-tuned model, or of the language model if there is no head."""
        sequences = len(SEGMENTS.get(self.task.kind, self.task.labels)) if self.task else 1
        return ExportedFunction(self.config.model, self.head, sequences)


def export(
    path: Path, format_: str, out: Path, log: Log, *, dtype: Dtype = "float32", shard_bytes: float | None = None
) -> dict[str, Any]:
    """Writes a checkpoint in another format and returns the contents of parity.json.

    The parameters are held on the host in float32, and a second time while they are written (docs/interop.md).

    Args:
      path: folder of a run (for a fine-tuning run, the best checkpoint is exported) or of one checkpoint.
      format_: one of FORMATS.
      out: the folder to create. It may already exist if it is empty.
      dtype: type of the stored numbers, if the format supports several types.
      shard_bytes: size above which a huggingface file is split; None: `SHARD_BYTES`.

    Raises:
      UserError: there is no sound checkpoint; the format cannot represent this model or type, or its framework is not installed;
        `out` is not empty; there is no space left.
      VerificationError: the export does not compute what the checkpoint computes; it is removed.
    """
    require_format(format_)
    if dtype not in FORMATS[format_].dtypes:
        raise UserError(f"--dtype: {format_} is written in {' or '.join(FORMATS[format_].dtypes)}, not {dtype}")
    if shard_bytes is not None:
        BYTES.check("shard_bytes", shard_bytes)
        if format_ != "huggingface":
            raise field_error("shard_bytes", f"only huggingface files are split, not {format_}; leave it out")
    with staged_folder(out, "out") as folder:
        exported = load_checkpoint(path, format_, log)
        log(f"writing {format_} ({dtype}) from {exported.info.path}")
        if write := FORMATS[format_].write:
            write(folder, exported.function, exported.function.named_parameters(exported.params))
        else:
            _write_tensors(exported, format_, folder, dtype, shard_bytes or SHARD_BYTES)
        _write_descriptions(exported, format_, folder, dtype)
        _write_run_files(exported, folder)
        report = _verify(exported, format_, folder, dtype, log)
        _write_json(folder / "parity.json", report)
        # The manifest lists the files that an import reads. Users may change the other files, such as the model card.
        read = [file for pattern in import_.IMPORTED_PATTERNS for file in sorted(folder.glob(pattern)) if file.is_file()]
        checksums = {str(file.relative_to(folder)): sha256(file) for file in read}
        _write_json(folder / RUN_FILES / "manifest.json", checksums)
    log(f"done: {out}")
    return report


def require_format(format_: str) -> None:
    """Raises a `UserError` if there is no such format or if a package that it needs is not installed."""
    if format_ not in FORMATS:
        raise UserError(f"--format: '{format_}' is unknown; {nearest(format_, FORMATS)}")
    missing = [package for package in FORMATS[format_].packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"--format: {format_} needs {' and '.join(missing)}: pip install {FORMATS[format_].install}")


def load_checkpoint(path: Path, format_: str, log: Log) -> ExportedModel:
    """Verifies and loads the checkpoint that a CHECKPOINT argument names.

    Raises:
      UserError: there is no sound checkpoint, or the format cannot represent its model.
    """
    info = find_checkpoint(best_checkpoint(path), log)
    config = read_config(info)
    task = head = None
    if isinstance(config, FinetuneRunConfig):
        task = task_from_config(config.task)
        head = make_head(task, config)
    if FORMATS[format_].write is None:
        param_map.tensor_maps(format_, config.model, head)  # Raises an error before anything is loaded.
    trained = load_model(info.path, head.trainable_model() if head else LANGUAGE_MODEL)
    return ExportedModel(info, config, trained.mesh, trained.params, trained.tokenizer, task, head)


# -- writing ----------------------------------------------------------------------------------------------------------------


def _write_tensors(exported: ExportedModel, format_: str, folder: Path, dtype: Dtype, shard_bytes: float) -> None:
    maps = param_map.tensor_maps(format_, exported.config.model, exported.head)
    tensors = param_map.to_tensors(maps, exported.params, dtype)
    if format_ == "npz":
        tensor_files.save_npz(folder / "params.npz", tensors)
    elif format_ == "openai":
        tensor_files.save_openai(folder, tensors)
        if exported.tokenizer.kind == "gpt1":
            exported.tokenizer.save(folder)
            (folder / tokenizers.MANIFEST).unlink()  # The released folder does not have it.
    else:
        if huggingface.architecture(exported.head) == huggingface.CLASSIFIER:
            tensors[huggingface.SCORE] = _score_weight(exported, dtype)
        tensor_files.save_safetensors(folder, tensors, shard_bytes)
        _write_huggingface(exported, folder, dtype)


def _score_weight(exported: ExportedModel, dtype: Dtype) -> np.ndarray:
    """Returns the classifier's weights with its bias folded in, for the rounded parameters.

    If a task adds the scores of both orders of a pair, each score contains half of the bias.
    """
    params = (exported.params["head"], exported.params["blocks"]["mlp_norm"])
    head, norm = _rounded(jax.device_get(params), dtype)
    return huggingface.score_weight(
        head["kernel"], head["bias"] / exported.function.sequences, norm["gain"][-1], norm["bias"][-1]
    )


def _rounded(params: Params, dtype: Dtype) -> Any:
    """Returns parameters in float32 after rounding them to `dtype`."""
    return jax.tree.map(lambda array: array.astype(dtype).astype(jnp.float32), params)


def _write_huggingface(exported: ExportedModel, folder: Path, dtype: Dtype) -> None:
    config, tokenizer, task, head = exported.config, exported.tokenizer, exported.task, exported.head
    names = huggingface.SPECIALS if task else ()
    for name, content in (
        ("config.json", huggingface.to_config_json(config, tokenizer, task, head, dtype)),
        ("tokenizer.json", tokenizer_json.convert(tokenizer, names)),
        ("tokenizer_config.json", tokenizer_json.tokenizer_config(tokenizer, names, exported.config.model.context_length)),
    ):
        _write_json(folder / name, content)


def _write_descriptions(exported: ExportedModel, format_: str, folder: Path, dtype: Dtype) -> None:
    info, config, tokenizer, task = exported.info, exported.config, exported.tokenizer, exported.task
    card = cards.card(format_, dtype, info, config, tokenizer, task, exported.function)
    (folder / "README.md").write_text(card, encoding="utf-8")
    if task is not None:
        _write_json(folder / LABELS, cards.labels_json(task, tokenizer))


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _write_run_files(exported: ExportedModel, folder: Path) -> None:
    run_files = folder / RUN_FILES
    run_files.mkdir()
    shutil.copyfile(exported.info.path / "config.json", run_files / "config.json")
    exported.tokenizer.save(run_files / "tokenizer")
    if exported.head is not None:
        maps = param_map.head_maps("npz", exported.config.model, exported.head)
        tensor_files.save_npz(run_files / "head.npz", param_map.to_tensors(maps, exported.params, "float32"))


# -- verifying --------------------------------------------------------------------------------------------------------------


def _verify(exported: ExportedModel, format_: str, folder: Path, dtype: Dtype, log: Log) -> dict[str, Any]:
    """Compares an export with its checkpoint and returns the contents of parity.json."""
    framework, logits, outputs = _load_back(exported, format_, folder)
    log(f"verifying with {framework}")
    report = {"format": format_, "dtype": dtype, "checkpoint_step": exported.info.step, "verified_with": framework}
    params = _rounded(exported.params, dtype)
    tolerance = FORMATS[format_].tolerance
    if logits is not None:
        reference = ExportedFunction(exported.config.model).bind(params)
        windows = parity.windows(exported.tokenizer, exported.config.model)
        report["logits"] = parity.compare(reference, logits, windows, "positions", tolerance, log)
    if outputs is not None:
        reference = exported.function.bind(params)
        examples = parity.examples(exported.tokenizer, exported.config.model, exported.function.sequences)
        report["outputs"] = parity.compare(reference, outputs, [examples], "examples", tolerance, log)
    if format_ == "huggingface":
        report["tokenizer"] = _compare_tokenizers(exported, folder, log)
    return report


def _load_back(exported: ExportedModel, format_: str, folder: Path) -> tuple[str, Computation | None, Computation | None]:
    """Loads an export, with the framework of the format if possible.

    Returns:
      The framework's name and version, the function that computes next-token logits (None if the format only has the outputs of a
      fine-tuned model), and the function that computes the outputs of a fine-tuned model (None for a language model).
    """
    head = exported.head
    if load := FORMATS[format_].load:
        package = FORMATS[format_].packages[-1]
        framework = f"{package} {importlib.import_module(package).__version__}"
        compute = load(folder)
        return (framework, compute, None) if head is None else (framework, None, compute)
    if format_ == "huggingface" and (framework := huggingface.installed_versions()):
        classifier = huggingface.load_model(folder, huggingface.architecture(head), head) if head else None
        return framework, huggingface.load_model(folder, huggingface.LANGUAGE_MODEL), classifier
    framework = "gpt_jax (files read back)"
    params = import_.load_params(folder, import_.inspect_folder(folder), exported.mesh)
    if format_ == "huggingface":
        framework = "gpt_jax (files read back; transformers and torch are not installed)"
        if huggingface.architecture(head) == huggingface.CLASSIFIER:
            score = tensor_files.load_safetensors(folder)[huggingface.SCORE]
            params |= {"head": {"kernel": score.T, "bias": np.zeros(len(score), np.float32)}}
    return framework, ExportedFunction(exported.config.model).bind(params), exported.function.bind(params) if head else None


def _compare_tokenizers(exported: ExportedModel, folder: Path, log: Log) -> dict[str, Any]:
    """Compares tokenizer.json with the tokenizer on real text, if the `tokenizers` library is installed."""
    try:
        import tokenizers as library
    except ModuleNotFoundError:
        return {"verified_with": "nothing (tokenizers is not installed)"}
    tokenizer, names = exported.tokenizer, huggingface.SPECIALS if exported.task else ()
    converted = library.Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [paragraph for document in parity.documents()[:100] for paragraph in document.split("\n\n")]
    promised = [text for text in texts if tokenizer_json.claims_equality(tokenizer, text, names)]
    equal = [text for text in texts if converted.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)]
    wrong = [text for text in promised if text not in set(equal)]
    log(f"parity: tokenizer.json gives the same ids for {len(equal):,} of {len(texts):,} texts (promised: {len(promised):,})")
    if wrong:
        raise VerificationError(f"tokenizer.json gives different ids for {wrong[0][:80]!r}; the export is removed")
    version = f"tokenizers {library.__version__}"
    return {"verified_with": version, "texts": len(texts), "promised": len(promised), "equal": len(equal)}
