"""Checkpoints: written asynchronously with Orbax, sealed with a manifest, verified before they are used.

A run's `checkpoints/STEP/` holds Orbax's files (the state as nested dictionaries of arrays), `config.json`, `tokenizer/`
and, written last, `manifest.json`, one JSON object of format version 2:

    format_version, step, config_digest, data_digest, mask_version, permutation_version, metrics {name: number},
    selection_metric (number, the lower the better, or null), process_count, device_count, device_kind,
    files {relative path: {size, sha256}} of every other file in the folder,
    sha256 of this object without this entry, as JSON with sorted keys

Version 1 is still read. Its state has the optimizer's own tree in place of `moments`, and its selection metric is the metric
"rank", or else "loss".

Orbax loads a file with a flipped byte without noticing, hence the checksums. A folder without a manifest is a save that was
cut short ("incomplete"); one that differs from its manifest is "damaged". Neither is ever restored.

This module, and not `ocp.training.Checkpointer`, decides which checkpoints are kept: the latter deletes old checkpoints when the
arrays of the new one are committed, which is before its manifest exists.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from gpt_jax.config import RunConfig
from gpt_jax.config.load import config_digest, config_from_dict, config_to_dict
from gpt_jax.data.windows import PERMUTATION_VERSION
from gpt_jax.errors import UserError, require
from gpt_jax.model.dropout import MASK_VERSION
from gpt_jax.runtime.console import Log
from gpt_jax.runtime.rundir import read_json, sha256, write_atomic

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
VERSIONS = {"format_version": FORMAT_VERSION, "mask_version": MASK_VERSION, "permutation_version": PERMUTATION_VERSION}

Leaves = dict[tuple[str, ...], Any]
"""Arrays, or their descriptions, by the keys that lead to them in a nested dictionary."""

# Orbax logs every phase of a save, and every failure that it raises as well.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)


class CheckpointInfo(NamedTuple):
    """One checkpoint on disk."""

    step: int
    path: Path
    state: Literal["sound", "incomplete", "damaged"]
    problem: str
    """The reason why it is not sound; empty for a sound one."""
    size: int
    """Bytes on disk."""
    metrics: dict[str, float]
    """Scores of the validation split at `step`; empty unless sound."""
    selection_metric: float | None = None
    """The number by which the best checkpoint is selected, the lowest; None: not scored."""
    format_version: int = FORMAT_VERSION


# -- writing ----------------------------------------------------------------------------------------------------------------


class CheckpointWriter(contextlib.AbstractContextManager["CheckpointWriter"]):
    """Writes a run's checkpoints in the background, one at a time, and deletes those that are no longer to be kept.

    All processes of a run construct it and call `save` at the same steps; process 0 alone writes what is not arrays. Used
    as a context manager it finishes the last save on the way out.

    Args:
      folder: RUN/checkpoints; made if missing, and cleared of saves that a killed process left behind.
      config: the resolved config, copied into every checkpoint; says how many to keep.
      data_digest: identifies the data, in the manifest.
      tokenizer: folder that is copied into every checkpoint, or None.
    """

    def __init__(self, folder: Path, config: RunConfig, data_digest: str, tokenizer: Path | None):
        self._folder = folder.absolute()
        self._config, self._data_digest, self._tokenizer = config, data_digest, tokenizer
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._orbax = ocp.Context()
        self._orbax.array.saving.use_compression = False  # Weights shrink by 7 % in three times the time.
        if jax.process_index() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._clear_unfinished()

    def save(self, step: int, state: dict[str, Any], metrics: dict[str, float], selection_metric: float | None = None) -> None:
        """Starts saving `state`, whose arrays may be donated or deleted as soon as this returns.

        Waits for the previous save first: nothing is dropped. Replaces a checkpoint of the same step that is not sound.

        Args:
          step: updates made so far.
          state: nested dictionaries of jax arrays.
          metrics: scalars measured at this step; those that are not finite are left out.
          selection_metric: the number by which the best checkpoint is selected, the lowest.

        Raises:
          UserError: the previous save, or the beginning of this one, found no space or no access.
          ValueError: there is a sound checkpoint of this step.
        """
        self.wait()
        with self._explain_failure(step):
            path = self._folder / str(step)
            if jax.process_index() == 0 and path.exists():
                if inspect_checkpoint(path, checksums=True).state == "sound":
                    raise ValueError(f"{path} is a sound checkpoint already")
                _delete(path)  # Orbax's save begins with a barrier, so no process looks at the folder before this is done.
            with self._orbax:
                response = ocp.save_async(path, state)
        self._pending = self._thread.submit(self._finish, step, response, metrics, selection_metric)

    def wait(self) -> None:
        """Returns once nothing is being saved; raises the error that the last save failed with."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __exit__(self, *_: object) -> None:
        with self._thread:  # It is shut down at the end, even if the last save failed.
            self.wait()

    def _finish(self, step: int, response: Any, metrics: dict[str, float], selection_metric: float | None) -> None:
        """Waits until Orbax has committed on all processes, then seals the checkpoint and deletes others."""
        with self._explain_failure(step):
            response.result()
            if jax.process_index() != 0:
                return
            path = self._folder / str(step)
            write_atomic(path / "config.json", json.dumps(config_to_dict(self._config), indent=1))
            if self._tokenizer is not None:
                shutil.copytree(self._tokenizer, path / "tokenizer")
            if selection_metric is not None and not math.isfinite(selection_metric):
                selection_metric = None
            finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
            manifest = {"step": step, "config_digest": config_digest(self._config), "data_digest": self._data_digest} | VERSIONS
            manifest |= {"metrics": finite, "selection_metric": selection_metric}
            manifest |= {"process_count": jax.process_count(), "device_count": jax.device_count()}
            manifest |= {"device_kind": jax.devices()[0].device_kind}
            _seal(path, manifest)
            # Steps beyond this one belong to a future that the run went back from: they must not cost their predecessors.
            past = [info for info in list_checkpoints(self._folder, checksums=False) if info.step <= step]
            _discard(past, self._config.train.keep_latest, self._config.train.keep_best)

    @contextlib.contextmanager
    def _explain_failure(self, step: int) -> Iterator[None]:
        """Turns a full disk, a missing permission and the like into one line, and frees the space of the failed save."""
        try:
            yield
        except Exception as error:
            code = re.search(r"os_error_code='(\d+)'", str(error))  # TensorStore reports the system's errors as ValueError.
            if code is None and not isinstance(error, OSError):
                raise
            if jax.process_index() == 0:
                self._clear_unfinished()
                if not (self._folder / str(step) / MANIFEST).exists():
                    shutil.rmtree(self._folder / str(step), ignore_errors=True)
            sound = [info.step for info in list_checkpoints(self._folder, checksums=False) if info.state == "sound"]
            reason = os.strerror(int(code[1])) if code else error
            rest = f"checkpoint {sound[-1]} is sound: run again to continue from it" if sound else "there is no earlier one"
            raise UserError(f"{self._folder}: checkpoint {step} could not be saved ({reason}); {rest}") from error

    def _clear_unfinished(self) -> None:
        for leftover in self._folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(leftover, ignore_errors=True)


def _seal(path: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest, once every file that it lists has reached the disk."""
    entries = list(path.rglob("*"))
    for entry in (*entries, path, path.parent):
        _sync(entry)
    files = [entry for entry in entries if entry.is_file()]
    listed = {}
    with ThreadPoolExecutor() as pool:
        for file, checksum in zip(files, pool.map(sha256, files), strict=True):
            listed[str(file.relative_to(path))] = {"size": file.stat().st_size, "sha256": checksum}
    write_atomic(path / MANIFEST, _encode_manifest(manifest | {"files": listed}))
    _sync(path)


def _encode_manifest(manifest: dict[str, Any]) -> bytes:
    """Returns the bytes of a manifest, a function of its entries other than the checksum, so that any change shows."""
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


def prune(folder: Path, keep_latest: int, keep_best: int) -> list[CheckpointInfo]:
    """Deletes all but the newest `keep_latest` and the best `keep_best` sound checkpoints, and the remains of failed saves.

    Nothing newer than the newest sound checkpoint is touched (it may be about to be sealed), and nothing at all if none is
    sound.

    Returns:
      The checkpoints that were deleted.

    Raises:
      UserError: a number is out of range.
    """
    require(keep_latest > 0, "keep_latest", f"must be positive, not {keep_latest}")
    require(keep_best >= 0, "keep_best", f"must be at least 0, not {keep_best}")
    return _discard(list_checkpoints(folder), keep_latest, keep_best)


def best_checkpoints(infos: Sequence[CheckpointInfo], count: int) -> list[CheckpointInfo]:
    """Returns the `count` sound checkpoints with the lowest selection metric, best first, the newer of two equals first."""
    ranked = [(info.selection_metric, -info.step, info) for info in infos if info.selection_metric is not None]
    return [info for _, _, info in sorted(ranked, key=lambda item: item[:2])][:count]


def _discard(infos: list[CheckpointInfo], keep_latest: int, keep_best: int) -> list[CheckpointInfo]:
    sound = [info for info in infos if info.state == "sound"]
    kept = {info.path for info in (*sound[-keep_latest:], *best_checkpoints(sound, keep_best))}
    doomed = [info for info in infos if sound and info.step <= sound[-1].step and info.path not in kept]
    for info in doomed:
        _delete(info.path)
    return doomed


def _delete(path: Path) -> None:
    """Deletes a checkpoint, its manifest first, so that it is incomplete when only half of it is deleted."""
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)  # A remainder is incomplete and is deleted the next time.


# -- looking ----------------------------------------------------------------------------------------------------------------


def list_checkpoints(folder: Path, checksums: bool = True) -> list[CheckpointInfo]:
    """Describes all checkpoints of a run, by ascending step.

    Args:
      folder: RUN or RUN/checkpoints.
      checksums: read every file and compare its SHA-256; otherwise only manifests and sizes are checked.

    Raises:
      UserError: a checkpoint was written by a newer gpt_jax.
    """
    return [inspect_checkpoint(path, checksums) for path in _step_folders(folder)]


def newest_checkpoint(folder: Path, log: Log) -> CheckpointInfo | None:
    """Returns the newest sound checkpoint of a run, or None if no save was ever finished.

    Args:
      folder: RUN or RUN/checkpoints.
      log: receives a line for each newer checkpoint that cannot be used.

    Raises:
      UserError: there are damaged checkpoints and no sound one.
    """
    unusable: list[CheckpointInfo] = []
    for path in reversed(_step_folders(folder)):
        info = inspect_checkpoint(path, checksums=True)
        if info.state == "sound":
            for other in unusable:
                log(f"checkpoint {other.path.name} is {other.state} ({other.problem}); using {info.path.name}")
            return info
        unusable.append(info)
    if any(info.state == "damaged" for info in unusable):
        listed = "; ".join(f"{info.path.name} is {info.state} ({info.problem})" for info in unusable)
        raise UserError(f"{folder}: no sound checkpoint: {listed}; restore one from a copy, or start again in an empty folder")
    return None


def find_checkpoint(path: Path, log: Log) -> CheckpointInfo:
    """Finds the checkpoint that a CHECKPOINT argument means, and verifies it.

    Args:
      path: a run's folder (its newest sound checkpoint) or the folder of one step.
      log: receives a line for each newer checkpoint that cannot be used.

    Raises:
      UserError: there is none, or it is not sound.
    """
    hint = "give a run's folder or a checkpoint's (RUN/checkpoints/STEP)"
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; {hint}")
    if path.absolute().name.isdecimal() and not (path / "checkpoints").is_dir():
        return _require_sound(inspect_checkpoint(path.absolute(), checksums=True))
    newest = newest_checkpoint(path, log)
    if newest is None:
        if seeds := sorted(folder.name for folder in path.glob("seed-*")):
            raise UserError(f"{path}: holds runs of several seeds; name one of them, such as {path / seeds[0]}")
        raise UserError(f"{path}: holds no finished checkpoint; {hint}")
    return newest


def inspect_checkpoint(path: Path, checksums: bool) -> CheckpointInfo:
    """Compares a checkpoint's folder with its manifest."""
    step, size = int(path.name), _folder_size(path)
    damaged = functools.partial(CheckpointInfo, step, path, "damaged", size=size, metrics={})
    try:
        raw = (path / MANIFEST).read_bytes()
        manifest = json.loads(raw)
    except FileNotFoundError:
        return CheckpointInfo(step, path, "incomplete", f"file {MANIFEST}: missing, so its save was cut short", size, {})
    except (OSError, ValueError):
        return damaged(f"file {MANIFEST}: not readable as JSON")
    if not isinstance(manifest, dict) or raw != _encode_manifest(manifest):
        return damaged(f"file {MANIFEST}: checksum differs")
    if (version := manifest["format_version"]) > FORMAT_VERSION:
        raise UserError(f"{path}: has format version {version}, and this gpt_jax reads up to {FORMAT_VERSION}; update gpt_jax")
    if manifest["step"] != step:
        return damaged(f"file {MANIFEST}: belongs to checkpoint {manifest['step']}")
    with ThreadPoolExecutor() as pool:
        results = pool.map(functools.partial(_file_problem, path, checksums), manifest["files"].items())
        problems = [problem for problem in results if problem]
    if problems:
        return damaged(", ".join(problems))
    metrics = dict(manifest["metrics"])
    selection_metric = metrics.pop("rank", metrics.get("loss")) if version == 1 else manifest["selection_metric"]
    return CheckpointInfo(step, path, "sound", "", size, metrics, selection_metric, version)


def read_config(info: CheckpointInfo) -> RunConfig:
    """Reads the resolved config that the checkpoint was made with."""
    return config_from_dict(read_json(info.path / "config.json"), info.path / "config.json")


def read_manifest(info: CheckpointInfo) -> dict[str, Any]:
    """Reads the manifest of a sound checkpoint (see the head of this module)."""
    return read_json(info.path / MANIFEST)


def _step_folders(folder: Path) -> list[Path]:
    """Returns the folders of a run's checkpoints by ascending step."""
    folder = folder.absolute()
    if (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints"
    return sorted((path for path in folder.glob("*") if path.name.isdecimal() and path.is_dir()), key=lambda p: int(p.name))


def _folder_size(path: Path) -> int:
    """Returns the bytes of all files in a folder; 0 if some of them are deleted meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return 0


def _file_problem(path: Path, checksums: bool, entry: tuple[str, dict[str, Any]]) -> str:
    """Returns what is wrong with a file of the checkpoint `path`, an entry of its manifest; empty if it is as listed."""
    name, expected = entry
    try:
        size = (path / name).stat().st_size
        if size != expected["size"]:
            return f"file {name}: {size} bytes instead of {expected['size']}"
        return f"file {name}: checksum differs" if checksums and sha256(path / name) != expected["sha256"] else ""
    except OSError as error:
        return f"file {name}: {error.strerror or error}"


def _require_sound(info: CheckpointInfo) -> CheckpointInfo:
    if info.state != "sound":
        raise UserError(f"{info.path}: is {info.state} ({info.problem}); `gpt-jax checkpoint list` shows the others")
    return info


# -- reading ----------------------------------------------------------------------------------------------------------------


def restore(info: CheckpointInfo, abstract_state: dict[str, Any]) -> dict[str, Any]:
    """Reads a whole state, onto any mesh; all processes call it.

    Args:
      info: a sound checkpoint, as `find_checkpoint` returns it.
      abstract_state: nested dictionaries of `jax.ShapeDtypeStruct` with shardings.

    Returns:
      Nested dictionaries of arrays, like `abstract_state`.

    Raises:
      UserError: names, shapes or dtypes differ from those stored; all differences are in one line.
    """
    stored, wanted = _stored_leaves(info), traverse_util.flatten_dict(abstract_state)
    # Version 1 kept the optimizer's own tree, with the moments somewhere inside it, and step counters that equal `step`.
    moments = next((path[: path.index("mu")] for path in stored if "mu" in path), ("moments",))
    stored = {path: leaf for path, leaf in stored.items() if path[0] != "optimizer" or "mu" in path or "nu" in path}
    on_disk = {path: (*moments, *path[1:]) if path[0] == "moments" else path for path in wanted}
    loaded = _load(info, stored, {on_disk[path]: leaf for path, leaf in wanted.items()})
    return traverse_util.unflatten_dict({path: loaded[on_disk[path]] for path in wanted})


def restore_params(info: CheckpointInfo, abstract_params: dict[str, Any]) -> dict[str, Any]:
    """Reads the parameters alone, and of these only the entries that are asked for; otherwise like `restore`."""
    stored = {path: leaf for path, leaf in _stored_leaves(info).items() if path[0] == "params" and path[1] in abstract_params}
    loaded = _load(info, stored, traverse_util.flatten_dict({"params": abstract_params}))
    return traverse_util.unflatten_dict(loaded)["params"]


def _stored_leaves(info: CheckpointInfo) -> Leaves:
    """Returns the shapes and dtypes of the arrays in a checkpoint."""
    return traverse_util.flatten_dict(ocp.metadata(_require_sound(info).path).metadata)


def _load(info: CheckpointInfo, stored: Leaves, wanted: Leaves) -> Leaves:
    """Loads the arrays `wanted` from a checkpoint, after comparing them with those `stored` in it.

    Raises:
      UserError: names, shapes or dtypes differ; the message lists all differences.
    """
    have, want = _describe_leaves(stored), _describe_leaves(wanted)
    differences = [f"{name} is {have[name]}, not {want[name]}" for name in have.keys() & want.keys() if have[name] != want[name]]
    differences += [f"{name} {want[name]} is missing" for name in want.keys() - have.keys()]
    differences += [f"{name} {have[name]} is unexpected" for name in have.keys() - want.keys()]
    if differences:
        raise UserError(f"{info.path}: checkpoint {info.step} does not fit this config: {'; '.join(sorted(differences))}")
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        return traverse_util.flatten_dict(ocp.load(info.path, traverse_util.unflatten_dict(wanted)))


def _describe_leaves(leaves: Leaves) -> dict[str, str]:
    """Maps each leaf's name ("params/embedding/tokens") to its dtype and shape as text ("float32[512,768]")."""
    return {"/".join(path): f"{leaf.dtype.name}[{','.join(map(str, leaf.shape))}]" for path, leaf in leaves.items()}
