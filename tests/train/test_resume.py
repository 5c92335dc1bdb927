"""A run that is killed at any instant and started again equals the uninterrupted run bit for bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from gpt_jax.cli import main
from gpt_jax.train.logging import ProgressLogger
from tests.tiny import trajectory

OPTIONS = ("--train.eval-every", "4 steps")
OFTEN = ("--train.save-every", "1 steps")  # so that many kills fall into a save


def train(config_file, run, *options):
    """Runs the command in this process; returns its exit code."""
    return main(["pretrain", str(config_file), "--workdir", str(run), *OPTIONS, *options])


def start(config_file, run, *options):
    """Starts the command in a process of its own, whose output goes to a file beside the run."""
    command = [sys.executable, "-m", "gpt_jax", "pretrain", str(config_file), "--workdir", str(run), *OPTIONS, *options]
    with open(f"{run}.log", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def log_of(run):
    with open(f"{run}.log") as file:
        return file.read()


def kill_when(condition, process, run, seconds=240):
    """Kills the process once the condition holds; returns whether it was still running."""
    limit = time.monotonic() + seconds
    try:
        while process.poll() is None and not condition():
            assert time.monotonic() < limit, log_of(run)
            time.sleep(0.0005)
    finally:
        process.kill()
    assert process.wait() in (0, -signal.SIGKILL), log_of(run)
    return process.returncode != 0


def records_in(run):
    """Returns the number of lines in metrics.jsonl so far."""
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def steps_saved(run):
    """Returns whether each step that has a folder, temporary ones of Orbax included, is sealed."""
    return {int(path.name.split(".")[0]): (path / "manifest.json").exists() for path in (run / "checkpoints").glob("[0-9]*")}


def newest(run):
    return max((step for step, sealed in steps_saved(run).items() if sealed), default=0)


def saving(run, beyond):
    """Returns whether a checkpoint beyond that step is being written: Orbax has not committed it, or it is not sealed."""
    return any(step > beyond and not sealed for step, sealed in steps_saved(run).items())


@pytest.fixture(scope="module")
def whole(config_file, tmp_path_factory):
    """The uninterrupted run."""
    run = tmp_path_factory.mktemp("resume") / "whole"
    assert train(config_file, run) == 0
    kinds = [kind for _, kind, *_ in trajectory(run)]
    assert (kinds.count("train"), kinds.count("eval")) == (20, 5)
    return run


def test_sigterm_ends_with_42_and_the_same_command_continues(whole, config_file, tmp_path, monkeypatch, capsys):
    show = ProgressLogger.update

    def update(self, step, metrics):
        show(self, step, metrics)
        if step == 12:
            os.kill(os.getpid(), signal.SIGTERM)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(ProgressLogger, "update", update)
        assert train(config_file, run) == 42
    assert capsys.readouterr().err.endswith(
        "gpt-jax: stop requested: saved at step 13 of 20; run the same command again to continue\n"
    )
    assert trajectory(run)[-1][0] == 13
    assert train(config_file, run) == 0
    assert "resuming at step 13" in capsys.readouterr().err
    assert trajectory(run) == trajectory(whole)
    assert not (run / "metrics.superseded.jsonl").exists()


@pytest.mark.slow
def test_a_kill_inside_a_save_changes_nothing(whole, config_file, tmp_path, capsys):
    run = tmp_path / "run"
    assert kill_when(lambda: saving(run, 6), start(config_file, run, *OFTEN), run), "it finished before it could be killed"
    reached = trajectory(run)[-1][0]
    assert 6 < reached < 20
    assert train(config_file, run) == 0
    step = int(capsys.readouterr().err.split("resuming at step ")[1].split(";")[0])
    assert 6 <= step <= reached
    assert trajectory(run) == trajectory(whole)
    superseded = run / "metrics.superseded.jsonl"
    moved = [json.loads(line)["step"] for line in superseded.read_text().splitlines()] if superseded.exists() else []
    assert set(moved) >= set(range(step + 1, reached + 1))
    assert not list((run / "checkpoints").glob("*tmp*"))


@pytest.mark.slow
def test_kills_at_random_instants_change_nothing(config_file, tmp_path):
    """Kills fall from the first second on, before and after records, into saves, and between Orbax's commit and the seal."""
    rng = random.Random(0)
    whole, run = tmp_path / "whole", tmp_path / "run"
    longer = ("--train.duration", "50 steps")
    assert train(config_file, whole, *longer) == 0
    for kills in range(100):
        begun, records, reached = time.monotonic(), records_in(run), newest(run)
        wait, more, steps = rng.uniform(0, 6), rng.randint(1, 3), rng.randint(1, 2)
        moments = [
            lambda: records_in(run) >= records + more,  # noqa: B023
            lambda: saving(run, reached + steps),  # noqa: B023
            lambda: newest(run) >= reached + steps and saving(run, reached),  # noqa: B023
            # A fast machine would finish within the longest wait.
            lambda: time.monotonic() > begun + wait or newest(run) >= reached + 4,  # noqa: B023
        ]
        if not kill_when(moments[kills % 4], start(config_file, run, *longer, *OFTEN), run):
            break
    assert kills >= 8
    assert trajectory(run) == trajectory(whole), log_of(run)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(whole, config_file, tmp_path, capsys):
    run = shutil.copytree(whole, tmp_path / "run")
    largest = max((run / "checkpoints" / "20").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert train(config_file, run) == 0
    lines = capsys.readouterr().err
    assert "checkpoint 20 is damaged (file " in lines
    assert "using 15" in lines
    assert "resuming at step 15" in lines
    assert trajectory(run) == trajectory(whole)


def test_another_mesh_sees_the_same_batches_and_masks(whole, config_file, tmp_path, capsys):
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "20")
    shutil.rmtree(run / "checkpoints" / "15")
    assert train(config_file, run, "--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2") == 0
    assert "resuming at step 10" in capsys.readouterr().err
    for expected, got in zip(trajectory(whole), trajectory(run), strict=True):
        assert got[:2] == expected[:2]
        np.testing.assert_allclose(float(got[2]), float(expected[2]), rtol=3e-6)
        if got[1] == "train":
            np.testing.assert_allclose(float(got[3]), float(expected[3]), rtol=1e-4)
            assert got[4] == expected[4]
