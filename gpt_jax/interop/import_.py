"""`gpt-jax import`: a model of another format as an ordinary run with one checkpoint, on any mesh."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from gpt_jax.config import DataConfig, FinetuneRunConfig, MeshConfig, ModelConfig, PretrainConfig, RunConfig, TokenizerConfig
from gpt_jax.config.load import config_digest, config_from_dict, config_to_dict
from gpt_jax.data import tokenizers
from gpt_jax.data.tokenizers import GPT1, Tokenizer
from gpt_jax.errors import UserError
from gpt_jax.interop import huggingface, param_map, tensor_files, weights
from gpt_jax.interop.tensor_files import Tensor, Tensors
from gpt_jax.model import network
from gpt_jax.model.transformer import Params
from gpt_jax.runtime import sharding
from gpt_jax.runtime.rundir import RunDir, read_json, sha256, staged
from gpt_jax.tasks.finetune import head_of
from gpt_jax.tasks.head import Head
from gpt_jax.tasks.registry import task_from_config
from gpt_jax.tasks.transforms import SpecialTokens
from gpt_jax.train import checkpoint

SIDE = "gpt_jax"
"""The folder in an export with what other frameworks have no use for: config.json, tokenizer/, head.npz, manifest.json."""
FILES = {
    "huggingface": "config.json with model.safetensors (a Hugging Face openai-gpt)",
    "openai": "params_shapes.json with params_0.npy to params_9.npy (as released)",
    "npz": "params.npz (from gpt-jax export)",
}
VOCABULARIES = (GPT1.files, ("vocab.json", "merges.txt"))
"""The released vocabulary, under its own names and those that Hugging Face gives it."""


READ = (
    *("config.json", "*.safetensors", "*.safetensors.index.json", "params.npz", "params_*", "encoder_bpe_40000.json"),
    *("vocab_40000.bpe", f"{SIDE}/config.json", f"{SIDE}/head.npz", f"{SIDE}/tokenizer/*"),
)
"""What an import reads of an export, as patterns of names."""


class Source(NamedTuple):
    """A folder in another format, understood."""

    layout: param_map.Layout
    config: RunConfig
    model: ModelConfig
    tokenizer: Tokenizer
    head: Head | None


def import_(
    folder: Path,
    workdir: Path,
    log: Callable[[str], None],
    *,
    config: PretrainConfig | None = None,
    tokenizer: Path | None = None,
    trust_pickle: bool = False,
) -> None:
    """Makes a run in `workdir` whose only checkpoint, 0, holds the model of `folder`.

    Args:
      config: what the model must be; None: what the folder itself says, or else the paper's.
      tokenizer: folder of a tokenizer (one of ours, or the released two files); None: the one in `folder`.
      trust_pickle: read a pytorch_model.bin, which is a pickle, with torch's restricted loader.

    Raises:
      UserError: no known format; a damaged file; names, shapes or types that do not fit, all of them listed; another
        architecture; a tokenizer that is missing or does not fit; a workdir that is in use.
    """
    with staged(workdir, "workdir") as staging:
        source = understand(folder, config, tokenizer)
        log(f"{folder}: {source.layout}, {network.count(source.model):,} parameters, {source.tokenizer.kind} tokenizer")
        spread = math.gcd(source.model.embed_dim, jax.device_count())
        mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=spread), jax.devices()[:spread])
        params = load(folder, source, mesh, trust_pickle)
        run = RunDir(staging)
        with contextlib.closing(run):
            run.open(source.config, "", imported_from=str(folder))
        source.tokenizer.save(run.tokenizer)
        with checkpoint.Checkpoints(
            run.checkpoints,
            keep_latest=1,
            keep_best=0,
            config_json=json.dumps(config_to_dict(source.config), indent=1),
            config_digest=config_digest(source.config),
            data_digest="",
            tokenizer=run.tokenizer,
        ) as saver:
            saver.save(0, {"params": params}, {})
    log(f"done: {workdir} holds checkpoint 0; train on from it with --init.from {workdir}")


def understand(folder: Path, config: PretrainConfig | None = None, tokenizer: Path | None = None) -> Source:
    """Finds out what a folder holds, without reading its numbers."""
    layout = _layout(folder)
    _check_manifest(folder)
    made = _tokenizer(folder, tokenizer)
    side = folder / SIDE / "config.json"
    found: RunConfig
    if config is not None:
        found = config
    elif side.is_file():
        values = read_json(side)
        try:
            found = config_from_dict(values)
        except TypeError as error:
            raise UserError(f"{side}: is not the config of a run ({error})") from None
        if "model" not in values:
            raise UserError(f"{side}: is not the config of a run (it has no model)")
    else:
        model = ModelConfig()
        if layout == "huggingface":
            model = huggingface.model_of(read_json(folder / "config.json"), str(folder / "config.json"))
        _require_size(folder, model, made, 0)
        found = PretrainConfig(model=model, data=DataConfig(tokenizer=TokenizerConfig(kind=made.kind)))  # type: ignore[arg-type]
    model = found.model
    assert isinstance(model, ModelConfig)
    head = None
    if isinstance(found, FinetuneRunConfig):
        head = head_of(task_from_config(found.task), found)
    _require_size(folder, model, made, len(SpecialTokens._fields) if head else 0)
    return Source(layout, found, model, made, head)


def load(folder: Path, source: Source, mesh: Mesh, trust_pickle: bool = False) -> Params:
    """The parameters of a folder, spread over a mesh.

    Raises:
      UserError: a damaged file, or tensors that do not fit; all differences in one line.
    """
    pieces = param_map.pieces(source.layout, source.model, source.head)
    if source.layout == "openai":
        tensors = tensor_files.read_openai(folder, [piece.name for piece in pieces])
    elif source.layout == "npz":
        tensors = tensor_files.read_npz(folder / "params.npz")
    else:
        pickled = not _safetensors(folder)
        tensors = _their_names(_read_pickle(folder, trust_pickle) if pickled else tensor_files.read_safetensors(folder))
        if source.head is not None and not source.head.choices:  # their classifier has no bias: ours stands beside it
            side = tensor_files.read_npz(folder / SIDE / "head.npz")
            pieces += [piece for piece in param_map.pieces("npz", source.model, source.head) if piece.path[0] == "head"]
            known = {name: tensor for name, tensor in tensors.known.items() if name != huggingface.SCORE}
            main = tensors.read
            tensors = Tensors(folder, known | side.known, lambda name: side.read(name) if name in side.known else main(name))
    return weights.assemble(tensors, pieces, source.config, mesh, source.head)


# -- what a folder holds ----------------------------------------------------------------------------------------------------


def _safetensors(folder: Path) -> bool:
    return (folder / "model.safetensors").is_file() or (folder / "model.safetensors.index.json").is_file()


def _layout(folder: Path) -> param_map.Layout:
    if not folder.is_dir():
        raise UserError(f"{folder}: {'is a file' if folder.exists() else 'no such folder'}; give the folder of a model")
    if (folder / "config.json").is_file():
        if _safetensors(folder) or (folder / "pytorch_model.bin").is_file():
            return "huggingface"
        huggingface.model_of(read_json(folder / "config.json"), str(folder / "config.json"))  # gpt2 is named as such
    if (folder / "params_shapes.json").is_file():
        return "openai"
    if (folder / "params.npz").is_file():
        return "npz"
    graphs = [name for name in ("model.stablehlo", "model.onnx", "saved_model.pb") if (folder / name).exists()]
    if graphs:
        raise UserError(
            f"{folder}: {graphs[0]} is a graph, from which no checkpoint is made; export {' or '.join(FILES)} instead"
        )
    raise UserError(f"{folder}: no known format; looked for {', '.join(FILES.values())}")


def _check_manifest(folder: Path) -> None:
    """Compares an export of ours with its checksums."""
    manifest = folder / SIDE / "manifest.json"
    if not manifest.is_file():
        return
    altered = []
    for name, checksum in read_json(manifest).items():
        if not (folder / name).is_file():
            altered.append(f"{name} is missing")
        elif sha256(folder / name) != checksum:
            altered.append(f"{name} was truncated or altered")
    if altered:
        raise UserError(
            f"{folder}: differs from what was exported: {', '.join(altered)}; export it again, or delete {manifest} if "
            "that is meant"
        )


def _tokenizer(folder: Path, given: Path | None) -> Tokenizer:
    for place in [given] if given else [folder / SIDE / "tokenizer", folder]:
        if (place / "sentencepiece.model").is_file() or (place.name == "tokenizer" and (place / tokenizers.MANIFEST).is_file()):
            return tokenizers.load(place)
        for vocabulary, merges in VOCABULARIES:
            if (place / vocabulary).is_file() and (place / merges).is_file():
                try:
                    return GPT1((place / vocabulary).read_bytes(), (place / merges).read_bytes())
                except UserError:
                    raise UserError(
                        f"{place}: {vocabulary} and {merges} are not the vocabulary and the merges of a byte-pair "
                        "encoding like the released one"
                    ) from None
        if given and (place / tokenizers.MANIFEST).is_file():
            return tokenizers.load(place)
    where = f"{given}: no tokenizer there" if given else f"{folder}: has no tokenizer"
    raise UserError(f"{where}; name a folder with {' and '.join(GPT1.files)}, or a run's tokenizer folder, with --tokenizer")


def _require_size(folder: Path, model: ModelConfig, tokenizer: Tokenizer, specials: int) -> None:
    if tokenizer.vocab_size + specials != model.vocab_size:
        added = f" and {specials} special tokens" if specials else ""
        raise UserError(
            f"{folder}: the model has {model.vocab_size} entries, and its tokenizer {tokenizer.vocab_size}{added}; name the "
            "folder of the right one with --tokenizer"
        )


# -- Hugging Face -----------------------------------------------------------------------------------------------------------


def _their_names(tensors: Tensors) -> Tensors:
    """Names as their language model has them. Without "transformer." they are those of the bare model; old files hold the causal
    mask of each block as well, and the output layer, which is the embeddings again."""
    names: dict[str, str] = {}
    for name, (shape, _) in tensors.known.items():
        parts = name.split(".")
        if name == "lm_head.weight" or (parts[-2:] == ["attn", "bias"] and len(shape) == 4):
            continue
        ours = f"transformer.{name}" if parts[0] in ("tokens_embed", "positions_embed", "h") else name
        if ours in names:
            raise UserError(f"{tensors.where}: holds {ours} twice, with and without 'transformer.'")
        names[ours] = name
    tokens = names.get("transformer.tokens_embed.weight")
    if "lm_head.weight" in tensors.known and tokens and not np.array_equal(tensors.read("lm_head.weight"), tensors.read(tokens)):
        raise UserError(
            f"{tensors.where}: lm_head.weight differs from the embeddings, and GPT-1's output layer is its embeddings"
        )
    known = {ours: tensors.known[theirs] for ours, theirs in names.items()}
    return Tensors(tensors.where, known, lambda name: tensors.read(names[name]))


def _read_pickle(folder: Path, trusted: bool) -> Tensors:
    path = folder / "pytorch_model.bin"
    if not trusted:
        raise UserError(
            f"{path}: is a pickle, which can run any code; say --trust-pickle if you trust where it comes from, or convert it to "
            "model.safetensors"
        )
    try:
        import torch
    except ModuleNotFoundError:
        raise UserError(f"{path}: needs torch: pip install 'gpt_jax[huggingface]'") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever its unpickler meets in a damaged or hostile file
        raise UserError(f"{path}: truncated, altered, or more than tensors ({type(error).__name__})") from None
    if not isinstance(state, dict) or not all(isinstance(x, torch.Tensor) for x in state.values()):
        raise UserError(f"{path}: holds something other than tensors by their names")

    def read(name: str) -> np.ndarray:
        x = state[name]  # NumPy knows bfloat16 only as two bytes
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()

    return Tensors(path, {name: Tensor(tuple(x.shape), read(name).dtype) for name, x in state.items()}, read)
