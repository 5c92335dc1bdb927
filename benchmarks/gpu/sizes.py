"""How much is measured on a GPU, and in a rehearsal."""

from pathlib import Path
from typing import NamedTuple


class Sizes(NamedTuple):
    """Configs, sizes and numbers of the measurements."""

    model: str
    """The config that is timed."""
    novels: str
    """The config that is trained on the novels."""
    batch_sizes: tuple[int, ...]
    """Batch sizes for training, tried in order until one is no more than 3% faster than the best so far."""
    modeled_batch_sizes: tuple[int, ...]
    """Batch sizes for which the modeled time of a step is compared with the measured one."""
    attention_batch: int
    kernel_shape: tuple[int, int, int, int]
    """Batch, time, heads and size of a head for which blocks of kernels are timed."""
    attentions: tuple[str, ...]
    """Implementations of attention with which training is timed, beside the default."""
    peers: tuple[tuple[str, ...], ...]
    """Programs that training is compared with. Those of a group are in the GPU's memory at the same time."""
    updates: int
    """Updates of each run that must be equal bit for bit."""
    tokens: int
    """Maximum number of tokens to pre-train on."""
    tasks: tuple[str, ...]
    """Names of the tasks to fine-tune on."""
    train_rows: int
    """Maximum number of rows of a task to train on."""
    rate: float
    """Speed of training in tokens/s to assume if none was measured."""
    startup: float
    """Seconds until pre-training begins."""
    minutes: float
    """Time for all parts."""


FULL = Sizes(
    model="gpt1",
    novels=str(Path(__file__).with_name("gpt1_novels.py")),
    batch_sizes=(16, 32, 64, 128, 256),
    modeled_batch_sizes=(16, 64),
    attention_batch=32,
    kernel_shape=(32, 512, 12, 64),
    attentions=("plain", "pallas_gpu"),
    peers=(("torch", "torch-compiled"), ("transformers", "transformers-compiled")),
    updates=100,
    tokens=35_000_000,  # two epochs of 75 MB of novels
    tasks=("cola", "sst2", "rte"),
    train_rows=8551,  # all of CoLA and RTE, and as many of SST-2 as of CoLA
    rate=150_000,
    startup=40,
    minutes=9,
)
REHEARSAL = Sizes(
    model="smoke",
    novels="smoke",
    batch_sizes=(8,),
    modeled_batch_sizes=(8,),
    attention_batch=4,
    kernel_shape=(1, 40, 2, 16),
    attentions=("plain",),
    peers=(("torch",),),
    updates=6,
    tokens=200_000,
    tasks=("cola",),
    train_rows=320,
    rate=20_000,
    startup=10,
    minutes=5,
)
