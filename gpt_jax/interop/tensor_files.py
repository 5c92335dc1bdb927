"""Files of named tensors, written and read one tensor at a time: safetensors, NumPy's npz, and the released params_*.npy.

A writer takes tensors from an iterator and holds one of them; a reader knows all names, shapes and types before it reads any
numbers. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from gpt_jax.errors import UserError

SAFETENSORS_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
OPENAI_FILES = 10
"""The released parameters are one array of numbers, split evenly over so many files."""


class Tensor(NamedTuple):
    """What is known of a tensor before its numbers are there."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Tensors(NamedTuple):
    """The tensors of a folder, to be read when they are wanted."""

    where: Path
    """The file or folder, for messages."""
    known: dict[str, Tensor]
    read: Callable[[str], np.ndarray]
    """A tensor by its name; of files that allow it, mapped into memory and not yet read."""


# -- safetensors ------------------------------------------------------------------------------------------------------------


def write_safetensors(
    folder: Path, known: Mapping[str, Tensor], tensors: Iterable[tuple[str, np.ndarray]], most_bytes: float, stem: str = "model"
) -> None:
    """Writes STEM.safetensors, or, of more than `most_bytes`, STEM-00001-of-0000N.safetensors and STEM.safetensors.index.json.

    The library's own writer wants all tensors at once; its format (8 bytes with the header's length, a JSON header, the numbers)
    is written here as they come.

    Args:
      known: all tensors in the order in which `tensors` yields them.
      most_bytes: of numbers in one file, unless a single tensor is larger. > 0.
    """
    files: list[dict[str, Tensor]] = [{}]
    for name, tensor in known.items():
        if files[-1] and sum(other.nbytes for other in files[-1].values()) + tensor.nbytes > most_bytes:
            files.append({})
        files[-1][name] = tensor
    coming = iter(tensors)
    placed: dict[str, str] = {}
    for number, held in enumerate(files, 1):
        suffix = f"-{number:05}-of-{len(files):05}" if len(files) > 1 else ""
        _write_one(folder / f"{stem}{suffix}.safetensors", held, coming)
        placed |= dict.fromkeys(held, f"{stem}{suffix}.safetensors")
    if len(files) > 1:
        total = sum(tensor.nbytes for tensor in known.values())
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _write_one(path: Path, known: Mapping[str, Tensor], tensors: Iterator[tuple[str, np.ndarray]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file that does not say so
    begin = 0
    for name, tensor in known.items():
        kind = SAFETENSORS_TYPES[tensor.dtype.name]
        header[name] = {"dtype": kind, "shape": tensor.shape, "data_offsets": [begin, begin := begin + tensor.nbytes]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the numbers are aligned
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in known.items():
            given, array = next(tensors)
            assert (given, array.shape, array.dtype) == (name, tensor.shape, tensor.dtype), (given, name)
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def read_safetensors(folder: Path, stem: str = "model") -> Tensors:
    """The tensors of STEM.safetensors or of the files that STEM.safetensors.index.json lists.

    Raises:
      UserError: a file is missing, truncated or not in the format.
    """
    from safetensors import SafetensorError, safe_open

    index = folder / f"{stem}.safetensors.index.json"
    names = [f"{stem}.safetensors"]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if not all(isinstance(name, str) and Path(name).name == name for name in names):
                raise ValueError("names that are no files of this folder")
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"{index}: is no index of safetensors files") from None
    known: dict[str, Tensor] = {}
    opened: dict[str, Any] = {}
    for name in names:
        try:
            file = safe_open(folder / name, framework="np")
            for key in file.keys():  # noqa: SIM118  (not a dictionary)
                part = file.get_slice(key)
                dtype = {short: long for long, short in SAFETENSORS_TYPES.items()}.get(part.get_dtype())
                known[key] = Tensor(tuple(part.get_shape()), np.dtype(dtype or np.void))
                opened[key] = file
        except FileNotFoundError:
            raise UserError(f"{folder / name}: missing") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / name}: truncated or altered ({error})") from None
    return Tensors(folder, known, lambda key: opened[key].get_tensor(key))


# -- NumPy ------------------------------------------------------------------------------------------------------------------


def write_npz(path: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes what `numpy.load` reads, one tensor at a time."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in tensors:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)


def read_npz(path: Path) -> Tensors:
    """The tensors of an npz file.

    Raises:
      UserError: it is truncated, altered, or holds pickled objects.
    """
    known = {}
    with _explained(path), zipfile.ZipFile(path) as archive:
        for entry in archive.namelist():
            with archive.open(entry) as file:
                version = np.lib.format.read_magic(file)
                header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
                shape, _, dtype = header(file)
            if dtype.hasobject:
                raise ValueError(f"{entry} holds pickled objects")
            known[entry.removesuffix(".npy")] = Tensor(shape, dtype)

    def read(name: str) -> np.ndarray:
        # The archive has a checksum for each entry.
        with _explained(path), zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            return np.lib.format.read_array(file, allow_pickle=False)

    return Tensors(path, known, read)


# -- the released files -----------------------------------------------------------------------------------------------------


def write_openai(folder: Path, known: Mapping[str, Tensor], tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes params_shapes.json and params_0.npy to params_9.npy: all float32 numbers in a row, cut into ten files.

    Like the released ones, the first files have one number more where ten does not divide them.
    """
    total = sum(math.prod(tensor.shape) for tensor in known.values())
    sizes = [total // OPENAI_FILES + (number < total % OPENAI_FILES) for number in range(OPENAI_FILES)]
    (folder / "params_shapes.json").write_text(json.dumps([tensor.shape for tensor in known.values()]) + "\n", encoding="utf-8")
    coming = (array.reshape(-1) for _, array in tensors)
    rest = np.empty(0, np.float32)
    for number, size in enumerate(sizes):
        with (folder / f"params_{number}.npy").open("wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (size,)}
            np.lib.format.write_array_header_1_0(file, header)
            while size:
                rest = rest if rest.size else next(coming)
                taken, rest = rest[:size], rest[size:]
                file.write(np.ascontiguousarray(taken, "<f4").view(np.uint8).data)
                size -= taken.size


def read_openai(folder: Path, names: list[str]) -> Tensors:
    """The tensors of the released files, which have shapes and an order but no names.

    Args:
      names: of the tensors, in the files' order; as many as params_shapes.json has are used.

    Raises:
      UserError: a file is missing, truncated, altered or holds pickled objects; the sizes do not add up.
    """
    shapes_file = folder / "params_shapes.json"
    try:
        shapes = [tuple(shape) for shape in json.loads(shapes_file.read_text(encoding="utf-8"))]
        if not shapes or not all(type(size) is int and size > 0 for shape in shapes for size in shape):
            raise ValueError("lists of whole numbers above 0 are needed")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{shapes_file}: cannot be read as a list of shapes ({error})") from None
    parts = []
    for number in range(OPENAI_FILES):
        path = folder / f"params_{number}.npy"
        with _explained(path):
            parts.append(np.lib.format.open_memmap(path, mode="r").reshape(-1))
            if parts[-1].dtype != np.float32:
                raise UserError(f"{path}: holds {parts[-1].dtype}, not float32")
    begins = np.cumsum([0, *(part.size for part in parts)])
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    if begins[-1] != ends[-1]:
        raise UserError(f"{folder}: params_*.npy hold {begins[-1]:,} numbers, and params_shapes.json describes {ends[-1]:,}")
    known = {name: Tensor(shape, np.dtype(np.float32)) for name, shape in zip(names, shapes, strict=False)}
    known |= {
        f"array {number}": Tensor(shape, np.dtype(np.float32)) for number, shape in enumerate(shapes) if number >= len(names)
    }
    places = dict(zip(known, zip(ends - [math.prod(shape) for shape in shapes], ends, strict=True), strict=True))

    def read(name: str) -> np.ndarray:
        begin, end = places[name]
        touched = [
            part[max(begin - first, 0) : end - first]
            for part, first in zip(parts, begins, strict=False)
            if first < end and first + part.size > begin
        ]
        return (touched[0] if len(touched) == 1 else np.concatenate(touched)).reshape(known[name].shape)

    return Tensors(folder, known, read)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Says in one line what NumPy found wrong with a file."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: missing") from None
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error, KeyError, RuntimeError) as error:
        if "pickle" in str(error) or "Python objects" in str(error):
            raise UserError(f"{path}: holds pickled objects, which could run any code; it is not read") from None
        raise UserError(f"{path}: truncated or altered ({error})") from None


def narrow(array: np.ndarray, dtype: str) -> np.ndarray:
    """Rounds to float32, bfloat16 or float16."""
    return array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype, copy=False)
