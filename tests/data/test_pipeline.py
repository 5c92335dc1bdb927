"""The pipeline: a real tf.data.Dataset, equal batches from threads, errors as they were raised, no thread left behind."""

import contextlib
import importlib.util
import itertools
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from gpt_jax.data import pipeline
from gpt_jax.data.pipeline import WORKERS, iterate_batches, make_dataset
from gpt_jax.data.windows import Windows
from gpt_jax.errors import UserError

needs_tensorflow = pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="tensorflow is not installed")
both_kinds = pytest.mark.parametrize("kind", ["threads", pytest.param("tf", marks=needs_tensorflow)])
ROWS = np.array([1, 4])


class RandomTokens:
    """A thousand tokens, all different."""

    num_tokens = 1000
    values = np.random.default_rng(0).permutation(1000).astype(np.int32)

    def read(self, starts, length):
        return self.values[starts[:, None] + np.arange(length)]


class Numbers:
    """A source whose batch of a step holds the step, in rows of varying length; `act` is called first."""

    def __init__(self, act=lambda step: None):
        self.act = act

    def batch_at(self, step, rows):
        self.act(step)
        return {"step": np.full((len(rows), step % 3 + 1), step, np.int32), "half": np.array([step / 2], np.float64)}

    def element_spec(self, num_rows):
        return {"step": ((num_rows, None), np.dtype(np.int32)), "half": ((1,), np.dtype(np.float64))}


def steps_of(batches):
    return [int(batch["step"][0, 0]) for batch in batches]


def run_python(code):
    """Runs a program of its own, since imports and exits are under test."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.fixture
def windows():
    return Windows(RandomTokens(), 8, 6, seed=3)


# -- the dataset ------------------------------------------------------------------------------------------------------------


@needs_tensorflow
def test_the_dataset_names_its_shapes_and_dtypes(windows):
    spec = make_dataset(windows, 0, 5, ROWS).element_spec
    assert {name: (tuple(each.shape), each.dtype.name) for name, each in spec.items()} == {
        "tokens": ((2, 8), "int32"),
        "targets": ((2, 8), "int32"),
        "loss_weights": ((2, 8), "float32"),
        "example_id": ((2,), "int32"),
    }
    assert tuple(make_dataset(Numbers(), 0, 5, ROWS).element_spec["step"].shape) == (2, None)


@needs_tensorflow
def test_the_dataset_is_mapped_batched_and_cut_like_any_other(windows):
    dataset = make_dataset(windows, 37, 90, ROWS)
    assert len(list(dataset)) == 53
    tokens = dataset.map(lambda batch: batch["tokens"] + 1).skip(2).take(3).batch(3)
    (stacked,) = tokens.as_numpy_iterator()
    expected = np.stack([windows.batch_at(step, ROWS)["tokens"] + 1 for step in (39, 40, 41)])
    np.testing.assert_array_equal(stacked, expected)


@needs_tensorflow
def test_a_dataset_fn_changes_the_batches_and_its_elements_are_checked(windows):
    def reversed_time(source, start_step, end_step, rows):
        dataset = make_dataset(source, start_step, end_step, rows)
        return dataset.map(lambda batch: {name: x[:, ::-1] if len(x.shape) == 2 else x for name, x in batch.items()})

    batches = list(iterate_batches(windows, 5, 8, ROWS, kind="auto", prefetch=2, dataset_fn=reversed_time))
    for step, batch in enumerate(batches, start=5):
        np.testing.assert_array_equal(batch["tokens"], windows.batch_at(step, ROWS)["tokens"][:, ::-1])

    def without_targets(*arguments):
        return make_dataset(*arguments).map(lambda batch: {name: x for name, x in batch.items() if name != "targets"})

    def as_tuple(*arguments):
        return make_dataset(*arguments).map(lambda batch: (batch["tokens"], batch["targets"]))

    def as_floats(*arguments):
        return make_dataset(*arguments).map(lambda batch: batch | {"tokens": batch["loss_weights"]})

    for dataset_fn, message in (
        (without_targets, r"^dataset_fn: 'targets' must be TensorSpec\(shape=\(2, 8\)[^\n]*not missing$"),
        (as_tuple, r"^dataset_fn: the elements must be dictionaries with tokens, targets, [^\n]*$"),
        (as_floats, r"^dataset_fn: 'tokens' must be [^\n]*int32[^\n]*, not [^\n]*float32[^\n]*$"),
    ):
        with pytest.raises(UserError, match=message):
            next(iterate_batches(windows, 0, 3, ROWS, kind="tf", prefetch=2, dataset_fn=dataset_fn))
    with pytest.raises(UserError, match=r"^--data.pipeline: threads cannot run a dataset_fn; use tf$"):
        iterate_batches(windows, 0, 3, ROWS, kind="threads", prefetch=2, dataset_fn=reversed_time)


# -- iterating --------------------------------------------------------------------------------------------------------------


@needs_tensorflow
def test_tf_and_threads_give_the_same_batches(windows):
    streams = [list(iterate_batches(windows, 37, 90, ROWS, kind=kind, prefetch=3)) for kind in ("tf", "threads")]
    assert [len(stream) for stream in streams] == [53, 53]
    for step, batches in enumerate(zip(*streams, strict=True), start=37):
        expected = windows.batch_at(step, ROWS)
        for batch in batches:
            assert batch.keys() == expected.keys()
            for name, array in expected.items():
                assert isinstance(batch[name], np.ndarray)
                assert batch[name].dtype == array.dtype
                np.testing.assert_array_equal(batch[name], array)


@both_kinds
def test_batches_of_varying_length_come_in_order_however_long_each_takes(kind):
    source = Numbers(lambda step: time.sleep(0.01 if step % 4 == 0 else 0))
    batches = list(iterate_batches(source, 0, 25, ROWS, kind=kind, prefetch=4))
    assert steps_of(batches) == list(range(25))
    assert [batch["step"].shape for batch in batches[:4]] == [(2, 1), (2, 2), (2, 3), (2, 1)]
    assert batches[7]["half"] == 3.5
    assert list(iterate_batches(source, 25, 25, ROWS, kind=kind, prefetch=4)) == []


@both_kinds
def test_an_error_reaches_the_consumer_unchanged_at_its_step(kind):
    error = UserError("shard 3 is damaged; prepare the store again")

    def fail(step):
        if step >= 5:
            raise error if step == 5 else ValueError("a later step's error must not overtake")

    stream = iterate_batches(Numbers(fail), 2, 20, ROWS, kind=kind, prefetch=4)
    assert steps_of(itertools.islice(stream, 3)) == [2, 3, 4]
    with pytest.raises(UserError) as raised:
        next(stream)
    assert raised.value is error


@both_kinds
def test_work_ahead_is_bounded(kind):
    made = []
    with contextlib.closing(iterate_batches(Numbers(made.append), 0, 1000, ROWS, kind=kind, prefetch=3)) as stream:
        next(stream)
        deadline = time.monotonic() + 30
        while len(made) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert 4 <= len(made) <= 1 + 3 + 2 * WORKERS + 1


@both_kinds
def test_close_stops_the_work_and_its_threads(kind):
    made = []

    def act(step):
        time.sleep(0.02)
        made.append(step)

    before = threading.active_count()
    stream = iterate_batches(Numbers(act), 0, 1000, ROWS, kind=kind, prefetch=4)
    next(stream)
    stream.close()
    count = len(made)
    time.sleep(0.1)
    assert len(made) == count < 20
    assert threading.active_count() == before


@pytest.mark.parametrize(
    "batches",
    [
        "iterate_batches(Slow(), 0, 1000, np.arange(1), kind='threads', prefetch=4)",
        pytest.param("iterate_batches(Slow(), 0, 1000, np.arange(1), kind='tf', prefetch=4)", marks=needs_tensorflow),
        pytest.param("make_dataset(Slow(), 0, 1000, np.arange(1)).prefetch(4)", marks=needs_tensorflow),
    ],
)
def test_a_program_that_leaves_the_loop_by_an_error_ends(batches):
    result = run_python(f"""
import time
import numpy as np
from gpt_jax.data.pipeline import iterate_batches, make_dataset

class Slow:
    def batch_at(self, step, rows):
        time.sleep(0.05)
        return {{"step": np.array([step])}}
    def element_spec(self, num_rows):
        return {{"step": ((1,), np.dtype(np.int64))}}

batches = iter({batches})
for batch in batches:
    raise SystemExit(42)
""")
    assert result.returncode == 42, result.stderr


# -- tensorflow -------------------------------------------------------------------------------------------------------------


def test_threads_and_windows_do_not_import_tensorflow_or_jax():
    result = run_python("""
import sys
import numpy as np
from gpt_jax.data.pipeline import iterate_batches
from gpt_jax.data.windows import Windows

class Zeros:
    num_tokens = 100
    def read(self, starts, length):
        return np.zeros((len(starts), length), np.int32)

batches = iterate_batches(Windows(Zeros(), 8, 4, 0), 5, 9, np.arange(4), kind="threads", prefetch=2)
print(len(list(batches)), sorted({"tensorflow", "jax", "flax"} & sys.modules.keys()))
""")
    assert result.stdout == "4 []\n", result.stderr


def test_without_tensorflow_auto_uses_threads_and_tf_gets_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert steps_of(iterate_batches(Numbers(), 0, 3, ROWS, kind="auto", prefetch=2)) == [0, 1, 2]
    with pytest.raises(UserError, match=r"^--data.pipeline: [^\n]*tensorflow[^\n]*$"):
        next(iterate_batches(Numbers(), 0, 3, ROWS, kind="tf", prefetch=2))


@needs_tensorflow
def test_auto_uses_tf_where_it_is_installed_and_hides_accelerators_from_it(monkeypatch):
    import tensorflow as tf

    hidden = []
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda devices, kind: hidden.append((devices, kind)))
    monkeypatch.setattr(pipeline, "_iterate_threads", lambda *_: pytest.fail("threads were used"))
    assert steps_of(iterate_batches(Numbers(), 0, 3, ROWS, kind="auto", prefetch=2)) == [0, 1, 2]
    assert set(map(str, hidden)) == {"([], 'GPU')", "([], 'TPU')"}
