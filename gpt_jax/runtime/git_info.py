"""The git checkout that this package runs from: which commit it is, and what differs from it."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple


class Checkout(NamedTuple):
    """What a run needs to say about its code."""

    folder: Path
    commit: str
    """Full hash; empty: not known."""
    diff: bytes
    """What tracked files have that the commit has not, as `git apply` takes it."""
    untracked: tuple[str, ...]
    """Files that git neither tracks nor ignores."""

    @property
    def version(self) -> str:
        """The commit, with "+" and the beginning of the difference's SHA-256 if there is one."""
        return self.commit + (f"+{hashlib.sha256(self.diff).hexdigest()[:8]}" if self.diff else "")


def find() -> Checkout:
    """Asks git, which takes some hundredths of a second. Where the package is installed without its checkout, GPT_JAX_COMMIT may
    say what it was made from, and GPT_JAX_DIFF which file holds the difference.
    """
    folder = Path(__file__).resolve().parent.parent

    def git(*words: str) -> bytes:
        try:
            done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, timeout=60)
        except subprocess.TimeoutExpired:
            return b""
        return done.stdout if done.returncode == 0 else b""

    if not (folder / ".git").exists() or shutil.which("git") is None:
        difference = Path(os.environ.get("GPT_JAX_DIFF") or os.devnull).expanduser()
        return Checkout(folder, os.environ.get("GPT_JAX_COMMIT", ""), difference.read_bytes(), ())
    return Checkout(
        folder=folder,
        commit=git("rev-parse", "HEAD").decode().strip(),
        # A person's settings of how differences look must not make one that git cannot apply.
        diff=git("-c", "diff.noprefix=false", "diff", "--no-ext-diff", "--no-textconv", "--no-color", "--binary", "HEAD"),
        untracked=tuple(git("ls-files", "--others", "--exclude-standard").decode(errors="replace").splitlines()),
    )
