"""Two processes on one run's folder: the second is refused or waits, readers are let in, and who has lost the lock stops."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from gpt_jax.cli import main
from gpt_jax.runtime import lock
from gpt_jax.train.logging import ProgressLogger

pytestmark = pytest.mark.slow
LONG = ("--train.duration", "100000 steps", "--train.save-every", "20 steps", "--train.eval-every", "50000 steps")


class Run:
    """A command in a process of its own."""

    def __init__(self, words, log, **environment):
        self.log = log
        command = [sys.executable, "-m", "gpt_jax", *map(str, words)]
        with open(log, "wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=os.environ | environment, start_new_session=True
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def output(self):
        return self.log.read_text(errors="replace")

    def wait_for(self, condition, seconds=120):
        limit = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < limit, self.output()
            assert self.process.poll() is None, self.output()
            time.sleep(0.02)

    def finish(self, code, seconds=120):
        assert self.process.wait(seconds) == code, self.output()
        return self.output()


def records(run):
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.fixture
def running(config_file, tmp_path):
    """A run that trains, has saved a checkpoint, and is far from its end."""
    folder = tmp_path / "run"
    with Run(["pretrain", config_file, "--workdir", folder, *LONG], tmp_path / "first.log") as run:
        run.folder = folder
        run.wait_for(lambda: (folder / "checkpoints" / "20" / "manifest.json").exists())
        yield run


def words(config_file, run):
    return [str(word) for word in ("pretrain", config_file, "--workdir", run.folder, *LONG)]


def test_a_second_run_is_refused_and_nothing_of_the_first_is_touched(running, config_file, capsys):
    half_written = running.folder / "checkpoints" / "90000.orbax-checkpoint-tmp"
    half_written.mkdir()
    (half_written / "array").write_text("being written")
    before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in running.folder.glob("config.json")}
    for command in (words(config_file, running), ["checkpoint", "prune", str(running.folder)]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.startswith(
            f"gpt-jax: {running.folder}: in use by process {running.process.pid} on host {os.uname().nodename} ("
        )
        assert error.count("\n") == 1
    assert (half_written / "array").read_text() == "being written"
    assert before == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in running.folder.glob("config.json")}
    count = records(running.folder)
    running.wait_for(lambda: records(running.folder) > count)  # The first goes on.
    assert main(["checkpoint", "prune", str(running.folder / "checkpoints")]) == 2


def test_readers_do_not_need_the_lock(running, tmp_path, capsys):
    assert main(["checkpoint", "list", str(running.folder)]) == 0
    assert main(["generate", str(running.folder), "--prompt", "a", "--tokens", "3"]) == 0
    assert main(["export", str(running.folder), "--format", "npz", "--out", str(tmp_path / "npz")]) == 0
    assert running.process.poll() is None


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 42), (signal.SIGINT, 42)])
def test_a_signal_releases_the_lock(running, number, code):
    running.process.send_signal(number)
    running.finish(code)
    assert list(running.folder.glob("lock.*")) == []


def test_a_run_that_was_killed_frees_its_folder_at_once(running, config_file, capsys):
    running.process.kill()
    running.process.wait()
    assert len(list(running.folder.glob("lock.*"))) == 1
    begun = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        update = ProgressLogger.update
        patch.setattr(ProgressLogger, "update", lambda *call: update(*call) or os.kill(os.getpid(), signal.SIGTERM))
        assert main(words(config_file, running)) == 42
    assert time.monotonic() - begun < 45
    assert "waiting" not in capsys.readouterr().err
    assert list(running.folder.glob("lock.*")) == []


@pytest.mark.parametrize("taken", [False, True])
def test_a_run_that_has_lost_its_lock_stops_before_it_writes(running, taken):
    (path,) = running.folder.glob("lock.*")
    content = json.loads(path.read_text())
    path.unlink()
    if taken:
        (running.folder / "lock.7").write_text(json.dumps(content | {"host": "node7", "pid": 4242, "token": "another"}))
    output = running.finish(1)
    assert output.splitlines()[-1].startswith(f"gpt-jax: {running.folder}: this process has lost the lock of this folder (")
    assert ("process 4242 on host node7" if taken else "its lock file was deleted") in output
    assert "Traceback" not in output
    assert [path.name for path in running.folder.glob("lock.*")] == (["lock.7"] if taken else [])
    assert not (running.folder / "result.json").exists()


def test_supervised_and_launched_runs_wait_until_the_folder_is_free(running, config_file, tmp_path, monkeypatch):
    command = ["supervise", "--", *words(config_file, running)]
    with Run(command, tmp_path / "second.log") as second:
        expected = f"{running.folder}: locked by process {running.process.pid} on host {os.uname().nodename} ("
        second.wait_for(lambda: expected in second.output())
        assert "waiting until it has ended" in second.output()
        running.process.send_signal(signal.SIGTERM)
        running.finish(42)
        second.wait_for(lambda: "resuming at step " in second.output())
        second.process.send_signal(signal.SIGTERM)
        second.finish(42)
    assert list(running.folder.glob("lock.*")) == []


def test_a_run_that_waits_can_be_stopped(running, config_file, tmp_path):
    with Run(words(config_file, running), tmp_path / "second.log", GPT_JAX_WAIT_FOR_LOCK="1") as second:
        second.wait_for(lambda: "waiting until it has ended" in second.output())
        second.process.send_signal(signal.SIGTERM)
        output = second.finish(42)
    assert output.splitlines()[-1].endswith("stop requested while waiting for the lock of this folder")
    assert running.process.poll() is None


def test_an_import_and_a_store_have_locks_of_their_own(config_file, tmp_path, capsys):
    with lock.locked(tmp_path / ".out.tmp", print):
        assert main(["import", str(tmp_path), "--workdir", str(tmp_path / "out")]) == 2
        assert f"gpt-jax: {tmp_path}/out: in use by process {os.getpid()} on host" in capsys.readouterr().err
    with lock.locked(tmp_path / "store", print):
        assert main(["prepare", str(config_file), "--data.store", str(tmp_path / "store")]) == 2
        assert f"gpt-jax: {tmp_path}/store: in use by process {os.getpid()} on host" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


HOLD = """
import sys, time
from pathlib import Path
from gpt_jax import cli
from gpt_jax.runtime.lock import locked

def hold(options, overrides):
    with locked(options.run_folder, print):
        print("held", flush=True)
        time.sleep(60)

cli.VERBS["checkpoint"] = hold
sys.exit(cli.main())
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_releases_the_lock_of_commands_that_do_not_train(tmp_path, number, code):
    command = [sys.executable, "-c", HOLD, "checkpoint", "prune", str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout.readline() == "held\n", process.stderr.read()
        assert len(list(tmp_path.glob("lock.*"))) == 1
        process.send_signal(number)
        assert process.wait(20) == code
        assert "Traceback" not in process.stderr.read()
    assert list(tmp_path.iterdir()) == []
