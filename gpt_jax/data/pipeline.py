"""Makes batches ahead of the step that needs them, with tf.data or with plain threads. Training needs tensorflow here alone.

A batch is a pure function of its step, so neither has any state worth saving: to resume is to start at another step.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import weakref
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from gpt_jax.data.windows import Batch
from gpt_jax.errors import UserError

Kind = Literal["auto", "tf", "threads"]

WORKERS = 4
"""Batches in the making at once. Waiting for the disk or the network overlaps; the index arithmetic holds the interpreter."""

GROUP = 4
"""Batches that tf.data has made at a time: every call from it into Python costs as much as a batch of 64 windows."""

_open: weakref.WeakSet[Generator[tuple[int, Batch], None, None]] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Without this a program that leaves a loop early may never end: tensorflow waits for calls that can no longer run Python."""
    for generator in list(_open):
        generator.close()


def batches(
    batch_at: Callable[[int], Batch], start: int, stop: int, *, kind: Kind, prefetch: int
) -> Generator[tuple[int, Batch], None, None]:
    """Yields (step, batch_at(step)) for steps start, ..., stop - 1 in order, made ahead in other threads.

    `batch_at` is called from several threads at once and may be called up to `prefetch` + (`WORKERS` + 1) x `GROUP` steps beyond
    the step last taken. What it raises is raised here, unchanged, when its step is reached. `close()` ends the threads and waits
    for them.

    Args:
      batch_at: makes the batch of a step.
      start: the first step.
      stop: the step after the last.
      kind: `tf`: tf.data; `threads`: no tensorflow needed; `auto`: `tf` where tensorflow is installed. The batches are equal.
      prefetch: batches kept ready. > 0.

    Raises:
      UserError: `kind` is "tf" and tensorflow is not installed.
    """
    installed = importlib.util.find_spec("tensorflow") is not None
    if kind == "tf" and not installed:
        raise UserError("--data.pipeline: tf needs tensorflow, which is not installed; install tensorflow-cpu or use threads")
    drive = _tf if installed and kind != "threads" else _threads
    generator = drive(batch_at, start, stop, prefetch)
    _open.add(generator)
    return generator


def _threads(batch_at: Callable[[int], Batch], start: int, stop: int, prefetch: int) -> Generator[tuple[int, Batch], None, None]:
    pool = ThreadPoolExecutor(min(prefetch, WORKERS), thread_name_prefix="batches")
    ahead = deque(pool.submit(batch_at, step) for step in range(start, min(start + prefetch, stop)))
    try:
        for step in range(start, stop):
            batch = ahead.popleft().result()
            if step + prefetch < stop:
                ahead.append(pool.submit(batch_at, step + prefetch))
            yield step, batch
    finally:
        pool.shutdown(cancel_futures=True)


def _tf(batch_at: Callable[[int], Batch], start: int, stop: int, prefetch: int) -> Generator[tuple[int, Batch], None, None]:
    """tf.data schedules, orders and prefetches the calls. Only step numbers cross: turning arrays into tensors and back would
    copy every batch twice, bind its names and types in advance, and turn what `batch_at` raises into an error of tensorflow's.
    """
    tf = _tensorflow()
    made: dict[int, Batch | Exception] = {}

    def make(first: Any) -> Any:
        for step in range(int(first), min(int(first) + GROUP, stop)):
            try:
                made[step] = batch_at(step)
            except Exception as error:
                made[step] = error
        return first

    groups = -(-prefetch // GROUP)
    dataset = tf.data.Dataset.range(start, stop, GROUP).map(
        lambda first: tf.numpy_function(make, [first], tf.int64), num_parallel_calls=min(groups + 1, WORKERS), deterministic=True
    )
    options = tf.data.Options()
    options.autotune.enabled = False
    for first in map(int, dataset.prefetch(groups).with_options(options).as_numpy_iterator()):
        for step in range(first, min(first + GROUP, stop)):
            batch = made.pop(step)
            if isinstance(batch, Exception):
                raise batch
            yield step, batch


def _tensorflow() -> Any:
    """Imports tensorflow quietly and keeps it off the GPUs, all of whose memory it would take from JAX."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    return tf
