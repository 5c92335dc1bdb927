"""Several processes on this machine under one supervisor: one process for each GPU, or several simulated hosts on the CPU."""

import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from gpt_jax.errors import require
from gpt_jax.runtime.lock import WAIT

from .job import Job
from .supervise import RestartBudget, Supervisor, count_steps, kill, say, show, spawn

MOUNTS = ()
UNSUPPORTED = {"slices": "local runs on this machine alone, where --processes sets the number of processes"}
UNSUPPORTED |= dict.fromkeys(
    ("zone", "project", "queue", "image", "spot"), "local runs in the environment of this command, on this machine"
)


def check(job: Job) -> None:
    """Checks that the processes can share the accelerator's devices.

    Raises:
      UserError: they cannot, or the accelerator is a TPU.
    """
    devices, processes = job.accelerator.devices, job.processes
    require(job.accelerator.kind != "tpu", "accelerator", "local runs on CPUs and GPUs; on a TPU VM, use gpt-jax supervise")
    divides = processes > 0 and devices % processes == 0
    fault = f"{processes} cannot share the {devices} devices of {job.accelerator.name} evenly; give a divisor of {devices}"
    require(divides, "processes", fault)


def render(job: Job) -> str:
    """Returns shell commands that are equivalent to `submit`. PORT represents a free port, a new one for each attempt."""
    lines = [shlex.join(["unset", *hidden])] if (hidden := _hidden_variables()) else []
    for log, variables in zip(_logs(job), _environments(job, "PORT"), strict=True):
        words = [*(f"{name}={value}" for name, value in variables.items()), *job.command()]
        lines.append(f"{shlex.join(words)} >> {shlex.quote(str(log))} 2>&1 &")
    lines.append(f"wait  # supervised: {job.preemptions} restarts after preemptions, {job.crashes} after crashes")
    return "\n".join(lines) + "\n"


def submit(job: Job) -> int:
    """Runs the processes until the run is done; returns the exit code described at `Supervisor.run`.

    Each process appends to WORKDIR/logs/process-N.log; the log of process 0 is also shown.
    """
    logs = _logs(job)
    logs[0].parent.mkdir(parents=True, exist_ok=True)
    logs[0].touch()

    def start() -> Sequence[subprocess.Popen[bytes]]:
        command = [sys.executable, "-m", "gpt_jax", *job.command()[1:]]
        inherited = {name: value for name, value in os.environ.items() if name not in _hidden_variables()}
        started: list[subprocess.Popen[bytes]] = []
        try:
            for log, variables in zip(logs, _environments(job, str(_free_port())), strict=True):
                with open(log, "ab") as output:
                    environment = inherited | variables
                    started.append(spawn(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment))
        except BaseException:  # The processes that have started would wait for the others.
            kill(started)
            raise
        return started

    with open(logs[0], encoding="utf-8", errors="replace") as first_log:
        first_log.seek(0, os.SEEK_END)
        say(f"running {job.name} in {len(logs)} process{'es' if len(logs) > 1 else ''}; logs are in {logs[0].parent}")
        return Supervisor(
            start,
            RestartBudget(job.preemptions, job.crashes),
            job.grace_seconds,
            steps=lambda: count_steps(job.workdir),
            tick=lambda: show(first_log.read()),
        ).run()


def _environments(job: Job, port: str) -> list[dict[str, str]]:
    """Returns the variables of each process: its devices and, if there are several processes, how to join the others."""
    share = job.accelerator.devices // job.processes
    environments = []
    for number in range(job.processes):
        if job.accelerator.kind == "cpu":
            variables = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(share)}
        else:
            variables = {"CUDA_VISIBLE_DEVICES": ",".join(str(number * share + device) for device in range(share))}
        if job.processes > 1:
            variables |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}"}
            variables |= {"JAX_NUM_PROCESSES": str(job.processes), "JAX_PROCESS_ID": str(number)}
        environments.append(variables | {WAIT: "1"})
    return environments


def _hidden_variables() -> list[str]:
    """Returns the variables that are not passed on to processes, because JAX would use only one device with SLURM_LOCALID set."""
    return sorted(name for name in os.environ if name.startswith("SLURM_"))


def _logs(job: Job) -> list[Path]:
    return [Path(job.workdir) / "logs" / f"process-{number}.log" for number in range(job.processes)]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
