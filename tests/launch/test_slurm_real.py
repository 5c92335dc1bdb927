"""The batch file on a SLURM cluster of two virtual nodes on this machine: `make slurm`.

This needs Debian's slurm-wlm and munge, and the right to start them, as root has.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpt_jax.launch import slurm
from gpt_jax.launch.checks import check
from gpt_jax.launch.job import Job
from gpt_jax.runtime.accelerators import parse_accelerator
from tests.tiny import smoke_overrides

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
SYSTEM = "/usr/sbin:/usr/bin:/sbin:/bin"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("GPT_JAX_SLURM") != "1", reason="make slurm sets GPT_JAX_SLURM=1"),
    pytest.mark.skipif(not all(shutil.which(tool, path=SYSTEM) for tool in TOOLS), reason="apt-get install slurm-wlm munge"),
]

CONFIGURATION = """
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=all Nodes=n1,n2 Default=YES
"""


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]


def read(*words):
    """Runs a command; returns its output."""
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout


def wait_for(event, condition, logs, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{event}: not after {seconds} s\n{logs()}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The folder of a cluster whose daemons run apart from any that the machine has."""
    folder = tmp_path_factory.mktemp("slurm")
    for inner in ("munge", "state"):
        (folder / inner).mkdir()
    (folder / "munge").chmod(0o755)
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o600)
    host = socket.gethostname().partition(".")[0]
    user = read("id", "-un").strip()
    file = folder / "slurm.conf"
    file.write_text(CONFIGURATION.format(host=host, ports=free_ports(3), user=user, folder=folder))
    munge = {"key-file": "key", "socket": "munge/socket", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "seed"}
    patch = pytest.MonkeyPatch()
    patch.setenv("PATH", f"{Path(sys.executable).parent}:{SYSTEM}")
    patch.setenv("SLURM_CONF", str(file))
    patch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    try:
        read("munged", "--force", *(f"--{name}={folder / path}" for name, path in munge.items()))
        read("slurmctld", "-f", str(file))
        for node in ("n1", "n2"):
            read("slurmd", "-N", node, "-f", str(file))
        logs = lambda: "\n".join(log.read_text(errors="replace") for log in folder.glob("*.log"))  # noqa: E731
        wait_for("two idle nodes", lambda: read("sinfo", "--noheader", "--format=%D %t").split() == ["2", "idle"], logs, 60)
        yield folder
    finally:
        for name in ("slurmd-n1", "slurmd-n2", "slurmctld", "munged"):
            if (folder / f"{name}.pid").exists():
                os.kill(int((folder / f"{name}.pid").read_text()), 15)
        patch.undo()


class Run:
    """A submitted job of two nodes, and its folder."""

    def __init__(self, folder, name, capfd):
        self.folder = folder / name
        train = {"duration": "300 steps", "save_every": "100 steps", "eval_every": "150 steps"}
        words = smoke_overrides(folder, data={"pipeline": "auto"}, train=train)
        cpu = parse_accelerator("cpu-1")
        job = Job("pretrain", "smoke", words, str(self.folder), name, cpu, slices=2, grace_seconds=20)
        check(job, slurm)
        assert slurm.submit(job) == 0
        self.id = capfd.readouterr().out.split()[-1]  # "Submitted batch job 1"

    def state(self):
        return dict(field.partition("=")[::2] for field in read("scontrol", "show", "job", self.id).split())

    def records(self):
        file = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def losses(self):
        return [
            (record["kind"], record["step"], record["loss"]) for record in self.records() if record["kind"] in ("train", "eval")
        ]

    def logs(self):
        return "\n".join(f"== {log.name}\n{log.read_text(errors='replace')}" for log in sorted(self.folder.glob("logs/*.log")))

    def wait(self, state):
        wait_for(state, lambda: self.state()["JobState"] == state, self.logs)


def test_a_requeued_job_continues_and_equals_an_undisturbed_one(cluster, tmp_path, capfd):
    whole = Run(tmp_path, "whole", capfd)
    whole.wait("COMPLETED")
    run = Run(tmp_path, "requeued", capfd)
    wait_for("fifty updates", lambda: len(run.records()) > 50, run.logs)
    read("scontrol", "requeue", run.id)
    run.wait("PENDING")
    stopped = run.records()[-1]["step"]
    assert 50 <= stopped < 300, run.logs()
    read("scontrol", "update", f"JobId={run.id}", "StartTime=now")  # Otherwise SLURM waits for two minutes.
    run.wait("COMPLETED")

    assert run.losses() == whole.losses()
    assert [step for kind, step, _ in run.losses() if kind == "train"] == list(range(1, 301))
    assert f"resuming at step {stopped}" in run.logs()
    assert "done, after 1 preemptions and 0 crashes" in run.logs()
    assert "mesh data=2" in run.logs()  # The two processes form one training.
    assert run.state()["Restarts"] == "1"
    names = {log.name for log in (run.folder / "logs").iterdir()}
    assert names == {f"slurm-{run.id}.log", "process-0.log", "process-1.log"}


def test_processes_that_get_sigterm_save_and_the_script_requeues_the_job(cluster, tmp_path, capfd):
    """A time limit, or a preemption with a grace time, sends SIGTERM to the processes alone."""
    run = Run(tmp_path, "warned", capfd)
    wait_for("twenty updates", lambda: len(run.records()) > 20, run.logs)
    read("scancel", "--signal=TERM", f"{run.id}.0")
    run.wait("PENDING")
    assert run.state()["Restarts"] == "1"
    assert "preempted (exit 42): restart 1 of 100" in run.logs()
    read("scancel", run.id)


def test_a_cancelled_job_saves_and_is_not_requeued(cluster, tmp_path, capfd):
    run = Run(tmp_path, "cancelled", capfd)
    wait_for("twenty updates", lambda: len(run.records()) > 20, run.logs)
    read("scancel", run.id)
    run.wait("CANCELLED")
    wait_for("the last line of the script", lambda: "SLURM decides whether the job runs again" in run.logs(), run.logs)
    stopped = run.records()[-1]["step"]
    assert (run.folder / "checkpoints" / str(stopped)).is_dir(), run.logs()
