"""Folders that appear complete or not at all."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from gpt_jax.errors import UserError
from gpt_jax.runtime.rundir import explain_disk_errors


@contextlib.contextmanager
def staged_folder(out: Path, field: str) -> Iterator[Path]:
    """Yields a hidden folder that is renamed to `out` after the body, or removed if the body fails.

    Raises:
      UserError: `out` is not empty, or cannot be created (`field` is the option that named it); no space is left.
    """
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--{field}: {out} is not empty; name a folder that is empty or does not exist")
    if out == Path.cwd():
        raise UserError(f"--{field}: {out} is the current folder; name one below it")
    staging = out.with_name(f".{out.name}.tmp")
    missing = [parent for parent in out.parents if not parent.exists()]
    shutil.rmtree(staging, ignore_errors=True)
    try:
        try:
            staging.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"--{field}: {out} cannot be created ({error.strerror})") from None
        try:
            with explain_disk_errors(out):
                yield staging
        except UserError as error:
            raise UserError(str(error).replace(str(staging), str(out))) from error
        if out.exists():
            out.rmdir()
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in missing:
            with contextlib.suppress(OSError):  # It contains the result, or has never been made.
                parent.rmdir()
