"""The plan of a job: whether its training step fits, and how long it takes, according to `gpt-jax plan`.

`gpt-jax plan` runs in another process, because it needs JAX. If the same step was planned before, its report comes from the
user's cache.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gpt_jax.config import FinetuneConfig
from gpt_jax.config.load import apply_overrides, config_names, flatten_config, load_config
from gpt_jax.errors import UserError
from gpt_jax.runtime.console import say

from .job import Job
from .supervise import kill, spawn

PREFIX = "gpt-jax: "
"""Start of the line in which `gpt-jax plan` reports an error."""
RESULTS = 4
"""Number of lines at the end of a report: the step, the rate, the whole run, and what limits the step."""


def check_plan(job: Job) -> None:
    """Plans a job on TPUs or GPUs, and shows the lines of the report about the memory, the time, and what limits the step.

    A fine-tuning is planned if this machine has the files that determine its step.

    Raises:
      UserError: the training step does not fit, or it cannot be planned.
    """
    if job.accelerator.kind == "cpu":
        return
    if missing := missing_file(job):
        say(f"plan: skipped, because it needs {missing}, which is not on this machine")
        return
    code, report, problem = run_plan(plan_command(job))
    if code == 0:
        for line in summary(report):
            say(f"plan: {line}")
        return
    if problem.startswith("--"):  # The run itself would report this mistake in the config.
        raise UserError(problem)
    ended = f"was killed by signal {-code}, perhaps because memory ran out" if code < 0 else f"failed with exit code {code}"
    raise UserError(f"{problem or f'gpt-jax plan {ended}'}; --no-plan launches the job without a plan")


def missing_file(job: Job) -> str:
    """Returns a phrase for a file on which a fine-tuning's step depends and that this machine lacks, or "" if there is none.

    The file is the checkpoint, which contains the architecture, or the training rows of a task of the user's own, which contain
    the labels.
    """
    config = apply_overrides(load_config(job.config), list(job.overrides), "gpt-jax launch")
    if not isinstance(config, FinetuneConfig):
        return ""
    init, task = config.init, config.task
    origin = init.like if init.from_ == "none" else init.from_
    if origin not in config_names() and not origin.endswith(".py") and not Path(origin).expanduser().is_dir():
        return f"the architecture of {origin}"
    labeled = task.name or task.labels or task.score_range or task.kind == "multiple_choice"
    return "" if labeled or Path(task.train).expanduser().is_file() else f"the labels in {task.train}"


def plan_command(job: Job) -> list[str]:
    """Returns the command that plans a job.

    The command of a pre-training leaves out all paths, because they may exist only on the workers and do not change the step. The
    step of a fine-tuning depends on files (`missing_file`).
    """
    fields = flatten_config(load_config(job.config))
    paths = [name for name, (_, affects) in fields.items() if affects == "input" and job.verb == "pretrain"]
    overrides, keep = [], True
    for word in job.overrides:
        if word.startswith("--"):
            keep = word[2:].partition("=")[0] not in paths
        if keep:
            overrides.append(word)
    overrides += [f"--{name}=" for name in paths if fields[name][0]]
    hardware = ["--topology", job.accelerator.name, "--slices", str(job.slices)]
    return [sys.executable, "-m", "gpt_jax", "plan", job.config, *hardware, *overrides]


def run_plan(command: Sequence[str]) -> tuple[int, str, str]:
    """Runs `gpt-jax plan`, and shows its progress.

    Returns:
      the exit code, the report ("" after an error), and the error message ("" if there is none).
    """
    problem = ""
    with tempfile.TemporaryFile() as output:
        with spawn(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.PIPE) as process:
            try:
                for line in process.stderr or ():
                    text = line.decode(errors="replace").rstrip()
                    if text.startswith(PREFIX):
                        problem = text.removeprefix(PREFIX)
                    else:
                        say(text)
                code = process.wait()
            finally:
                kill([process])
        output.seek(0)
        return code, output.read().decode(errors="replace"), problem


def summary(report: str) -> list[str]:
    """Returns the lines of a report that are shown at a launch."""
    _, memory, *_, results = (section.splitlines() for section in report.strip().split("\n\n"))
    lines = [": ".join(line.strip() for line in memory), *results[-RESULTS:]]
    return [line.partition("; give --")[0] for line in lines]  # `launch` does not have these options.
