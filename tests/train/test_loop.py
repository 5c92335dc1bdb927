"""The training loop: what it records and saves, in which order, and how it ends when something goes wrong."""

import contextlib
import os
import signal
import threading

import jax
import numpy as np
import pytest

from gpt_jax.config import MeshConfig
from gpt_jax.data.pipeline import iterate_batches
from gpt_jax.errors import Preempted, TrainingError, UserError
from gpt_jax.runtime import sharding
from gpt_jax.runtime.console import say
from gpt_jax.runtime.distributed import StopRequest
from gpt_jax.runtime.rundir import RunDir
from gpt_jax.train import checkpoint, checkpoint_info
from gpt_jax.train.checkpoint import CheckpointWriter
from gpt_jax.train.compilation import BackgroundCompiler, CompiledByShape
from gpt_jax.train.logging import ProgressLogger
from gpt_jax.train.loop import RunContext, Scores, train_loop
from gpt_jax.train.schedule import Schedule
from gpt_jax.train.step import abstract_state, init_state, lower_step

LENGTH = 16


@pytest.fixture(scope="module")
def config(tiny):
    """A transformer of one block whose checkpoints are all kept."""
    return tiny(model={"context_length": LENGTH, "num_layers": 1}, train={"keep_latest": 100, "log_seconds": 0.001})


def one_device():
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def random_batch(step):
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, 257, (8, LENGTH + 1), dtype=np.int32)
    weights = np.ones((8, LENGTH), np.float32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": weights,
        "example_id": np.arange(8, dtype=np.int32),
    }


class Source:
    """A source whose batches are a function of the step."""

    def __init__(self, batch_of_step):
        self.batch_of_step = batch_of_step

    def batch_at(self, step, rows):
        return self.batch_of_step(step)


def start(config, folder, *, total=20, end=None, state=None, batch_at=random_batch, scores=lambda step: {}, every=5, update=None):
    """Runs the loop in `folder`, evaluating and saving at multiples of `every`; returns the loop's result.

    Args:
      end: the number of batches in the whole run, if it is not `total`.
      scores: step -> the scores of an evaluation, whose "loss" is the selection metric.
      update: the update, if it is not compiled when it is used.
    """
    mesh = one_device()
    state = state or init_state(config, mesh)
    update = update or CompiledByShape(lambda batch: lower_step(config, mesh, total_steps=total, warmup_steps=3.0, batch=batch))

    def evaluate(step, params):
        metrics = scores(step)
        return Scores(metrics, metrics.get("loss"))

    with contextlib.ExitStack() as stack:
        run = stack.enter_context(contextlib.closing(RunDir(folder)))
        compiler = stack.enter_context(contextlib.closing(BackgroundCompiler(say)))
        ctx = RunContext(run, stack.enter_context(StopRequest()), say, compiler)
        run.open(config, "")
        progress = ProgressLogger(config, mesh, total, "tokens", run.tensorboard, say)
        batches = iterate_batches(Source(batch_at), int(state["step"]), end or total, np.arange(8), kind="threads", prefetch=2)
        stack.enter_context(contextlib.closing(batches))
        return train_loop(
            ctx,
            config,
            mesh,
            update,
            Schedule(total, 3.0, every, every),
            state,
            batches,
            evaluate,
            lambda step: {"windows": [step]},
            stack.enter_context(CheckpointWriter(run.checkpoints, config, "", None)),
            progress,
        )


def records(folder, kind):
    return [record for record in RunDir(folder).records() if record["kind"] == kind]


def saved(folder):
    """Returns the steps of the checkpoints, all of which must be sound."""
    infos = checkpoint_info.list_checkpoints(folder)
    assert {info.state for info in infos} <= {"sound"}
    return [info.step for info in infos]


def restore(folder, step, config):
    info = checkpoint_info.find_checkpoint(folder / "checkpoints" / str(step), print)
    return checkpoint.restore(info, abstract_state(config, one_device()))


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_a_run_records_every_update_and_evaluates_before_it_saves(config, tmp_path, capsys):
    evaluated = []

    def scores(step):
        evaluated.append(step)
        assert not (tmp_path / "checkpoints" / str(step)).exists()
        return {"loss": 3.0 + step, "perplexity": 2.0}

    state, last_scores = start(config, tmp_path, scores=scores, every=8)
    assert evaluated == [8, 16, 20]
    assert last_scores == Scores({"loss": 23.0, "perplexity": 2.0}, 23.0)
    assert int(state["step"]) == 20
    train_records = records(tmp_path, "train")
    assert [record["step"] for record in train_records] == list(range(1, 21))
    times = [record["time"] for record in train_records]
    assert times == sorted(times)
    for record in train_records:
        assert set(record) == {"kind", "step", "time", "attempt", "loss", "grad_norm", "learning_rate"}
        assert record["attempt"] == 1
    # The rate of update s, counted from 1, is the schedule's at s - 1: 0 in the first update, a third of the peak in the next.
    assert train_records[0]["learning_rate"] == 0
    np.testing.assert_allclose(train_records[1]["learning_rate"], 0.01 / 3, rtol=1e-6)
    assert [(record["step"], record["loss"]) for record in records(tmp_path, "eval")] == [(8, 11.0), (16, 19.0), (20, 23.0)]
    assert saved(tmp_path) == [8, 16, 20]
    for info in checkpoint_info.list_checkpoints(tmp_path):
        assert (info.metrics, info.selection_metric) == ({"loss": 3.0 + info.step, "perplexity": 2.0}, 3.0 + info.step)
    assert bits(restore(tmp_path, 20, config)) == bits(state)
    assert "step 20/20  loss" in capsys.readouterr().err


def test_one_batch_is_memorized(tiny, tmp_path):
    no_dropout = {"embed_dropout": 0.0, "attention_dropout": 0.0, "residual_dropout": 0.0}
    config = tiny(
        model=no_dropout | {"context_length": LENGTH, "num_layers": 1},
        optim={"schedule": "linear", "weight_decay": 0.0, "peak_lr": 0.01},
    )
    start(config, tmp_path, total=200, batch_at=lambda step: random_batch(0), every=200)
    losses = [record["loss"] for record in records(tmp_path, "train")]
    assert 5.4 < losses[0] < 5.7  # log 257 = 5.55
    assert losses[-1] < 0.05


@pytest.mark.parametrize("bad", [1, 6, 7, 20])
def test_a_bad_update_ends_the_training_with_the_last_good_state(config, tmp_path, bad):
    """Update 1 has no checkpoint before it, 6 comes right after a save, 7 shows after 8 is dispatched, and 20 is last."""

    def batch_at(step):
        batch = random_batch(step)
        return batch | {"loss_weights": batch["loss_weights"] * np.float32("nan")} if step == bad - 1 else batch

    with pytest.raises(TrainingError, match=rf"update {bad} is not finite \(loss nan.*checkpoint {bad - 1},"):
        start(config, tmp_path, batch_at=batch_at, scores=lambda step: {"loss": 2.0})
    assert [record["step"] for record in records(tmp_path, "train")] == list(range(1, bad))
    (event,) = records(tmp_path, "event")
    assert (event["step"], event["event"], event["loss"], event["windows"]) == (bad, "non-finite", "nan", [bad - 1])
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()  # JSON has no NaN.

    assert saved(tmp_path)[-1] == bad - 1
    good = restore(tmp_path, bad - 1, config)
    assert good["ok"]
    assert good["step"] == bad - 1
    for info in checkpoint_info.list_checkpoints(tmp_path):
        scored = info.step in (5, 10, 15)
        assert (info.metrics, info.selection_metric) == (({"loss": 2.0}, 2.0) if scored else ({}, None))


def test_records_are_on_the_disk_before_the_checkpoint_of_their_step_is_sealed(config, tmp_path, monkeypatch):
    """Otherwise a preempted machine could leave a checkpoint without its history. A bad update triggers the last save."""
    file, durable, sealed = tmp_path / "metrics.jsonl", [], []
    fsync, seal = os.fsync, checkpoint._seal

    def note_sync(descriptor):
        fsync(descriptor)
        if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
            durable[:] = [(record["kind"], record["step"]) for record in RunDir(tmp_path).records()]

    def note_seal(path, manifest):
        sealed.append((manifest["step"], list(durable)))
        seal(path, manifest)

    def batch_at(step):
        batch = random_batch(step)
        return batch | {"loss_weights": batch["loss_weights"] * np.float32("nan")} if step == 12 else batch

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(checkpoint, "_seal", note_seal)
    with pytest.raises(TrainingError):
        start(config, tmp_path, batch_at=batch_at, scores=lambda step: {"loss": 2.0})
    assert [step for step, _ in sealed] == [5, 10, 12]
    for step, seen in sealed:
        assert {("train", update) for update in range(1, step + 1)} <= set(seen)
        assert ("eval", step // 5 * 5) in seen


def test_sigterm_ends_the_training_after_an_update_with_its_state_saved(config, tmp_path):
    def scores(step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    expected, _ = start(config, tmp_path / "whole")
    with pytest.raises(Preempted, match="saved at step 5 of 20"):
        start(config, tmp_path / "cut", scores=scores, every=4)
    assert saved(tmp_path / "cut") == [4, 5]
    assert [record["step"] for record in records(tmp_path / "cut", "train")] == [1, 2, 3, 4, 5]
    assert [record["event"] for record in records(tmp_path / "cut", "event")] == ["preempted"]
    state, _ = start(config, tmp_path / "cut", state=restore(tmp_path / "cut", 5, config))
    assert bits(state) == bits(expected)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_sigterm_while_a_program_is_compiled_saves_the_state_at_once(config, tmp_path):
    mesh, may_end = one_device(), threading.Event()

    def batch_at(step):
        batch = random_batch(step)
        return batch if step < 3 else {name: array[:, :8] if array.ndim == 2 else array for name, array in batch.items()}

    def lower(batch):
        assert batch["tokens"].shape[1] == LENGTH or may_end.wait(60)
        return lower_step(config, mesh, total_steps=20, warmup_steps=3.0, batch=batch)

    class Update(CompiledByShape):
        def wait(self, batch, stopped):
            if batch["tokens"].shape[1] == 8:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().wait(batch, stopped)

    update = Update(lower)
    shapes = [sharding.place_batch(mesh, batch_at(step), 8) for step in (0, 3)]
    abstract = [
        {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in shape.items()} for shape in shapes
    ]
    expected, _ = start(config, tmp_path / "whole", batch_at=batch_at)
    with contextlib.closing(BackgroundCompiler(say)) as compiler, StopRequest():
        update.compile_ahead(compiler, dict(zip(("long", "short"), abstract, strict=True)))
        with pytest.raises(Preempted, match="saved at step 3 of 20"):
            start(config, tmp_path / "cut", batch_at=batch_at, update=update)
        may_end.set()
    assert saved(tmp_path / "cut") == [3]
    assert [record["step"] for record in records(tmp_path / "cut", "train")] == [1, 2, 3]
    state, _ = start(config, tmp_path / "cut", batch_at=batch_at, state=restore(tmp_path / "cut", 3, config))
    assert bits(state) == bits(expected)


def test_sigterm_at_the_last_update_finishes_the_run(config, tmp_path):
    def scores(step):
        os.kill(os.getpid(), signal.SIGTERM)
        return {"loss": 1.0}

    state, last_scores = start(config, tmp_path, scores=scores, every=20)
    assert int(state["step"]) == 20
    assert last_scores == Scores({"loss": 1.0}, 1.0)


def test_an_error_in_making_a_batch_reaches_the_caller(config, tmp_path):
    def batch_at(step):
        if step == 6:
            raise OSError(5, "Input/output error", "shard")
        return random_batch(step)

    with pytest.raises(OSError, match="Input/output error"):
        start(config, tmp_path, batch_at=batch_at)
    assert saved(tmp_path) == [5]


def test_batches_that_end_early_are_an_error(config, tmp_path):
    with pytest.raises(UserError, match=r"dataset.fn: the dataset ended after step 7 of 20$"):
        start(config, tmp_path, end=7)
    assert [record["step"] for record in records(tmp_path, "train")] == [1, 2, 3, 4, 5, 6]
    assert saved(tmp_path) == [5]
