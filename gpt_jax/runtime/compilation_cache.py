"""The folder of compiled programs, from which a run that starts again takes its programs instead of compiling them.

JAX's persistent compilation cache finds a program by a hash of its code, of the compiler's version and flags, and of the devices,
so a program that it returns is the one that the compiler would produce. This module gives that cache a folder of the user, with
one subfolder for each kind of machine and set of versions, because homes are often shared between machines of different kinds.

Two of JAX's own variables change this: JAX_COMPILATION_CACHE_DIR names another folder, which is then neither divided nor bounded,
and JAX_ENABLE_COMPILATION_CACHE=false switches the cache off.
"""

import contextlib
import hashlib
import os
import shutil
import sysconfig
import tempfile
import time
from pathlib import Path

import filelock
import jax

from gpt_jax.runtime.console import Log
from gpt_jax.runtime.machine import cpu_model
from gpt_jax.runtime.rundir import installed_versions

MAX_BYTES = 1 << 30
"""Maximum size of a subfolder. The programs that were not used for the longest time are deleted first."""
MIN_COMPILE_SECONDS = 0.1
"""Programs that compile faster than this are not kept."""
UNUSED_DAYS = 30
"""Subfolders of other machines and versions are deleted after this time without a run."""
LOCK_SECONDS = 10.0


def enable(log: Log) -> None:
    """Lets JAX keep compiled programs, unless the cache is switched off. Call it before the first compilation.

    Args:
      log: receives a warning if the folder cannot be used. Programs are then compiled by each process.
    """
    if not jax.config.values["jax_enable_compilation_cache"]:
        return
    named = jax.config.values["jax_compilation_cache_dir"]
    if not named and jax.process_count() > 1 and jax.default_backend() == "gpu":
        # JAX writes programs only on process 0. If it found one there that the others lack, they would wait forever for its share
        # of the timings by which XLA selects kernels. So the user has to name a folder, which all processes must share.
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if named and "://" in named:
        return
    where = named or "the user's cache folder"
    try:
        folder = Path(named) if named else default_folder()
        where = str(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if not named:
            _delete_incomplete(folder)
            _delete_unused(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder, or the file system has no locks.
        jax.config.update("jax_enable_compilation_cache", False)
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        hint = "set JAX_COMPILATION_CACHE_DIR to a folder that can be written"
        log(f"warning: compiled programs cannot be kept in {where} ({reason}); {hint}")
        return
    if not named:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)


def default_folder() -> Path:
    """Returns the subfolder for this machine and these versions, in $XDG_CACHE_HOME or ~/.cache.

    A program for a CPU uses the instructions of the CPU that compiled it, so each kind of CPU has its own subfolder.
    """
    versions = [f"{name}-{version}" for name, version in installed_versions(("jax", "jaxlib", "gpt_jax")).items()]
    cpu = hashlib.sha256(cpu_model().encode()).hexdigest()[:12]
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "gpt_jax" / "compiled" / "-".join([sysconfig.get_platform(), cpu, *versions])


def _delete_incomplete(folder: Path) -> None:
    """Deletes the programs whose process was killed, or whose disk was full, while they were written.

    JAX writes the time of the last use after the program. If that file is missing, JAX neither replaces the program nor deletes
    any other to make room.
    """
    lock = filelock.FileLock(folder / ".lockfile", timeout=LOCK_SECONDS)  # the one that JAX holds while it writes
    with contextlib.suppress(filelock.Timeout), lock:  # A later start can delete them as well.
        for program in folder.glob("*-cache"):
            if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
                program.unlink()


def _delete_unused(folder: Path) -> None:
    """Marks a subfolder as used, and deletes those that no run has used for `UNUSED_DAYS`."""
    os.utime(folder)
    for other in folder.parent.iterdir():
        with contextlib.suppress(FileNotFoundError):  # Another process has just deleted it.
            if time.time() - other.stat().st_mtime > UNUSED_DAYS * 24 * 3600:
                shutil.rmtree(other, ignore_errors=True)
