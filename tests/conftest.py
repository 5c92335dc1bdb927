"""What every test relies on: eight simulated CPU devices, checked array shapes, and the shared archives of real data."""

import fcntl
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Read by JAX, XLA and TensorFlow when they are first imported, here and in the processes that tests start. Several workers run
# at once (see the Makefile), so none of them may take a thread for every core.
os.environ.update(
    JAX_PLATFORMS="cpu",
    JAX_NUM_CPU_DEVICES="8",
    OMP_NUM_THREADS="1",
    TF_NUM_INTRAOP_THREADS="1",
    TF_NUM_INTEROP_THREADS="1",
    TF_CPP_MIN_LOG_LEVEL="2",
)
# LLVM's optimisations take most of the time of a small test on a CPU. XLA's own passes stay on, and so does all of it in
# `make test-slow`, which sets this variable to 0.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

install_import_hook(["gpt_jax.model", "gpt_jax.train"], "beartype.beartype")

UNPACK = Path(__file__).parents[2] / "shared" / "data" / "unpack"


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """A function from an archive's name ("novels", "glue", "gpt1-bpe") to the folder of its unpacked files.

    The archives of real data lie beside the repository, not in it; where they are absent, tests that ask for them are skipped.
    """
    if not UNPACK.is_file():
        pytest.skip("the shared archives are absent: no ../shared/data/unpack beside the repository")

    def folder(name: str) -> Path:
        with UNPACK.open() as script:
            fcntl.flock(script, fcntl.LOCK_EX)  # workers that unpack the same archive at once would disturb each other
            unpacked = subprocess.run([UNPACK, name], check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        return Path(unpacked.stdout.strip())

    return folder


@pytest.fixture(scope="session", autouse=True)
def share_compilations(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A program that one test has compiled is not compiled again, in any worker or in the processes that tests start."""
    import jax

    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "compiled"
    os.environ.update(JAX_COMPILATION_CACHE_DIR=str(folder), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
