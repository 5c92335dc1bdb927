"""Several processes of a run on this machine: their variables, their logs, and a run that survives a killed process unchanged."""

import dataclasses
import json
import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from gpt_jax.errors import UserError
from gpt_jax.launch import local
from gpt_jax.launch.checks import check
from gpt_jax.launch.job import Job
from gpt_jax.runtime.accelerators import parse_accelerator
from tests.tiny import smoke_overrides, trajectory

STAND_IN = """
import os, sys
print("process", os.environ["JAX_PROCESS_ID"], "of", os.environ["JAX_NUM_PROCESSES"], "at", os.environ["JAX_COORDINATOR_ADDRESS"])
sys.stdout.flush()
print("devices", os.environ["JAX_NUM_CPU_DEVICES"], "words", *sys.argv[1:], file=sys.stderr)
"""


@pytest.fixture
def job(tmp_path):
    return make(str(tmp_path / "run"), ("--train.duration", "7 steps"))


def make(workdir, overrides):
    """A job of two processes with two devices each."""
    return Job("pretrain", "smoke", overrides, workdir, "tiny", parse_accelerator("cpu-4"), processes=2)


def variables(line):
    words = shlex.split(line)
    return dict(word.split("=", 1) for word in words[: words.index("gpt-jax")])


def test_processes_share_the_devices_of_a_cpu(job):
    first, second, end = local.render(job).splitlines()
    assert variables(second) == {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_COORDINATOR_ADDRESS": "127.0.0.1:PORT",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "1",
        "GPT_JAX_WAIT_FOR_LOCK": "1",
    }
    assert first.endswith(
        f"gpt-jax pretrain smoke --workdir {job.workdir} --train.duration '7 steps' >> {job.workdir}/logs/process-0.log 2>&1 &"
    )
    assert end == "wait  # supervised: 100 restarts after preemptions, 3 after crashes"


def test_a_single_process_joins_no_others(job):
    line, _ = local.render(dataclasses.replace(job, processes=1)).splitlines()
    assert variables(line) == {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4", "GPT_JAX_WAIT_FOR_LOCK": "1"}


@pytest.mark.parametrize(("processes", "expected"), [(4, ["0", "1", "2", "3"]), (2, ["0,1", "2,3"]), (1, ["0,1,2,3"])])
def test_processes_share_gpus(job, processes, expected):
    job = dataclasses.replace(job, accelerator=parse_accelerator("h100-4"), processes=processes)
    lines = local.render(job).splitlines()[:-1]
    assert [variables(line)["CUDA_VISIBLE_DEVICES"] for line in lines] == expected
    assert "JAX_NUM_CPU_DEVICES" not in variables(lines[0])


ELSEWHERE = "leave it out; local runs in the environment of this command, on this machine"


@pytest.mark.parametrize(
    ("change", "accelerator", "processes", "message"),
    [
        ({}, "v5e-8", 1, "--accelerator: local runs on CPUs and GPUs"),
        (
            {"slices": 2},
            "cpu-4",
            1,
            "--slices: leave it out; local runs on this machine alone, where --processes sets the number",
        ),
        ({"zone": "z"}, "cpu-4", 1, f"--zone: {ELSEWHERE}"),
        ({"spot": True}, "cpu-4", 1, f"--spot: {ELSEWHERE}"),
        ({"image": "i"}, "cpu-4", 1, f"--image: {ELSEWHERE}"),
        ({"workdir": "gs://b/run"}, "cpu-4", 1, "--workdir: 'gs://b/run' is not a file or folder, and this target mounts no"),
        ({}, "cpu-4", 3, "--processes: 3 cannot share the 4 devices of cpu-4 evenly; give a divisor of 4"),
        ({}, "cpu-4", 0, "--processes: 0 cannot share"),
    ],
)
def test_jobs_that_this_machine_cannot_run_are_refused(job, change, accelerator, processes, message):
    job = dataclasses.replace(job, accelerator=parse_accelerator(accelerator), processes=processes, **change)
    with pytest.raises(UserError, match=message):
        check(job, local)


def test_each_process_has_its_log_and_that_of_the_first_is_shown(job, monkeypatch, capsys):
    spawn = local.spawn
    monkeypatch.setattr(local, "spawn", lambda command, **options: spawn([sys.executable, "-SEc", STAND_IN, *command], **options))
    assert local.submit(job) == 0
    assert local.submit(job) == 0
    logs = [(Path(job.workdir) / "logs" / f"process-{number}.log").read_text().splitlines() for number in (0, 1)]
    assert [len(log) for log in logs] == [4, 4]
    first, again = logs[0][0:4:2]
    port = first.rpartition(":")[2]
    assert first == f"process 0 of 2 at 127.0.0.1:{port}"
    assert logs[1][0] == f"process 1 of 2 at 127.0.0.1:{port}"
    assert first != again  # The ports differ.
    assert logs[1][1].startswith("devices 2 words ")
    assert logs[1][1].endswith(f"-m gpt_jax pretrain smoke --workdir {job.workdir} --train.duration 7 steps")
    shown = capsys.readouterr().err
    assert shown.count("process 0 of 2 at") == 2  # Earlier content of the log is not repeated.
    assert "process 1 of 2" not in shown


def test_no_process_outlives_one_that_could_not_be_started(job, monkeypatch):
    started, spawn = [], local.spawn
    sleep = [sys.executable, "-SEc", "import time; time.sleep(60)"]
    monkeypatch.setattr(local, "spawn", lambda command, **options: started.append(spawn(sleep, **options)) or started[-1])
    (Path(job.workdir) / "logs" / "process-1.log").mkdir(parents=True)  # so that the log of process 1 cannot be opened
    with pytest.raises(IsADirectoryError):
        local.submit(job)
    assert [process.returncode for process in started] == [-signal.SIGKILL]


def test_processes_do_not_see_the_variables_of_slurm(job, monkeypatch):
    for name in ("SLURM_LOCALID", "SLURM_JOB_ID"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("OTHER", "0")
    seen, spawn = [], local.spawn
    end = [sys.executable, "-SEc", ""]
    monkeypatch.setattr(local, "spawn", lambda command, **options: seen.append(options["env"]) or spawn(end, **options))
    assert local.submit(job) == 0
    assert [("OTHER" in variables, any(name.startswith("SLURM_") for name in variables)) for variables in seen] == [
        (True, False)
    ] * 2
    assert local.render(job).splitlines()[0].split()[:1] == ["unset"]
    assert {"SLURM_JOB_ID", "SLURM_LOCALID"} <= set(local.render(job).splitlines()[0].split())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The job of a run that was not disturbed."""
    folder = tmp_path_factory.mktemp("local")
    job = make(
        str(folder / "whole"), smoke_overrides(folder, data={"store": str(folder / "store")}, train={"duration": "60 steps"})
    )
    check(job, local)
    assert local.submit(job) == 0
    return job


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_changes_nothing(whole, tmp_path, monkeypatch, capfd, killed):
    """The records of the run equal those of the undisturbed one bit for bit."""
    job = dataclasses.replace(whole, workdir=str(tmp_path / "run"))
    metrics = tmp_path / "run" / "metrics.jsonl"
    started = []
    spawn = local.spawn
    monkeypatch.setattr(local, "spawn", lambda *words, **options: started.append(spawn(*words, **options)) or started[-1])

    def kill():
        limit = time.monotonic() + 300
        while not (metrics.exists() and '"step": 23,' in metrics.read_text()) and time.monotonic() < limit:
            time.sleep(0.01)
        os.kill(started[killed].pid, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    assert local.submit(job) == 0
    shown = capfd.readouterr().err
    print(shown)
    assert "crash restart 1 of 3 in 1 s" in shown
    assert "resuming at step " in shown
    assert "done (preemptions: 0, crashes: 1)" in shown
    assert trajectory(tmp_path / "run") == trajectory(Path(whole.workdir))
    assert {json.loads(line)["attempt"] for line in metrics.read_text().splitlines()} == {1, 2}
