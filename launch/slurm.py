"""SLURM: a batch file that starts one process for each GPU (for each node without GPUs) and puts itself back into the queue.

The batch script counts. A step that ended with 42 was told to stop and has saved: the job is queued again, `preemptions` times;
after a crash, `crashes` times; after a user's mistake, never. SLURM's own count is of restarts of every kind, so that of crashes
is kept in a file beside the logs.

Sources: the manual pages sbatch, srun, scontrol and slurm.conf (SLURM 22.05 and later).
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from gpt_jax.errors import UserError, require

from .job import RESTART_CODE, Checked, Job, require_no_buckets, require_tool

STRAGGLER_SECONDS = 600
"""A process that outlives another one by so long hangs, and is killed."""
MOST_GRACE_SECONDS = 65535
"""That sbatch's --signal takes."""

SCRIPT = """\
{directives}

logs={logs}
crashes_file=$logs/crashes-$SLURM_JOB_ID
crashes=$(cat "$crashes_file" 2>/dev/null || echo 0)
preemptions=$((${{SLURM_RESTART_COUNT:-0}} - crashes))
told=
trap 'told=yes' TERM  # by scancel or scontrol requeue, which reach the processes too; a time limit's warning reaches only them

{exports}
# srun does not take it from the batch file, and would leave each process one CPU.
[ -z "${{SLURM_CPUS_PER_TASK:-}}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
# Process 0 runs on this node, the first one.
export JAX_COORDINATOR_ADDRESS=$(hostname):$((20000 + SLURM_JOB_ID % 10000)) JAX_NUM_PROCESSES=$SLURM_NTASKS
srun --kill-on-bad-exit=0 --wait={straggler} --open-mode=append --output="$logs/process-%t.log" \\
    bash -c 'JAX_PROCESS_ID=$SLURM_PROCID exec "$@"' bash \\
    {command}
code=$?

say() {{ echo "$(date '+%F %T') job $SLURM_JOB_ID: $*"; }}
if [ "$code" = 0 ]; then
    say "done, after $preemptions preemptions and $crashes crashes"
elif [ "$told" ]; then
    say "told to stop (exit $code); SLURM decides whether it runs again"
elif [ "$code" = {mistake} ]; then
    say "giving up: exit {mistake} is a mistake in what was asked for; see $logs/process-0.log"
elif [ "$code" = {restart} ] && [ "$preemptions" -lt {preemptions} ]; then
    say "preempted (exit {restart}): restart $((preemptions + 1)) of {preemptions}"
    scontrol requeue "$SLURM_JOB_ID"
elif [ "$code" != {restart} ] && [ "$crashes" -lt {crashes} ]; then
    echo $((crashes + 1)) > "$crashes_file"
    say "crashed (exit $code): restart $((crashes + 1)) of {crashes}"
    scontrol requeue "$SLURM_JOB_ID"
else
    say "giving up (exit $code), after $preemptions preemptions and $crashes crashes: the budget is spent"
fi
exit $code
"""


def render(job: Job, checked: Checked) -> str:
    """The batch file.

    Raises:
      UserError: the job asks for what SLURM does not have.
    """
    accelerator, logs = checked.accelerator, _logs(job)
    require(accelerator.kind != "tpu", "accelerator", "SLURM runs GPUs and CPUs; tpu-vm, gke and sky run TPUs")
    require_no_buckets(job, checked, "slurm")
    require(
        not set("%\\") & set(str(logs)),
        "workdir",
        f"'{logs.parent}' has a % or \\, which sbatch takes for a pattern; rename the folder",
    )
    require(job.grace_seconds <= MOST_GRACE_SECONDS, "grace_seconds", f"sbatch takes at most {MOST_GRACE_SECONDS}")
    require(not job.image, "image", "leave it out: SLURM's nodes run the environment that this command runs in")
    require(not job.zone, "zone", "SLURM has none; --queue names its partition")
    require(not job.spot, "spot", "SLURM has no such machines; --queue names its partition")
    gpu = accelerator.kind == "gpu"
    options = {
        "job-name": job.name,
        "partition": job.queue,
        "account": job.project,
        "nodes": job.slices,
        "ntasks-per-node": accelerator.chips_per_host if gpu else 1,
        "gpus-per-node": accelerator.chips_per_host if gpu else "",
        "cpus-per-task": "" if gpu else accelerator.devices,
        "output": f"{logs}/slurm-%j.log",
        "open-mode": "append",
        "signal": f"TERM@{job.grace_seconds}",  # to the processes, before the time limit
    }
    directives = [f"#SBATCH --{name}={shlex.quote(str(value))}" for name, value in options.items() if value != ""]
    exports = "export JAX_PLATFORMS=cuda,cpu" if gpu else f"export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES={accelerator.devices}"
    # Nodes see the same files, so the environment of this command is theirs too.
    program = Path(sys.executable).parent / "gpt-jax"
    comment = f"# submit: mkdir -p {shlex.quote(str(logs))} && sbatch FILE, with SBATCH_TIMELIMIT and the like as you need them"
    return SCRIPT.format(
        directives="\n".join(["#!/bin/bash", comment, *directives, "#SBATCH --requeue"]),
        logs=shlex.quote(str(logs)),
        exports=exports,
        straggler=STRAGGLER_SECONDS,
        command=shlex.join([str(program), *job.command()[1:]]),
        mistake=UserError.exit_code,
        restart=RESTART_CODE,
        preemptions=job.preemptions,
        crashes=job.crashes,
    )


def submit(job: Job, checked: Checked) -> int:
    """Queues the job; returns sbatch's exit code.

    Raises:
      UserError: as `render`; or there is no sbatch.
    """
    script = render(job, checked)
    require_tool("sbatch", "run this on a login node of the cluster")
    _logs(job).mkdir(parents=True, exist_ok=True)  # SLURM loses a job's output, and the job, where there is no folder for it
    return subprocess.run(["sbatch"], input=script, text=True).returncode


def _logs(job: Job) -> Path:
    return Path(job.workdir).absolute() / "logs"
