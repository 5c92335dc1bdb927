"""Where each of our parameters stands in other formats: their names, shapes and order.

Every tensor of the other formats is one of our arrays, or one layer of it, in another shape: nothing is transposed in the
blocks, because their convolutions of width one keep weights as (inputs, outputs) as we do. Only the rows that pad our vocabulary
are left out.

    ours                            released              Hugging Face              npz
    embedding/tokens                we                    tokens_embed.weight       W_e   (the paper's names, section 3.1)
    embedding/positions             wpe, first            positions_embed.weight    W_p
    blocks/attention/qkv/kernel[i]  h{i}/attn/c_attn/w    h.{i}.attn.c_attn.weight  as released
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from gpt_jax.config import ModelConfig
from gpt_jax.errors import UserError
from gpt_jax.tasks.head import Head
from gpt_jax.train.step import LANGUAGE_MODEL, TrainableModel

Layout = Literal["huggingface", "openai", "npz"]

TOKENS, POSITIONS = ("embedding", "tokens"), ("embedding", "positions")

# Ours, and the name in the released code, in the order of its files.
BLOCK = (
    (("attention", "qkv", "kernel"), "attn/c_attn/w"),
    (("attention", "qkv", "bias"), "attn/c_attn/b"),
    (("attention", "out", "kernel"), "attn/c_proj/w"),
    (("attention", "out", "bias"), "attn/c_proj/b"),
    (("attention_norm", "gain"), "ln_1/g"),
    (("attention_norm", "bias"), "ln_1/b"),
    (("mlp", "up", "kernel"), "mlp/c_fc/w"),
    (("mlp", "up", "bias"), "mlp/c_fc/b"),
    (("mlp", "down", "kernel"), "mlp/c_proj/w"),
    (("mlp", "down", "bias"), "mlp/c_proj/b"),
    (("mlp_norm", "gain"), "ln_2/g"),
    (("mlp_norm", "bias"), "ln_2/b"),
)
TORCH = {"w": "weight", "g": "weight", "b": "bias"}
HEAD_NPZ = {"kernel": "W_y", "bias": "b_y"}  # equation 3


class Piece(NamedTuple):
    """One tensor of a format, and the part of our parameters that it is."""

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    """Keys of our array in the dictionary of parameters."""
    layer: int | None
    """Index on our array's first axis; None: all of it, less the rows that pad the vocabulary."""
    rotated: bool = False
    """The tensor is our matrix transposed."""

    def of(self, array: Any) -> Any:
        """The piece of our array: NumPy in, NumPy out; of a TensorStore, what is still to be read."""
        if self.layer is not None:
            return array[self.layer]
        return array[: self.shape[0]] if self.path == TOKENS else array

    def to(self, part: np.ndarray) -> np.ndarray:
        """Our part in the tensor's shape."""
        return part.T if self.rotated else part.reshape(self.shape)

    def back(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor in the shape of our part (without padding rows)."""
        return tensor.T if self.rotated else tensor.reshape(shape)


def pieces(layout: Layout, model: ModelConfig, head: Head | None = None) -> list[Piece]:
    """All tensors of a model in a layout, in the order in which they are written.

    Raises:
      UserError: the layout has no place for this model.
    """
    return {"huggingface": _huggingface, "openai": _openai, "npz": _npz}[layout](model, head)


def part_shape(piece: Piece, whole: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the part of our array of shape `whole` that a piece is."""
    if piece.layer is not None:
        return whole[1:]
    return (piece.shape[0], *whole[1:]) if piece.path == TOKENS else whole


def parameter_shapes(model: ModelConfig, head: Head | None = None) -> dict[str, Any]:
    """A tree like the parameters' with a `jax.ShapeDtypeStruct` for each."""
    model_fns: TrainableModel = head.model_fns() if head else LANGUAGE_MODEL
    return jax.eval_shape(lambda: model_fns.init(model, jax.random.key(0)))


def paths(tree: dict[str, Any]) -> dict[tuple[str, ...], Any]:
    """The leaves of nested dictionaries by their keys."""
    return {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _huggingface(model: ModelConfig, head: Head | None) -> list[Piece]:
    _require_transformer("huggingface", model)
    if model.mlp_dim != 4 * model.embed_dim:
        raise UserError(
            f"--format: the Hugging Face architecture has a feed-forward width of 4 x {model.embed_dim}, and this model's is "
            f"{model.mlp_dim}; npz, stablehlo, onnx and savedmodel take any"
        )

    def renamed(name: str) -> str:
        *parents, kind = name.split("/")
        return "transformer." + ".".join(["h", parents[0][1:], *parents[1:], TORCH[kind]])

    found = [
        Piece("transformer.tokens_embed.weight", (model.vocab_size, model.embed_dim), TOKENS, None),
        Piece("transformer.positions_embed.weight", (model.context_length, model.embed_dim), POSITIONS, None),
        *_blocks(model, renamed, batched=False),
    ]
    if head is not None and head.choices:
        found.append(Piece("multiple_choice_head.summary.weight", (1, model.embed_dim), ("head", "kernel"), None, rotated=True))
        found.append(Piece("multiple_choice_head.summary.bias", (1,), ("head", "bias"), None))
    return found


def _openai(model: ModelConfig, head: Head | None) -> list[Piece]:
    _require_transformer("openai", model)
    if head is not None:
        raise UserError("--format: the released layout has no place for a fine-tuned head; huggingface, npz and the graphs have")
    return [
        Piece("pe", (model.context_length, model.embed_dim), POSITIONS, None),
        Piece("we", (model.vocab_size, model.embed_dim), TOKENS, None),
        *_blocks(model, lambda name: name, batched=True),
    ]


def _npz(model: ModelConfig, head: Head | None) -> list[Piece]:
    heads = [
        Piece(HEAD_NPZ[path[1]], leaf.shape, path, None)
        for path, leaf in paths(parameter_shapes(model, head)).items()
        if path[0] == "head"
    ]
    tokens = Piece("W_e", (model.vocab_size, model.embed_dim), TOKENS, None)
    if model.kind == "lstm":  # which the paper gives no names for
        rest = paths({"lstm": parameter_shapes(model)["lstm"]})
        return [tokens, *(Piece("/".join(path), leaf.shape, path, None) for path, leaf in rest.items()), *heads]
    positions = Piece("W_p", (model.context_length, model.embed_dim), POSITIONS, None)
    return [tokens, positions, *_blocks(model, lambda name: name, batched=False), *heads]


def _blocks(model: ModelConfig, rename: Callable[[str], str], batched: bool) -> list[Piece]:
    """The blocks' tensors. `batched`: matrices have a leading axis of 1, as kernels of a convolution of width one."""
    shapes = paths(parameter_shapes(model)["blocks"])
    found = []
    for layer in range(model.num_layers):
        for path, name in BLOCK:
            inputs = {"qkv": 1, "up": 1, "out": 2, "down": 1}.get(path[1]) if path[-1] == "kernel" else None
            shape = shapes[path].shape[1:]
            if inputs is None:
                shape = (math.prod(shape),)
            else:
                shape = (math.prod(shape[:inputs]), math.prod(shape[inputs:]))
                shape = (1, *shape) if batched else shape
            found.append(Piece(rename(f"h{layer}/{name}"), shape, ("blocks", *path), layer))
    return found


def _require_transformer(layout: str, model: ModelConfig) -> None:
    if model.kind == "lstm":
        raise UserError(f"--format: {layout} has no LSTM language model; npz, stablehlo, onnx and savedmodel take it")
