"""Reports of earlier plans, kept in the user's cache folder, because a compilation takes minutes.

A report is found by a hash of everything that it depends on: the config, the hardware, the versions of `PACKAGES`, and the
source code of this package. Looking for a report needs neither JAX nor libtpu.
"""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEPT = 200
"""Maximum number of reports that are kept."""
PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax")


def cache_folder() -> Path:
    """Returns the folder of the reports, in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gpt_jax" / "plans"


def cache_key(**facts: Any) -> str:
    """Returns a hash of the facts, the installed versions, and the source code of the package."""
    digest = hashlib.sha256(json.dumps([facts, _versions()], sort_keys=True).encode())
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")) + sorted(root.rglob("*.json")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read(key: str) -> dict[str, Any] | None:
    """Returns the report with this key, or None if it does not exist or cannot be read."""
    try:
        return dict(json.loads((cache_folder() / f"{key}.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def write(key: str, report: Mapping[str, Any]) -> None:
    """Stores a report, and deletes the oldest ones if there are more than `KEPT`. Errors of the file system are ignored."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"{key}.{os.getpid()}"
        unfinished.write_text(json.dumps(report))
        unfinished.rename(folder / f"{key}.json")
        for path in sorted(folder.iterdir(), key=lambda path: -path.stat().st_mtime)[KEPT:]:
            path.unlink()
    except OSError:
        pass


def _versions() -> dict[str, str]:
    installed = {name: list(importlib.metadata.distributions(name=name)) for name in PACKAGES}
    return {name: found[0].version for name, found in installed.items() if found}
