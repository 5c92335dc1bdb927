"""SkyPilot: a task for managed jobs, which finds machines in any cloud and starts the training again when they are lost.

SkyPilot's controller does the restarting: after a preemption always (it has no budget for them), after exit code 42 likewise,
and after other failures `crashes` times.

Source: "Task YAML" and "Managed jobs" (SkyPilot documentation, 0.14).
"""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from gpt_jax.errors import UserError, require
from gpt_jax.runtime import git_info
from gpt_jax.runtime.git_info import Checkout

from .accelerators import RUNTIMES
from .job import PORT, RESTART_CODE, Checked, Job, buckets, mounted, require_reachable, require_tool, to_yaml

DIFF = "~/uncommitted.diff"
"""On the machines."""


def render(job: Job, checked: Checked) -> str:
    """The task file, opened by the commands that use it.

    Raises:
      UserError: the workers cannot reach a path, or the job asks for what SkyPilot does not have.
    """
    require_reachable(job, checked, "sky")
    require(not job.project, "project", "leave it out: SkyPilot takes it from gcloud's configuration")
    require(not job.queue, "queue", "leave it out: SkyPilot has none")
    require(job.preemptions == Job.preemptions, "preemptions", "leave it out: SkyPilot replaces lost machines without limit")
    require(job.grace_seconds == Job.grace_seconds, "grace_seconds", "leave it out: SkyPilot decides it")
    several = checked.accelerator.kind == "tpu" and job.slices > 1
    require(not several, "slices", "several TPU slices become one machine with tpu-vm and gke, not with sky")
    on_vms = checked.accelerator.kind != "tpu" or checked.accelerator.family in RUNTIMES
    require(on_vms, "accelerator", f"{checked.accelerator.name} is to be had with gke only")
    origin = git_info.find()
    if not job.image and not origin.commit:
        raise UserError("sky installs a checkout, and this package is not in one of git: run it from a clone, or give --image")
    comments = []
    if _takes_diff(job, origin):
        file = _diff_file(job)
        diff = shlex.join(["git", "-C", str(origin.folder), "diff", "--binary", "HEAD"])
        comments.append(f"mkdir -p {shlex.quote(str(file.parent))} && {diff} > {shlex.quote(str(file))}")
    comments += [f"sky jobs launch --yes --detach-run --name {job.name} FILE", "sky jobs logs --name " + job.name]
    return "".join(f"# {comment}\n" for comment in comments) + to_yaml(_task(job, checked, origin))


def submit(job: Job, checked: Checked) -> int:
    """Hands the task to SkyPilot; returns the exit code of its command.

    Raises:
      UserError: as `render`; or there is no SkyPilot.
    """
    task = render(job, checked)
    require_tool("sky", "pip install 'skypilot[gcp]' (or another cloud's extra), and `sky check`")
    origin = git_info.find()
    if _takes_diff(job, origin):
        _diff_file(job).parent.mkdir(parents=True, exist_ok=True)
        _diff_file(job).write_bytes(origin.diff)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{job.name}.yaml"
        file.write_text(task, encoding="utf-8")
        return subprocess.run(["sky", "jobs", "launch", "--yes", "--detach-run", "--name", job.name, str(file)]).returncode


def _takes_diff(job: Job, origin: Checkout) -> bool:
    """Whether the machines are told what differs from the commit; an image says so itself."""
    return not job.image and bool(origin.diff)


def _diff_file(job: Job) -> Path:
    return Path("~/.cache/gpt_jax/launch").expanduser() / job.name / "uncommitted.diff"


def _task(job: Job, checked: Checked, origin: Checkout) -> dict[str, Any]:
    accelerator = checked.accelerator
    resources: dict[str, Any] = {"use_spot": job.spot}
    if accelerator.kind == "tpu":
        resources |= {"cloud": "gcp", "accelerators": accelerator.sky}
        # SkyPilot takes v5p's for v5e too.
        resources["accelerator_args"] = {"runtime_version": RUNTIMES[accelerator.family]}
    elif accelerator.kind == "gpu":
        resources |= {"accelerators": f"{accelerator.sky}:{accelerator.chips_per_host}"}
    else:
        resources |= {"cpus": f"{accelerator.chips_per_host}+"}
    if job.zone:
        resources["zone"] = job.zone
    if job.image:
        resources["image_id"] = f"docker:{job.image}"
    resources["job_recovery"] = {"max_restarts_on_errors": job.crashes, "recover_on_exit_codes": [RESTART_CODE]}
    mounts: dict[str, Any] = {f"/gcs/{name}": {"source": f"gs://{name}", "mode": "MOUNT"} for name in buckets(job.command())}
    task: dict[str, Any] = {"name": job.name, "num_nodes": job.slices, "resources": resources}
    run = []
    if not job.image:
        task["workdir"] = str(origin.folder)
        task["envs"] = {"GPT_JAX_COMMIT": origin.commit}  # the installed package is no checkout
        if origin.diff:
            task["envs"]["GPT_JAX_DIFF"] = DIFF
            mounts[DIFF] = str(_diff_file(job))
        task["setup"] = _setup(accelerator.kind)
        run.append(". .venv/bin/activate")
    if accelerator.kind == "cpu":
        run.append(f"export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES={accelerator.devices}")
    else:  # Named, so that a broken driver is an error and not a training on the CPU.
        run.append(f"export JAX_PLATFORMS={'tpu' if accelerator.kind == 'tpu' else 'cuda'},cpu")
    if accelerator.kind != "tpu":  # The hosts of a TPU slice find each other.
        run.append(f'export JAX_COORDINATOR_ADDRESS="$(echo "$SKYPILOT_NODE_IPS" | head -n 1):{PORT}"')
        run.append('export JAX_NUM_PROCESSES="$SKYPILOT_NUM_NODES" JAX_PROCESS_ID="$SKYPILOT_NODE_RANK"')
    run.append("exec " + shlex.join(mounted(job.command())))
    if mounts:
        task["file_mounts"] = mounts
    return task | {"run": "\n".join(run) + "\n"}


def _setup(kind: str) -> str:
    """Installs the checkout, which SkyPilot copies to every host, with the locked versions."""
    extras = {"tpu": "tpu,gpt1", "gpu": "cuda,gpt1", "cpu": "gpt1"}[kind]
    return (
        'export PATH="$HOME/.local/bin:$PATH"\n'  # where pip puts a user's programs
        "command -v uv > /dev/null || python3 -m pip install --quiet --user uv\n"
        "uv venv --quiet --python 3.12 .venv\n"
        f"uv pip install --quiet --python .venv/bin/python --constraint constraints/py312.txt '.[{extras}]'\n"
    )
