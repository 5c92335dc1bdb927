"""A training on a Cloud TPU VM: asked for as a queued resource, watched, and asked for again after a preemption.

`tpu_watch` watches, through the commands of `gcloud`; what happens on the workers is `tpu_worker`, which is copied there with the
commit. Nothing is remembered here: called again, the same command attaches to what it finds, if the resource's label says that it
is this run's.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpt_jax.errors import UserError, require
from gpt_jax.runtime import git_info
from gpt_jax.runtime.git_info import Checkout

from . import tpu_worker
from .accelerators import RUNTIMES
from .gcloud import Gcloud
from .job import Checked, Job, buckets, mounted, require_reachable, require_tool
from .supervise import Budget
from .tpu_watch import USUAL, Babysitter, Timing

EXTRAS = "tpu,gpt1"
"""Of the package: the TPU's runtime, and the released tokenizer, which the config gpt1 takes."""


def render(job: Job, checked: Checked, delete_on_exit: bool = False) -> str:
    """The commands that `submit` runs if nothing goes wrong, and what it does when something does.

    Raises:
      UserError: TPU VMs cannot do what the job asks for.
    """
    origin = git_info.find()
    _require_possible(job, checked, origin)
    gcloud = Gcloud(job, checked)
    files = ", ".join(file.name for file in _files(job) if file.suffix != ".bundle")

    def lines(*commands: Sequence[str]) -> str:
        return "".join(f"{shlex.join(command)}\n" for command in commands)

    def asked(verb: str) -> str:
        return lines(*(gcloud.ask(node, verb) for node in gcloud.nodes))

    every, stays = f"every {USUAL.poll:g} s", "" if delete_on_exit else "; in the end it stays, without --delete-on-exit"
    return (
        f"# commit {origin.commit[:12]} on {len(gcloud.nodes) * checked.accelerator.hosts} workers: {shlex.join(_command(job))}\n"
        + f"# {files} are written to {_folder(job)}\n"
        + lines(_bundle(job, origin), gcloud.describe())
        + "# if there is none of this name yet\n"
        + lines(gcloud.create())
        + f"# {every}, until it is ACTIVE; SUSPENDED or FAILED: delete it and create it again\n"
        + lines(gcloud.describe())
        + "# where nothing runs\n"
        + lines(*(gcloud.copy(node, _files(job)) for node in gcloud.nodes))
        + asked("install")
        + asked("start")
        + f"# {every}, with the same describe, until all have ended; the number: where to go on in worker 0's log\n"
        + lines(*(gcloud.status(node, 0) for node in gcloud.nodes))
        + "# if one does not answer\n"
        + lines(*(gcloud.describe_node(node) for node in gcloud.nodes))
        + f"# before a restart: {job.preemptions} after preemptions, {job.crashes} after crashes\n"
        + asked(f"stop {job.grace_seconds}")
        + f"# before it is created again{stays}\n"
        + lines(gcloud.delete())
    )


def submit(job: Job, checked: Checked, delete_on_exit: bool = False, timing: Timing = USUAL) -> int:
    """Runs the training on TPU VMs until it is done; returns the exit code that `Babysitter.run` describes.

    Raises:
      UserError: TPU VMs cannot do what the job asks for, or gcloud or the training itself refuses it.
    """
    origin = git_info.find()
    _require_possible(job, checked, origin)
    require_tool("gcloud", "install the Google Cloud CLI, then `gcloud auth login`")
    _require_key(checked)
    with _alone(job):
        digest = _prepare(job, origin)
        for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C, unless nohup says otherwise
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler)
        return Babysitter(
            Gcloud(job, checked),
            _files(job),
            digest,
            checked.accelerator.hosts,
            Budget(job.preemptions, job.crashes),
            job.grace_seconds,
            delete_on_exit,
            timing,
        ).run()


def _require_possible(job: Job, checked: Checked, origin: Checkout) -> None:
    require_reachable(job, checked, "tpu-vm")
    accelerator = checked.accelerator
    require(accelerator.kind == "tpu", "accelerator", f"{accelerator.name} is no TPU; tpu-vm takes {', '.join(RUNTIMES)}")
    require(accelerator.family in RUNTIMES, "accelerator", f"{accelerator.name} is not offered as a TPU VM; gke has it")
    require(bool(job.zone), "zone", "say in which, as in --zone us-west4-a")
    require(not job.queue, "queue", "tpu-vm has one queue; leave it out")
    require(not job.image, "image", "tpu-vm installs this commit on the workers and takes no image; leave it out")
    if not origin.commit:
        raise UserError("tpu-vm installs a commit on the workers, and this package is not in a git checkout: run it from a clone")
    shallow = subprocess.run(["git", "-C", str(origin.folder), "rev-parse", "--is-shallow-repository"], capture_output=True)
    if shallow.stdout.strip() == b"true":
        raise UserError(f"{origin.folder} is a shallow clone, whose commit cannot be packed: git fetch --unshallow")


def _require_key(checked: Checked) -> None:
    """gcloud refuses to reach several workers with a key that it would have to ask for; better before they cost."""
    if checked.accelerator.hosts == 1:
        return
    key = Path("~/.ssh/google_compute_engine").expanduser()
    public = key.with_suffix(".pub")
    known = subprocess.run(["ssh-add", "-L"], capture_output=True, text=True) if shutil.which("ssh-add") else None
    if not public.exists():
        raise UserError(f"gcloud has no key for ssh yet: `ssh-keygen -t rsa -f {key}`, then `ssh-add {key}`")
    if known is None or public.read_text(encoding="utf-8").split()[1] not in known.stdout:
        raise UserError(
            f"gcloud reaches several workers only with its key in the ssh agent: `eval $(ssh-agent)`, `ssh-add {key}`"
        )


@contextlib.contextmanager
def _alone(job: Job) -> Iterator[None]:
    """Holds this machine's lock on the job's folder: two watches would undo what the other one does.

    Raises:
      UserError: another command holds it.
    """
    _folder(job).mkdir(parents=True, exist_ok=True)
    with open(_folder(job) / "lock", "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another command on this machine watches {job.name} already; stop that one first") from None
        yield


def _folder(job: Job) -> Path:
    """Where the files for the workers are made; one for each resource that can be named."""
    return Path("~/.cache/gpt_jax/launch/tpu-vm").expanduser() / (job.project or "default-project") / job.zone / job.name


def _files(job: Job) -> list[Path]:
    """The files that go to every worker."""
    return [_folder(job) / name for name in ("tpu_worker.py", "job.json", "source.bundle", "uncommitted.diff")]


def _bundle(job: Job, origin: Checkout) -> list[str]:
    """Packs the commit with its history into a file, so that the workers need no access to a repository."""
    return ["git", "-C", str(origin.folder), "bundle", "create", "--quiet", str(_folder(job) / "source.bundle"), "HEAD"]


def _command(job: Job) -> list[str]:
    """The training's words on a worker, where buckets are mounted."""
    return mounted(job.command())


def _prepare(job: Job, origin: Checkout) -> str:
    """Makes the files; returns the job's digest.

    Raises:
      UserError: git cannot pack the commit.
    """
    digest = hashlib.sha256(json.dumps(_command(job)).encode()).hexdigest()[:16]
    task = {
        "command": _command(job),
        "digest": digest,
        "workdir": mounted([job.workdir])[0],
        "commit": origin.commit,
        "extras": EXTRAS,
        "buckets": buckets(job.command()),
    }
    folder = _folder(job)
    shutil.copyfile(tpu_worker.__file__, folder / "tpu_worker.py")
    (folder / "job.json").write_text(json.dumps(task, indent=1) + "\n", encoding="utf-8")
    (folder / "uncommitted.diff").write_bytes(origin.diff)
    packed = subprocess.run(_bundle(job, origin), capture_output=True, text=True)
    if packed.returncode:
        raise UserError(f"{origin.folder}: git could not pack the commit: {' '.join(packed.stderr.split())}")
    return digest
