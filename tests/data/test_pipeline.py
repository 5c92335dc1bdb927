"""The pipeline: the same batches in the same order from tf.data and from threads, errors as they were raised, no thread left."""

import contextlib
import importlib.util
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from gpt_jax.data import pipeline
from gpt_jax.data.pipeline import GROUP, WORKERS, batches
from gpt_jax.data.windows import Windows
from gpt_jax.errors import UserError

NO_TENSORFLOW = importlib.util.find_spec("tensorflow") is None
needs_tensorflow = pytest.mark.skipif(NO_TENSORFLOW, reason="tensorflow is not installed")
both_kinds = pytest.mark.parametrize("kind", ["threads", pytest.param("tf", marks=needs_tensorflow)])


class RandomTokens:
    """A thousand tokens, all different."""

    num_tokens = 1000
    values = np.random.default_rng(0).permutation(1000).astype(np.int32)

    def read(self, starts, length):
        return self.values[starts[:, None] + np.arange(length)]


def run_python(code):
    """Runs a program of its own, since imports and exits are what it is about."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@needs_tensorflow
def test_tf_and_threads_give_the_same_batches():
    windows = Windows(RandomTokens(), 8, 6, seed=3)
    rows = np.array([1, 4])
    streams = {
        kind: dict(batches(lambda step: windows.batch_at(step, rows), 37, 90, kind=kind, prefetch=3))
        for kind in ("tf", "threads")
    }
    assert list(streams["tf"]) == list(streams["threads"]) == list(range(37, 90))
    for step in range(37, 90):
        expected = windows.batch_at(step, rows)
        for stream in streams.values():
            assert stream[step].keys() == expected.keys()
            for name, array in expected.items():
                assert stream[step][name].dtype == array.dtype
                np.testing.assert_array_equal(stream[step][name], array)


@both_kinds
def test_batches_of_any_shape_come_in_order_however_long_each_takes(kind):
    def batch_at(step):
        time.sleep(0.01 if step % 4 == 0 else 0)
        return {"choices": np.full((step, 2), step), "label": np.array([step / 2], np.float64)}

    for count, (step, batch) in enumerate(batches(batch_at, 0, 25, kind=kind, prefetch=4)):
        assert step == count
        np.testing.assert_array_equal(batch["choices"], np.full((step, 2), step))
        assert batch["label"] == step / 2
    assert count == 24
    assert list(batches(batch_at, 25, 25, kind=kind, prefetch=4)) == []


@both_kinds
def test_error_reaches_the_consumer_unchanged_at_its_step(kind):
    error = UserError("shard 3 is damaged; prepare the store again")

    def batch_at(step):
        if step >= 5:
            raise error if step == 5 else ValueError("a later step's error must not overtake")
        return {}

    stream = batches(batch_at, 2, 20, kind=kind, prefetch=4)
    assert [next(stream)[0] for _ in range(3)] == [2, 3, 4]
    with pytest.raises(UserError) as raised:
        next(stream)
    assert raised.value is error


@both_kinds
def test_works_ahead_but_not_without_bound(kind):
    made = []

    def batch_at(step):
        made.append(step)
        return {}

    with contextlib.closing(batches(batch_at, 0, 1000, kind=kind, prefetch=3)) as stream:
        next(stream)
        deadline = time.monotonic() + 30
        while len(made) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert 4 <= len(made) <= 1 + 3 + (WORKERS + 1) * GROUP


@both_kinds
def test_close_stops_the_work_and_its_threads(kind):
    made = []

    def batch_at(step):
        time.sleep(0.02)
        made.append(step)
        return {}

    before = threading.active_count()
    stream = batches(batch_at, 0, 1000, kind=kind, prefetch=4)
    next(stream)
    stream.close()
    count = len(made)
    time.sleep(0.1)
    assert len(made) == count < 20
    assert threading.active_count() == before


@both_kinds
def test_program_that_leaves_the_loop_by_an_error_ends(kind):
    result = run_python(f"""
import time
from gpt_jax.data.pipeline import batches

def batch_at(step):
    time.sleep(0.05)
    return {{}}

stream = batches(batch_at, 0, 1000, kind="{kind}", prefetch=4)
for step, batch in stream:
    raise SystemExit(42)
""")
    assert result.returncode == 42, result.stderr


def test_threads_and_windows_do_not_import_tensorflow_or_jax():
    result = run_python("""
import sys
import numpy as np
from gpt_jax.data.pipeline import batches
from gpt_jax.data.windows import Windows

class Zeros:
    num_tokens = 100
    def read(self, starts, length):
        return np.zeros((len(starts), length), np.int32)

windows = Windows(Zeros(), 8, 4, 0)
steps = [step for step, _ in batches(lambda step: windows.batch_at(step, np.arange(4)), 5, 9, kind="threads", prefetch=2)]
print(steps, sorted({"tensorflow", "jax", "flax"} & sys.modules.keys()))
""")
    assert result.stdout == "[5, 6, 7, 8] []\n", result.stderr


def test_without_tensorflow_auto_uses_threads_and_tf_says_what_to_do(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(pipeline, "_tensorflow", lambda: pytest.fail("tensorflow was asked for"))
    assert [step for step, _ in batches(lambda step: {}, 0, 3, kind="auto", prefetch=2)] == [0, 1, 2]
    with pytest.raises(UserError, match=r"^--data.pipeline: [^\n]*tensorflow[^\n]*$"):
        batches(lambda step: {}, 0, 3, kind="tf", prefetch=2)


@needs_tensorflow
def test_auto_uses_tf_where_it_is_installed_and_keeps_it_off_the_gpus(monkeypatch):
    import tensorflow as tf

    hidden = []
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda devices, kind: hidden.append((devices, kind)))
    assert [step for step, _ in batches(lambda step: {}, 0, 3, kind="auto", prefetch=2)] == [0, 1, 2]
    assert hidden == [([], "GPU")]
