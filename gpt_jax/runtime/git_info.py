"""The git checkout that this package runs from: its commit and its uncommitted changes."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple


class Checkout(NamedTuple):
    """The version of the code that a run uses."""

    folder: Path
    commit: str
    """Full hash; empty: unknown."""
    diff: bytes
    """Changes to tracked files since the commit, as a patch for `git apply`."""
    untracked: tuple[str, ...]
    """Files that git neither tracks nor ignores."""

    @property
    def version(self) -> str:
        """The commit, followed by "+" and the beginning of the SHA-256 of the changes if there are any."""
        return self.commit + (f"+{hashlib.sha256(self.diff).hexdigest()[:8]}" if self.diff else "")


def find_checkout() -> Checkout:
    """Returns the checkout that this package runs from. Running git takes a few hundredths of a second.

    If the package is installed without its checkout, the environment variable GPT_JAX_COMMIT can specify the commit that it was
    built from, and GPT_JAX_DIFF can specify a file with the changes.
    """
    folder = Path(__file__).resolve().parents[2]

    def git(*words: str) -> bytes:
        try:
            done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, timeout=60)
        except subprocess.TimeoutExpired:
            return b""
        return done.stdout if done.returncode == 0 else b""

    if not (folder / ".git").exists() or shutil.which("git") is None:
        diff = Path(os.environ.get("GPT_JAX_DIFF") or os.devnull).expanduser().read_bytes()
        return Checkout(folder, os.environ.get("GPT_JAX_COMMIT", ""), diff, ())
    commit = git("rev-parse", "HEAD").decode().strip()
    # These options override a user's diff settings, which could otherwise produce a patch that git cannot apply.
    diff = git("-c", "diff.noprefix=false", "diff", "--no-ext-diff", "--no-textconv", "--no-color", "--binary", "HEAD")
    untracked = git("ls-files", "--others", "--exclude-standard").decode(errors="replace").splitlines()
    return Checkout(folder, commit, diff, tuple(untracked))
