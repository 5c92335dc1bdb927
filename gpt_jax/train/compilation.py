"""Compilation in the background: on CPUs and TPUs, a thread compiles a run's programs while it prepares and while it trains."""

import concurrent.futures
import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax

from gpt_jax.model.loss import Batch
from gpt_jax.runtime.console import Log

Program = TypeVar("Program")
AbstractBatch = dict[str, jax.ShapeDtypeStruct]

THREAD = "compilation"
"""Beginning of the name of the thread that compiles."""
POLL_SECONDS = 0.1
"""Interval at which a thread that waits for a program looks for a request to stop."""
REPORTED_SECONDS = 1.0
"""A line is logged after each compilation that took at least this long. Most programs from the compilation cache take less."""


class BackgroundCompiler:
    """Compiles programs in a thread, one after the other. XLA does not hold the interpreter lock meanwhile.

    Args:
      log: receives the names of the programs that were compiled and the number of those that are left.
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=THREAD)
        self._left: list[str] = []  # the programs that are not being compiled yet, in order

    def submit(self, name: str, compile_program: Callable[[], Program]) -> Future[Program]:
        """Returns the future result of a function that compiles a program. An error is raised where the result is used."""
        self._left.append(name)
        return self._thread.submit(self._compile, compile_program)

    def _compile(self, compile_program: Callable[[], Program]) -> Program:
        name = self._left.pop(0)
        started = time.monotonic()
        program = compile_program()
        seconds = time.monotonic() - started
        if seconds >= REPORTED_SECONDS:
            rest = f"; {len(self._left)} left, next {self._left[0]}" if self._left else ""
            self._log(f"compiled {name} in {seconds:.1f} s{rest}")
        return program

    def close(self) -> None:
        """Drops the programs that are not being compiled yet. If one is, Python would wait for it (`exit_now_if_compiling`)."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def exit_now_if_compiling(code: int) -> None:
    """Ends this process with an exit code if a program is still being compiled.

    Otherwise Python would wait for it, perhaps for longer than a preempted machine has. Call it when nothing else is left to be
    written. In a run of several processes it does nothing, because JAX lets them exit together.
    """
    if any(thread.name.startswith(THREAD) for thread in threading.enumerate()) and jax.process_count() == 1:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)


class CompiledByShape:
    """A function of (state or parameters, batch) that is compiled once for each shape of the batch.

    Args:
      lower: lowers the function for an abstract batch. It is called from another thread by `compile_ahead`.
    """

    def __init__(self, lower: Callable[[AbstractBatch], jax.stages.Lowered]) -> None:
        self._lower = lower
        self._ahead: dict[frozenset[Any], Future[jax.stages.Compiled]] = {}
        self._used: dict[frozenset[Any], jax.stages.Compiled] = {}

    def compile_ahead(self, compiler: BackgroundCompiler, batches: Mapping[str, AbstractBatch]) -> None:
        """Starts to compile the function in the background for some batches, keyed by the name of the program.

        On GPUs, programs are compiled when they are used: the compiler times kernels, which training would disturb. The processes
        of a run also exchange these times, so none of them may drop a program that another one compiles.
        """
        if jax.default_backend() == "gpu":
            return
        for name, batch in batches.items():
            self._ahead[frozenset(batch.items())] = compiler.submit(name, functools.partial(self._compile, batch))

    @property
    def num_shapes(self) -> int:
        """Number of different shapes that the function was called with."""
        return len(self._used)

    def texts(self) -> list[str]:
        """Returns the HLO text of each program that was called."""
        return [program.as_text() or "" for program in self._used.values()]

    def wait(self, batch: Batch, stopped: Callable[[], bool]) -> bool:
        """Waits until the program for the batch's shape is compiled in the background, or until a stop is requested.

        Returns:
          False if a stop was requested first.
        """
        future = self._ahead.get(frozenset(_abstract(batch).items()))
        while future is not None and not future.done():
            if stopped():
                return False
            concurrent.futures.wait([future], POLL_SECONDS)
        return True

    def __call__(self, state: Any, batch: Batch) -> Any:
        """Calls the program for the batch's shape, for which it may have to wait. An unexpected shape is compiled here."""
        arrays = _abstract(batch)
        shape = frozenset(arrays.items())
        if shape not in self._used:
            self._used[shape] = self._ahead.pop(shape).result() if shape in self._ahead else self._compile(arrays)
        return self._used[shape](state, batch)

    def _compile(self, batch: AbstractBatch) -> jax.stages.Compiled:
        return self._lower(batch).compile()


def _abstract(batch: Batch) -> AbstractBatch:
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in batch.items()}
