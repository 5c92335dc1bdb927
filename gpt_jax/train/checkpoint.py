"""Checkpoints: written asynchronously with Orbax, sealed with a manifest, verified before they are used.

A run's `checkpoints/STEP/` holds Orbax's files (the state as nested dictionaries of arrays), `config.json`, `tokenizer/`
and, written last, `manifest.json`, one JSON object of format version 1:

    format_version, step, config_digest, data_digest, mask_version, permutation_version, metrics {name: number},
    process_count, device_count, device_kind,
    files {relative path: {size, sha256}} of every other file in the folder,
    sha256 of this object without this entry, as JSON with sorted keys

Orbax loads a file with a flipped byte without noticing; hence the checksums. A folder without a manifest is a save that was
cut short ("incomplete"), one that differs from its manifest is "damaged"; neither is ever restored. `STEP.replaced/` is a
sound checkpoint that waits until a new one of the same step is sealed.

Which checkpoints stay is decided here and not by `ocp.training.Checkpointer`: that one deletes old checkpoints when the
arrays of the new one are committed, which is before its manifest exists.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from gpt_jax.data.windows import PERMUTATION_VERSION
from gpt_jax.errors import UserError
from gpt_jax.model.dropout import MASK_VERSION
from gpt_jax.runtime.rundir import sha256

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
RANK = "rank"
"""The metric that says which checkpoints are best, the lowest; where there is none it is "loss"."""
CHUNK_BYTES = 1 << 23
"""Of a large parameter in one piece on disk."""
STEP_FOLDER = re.compile(r"(\d+)(\.replaced)?")

# Orbax tells of every phase of a save, and of every failure that it raises as well.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)


@dataclasses.dataclass(frozen=True)
class Info:
    """One checkpoint on disk."""

    step: int
    path: Path
    state: Literal["sound", "incomplete", "damaged"]
    problem: str
    """What is wrong with it; empty for a sound one."""
    size: int
    """Bytes on disk."""
    metrics: dict[str, float]
    """What was measured at `step` on the validation split; empty unless sound."""


# -- writing ----------------------------------------------------------------------------------------------------------------


class Checkpoints:
    """Writes a run's checkpoints in the background, one at a time, and deletes those that are no longer wanted.

    All processes of a run construct it and call `save` at the same steps; process 0 alone writes what is not arrays. Used
    as a context manager it finishes the last save on the way out.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_latest: int,
        keep_best: int,
        config_json: str | bytes,
        config_digest: str,
        data_digest: str,
        tokenizer: Path | None,
    ):
        """Takes over `folder` and clears it of saves that a killed process left behind.

        Args:
          folder: RUN/checkpoints; made if missing.
          keep_latest: newest checkpoints kept, > 0.
          keep_best: best checkpoints (`best`) kept besides.
          config_json: the resolved config, copied into every checkpoint.
          config_digest, data_digest: what the manifest says the state was computed from.
          tokenizer: a folder copied into every checkpoint, or None.
        """
        self._folder = folder.absolute()
        self._keep_latest, self._keep_best = keep_latest, keep_best
        self._config = config_json.encode() if isinstance(config_json, str) else config_json
        self._digests = {"config_digest": config_digest, "data_digest": data_digest}
        self._tokenizer = tokenizer
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._orbax = ocp.Context()
        self._orbax.array.saving.use_compression = False  # Weights shrink by 7 % in three times the time.
        self._orbax.array.saving.scoped_storage_options_creator = _storage
        if jax.process_index() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._clear_cut_short()

    def save(self, step: int, state: dict[str, Any], metrics: dict[str, float]) -> None:
        """Starts saving `state`, whose arrays may be donated or deleted as soon as this returns.

        Waits for the previous save first: nothing is dropped. A checkpoint of the same step is replaced, and a sound one is
        kept until then.

        Args:
          step: updates done so far.
          state: nested dictionaries of jax arrays.
          metrics: scalars measured at this step; those that are not finite are left out.

        Raises:
          UserError: the previous save, or the beginning of this one, found no space or no access.
        """
        self.wait()
        with self._explained(step):
            path = self._folder / str(step)
            if jax.process_index() == 0 and path.exists():
                _set_aside(path)  # Orbax's save begins with a barrier, so no process looks at the folder before this is done.
            with self._orbax:
                response = ocp.save_async(path, state)
        self._pending = self._thread.submit(self._finish, step, response, metrics)

    def wait(self) -> None:
        """Returns once nothing is being saved; raises what the last save failed with."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Finishes the pending save; raises what it failed with."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _finish(self, step: int, response: Any, metrics: dict[str, float]) -> None:
        """Waits until Orbax has committed on all processes, then seals the checkpoint and makes room."""
        with self._explained(step):
            response.result()
            if jax.process_index() != 0:
                return
            path = self._folder / str(step)
            (path / "config.json").write_bytes(self._config)
            if self._tokenizer is not None:
                shutil.copytree(self._tokenizer, path / "tokenizer")
            measured = {name: float(value) for name, value in metrics.items()}
            manifest = {
                "format_version": FORMAT_VERSION,
                "step": step,
                **self._digests,
                "mask_version": MASK_VERSION,
                "permutation_version": PERMUTATION_VERSION,
                "metrics": {name: value for name, value in measured.items() if math.isfinite(value)},
                "process_count": jax.process_count(),
                "device_count": jax.device_count(),
                "device_kind": jax.devices()[0].device_kind,
            }
            _seal(path, manifest)
            # Steps beyond this one belong to a future that the run went back from: no reason to delete what leads there.
            past = [info for info in inspect(self._folder, checksums=False) if info.step <= step]
            _discard(past, self._keep_latest, self._keep_best)

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        """Turns a full disk, a missing permission and their like into one line, and frees the space of the failed save."""
        try:
            yield
        except Exception as error:
            code = re.search(r"os_error_code='(\d+)'", str(error))  # TensorStore reports the system's errors as ValueError.
            if code is None and not isinstance(error, OSError):
                raise
            if jax.process_index() == 0:
                self._clear_cut_short()
                unsealed = self._folder / str(step)
                if unsealed.exists() and _examine(unsealed, checksums=False).state != "sound":
                    shutil.rmtree(unsealed, ignore_errors=True)
            sound = [info.step for info in inspect(self._folder, checksums=False) if info.state == "sound"]
            raise UserError(
                f"{self._folder}: checkpoint {step} could not be saved ({os.strerror(int(code[1])) if code else error}); "
                + (f"checkpoint {sound[-1]} is sound: run again to go on from there" if sound else "there is no earlier one")
            ) from error

    def _clear_cut_short(self) -> None:
        for leftover in self._folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(leftover, ignore_errors=True)


def _storage(path: tuple[Any, ...], leaf: Any) -> ocp.options.ArrayOptions.Saving.StorageOptions:
    """Large parameters are stored in pieces of at most `CHUNK_BYTES`, and stacked ones layer by layer, so that whoever reads one
    tensor (`open_arrays`) needs no more memory than that takes."""
    options = ocp.options.ArrayOptions.Saving.StorageOptions
    part, *inside = (getattr(key, "key", None) for key in path[:2])
    if part != "params" or leaf.nbytes <= CHUNK_BYTES:
        return options()
    return options(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if inside == ["blocks"] else None)


def _set_aside(path: Path) -> None:
    """Frees the name of a step that is about to be saved again, without losing a sound checkpoint."""
    if _examine(path, checksums=True).state == "sound":
        replaced = path.with_name(f"{path.name}.replaced")
        _remove(replaced)
        path.rename(replaced)
    else:
        _remove(path)


def _seal(path: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest, once every file that it vouches for has reached the disk."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    for entry in (*files, *(folder for folder in path.rglob("*") if folder.is_dir()), path, path.parent):
        _sync(entry)
    with ThreadPoolExecutor() as pool:
        sums = pool.map(sha256, files)
        listed = {
            str(file.relative_to(path)): {"size": file.stat().st_size, "sha256": checksum}
            for file, checksum in zip(files, sums, strict=True)
        }
    temporary = path / f"{MANIFEST}.tmp"
    temporary.write_bytes(_encode(manifest | {"files": listed}))
    _sync(temporary)
    temporary.rename(path / MANIFEST)
    _sync(path)


def _encode(manifest: dict[str, Any]) -> bytes:
    """The bytes of a manifest, which are a function of its entries other than the checksum, so that any change shows."""
    entries = {name: value for name, value in manifest.items() if name != "sha256"}
    entries["sha256"] = hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
    return (json.dumps(entries, sort_keys=True, indent=1) + "\n").encode()


def _sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- deleting ---------------------------------------------------------------------------------------------------------------


def prune(folder: Path, keep_latest: int, keep_best: int) -> list[Info]:
    """Deletes all but the newest `keep_latest` and the best `keep_best` sound checkpoints, and what failed saves have left.

    Nothing newer than the newest sound checkpoint is touched (it may be about to be sealed), and nothing at all if none is
    sound.

    Returns:
      What was deleted.
    """
    if keep_latest < 1:
        raise UserError(f"--keep-latest: must be positive, not {keep_latest}")
    if keep_best < 0:
        raise UserError(f"--keep-best: must not be negative, is {keep_best}")
    return _discard(inspect(folder), keep_latest, keep_best)


def best(infos: Sequence[Info], count: int) -> list[Info]:
    """The `count` best of the sound checkpoints (`RANK`), best first, the newer of two equals first."""
    ranked = [info for info in infos if info.state == "sound" and info.metrics.keys() & {RANK, "loss"}]
    return sorted(ranked, key=lambda info: (info.metrics.get(RANK, info.metrics.get("loss")), -info.step))[:count]


def _discard(infos: list[Info], keep_latest: int, keep_best: int) -> list[Info]:
    sound = list({info.step: info for info in infos if info.state == "sound"}.values())  # STEP wins over STEP.replaced.
    kept = {info.path for info in (*sound[-keep_latest:], *best(sound, keep_best))}
    doomed = [info for info in infos if sound and info.step <= sound[-1].step and info.path not in kept]
    for info in doomed:
        _remove(info.path)
    return doomed


def _remove(path: Path) -> None:
    """Deletes a checkpoint, its manifest first: half deleted, it is incomplete."""
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)  # What stays is incomplete and goes with the next turn.


# -- looking ----------------------------------------------------------------------------------------------------------------


def inspect(folder: Path, checksums: bool = True) -> list[Info]:
    """Describes all checkpoints of a run, by ascending step.

    Args:
      folder: RUN or RUN/checkpoints.
      checksums: read every file and compare its SHA-256; otherwise only manifests and sizes are checked.

    Raises:
      UserError: a checkpoint was written by a newer gpt_jax.
    """
    return [_examine(path, checksums) for path in _step_folders(folder)]


def newest(folder: Path, log: Callable[[str], None]) -> Info | None:
    """The newest sound checkpoint of a run, or None if no save was ever finished, so that the run starts at its beginning.

    Args:
      folder: RUN or RUN/checkpoints.
      log: told in one line of each newer checkpoint that cannot be used.

    Raises:
      UserError: there are damaged checkpoints and no sound one.
    """
    unusable: list[Info] = []
    for path in reversed(_step_folders(folder)):
        info = _examine(path, checksums=True)
        if info.state == "sound":
            for other in unusable:
                log(f"checkpoint {other.path.name} is {other.state} ({other.problem}); using {info.path.name}")
            return info
        unusable.append(info)
    if any(info.state == "damaged" for info in unusable):
        listed = "; ".join(f"{info.path.name} is {info.state} ({info.problem})" for info in unusable)
        raise UserError(f"{folder}: no sound checkpoint: {listed}; restore one from a copy, or start again in an empty folder")
    return None


def resolve(path: Path, log: Callable[[str], None]) -> Info:
    """Finds the checkpoint that a CHECKPOINT argument means, and verifies it.

    Args:
      path: a run's folder (its newest sound checkpoint) or the folder of one step.
      log: told in one line of each newer checkpoint that cannot be used.

    Raises:
      UserError: there is none, or it is not sound.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a run's folder or a checkpoint's (RUN/checkpoints/STEP)")
    if STEP_FOLDER.fullmatch(path.absolute().name) and not (path / "checkpoints").is_dir():
        info = _examine(path.absolute(), checksums=True)
        _demand_sound(info)
        return info
    found = newest(path, log)
    if found is None:
        if seeds := sorted(each.name for each in path.glob("seed-*")):
            raise UserError(f"{path}: holds runs of several seeds; name one of them, as {path / seeds[0]}")
        raise UserError(f"{path}: holds no finished checkpoint; give a run's folder or a checkpoint's (RUN/checkpoints/STEP)")
    return found


def read_config(info: Info) -> dict[str, Any]:
    """The resolved config that the checkpoint was made with."""
    return json.loads((info.path / "config.json").read_bytes())


def read_manifest(info: Info) -> dict[str, Any]:
    """The manifest of a sound checkpoint (config_digest, data_digest and so on; see the head of this module)."""
    return json.loads((info.path / MANIFEST).read_bytes())


def _step_folders(folder: Path) -> list[Path]:
    """Folders of checkpoints by ascending step, STEP.replaced before STEP."""
    folder = folder.absolute()
    if (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints"
    found = [(match, path) for path in folder.glob("*") if path.is_dir() and (match := STEP_FOLDER.fullmatch(path.name))]
    return [path for match, path in sorted(found, key=lambda item: (int(item[0][1]), item[0][2] is None))]


def _examine(path: Path, checksums: bool) -> Info:
    """Compares a checkpoint's folder with its manifest."""
    step = int(path.name.removesuffix(".replaced"))
    size = _size(path)

    def unsound(state: Literal["incomplete", "damaged"], problem: str) -> Info:
        return Info(step, path, state, problem, size, {})

    try:
        raw = (path / MANIFEST).read_bytes()
        manifest = json.loads(raw)
    except FileNotFoundError:
        return unsound("incomplete", f"file {MANIFEST}: missing, so its save was cut short")
    except (OSError, ValueError):
        return unsound("damaged", f"file {MANIFEST}: not readable as JSON")
    if not isinstance(manifest, dict) or raw != _encode(manifest):
        return unsound("damaged", f"file {MANIFEST}: checksum differs")
    if (version := manifest["format_version"]) > FORMAT_VERSION:
        raise UserError(f"{path}: has format version {version}, and this gpt_jax reads up to {FORMAT_VERSION}; update gpt_jax")
    if manifest["step"] != step:
        return unsound("damaged", f"file {MANIFEST}: belongs to checkpoint {manifest['step']}")
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda item: _file_problem(path / item[0], item[1], checksums), manifest["files"].items())
        problems = [f"file {name}: {problem}" for name, problem in zip(manifest["files"], found, strict=True) if problem]
    if problems:
        return unsound("damaged", ", ".join(problems))
    return Info(step, path, "sound", "", size, manifest["metrics"])


def _size(path: Path) -> int:
    """Bytes of all files in a folder, which may be being deleted meanwhile."""
    size = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                size += os.path.getsize(os.path.join(folder, name))
    return size


def _file_problem(file: Path, expected: dict[str, Any], checksums: bool) -> str:
    """What is wrong with a file that a manifest lists, or nothing."""
    try:
        size = file.stat().st_size
        if size != expected["size"]:
            return f"{size} bytes instead of {expected['size']}"
        return "checksum differs" if checksums and sha256(file) != expected["sha256"] else ""
    except OSError as error:
        return error.strerror or str(error)


def _demand_sound(info: Info) -> None:
    if info.state != "sound":
        raise UserError(f"{info.path}: is {info.state} ({info.problem}); `gpt-jax checkpoint list` shows the others")


# -- reading ----------------------------------------------------------------------------------------------------------------


def restore(info: Info, abstract_state: dict[str, Any]) -> dict[str, Any]:
    """Reads a whole state, onto any mesh; all processes call it.

    Args:
      info: a sound checkpoint, as `resolve` returns it.
      abstract_state: nested dictionaries of `jax.ShapeDtypeStruct` with shardings.

    Returns:
      The same nested dictionaries of arrays.

    Raises:
      UserError: names, shapes or dtypes differ from what is stored; all differences in one line.
    """
    return _load(info, abstract_state, partial=False)


def restore_part(info: Info, abstract_subtree: dict[str, Any], key: str = "params") -> dict[str, Any]:
    """Reads entries of one part of a state, by default of the parameters; entries that are not asked for are left alone, and all
    else is as in `restore`."""
    return _load(info, {key: abstract_subtree}, partial=True)[key]


def open_arrays(info: Info, key: str = "params") -> dict[str, Any]:
    """Opens one part of a state without reading it, for whoever wants it piece by piece in little memory; on one process.

    Returns:
      The part's nested dictionaries with a `tensorstore.TensorStore` for each array: it has shape and dtype, can be sliced like
      an array, and `read_array` reads it.
    """
    import tensorstore

    _demand_sound(info)
    kvstore = {"driver": "ocdbt", "base": f"file://{info.path}/state/"}

    def opened(path: tuple[Any, ...], _: Any) -> Any:
        name = ".".join([key, *(part.key for part in path)])
        return tensorstore.open({"driver": "zarr3", "kvstore": kvstore | {"path": f"{name}/"}}, open=True, read=True).result()

    return jax.tree_util.tree_map_with_path(opened, ocp.metadata(info.path).metadata[key])


def read_array(array: Any) -> np.ndarray:
    """Reads what `open_arrays` has opened, or a slice of it, one stored piece after the other: at once, all pieces would be held
    beside the result."""
    if not array.ndim:
        return np.asarray(array.read().result())
    result = np.empty(array.shape, array.dtype.numpy_dtype)
    rows = array.chunk_layout.read_chunk.shape[0] or 1
    for begin in range(0, len(result), rows):
        end = min(begin + rows, len(result))
        result[begin:end] = array[begin:end].read().result()
    return result


def _load(info: Info, wanted: dict[str, Any], partial: bool) -> dict[str, Any]:
    _demand_sound(info)
    stored = ocp.metadata(info.path).metadata
    if partial:
        stored = {
            key: {name: stored[key][name] for name in wanted[key] if name in stored[key]} for key in wanted if key in stored
        }
    _compare(info, stored, wanted)
    context = ocp.Context()
    context.pytree.loading.partial_load = partial
    with context:
        return ocp.load(info.path, wanted)


def _compare(info: Info, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises a `UserError` that lists every leaf whose name, shape or dtype differs."""
    have, want = _describe(stored), _describe(wanted)
    differences = [f"{name} is {have[name]}, not {want[name]}" for name in have.keys() & want.keys() if have[name] != want[name]]
    differences += [f"{name} {want[name]} is missing" for name in want.keys() - have.keys()]
    differences += [f"{name} {have[name]} is not wanted" for name in have.keys() - want.keys()]
    if differences:
        raise UserError(f"{info.path}: checkpoint {info.step} does not fit this config: {'; '.join(sorted(differences))}")


def _describe(tree: dict[str, Any]) -> dict[str, str]:
    """Maps each leaf's name ("params/embed/tokens") to its dtype and shape as text ("float32[512,768]")."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype.name}[{','.join(map(str, leaf.shape))}]"
        for path, leaf in leaves
    }
