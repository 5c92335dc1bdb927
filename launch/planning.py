"""The plan of a job: whether its training step fits, and how long it takes, according to `gpt-jax plan`.

`gpt-jax plan` runs in another process, because it needs JAX. If the same step was planned before, its report comes from the
user's cache.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence

from gpt_jax.config.load import flatten_config, load_config
from gpt_jax.errors import UserError
from gpt_jax.runtime.console import say

from .job import Job
from .supervise import kill, spawn

PREFIX = "gpt-jax: "
"""Start of the line in which `gpt-jax plan` reports an error."""
RESULTS = 4
"""Number of lines at the end of a report: the modeled step, the rate, the whole run, and what limits the step."""


def is_planned(job: Job) -> bool:
    """Returns whether `gpt-jax plan` can plan the job, that is, whether the job is a pre-training on TPUs."""
    return job.verb == "pretrain" and job.accelerator.kind == "tpu"


def check_plan(job: Job) -> None:
    """Plans a job, and shows the lines of the report about the memory, the time, and what limits the step.

    Raises:
      UserError: the training step does not fit, or it cannot be planned.
    """
    code, report, problem = run_plan(plan_command(job))
    if code == 0:
        for line in summary(report):
            say(f"plan: {line}")
        return
    if problem.startswith("--"):  # The run itself would report this mistake in the config.
        raise UserError(problem)
    ended = f"was ended by signal {-code}, perhaps for lack of memory" if code < 0 else f"failed with exit code {code}"
    raise UserError(f"{problem or f'gpt-jax plan {ended}'}; --no-plan launches the job without a plan")


def plan_command(job: Job) -> list[str]:
    """Returns the command that plans a job.

    The command leaves out all paths, because they may exist only on the workers and do not change the step.
    """
    fields = flatten_config(load_config(job.config))
    paths = [name for name, (_, affects) in fields.items() if affects == "input"]
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
    """Returns the lines of a report that are shown at a launch. Reports without libtpu are short and are returned whole."""
    sections = [section.splitlines() for section in report.strip().split("\n\n")]
    if len(sections) == 1:
        return sections[0]
    memory = ": ".join(line.strip() for line in sections[1])
    results = (line.partition("; give --corpus-tokens")[0] for line in sections[-1][-RESULTS:])  # `launch` has no such option.
    return [memory, *results]
