"""Runs that earlier versions began are continued by this one: store, order of examples, dropout masks, checkpoint, config."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from gpt_jax.cli import main
from gpt_jax.config import MeshConfig
from gpt_jax.data.store import Store
from gpt_jax.runtime.sharding import make_mesh
from gpt_jax.train import checkpoint, checkpoint_info
from gpt_jax.train.step import abstract_state

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ("run_v1", "lstm_v1", "adamw_v1", "finetune_v1", "random_order_v1")

PRETRAIN = ("pretrain", "tests/fixtures/tiny.py", "--data.source", "docs/architecture.md", "--data.pipeline", "threads")
SHORT = ("--data.store", "tests/fixtures/run_v1/store", "--model.context-length", "16", "--model.loss-chunk", "8")
FINETUNE = ("finetune", "tests/fixtures/tiny_finetune.py", "--data.pipeline", "threads")
COMMANDS = {
    "run_v1": PRETRAIN,
    "lstm_v1": (*PRETRAIN, *SHORT, "--model.kind", "lstm", "--model.lstm-units", "16"),
    "adamw_v1": (*PRETRAIN, *SHORT, "--optim.kind", "adamw", "--optim.clip-norm", "0.5", "--train.grad-accum-steps", "2"),
    "finetune_v1": FINETUNE,
    "random_order_v1": (*FINETUNE, "--task.bucket-by-length", "False", "--task.num-length-buckets", "2"),
}
"""The commands that began the runs, with the current names of renamed fields. Paths are relative to the repository. The text of
docs/architecture.md has changed since."""

# Step, loss and gradient norm of the last two updates of the uninterrupted runs, by the version that made the fixtures, with
# jax 0.10.2 on one device of a CPU.
UPDATES = {
    "run_v1": [(7, 4.742159366607666, 1.1913390159606934), (8, 4.741739749908447, 1.0206799507141113)],
    "lstm_v1": [(7, 5.458547592163086, 0.44452133774757385), (8, 5.453320503234863, 0.4217110872268677)],
    "adamw_v1": [(7, 4.825483798980713, 1.24481999874115), (8, 4.825511455535889, 1.1182291507720947)],
    "finetune_v1": [(5, 2.7061853408813477, 2.2869906425476074), (6, 2.800558567047119, 1.524975299835205)],
    "random_order_v1": [(5, 2.7843222618103027, 1.5843311548233032), (6, 2.7082505226135254, 1.8741850852966309)],
}
EVALUATIONS = {"finetune_v1": (6, 0.6280450820922852), "random_order_v1": (6, 0.580278754234314)}


@pytest.fixture
def one_device(monkeypatch):
    """The device that a run uses, as when the fixtures were made; returns its mesh."""
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    return make_mesh(MeshConfig())


def fixture_checkpoint(name):
    [info] = checkpoint_info.list_checkpoints(FIXTURES / name)
    return info


@pytest.mark.parametrize("name", NAMES)
def test_an_old_checkpoint_is_sound(name):
    info = fixture_checkpoint(name)
    assert (info.state, info.problem, info.format_version) == ("sound", "", 1)
    assert checkpoint_info.read_manifest(info)["step"] == info.step == UPDATES[name][0][0] - 1


def test_an_old_store_is_read():
    store = Store.open(FIXTURES / "run_v1" / "store")
    tokens = store.split("train").read(np.zeros(1, np.int64), 30)[0].tolist()
    assert store.tokenizer().decode(tokens) == "# The map of the code, and why"


@pytest.mark.parametrize("name", NAMES)
def test_an_old_run_continues_to_the_same_numbers(name, one_device, tmp_path, monkeypatch, capsys):
    run, old = shutil.copytree(FIXTURES / name, tmp_path / "run"), fixture_checkpoint(name)
    monkeypatch.chdir(FIXTURES.parents[1])
    moved = []
    if name == "lstm_v1":  # The store is somewhere else, and the text is gone.
        store = shutil.copytree(FIXTURES / "run_v1" / "store", tmp_path / "store")
        moved = ["--data.store", str(store), "--data.source", "gone.md"]
    if name == "finetune_v1":  # The run that it started from is gone, and the rows are somewhere else.
        task = shutil.copytree(FIXTURES / "task", tmp_path / "task")
        moved = ["--init.from", "gone", "--task.train", f"{task}/train.tsv", "--task.validation", f"{task}//validation.tsv"]
    assert main([*COMMANDS[name], "--workdir", str(run), *moved]) == 0
    assert f"resuming at step {old.step}" in capsys.readouterr().err

    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    updates = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in updates] == list(range(1, old.step + 3))
    for record, (step, loss, grad_norm) in zip(updates[-2:], UPDATES[name], strict=True):
        assert record["step"] == step
        # Another processor, or fewer of the compiler's optimizations, may round differently.
        assert record["loss"] == pytest.approx(loss, abs=5e-6)
        assert record["grad_norm"] == pytest.approx(grad_norm, rel=1e-4)
    evaluations = [record for record in records if record["kind"] == "eval"]
    if name in EVALUATIONS:
        step, loss = EVALUATIONS[name]
        assert evaluations[-1]["step"] == step
        assert evaluations[-1]["loss"] == pytest.approx(loss, abs=5e-6)

    *_, new = checkpoint_info.list_checkpoints(run)
    assert (new.step, new.state, new.format_version) == (old.step + 2, "sound", 2)
    if name in EVALUATIONS:
        assert new.selection_metric == -evaluations[-1]["accuracy"]
    else:  # Two checkpoints are kept, and the older one is as it was, recorded digests included.
        manifests = [folder / "checkpoints" / str(old.step) / "manifest.json" for folder in (run, FIXTURES / name)]
        assert manifests[0].read_bytes() == manifests[1].read_bytes()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("run_v1", ("--train.seed", "7"), "differs in --train.seed 7 (was 0)"),
        (
            "lstm_v1",
            ("--data.source", "README.md"),
            "the text of --data.source has changed from files 1, bytes 6517 to files 1, ",
        ),
        (
            "finetune_v1",
            ("--init.from", "tests/fixtures/adamw_v1"),
            "run that started from tests/fixtures/run_v1 (checkpoint 6, ",
        ),
        ("finetune_v1", ("--init.from", "none", "--init.like", "tests/fixtures/run_v1"), "but --init.from is random parameters"),
        (
            "finetune_v1",
            ("--task.train", "tests/fixtures/task/validation.tsv"),
            "was trained on different data (digest a96582cb1f1a",
        ),
    ],
)
def test_an_old_run_does_not_continue_with_something_else(name, change, message, one_device, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(FIXTURES / name, tmp_path / "run")
    monkeypatch.chdir(FIXTURES.parents[1])
    assert main([*COMMANDS[name], "--workdir", str(run), *change]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert (run / "metrics.jsonl").read_bytes() == (FIXTURES / name / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(("name", "path"), [("run_v1", ("1",)), ("adamw_v1", ("1", "0"))])
def test_the_moments_of_an_old_checkpoint_are_restored(name, path, one_device):
    """Format version 1 stored Optax's state as `optimizer`, where `path` leads to the moments and a counter of updates."""
    info = fixture_checkpoint(name)
    on_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    stored = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_device), ocp.metadata(info.path).metadata
    )
    stored = ocp.load(info.path, stored)
    optimizer = stored["optimizer"]
    for key in path:
        optimizer = optimizer[key]
    counter = {"run_v1": "step", "adamw_v1": "count"}[name]
    assert set(optimizer) == {"mu", "nu", counter}

    restored = checkpoint.restore(info, abstract_state(checkpoint_info.read_config(info), one_device))
    assert set(restored) == {"params", "moments", "step", "ok"}
    expected = {"params": stored["params"], "moments": {"mu": optimizer["mu"], "nu": optimizer["nu"]}, "ok": stored["ok"]}
    for key, tree in expected.items():
        jax.tree.map(np.testing.assert_array_equal, restored[key], tree)
    for moment in restored["moments"].values():
        assert all(np.any(leaf) for leaf in jax.tree.leaves(moment))
    assert int(restored["step"]) == int(stored["step"]) == int(optimizer[counter]) == 6
