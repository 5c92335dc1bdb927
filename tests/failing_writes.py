"""Makes chosen writes fail in a process, as they do on a disk that fills or breaks, including the writes of compiled libraries.

The process is one that `run_scene` has started. It preloads failing_writes.c, which counts the accesses that change files below
a folder.
"""

import ctypes
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ERRORS = {name: getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EIO", "EROFS")}


def compiled(folder: Path) -> Path:
    """Returns the compiled library, which is created in `folder`; skips the test without a C compiler."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler on Linux")
    library = folder / "failing_writes.so"
    source = Path(__file__).with_suffix(".c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl", "-lpthread"], check=True)
    return library


def run_scene(library: Path | None, file: str, scene: str, *arguments: object, prefix: Sequence[str] = ()) -> str:
    """Runs `scene(*arguments)`, a function of a test module, in a process where writes can fail; returns what it prints.

    The arguments become text. The module calls `play` when it is run as a program.

    Args:
      library: what `compiled` returns; None if the scene does not use it.
      prefix: words of a command that runs the process.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_NUM_CPU_DEVICES": "1"}
    environment |= {"LD_PRELOAD": str(library)} if library else {}
    command = [*prefix, sys.executable, file, scene, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=900)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


def play(scenes: dict[str, object]) -> None:
    """Runs the scene that `run_scene` names, and ends this process at once, because abandoned saves would delay its end."""
    code = 1
    try:
        scenes[sys.argv[1]](*sys.argv[2:])  # type: ignore[operator]
        code = 0
    finally:
        if code:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def fail_write(folder: Path, number: int, error: int, forever: bool) -> None:
    """Makes the given write below a folder fail, counted from 1 and from now on, and with `forever` all later ones as well."""
    ctypes.CDLL(None).failing_writes_arm(str(folder).encode(), number, error, forever)


def stop_failing() -> int:
    """Lets all writes succeed again; returns the number of writes since the last call of `fail_write`."""
    library = ctypes.CDLL(None)
    count = library.failing_writes_count()
    library.failing_writes_arm(b"", 0, 0, 0)
    return count
