"""Two processes with four devices each train like one process with eight, stop together, and continue together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from gpt_jax.runtime import lock
from gpt_jax.train import checkpoint_info
from gpt_jax.train.pretrain import pretrain

MESH = {"data": 2, "fsdp": 2, "tensor": 2}
ON_MESH = ("--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2")


class Pair:
    """The command in two processes that join over this machine's loopback interface.

    Args:
      second: options of the second process alone.
    """

    def __init__(self, config_file, run, *options, second=()):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.run = run
        self.logs = [run.with_name(f"{run.name}.log{number}") for number in (0, 1)]
        self.processes = []
        for number, log in enumerate(self.logs):
            command = [sys.executable, "-m", "gpt_jax", "pretrain", str(config_file), "--workdir", str(run), *options]
            command += ["--distributed.coordinator", f"127.0.0.1:{port}", "--distributed.num-processes", "2"]
            command += ["--distributed.process-id", str(number), *(second if number else ())]
            with open(log, "wb") as file:
                environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4"}
                self.processes.append(subprocess.Popen(command, stdout=file, stderr=file, env=environment))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def output(self):
        return "\n".join(log.read_text(errors="replace") for log in self.logs)

    def wait_for_records(self, count, seconds=240):
        """Waits until metrics.jsonl has `count` lines."""
        file, limit = self.run / "metrics.jsonl", time.monotonic() + seconds
        while not file.exists() or file.read_bytes().count(b"\n") < count:
            assert time.monotonic() < limit, self.output()
            assert [process.poll() for process in self.processes] == [None, None], self.output()
            time.sleep(0.01)

    def finish(self, code=0, seconds=240):
        """Waits for both processes to end, and checks their exit code."""
        limit = time.monotonic() + seconds
        try:
            codes = [process.wait(max(limit - time.monotonic(), 0.1)) for process in self.processes]
        except subprocess.TimeoutExpired:
            pytest.fail(f"not finished after {seconds} s:\n{self.output()}")
        assert codes == [code, code], self.output()


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return [(record["kind"], record["step"], record["loss"]) for record in records(run) if record["kind"] in ("train", "eval")]


def assert_same_losses(run, expected):
    for (*where, loss), (*expected_where, expected_loss) in zip(losses(run), losses(expected), strict=True):
        assert where == expected_where
        np.testing.assert_allclose(loss, expected_loss, rtol=3e-6)


@pytest.fixture(scope="module")
def single(tiny, tmp_path_factory):
    """The folder of a run in one process with eight devices."""
    run = tmp_path_factory.mktemp("processes") / "single"
    pretrain(tiny(mesh=MESH), run)
    return run


@pytest.mark.slow
def test_two_processes_train_as_one(single, config_file, tmp_path):
    run = tmp_path / "run"
    with Pair(config_file, run, *ON_MESH) as pair:
        pair.finish()
    assert_same_losses(run, single)
    assert pair.logs[1].read_text(errors="replace").count("step ") == 0, pair.output()  # Only the first prints.
    assert [info.step for info in checkpoint_info.list_checkpoints(run)] == [10, 15, 20]
    assert json.loads((run / "result.json").read_text())["step"] == 20


@pytest.mark.slow
@pytest.mark.parametrize("receiver", [0, 1])
def test_sigterm_to_one_process_stops_both_at_one_step_and_both_continue(config_file, tmp_path, receiver):
    options = (*ON_MESH, "--train.duration", "2000 steps", "--train.save-every", "1000 steps", "--train.eval-every", "500 steps")
    run = tmp_path / "run"
    with Pair(config_file, run, *options) as pair:
        pair.wait_for_records(20)
        pair.processes[receiver].send_signal(signal.SIGTERM)
        pair.finish(42)
    (stopped,) = [info.step for info in checkpoint_info.list_checkpoints(run) if info.state == "sound"][-1:]
    assert 20 <= stopped < 2000
    assert losses(run)[-1][1] == stopped
    assert f"saved at step {stopped} of 2000" in pair.output()
    shorter = (*ON_MESH, "--train.duration", f"{stopped + 5} steps", "--allow-changes")
    with Pair(config_file, run, *shorter) as pair:
        pair.finish()
    assert f"resuming at step {stopped}" in pair.output()
    assert [step for kind, step, _ in losses(run) if kind == "train"] == list(range(1, stopped + 6))


@pytest.mark.slow
def test_processes_that_have_prepared_their_text_can_still_be_asked_to_stop(config_file, tmp_path):
    run = tmp_path / "run"
    options = (
        *ON_MESH,
        "--data.store",
        str(tmp_path / "store"),
        "--train.duration",
        "2000 steps",
        "--train.eval-every",
        "900 steps",
    )
    with Pair(config_file, run, *options) as pair:
        pair.wait_for_records(10)
        pair.processes[0].send_signal(signal.SIGTERM)
        pair.finish(42)
    assert list(run.glob("lock.*")) == []


@pytest.mark.slow
def test_two_processes_killed_and_started_again_give_an_equal_run(config_file, tmp_path):
    options = (*ON_MESH, "--train.duration", "60 steps", "--train.save-every", "5 steps")
    with Pair(config_file, tmp_path / "whole", *options) as pair:
        pair.finish()
    run = tmp_path / "run"
    with Pair(config_file, run, *options) as pair:
        pair.wait_for_records(20)
    assert not (run / "result.json").exists()
    with Pair(config_file, run, *options) as pair:
        pair.finish()
    assert "resuming at step " in pair.output()
    assert losses(run) == losses(tmp_path / "whole")


@pytest.mark.slow
def test_a_process_that_nobody_joins_ends_with_1(config_file, tmp_path):
    with Pair(config_file, tmp_path / "run", "--distributed.timeout-seconds", "4") as pair:
        pair.processes[0].kill()
        assert pair.processes[1].wait(120) == 1, pair.output()
    assert "process 1 of 2 could not join the others at 127.0.0.1:" in pair.output()
    assert "Traceback" not in pair.output()


@pytest.mark.slow
def test_all_processes_print_a_mistake_that_the_first_finds(config_file, tmp_path):
    options = ("--data.source", str(tmp_path / "nowhere"), "--data.store", str(tmp_path / "store"))
    with Pair(config_file, tmp_path / "run", *ON_MESH, *options) as pair:
        pair.finish(2)
    for log in pair.logs:
        output = log.read_text(errors="replace")
        assert output.count("gpt-jax: ") == 1
        assert str(tmp_path / "nowhere") in output
        assert "Traceback" not in output


@pytest.mark.slow
def test_processes_that_were_started_differently_name_the_difference(config_file, tmp_path):
    with Pair(config_file, tmp_path / "run", *ON_MESH, second=("--train.seed", "7", "--optim.peak-lr", "0.5")) as pair:
        pair.finish(2)
    for log in pair.logs:
        (line,) = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("gpt-jax: ")]
        assert "process 1 (" in line
        assert "has --train.seed 7, process 0 (" in line
        assert "has --optim.peak-lr 0.5" in line
        assert "commit" not in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_are_refused_together_while_another_run_uses_the_folder(config_file, tmp_path):
    with lock.locked(tmp_path / "run", print), Pair(config_file, tmp_path / "run", *ON_MESH) as pair:
        pair.finish(2)
    for log in pair.logs:
        (line,) = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("gpt-jax: ")]
        assert line.startswith(f"gpt-jax: {tmp_path}/run: in use by process {os.getpid()} on host ")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_wait_together_and_either_can_be_asked_to_stop(config_file, tmp_path, monkeypatch):
    monkeypatch.setenv("GPT_JAX_WAIT_FOR_LOCK", "1")
    with lock.locked(tmp_path / "run", print), Pair(config_file, tmp_path / "run", *ON_MESH) as pair:
        limit = time.monotonic() + 120
        while "waiting until it has ended" not in pair.output():
            assert time.monotonic() < limit, pair.output()
            time.sleep(0.1)
        pair.processes[1].send_signal(signal.SIGTERM)
        pair.finish(42)
    assert pair.output().count("stop requested while waiting for the lock") == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_end_soon_after_the_lock_is_lost(config_file, tmp_path):
    run = tmp_path / "run"
    with Pair(config_file, run, *ON_MESH, "--train.duration", "100000 steps", "--train.eval-every", "50000 steps") as pair:
        pair.wait_for_records(10)
        (path,) = run.glob("lock.*")
        path.unlink()
        assert pair.processes[0].wait(60) == 1, pair.output()
        assert pair.processes[1].wait(60) != 0, pair.output()  # JAX may abort it, because the first process is gone.
    assert "this process has lost the lock of this folder (its lock file was deleted)" in pair.logs[0].read_text(errors="replace")
    assert "Traceback" not in pair.logs[0].read_text(errors="replace")
