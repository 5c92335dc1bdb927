"""Programs for the tests of comparisons, which worker processes import."""

import os
import signal
import tempfile
from pathlib import Path

from gpt_jax.bench.program import Program
from gpt_jax.errors import UserError


def logging(name: str, log: str) -> Program:
    """Appends a line to a file for each call: its name and the number of repetitions."""

    def run(count: int) -> None:
        with open(log, "a") as file:
            file.write(f"{name} {count}\n")

    return Program(run, lambda: {"threads": float(os.environ["OMP_NUM_THREADS"])})


def visible() -> Program:
    """Reports the first digit of CUDA_VISIBLE_DEVICES and the number of its entries; -1 if it is not set."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    details = {"gpu": float(gpus[0]), "entries": 1.0 + gpus.count(",")} if gpus else {"gpu": -1.0}
    return Program(lambda count: None, lambda: details, "a GPU", 3)


def chatty(folder: str) -> Program:
    """Prints to standard output, as libraries do, and leaves a file in its scratch folder, whose name it writes down."""
    scratch = tempfile.mkdtemp()
    Path(folder, "scratch").write_text(scratch)

    def run(count: int) -> None:
        print("hello")
        os.write(1, b"hello\n")

    return Program(run)


def large(megabytes: int) -> Program:
    """Touches this much memory."""
    return Program(lambda count: len(b"x" * (megabytes * 1_000_000)))


def raising(after: int) -> Program:
    """Raises an error once it has been called `after` times."""
    calls = 0

    def run(count: int) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise ValueError("two\nlines")

    return Program(run)


def mistaken() -> Program:
    """Reports a user's mistake."""
    raise UserError("--config: is wrong")


def killed() -> Program:
    """Ends as if it had used too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def exiting() -> Program:
    """Ends its process."""
    os.write(2, b"the last words\n")
    os._exit(3)
