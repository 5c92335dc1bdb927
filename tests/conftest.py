"""What tests rely on: eight simulated CPU devices, checked array shapes, the shared archives of real data, a tiny model."""

import fcntl
import json
import os
import random
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


PRETRAIN = """
from gpt_jax.config import DataConfig, ModelConfig, OptimConfig, PretrainConfig, TokenizerConfig, TrainConfig


def config():
    return PretrainConfig(
        model=ModelConfig(vocab_size=257, context_length=32, num_layers=2, embed_dim=16, num_heads=2, mlp_dim=64),
        data=DataConfig(source="{source}", validation_share=0.1, processes=1, tokenizer=TokenizerConfig(kind="bytes")),
        optim=OptimConfig(peak_lr=0.01, warmup="1 steps"),
        train=TrainConfig(
            batch_size=8, duration="2 steps", save_every="1 steps", sample_tokens=0, tensorboard=False
        ),
    )
"""


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps with checkpoints of both: a model so small that fine-tuning it takes seconds."""
    from gpt_jax.config.load import load_config
    from gpt_jax.train.pretrain import pretrain

    folder = tmp_path_factory.mktemp("pretrained")
    rng = random.Random(0)
    lines = ("".join(rng.choices("abcdefgh ", k=200)) for _ in range(40))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (folder / "tiny.py").write_text(PRETRAIN.format(source=folder / "text.jsonl"))
    pretrain(load_config(str(folder / "tiny.py")), folder / "run")
    return folder / "run"


@pytest.fixture(scope="session")
def own_task(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Fields of a task of one's own: texts of "a" are yes, texts of "b" are no; 40 rows for training, 12 for validation."""
    folder = tmp_path_factory.mktemp("own_task")
    rng = random.Random(1)
    for split, size in (("train", 40), ("validation", 12), ("test", 10)):
        rows = ["text\tlabel"]
        rows += [f"{letter * rng.randint(3, 20)}\t{label}" for letter, label in [("a", "yes"), ("b", "no")] * (size // 2)]
        (folder / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    return {split: str(folder / f"{split}.tsv") for split in ("train", "validation", "test")}
