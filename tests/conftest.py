"""Settings and fixtures of all tests: eight simulated CPU devices, checked array shapes, archives of real data, a tiny model."""

import fcntl
import importlib.util
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jaxtyping import install_import_hook

from tests.tiny import tiny_config, write_config, write_text

# JAX, XLA and TensorFlow read these when they are first imported, here and in the processes that tests start. Several workers
# run at once (see the Makefile), so none of them may take a thread for every core.
os.environ.update(
    JAX_PLATFORMS="cpu",
    JAX_NUM_CPU_DEVICES="8",
    OMP_NUM_THREADS="1",
    TF_NUM_INTRAOP_THREADS="1",
    TF_NUM_INTEROP_THREADS="1",
    TF_CPP_MIN_LOG_LEVEL="2",
)
# Compiling takes most of the time of a small test. LLVM's optimizations are off, and XLA's older code generator for CPUs, which
# compiles three times as fast as the one that builds kernels from MLIR, is on where a jaxlib still has it (others ignore the
# name). XLA's passes stay on. `make test-slow` sets the first variable to 0 and compiles as users do.
if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1":
    OLD_EMITTERS = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {OLD_EMITTERS}".strip()

install_import_hook(["gpt_jax.model", "gpt_jax.train"], "beartype.beartype")

UNPACK = Path(__file__).parents[2] / "shared" / "data" / "unpack"


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """A function from an archive's name ("novels", "glue", "gpt1-bpe") to the folder of its unpacked files.

    The archives of real data lie beside the repository, not in it. Tests that ask for them are skipped where they are absent.
    """
    if not UNPACK.is_file():
        pytest.skip("the shared archives are absent: no ../shared/data/unpack beside the repository")

    def folder(name: str) -> Path:
        with UNPACK.open() as script:
            fcntl.flock(script, fcntl.LOCK_EX)  # Two workers must not unpack the same archive at once.
            unpacked = subprocess.run([UNPACK, name], check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        return Path(unpacked.stdout.strip())

    return folder


@pytest.fixture(scope="session")
def tpu_devices() -> Callable[[str], list[Any]]:
    """The function `topology_devices`: from the name of a slice of TPUs to its devices, which are not attached.

    Tests that ask for it are skipped where libtpu is not installed; in `make test-slow`, which installs it, they fail.
    """
    if importlib.util.find_spec("libtpu") is None:
        message = "libtpu is not installed"
        pytest.fail(message) if os.environ.get("GPT_JAX_REQUIRE_LIBTPU") == "1" else pytest.skip(message)

    from gpt_jax.plan.topology import topology_devices

    return topology_devices


@pytest.fixture(scope="session", autouse=True)
def share_compilations(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Shares compiled programs between all tests, workers, and processes that tests start."""
    import jax

    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "compiled"
    os.environ.update(JAX_COMPILATION_CACHE_DIR=str(folder), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two updates with a checkpoint of each, whose config is the file tiny.py beside it."""
    from gpt_jax.train.pretrain import pretrain

    folder = tmp_path_factory.mktemp("pretrained")
    short = {"optim": {"warmup": "1 steps"}, "train": {"duration": "2 steps", "save_every": "1 steps"}}
    config = tiny_config(write_text(folder), **short)
    write_config(config, folder / "tiny.py")
    pretrain(config, folder / "run")
    return folder / "run"


@pytest.fixture(scope="session")
def own_task(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of a user's own task, in which "aaa" is yes and "bbb" is no: 40 training, 12 validation and 10 test rows."""
    folder = tmp_path_factory.mktemp("own_task")
    rng = random.Random(1)
    for split, size in (("train", 40), ("validation", 12), ("test", 10)):
        rows = ["text\tlabel"]
        rows += [f"{letter * rng.randint(3, 20)}\t{label}" for letter, label in [("a", "yes"), ("b", "no")] * (size // 2)]
        (folder / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    return {split: str(folder / f"{split}.tsv") for split in ("train", "validation", "test")}
