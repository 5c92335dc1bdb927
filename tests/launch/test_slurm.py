"""The batch file: its directives, the numbers of its processes, and when it requeues the job."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpt_jax.errors import UserError
from gpt_jax.launch import checks, slurm
from gpt_jax.launch.job import Job
from gpt_jax.runtime.accelerators import parse_accelerator

STORE = ("--data.store", "/shared/store")
GPUS = {"accelerator": "h100-8", "slices": 2, "overrides": (*STORE, "--mesh.slice", "2")}


check = functools.cache(checks.check)  # A check takes a large part of a second.


def make(workdir, accelerator="cpu-4", **fields):
    defaults = {"verb": "pretrain", "config": "gpt1", "overrides": STORE, "name": "a"}
    return Job(workdir=str(workdir), accelerator=parse_accelerator(accelerator), **defaults | fields)


def rendered(job):
    check(job, slurm)
    return slurm.render(job)


def directives(script):
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH ")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def test_one_process_for_each_gpu():
    job = make("/shared/run", **GPUS, queue="gpus", project="team", grace_seconds=300)
    assert directives(rendered(job)) == {
        "job-name": "a",
        "partition": "gpus",
        "account": "team",
        "nodes": "2",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "output": "/shared/run/logs/slurm-%j.log",
        "open-mode": "append",
        "signal": "TERM@300",
        "requeue": "",
    }


def test_one_process_for_each_node_with_cpus():
    job = make("/shared/run", slices=2)
    options = directives(rendered(job))
    assert (options["nodes"], options["ntasks-per-node"], options["cpus-per-task"]) == ("2", "1", "4")
    assert not {"gpus-per-node", "partition", "account"} & options.keys()


# -- the script, with stand-ins for SLURM's commands ------------------------------------------------------------------------

SRUN = """\
#!/bin/bash
while [[ $1 == --* ]]; do echo "$1" >> "$PLAY/srun"; shift; done
echo "${SRUN_CPUS_PER_TASK-none}" >> "$PLAY/cpus"
worst=0
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i "$@"
    code=$?
    [ $code -gt $worst ] && worst=$code
done
exit $worst
"""
TASK = '#!/bin/sh\necho "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS: $*" >> "$PLAY/tasks"\n{then}\n'


class Play:
    """A node on which the script of a job runs; its commands write their arguments to files in `folder`."""

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.program("srun", SRUN)
        self.program("scontrol", '#!/bin/sh\necho "$*" >> "$PLAY/scontrol"\n')
        self.program("hostname", "#!/bin/sh\necho node7\n")
        monkeypatch.setattr(sys, "executable", str(self.bin / "python"))
        monkeypatch.chdir(folder)

    def program(self, name, text):
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def start(self, job, then, restarts=0, **more):
        """Starts the script; `then` is what each process does, `more` are further variables of SLURM."""
        self.program("gpt-jax", TASK.format(then=then))
        (Path(job.workdir) / "logs").mkdir(parents=True, exist_ok=True)
        environment = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "PLAY": str(self.folder),
            "SLURM_JOB_ID": "12345",
            "SLURM_NTASKS": "2",
            **more,
        }
        if restarts:
            environment["SLURM_RESTART_COUNT"] = str(restarts)
        script = rendered(job)
        return subprocess.Popen(
            ["bash", "-c", script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, job, then, restarts=0, **more):
        """Runs the script; returns its exit code and the line that it prints."""
        process = self.start(job, then, restarts, **more)
        output, _ = process.communicate(timeout=30)
        assert len(output.splitlines()) == 1, output
        return process.returncode, output.strip()

    def recorded(self, name):
        """Returns the lines that a command has written."""
        file = self.folder / name
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def play(tmp_path, monkeypatch):
    return Play(tmp_path, monkeypatch)


def test_processes_get_their_numbers_and_the_address_of_the_first_node(play):
    job = make("runs/my run", overrides=("--data.source", "it's text"), slices=2)
    assert play.run(job, "exit 0")[0] == 0
    words = "pretrain gpt1 --workdir runs/my run --data.source it's text"
    assert play.recorded("tasks") == [f"{number} of 2 at node7:22345: {words}" for number in (0, 1)]
    assert f"--output={play.folder}/runs/my run/logs/process-%t.log" in play.recorded("srun")
    assert play.recorded("scontrol") == []


def test_processes_get_the_cpus_of_the_job(play):
    play.run(make("runs/a"), "exit 0", SLURM_CPUS_PER_TASK="4")
    play.run(make("runs/a"), "exit 0")  # as for GPUs, where SLURM leaves the number open
    assert play.recorded("cpus") == ["4", "none"]


@pytest.mark.parametrize(
    ("code", "restarts", "crashes", "requeued", "message"),
    [
        (0, 5, 2, False, "done, after 3 preemptions and 2 crashes"),
        (42, 0, 0, True, "preempted (exit 42): restart 1 of 4"),
        (42, 5, 2, True, "preempted (exit 42): restart 4 of 4"),
        (42, 6, 2, False, "giving up (exit 42), after 4 preemptions and 2 crashes: the budget is spent"),
        (1, 0, 0, True, "crashed (exit 1): restart 1 of 2"),
        (137, 4, 1, True, "crashed (exit 137): restart 2 of 2"),
        (1, 2, 2, False, "giving up (exit 1), after 0 preemptions and 2 crashes: the budget is spent"),
        (2, 0, 0, False, "giving up: exit 2 is a mistake in the command or its input"),
    ],
)
def test_the_exit_code_and_the_budgets_decide_whether_the_job_is_requeued(play, code, restarts, crashes, requeued, message):
    job = make("runs/a", preemptions=4, crashes=2)
    counter = play.folder / "runs" / "a" / "logs" / "crashes-12345"
    counter.parent.mkdir(parents=True)
    if crashes:
        counter.write_text(f"{crashes}\n")
    ended, line = play.run(job, f"exit {code}", restarts)
    assert ended == code
    assert message in line
    assert play.recorded("scontrol") == (["requeue 12345"] if requeued else [])
    if requeued and code != 42:
        assert counter.read_text() == f"{crashes + 1}\n"


def test_the_largest_exit_code_of_the_processes_counts(play):
    # A process that lost a preempted one ends with 1.
    assert "preempted" in play.run(make("runs/a"), '[ "$JAX_PROCESS_ID" = 0 ] && exit 42; exit 1')[1]


def test_a_job_that_is_asked_to_stop_is_left_to_slurm(play):
    """scancel and `scontrol requeue` signal the script as well as the processes."""
    process = play.start(make("runs/a"), 'touch "$PLAY/began"; sleep 0.5; exit 42')
    limit = time.monotonic() + 20
    while not (play.folder / "began").exists():
        assert time.monotonic() < limit
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert "stop requested (exit 42); SLURM decides" in output
    assert play.recorded("scontrol") == []


# -- submitting -------------------------------------------------------------------------------------------------------------


def test_sbatch_gets_what_a_dry_run_prints(play, monkeypatch):
    play.program("sbatch", '#!/bin/sh\ncat > "$PLAY/given"\n')
    monkeypatch.setenv("PLAY", str(play.folder))
    monkeypatch.setenv("PATH", str(play.bin), prepend=os.pathsep)
    job = make("runs/a", slices=2)
    assert slurm.submit(job) == 0
    assert (play.folder / "given").read_text() == rendered(job)
    assert (play.folder / "runs" / "a" / "logs").is_dir()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"accelerator": "v5e-16"}, "--accelerator: SLURM runs GPUs and CPUs"),
        ({"workdir": "gs://runs/a"}, "--workdir: 'gs://runs/a' is not a file or folder, and this target mounts no buckets"),
        ({"overrides": ("--data.store", "gs://data/store")}, "--data.store: 'gs://data/store' is not a file or folder"),
        ({"workdir": "/shared/50%j"}, "--workdir: '/shared/50%j' contains % or \\, which sbatch reads as a pattern"),
        ({"workdir": "/shared/a\\b"}, "--workdir: "),
        ({"grace_seconds": 65536}, "--grace-seconds: sbatch accepts at most 65535"),
        ({"image": "host/image:1"}, "--image: leave it out"),
        ({"zone": "us-east5-a"}, "--zone: leave it out; SLURM has no zones"),
        ({"spot": True}, "--spot: leave it out; SLURM has no spot machines"),
    ],
)
def test_jobs_that_slurm_cannot_run_are_refused(fields, message):
    job = make(**{"workdir": "/shared/run"} | fields)
    with pytest.raises(UserError) as raised:
        check(job, slurm)
    assert message in str(raised.value)


def test_without_sbatch_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    job = make(tmp_path / "run")
    with pytest.raises(UserError, match="sbatch is not installed on this machine"):
        slurm.submit(job)
    assert not (tmp_path / "run").exists()
