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

from gpt_jax.config.load import CONFIG_VERSION, config_digest, config_from_dict, config_to_dict, flatten_config
from gpt_jax.errors import UserError
from gpt_jax.inputs.json_values import parse_json_object
from gpt_jax.runtime.git_info import find_checkout

PACKAGES = (
    *("gpt_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "sentencepiece"),
    # Accelerator compilers and runtimes, which are packaged separately from jaxlib.
    *("libtpu", "jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt"),
)
"""Packages that can affect a run's numbers."""


def write_atomic(path: Path, content: bytes | str) -> None:
    """Writes a file atomically: syncs it under a temporary name in the same folder and then renames it."""
    temporary = path.with_name(f".{path.name}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        with explain_full_disk(path):
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def explain_full_disk(path: Path) -> Iterator[None]:
    """Raises a `UserError` that names `path` if the body runs out of disk space."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{path}: no space left on the device; free some space and run the same command again") from error


def sha256(path: Path) -> str:
    """Returns the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      UserError: the file cannot be read or does not contain a JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not JSON: byte {error.start} is not UTF-8") from None
    return parse_json_object(text, path)


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
        self._primary = primary
        self._metrics: Any = None

    def check_config(self, config: Any, allow_changes: bool = False) -> None:
        """Checks that any run in this folder has the same config. A folder without a training run passes.

        Raises:
          UserError: `result` fields differ and `allow_changes` is off (the fields are named), or there is no config.json.
        """
        if not self._trained():
            return
        if not self._config.exists():
            raise UserError(f"{self.path} contains a run but no config.json; use another --workdir")
        old = flatten_config(config_from_dict(read_json(self._config).get("config", {}), self._config))
        changed = [
            f"--{name} {value!r} (was {old[name][0]!r})"
            for name, (value, affects) in flatten_config(config).items()
            if affects == "result" and name in old and value != old[name][0]
        ]
        if changed and not allow_changes:
            hint = "Use another --workdir, or add --allow-changes if this is intended"
            raise UserError(f"{self.path} contains a run with a different config; it differs in {', '.join(changed)}. {hint}")

    def require_not_imported(self) -> None:
        """Checks that the folder's model was not imported, because an imported checkpoint lacks optimizer state.

        Raises:
          UserError: it was imported.
        """
        if self._config.exists() and (source := read_json(self._config).get("imported_from")):
            hint = f"use another --workdir with --init.from {self.path}"
            raise UserError(f"{self.path} contains a model imported from {source}; {hint}")

    def check_data(self, data_digest: str, allow_changes: bool = False) -> None:
        """Checks that the run was trained on the same data.

        Raises:
          UserError: the data differ and `allow_changes` is off.
        """
        stored = read_json(self._config).get("data_digest", "") if self._trained() else data_digest
        if stored != data_digest and not allow_changes:
            problem = f"{self.path} was trained on different data (digest {stored[:12]}, now {data_digest[:12]})"
            raise UserError(f"{problem}; use the original data or another --workdir")

    def open(self, config: Any, data_digest: str, **facts: Any) -> None:
        """Starts an attempt: writes config.json, which also contains `facts`, and uncommitted.diff."""
        if not self._primary:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        facts |= {"config_version": CONFIG_VERSION, "digest": config_digest(config), "data_digest": data_digest}
        facts |= environment() | {"config": config_to_dict(config)}
        write_atomic(self._config, json.dumps(facts, indent=1) + "\n")
        if diff := find_checkout().diff:
            write_atomic(self.path / "uncommitted.diff", diff)
        else:
            (self.path / "uncommitted.diff").unlink(missing_ok=True)
        self.attempt = 1 + max((record["attempt"] for record in self.records()), default=0)
        self._record.touch()

    def _trained(self) -> bool:
        return any(self.checkpoints.glob("*")) or any(record["kind"] == "train" for record in self.records())

    def supersede(self, step: int) -> None:
        """Moves incomplete lines and records after `step`, where training continues, to metrics.superseded.jsonl."""
        if not self._primary:
            return
        kept: list[str] = []
        moved: list[str] = []
        before = self._record.read_text(encoding="utf-8")
        for line in before.splitlines():
            record = _parse(line)
            (kept if record is not None and record["step"] <= step else moved).append(line + "\n")
        if moved:
            superseded = self.path / "metrics.superseded.jsonl"
            earlier = superseded.read_text(encoding="utf-8") if superseded.exists() else ""
            write_atomic(superseded, earlier + "".join(moved))
        if "".join(kept) != before:  # A missing final newline also counts as a difference.
            self.sync()
            write_atomic(self._record, "".join(kept))

    def record(self, kind: str, step: int, **values: Any) -> None:
        """Appends one line to metrics.jsonl."""
        if self._primary:
            head = {"kind": kind, "step": step, "time": round(time.time(), 3), "attempt": self.attempt}
            if self._metrics is None:
                self._metrics = open(self._record, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
            with explain_full_disk(self._record):
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
            with explain_full_disk(self._record), metrics:
                metrics.flush()
                os.fsync(metrics.fileno())

    close = sync

    def records(self) -> list[dict[str, Any]]:
        """Returns all complete records so far."""
        lines = self._record.read_text(encoding="utf-8").splitlines() if self._record.exists() else []
        return [record for record in map(_parse, lines) if record is not None]

    def write_result(self, result: dict[str, Any]) -> None:
        """Writes result.json, the run's final scores, after the record is durable. A run that has this file is finished."""
        if self._primary:
            self.sync()
            write_atomic(self.result, json.dumps(result, indent=1) + "\n")


def environment() -> dict[str, Any]:
    """Returns the commit, the versions of installed packages, the compiler flags and the command of this run."""
    versions = {"python": platform.python_version(), **installed_versions(PACKAGES)}
    flags = {"xla_flags": os.environ.get("XLA_FLAGS", ""), "libtpu_init_args": os.environ.get("LIBTPU_INIT_ARGS", "")}
    return {"commit": find_checkout().version, "versions": versions, **flags, "command": sys.argv}


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Returns the versions of the given packages, omitting any that are not installed."""
    versions = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _parse(line: str) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError):  # A process killed while writing leaves a partial line.
        record = json.loads(line)
        return record if isinstance(record, dict) and "step" in record else None
    return None
