"""The description of a training job, in terms that have the same meaning on every target."""

import dataclasses
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from gpt_jax.errors import Preempted, UserError
from gpt_jax.runtime.accelerators import Accelerator

RESTART_CODE = Preempted.exit_code
"""Exit code of a run that was asked to stop and has saved its state. It means that the run should be started again."""
PORT = 1234
"""Port on which the other processes reach process 0."""
BUCKETS = "/gcs/"
"""Folder where workers mount Cloud Storage: gs://BUCKET/PATH becomes /gcs/BUCKET/PATH."""
CLAIMS = "/mnt/"
"""Folder where pods mount volumes: /mnt/CLAIM/PATH is a path in the PersistentVolumeClaim CLAIM."""


def _option(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Job:
    """A training job: the command to run, its hardware, and its limits for restarts.

    The fields with a default are options of `gpt-jax launch`, which shows their help texts.
    """

    verb: Literal["pretrain", "finetune"]
    config: str
    """Name or path of the config, as on the command line."""
    overrides: tuple[str, ...]
    """The words `--section.field value`, as given."""
    workdir: str
    """Folder of the run: a path that all workers see, or gs://BUCKET/PATH where the target mounts buckets."""
    name: str
    """Name of the job, made of a-z, 0-9 and "-"; `default_name` derives one from the config."""
    accelerator: Accelerator
    slices: int = _option(1, "number of TPU slices, or of nodes with GPUs or CPUs")
    seeds: int = _option(1, "number of fine-tuning runs, one after the other, each with its own seed")
    zone: str = _option("", "zone of the cloud")
    project: str = _option("", "project of the cloud, or account in SLURM (default: the configured one)")
    queue: str = _option("", "LocalQueue of Kueue, or partition of SLURM (default: the cluster's)")
    image: str = _option("", "container image, for gke and sky")
    spot: bool = _option(False, "use cheaper machines that may be preempted")
    preemptions: int = _option(100, "maximum number of restarts after preemptions, which end with exit code 42")
    crashes: int = _option(3, "maximum number of restarts after other failures")
    grace_seconds: int = _option(120, "seconds between SIGTERM and SIGKILL, in which a checkpoint must be saved")
    processes: int = _option(1, "local: number of processes that share the accelerator's devices")
    delete_on_exit: bool = _option(False, "tpu-vm: delete the queued resource at the end, even after Ctrl-C")

    @property
    def is_multislice(self) -> bool:
        """Whether the job spans several TPU slices, which the TPU runtime has to connect."""
        return self.accelerator.kind == "tpu" and self.slices > 1

    @property
    def environment(self) -> dict[str, str]:
        """The variables of a process on a machine that may be replaced after a preemption.

        Compiled programs are kept in the run's folder, so that another machine need not compile them again.
        """
        return {**self.accelerator.environment, "JAX_COMPILATION_CACHE_DIR": f"{to_mount_paths([self.workdir])[0]}/compiled"}

    def command(self) -> list[str]:
        """Returns the command that each process of the training runs."""
        seeds = ["--seeds", str(self.seeds)] if self.seeds > 1 else []
        return ["gpt-jax", self.verb, self.config, "--workdir", self.workdir, *seeds, *self.overrides]

    def supervised_command(self) -> list[str]:
        """Returns `command` under `gpt-jax supervise`, which restarts the process on the same machine."""
        budget = [f"--preemptions={self.preemptions}", f"--crashes={self.crashes}", f"--grace-seconds={self.grace_seconds}"]
        return ["gpt-jax", "supervise", *budget, "--", *self.command()[1:]]


def default_name(config: str) -> str:
    """Returns the default name of a job: the config "finetune/cola" gives "finetune-cola", and "my/Big.py" gives "big"."""
    stem = Path(config).stem if config.endswith(".py") else config
    return re.sub("[^a-z0-9]+", "-", stem.lower()).strip("-")[:40].strip("-") or "run"


def to_mount_paths(words: Iterable[str]) -> list[str]:
    """Returns the words with each gs://BUCKET/PATH replaced by /gcs/BUCKET/PATH, where workers have the bucket mounted."""
    return [re.sub(r"^((?:--[^=]*=)?)gs://", rf"\1{BUCKETS}", word) for word in words]


def mount_names(words: Iterable[str], root: str) -> list[str]:
    """Returns the distinct names that follow `root` (`BUCKETS` or `CLAIMS`) in those words that are paths."""
    matches = (re.match(f"(?:--[^=]*=)?{root}([^/]+)", word) for word in to_mount_paths(words))
    return list(dict.fromkeys(match[1] for match in matches if match))


def require_tool(name: str, install: str) -> None:
    """Checks that a command of another product is installed on this machine.

    Raises:
      UserError: it is missing; `install` is the advice on how to get it.
    """
    if shutil.which(name) is None:
        raise UserError(f"{name} is not installed on this machine: {install}; --dry-run prints the job without it")
