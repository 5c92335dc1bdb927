"""The names and shapes of parameters in other formats, and the conversion in both directions.

Every tensor in another format is one of our arrays, or one layer of a stacked array, in another shape. Nothing is transposed: the
convolutions of width one in the released code store their weights as (inputs, outputs), as we do. The rows that pad our
vocabulary are left out.

    ours                            released              Hugging Face              npz
    embedding/tokens                second array          tokens_embed.weight       W_e   (section 3.1 of the paper)
    embedding/positions             first array           positions_embed.weight    W_p
    blocks/attention/qkv/kernel[i]  h{i}/attn/c_attn/w    h.{i}.attn.c_attn.weight  as released
    head/kernel                                           multiple_choice_head.*    W_y   (section 3.2)
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from gpt_jax.config import ModelConfig, RunConfig
from gpt_jax.errors import LISTED, UserError, shortened
from gpt_jax.model.transformer import Params
from gpt_jax.tasks.head import Head
from gpt_jax.train.step import LANGUAGE_MODEL, abstract_state

TOKENS, POSITIONS = ("embedding", "tokens"), ("embedding", "positions")

# The names of the embeddings, in the order of the files. The released files have no names.
EMBEDDINGS: dict[str, dict[tuple[str, ...], str]] = {
    "huggingface": {TOKENS: "transformer.tokens_embed.weight", POSITIONS: "transformer.positions_embed.weight"},
    "openai": {POSITIONS: "pe", TOKENS: "we"},
    "npz": {TOKENS: "W_e", POSITIONS: "W_p"},
}

# The parts of a block and their names in the released code, in the order of the released files.
BLOCK = {
    ("attention", "qkv"): "attn/c_attn",
    ("attention", "out"): "attn/c_proj",
    ("attention_norm",): "ln_1",
    ("mlp", "up"): "mlp/c_fc",
    ("mlp", "down"): "mlp/c_proj",
    ("mlp_norm",): "ln_2",
}
SUFFIXES = {"kernel": "w", "gain": "g", "bias": "b"}

HEAD = {
    "huggingface": {"kernel": "multiple_choice_head.summary.weight", "bias": "multiple_choice_head.summary.bias"},
    "npz": {"kernel": "W_y", "bias": "b_y"},
}


class TensorMap(NamedTuple):
    """One tensor of a format, and the corresponding part of our parameters."""

    name: str
    shape: tuple[int, ...]
    """Shape of the tensor."""
    path: tuple[str, ...]
    """Keys of our array in the nested dictionary of parameters."""
    internal_shape: tuple[int, ...]
    """Shape of the corresponding part of our array."""
    layer: int | None = None
    """Index on the first axis of our array; None: the complete array, without the rows that pad the vocabulary."""

    def slice(self, array: np.ndarray) -> np.ndarray:
        """Returns a view of the part of our array that corresponds to the tensor."""
        return array[: self.internal_shape[0]] if self.layer is None else array[self.layer]

    def to_external(self, part: np.ndarray) -> np.ndarray:
        """Returns a part of our array in the shape of the tensor."""
        return part.reshape(self.shape)

    def from_external(self, tensor: np.ndarray) -> np.ndarray:
        """Returns a tensor in the shape of the part of our array."""
        return tensor.reshape(self.internal_shape)


def tensor_maps(format_: str, model: ModelConfig, head: Head | None = None) -> list[TensorMap]:
    """Returns the map of every tensor of a model in a format, in the order in which the tensors are written.

    Raises:
      UserError: the format cannot represent this model.
    """
    _require_place(format_, model, head)
    shapes = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(parameter_shapes(model, head)).items()}
    maps = []
    for path, name in EMBEDDINGS[format_].items():
        if path in shapes:  # The LSTM has no positions.
            shape: tuple[int, ...] = (model.vocab_size if path == TOKENS else model.context_length, model.embed_dim)
            maps.append(TensorMap(name, shape, path, shape))
    for layer in range(model.num_layers if model.kind == "transformer" else 0):
        for part, name in BLOCK.items():
            for leaf, suffix in SUFFIXES.items():
                path = ("blocks", *part, leaf)
                if path in shapes:  # Layer norms have no kernel, and linear layers have no gain.
                    shape = _block_shape(format_, model, path, shapes[path][1:])
                    maps.append(TensorMap(_block_name(format_, layer, name, suffix), shape, path, shapes[path][1:], layer))
    # The paper does not name the LSTM's parameters, so the npz file uses our names.
    maps += [TensorMap("/".join(path), shape, path, shape) for path, shape in shapes.items() if path[0] == "lstm"]
    return maps + (head_maps(format_, model, head) if head else [])


def head_maps(format_: str, model: ModelConfig, head: Head) -> list[TensorMap]:
    """Returns the maps of the head's tensors. The Hugging Face format only has tensors for the head of multiple choice."""
    if format_ == "huggingface" and not head.choices:
        return []
    maps = []
    for part, leaf in parameter_shapes(model, head)["head"].items():
        # The head for multiple choice has one output, so reshaping its kernel transposes it.
        shape = leaf.shape[::-1] if format_ == "huggingface" else leaf.shape
        maps.append(TensorMap(HEAD[format_][part], shape, ("head", part), leaf.shape))
    return maps


def _require_place(format_: str, model: ModelConfig, head: Head | None) -> None:
    problem = ""
    if format_ != "npz" and model.kind == "lstm":
        problem = f"{format_} has no LSTM language model"
    elif format_ == "huggingface" and model.mlp_dim != 4 * model.embed_dim:
        problem = f"{format_} has a feed-forward width of 4 x {model.embed_dim}, but this model's is {model.mlp_dim}"
    elif format_ == "openai" and head is not None:
        problem = f"{format_} cannot store a fine-tuned head"
    if problem:
        raise UserError(f"--format: {problem}; use npz, stablehlo, onnx or savedmodel")


def _block_name(format_: str, layer: int, name: str, suffix: str) -> str:
    if format_ != "huggingface":
        return f"h{layer}/{name}/{suffix}"
    return f"transformer.h.{layer}.{name.replace('/', '.')}.{'bias' if suffix == 'b' else 'weight'}"


def _block_shape(format_: str, model: ModelConfig, path: tuple[str, ...], internal_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of a block's tensor: one axis for the inputs of a matrix and one for its outputs."""
    size = math.prod(internal_shape)
    if path[-1] != "kernel":
        return (size,)
    inputs = model.mlp_dim if "down" in path else model.embed_dim
    # The released kernels have an additional axis for their width, which is one.
    return (1, inputs, size // inputs) if format_ == "openai" else (inputs, size // inputs)


def parameter_shapes(model: ModelConfig, head: Head | None = None) -> Params:
    """Returns the parameters' nested dictionary with a `jax.ShapeDtypeStruct` in place of each array."""
    trainable = head.trainable_model() if head else LANGUAGE_MODEL
    return jax.eval_shape(lambda: trainable.init(model, jax.random.key(0)))


def to_tensors(maps: Sequence[TensorMap], params: Params, dtype: str) -> dict[str, np.ndarray]:
    """Returns the tensors of a format, rounded to `dtype`. Tensors that need no rounding are views of the host's parameters."""
    arrays = traverse_util.flatten_dict(jax.device_get(params))
    return {m.name: m.to_external(m.slice(arrays[m.path])).astype(dtype, copy=False) for m in maps}


def to_params(
    folder: Path, tensors: Mapping[str, np.ndarray], maps: Sequence[TensorMap], config: RunConfig, mesh: Mesh, head: Head | None
) -> Params:
    """Returns the parameters from the tensors of a format, sharded over a mesh.

    Args:
      folder: the folder of the tensors, for messages.

    Raises:
      UserError: names, shapes or types differ from what the model needs (the first differences are listed), or a number is not
        finite.
    """
    _check_fit(folder, tensors, maps)
    trainable = head.trainable_model() if head else LANGUAGE_MODEL
    abstract = abstract_state(config, mesh, trainable)["params"]
    arrays = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in traverse_util.flatten_dict(abstract).items()}
    for m in maps:
        if not np.isfinite(tensors[m.name].astype(np.float32, copy=False)).all():
            raise UserError(f"{folder}: {m.name} has numbers that are not finite; the file is damaged")
        m.slice(arrays[m.path])[...] = m.from_external(tensors[m.name])
    params = traverse_util.unflatten_dict(arrays)
    return jax.tree.map(lambda array, leaf: jax.device_put(array, leaf.sharding), params, abstract)


def _check_fit(folder: Path, tensors: Mapping[str, np.ndarray], maps: Sequence[TensorMap]) -> None:
    expected = {m.name: m.shape for m in maps}
    problems = []
    for name, tensor in tensors.items():
        if tensor.shape != expected.get(name, tensor.shape):
            problems.append(f"{name} is {list(tensor.shape)}, not {list(expected[name])}")
        elif tensor.dtype.name not in ("float32", "bfloat16", "float16"):
            problems.append(f"{shortened(name)} is {tensor.dtype}, not float32, bfloat16 or float16")
    problems += [f"{name} {list(shape)} is missing" for name, shape in expected.items() if name not in tensors]
    problems += [f"{shortened(name)} {list(tensor.shape)} is unknown" for name, tensor in tensors.items() if name not in expected]
    if problems:
        raise UserError(f"{folder}: does not fit the model: {first_problems(problems)}")


def first_problems(problems: Sequence[str]) -> str:
    """Returns the problems as one phrase; if there are many, the first ones and the number of the others."""
    more = f"; and {len(problems) - LISTED:,} more" if len(problems) > LISTED else ""
    return "; ".join(problems[:LISTED]) + more
