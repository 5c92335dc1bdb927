"""Makes batches ahead of the step that needs them, with tf.data or with plain threads.

A batch is a pure function of its step, so no state has to be saved: a resumed run simply starts at a later step. Of the modules
that training needs, only this one imports tensorflow, and only when a dataset is made.
"""

import atexit
import contextlib
import importlib.util
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import numpy as np

from gpt_jax.data.windows import ElementSpec, NumpyBatch, Rows
from gpt_jax.errors import UserError, field_error, require

WORKERS = 4
"""Number of batches made at the same time. Only waiting for disk or network overlaps, because index arithmetic holds the
interpreter lock."""


@runtime_checkable
class BatchSource(Protocol):
    """The batches of a run as a function of the step, for example `windows.Windows` or `tasks.batches.TaskBatches`."""

    def batch_at(self, step: int, rows: Rows) -> NumpyBatch:
        """Returns the given rows of the global batch of `step`. It is called from several threads at once."""

    def element_spec(self, num_rows: int) -> ElementSpec:
        """Returns the shape and dtype of each array in a batch of `num_rows` rows; None marks a length that varies."""


DatasetFn = Callable[[BatchSource, int, int, Rows], Any]
"""A function of (source, start_step, end_step, rows) that returns a `tf.data.Dataset`, like `make_dataset`."""


def make_dataset(source: BatchSource, start_step: int, end_step: int, rows: Rows) -> Any:
    """Returns a `tf.data.Dataset` whose elements are this host's batches of steps start_step, ..., end_step - 1, in order.

    Its `element_spec` gives the shapes and dtypes. You can use it like any other dataset: print it, map over it, iterate over it.
    A run stays exact if you map a function over the arrays of each batch. It does not stay exact with `shuffle`, `filter` or
    `repeat`, because a resumed run builds the dataset again from the step at which it resumes.

    Args:
      source: makes the batch of a step.
      start_step: the first step.
      end_step: the step after the last one.
      rows: rows of the global batch that this host needs (`sharding.host_rows`).

    Raises:
      UserError: tensorflow is not installed.
    """
    tf = import_tensorflow()
    spec = source.element_spec(len(rows))
    dtypes = [tf.as_dtype(dtype) for _, dtype in spec.values()]

    def make_batch(step: Any) -> list[np.ndarray]:
        with _called_from_tensorflow(int(step)):
            batch = source.batch_at(int(step), rows)
            return [batch[name] for name in spec]

    def as_tensors(step: Any) -> dict[str, Any]:
        tensors = dict(zip(spec, tf.numpy_function(make_batch, [step], dtypes), strict=True))
        return {name: tf.ensure_shape(tensor, spec[name][0]) for name, tensor in tensors.items()}

    options = tf.data.Options()
    options.autotune.enabled = False
    dataset = tf.data.Dataset.range(start_step, end_step).map(as_tensors, num_parallel_calls=WORKERS, deterministic=True)
    return dataset.with_options(options)


def iterate_batches(
    source: BatchSource, start_step: int, end_step: int, rows: Rows, kind: str, prefetch: int, dataset_fn: DatasetFn | None = None
) -> Generator[NumpyBatch]:
    """Yields this host's batches of steps start_step, ..., end_step - 1 as NumPy arrays, made ahead in other threads.

    An exception that `batch_at` raises is raised here, unchanged, when its step is reached. `close()` ends the threads and waits
    for them.

    Args:
      source, start_step, end_step, rows: as for `make_dataset`.
      kind: `tf`: tf.data; `threads`: without tensorflow; `auto`: `tf` if tensorflow is installed. The batches are equal.
      prefetch: batches kept ready. > 0.
      dataset_fn: makes the dataset instead of `make_dataset`; it needs tensorflow.

    Raises:
      UserError: tensorflow is needed but not installed, or the dataset's elements are not batches.
    """
    require(kind != "threads" or dataset_fn is None, "data.pipeline", "threads cannot run a dataset_fn; use tf")
    if kind == "tf" or dataset_fn is not None or (kind == "auto" and importlib.util.find_spec("tensorflow") is not None):
        return _iterate_dataset(source, start_step, end_step, rows, prefetch, dataset_fn or make_dataset)
    return _iterate_threads(source, start_step, end_step, rows, prefetch)


def _iterate_threads(source: BatchSource, start_step: int, end_step: int, rows: Rows, prefetch: int) -> Generator[NumpyBatch]:
    pool = ThreadPoolExecutor(min(prefetch, WORKERS), thread_name_prefix="batches")
    steps = range(start_step, end_step)
    pending = deque(pool.submit(source.batch_at, step, rows) for step in steps[:prefetch])
    try:
        for step in steps:
            batch = pending.popleft().result()
            if step + prefetch < end_step:
                pending.append(pool.submit(source.batch_at, step + prefetch, rows))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)


def _iterate_dataset(
    source: BatchSource, start_step: int, end_step: int, rows: Rows, prefetch: int, dataset_fn: DatasetFn
) -> Generator[NumpyBatch]:
    tf = import_tensorflow()
    recorder = _ErrorRecorder(source)
    dataset = dataset_fn(recorder, start_step, end_step, rows)
    _check_elements(tf, dataset, source.element_spec(len(rows)))
    iterator = dataset.prefetch(prefetch).as_numpy_iterator()
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except tf.errors.OpError:
            if recorder.errors:  # tensorflow has replaced the error of `batch_at` with one of its own.
                raise recorder.errors[min(recorder.errors)] from None
            raise
        yield batch


class _ErrorRecorder:
    """A source that records the errors that `batch_at` raises, by step."""

    def __init__(self, source: BatchSource):
        self._source = source
        self.element_spec = source.element_spec
        self.errors: dict[int, Exception] = {}

    def batch_at(self, step: int, rows: Rows) -> NumpyBatch:
        try:
            return self._source.batch_at(step, rows)
        except Exception as error:
            self.errors[step] = error
            raise


def _check_elements(tf: Any, dataset: Any, spec: ElementSpec) -> None:
    """Checks that the elements of a dataset, which may come from a user's function, contain every array of a batch."""
    elements = dataset.element_spec
    if not isinstance(elements, dict):
        raise UserError(f"dataset_fn: the elements must be dictionaries with {', '.join(spec)}, not {elements}")
    for name, (shape, dtype) in spec.items():
        wanted = tf.TensorSpec(shape, dtype)
        if name not in elements or not elements[name].is_compatible_with(wanted):
            raise UserError(f"dataset_fn: '{name}' must be {wanted}, not {elements.get(name, 'missing')}")


def import_tensorflow() -> Any:
    """Imports tensorflow quietly and hides accelerators from it, because it would otherwise allocate all of their memory.

    Raises:
      UserError: it is not installed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # It would announce its matrix products, which are not used.
    try:
        import tensorflow as tf
    except ModuleNotFoundError:
        message = "tf needs tensorflow, which is not installed; install tensorflow-cpu or use threads"
        raise field_error("data.pipeline", message) from None
    with contextlib.suppress(RuntimeError):  # The caller has already used tensorflow, and has chosen its devices.
        for kind in ("GPU", "TPU"):
            tf.config.set_visible_devices([], kind)
    return tf


_running: list[int] = []
"""The steps whose batches tf.data's threads are making at this moment."""
_started = 0
_closed = False


@contextlib.contextmanager
def _called_from_tensorflow(step: int) -> Iterator[None]:
    """Counts a call from a thread of tf.data into Python, and raises an error if the interpreter is shutting down."""
    global _started
    _started += 1
    _running.append(step)
    try:
        if _closed:
            raise RuntimeError("the interpreter is shutting down")
        yield
    finally:
        _running.remove(step)


@atexit.register
def _end_calls_from_tensorflow() -> None:
    """Waits until tf.data, whose buffers are bounded, makes no more calls.

    A call after the interpreter has ended would wait forever for the interpreter lock, and the process would wait for the call. A
    program that stops iterating over a dataset before its end would then never exit.
    """
    global _closed
    _closed = True
    seen = 0
    while _running or _started != seen:
        seen = _started
        time.sleep(0.1)
