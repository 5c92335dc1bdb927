"""SLURM: a batch file that starts one process for each GPU, or for each node without GPUs, and requeues its job after failures.

The batch file counts the restarts. A job step that ends with 42 was asked to stop and has saved its state; the job is requeued up
to `preemptions` times. After a crash, the job is requeued up to `crashes` times, but never after a user's mistake. SLURM's own
count includes restarts of every kind, so the number of crashes is kept in a file in the folder of the logs.

Sources: the manual pages sbatch, srun, scontrol and slurm.conf (SLURM 22.05 and later).
"""

import shlex
import subprocess
import sys
from pathlib import Path

from gpt_jax.errors import UserError, require
from gpt_jax.runtime.lock import WAIT

from .job import RESTART_CODE, Job, require_tool

MOUNTS = ()
UNSUPPORTED = {
    "image": "SLURM's nodes run the environment that this command runs in",
    "zone": "SLURM has no zones; --queue selects a partition",
    "spot": "SLURM has no spot machines; --queue selects a partition",
}

STRAGGLER_SECONDS = 600
"""Time after the end of the first process at which remaining processes are killed, because they are assumed to hang."""
MAX_GRACE_SECONDS = 65535
"""Maximum time in sbatch's --signal."""


def check(job: Job) -> None:
    """Checks the options that sbatch restricts.

    Raises:
      UserError: a check fails.
    """
    require(job.accelerator.kind != "tpu", "accelerator", "SLURM runs GPUs and CPUs; for TPUs, use tpu-vm, gke or sky")
    plain = not set("%\\") & set(str(_logs(job)))
    require(plain, "workdir", f"'{_logs(job).parent}' contains % or \\, which sbatch reads as a pattern; rename the folder")
    require(job.grace_seconds <= MAX_GRACE_SECONDS, "grace_seconds", f"sbatch accepts at most {MAX_GRACE_SECONDS}")


def render(job: Job) -> str:
    """Returns the batch file."""
    accelerator, logs = job.accelerator, _logs(job)
    options = {"job-name": job.name, "partition": job.queue, "account": job.project, "nodes": job.slices}
    if accelerator.kind == "gpu":
        options |= {"ntasks-per-node": accelerator.chips_per_host, "gpus-per-node": accelerator.chips_per_host}
    else:
        options |= {"ntasks-per-node": 1, "cpus-per-task": accelerator.devices}
    # The signal goes to the processes, this long before the time limit.
    options |= {"output": f"{logs}/slurm-%j.log", "open-mode": "append", "signal": f"TERM@{job.grace_seconds}"}
    directives = "\n".join(f"#SBATCH --{name}={shlex.quote(str(value))}" for name, value in options.items() if value != "")
    environment = " ".join(f"{name}={value}" for name, value in {**accelerator.environment, WAIT: "1"}.items())
    program = Path(sys.executable).parent / "gpt-jax"  # in the environment of this command, which all nodes see
    command, quoted_logs = shlex.join([str(program), *job.command()[1:]]), shlex.quote(str(logs))
    return f"""\
#!/bin/bash
# submit with: mkdir -p {quoted_logs} && sbatch FILE (and SBATCH_TIMELIMIT or other variables of sbatch as needed)
{directives}
#SBATCH --requeue

logs={quoted_logs}
crashes_file=$logs/crashes-$SLURM_JOB_ID
crashes=$(cat "$crashes_file" 2>/dev/null || echo 0)
preemptions=$((${{SLURM_RESTART_COUNT:-0}} - crashes))
stop=
trap 'stop=yes' TERM  # scancel and scontrol requeue signal this script and the processes; a time limit only the processes

export {environment}
# srun does not take the value from the batch file, and would leave each process one CPU.
[ -z "${{SLURM_CPUS_PER_TASK:-}}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
# Process 0 runs on this node, the first one.
export JAX_COORDINATOR_ADDRESS=$(hostname):$((20000 + SLURM_JOB_ID % 10000)) JAX_NUM_PROCESSES=$SLURM_NTASKS
srun --kill-on-bad-exit=0 --wait={STRAGGLER_SECONDS} --open-mode=append --output="$logs/process-%t.log" \\
    bash -c 'JAX_PROCESS_ID=$SLURM_PROCID exec "$@"' bash \\
    {command}
code=$?

say() {{ echo "$(date '+%F %T') job $SLURM_JOB_ID: $*"; }}
if [ "$code" = 0 ]; then
    say "done, after $preemptions preemptions and $crashes crashes"
elif [ "$stop" ]; then
    say "stop requested (exit $code); SLURM decides whether the job runs again"
elif [ "$code" = {UserError.exit_code} ]; then
    say "giving up: exit {UserError.exit_code} is a mistake in the command or its input; see $logs/process-0.log"
elif [ "$code" = {RESTART_CODE} ] && [ "$preemptions" -lt {job.preemptions} ]; then
    say "preempted (exit {RESTART_CODE}): restart $((preemptions + 1)) of {job.preemptions}"
    scontrol requeue "$SLURM_JOB_ID"
elif [ "$code" != {RESTART_CODE} ] && [ "$crashes" -lt {job.crashes} ]; then
    echo $((crashes + 1)) > "$crashes_file"
    say "crashed (exit $code): restart $((crashes + 1)) of {job.crashes}"
    scontrol requeue "$SLURM_JOB_ID"
else
    say "giving up (exit $code), after $preemptions preemptions and $crashes crashes: the budget is spent"
fi
exit $code
"""


def submit(job: Job) -> int:
    """Queues the job; returns sbatch's exit code.

    Raises:
      UserError: sbatch is not installed.
    """
    require_tool("sbatch", "run this on a login node of the cluster")
    _logs(job).mkdir(parents=True, exist_ok=True)  # Without the folder, SLURM loses the job and its output.
    return subprocess.run(["sbatch"], input=render(job), text=True).returncode


def _logs(job: Job) -> Path:
    return Path(job.workdir).absolute() / "logs"
