"""Cloud TPU VMs: a run on a queued resource, which is watched, and requested again after a preemption.

`tpu_watch` watches the resource with the commands of `gcloud`. `tpu_worker` is copied to the workers with the commit and runs
there. No state is kept on this machine. If the same command is run again, it attaches to an existing resource whose label shows
that it was created for this run.
"""

import contextlib
import fcntl
import hashlib
import json
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from gpt_jax.config.load import config_folder
from gpt_jax.errors import UserError, require
from gpt_jax.runtime import git_info
from gpt_jax.runtime.accelerators import RUNTIMES

from . import tpu_worker
from .checks import require_google_zone
from .gcloud import Gcloud
from .job import BUCKETS, Job, mount_names, require_tool, to_mount_paths
from .tpu_watch import DEFAULT_TIMING, Timing, TpuWatcher

MOUNTS = (BUCKETS,)
UNSUPPORTED = {"queue": "Cloud TPU has one queue for each zone", "image": "tpu-vm installs this commit on the workers"}


def check(job: Job) -> None:
    """Checks the hardware and the zone, and checks that the commit and the config can be sent to the workers.

    Raises:
      UserError: a check fails.
    """
    name = job.accelerator.name
    require(job.accelerator.kind == "tpu", "accelerator", f"{name} is not a TPU; tpu-vm takes {', '.join(RUNTIMES)}")
    require(job.accelerator.family in RUNTIMES, "accelerator", f"{name} is not offered as a TPU VM; use gke")
    require(bool(job.zone), "zone", "name the zone, for example --zone us-west4-a")
    require_google_zone(job.zone)
    checkout = git_info.find_checkout()
    if not checkout.commit:
        raise UserError("tpu-vm installs a commit on the workers, and this package is not in a git checkout; run it from a clone")
    shallow = subprocess.run(["git", "-C", str(checkout.folder), "rev-parse", "--is-shallow-repository"], capture_output=True)
    if shallow.stdout.strip() == b"true":
        raise UserError(f"{checkout.folder} is a shallow clone, whose commit cannot be packed; run git fetch --unshallow")
    config = config_folder().resolve() / f"{job.config}.py"
    if config.is_relative_to(checkout.folder) and (path := str(config.relative_to(checkout.folder))) in checkout.untracked:
        raise UserError(f"{path} is not tracked by git, so the workers would not have it; run git add {path}")


def render(job: Job) -> str:
    """Returns the commands that `submit` runs if nothing fails, with comments that describe what it does otherwise."""
    checkout, gcloud, poll = git_info.find_checkout(), Gcloud(job), f"every {DEFAULT_TIMING.poll:g} s"
    sent = ", ".join(file.name for file in _files(job) if file.suffix != ".bundle")

    workers = len(gcloud.nodes) * job.accelerator.hosts
    steps: list[str | list[str]] = [
        f"# commit {checkout.commit[:12]} on {workers} workers: {shlex.join(to_mount_paths(job.command()))}",
        f"# {sent} are written to {_folder(job)}",
        _bundle(job, checkout),
        gcloud.describe,
        "# if no resource has this name",
        gcloud.create,
        f"# {poll}, until the resource is ACTIVE; one that is SUSPENDED or FAILED is deleted and created again",
        gcloud.describe,
        "# on workers where nothing is running",
        *gcloud.copy(_files(job)),
        *gcloud.ask("install"),
        *gcloud.ask("start"),
        f"# {poll}, with another describe, until all have ended; the number is where to continue in worker 0's log",
        *gcloud.ask("status 0"),
        "# if a worker does not answer",
        *gcloud.describe_nodes,
        f"# before a restart: {job.preemptions} after preemptions, {job.crashes} after crashes",
        *gcloud.ask(f"stop {job.grace_seconds}"),
        "# before the resource is created again" + (", and at the end" if job.delete_on_exit else "; at the end it is kept"),
        gcloud.delete,
    ]
    return "".join(f"{step if isinstance(step, str) else shlex.join(step)}\n" for step in steps)


def submit(job: Job, timing: Timing = DEFAULT_TIMING) -> int:
    """Runs the training on TPU VMs until it is done; returns the exit code described at `TpuWatcher.run`.

    Raises:
      UserError: gcloud or its key is missing, another command watches the job, or gcloud or the training reports a mistake.
    """
    require_tool("gcloud", "install the Google Cloud CLI, then run `gcloud auth login`")
    if job.accelerator.hosts > 1:
        _check_ssh_key()
    with _lock(job):
        digest = _write_files(job, git_info.find_checkout())
        for number in (signal.SIGTERM, signal.SIGHUP):  # These act like Ctrl-C, except that nohup ignores SIGHUP.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler)
        return TpuWatcher(job, _files(job), digest, timing).run()


def _check_ssh_key() -> None:
    """Checks that gcloud can reach several workers, which requires a key in the ssh agent, before anything costs money."""
    key = Path("~/.ssh/google_compute_engine").expanduser()
    public = key.with_suffix(".pub")
    if not public.exists():
        raise UserError(f"gcloud has no ssh key yet; run `ssh-keygen -t rsa -f {key}`, then `ssh-add {key}`")
    agent = subprocess.run(["ssh-add", "-L"], capture_output=True, text=True).stdout if shutil.which("ssh-add") else ""
    if public.read_text(encoding="utf-8").split()[1] not in agent:
        raise UserError(f"gcloud reaches several workers only if the ssh agent has its key; run eval $(ssh-agent); ssh-add {key}")


@contextlib.contextmanager
def _lock(job: Job) -> Iterator[None]:
    """Holds a lock on the job's folder, because two commands that watch a job would undo each other's work.

    Raises:
      UserError: another command on this machine holds it.
    """
    _folder(job).mkdir(parents=True, exist_ok=True)
    with open(_folder(job) / "lock", "ab") as lock:
        if not tpu_worker.try_lock(lock, fcntl.LOCK_EX):
            raise UserError(f"another command on this machine is watching {job.name}; stop that command first")
        yield


def _folder(job: Job) -> Path:
    """Returns the folder on this machine for the files that are sent to the workers. Each resource has its own folder."""
    return Path("~/.cache/gpt_jax/launch/tpu-vm").expanduser() / (job.project or "default-project") / job.zone / job.name


def _files(job: Job) -> list[Path]:
    """Returns the paths of the files that are copied to every worker."""
    return [_folder(job) / name for name in ("tpu_worker.py", "job.json", "source.bundle", "uncommitted.diff")]


def _bundle(job: Job, checkout: git_info.Checkout) -> list[str]:
    """Returns the command that packs the commit and its history into a file, so that workers need no access to a repository."""
    return ["git", "-C", str(checkout.folder), "bundle", "create", "--quiet", str(_folder(job) / "source.bundle"), "HEAD"]


def _write_files(job: Job, checkout: git_info.Checkout) -> str:
    """Writes the files for the workers; returns the job's digest.

    Raises:
      UserError: git cannot pack the commit.
    """
    command = to_mount_paths(job.command())
    digest = hashlib.sha256(json.dumps(command).encode()).hexdigest()[:16]
    arguments = {"command": command, "digest": digest, "workdir": to_mount_paths([job.workdir])[0], "commit": checkout.commit}
    arguments |= {"extras": job.accelerator.extras, "buckets": mount_names(command, BUCKETS)}
    folder = _folder(job)
    shutil.copyfile(tpu_worker.__file__, folder / "tpu_worker.py")
    (folder / "job.json").write_text(json.dumps(arguments, indent=1) + "\n", encoding="utf-8")
    (folder / "uncommitted.diff").write_bytes(checkout.diff)
    result = subprocess.run(_bundle(job, checkout), capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"{checkout.folder}: git could not pack the commit: {' '.join(result.stderr.split())}")
    return digest
