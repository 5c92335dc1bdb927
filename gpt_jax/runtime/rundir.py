"""A run's folder, with its config, record and result, and the function that writes files atomically.

    config.json        resolved config; commit, versions, flags, devices    metrics.jsonl    one JSON object on each line
    checkpoints/STEP/  states from which training can continue              result.json      final scores
    tensorboard/       the same curves for TensorBoard                      tokenizer/       a copy, so the run is self-contained
    uncommitted.diff   changes since the commit, if there are any

Every record of metrics.jsonl has `step` (updates made), `time` (seconds since the epoch), `attempt` (1 for the first start) and
`kind`: "train", "eval", "event" or "final". Floats are written with full precision, so equal text means equal bits.
"""

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gpt_jax.config.load import CONFIG_VERSION, DIGEST_VERSION, config_digest, config_from_dict, config_to_dict, flatten_config
from gpt_jax.errors import UserError, shortened
from gpt_jax.inputs.json_shapes import Shape, mismatch
from gpt_jax.inputs.json_values import parse_json_object
from gpt_jax.runtime.git_info import find_checkout
from gpt_jax.runtime.lock import require_held

PACKAGES = (
    *("gpt_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "sentencepiece"),
    # Accelerator compilers and runtimes, which are packaged separately from jaxlib.
    *("libtpu", "jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt"),
)
"""Packages that can affect a run's numbers."""


def write_atomic(path: Path, content: bytes | str) -> None:
    """Writes a file atomically: syncs it under a temporary name in the same folder and then renames it.

    Raises:
      UserError: the disk is full, or cannot be written for another reason.
      LockLost: this process has lost the lock of a folder.
    """
    require_held()
    temporary = path.with_name(f".{path.name}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        with explain_disk_errors(path):
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)
"""The errors that come from a disk, a quota or a file server, rather than from a path."""


@contextlib.contextmanager
def explain_disk_errors(path: Path) -> Iterator[None]:
    """Raises a `UserError` that names `path` if the body cannot write to the disk, most often because it is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "no space left on the device; free some space" if full else f"{error.strerror}; check the disk"
        raise UserError(f"{path}: {reason} and run the same command again") from error


def sha256(path: Path) -> str:
    """Returns the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, shape: Shape = dict) -> dict[str, Any]:
    """Reads a JSON object that has the given shape.

    Raises:
      UserError: the file cannot be read or does not contain such an object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not JSON: byte {error.start} is not UTF-8") from None
    values = parse_json_object(text, path)
    if problem := mismatch(values, shape):
        raise UserError(f"{path}: {problem}; it has changed since it was written")
    return values


RECORD_SHAPE = {"kind": str, "step": int, "attempt": int}
START_SHAPE = {"step": int, "fingerprint": str, "training": str}
CONFIG_SHAPE = {"config": dict, "data_digest": str, "platform?": str, "init?": (START_SHAPE, None), "lengths?": ([int], None)}
RESULT_SHAPE = {"step": int, "loss?": float, "test?": {str: float}}
INTENDED = "Use another --workdir, or add --allow-changes if this is intended"


class RunDir:
    """The folder of one run. Only the primary process writes; on others, the writing methods do nothing."""

    def __init__(self, path: Path, primary: bool = True):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"
        self.tokenizer = path / "tokenizer"
        self.result = path / "result.json"
        self._config = path / "config.json"
        self._record = path / "metrics.jsonl"
        self.attempt = 1
        self.start: dict[str, Any] | None = None
        """Identifies the checkpoint that the run started from (`restore.describe_start`), if there is one. `open` records it."""
        self.lengths: tuple[int, ...] | None = None
        """The lengths that a fine-tuning run pads its batches to. `open` records them."""
        self._primary = primary
        self._metrics: Any = None

    def check_config(self, config: Any, allow_changes: bool = False) -> None:
        """Checks that any run in this folder has the same config. A folder without a training run passes.

        Raises:
          UserError: `result` fields differ and `allow_changes` is off (the fields are named), or config.json cannot be read.
        """
        stored = self.stored()
        if not stored or allow_changes:
            return
        old = flatten_config(config_from_dict(stored["config"], self._config))
        changed = [
            f"--{name} {shortened(repr(value))} (was {shortened(repr(old[name][0]))})"
            for name, (value, affects) in flatten_config(config).items()
            if affects == "result" and name in old and value != old[name][0]
        ]
        if changed:
            raise UserError(f"{self.path} contains a run with a different config; it differs in {', '.join(changed)}. {INTENDED}")

    def check_data(self, data_digest: str, allow_changes: bool = False) -> None:
        """Checks that the run was trained on the same data.

        Raises:
          UserError: the data differ and `allow_changes` is off.
        """
        stored = self.stored().get("data_digest", data_digest)
        if stored != data_digest and not allow_changes:
            problem = f"{self.path} was trained on different data (digest {stored[:12]}, now {data_digest[:12]})"
            raise UserError(f"{problem}; use the original data or another --workdir")

    def stored(self) -> dict[str, Any]:
        """Returns the contents of config.json, or nothing if the folder does not contain a training run.

        Raises:
          UserError: the folder contains a run, and config.json is missing or damaged.
        """
        if not any(self.checkpoints.glob("*")) and not any(record["kind"] == "train" for record in self.records()):
            return {}
        if not self._config.exists():
            raise UserError(f"{self.path} contains a run but no config.json; use another --workdir")
        return read_json(self._config, CONFIG_SHAPE)

    def require_not_imported(self) -> None:
        """Checks that the folder's model was not imported, because an imported checkpoint lacks optimizer state.

        Raises:
          UserError: it was imported.
        """
        if self._config.exists() and (source := read_json(self._config).get("imported_from")):
            hint = f"use another --workdir with --init.from {self.path}"
            raise UserError(f"{self.path} contains a model imported from {shortened(str(source))}; {hint}")

    def open(self, config: Any, data_digest: str, **facts: Any) -> None:
        """Starts an attempt: writes config.json, which also contains `facts`, and uncommitted.diff."""
        if not self._primary:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        facts |= {"config_version": CONFIG_VERSION, "digest_version": DIGEST_VERSION, "digest": config_digest(config)}
        facts |= {"data_digest": data_digest, "init": self.start, "lengths": self.lengths}
        facts |= environment() | {"config": config_to_dict(config)}
        write_atomic(self._config, json.dumps(facts, indent=1) + "\n")
        if diff := find_checkout().diff:
            write_atomic(self.path / "uncommitted.diff", diff)
        else:
            (self.path / "uncommitted.diff").unlink(missing_ok=True)
        self.attempt = 1 + max((record["attempt"] for record in self.records()), default=0)
        self._record.touch()

    def supersede(self, step: int) -> None:
        """Moves incomplete lines and records after `step`, where training continues, to metrics.superseded.jsonl."""
        if not self._primary:
            return
        kept: list[bytes] = []
        moved: list[bytes] = []
        before = self._record.read_bytes()
        for line in before.splitlines():
            record = _parse(line)
            (kept if record is not None and record["step"] <= step else moved).append(line + b"\n")
        if moved:
            superseded = self.path / "metrics.superseded.jsonl"
            earlier = superseded.read_bytes() if superseded.exists() else b""
            write_atomic(superseded, earlier + b"".join(moved))
        if b"".join(kept) != before:  # A missing final newline also counts as a difference.
            self.sync()
            write_atomic(self._record, b"".join(kept))

    def record(self, kind: str, step: int, **values: Any) -> None:
        """Appends one line to metrics.jsonl."""
        if self._primary:
            require_held()
            head = {"kind": kind, "step": step, "time": round(time.time(), 3), "attempt": self.attempt}
            with explain_disk_errors(self._record):
                if self._metrics is None:
                    self._metrics = open(self._record, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
                self._metrics.write(json.dumps(head | values) + "\n")

    def sync(self) -> None:
        """Makes all records so far durable by closing their file, which the next record reopens.

        On a bucket mounted with Cloud Storage FUSE, a file is uploaded only when it is closed. Until then, its lines are lost if
        the machine fails.

        Raises:
          UserError: the disk is full.
        """
        if self._metrics is not None:
            metrics, self._metrics = self._metrics, None
            with explain_disk_errors(self._record), metrics:
                metrics.flush()
                os.fsync(metrics.fileno())

    close = sync

    def records(self) -> list[dict[str, Any]]:
        """Returns all complete records so far."""
        lines = self._record.read_bytes().splitlines() if self._record.exists() else []
        return [record for record in map(_parse, lines) if record is not None]

    def read_result(self, of_checkpoint: bool) -> dict[str, Any]:
        """Reads result.json. With `of_checkpoint`, it must contain the scores of the best checkpoint.

        Raises:
          UserError: there is no such file, or entries are missing or have the wrong types.
        """
        scored = {"best_step": int, "validation": {str: float}} if of_checkpoint else {}
        return read_json(self.result, RESULT_SHAPE | scored)

    def write_result(self, result: dict[str, Any]) -> None:
        """Writes result.json, the run's final scores, after the record is durable. A run that has this file is finished."""
        if self._primary:
            self.sync()
            write_atomic(self.result, json.dumps(result, indent=1) + "\n")


def environment() -> dict[str, Any]:
    """Returns the commit, the versions of installed packages, the compiler flags and the command of this run."""
    versions = {"python": platform.python_version(), **installed_versions(PACKAGES)}
    flags = {"xla_flags": os.environ.get("XLA_FLAGS", ""), "libtpu_init_args": os.environ.get("LIBTPU_INIT_ARGS", "")}
    command = [word.encode(errors="backslashreplace").decode() for word in sys.argv]  # A path need not be UTF-8.
    return {"commit": find_checkout().version, "versions": versions, **flags, "command": command}


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Returns the versions of the given packages, omitting any that are not installed."""
    versions = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _parse(line: bytes) -> dict[str, Any] | None:
    """Returns the record in a line; None if it is incomplete, because a process was killed while writing it."""
    with contextlib.suppress(ValueError, RecursionError):
        record = json.loads(line)
        return None if mismatch(record, RECORD_SHAPE) else record
    return None
