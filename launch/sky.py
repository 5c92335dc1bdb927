"""SkyPilot: a task for a managed job, for which SkyPilot finds machines in any cloud and replaces them when they are lost.

SkyPilot's controller always restarts the job after a preemption and after exit code 42. After other failures, it restarts the job
up to `crashes` times. It has no limit for preemptions.

Source: "Task YAML" and "Managed jobs" (SkyPilot documentation, 0.14).
"""

import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from gpt_jax.errors import UserError, require
from gpt_jax.runtime import git_info
from gpt_jax.runtime.accelerators import RUNTIMES
from gpt_jax.runtime.lock import WAIT

from .job import BUCKETS, PORT, RESTART_CODE, Job, mount_names, require_tool, to_mount_paths
from .manifest import write_manifest

MOUNTS = (BUCKETS,)
UNSUPPORTED = {
    "project": "SkyPilot takes the project from gcloud's configuration",
    "queue": "SkyPilot has no queues",
    "preemptions": "SkyPilot replaces lost machines without a limit",
    "grace_seconds": "SkyPilot and the cloud decide how long machines have to save",
}

DIFF = "~/uncommitted.diff"
"""Path of the file with the uncommitted changes on the machines."""
# The PATH includes the folder where pip installs programs for a user.
SETUP = """\
export PATH="$HOME/.local/bin:$PATH"
command -v uv > /dev/null || python3 -m pip install --quiet --user uv
uv venv --quiet --python 3.12 .venv
uv pip install --quiet --python .venv/bin/python --constraint constraints/py312.txt '.[{extras}]'
"""
"""Shell commands that install the checkout, which SkyPilot copies to every host, with the locked package versions."""


def check(job: Job) -> None:
    """Checks that SkyPilot has the hardware, and that there is a checkout or an image to run.

    Raises:
      UserError: a check fails.
    """
    require(not job.is_multislice, "slices", "sky cannot connect several TPU slices; use tpu-vm or gke")
    available = job.accelerator.kind != "tpu" or job.accelerator.family in RUNTIMES
    require(available, "accelerator", f"{job.accelerator.name} is available with gke only")
    if not job.image and not git_info.find_checkout().commit:
        raise UserError("sky installs a git checkout, and this package is not in one; run it from a clone, or give --image")


def render(job: Job) -> str:
    """Returns the task file, after comments with the commands that use it."""
    comments = [shlex.join(_launch_command(job, "FILE")), f"sky jobs logs --name {job.name}"]
    if not job.image:
        diff = shlex.join(["git", "-C", str(git_info.find_checkout().folder), "diff", "--binary", "HEAD"])
        file = _diff_file(job)
        comments.insert(0, f"mkdir -p {shlex.quote(str(file.parent))} && {diff} > {shlex.quote(str(file))}")
    return write_manifest(comments, _task(job))


def submit(job: Job) -> int:
    """Submits the task to SkyPilot; returns the exit code of its command.

    Raises:
      UserError: SkyPilot is not installed.
    """
    require_tool("sky", "run pip install 'skypilot[gcp]' (or another cloud's extra), then `sky check`")
    if not job.image:
        _diff_file(job).parent.mkdir(parents=True, exist_ok=True)
        _diff_file(job).write_bytes(git_info.find_checkout().diff)
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / f"{job.name}.yaml"
        task.write_text(render(job), encoding="utf-8")
        return subprocess.run(_launch_command(job, str(task))).returncode


def _launch_command(job: Job, file: str) -> list[str]:
    return ["sky", "jobs", "launch", "--yes", "--detach-run", "--name", job.name, file]


def _diff_file(job: Job) -> Path:
    """Returns the path on this machine of the file with the uncommitted changes. It is not used with an image."""
    return Path("~/.cache/gpt_jax/launch").expanduser() / job.name / "uncommitted.diff"


def _task(job: Job) -> dict[str, Any]:
    task: dict[str, Any] = {"name": job.name, "num_nodes": job.slices, "resources": _resources(job), "file_mounts": {}}
    for bucket in mount_names(job.command(), BUCKETS):
        task["file_mounts"][f"{BUCKETS}{bucket}"] = {"source": f"gs://{bucket}", "mode": "MOUNT"}
    script = [f"export {name}={shlex.quote(value)}" for name, value in {**job.environment, WAIT: "1"}.items()]
    if not job.image:
        checkout = git_info.find_checkout()
        task |= {"workdir": str(checkout.folder), "setup": SETUP.format(extras=job.accelerator.extras)}
        task["envs"] = {"GPT_JAX_COMMIT": checkout.commit, "GPT_JAX_DIFF": DIFF}  # The installed package is not a checkout.
        task["file_mounts"][DIFF] = str(_diff_file(job))
        script.insert(0, ". .venv/bin/activate")
    if job.accelerator.kind != "tpu":  # The hosts of a TPU slice find each other.
        script.append(f'export JAX_COORDINATOR_ADDRESS="$(echo "$SKYPILOT_NODE_IPS" | head -n 1):{PORT}"')
        script.append('export JAX_NUM_PROCESSES="$SKYPILOT_NUM_NODES" JAX_PROCESS_ID="$SKYPILOT_NODE_RANK"')
    script.append("exec " + shlex.join(to_mount_paths(job.command())))
    return task | {"run": "\n".join(script) + "\n"}


def _resources(job: Job) -> dict[str, Any]:
    accelerator = job.accelerator
    resources: dict[str, Any] = {"use_spot": job.spot}
    if accelerator.kind == "tpu":
        # Without a version, SkyPilot would install the runtime for v5p on v5e too.
        runtime = {"runtime_version": RUNTIMES[accelerator.family]}
        resources |= {"cloud": "gcp", "accelerators": accelerator.sky, "accelerator_args": runtime}
    elif accelerator.kind == "gpu":
        resources["accelerators"] = f"{accelerator.sky}:{accelerator.chips_per_host}"
    else:
        resources["cpus"] = f"{accelerator.chips_per_host}+"
    if job.zone:
        resources["zone"] = job.zone
    if job.image:
        resources["image_id"] = f"docker:{job.image}"
    return resources | {"job_recovery": {"max_restarts_on_errors": job.crashes, "recover_on_exit_codes": [RESTART_CODE]}}
