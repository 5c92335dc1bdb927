"""Files of named tensors: safetensors, NumPy's npz, and the params_*.npy that OpenAI released.

Reading a file never unpickles anything.
"""

import contextlib
import io
import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401  It registers bfloat16 with NumPy.
import numpy as np

from gpt_jax.errors import UserError, shortened
from gpt_jax.inputs.json_shapes import mismatch
from gpt_jax.inputs.json_values import parse_json
from gpt_jax.runtime.rundir import read_json

Tensors = dict[str, np.ndarray]

OPENAI_FILES = 10
"""Number of files into which the released parameters, one long array, are split evenly."""


# -- safetensors ------------------------------------------------------------------------------------------------------------


def save_safetensors(folder: Path, tensors: Mapping[str, np.ndarray], shard_bytes: float = math.inf) -> None:
    """Writes model.safetensors, or several files model-00001-of-0000N.safetensors and their model.safetensors.index.json.

    Args:
      tensors: dtypes float32, bfloat16 or float16.
      shard_bytes: maximum size of the numbers in one file, unless a single tensor is larger; > 0.

    Raises:
      OSError: a file cannot be written, for example because there is no space left.
    """
    shards: list[Tensors] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(other.nbytes for other in shards[-1].values()) + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = np.ascontiguousarray(tensor)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        suffix = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        path = folder / f"model{suffix}.safetensors"
        _save_shard(path, shard)
        weight_map |= dict.fromkeys(shard, path.name)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _save_shard(path: Path, shard: Tensors) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(shard, path, metadata={"format": "pt"})  # transformers refuses a file without this entry.
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
    path.chmod(path.parent.stat().st_mode & 0o666)  # The library creates files that only their owner can read.


def load_safetensors(folder: Path) -> Tensors:
    """Reads the tensors of model.safetensors, or of the files that model.safetensors.index.json lists.

    Raises:
      UserError: a file is missing, truncated, or not in this format.
    """
    from safetensors.numpy import load_file

    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        values = read_json(index)
        if problem := mismatch(values, {"weight_map": {str: str}}):
            raise UserError(f"{index}: is not an index of safetensors files: {problem}")
        names = sorted(set(values["weight_map"].values()))
        for name in names:
            if Path(name).name != name or name in ("", "..") or len(name) > 255:
                raise UserError(
                    f"{index}: '{shortened(name)}' is not a file in this folder; only the folder's own files are read"
                )
    tensors: Tensors = {}
    for name in names:
        with _explain_damage(folder / name):
            tensors |= load_file(folder / name)
    return tensors


# -- NumPy ------------------------------------------------------------------------------------------------------------------


def save_npz(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes an npz file that contains each tensor under its name."""
    np.savez(path, **tensors)  # type: ignore[arg-type]


def load_npz(path: Path) -> Tensors:
    """Reads the tensors of an npz file.

    Raises:
      UserError: the file is missing, truncated or altered, or has pickled objects.
    """
    with _explain_damage(path), np.lib.npyio.NpzFile(path, allow_pickle=False) as archive:  # type: ignore[arg-type]
        tensors = dict(archive)
        if not all(isinstance(tensor, np.ndarray) for tensor in tensors.values()):
            raise ValueError("an entry is not an array")
    return tensors


# -- the released files -----------------------------------------------------------------------------------------------------


def save_openai(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes params_shapes.json and params_0.npy to params_9.npy: all numbers (float32) as one array, split into ten files.

    As in the released files, the first files have one more number than the others if ten does not divide the total.
    """
    shapes = [tensor.shape for tensor in tensors.values()]
    (folder / "params_shapes.json").write_text(json.dumps(shapes) + "\n", encoding="utf-8")
    numbers = np.concatenate([tensor.reshape(-1) for tensor in tensors.values()])
    for index, part in enumerate(np.array_split(numbers, OPENAI_FILES)):
        buffer = io.BytesIO()
        np.save(buffer, part)
        (folder / f"params_{index}.npy").write_bytes(buffer.getbuffer())  # On a full disk np.save raises no error number.


def load_openai(folder: Path) -> list[np.ndarray]:
    """Reads the tensors of the released files, which have shapes and an order but no names.

    Raises:
      UserError: a file is missing, truncated or altered, or has pickled objects; or the shapes do not match the number of values.
    """
    shapes_file = folder / "params_shapes.json"
    with _explain_damage(shapes_file):
        text = shapes_file.read_text(encoding="utf-8")
    shapes = parse_json(text, shapes_file)
    problem = mismatch(shapes, [[int]])
    if problem or not shapes or not all(size for shape in shapes for size in shape):
        raise UserError(f"{shapes_file}: is not a list of shapes, which are lists of whole numbers above 0")
    parts = []
    for number in range(OPENAI_FILES):
        path = folder / f"params_{number}.npy"
        with _explain_damage(path):
            parts.append(np.lib.format.open_memmap(path, mode="r").reshape(-1))
        if parts[-1].dtype != np.float32:
            raise UserError(f"{path}: has numbers of type {parts[-1].dtype}, not float32")
    numbers = np.concatenate(parts)
    ends = list(itertools.accumulate(math.prod(shape) for shape in shapes))
    if numbers.size != ends[-1]:
        described = shortened(f"{ends[-1]:,}")
        raise UserError(f"{folder}: params_*.npy have {numbers.size:,} numbers, but params_shapes.json describes {described}")
    return [piece.reshape(shape) for piece, shape in zip(np.split(numbers, ends[:-1]), shapes, strict=True)]


@contextlib.contextmanager
def _explain_damage(path: Path) -> Iterator[None]:
    """Turns any error that a library raises for a file into a `UserError` of one line."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (AttributeError, TypeError) as error:  # The file's header names a type that NumPy does not have, such as float8.
        raise UserError(f"{path}: has numbers of a type other than float32, bfloat16 and float16 ({error})") from error
    except Exception as error:  # The libraries raise errors of many types, depending on where the damage is.
        message = " ".join(str(error).split())
        if "pickle" in message or "Python objects" in message:
            raise UserError(f"{path}: has pickled objects, which can run any code and are never read") from error
        raise UserError(f"{path}: truncated or altered ({message})") from error
