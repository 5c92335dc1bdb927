"""Checkpoints survive kills, full disks, flipped bits, other meshes and old formats."""

import base64
import dataclasses
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from gpt_jax.config import PretrainConfig, TrainConfig
from gpt_jax.config.load import config_digest
from gpt_jax.errors import UserError
from gpt_jax.train import checkpoint, checkpoint_info
from gpt_jax.train.checkpoint import CheckpointWriter

CONFIG = PretrainConfig(train=TrainConfig(seed=3))


def values(step):
    """Returns the state of a step, a function of the step alone, so that any process can check a checkpoint's values."""
    matrix = np.arange(32, dtype=np.float32).reshape(8, 4) * np.float32(step + 0.5)
    return {"params": {"block": {"kernel": matrix, "bias": matrix[0]}}, "moments": {"kernel": -matrix}, "step": np.int32(step)}


def state(step):
    return jax.tree.map(jnp.asarray, values(step))


def abstract(tree):
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), tree)


def open_writer(run, keep_latest=2, keep_best=0, tokenizer=None):
    train = dataclasses.replace(CONFIG.train, keep_latest=keep_latest, keep_best=keep_best)
    return CheckpointWriter(run / "checkpoints", dataclasses.replace(CONFIG, train=train), "d0", tokenizer)


def save(run, *steps, **options):
    with open_writer(run, **options) as writer:
        for step in steps:
            writer.save(step, state(step), {})


def step_names(run):
    """Returns the names of everything in the folder of checkpoints, by ascending step."""
    return sorted((path.name for path in (run / "checkpoints").iterdir()), key=lambda name: (len(name), name))


def states(run, **options):
    return [(info.step, info.state) for info in checkpoint_info.list_checkpoints(run, **options)]


def assert_holds(info, step):
    """Checks that the checkpoint holds exactly the state of `step`."""
    restored = checkpoint.restore(info, abstract(state(step)))
    jax.tree.map(np.testing.assert_array_equal, restored, values(step))
    assert jax.tree.map(lambda array: array.dtype, restored) == jax.tree.map(lambda array: array.dtype, values(step))


def fail(line):
    raise AssertionError(f"nothing should have been logged, but: {line}")


def ignore(line):
    pass


def flip(file):
    """Changes one bit of one byte in the middle of a file, or gives an empty file one byte."""
    data = bytearray(file.read_bytes() or b"\x01")
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def spawn(scene, *arguments, prefix=(), **environment):
    """Starts one of this file's functions in a Python process of its own."""
    command = [*prefix, sys.executable, __file__, scene.__name__, *map(str, arguments)]
    defaults = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment = os.environ | defaults | environment
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, env=environment)


def finish(process):
    """Waits for a process to end with exit code 0; returns what it printed."""
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, out + err
    return out, err


class Crash(BaseException):
    """Simulates the death of the process at this point."""


def crash(*_):
    raise Crash


def crash_before_seal(run, step, monkeypatch, **options):
    """Leaves the folder of `step` as a kill between Orbax's commit and the manifest would."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_seal", crash)
        with pytest.raises(Crash):
            save(run, step, **options)


# -- what is written --------------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_state_config_tokenizer_and_metrics(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.txt").write_text("a b c")
    with open_writer(tmp_path, tokenizer=tmp_path / "tokenizer") as writer:
        writer.save(40, state(40), {"loss": 2.5, "accuracy": 0.75}, -0.75)
    info = checkpoint_info.find_checkpoint(tmp_path, fail)
    assert (info.step, info.state, info.problem, info.path) == (40, "sound", "", tmp_path / "checkpoints" / "40")
    assert (info.metrics, info.selection_metric) == ({"loss": 2.5, "accuracy": 0.75}, -0.75)
    assert info.size == sum(file.stat().st_size for file in info.path.rglob("*") if file.is_file())
    assert_holds(info, 40)
    assert checkpoint_info.read_config(info) == dataclasses.replace(CONFIG, train=TrainConfig(seed=3, keep_latest=2, keep_best=0))
    assert (info.path / "tokenizer" / "vocab.txt").read_text() == "a b c"


def test_the_manifest_lists_every_file(tmp_path):
    save(tmp_path, 40)
    folder = tmp_path / "checkpoints" / "40"
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    del files["manifest.json"]
    assert manifest["files"] == {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
    }
    own = manifest.pop("sha256")
    assert own == hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    del manifest["files"]
    assert manifest == {
        "format_version": 2,
        "step": 40,
        "config_digest": config_digest(CONFIG),
        "config_digest_version": 2,
        "data_digest": "d0",
        "mask_version": 1,
        "permutation_version": 1,
        "metrics": {},
        "selection_metric": None,
        "process_count": 1,
        "device_count": jax.device_count(),
        "device_kind": jax.devices()[0].device_kind,
    }


def test_saved_values_are_those_at_the_call_although_the_buffers_are_donated(tmp_path):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda array: array * 0 - 1, tree), donate_argnums=0)
    ramp = np.arange(2_000_000, dtype=np.float32)
    overwrite({"a": jnp.array(ramp), "b": jnp.array(ramp)})  # Compiled now, so that it runs while the save is still writing.
    with open_writer(tmp_path, keep_latest=9) as writer:
        for step in range(5):
            tree = {"a": jnp.array(ramp + step), "b": jnp.array(ramp - step)}
            shape = abstract(tree)
            writer.save(step, tree, {})
            jax.block_until_ready(overwrite(tree))
            jax.tree.map(lambda array: array.delete(), tree)
    for info in checkpoint_info.list_checkpoints(tmp_path):
        restored = checkpoint.restore(info, shape)
        np.testing.assert_array_equal(restored["a"], ramp + info.step)
        np.testing.assert_array_equal(restored["b"], ramp - info.step)


def test_saves_that_follow_each_other_at_once_are_all_kept(tmp_path):
    save(tmp_path, *range(6), keep_latest=6)
    assert states(tmp_path) == [(step, "sound") for step in range(6)]


def test_a_failed_save_is_raised_by_the_next_call(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, open_writer(tmp_path) as writer:
        patch.setattr(checkpoint, "_seal", crash)
        writer.save(1, state(1), {})
        with pytest.raises(Crash):
            writer.save(2, state(2), {})
    assert step_names(tmp_path) == ["1"]


# -- what is kept -----------------------------------------------------------------------------------------------------------


def test_the_newest_and_the_best_are_kept(tmp_path):
    selection_metrics = {10: 5.0, 20: 1.0, 30: 4.0, 40: None, 50: 1.0, 60: float("nan"), 70: 6.0}
    kept_after = {
        10: ["10"],
        20: ["10", "20"],
        30: ["20", "30"],  # These are the two newest, and 20 is also the best.
        40: ["20", "30", "40"],  # 40 was not scored: it is never the best.
        50: ["20", "40", "50"],  # 50 is as good as 20, but 20 was first.
        60: ["20", "50", "60"],  # 60 has no finite score: it is never the best.
        70: ["20", "60", "70"],
    }
    with open_writer(tmp_path, keep_latest=2, keep_best=1) as writer:
        for step, metric in selection_metrics.items():
            writer.save(step, state(step), {"loss": 100.0 - step}, metric)
            writer.wait()
            assert step_names(tmp_path) == kept_after[step]
    infos = checkpoint_info.list_checkpoints(tmp_path)
    assert [(info.step, info.selection_metric) for info in infos] == [(20, 1.0), (60, None), (70, 6.0)]
    assert [info.step for info in checkpoint_info.best_checkpoints(infos, 3)] == [20, 70]


def test_metrics_that_are_not_finite_are_left_out(tmp_path):
    with open_writer(tmp_path) as writer:
        writer.save(10, state(10), {"loss": float("nan"), "perplexity": float("inf"), "accuracy": 0.5}, float("inf"))
    [info] = checkpoint_info.list_checkpoints(tmp_path)
    assert (info.metrics, info.selection_metric) == ({"accuracy": 0.5}, None)


def test_best_checkpoints_are_ordered_by_the_selection_metric(tmp_path):
    """The loss takes no part, a checkpoint that was not scored is never chosen, and the first of two equals comes first."""
    saves = [(10, 0.1, -0.5), (20, 0.2, None), (30, 0.3, -0.9), (40, 0.4, 0.0), (50, 0.5, -0.9)]
    with open_writer(tmp_path, keep_latest=9) as writer:
        for step, loss, metric in saves:
            writer.save(step, state(step), {"loss": loss}, metric)
    infos = checkpoint_info.list_checkpoints(tmp_path)
    assert [(info.step, info.metrics["loss"], info.selection_metric) for info in infos] == saves
    for count, best in ((0, []), (1, [30]), (3, [30, 50, 10]), (9, [30, 50, 10, 40])):
        assert [info.step for info in checkpoint_info.best_checkpoints(infos, count)] == best
    flip(tmp_path / "checkpoints" / "30" / "config.json")
    assert [info.step for info in checkpoint_info.best_checkpoints(checkpoint_info.list_checkpoints(tmp_path), 2)] == [50, 10]


def test_a_sound_checkpoint_stays_until_the_next_one_is_sealed(tmp_path, monkeypatch):
    save(tmp_path, 10, keep_latest=1)
    crash_before_seal(tmp_path, 20, monkeypatch, keep_latest=1)
    assert states(tmp_path) == [(10, "sound"), (20, "incomplete")]
    lines = []
    assert_holds(checkpoint_info.find_checkpoint(tmp_path, lines.append), 10)
    assert lines == ["checkpoint 20 is incomplete (file manifest.json: missing, so its save was cut short); using 10"]
    save(tmp_path, 20, keep_latest=1)
    assert step_names(tmp_path) == ["20"]
    assert_holds(checkpoint_info.find_checkpoint(tmp_path, fail), 20)


def test_a_sound_checkpoint_is_never_overwritten(tmp_path):
    save(tmp_path, 10, 20)
    with open_writer(tmp_path) as writer:
        with pytest.raises(ValueError, match=r"checkpoints/20 is already a sound checkpoint"):
            writer.save(20, state(99), {})
        writer.save(30, state(30), {})  # The writer can still be used.
    assert states(tmp_path) == [(20, "sound"), (30, "sound")]
    for info in checkpoint_info.list_checkpoints(tmp_path):
        assert_holds(info, info.step)


def test_a_damaged_or_incomplete_checkpoint_is_replaced_by_the_next_save_of_its_step(tmp_path, monkeypatch):
    save(tmp_path, 10)
    crash_before_seal(tmp_path, 20, monkeypatch)
    save(tmp_path, 20)
    assert states(tmp_path) == [(10, "sound"), (20, "sound")]
    flip(tmp_path / "checkpoints" / "20" / "state" / "_METADATA")
    with open_writer(tmp_path) as writer:
        writer.save(20, state(99), {})
    assert states(tmp_path) == [(10, "sound"), (20, "sound")]
    assert_holds(checkpoint_info.find_checkpoint(tmp_path, fail), 99)


def test_going_back_past_a_damaged_checkpoint(tmp_path):
    save(tmp_path, 10, 20, 30, keep_latest=3)
    flip(tmp_path / "checkpoints" / "30" / "config.json")
    assert checkpoint_info.find_checkpoint(tmp_path, ignore).step == 20
    save(tmp_path, 25, keep_latest=1)
    assert step_names(tmp_path) == ["25", "30"]
    save(tmp_path, 30, keep_latest=1)
    assert step_names(tmp_path) == ["30"]
    assert_holds(checkpoint_info.find_checkpoint(tmp_path, fail), 30)


def test_leftovers_of_killed_saves_are_deleted_at_the_next_start(tmp_path):
    (tmp_path / "checkpoints" / "35.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    save(tmp_path, 30)
    assert step_names(tmp_path) == ["30"]


def test_prune(tmp_path, monkeypatch):
    with open_writer(tmp_path, keep_latest=4) as writer:
        for step in (10, 20, 30, 40):
            writer.save(step, state(step), {}, float(step))
    crash_before_seal(tmp_path, 50, monkeypatch)
    flip(tmp_path / "checkpoints" / "30" / "config.json")
    removed = checkpoint.prune(tmp_path, keep_latest=1, keep_best=1)
    assert [(info.step, info.state) for info in removed] == [(20, "sound"), (30, "damaged")]
    assert step_names(tmp_path) == ["10", "40", "50"]  # A run in progress may be about to seal 50.
    for step in ("10", "40"):
        flip(tmp_path / "checkpoints" / step / "config.json")
    assert checkpoint.prune(tmp_path, keep_latest=1, keep_best=0) == []  # Without a sound one nothing is deleted.
    with pytest.raises(UserError, match="--keep-latest: must be positive, not 0"):
        checkpoint.prune(tmp_path, keep_latest=0, keep_best=1)
    with pytest.raises(UserError, match="--keep-best: must be at least 0, not -1"):
        checkpoint.prune(tmp_path, keep_latest=1, keep_best=-1)


# -- damage -----------------------------------------------------------------------------------------------------------------


def test_damage_to_any_file_is_named_and_the_previous_checkpoint_used(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.txt").write_text("a b c")
    save(tmp_path, 30, 40, tokenizer=tmp_path / "tokenizer")
    folder = tmp_path / "checkpoints" / "40"
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    assert len(names) >= 10
    for name in names:
        original = (folder / name).read_bytes()
        flip(folder / name)
        lines = []
        assert checkpoint_info.find_checkpoint(tmp_path, lines.append).step == 30
        [line] = lines
        assert line.startswith(f"checkpoint 40 is damaged (file {name}: ")
        assert line.endswith("); using 30")
        (folder / name).write_bytes(original)
    assert checkpoint_info.find_checkpoint(tmp_path, fail).step == 40


@pytest.mark.parametrize("position", [0, 5, 60, 400, 900, -40, -1])
def test_a_change_of_any_byte_of_the_manifest_is_noticed(tmp_path, position):
    save(tmp_path, 40)
    manifest = tmp_path / "checkpoints" / "40" / "manifest.json"
    data = bytearray(manifest.read_bytes())
    data[position] ^= 1
    manifest.write_bytes(data)
    assert states(tmp_path) == [(40, "damaged")]


def test_truncated_and_missing_files_are_noticed_without_checksums(tmp_path):
    save(tmp_path, 30, 40)
    (tmp_path / "checkpoints" / "30" / "state" / "_METADATA").unlink()
    config = tmp_path / "checkpoints" / "40" / "config.json"
    size = config.stat().st_size
    os.truncate(config, 3)
    assert [(info.state, info.problem) for info in checkpoint_info.list_checkpoints(tmp_path, checksums=False)] == [
        ("damaged", "file state/_METADATA: No such file or directory"),
        ("damaged", f"file config.json: 3 bytes instead of {size}"),
    ]


def test_no_sound_checkpoint_is_an_error(tmp_path):
    save(tmp_path, 30, 40)
    for step in ("30", "40"):
        flip(tmp_path / "checkpoints" / step / "config.json")
    with pytest.raises(UserError, match=r"no sound checkpoint: 40 is damaged \(file config.json.*; 30 is damaged") as error:
        checkpoint_info.find_checkpoint(tmp_path, fail)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no sound checkpoint"):  # Starting over would lose the run.
        checkpoint_info.newest_checkpoint(tmp_path, fail)


def test_a_run_whose_first_save_was_cut_short_starts_at_its_beginning(tmp_path, monkeypatch):
    assert checkpoint_info.newest_checkpoint(tmp_path, fail) is None
    crash_before_seal(tmp_path, 10, monkeypatch)
    assert checkpoint_info.newest_checkpoint(tmp_path, fail) is None
    with pytest.raises(UserError, match="no finished checkpoint"):
        checkpoint_info.find_checkpoint(tmp_path, fail)


def test_a_folder_of_several_seeds_names_one(tmp_path):
    for seed in (0, 1):
        (tmp_path / f"seed-{seed}" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=f"several seeds; name one of them, such as {tmp_path}/seed-0"):
        checkpoint_info.find_checkpoint(tmp_path, fail)


def test_the_folder_of_one_step_means_that_checkpoint(tmp_path):
    save(tmp_path, 30, 40)
    assert_holds(checkpoint_info.find_checkpoint(tmp_path / "checkpoints" / "30", fail), 30)
    flip(tmp_path / "checkpoints" / "30" / "config.json")
    with pytest.raises(UserError, match=r"checkpoints/30: is damaged \(file config.json: checksum differs\)"):
        checkpoint_info.find_checkpoint(tmp_path / "checkpoints" / "30", fail)
    [damaged, _] = checkpoint_info.list_checkpoints(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="damaged"):
        checkpoint.restore(damaged, abstract(state(30)))
    with pytest.raises(UserError, match="no such folder"):
        checkpoint_info.find_checkpoint(tmp_path / "elsewhere", fail)


# -- copies, other names, links ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["best-model", "latest", "0020", "20", "step 20", "\uff12\uff10", "checkpoint-99", ".hidden"])
@pytest.mark.parametrize("place", ["elsewhere", "inside"])
def test_a_copied_renamed_or_linked_checkpoint_is_the_same_checkpoint(tmp_path, name, place):
    save(tmp_path / "run", 10, 20)
    original = tmp_path / "run" / "checkpoints" / "20"
    copy = (tmp_path if place == "elsewhere" else tmp_path / "run") / name
    if name == "latest":
        copy.symlink_to(original)
    elif name == "step 20":
        original.rename(copy)
    else:
        shutil.copytree(original, copy)
    info = checkpoint_info.find_checkpoint(copy, fail)
    assert (info.step, info.state, info.path) == (20, "sound", copy)
    assert_holds(info, 20)
    assert [(other.step, other.path) for other in checkpoint_info.list_checkpoints(copy)] == [(20, copy)]
    assert checkpoint_info.read_config(info).train.seed == 3


def test_a_damaged_or_unfinished_copy_is_refused(tmp_path, monkeypatch):
    save(tmp_path / "run", 20)
    crash_before_seal(tmp_path / "run", 30, monkeypatch)
    checkpoints = tmp_path / "run" / "checkpoints"
    for name, step, message in (
        ("best-model", "20", f"{tmp_path}/best-model: is damaged (file config.json: checksum differs); "),
        ("unfinished", "30", f"{tmp_path}/unfinished: is incomplete (file manifest.json: missing, so its save was cut short); "),
    ):
        shutil.copytree(checkpoints / step, tmp_path / name)
        flip(tmp_path / name / "config.json") if step == "20" else None
        with pytest.raises(UserError) as error:
            checkpoint_info.find_checkpoint(tmp_path / name, fail)
        assert str(error.value).startswith(message)


def test_a_runs_folder_whose_name_is_a_number_is_not_a_step(tmp_path):
    for run in (tmp_path / "2024", tmp_path / "checkpoints" / "2025"):
        run.mkdir(parents=True)
        (run / "config.json").write_text("{}")
        with pytest.raises(UserError, match=f"{run}: contains no finished checkpoint; give a run's folder or"):
            checkpoint_info.find_checkpoint(run, fail)
        assert checkpoint_info.list_checkpoints(run) == []
        save(run, 10)
        assert_holds(checkpoint_info.find_checkpoint(run, fail), 10)
    assert checkpoint_info.list_checkpoints(tmp_path) == []


def test_folders_of_other_names_in_a_run_are_listed_and_used_but_never_deleted(tmp_path):
    """A checkpoint that was renamed or copied is usually one that somebody wants to keep."""
    save(tmp_path, 10, 20, 30, keep_latest=3)
    folder = tmp_path / "checkpoints"
    (folder / "30").rename(folder / "best")
    shutil.copytree(folder / "10", folder / "0010")
    (folder / "latest").symlink_to("20")
    (folder / "gone").symlink_to("nowhere")
    (folder / "plots").mkdir()
    (folder / "notes.txt").write_text("")
    listed = [(info.step, info.path.name, info.state) for info in checkpoint_info.list_checkpoints(tmp_path)]
    assert listed == [
        (-1, "gone", "incomplete"),
        (-1, "plots", "incomplete"),
        (10, "0010", "sound"),
        (10, "10", "sound"),
        (20, "latest", "sound"),
        (20, "20", "sound"),
        (30, "best", "sound"),
    ]
    assert checkpoint_info.find_checkpoint(tmp_path, fail).path == folder / "best"
    assert checkpoint_info.find_step(tmp_path, 30).path == folder / "best"
    assert checkpoint_info.find_step(tmp_path, 20).path == folder / "20"
    with pytest.raises(UserError, match="checkpoint 40 no longer exists"):
        checkpoint_info.find_step(tmp_path, 40)

    assert [info.path.name for info in checkpoint.prune(tmp_path, keep_latest=1, keep_best=0)] == ["10"]
    save(tmp_path, 40, 50, keep_latest=1)
    assert {path.name for path in folder.iterdir()} == {"0010", "50", "best", "gone", "latest", "notes.txt", "plots"}
    assert_holds(checkpoint_info.find_checkpoint(folder / "best", fail), 30)


def test_a_copy_of_another_runs_checkpoint_is_listed_but_not_used(tmp_path):
    save(tmp_path / "other", 99)
    save(tmp_path / "run", 10, 20)
    folder = tmp_path / "run" / "checkpoints"
    (folder / "20").rename(folder / "best")
    shutil.copytree(tmp_path / "other" / "checkpoints" / "99", folder / "theirs")
    rewrite_manifest(checkpoint_info.inspect_checkpoint(folder / "theirs", checksums=True), data_digest="d1")
    assert [info.path.name for info in checkpoint_info.list_checkpoints(tmp_path / "run")] == ["10", "best", "theirs"]
    assert [info.path.name for info in checkpoint_info.own_checkpoints(tmp_path / "run")] == ["10", "best"]
    assert checkpoint_info.find_checkpoint(tmp_path / "run", fail).path == folder / "best"
    with pytest.raises(UserError, match="checkpoint 99 no longer exists"):
        checkpoint_info.find_step(tmp_path / "run", 99)
    assert checkpoint_info.find_checkpoint(folder / "theirs", fail).step == 99
    # Without a checkpoint that is named by its step, it cannot be told which ones are the run's.
    shutil.rmtree(folder / "10")
    assert checkpoint_info.find_checkpoint(tmp_path / "run", fail).path == folder / "theirs"


def test_names_that_no_program_writes_are_listed(tmp_path):
    save(tmp_path, 10)
    folder = tmp_path / "checkpoints"
    strange = ["line\nbreak", "²", "9" * 200, os.fsdecode(b"not \xff UTF-8")]
    for name in strange[:3]:
        (folder / name).mkdir()
    shutil.copytree(folder / "10", folder / strange[3])
    (folder / "loop").symlink_to("loop")
    listed = {info.path.name: (info.step, info.state) for info in checkpoint_info.list_checkpoints(tmp_path)}
    assert listed == {
        **dict.fromkeys(strange[:3], (-1, "incomplete")),
        strange[3]: (-1, "damaged"),
        "loop": (-1, "damaged"),
        "10": (10, "sound"),
    }
    assert checkpoint_info.find_checkpoint(tmp_path, fail).path == folder / "10"


def test_a_checkpoint_that_was_moved_to_another_disk_is_not_deleted_through_its_link(tmp_path):
    save(tmp_path, 10, 20)
    (tmp_path / "checkpoints" / "10").rename(tmp_path / "ten")
    (tmp_path / "checkpoints" / "10").symlink_to(tmp_path / "ten")
    assert states(tmp_path) == [(10, "sound"), (20, "sound")]
    save(tmp_path, 30, keep_latest=1)
    assert states(tmp_path) == [(10, "sound"), (30, "sound")]
    assert_holds(checkpoint_info.find_checkpoint(tmp_path / "ten", fail), 10)


def test_a_name_that_a_save_may_need_is_refused_before_training(tmp_path):
    save(tmp_path, 10, 20)
    (tmp_path / "checkpoints" / "20").rename(tmp_path / "checkpoints" / "30")
    assert checkpoint_info.find_checkpoint(tmp_path, fail).step == 20
    message = f"{tmp_path}/checkpoints/30: is checkpoint 20, and the run may have to save another one under this name; rename it"
    with pytest.raises(UserError) as error:
        open_writer(tmp_path)
    assert str(error.value) == message
    (tmp_path / "checkpoints" / "30").rename(tmp_path / "checkpoints" / "good")
    save(tmp_path, 30)
    assert states(tmp_path) == [(10, "sound"), (20, "sound"), (30, "sound")]


# -- manifests with bad values ----------------------------------------------------------------------------------------------

BAD_MANIFESTS = [
    ({"step": "40"}, "'step' is a string, not a whole number of at least 0"),
    ({"step": -1}, "'step' is a number, not a whole number of at least 0"),
    ({"step": 10**400}, "'step' is a number, not a whole number of at least 0"),
    ({"step": None}, "'step' is null, not a whole number of at least 0"),
    ({"format_version": "2"}, "'format_version' is a string, not a whole number of at least 0"),
    ({"format_version": True}, "'format_version' is true or false, not a whole number of at least 0"),
    ({"metrics": [1]}, "'metrics' is a list, not an object"),
    ({"metrics": {"loss": "low"}}, "'metrics.loss' is a string, not a floating-point number"),
    ({"metrics": {"loss": 10**400}}, "'metrics.loss' is a number, not a floating-point number"),
    ({"selection_metric": "best"}, "'selection_metric' is a string, not a floating-point number"),
    ({"data_digest": 5}, "'data_digest' is a number, not a string"),
    ({"files": None}, "'files' is null, not an object"),
    ({"files": {"config.json": 5}}, "'files.config.json' is a number, not an object"),
    ({"files": {"config.json": {"size": 5}}}, "'files.config.json.sha256' is missing"),
    ({"files": {"config.json": {"size": -5, "sha256": ""}}}, "'files.config.json.size' is a number, not a whole number"),
    ({"files": {"/etc/hostname": {"size": 5, "sha256": ""}}}, "file /etc/hostname: outside of the checkpoint"),
    ({"files": {"state/../../40/config.json": {"size": 5, "sha256": ""}}}, "outside of the checkpoint"),
    ({"files": {"a\0b": {"size": 5, "sha256": ""}}}, "embedded null byte"),
    ({"files": {"x" * 300: {"size": 5, "sha256": ""}}}, "File name too long"),
    ({"files": {"": {"size": 4096, "sha256": ""}}}, "file : "),
    ({"files": {"missing": {"size": 5, "sha256": ""}}}, "file missing: No such file or directory"),
]


@pytest.mark.parametrize(("entries", "problem"), BAD_MANIFESTS, ids=[problem for _, problem in BAD_MANIFESTS])
def test_a_manifest_with_a_bad_value_is_a_damaged_checkpoint(tmp_path, entries, problem):
    """The checksum is right, as a program of somebody else's would write it."""
    save(tmp_path, 30, 40)
    rewrite_manifest(checkpoint_info.find_checkpoint(tmp_path, fail), **entries)
    *_, info = checkpoint_info.list_checkpoints(tmp_path)
    assert (info.step, info.state) == (40, "damaged")
    assert problem in info.problem
    lines = []
    assert checkpoint_info.find_checkpoint(tmp_path, lines.append).step == 30
    assert len(lines) == 1


@pytest.mark.parametrize("name", ["format_version", "step", "config_digest", "data_digest", "metrics", "files"])
def test_a_manifest_that_lacks_a_value_is_a_damaged_checkpoint(tmp_path, name):
    save(tmp_path, 40)
    rewrite_manifest(checkpoint_info.find_checkpoint(tmp_path, fail), without=[name])
    [info] = checkpoint_info.list_checkpoints(tmp_path)
    assert (info.state, info.problem) == ("damaged", f"file manifest.json: '{name}' is missing")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"5", b"null", b"{", b"\xff\xfe{", b"[" * 100_000, b'{"step": ' + b"9" * 5000 + b"}"]
)
def test_a_manifest_that_is_no_object_is_a_damaged_checkpoint(tmp_path, content):
    save(tmp_path, 40)
    (tmp_path / "checkpoints" / "40" / "manifest.json").write_bytes(content)
    assert states(tmp_path) == [(40, "damaged")]
    nested = b'{"a": ' * 900 + b"5" + b"}" * 900  # It can be read, but not written in our format.
    (tmp_path / "checkpoints" / "40" / "manifest.json").write_bytes(nested)
    assert states(tmp_path) == [(40, "damaged")]


# -- formats ----------------------------------------------------------------------------------------------------------------


def rewrite_manifest(info, without=(), **entries):
    """Changes entries of a manifest and its checksum with them."""
    manifest = {name: value for name, value in checkpoint_info.read_manifest(info).items() if name not in ("sha256", *without)}
    manifest |= entries
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (info.path / "manifest.json").write_text(json.dumps(manifest, sort_keys=True, indent=1) + "\n")


def test_a_newer_format_is_refused(tmp_path):
    save(tmp_path, 40)
    rewrite_manifest(checkpoint_info.find_checkpoint(tmp_path, fail), format_version=3)
    with pytest.raises(UserError, match="format version 3, but this gpt_jax reads only up to 2; update"):
        checkpoint_info.find_checkpoint(tmp_path, fail)


def test_format_1_kept_the_selection_metric_among_the_metrics(tmp_path):
    """There it is the metric "rank", or else "loss"."""
    metrics = {10: {"rank": -0.5, "loss": 3.0}, 20: {"loss": 2.0}, 30: {}, 40: {"rank": -0.25, "accuracy": 0.25}}
    save(tmp_path, *metrics, keep_latest=9)
    for info in checkpoint_info.list_checkpoints(tmp_path):
        rewrite_manifest(info, without=["selection_metric"], format_version=1, metrics=metrics[info.step])
    infos = checkpoint_info.list_checkpoints(tmp_path)
    assert [info.selection_metric for info in infos] == [-0.5, 2.0, None, -0.25]
    assert [info.metrics for info in infos] == [{"loss": 3.0}, {"loss": 2.0}, {}, {"accuracy": 0.25}]
    assert [info.step for info in checkpoint_info.best_checkpoints(infos, 9)] == [10, 40, 20]


def test_a_checkpoint_of_format_1_still_loads(tmp_path):
    """Checkpoints of that format with an optimizer's state are restored in tests/test_fixture.py."""
    archive = io.BytesIO(base64.b85decode("".join(FORMAT_1.split())))
    with tarfile.open(fileobj=archive, mode="r:xz") as tar:
        tar.extractall(tmp_path / "checkpoints", filter="data")
    info = checkpoint_info.find_checkpoint(tmp_path, fail)
    assert (info.step, info.format_version) == (7, 1)
    assert (info.metrics, info.selection_metric) == ({"loss": 1.25}, 1.25)
    assert checkpoint_info.read_manifest(info)["config_digest"] == "c0"
    assert checkpoint_info.read_config(info) == CONFIG
    restored = checkpoint.restore(info, abstract({"params": {"kernel": jnp.zeros((2, 3))}, "step": jnp.int32(0)}))
    np.testing.assert_array_equal(restored["params"]["kernel"], [[0, 0.5, 1], [1.5, 2, 2.5]])
    assert int(restored["step"]) == 7
    assert (info.path / "tokenizer" / "vocab.txt").read_text() == "a b c\n"


# -- restoring --------------------------------------------------------------------------------------------------------------


def test_all_differences_are_listed_at_once(tmp_path):
    save(tmp_path, 40)
    info = checkpoint_info.find_checkpoint(tmp_path, fail)
    wanted = {
        "params": {"block": {"kernel": jnp.zeros((8, 5)), "bias": jnp.zeros(4, jnp.bfloat16), "gain": jnp.zeros(4)}},
        "step": jnp.int32(0),
    }
    with pytest.raises(UserError) as error:
        checkpoint.restore(info, abstract(wanted))
    assert str(error.value).endswith(
        "checkpoint 40 does not fit this config: moments/kernel float32[8,4] is unexpected; "
        "params/block/bias is float32[4], not bfloat16[4]; params/block/gain float32[4] is missing; "
        "params/block/kernel is float32[8,4], not float32[8,5]"
    )


def test_parameters_alone_can_be_read(tmp_path):
    save(tmp_path, 40)
    info = checkpoint_info.find_checkpoint(tmp_path, fail)
    params = checkpoint.restore_params(info, abstract(state(0)["params"]))
    jax.tree.map(np.testing.assert_array_equal, params, values(40)["params"])
    with pytest.raises(UserError, match=r"params/block/bias float32\[4\] is unexpected"):
        checkpoint.restore_params(info, {"block": {"kernel": abstract(jnp.zeros((8, 4)))}})


def save_and_restore_on_meshes(run):
    def place(tree, shape, rows, columns):
        mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
        specs = {0: jax.P(), 1: jax.P(columns), 2: jax.P(rows, columns)}
        return jax.tree.map(lambda array: jax.device_put(array, jax.NamedSharding(mesh, specs[array.ndim])), tree)

    with open_writer(run) as writer:
        writer.save(40, place(state(40), (2, 2, 2), ("data", "fsdp"), "tensor"), {})
    info = checkpoint_info.find_checkpoint(run, print)
    for placed in (place(state(0), (1, 4, 2), "tensor", "fsdp"), place(state(0), (8, 1, 1), "data", None), state(0)):
        restored = checkpoint.restore(info, abstract(placed))
        jax.tree.map(np.testing.assert_array_equal, restored, values(40))
        assert jax.tree.map(lambda array: array.sharding, restored) == jax.tree.map(lambda array: array.sharding, placed)
    assert "tensorflow" not in sys.modules
    print(jax.device_count())


def test_any_mesh_restores_and_nothing_is_printed(tmp_path):
    out, err = finish(spawn(save_and_restore_on_meshes, tmp_path, JAX_NUM_CPU_DEVICES="8"))
    assert (out, err) == ("8\n", "")
    assert_holds(checkpoint_info.find_checkpoint(tmp_path, fail), 40)  # It was saved on eight devices.


def save_and_restore_as_one_of_two(run, port, process):
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(array):
        sharding = jax.NamedSharding(mesh, jax.P("data") if array.ndim else jax.P())
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def share(step):
        return jax.tree.map(place, values(step))

    with open_writer(run) as writer:
        for step in (10, 20, 30):
            writer.save(step, share(step), {})
        writer.wait()
        multihost_utils.sync_global_devices("saved")
        if process == "0":
            flip(run / "checkpoints" / "30" / "config.json")
        multihost_utils.sync_global_devices("damaged")
        writer.save(30, share(30), {})  # It replaces the damaged one.
    multihost_utils.sync_global_devices("saved again")
    info = checkpoint_info.find_checkpoint(run, print)
    restored = checkpoint.restore(info, abstract(share(0)))
    jax.tree.map(np.testing.assert_array_equal, multihost_utils.process_allgather(restored, tiled=True), values(30))
    print(info.step, checkpoint_info.read_manifest(info)["process_count"])


def test_two_processes_save_and_restore_together(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [spawn(save_and_restore_as_one_of_two, tmp_path, port, process, JAX_NUM_CPU_DEVICES="2") for process in range(2)]
    try:
        for process in processes:
            out, _ = finish(process)
            assert out.splitlines()[-1] == "30 2"
    finally:
        for process in processes:
            process.kill()
    assert step_names(tmp_path) == ["20", "30"]
    assert_holds(checkpoint_info.find_checkpoint(tmp_path, fail), 30)


# -- interruptions ----------------------------------------------------------------------------------------------------------


def save_until_killed(run):
    """Lets three child processes, one after the other, save step after step from the newest sound checkpoint on."""
    for _ in range(3):
        child = os.fork()  # It shares the imports of this process, which has not used JAX yet.
        if child == 0:
            print(os.getpid(), flush=True)
            newest = checkpoint_info.newest_checkpoint(run, ignore)
            step = newest.step if newest else 0
            with open_writer(run) as writer:
                while True:
                    step += 1
                    writer.save(step, state(step), {})
                    print("saving", step, flush=True)
        os.waitpid(child, 0)
        print("killed", flush=True)
        sys.stdin.readline()


def test_killed_at_any_time_nothing_sealed_is_lost_and_nothing_sound_is_wrong(tmp_path):
    chance = random.Random(0)
    reached = 0
    with spawn(save_until_killed, tmp_path) as process:
        for attempt in range(3):
            child = int(process.stdout.readline())
            lines = [process.stdout.readline() for _ in range(chance.randint(3, 5))]
            time.sleep(chance.uniform(0, 0.3))
            os.kill(child, signal.SIGKILL)
            lines += itertools.takewhile("killed\n".__ne__, process.stdout)
            started = [int(line.split()[1]) for line in lines]
            newest = checkpoint_info.find_checkpoint(tmp_path, ignore).step
            assert newest >= max(reached, started[-1] - 1)  # A save starts when the previous one is sealed.
            reached = newest
            for info in checkpoint_info.list_checkpoints(tmp_path):
                assert info.state != "damaged"
                if info.state == "sound":
                    assert_holds(info, info.step)
            if attempt == 0:  # The next process goes back a step, whose damaged checkpoint it replaces.
                flip(tmp_path / "checkpoints" / str(newest) / "config.json")
                reached = newest - 1
            process.stdin.write("\n")
            process.stdin.flush()
        assert process.wait(60) == 0, process.stderr.read()


def save_until_full(run):
    big = {"weights": jax.random.normal(jax.random.key(0), (300, 1000))}
    try:
        with open_writer(run, keep_latest=99) as writer:
            for step in range(1, 99):
                writer.save(step, big, {})
    except UserError as error:
        print(error)
    infos = checkpoint_info.list_checkpoints(run)
    restored = checkpoint.restore(checkpoint_info.find_checkpoint(run, print), abstract(big))
    print([info.state for info in infos], bool((restored["weights"] == big["weights"]).all()))


def test_a_full_disk_is_one_line_and_the_last_checkpoint_is_kept(tmp_path):
    prefix = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=3m tmpfs "{tmp_path}" && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode != 0:
        pytest.skip("needs user namespaces (unshare -rm) to mount a small file system")
    out, err = finish(spawn(save_until_full, tmp_path, prefix=prefix))
    assert (out, err) == (
        f"{tmp_path}/checkpoints: checkpoint 3 could not be saved (No space left on device); "
        "checkpoint 2 is sound: run again to continue from it\n['sound', 'sound'] True\n",
        "",
    )


# A tar file of checkpoint 7, written by the first release of format 1. It stands for users' checkpoints: never regenerate it.
FORMAT_1 = r"""
{Wp48S^xk9=GL@E0stWa8~^|S5YJf5;7|Vuf?WU`i@Y3t0aqY5pwmS<&cNiWxzH_)?VqxPo^%t0Rj=E^Rh*lu;yDB8Y2sIf7T&bQy$3v}JJZD*6ZsGd3`c8m-Z8+S
K8X(sF?<_yQ(ed5SD8xFbohQuCf!=XL4a-6!IzEb-E7_49q7Ja8Ami>y%uXV)s+B<gPU-xN`~2Ib1j@_B%53WYY6PjBze-lTO_Kj04IX~zP*0(Bs#C5RX58hU%W0Q
>@E=5owY~9#99Z6;|&ihD(?=(6I8)Z<Y%2E<k9p}547w|*%m4xvU%dJod>d^hF>xUYDo9h3UOeNYdw)lb(G{HcP;9AHizCKc7c>FO2@A1TYuR5ZOLkA>nKP3Dt#(n
Ok)LJ6HoWvn;$($T7xA+je0uz5u@F~>p3OdNc^ZHB0LNk4*$WQ6`<A=kA*h^ypR?#W}D?MJJEd5Ak;Rnw9Y7`S-K#4;l<tE@^%BeeO-iP<<`-a<2h}@R655*!{BW5
bCQwohh<wI?W26Y=_-2<<_|(ngkS;6Y`|0NTb{ku?gK3#^9ri>96%`};)pYTHaI@7R|H4*UB4o=%XY`)FXLjO6KXSJ{o>tyNeYL#s5-#;0Vx<G_)F=GOftKFX{%;|
)5OfDo}FcVq(;fz+1#Fx3El7%g`@pe{%-YO$oApY!5E8aG%c$#YqoTsW&@UPF1n=GOcvh|Ip$%Y&JR#!`I=+Oh7XK63m%*X#Jcc}AS-bc5Ry&$1U9#-)YEYo<rxg^
99Is>f~lb#srI5LMEWnRfxtc02Vf57wsQ_Xd6ekLD|Ww!c0wf!zdD1a8__{9=qI#&tUS9{EXKCh%YHcY$M4J1$0FHz=F8G>6dAYJiuN-C3jt-Ph6$Sml7<Sq&RBtR
5L`;r$9ZG3)>7Xd=@VcTDl3oZ2$?}xB<6h|uT#%y?80$%QM#tQ(azzJtXhKqB_quACIVPz{^RUF@md{cuUyxAVb4~#2_&NpK7i!hsPJkfih3(F%8<T4m)t^~1mRRa
s@#}fT-!DQ$FbSYP(SbFpEH5T78y^Q%cH!0^0-k)f*_Jj3Uqa$tpNv96A&9OxrBKrKh-rt%}kxIm}zA>db*|0b5t#O{6Yo>7D+O%Q@fvPqdI2x@$YUYaz1crr47R=
iU<w`<WcsHm79UG*D`=GSG*m&1zXLF0xAZ-5pW15T07-*J&2E8f5be#=y=kG_ON4K5IHtUTLn#)3q5wg*&upgRE)A1tq^0MUQ2D8(Ll|Y^gj-mf2O_22qt@Aidm_%
QMfoaiZbtHRB$t<D9xhJxMC9hPm5VQVH>fp`k+6u5yLKEurKKyDXD$#dZ}VOIQ0@37k`qwlfrF7LW|e#VOu2F_cWP6vQc0j@jlis9i&v&Zy1s}O%fsig9g=BS4`ij
K?#b`=vn`1YoCB7Rk&aT%|Y6V-o91*9r~&#O2s#~6ndCuvJ9oj#_V&BD4-rV?s)2Oe}+7aRmo|ODB>}#;!()A4e9jud;kEhfc-V$6t6#`3P(f@D%VMshF7O(WdaRc
+Gc}fF9Rxs-J=a><h5dfs2ZL9{gPZ@pWw37zq1(cd#YBQ>GLsHGa~jpsHg%H7`WhH8u|@t@ze2tCyUm1>PMPjUzP&{94aEs>iP^Oajg$OOXqdnc^agA0&M>S&C_Cl
1+XT^HA%=y7+L$Ds_lmMr?tP_(#y#KbZA=h8Yce*9?ncw*V7KZ<`HKBzJIC>1*K)o$&9MBJiVY@y1gp08bm<f$<F<(pd3in9JtV`Pz8d&q5457Pi0i^DG7el&EEMZ
*lcLh$%rwN$7BzlI+_PHSuo^emV3!?{4dwY>*|kXT>SQ7ODhI9&nl0{d0^!Yl#4z;=PMg7k@OPA4RWNy7~D+UvNJKOJrAVgAt#bTC_et!mdOo}jf$=XLBl`bH}#}5
MZY$<Slw&dlS97B=HWDULD<cyuTE!?D%w+yWO<2{r7lZIZ<Zs{z^sDX$%GB`9J<jjoXO_;+o9}P13{Aw2QUw3hT{Lx8j`x04lli{O`f}Rz38fv_B@~M7{sgx@Ho^2
Y8^=?{*979X}O$?{<5V?NvexELE+6JP(a0BY($8jxaX!ZFYY@VdkHg*Ny35kjC6tklIxD`r5Q1@9sU51>%k{_mI=^9UdiP$#c)EExb4!lvIxsZq$_s$L-ZT`g{NBG
+9C5tq@TPIc6jY=FE_+%d);O@e}!1DgHz_cLMGAVOkX*?*tt(m(QiZzru+N0b<6^6;;8pm@X|noM&Mx)@J<^d0~7eaRymS{c?HGpC}Z89@w*#-DF^9Z6kTpj^$v72
B!4C%;I(g1q8uzTzW)B@TJ&+5tiGBdb1n<|N_;QpH(H9`F6em&Qc+dxJZi1peX^1FzDm#;P3(QBHGV^gh$RXDXYVkWG5UuNyL~6^P5p7(vkoamJZW>epUzN1Y6`Er
lGD6TWyyQUj5&iwlvvF7XGxFBBuDoH5@wGc;cnq1O&&aFX<F320hy|z3|{3Ku5n+W)=M6pc6a)pK6@o2zhjQ4gn*e%dBC$ALb7dS6av=$mn$(`Y%D&UpaS?tD#Ag9
jvH9@m$}5(8H~9B-0b&!XwIAU2y*B?v4}!nTQ9?FwMECC2twuTqz^e%j@}f-N6oc2bMdk+*9O^d*z!5Tf7#Ae9jM>ZB_3Jgs2E_#u;e{s+|3t+y;kAwpkFrs*G1G?
x$w-Uq6M&M(F7Ow=+av`6j44F495JYTtC=TP}?B9PFq?9w+$@K(jv+0Z9@S*y9f5TteOY_(@_n_NqV*Hn*gJatFYFsbl1HlJlAJC!b769Cpts>OQ<1n5|#CMXnn*k
z+qc>|7Z=K00000!An`e9qKx+00Ev6fS>^Y#>az{vBYQl0ssI200dcD
"""

if __name__ == "__main__":  # This is a process that `spawn` started.
    globals()[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
