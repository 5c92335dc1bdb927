"""Checkpoints: written asynchronously with Orbax, sealed with a manifest, verified before they are used.

`checkpoint_info` describes their format and finds them. This module decides which checkpoints to keep.
`ocp.training.Checkpointer` cannot, because it deletes old checkpoints as soon as the arrays of the new one are committed, before
the new manifest exists.
"""

import contextlib
import functools
import json
import logging
import math
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from gpt_jax.config import RunConfig
from gpt_jax.config.load import DIGEST_VERSION, config_digest, config_to_dict
from gpt_jax.data.windows import PERMUTATION_VERSION
from gpt_jax.errors import UserError, require
from gpt_jax.model.dropout import MASK_VERSION
from gpt_jax.runtime.console import say
from gpt_jax.runtime.lock import locked, require_held
from gpt_jax.runtime.rundir import explain_disk_errors, sha256, write_atomic
from gpt_jax.train.checkpoint_info import (
    FORMAT_VERSION,
    MANIFEST,
    CheckpointInfo,
    best_checkpoints,
    encode_manifest,
    inspect_checkpoint,
    list_checkpoints,
    require_sound,
    step_in_name,
)

VERSIONS = {
    "format_version": FORMAT_VERSION,
    "config_digest_version": DIGEST_VERSION,
    "mask_version": MASK_VERSION,
    "permutation_version": PERMUTATION_VERSION,
}

Leaves = dict[tuple[str, ...], Any]
"""Arrays, or their shapes and dtypes, keyed by their path in a nested dictionary."""

# Orbax logs every phase of a save, and every error that it also raises.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)


# -- writing ----------------------------------------------------------------------------------------------------------------


class CheckpointWriter(contextlib.AbstractContextManager["CheckpointWriter"]):
    """Writes a run's checkpoints in the background, one at a time, and deletes old ones.

    All processes of a run construct it and call `save` at the same steps; only process 0 writes the files other than arrays.
    As a context manager, it finishes the last save on exit.

    Args:
      folder: RUN/checkpoints; created if missing. Unfinished saves of a killed process are deleted.
      config: the resolved config; it is copied into every checkpoint and sets how many to keep.
      data_digest: digest of the data, recorded in the manifest.
      tokenizer: folder to copy into every checkpoint, or None.
    """

    def __init__(self, folder: Path, config: RunConfig, data_digest: str, tokenizer: Path | None):
        self._folder = folder.absolute()
        self._config, self._data_digest, self._tokenizer = config, data_digest, tokenizer
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        _silence_abandoned_writes()
        self._orbax = ocp.Context()
        self._orbax.array.saving.use_compression = False  # Compression saves 7 % of the space but takes three times as long.
        if jax.process_index() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            for leftover in self._unfinished():
                shutil.rmtree(leftover, ignore_errors=True)
            for info in list_checkpoints(self._folder, checksums=False):
                if step_in_name(info.path) not in (-1, info.step):
                    reason = f"is checkpoint {info.step}, and the run may have to save another one under this name; rename it"
                    raise UserError(f"{info.path}: {reason}")

    def save(self, step: int, state: dict[str, Any], metrics: dict[str, float], selection_metric: float | None = None) -> None:
        """Starts saving `state`, whose arrays may be donated or deleted as soon as this returns.

        Waits for the previous save first, so no save is dropped. Replaces a checkpoint of the same step if it is not sound.

        Args:
          step: number of updates made so far.
          state: nested dictionaries of JAX arrays.
          metrics: scalars measured at this step; non-finite values are omitted.
          selection_metric: selects the best checkpoint; lower is better.

        Raises:
          UserError: the previous save, or the start of this one, failed for lack of disk space or permission.
          ValueError: a sound checkpoint of this step already exists.
        """
        self.wait()
        with self._explain_failure(step):
            path = self._folder / str(step)
            if jax.process_index() == 0:  # Orbax's save begins with a barrier, so this is done before any process looks.
                if path.exists() and inspect_checkpoint(path, checksums=True).state == "sound":
                    raise ValueError(f"{path} is already a sound checkpoint")
                _delete(path)
                # If Orbax itself finds that no folders can be created, its threads delay the end of the program by 20 minutes.
                attempt = self._folder / f"{step}.orbax-checkpoint-tmp.0"
                (attempt / "state" / "arrays").mkdir(parents=True)
                shutil.rmtree(attempt)
            with self._orbax:
                response = ocp.save_async(path, state)
        self._pending = self._thread.submit(self._finish, step, response, metrics, selection_metric)

    def wait(self) -> None:
        """Waits until no save is in progress; raises the error of the last save if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __exit__(self, *_: object) -> None:
        with self._thread:  # The thread is shut down even if the last save failed.
            self.wait()

    def _finish(self, step: int, response: Any, metrics: dict[str, float], selection_metric: float | None) -> None:
        """Waits until Orbax has committed on all processes, then seals the checkpoint and deletes old ones."""
        with self._explain_failure(step):
            response.result()
            if jax.process_index() != 0:
                return
            path = self._folder / str(step)
            write_atomic(path / "config.json", json.dumps(config_to_dict(self._config), indent=1))
            if self._tokenizer is not None:
                (path / "tokenizer").mkdir()
                for file in self._tokenizer.iterdir():
                    shutil.copyfile(file, path / "tokenizer" / file.name)
            if selection_metric is not None and not math.isfinite(selection_metric):
                selection_metric = None
            finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
            manifest = {"step": step, "config_digest": config_digest(self._config), "data_digest": self._data_digest} | VERSIONS
            manifest |= {"metrics": finite, "selection_metric": selection_metric}
            manifest |= {"process_count": jax.process_count(), "device_count": jax.device_count()}
            manifest |= {"device_kind": jax.devices()[0].device_kind}
            _seal(path, manifest)
        # Later steps are left over from before the run went back to an earlier step; they must not displace current ones.
        past = [info for info in list_checkpoints(self._folder, checksums=False) if info.step <= step]
        with explain_disk_errors(self._folder):
            _discard(past, self._config.train.keep_latest, self._config.train.keep_best)

    @contextlib.contextmanager
    def _explain_failure(self, step: int) -> Iterator[None]:
        """Turns a full disk, a missing permission or a similar failure into a one-line error, and deletes the failed save."""
        require_held()
        try:
            yield
        except Exception as error:
            reason = _system_error(error)
            if reason is None:
                raise
            require_held()  # If the lock is lost, the save failed because another process cleared the folder.
            if jax.process_index() == 0:
                self._delete_failed_save(step)
            sound = [info.step for info in list_checkpoints(self._folder, checksums=False) if info.state == "sound"]
            rest = f"checkpoint {sound[-1]} is sound: run again to continue from it" if sound else "there is no earlier one"
            raise UserError(f"{self._folder}: checkpoint {step} could not be saved ({reason}); {rest}") from error

    def _delete_failed_save(self, step: int) -> None:
        """Deletes what a failed save has left, until its other writes, still in progress, leave nothing new behind."""
        quiet = 0
        for _ in range(100):
            leftovers = [*self._unfinished(), *self._folder.glob(str(step))]
            for leftover in leftovers:
                with contextlib.suppress(OSError):
                    _delete(leftover)
            quiet = 0 if leftovers else quiet + 1
            if quiet == 5:
                return
            time.sleep(0.02)

    def _unfinished(self) -> list[Path]:
        """Returns the folders of saves that Orbax has not committed."""
        return list(self._folder.glob("*.orbax-checkpoint-tmp*"))


@functools.cache
def _silence_abandoned_writes() -> None:
    """Suppresses what Python says about Orbax's other writes, which Orbax abandons as soon as one of them has failed.

    They end in threads of TensorStore, possibly before Orbax reports the failure, so this is called before the first save.
    """
    warnings.filterwarnings("ignore", r"coroutine 'OrbaxLayout\..*' was never awaited", RuntimeWarning)
    show = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = hook


def _system_error(error: BaseException | None) -> str | None:
    """Returns what the operating system reported, or None if the error is of another kind."""
    if code := re.search(r"os_error_code='(\d+)'", str(error)):  # TensorStore reports it in a ValueError.
        return os.strerror(int(code[1]))
    if isinstance(error, UserError):  # from `write_atomic`
        return _system_error(error.__cause__)
    return error.strerror or str(error) if isinstance(error, OSError) else None


def _seal(path: Path, manifest: dict[str, Any]) -> None:
    """Flushes every file of a checkpoint to disk, then writes the manifest that lists them."""
    entries = list(path.rglob("*"))
    for entry in (*entries, path, path.parent):
        _sync(entry)
    files = [entry for entry in entries if entry.is_file()]
    listed = {}
    with ThreadPoolExecutor() as pool:
        for file, checksum in zip(files, pool.map(sha256, files), strict=True):
            listed[str(file.relative_to(path))] = {"size": file.stat().st_size, "sha256": checksum}
    write_atomic(path / MANIFEST, encode_manifest(manifest | {"files": listed}))
    _sync(path)


def _sync(path: Path) -> None:
    """Flushes a file, or the directory entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- deleting ---------------------------------------------------------------------------------------------------------------


def prune(folder: Path, keep_latest: int, keep_best: int) -> list[CheckpointInfo]:
    """Deletes failed saves, and all sound checkpoints except the newest `keep_latest` and the best `keep_best`.

    Anything newer than the newest sound checkpoint is left alone, because it may be about to be sealed. If no checkpoint is
    sound, nothing is deleted.

    Returns:
      The deleted checkpoints.

    Raises:
      UserError: `keep_latest` is not positive, or `keep_best` is negative; or another process uses the run's folder.
    """
    require(keep_latest > 0, "keep_latest", f"must be positive, not {keep_latest}")
    require(keep_best >= 0, "keep_best", f"must be at least 0, not {keep_best}")
    folder = folder.resolve()
    with locked(folder.parent if folder.name == "checkpoints" else folder, say), explain_disk_errors(folder):
        return _discard(list_checkpoints(folder), keep_latest, keep_best)


def _discard(infos: list[CheckpointInfo], keep_latest: int, keep_best: int) -> list[CheckpointInfo]:
    infos = [info for info in infos if info.named_by_step]
    sound = [info for info in infos if info.state == "sound"]
    kept = {info.path for info in (*sound[-keep_latest:], *best_checkpoints(sound, keep_best))}
    doomed = [info for info in infos if sound and info.step <= sound[-1].step and info.path not in kept]
    for info in doomed:
        _delete(info.path)
    return doomed


def _delete(path: Path) -> None:
    """Deletes a checkpoint, manifest first, so that an interrupted deletion leaves an incomplete checkpoint."""
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)  # Leftovers count as incomplete and are deleted next time.


# -- restoring --------------------------------------------------------------------------------------------------------------


def restore(info: CheckpointInfo, abstract_state: dict[str, Any]) -> dict[str, Any]:
    """Restores a full training state onto any mesh; all processes must call it.

    Args:
      info: a sound checkpoint, as returned by `find_checkpoint`.
      abstract_state: nested dictionaries of `jax.ShapeDtypeStruct` with shardings.

    Returns:
      Nested dictionaries of arrays with the structure of `abstract_state`.

    Raises:
      UserError: names, shapes or dtypes differ from those stored; the message lists all differences.
    """
    stored, wanted = _stored_leaves(info), traverse_util.flatten_dict(abstract_state)
    # Version 1 stores the optimizer's own tree, which contains the moments at some depth, and step counters equal to `step`.
    moments = next((path[: path.index("mu")] for path in stored if "mu" in path), ("moments",))
    stored = {path: leaf for path, leaf in stored.items() if path[0] != "optimizer" or "mu" in path or "nu" in path}
    on_disk = {path: (*moments, *path[1:]) if path[0] == "moments" else path for path in wanted}
    loaded = _load(info, stored, {on_disk[path]: leaf for path, leaf in wanted.items()})
    return traverse_util.unflatten_dict({path: loaded[on_disk[path]] for path in wanted})


def restore_params(info: CheckpointInfo, abstract_params: dict[str, Any]) -> dict[str, Any]:
    """Restores only the parameters, and only the top-level entries in `abstract_params`; otherwise like `restore`."""
    stored = {path: leaf for path, leaf in _stored_leaves(info).items() if path[0] == "params" and path[1] in abstract_params}
    loaded = _load(info, stored, traverse_util.flatten_dict({"params": abstract_params}))
    return traverse_util.unflatten_dict(loaded)["params"]


def _stored_leaves(info: CheckpointInfo) -> Leaves:
    """Returns the shapes and dtypes of the arrays in a checkpoint."""
    return traverse_util.flatten_dict(ocp.metadata(require_sound(info).path).metadata)


def _load(info: CheckpointInfo, stored: Leaves, wanted: Leaves) -> Leaves:
    """Loads the arrays `wanted` from a checkpoint, after checking them against those `stored` in it.

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
