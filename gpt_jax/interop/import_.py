"""Imports (`gpt-jax import`): turns a model in another format into a run with one checkpoint, which can be loaded on any mesh."""

import contextlib
import zipfile
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from gpt_jax.config import DataConfig, FinetuneRunConfig, ModelConfig, PretrainConfig, RunConfig, TokenizerConfig
from gpt_jax.config.load import config_from_dict
from gpt_jax.data.tokenizers import GPT1, MANIFEST, Tokenizer, load_tokenizer
from gpt_jax.errors import UserError, shortened
from gpt_jax.interop import huggingface, param_map, tensor_files
from gpt_jax.interop.staging import staged_folder
from gpt_jax.interop.tensor_files import Tensors
from gpt_jax.model.transformer import Params
from gpt_jax.runtime.console import Log
from gpt_jax.runtime.rundir import RunDir, read_json, sha256
from gpt_jax.tasks.head import Head, make_head
from gpt_jax.tasks.registry import task_from_config
from gpt_jax.tasks.transforms import SpecialTokens
from gpt_jax.train.checkpoint import CheckpointWriter
from gpt_jax.train.restore import local_mesh

RUN_FILES = "gpt_jax"
"""Folder in an export for files that other frameworks do not need: config.json, tokenizer/, head.npz, manifest.json."""

EXPECTED_FILES = {
    "huggingface": "config.json with model.safetensors (a Hugging Face openai-gpt)",
    "openai": "params_shapes.json with params_0.npy to params_9.npy (as released)",
    "npz": "params.npz (from gpt-jax export)",
}

IMPORTED_PATTERNS = (
    *("config.json", "*.safetensors", "*.safetensors.index.json", "params.npz", "params_*", "encoder_bpe_40000.json"),
    *("vocab_40000.bpe", f"{RUN_FILES}/config.json", f"{RUN_FILES}/head.npz", f"{RUN_FILES}/tokenizer/*"),
)
"""Patterns of the files in an export that an import reads."""

VOCABULARY_FILES = (GPT1.files, ("vocab.json", "merges.txt"))
"""Names of the files of the released vocabulary: in the release, and in Hugging Face's repositories."""


class ForeignModel(NamedTuple):
    """A model in another format, without its parameters."""

    format_: str
    """"huggingface", "openai" or "npz"."""
    config: RunConfig
    tokenizer: Tokenizer
    head: Head | None


def import_(
    folder: Path,
    workdir: Path,
    log: Log,
    *,
    config: PretrainConfig | None = None,
    tokenizer: Path | None = None,
    trust_pickle: bool = False,
) -> None:
    """Creates a run in `workdir` whose only checkpoint, at step 0, is the model in `folder`.

    Args:
      config: describes the model; None: the config in the folder, or the paper's config if there is none.
      tokenizer: folder of a tokenizer (one of ours, or the two released files); None: the tokenizer in `folder`.
      trust_pickle: whether to read a pytorch_model.bin, which is a pickle, with torch's restricted loader.

    Raises:
      UserError: the format is unknown; a file is damaged; names, shapes or types do not fit (the first of them are listed); the
        model has another architecture; the tokenizer is missing or does not fit; the workdir is in use.
    """
    with staged_folder(workdir, "workdir") as staging:
        foreign = inspect_folder(folder, config, tokenizer)
        model = foreign.config.model
        log(f"{folder}: {foreign.format_} format, {model.num_parameters:,} parameters, {foreign.tokenizer.kind} tokenizer")
        params = load_params(folder, foreign, local_mesh(model), trust_pickle)
        run = RunDir(staging)
        with contextlib.closing(run):
            run.open(foreign.config, "", imported_from=str(folder))
        foreign.tokenizer.save(run.tokenizer)
        with CheckpointWriter(run.checkpoints, foreign.config, "", run.tokenizer) as writer:
            writer.save(0, {"params": params}, {})
    log(f"done: {workdir} has checkpoint 0; start training from it with --init.from {workdir}")


def inspect_folder(folder: Path, config: PretrainConfig | None = None, tokenizer: Path | None = None) -> ForeignModel:
    """Returns the model in `folder` without reading its parameters. Arguments and errors are those of `import_`."""
    format_ = _detect_format(folder)
    _check_manifest(folder)
    loaded_tokenizer = _load_tokenizer(folder, tokenizer)
    run_config_file = folder / RUN_FILES / "config.json"
    run_config: RunConfig
    if config is not None:
        run_config = config
    elif run_config_file.is_file():
        values = read_json(run_config_file)
        if "model" not in values:
            raise UserError(f"{run_config_file}: is not the config of a run (it has no model)")
        run_config = config_from_dict(values, run_config_file)
    else:
        model = ModelConfig()
        if format_ == "huggingface":
            model = huggingface.from_config_json(read_json(folder / "config.json"), folder / "config.json")
        _require_size(folder, model, loaded_tokenizer, 0)
        data = DataConfig(tokenizer=TokenizerConfig(kind=loaded_tokenizer.kind))  # type: ignore[arg-type]
        run_config = PretrainConfig(model=model, data=data)
    head = None
    if isinstance(run_config, FinetuneRunConfig):
        head = make_head(task_from_config(run_config.task), run_config)
    _require_size(folder, run_config.model, loaded_tokenizer, len(SpecialTokens._fields) if head else 0)
    return ForeignModel(format_, run_config, loaded_tokenizer, head)


def load_params(folder: Path, foreign: ForeignModel, mesh: Mesh, trust_pickle: bool = False) -> Params:
    """Reads the parameters in a folder and shards them over a mesh.

    Raises:
      UserError: a file is damaged, or tensors do not fit. The message lists the first differences in one line.
    """
    format_, model, head = foreign.format_, foreign.config.model, foreign.head
    if format_ == "openai":
        arrays = tensor_files.load_openai(folder)
        tensors = {f"array {number}": array for number, array in enumerate(arrays)}
    elif format_ == "npz":
        tensors = tensor_files.load_npz(folder / "params.npz")
    else:
        in_file = tensor_files.load_safetensors(folder) if _has_safetensors(folder) else _load_pickle(folder, trust_pickle)
        tensors = _standard_names(folder, in_file)
    _require_numbers(folder, model, tensors)
    try:
        maps = param_map.tensor_maps(format_, model, head)
    except UserError as error:  # Its message is written for an export.
        raise UserError(f"{folder}: {str(error).removeprefix('--format: ').partition(';')[0]}") from None
    if format_ == "openai":  # Its arrays have an order, but no names.
        tensors |= {m.name: tensors.pop(name) for m, name in zip(maps, list(tensors), strict=False)}
    if format_ == "huggingface" and head is not None and not head.choices:
        # Hugging Face's classifier has no bias, so our head is in a separate file.
        tensors.pop(huggingface.SCORE, None)
        tensors |= tensor_files.load_npz(folder / RUN_FILES / "head.npz")
        maps += param_map.head_maps("npz", model, head)
    return param_map.to_params(folder, tensors, maps, foreign.config, mesh, head)


def _require_numbers(folder: Path, model: ModelConfig, tensors: Tensors) -> None:
    """Raises an error if a model is much larger than its file, before anything of the model's size is allocated."""
    numbers = sum(tensor.size for tensor in tensors.values())
    if model.num_parameters > 2 * numbers:
        size = shortened(f"{model.num_parameters:,}")
        raise UserError(f"{folder}: the config describes a model of {size} parameters, but the files have {numbers:,} numbers")


# -- the contents of a folder -----------------------------------------------------------------------------------------------


def _has_safetensors(folder: Path) -> bool:
    return (folder / "model.safetensors").is_file() or (folder / "model.safetensors.index.json").is_file()


def _detect_format(folder: Path) -> str:
    if not folder.is_dir():
        raise UserError(f"{folder}: {'is a file' if folder.exists() else 'no such folder'}; give the folder of a model")
    if (folder / "config.json").is_file():
        if _has_safetensors(folder) or (folder / "pytorch_model.bin").is_file():
            return "huggingface"
        huggingface.from_config_json(read_json(folder / "config.json"), folder / "config.json")  # Another model type is an error.
    if (folder / "params_shapes.json").is_file():
        return "openai"
    if (folder / "params.npz").is_file():
        return "npz"
    graphs = [name for name in ("model.stablehlo", "model.onnx", "saved_model.pb") if (folder / name).exists()]
    if graphs:
        raise UserError(
            f"{folder}: {graphs[0]} is a graph, which cannot be imported; export {' or '.join(EXPECTED_FILES)} instead"
        )
    raise UserError(f"{folder}: unknown format; expected {', or '.join(EXPECTED_FILES.values())}")


def _check_manifest(folder: Path) -> None:
    """Verifies the checksums of the files if the folder is one of our exports."""
    manifest = folder / RUN_FILES / "manifest.json"
    if not manifest.is_file():
        return
    problems = []
    for name, checksum in read_json(manifest).items():
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            problems.append(f"'{name}' is not a file in the folder")
        elif not (folder / name).is_file():
            problems.append(f"{name} is missing")
        elif sha256(folder / name) != checksum:
            problems.append(f"{name} was truncated or altered")
    if problems:
        raise UserError(
            f"{folder}: differs from what was exported: {param_map.first_problems(problems)}; export it again, or delete "
            f"{manifest} if the change is intended"
        )


def _load_tokenizer(folder: Path, given: Path | None) -> Tokenizer:
    for place in [given] if given else [folder / RUN_FILES / "tokenizer", folder]:
        manifest = place / MANIFEST
        if manifest.is_file() and "fingerprint" in read_json(manifest):  # Hugging Face has another file of this name.
            return load_tokenizer(place)
        for names in VOCABULARY_FILES:
            if all((place / name).is_file() for name in names):
                try:
                    return GPT1(*((place / name).read_bytes() for name in names))
                except UserError as error:  # Its message names the released files.
                    message = str(error)
                    for released, name in zip(GPT1.files, names, strict=True):
                        message = message.replace(released, name)
                    raise UserError(f"{place}/{message}") from None
    raise UserError(
        f"{given or folder}: has no tokenizer; use --tokenizer with a run's tokenizer folder, or with a folder that has "
        f"{' and '.join(GPT1.files)}"
    )


def _require_size(folder: Path, model: ModelConfig, tokenizer: Tokenizer, num_specials: int) -> None:
    if tokenizer.vocab_size + num_specials != model.vocab_size:
        specials = f" and {num_specials} special tokens" if num_specials else ""
        raise UserError(
            f"{folder}: the model has {model.vocab_size} entries, but its tokenizer has {tokenizer.vocab_size}{specials}; use "
            "--tokenizer with the folder of the right one"
        )


# -- Hugging Face files -----------------------------------------------------------------------------------------------------


def _standard_names(folder: Path, tensors: Tensors) -> Tensors:
    """Returns tensors by the names that transformers' language model uses.

    Files of the bare model lack the prefix "transformer.". Old files also have the causal mask of each block, and the output
    layer, which is a copy of the embeddings.
    """
    result: Tensors = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if name == "lm_head.weight" or (parts[-2:] == ["attn", "bias"] and tensor.ndim == 4):
            continue
        standard = f"transformer.{name}" if parts[0] in ("tokens_embed", "positions_embed", "h") else name
        if standard in result:
            raise UserError(f"{folder}: has {standard} twice, with and without 'transformer.'")
        result[standard] = tensor
    tokens = result.get("transformer.tokens_embed.weight")
    output = tensors.get("lm_head.weight")
    if tokens is not None and output is not None and not np.array_equal(output, tokens):
        raise UserError(f"{folder}: lm_head.weight differs from the embeddings, but GPT-1's output layer is its embeddings")
    return result


def _load_pickle(folder: Path, trusted: bool) -> Tensors:
    path = folder / "pytorch_model.bin"
    if not trusted:
        raise UserError(
            f"{path}: is a pickle, which can run any code; add --trust-pickle if you trust its origin, or convert it to "
            "model.safetensors"
        )
    try:
        import torch
    except ModuleNotFoundError:
        raise UserError(f"{path}: needs torch: pip install 'gpt_jax[huggingface]'") from None
    try:
        # Files of torch before 1.6 are not zip archives, and cannot be mapped into memory.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        arrays = {str(name): tensor.detach() for name, tensor in state.items()}
        # NumPy has no bfloat16 of its own, so torch cannot convert it.
        return {
            name: x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()
            for name, x in arrays.items()
        }
    except Exception as error:  # A damaged or hostile file causes errors of many types.
        raise UserError(f"{path}: truncated, altered, or not a dictionary of tensors ({type(error).__name__})") from error
