"""Folders that appear complete or not at all."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from gpt_jax.errors import UserError
from gpt_jax.runtime.console import say
from gpt_jax.runtime.lock import locked
from gpt_jax.runtime.rundir import explain_disk_errors


@contextlib.contextmanager
def staged_folder(out: Path, field: str) -> Iterator[Path]:
    """Yields a hidden folder that is renamed to `out` after the body, or removed if the body fails.

    Raises:
      UserError: `out` is not empty, or cannot be created (`field` is the option that named it); another process is writing it;
        no space is left.
    """
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--{field}: {out} is not empty; name a folder that is empty or does not exist")
    if out == Path.cwd():
        raise UserError(f"--{field}: {out} is the current folder; name one below it")
    staging = out.with_name(f".{out.name}.tmp")
    content = staging / "content"
    missing = [parent for parent in out.parents if not parent.exists()]
    try:
        try:
            staging.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--{field}: {out} cannot be created ({error.strerror})") from None
        try:
            with locked(staging, say), explain_disk_errors(out), _temporary(content):
                yield content
                if out.exists():
                    out.rmdir()
                content.rename(out)
        except UserError as error:
            raise UserError(str(error).replace(str(content), str(out)).replace(str(staging), str(out))) from error
    finally:
        for folder in (staging, *missing):
            with contextlib.suppress(OSError):  # It contains the result, or was never created.
                folder.rmdir()


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[None]:
    """Creates an empty folder, and removes it after the body unless it has been renamed."""
    shutil.rmtree(folder, ignore_errors=True)  # It is left over from a process that was killed.
    try:
        folder.mkdir()
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
