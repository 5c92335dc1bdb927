"""Compilation in the background: a thread compiles the programs of a run while the run prepares, and then while it trains."""

import functools
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax

from gpt_jax.model.loss import Batch
from gpt_jax.runtime.console import Log

Program = TypeVar("Program")
AbstractBatch = dict[str, jax.ShapeDtypeStruct]

REPORTED_SECONDS = 1.0
"""A line is logged after each compilation that took at least this long. Most programs from the compilation cache take less."""


class BackgroundCompiler:
    """Compiles programs in a thread, one after the other. XLA does not hold the interpreter lock meanwhile.

    Args:
      log: receives the names of the programs that were compiled and the number of those that are left.
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compilation")
        self._programs: dict[str, Future[Any]] = {}

    def submit(self, name: str, compile_program: Callable[[], Program]) -> Future[Program]:
        """Returns the future result of a function that compiles a program. An error is raised where the result is used."""
        future = self._programs[name] = self._thread.submit(self._compile, name, compile_program)
        return future

    def _compile(self, name: str, compile_program: Callable[[], Program]) -> Program:
        started = time.monotonic()
        program = compile_program()
        seconds = time.monotonic() - started
        if seconds >= REPORTED_SECONDS:
            left = [other for other, future in self._programs.copy().items() if other != name and not future.done()]
            rest = f"; {len(left)} left, next {left[0]}" if left else ""
            self._log(f"compiled {name} in {seconds:.1f} s{rest}")
        return program

    def close(self) -> None:
        """Drops the programs that are not being compiled yet. If one is, Python waits for it before it exits."""
        self._thread.shutdown(wait=False, cancel_futures=True)


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
        """Starts to compile the function in the background for some batches, keyed by the name of the program."""
        for name, batch in batches.items():
            self._ahead[frozenset(batch.items())] = compiler.submit(name, functools.partial(self._compile, batch))

    @property
    def num_shapes(self) -> int:
        """Number of different shapes that the function was called with."""
        return len(self._used)

    def texts(self) -> list[str]:
        """Returns the HLO text of each program that was called."""
        return [program.as_text() or "" for program in self._used.values()]

    def __call__(self, state: Any, batch: Batch) -> Any:
        """Calls the program for the batch's shape, for which it may have to wait. An unexpected shape is compiled here."""
        arrays = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in batch.items()}
        shape = frozenset(arrays.items())
        if shape not in self._used:
            self._used[shape] = self._ahead[shape].result() if shape in self._ahead else self._compile(arrays)
        return self._used[shape](state, batch)

    def _compile(self, batch: AbstractBatch) -> jax.stages.Compiled:
        return self._lower(batch).compile()
