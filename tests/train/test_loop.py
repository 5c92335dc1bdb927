"""The training loop: what it records and saves, in which order, and how it ends when something goes wrong."""

import contextlib
import os
import signal

import jax
import numpy as np
import pytest

from gpt_jax.errors import Preempted, TrainingError
from gpt_jax.runtime import sharding
from gpt_jax.runtime.distributed import StopRequest
from gpt_jax.runtime.rundir import RunDir
from gpt_jax.train import checkpoint
from gpt_jax.train.checkpoint import Checkpoints
from gpt_jax.train.logging import Progress
from gpt_jax.train.loop import Work, train
from gpt_jax.train.optimizer import Horizon
from gpt_jax.train.step import abstract_state, init_state


def random_batch(step):
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, 257, (8, 17), dtype=np.int32)
    weights = np.ones((8, 16), np.float32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": weights,
        "example_id": np.arange(8, dtype=np.int32),
    }


def start(config, folder, *, total=20, state=None, batch_at=random_batch, evaluate=lambda step, params: {}, every=5):
    """Runs the loop in `folder`, evaluating and saving at multiples of `every`; returns what it returns."""
    mesh = sharding.make_mesh(config.mesh)
    work = Work(Horizon(total, 3), every, every, batch_at, evaluate, evidence=lambda index: {"windows": [index]})
    progress = Progress(total, "tokens", 8 * 16, 0.0, 10.0, None, True)
    with contextlib.closing(RunDir(folder)) as run, StopRequest() as stop:
        run.open(config, "")
        with Checkpoints(
            run.checkpoints, keep_latest=100, keep_best=0, config_json="{}", config_digest="", data_digest="", tokenizer=None
        ) as saver:
            return train(config, work, mesh, state or init_state(config, mesh), run, saver, progress, stop)


def records(folder, kind):
    return [record for record in RunDir(folder).records() if record["kind"] == kind]


def saved(folder):
    """Steps of the checkpoints, all of which are sound."""
    infos = checkpoint.inspect(folder)
    assert {info.state for info in infos} <= {"sound"}
    return [info.step for info in infos]


def restore(folder, step, config):
    info = checkpoint.resolve(folder / "checkpoints" / str(step), print)
    return checkpoint.restore(info, abstract_state(config, sharding.make_mesh(config.mesh)))


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_a_run_records_every_update_and_evaluates_before_it_saves(tiny, tmp_path, capsys):
    evaluated = []

    def evaluate(step, params):
        evaluated.append(step)
        assert not (tmp_path / "checkpoints" / str(step)).exists()
        return {"loss": 3.0 + step}

    state, scores = start(tiny(), tmp_path, evaluate=evaluate, every=8)
    assert evaluated == [8, 16, 20]
    assert scores == {"loss": 23.0}
    assert int(state["step"]) == 20
    train_records = records(tmp_path, "train")
    assert [record["step"] for record in train_records] == list(range(1, 21))
    times = [record["time"] for record in train_records]
    assert times == sorted(times)
    for record in train_records:
        assert set(record) == {"kind", "step", "time", "attempt", "loss", "grad_norm", "learning_rate"}
        assert record["attempt"] == 1
    # The rate of update s, counted from 1, is the schedule's at s - 1: nothing in the first update, the peak's share after.
    assert train_records[0]["learning_rate"] == 0
    np.testing.assert_allclose(train_records[1]["learning_rate"], 0.01 / 3, rtol=1e-6)
    assert [(record["step"], record["loss"]) for record in records(tmp_path, "eval")] == [(8, 11.0), (16, 19.0), (20, 23.0)]
    assert saved(tmp_path) == [8, 16, 20]
    assert [info.metrics for info in checkpoint.inspect(tmp_path)] == [{"loss": 11.0}, {"loss": 19.0}, {"loss": 23.0}]
    assert bits(restore(tmp_path, 20, tiny())) == bits(state)
    assert "step 20/20  loss" in capsys.readouterr().err


def test_one_batch_is_learnt_by_heart(tiny, tmp_path):
    config = tiny(
        *("--model.embed-dropout", "0", "--model.attention-dropout", "0", "--model.residual-dropout", "0"),
        *("--optim.schedule", "linear", "--optim.weight-decay", "0"),
    )
    start(config, tmp_path, total=200, batch_at=lambda step: random_batch(0), every=200)
    losses = [record["loss"] for record in records(tmp_path, "train")]
    assert 5.4 < losses[0] < 5.7  # log 257 = 5.55
    assert losses[-1] < 0.05


@pytest.mark.parametrize("bad", [6, 7, 20])
def test_a_bad_update_ends_the_training_with_the_last_good_state(tiny, tmp_path, bad):
    """Update 6 comes right after a save, 7 has a successor in flight when it is noticed, 20 is the last."""

    def batch_at(step):
        batch = random_batch(step)
        return batch | {"loss_weights": batch["loss_weights"] * np.float32("nan")} if step == bad - 1 else batch

    config = tiny()
    with pytest.raises(TrainingError, match=rf"update {bad} is not finite \(loss nan.*checkpoint {bad - 1},"):
        start(config, tmp_path, batch_at=batch_at, evaluate=lambda step, params: {"loss": 2.0})
    assert [record["step"] for record in records(tmp_path, "train")] == list(range(1, bad))
    (event,) = records(tmp_path, "event")
    assert (event["step"], event["event"], event["loss"], event["windows"]) == (bad, "non-finite", "nan", [bad - 1])
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()  # which is not JSON

    assert saved(tmp_path)[-1] == bad - 1
    good = restore(tmp_path, bad - 1, config)
    assert good["ok"]
    assert good["step"] == bad - 1
    assert checkpoint.inspect(tmp_path)[0].metrics == {"loss": 2.0}


def test_records_are_on_the_disk_before_the_checkpoint_of_their_step_is_sealed(tiny, tmp_path, monkeypatch):
    """Or a machine that is taken away would leave a checkpoint without its history. The last save is that of a bad update."""
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
        start(tiny(), tmp_path, batch_at=batch_at, evaluate=lambda step, params: {"loss": 2.0})
    assert [step for step, _ in sealed] == [5, 10, 12]
    for step, seen in sealed:
        assert {("train", update) for update in range(1, step + 1)} <= set(seen)
        assert ("eval", step // 5 * 5) in seen


def test_sigterm_ends_the_training_after_an_update_with_its_state_saved(tiny, tmp_path):
    def evaluate(step, params):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    config = tiny()
    expected, _ = start(config, tmp_path / "whole")
    with pytest.raises(Preempted, match="saved at step 5 of 20"):
        start(config, tmp_path / "cut", evaluate=evaluate, every=4)
    assert saved(tmp_path / "cut") == [4, 5]
    assert [record["step"] for record in records(tmp_path / "cut", "train")] == [1, 2, 3, 4, 5]
    assert [record["event"] for record in records(tmp_path / "cut", "event")] == ["preempted"]
    state, _ = start(config, tmp_path / "cut", state=restore(tmp_path / "cut", 5, config))
    assert bits(state) == bits(expected)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_sigterm_at_the_last_update_finishes_the_run(tiny, tmp_path):
    def evaluate(step, params):
        os.kill(os.getpid(), signal.SIGTERM)
        return {"loss": 1.0}

    state, scores = start(tiny(), tmp_path, evaluate=evaluate, every=20)
    assert int(state["step"]) == 20
    assert scores == {"loss": 1.0}


def test_what_making_a_batch_raises_reaches_the_caller(tiny, tmp_path):
    def batch_at(step):
        if step == 6:
            raise OSError(5, "Input/output error", "shard")
        return random_batch(step)

    with pytest.raises(OSError, match="Input/output error"):
        start(tiny(), tmp_path, batch_at=batch_at)
    assert saved(tmp_path) == [5]
