"""A run of several processes on this machine, under `supervise`: one process a GPU, or several hosts tried out on a CPU."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from gpt_jax.errors import require

from .job import Checked, Job, require_no_buckets
from .supervise import Budget, Supervisor, kill, say, spawn, steps_in


def render(job: Job, checked: Checked, processes: int = 1) -> str:
    """What `submit` runs, as a shell would be told; PORT is a free one, another for each attempt.

    Raises:
      UserError: this machine is not what the job asks for.
    """
    _require_possible(job, checked, processes)
    lines = [shlex.join(["unset", *hidden])] if (hidden := _hidden()) else []
    for number, variables in enumerate(_variables(checked, processes, "PORT")):
        words = [*(f"{name}={value}" for name, value in variables.items()), *job.command()]
        lines.append(f"{shlex.join(words)} >> {shlex.quote(str(_log(job, number)))} 2>&1 &")
    lines.append(f"wait  # supervised: {job.preemptions} restarts after preemptions, {job.crashes} after crashes")
    return "\n".join(lines) + "\n"


def submit(job: Job, checked: Checked, processes: int = 1) -> int:
    """Runs the processes until the run is done; returns the exit code that `supervise` describes.

    Each process appends to WORKDIR/logs/process-N.log, which for process 0 is shown here too.

    Raises:
      UserError: this machine is not what the job asks for.
    """
    _require_possible(job, checked, processes)
    logs = [_log(job, number) for number in range(processes)]
    logs[0].parent.mkdir(parents=True, exist_ok=True)

    def start() -> Sequence[subprocess.Popen[bytes]]:
        command = [sys.executable, "-m", "gpt_jax", *job.command()[1:]]
        inherited = {name: value for name, value in os.environ.items() if name not in _hidden()}
        started: list[subprocess.Popen[bytes]] = []
        try:
            for log, variables in zip(logs, _variables(checked, processes, str(_free_port())), strict=True):
                with open(log, "ab") as output:
                    environment = inherited | variables
                    started.append(spawn(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment))
        except BaseException:  # those that run would wait for the ones that do not
            for process in started:
                kill(process)
            raise
        return started

    logs[0].touch()
    with open(logs[0], encoding="utf-8", errors="replace") as shown:
        shown.seek(0, os.SEEK_END)
        say(f"{processes} process{'es' if processes > 1 else ''} of {job.name}; logs in {logs[0].parent}")
        return Supervisor(
            start=start,
            budget=Budget(job.preemptions, job.crashes),
            grace_seconds=job.grace_seconds,
            steps=lambda: steps_in(job.workdir),
            tick=lambda: _show(shown),
        ).run()


def _require_possible(job: Job, checked: Checked, processes: int) -> None:
    accelerator, devices = checked.accelerator, checked.accelerator.devices
    require(accelerator.kind != "tpu", "accelerator", "local runs on CPUs and GPUs; on a TPU VM use gpt-jax supervise")
    require(job.slices == 1, "slices", f"{job.slices} of them are several machines; local has --processes")
    for name in ("zone", "project", "queue", "image", "spot"):
        require(not getattr(job, name), name, "local runs in this environment on this machine; leave it out")
    require_no_buckets(job, checked, "local")
    require(
        processes > 0 and devices % processes == 0,
        "processes",
        f"{processes} cannot share the {devices} devices of {accelerator.name} evenly; give a divisor of {devices}",
    )


def _variables(checked: Checked, processes: int, port: str) -> list[dict[str, str]]:
    """The environment variables that tell each process its devices and, where there are several, its place among them."""
    share = checked.accelerator.devices // processes
    every = []
    for number in range(processes):
        if checked.accelerator.kind == "cpu":
            variables = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(share)}
        else:
            variables = {"CUDA_VISIBLE_DEVICES": ",".join(str(number * share + device) for device in range(share))}
        if processes > 1:
            variables |= {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(number),
            }
        every.append(variables)
    return every


def _hidden() -> list[str]:
    """Variables of this environment that the processes must not have: where there is a SLURM_LOCALID, JAX takes one device."""
    return sorted(name for name in os.environ if name.startswith("SLURM_"))


def _log(job: Job, number: int) -> Path:
    return Path(job.workdir) / "logs" / f"process-{number}.log"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _show(log: TextIO) -> None:
    """Prints what was written to the file since the last call."""
    if new := log.read():
        sys.stderr.write(new)
        sys.stderr.flush()
