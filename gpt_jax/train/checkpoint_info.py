"""Checkpoints on disk: their format, where they are, and whether they are sound. This module writes nothing.

A run's `checkpoints/STEP/` holds Orbax's files (the state as nested dictionaries of arrays), `config.json`, `tokenizer/`
and, written last, `manifest.json`, one JSON object of format version 2:

    format_version, step, config_digest, config_digest_version, data_digest, mask_version, permutation_version,
    metrics {name: number}, selection_metric (number, lower is better, or null), process_count, device_count, device_kind,
    files {relative path: {size, sha256}} of every other file in the folder,
    sha256 of this object without this entry, as JSON with sorted keys

Version 1 can still be read. Its state has the optimizer's own tree in place of `moments`, and its selection metric is the
metric "rank" if there is one, otherwise "loss".

The manifest identifies a checkpoint. A copy of the folder is the same checkpoint, wherever it is and whatever it is called; so is
a link to it. In RUN/checkpoints, only folders that are named after their step are ever deleted.

Orbax loads a corrupted file without raising an error, hence the checksums. A folder without a manifest is a save that was cut
short ("incomplete"); one that differs from its manifest is "damaged". Neither is ever restored.
"""

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gpt_jax.config import RunConfig
from gpt_jax.config.load import config_from_dict
from gpt_jax.errors import UserError
from gpt_jax.inputs.json_shapes import mismatch
from gpt_jax.inputs.json_values import parse_json_object
from gpt_jax.runtime.console import Log
from gpt_jax.runtime.rundir import read_json, sha256

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
ORBAX_METADATA = "_CHECKPOINT_METADATA"
"""A file that Orbax writes into every checkpoint."""
MANIFEST_SHAPE = {
    "format_version": int,
    "step": int,
    "config_digest": str,
    "data_digest": str,
    "metrics": {str: float},
    "selection_metric?": (float, None),
    "files": {str: {"size": int, "sha256": str}},
}


class CheckpointInfo(NamedTuple):
    """One checkpoint on disk."""

    step: int
    """The step in the manifest or, without a sound manifest, in the folder's name; -1 if neither has one."""
    path: Path
    state: Literal["sound", "incomplete", "damaged"]
    problem: str
    """Why the checkpoint is not sound; empty if it is sound."""
    size: int
    """Bytes on disk."""
    metrics: dict[str, float]
    """Scores on the validation split at `step`; empty unless the checkpoint is sound."""
    selection_metric: float | None = None
    """Selects the best checkpoint; lower is better. None if the checkpoint was not scored."""
    format_version: int = FORMAT_VERSION
    fingerprint: str = ""
    """The manifest's checksum, which differs between any two checkpoints; empty unless the checkpoint is sound."""
    digests: tuple[str, ...] = ()
    """The digests of the config and of the data, which the checkpoints of a run share; empty unless the checkpoint is sound."""

    @property
    def named_by_step(self) -> bool:
        """Whether this is a folder as a run writes it: not renamed, and not a link."""
        return self.path.name == str(self.step) and not self.path.is_symlink()


# -- finding ----------------------------------------------------------------------------------------------------------------


def list_checkpoints(folder: Path, checksums: bool = True) -> list[CheckpointInfo]:
    """Returns all checkpoints of a run by ascending step, including copies and links, which come before the original.

    Args:
      folder: RUN or RUN/checkpoints; any folder of checkpoints; or a single checkpoint.
      checksums: if True, read every file and compare its SHA-256; if False, check only manifests and file sizes.

    Raises:
      UserError: a checkpoint was written by a newer gpt_jax.
    """
    infos = [inspect_checkpoint(path, checksums) for path in _checkpoint_folders(folder)]
    return sorted(infos, key=lambda info: (info.step, info.named_by_step, info.path.name))


def own_checkpoints(folder: Path, checksums: bool = True) -> list[CheckpointInfo]:
    """Returns the checkpoints of a run as `list_checkpoints` does, but without copies of another run's.

    A checkpoint that is named after its step counts as the run's, and so does any other one with the same digests.
    """
    infos = list_checkpoints(folder, checksums)
    own = {info.digests for info in infos if info.named_by_step and info.digests}
    return [info for info in infos if not (own and info.digests) or info.digests in own]


def newest_checkpoint(folder: Path, log: Log) -> CheckpointInfo | None:
    """Returns the newest sound checkpoint of a run, or None if no save has ever finished.

    Args:
      folder: RUN or RUN/checkpoints.
      log: receives a line for each newer checkpoint that cannot be used.

    Raises:
      UserError: no checkpoint is sound and at least one is damaged.
    """
    unusable: list[CheckpointInfo] = []
    for listed in reversed(own_checkpoints(folder, checksums=False)):
        info = inspect_checkpoint(listed.path, checksums=True) if listed.state == "sound" else listed
        if info.state == "sound":
            for other in unusable:
                log(f"checkpoint {other.path.name} is {other.state} ({other.problem}); using {info.path.name}")
            return info
        unusable.append(info)
    if any(info.state == "damaged" for info in unusable):
        listed_problems = "; ".join(f"{info.path.name} is {info.state} ({info.problem})" for info in unusable)
        hint = "restore one from a backup, or start over in an empty folder"
        raise UserError(f"{folder}: no sound checkpoint: {listed_problems}; {hint}")
    return None


def find_checkpoint(path: Path, log: Log) -> CheckpointInfo:
    """Verifies and returns the checkpoint that a CHECKPOINT argument refers to.

    Args:
      path: a run's folder, which stands for its newest sound checkpoint, or the folder of one checkpoint, whatever it is called.
      log: receives a line for each newer checkpoint that cannot be used.

    Raises:
      UserError: there is no checkpoint, or it is not sound.
    """
    hint = "give a run's folder or a checkpoint's folder (RUN/checkpoints/STEP)"
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; {hint}")
    if is_checkpoint(path):
        return require_sound(inspect_checkpoint(path.absolute(), checksums=True))
    newest = newest_checkpoint(path, log)
    if newest is None:
        if seeds := sorted(folder.name for folder in path.glob("seed-*")):
            raise UserError(f"{path}: contains runs of several seeds; name one of them, such as {path / seeds[0]}")
        raise UserError(f"{path}: contains no finished checkpoint; {hint}")
    return newest


def find_step(run: Path, step: int, checksums: bool = True) -> CheckpointInfo:
    """Returns the sound checkpoint of one step of a run, whatever its folder is called; see `list_checkpoints` for `checksums`.

    Raises:
      UserError: there is none, or it is not sound.
    """
    paths = [info.path for info in own_checkpoints(run, checksums=False) if info.step == step]
    if not paths:
        raise UserError(f"{run}: checkpoint {step} no longer exists; name the folder of another one")
    return require_sound(inspect_checkpoint(paths[-1], checksums))


def is_checkpoint(path: Path) -> bool:
    """Returns whether a folder is one checkpoint, finished or not, rather than a run's folder. Its name does not matter."""
    return not (path / "checkpoints").is_dir() and any((path / name).is_file() for name in (MANIFEST, ORBAX_METADATA))


def inspect_checkpoint(path: Path, checksums: bool) -> CheckpointInfo:
    """Compares a checkpoint's folder with its manifest; see `list_checkpoints` for `checksums` and the errors raised."""
    size, step = _folder_size(path), step_in_name(path)
    damaged = functools.partial(CheckpointInfo, step, path, "damaged", size=size, metrics={})
    try:
        str(path).encode()  # Orbax cannot read from a path that is not UTF-8.
        raw = (path / MANIFEST).read_bytes()
        manifest = parse_json_object(raw.decode(), path / MANIFEST)
        if raw != encode_manifest(manifest):
            return damaged(f"file {MANIFEST}: checksum differs")
    except FileNotFoundError:
        return CheckpointInfo(step, path, "incomplete", f"file {MANIFEST}: missing, so its save was cut short", size, {})
    except (OSError, UserError, UnicodeError, RecursionError):
        return damaged(f"file {MANIFEST}: not readable as JSON")
    version: Any = manifest.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(f"{path}: has format version {version}, but this gpt_jax reads only up to {FORMAT_VERSION}; update it")
    if problem := mismatch(manifest, MANIFEST_SHAPE):
        return damaged(f"file {MANIFEST}: {problem}")
    with ThreadPoolExecutor() as pool:
        results = pool.map(functools.partial(_file_problem, path, checksums), manifest["files"].items())
        problems = [problem for problem in results if problem]
    if problems:
        return damaged(", ".join(problems))._replace(step=manifest["step"])
    metrics = dict(manifest["metrics"])
    metric = metrics.pop("rank", metrics.get("loss")) if version == 1 else manifest.get("selection_metric")
    digests = manifest["config_digest"], manifest["data_digest"]
    return CheckpointInfo(manifest["step"], path, "sound", "", size, metrics, metric, version, manifest["sha256"], digests)


def read_config(info: CheckpointInfo) -> RunConfig:
    """Returns the resolved config of the run that wrote the checkpoint."""
    return config_from_dict(read_json(info.path / "config.json"), info.path / "config.json")


def read_manifest(info: CheckpointInfo) -> dict[str, Any]:
    """Returns the manifest of a sound checkpoint; the module docstring describes its format."""
    return read_json(info.path / MANIFEST)


def _checkpoint_folders(folder: Path) -> list[Path]:
    """Returns the folders of the checkpoints in a folder (see `list_checkpoints`), in no particular order.

    In RUN/checkpoints, every folder counts except another run's, so that an unfinished or damaged one is not left out.
    """
    folder = folder.absolute()
    if is_checkpoint(folder):
        return [folder]
    if (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints"
    paths = [path for path in folder.glob("[!.]*") if ".orbax-checkpoint-tmp" not in path.name]
    if folder.name == "checkpoints":
        return [path for path in paths if (path.is_dir() or path.is_symlink()) and not (path / "checkpoints").is_dir()]
    return [path for path in paths if is_checkpoint(path)]


def step_in_name(path: Path) -> int:
    """Returns the step that a folder is named after, or -1 if its name is not a step."""
    return int(path.name) if re.fullmatch("0|[1-9][0-9]{,17}", path.name) else -1


def _folder_size(path: Path) -> int:
    """Returns the total size of a folder's files in bytes; 0 if some are deleted while it is computed."""
    with contextlib.suppress(FileNotFoundError):
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return 0


def _file_problem(path: Path, checksums: bool, entry: tuple[str, dict[str, Any]]) -> str:
    """Returns the problem with the file of one manifest entry of the checkpoint at `path`; empty if there is none."""
    name, expected = entry
    try:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"file {name}: outside of the checkpoint"
        size = (path / name).stat().st_size
        if size != expected["size"]:
            return f"file {name}: {size} bytes instead of {expected['size']}"
        return f"file {name}: checksum differs" if checksums and sha256(path / name) != expected["sha256"] else ""
    except (OSError, ValueError) as error:  # A name with a NUL character is a ValueError.
        return f"file {name}: {getattr(error, 'strerror', None) or error}"


def require_sound(info: CheckpointInfo) -> CheckpointInfo:
    if info.state != "sound":
        raise UserError(f"{info.path}: is {info.state} ({info.problem}); `gpt-jax checkpoint list` shows the others")
    return info


def best_checkpoints(infos: Sequence[CheckpointInfo], count: int) -> list[CheckpointInfo]:
    """Returns the `count` sound checkpoints with the lowest selection metric, best first; in a tie, the older first."""
    ranked = [(info.selection_metric, info.step, info) for info in infos if info.selection_metric is not None]
    return [info for _, _, info in sorted(ranked, key=lambda item: item[:2])][:count]


def encode_manifest(manifest: dict[str, Any]) -> bytes:
    """Returns the canonical bytes of a manifest with its checksum, so that a change of any byte is detected."""
    entries = {name: value for name, value in manifest.items() if name != "sha256"}
    entries["sha256"] = hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
    return (json.dumps(entries, sort_keys=True, indent=1) + "\n").encode()
