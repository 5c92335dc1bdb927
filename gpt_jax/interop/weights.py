"""From checkpoints to named tensors, and from named tensors to parameters on any mesh, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gpt_jax.config import RunConfig
from gpt_jax.errors import UserError
from gpt_jax.interop.param_map import Piece, parameter_shapes, part_shape, paths
from gpt_jax.interop.tensor_files import Tensor, Tensors, narrow
from gpt_jax.model.transformer import Params
from gpt_jax.tasks.head import Head
from gpt_jax.train import checkpoint
from gpt_jax.train.step import LANGUAGE_MODEL, state_shardings


def described(pieces: Sequence[Piece], dtype: str) -> dict[str, Tensor]:
    """Name, shape and type of each piece."""
    return {piece.name: Tensor(piece.shape, narrow(np.empty(0, np.float32), dtype).dtype) for piece in pieces}


def stream(info: checkpoint.Info, pieces: Sequence[Piece], dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """Reads a checkpoint's tensors, each of them when it is asked for.

    Yields:
      Name, and numbers in the piece's shape, float32 rounded to `dtype`.
    """
    arrays = paths(checkpoint.open_arrays(info))
    for piece in pieces:
        part = checkpoint.read_array(piece.of(arrays[piece.path]))
        yield piece.name, narrow(piece.to(part), dtype)


def check(tensors: Tensors, pieces: Sequence[Piece]) -> None:
    """Compares what is there with what a model needs.

    Raises:
      UserError: names, shapes or types differ; all differences are listed.
    """
    wanted = {piece.name: piece.shape for piece in pieces}
    problems = [f"{name} {list(wanted[name])} is missing" for name in wanted if name not in tensors.known]
    for name, (shape, dtype) in tensors.known.items():
        if name not in wanted:
            problems.append(f"{name} {list(shape)} is not wanted")
        elif shape != wanted[name]:
            problems.append(f"{name} is {list(shape)}, not {list(wanted[name])}")
        elif dtype.name not in ("float32", "bfloat16", "float16"):
            problems.append(
                f"{name} is {dtype.name if dtype != np.void else 'of another type'}, not float32, bfloat16 or float16"
            )
    if problems:
        raise UserError(f"{tensors.where}: does not fit the model: {'; '.join(problems)}")


def assemble(tensors: Tensors, pieces: Sequence[Piece], config: RunConfig, mesh: Mesh, head: Head | None = None) -> Params:
    """Puts tensors together to parameters, spread over a mesh: each device's part is read for itself, so that the host never
    holds more than that and one tensor.

    Raises:
      UserError: as `check`; or numbers that are not finite.
    """
    check(tensors, pieces)
    by_path: dict[tuple[str, ...], list[Piece]] = {}
    for piece in pieces:
        by_path.setdefault(piece.path, []).append(piece)
    shapes = paths(parameter_shapes(config.model, head))
    shardings = paths(state_shardings(config, mesh, head.model_fns() if head else LANGUAGE_MODEL)["params"])

    def read(piece: Piece, shape: tuple[int, ...]) -> np.ndarray:
        array = tensors.read(piece.name)
        if not np.isfinite(array.astype(np.float32, copy=False)).all():
            raise UserError(f"{tensors.where}: {piece.name} holds numbers that are not finite; the file is damaged")
        return piece.back(array, shape)

    def leaf(path: tuple[str, ...]) -> jax.Array:
        whole, found = shapes[path], by_path[path]

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            if found[0].layer is not None:
                layers = [read(piece, part_shape(piece, whole.shape))[index[1:]] for piece in found[index[0]]]
                return np.stack(layers).astype(whole.dtype)
            array = read(found[0], part_shape(found[0], whole.shape))
            begin, end, _ = index[0].indices(whole.shape[0])
            rows = array[(slice(begin, end), *index[1:])].astype(whole.dtype)
            padding = end - begin - len(rows)  # rows that only pad the vocabulary
            return np.concatenate([rows, np.zeros((padding, *rows.shape[1:]), rows.dtype)]) if padding else rows

        return jax.make_array_from_callback(whole.shape, shardings[path], part)

    tree: dict[str, Any] = {}
    for path in shapes:
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf(path)
    return tree
