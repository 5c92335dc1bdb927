"""The batch file asks for what the job needs, numbers its processes, and queues itself again when it should."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpt_jax.errors import UserError
from gpt_jax.launch import slurm
from gpt_jax.launch.job import Job, check

checked = functools.cache(check)  # which takes a good part of a second
STORE = ("--data.store", "/shared/store")
GPUS = {"accelerator": "h100-8", "slices": 2, "overrides": (*STORE, "--mesh.slice", "2")}


def make(workdir, **fields):
    usual = {"verb": "pretrain", "config": "gpt1", "overrides": STORE, "name": "a", "accelerator": "cpu-4"}
    return Job(**usual | {"workdir": str(workdir)} | fields)


def directives(script):
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH ")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def test_one_process_for_each_gpu():
    job = make("/shared/run", **GPUS, queue="gpus", project="team", grace_seconds=300)
    assert directives(slurm.render(job, checked(job))) == {
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


def test_one_process_for_each_node_of_cpus():
    job = make("/shared/run", slices=2)
    asked = directives(slurm.render(job, checked(job)))
    assert (asked["nodes"], asked["ntasks-per-node"], asked["cpus-per-task"]) == ("2", "1", "4")
    assert not {"gpus-per-node", "partition", "account"} & asked.keys()


# -- the script, with SLURM's commands played -------------------------------------------------------------------------------

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
    """A node on which the script of a job runs, with commands that note what they are told."""

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
        """Starts the script; `then` is what each process does, `more` what SLURM says besides."""
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
        script = slurm.render(job, checked(job))
        return subprocess.Popen(
            ["bash", "-c", script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, job, then, restarts=0, **more):
        """The script's exit code, and its last line."""
        process = self.start(job, then, restarts, **more)
        said, _ = process.communicate(timeout=30)
        assert len(said.splitlines()) == 1, said
        return process.returncode, said.strip()

    def noted(self, name):
        file = self.folder / name
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def play(tmp_path, monkeypatch):
    return Play(tmp_path, monkeypatch)


def test_processes_get_their_numbers_and_the_first_nodes_address(play):
    job = make("runs/my run", overrides=("--data.source", "it's text"), slices=2)
    assert play.run(job, "exit 0")[0] == 0
    words = "pretrain gpt1 --workdir runs/my run --data.source it's text"
    assert play.noted("tasks") == [f"{number} of 2 at node7:22345: {words}" for number in (0, 1)]
    assert f"--output={play.folder}/runs/my run/logs/process-%t.log" in play.noted("srun")
    assert play.noted("scontrol") == []


def test_processes_get_the_cpus_that_the_job_has(play):
    play.run(make("runs/a"), "exit 0", SLURM_CPUS_PER_TASK="4")
    play.run(make("runs/a"), "exit 0")  # as of GPUs, where nobody has said how many
    assert play.noted("cpus") == ["4", "none"]


@pytest.mark.parametrize(
    ("code", "restarts", "crashes", "again", "said"),
    [
        (0, 5, 2, False, "done, after 3 preemptions and 2 crashes"),
        (42, 0, 0, True, "preempted (exit 42): restart 1 of 4"),
        (42, 5, 2, True, "preempted (exit 42): restart 4 of 4"),
        (42, 6, 2, False, "giving up (exit 42), after 4 preemptions and 2 crashes: the budget is spent"),
        (1, 0, 0, True, "crashed (exit 1): restart 1 of 2"),
        (137, 4, 1, True, "crashed (exit 137): restart 2 of 2"),
        (1, 2, 2, False, "giving up (exit 1), after 0 preemptions and 2 crashes: the budget is spent"),
        (2, 0, 0, False, "giving up: exit 2 is a mistake in what was asked for"),
    ],
)
def test_budgets(play, code, restarts, crashes, again, said):
    job = make("runs/a", preemptions=4, crashes=2)
    counter = play.folder / "runs" / "a" / "logs" / "crashes-12345"
    counter.parent.mkdir(parents=True)
    if crashes:
        counter.write_text(f"{crashes}\n")
    ended, line = play.run(job, f"exit {code}", restarts)
    assert ended == code
    assert said in line
    assert play.noted("scontrol") == (["requeue 12345"] if again else [])
    if again and code != 42:
        assert counter.read_text() == f"{crashes + 1}\n"


def test_the_worst_of_several_codes_counts(play):
    # A process that lost a preempted one ends with 1.
    assert "preempted" in play.run(make("runs/a"), '[ "$JAX_PROCESS_ID" = 0 ] && exit 42; exit 1')[1]


def test_a_job_that_is_told_to_stop_is_left_to_slurm(play):
    """As scancel and `scontrol requeue` do, which signal the script besides the processes."""
    process = play.start(make("runs/a"), 'touch "$PLAY/began"; sleep 0.5; exit 42')
    limit = time.monotonic() + 20
    while not (play.folder / "began").exists():
        assert time.monotonic() < limit
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    assert "told to stop (exit 42); SLURM decides" in said
    assert play.noted("scontrol") == []


# -- submitting -------------------------------------------------------------------------------------------------------------


def test_what_is_printed_is_what_sbatch_gets(play, monkeypatch):
    play.program("sbatch", '#!/bin/sh\ncat > "$PLAY/given"\n')
    monkeypatch.setenv("PLAY", str(play.folder))
    monkeypatch.setenv("PATH", str(play.bin), prepend=os.pathsep)
    job = make("runs/a", slices=2)
    assert slurm.submit(job, checked(job)) == 0
    assert (play.folder / "given").read_text() == slurm.render(job, checked(job))
    assert (play.folder / "runs" / "a" / "logs").is_dir()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"accelerator": "v5e-16"}, "--accelerator: SLURM runs GPUs and CPUs"),
        ({"workdir": "gs://runs/a"}, "--workdir: 'gs://runs/a' is no file or folder; slurm mounts no buckets"),
        ({"overrides": ("--data.store", "gs://data/store")}, "--data.store: 'gs://data/store' is no file or folder"),
        ({"workdir": "/shared/50%j"}, "--workdir: '/shared/50%j' has a % or \\, which sbatch takes for a pattern"),
        ({"workdir": "/shared/a\\b"}, "--workdir: "),
        ({"grace_seconds": 65536}, "--grace-seconds: sbatch takes at most 65535"),
        ({"image": "host/image:1"}, "--image: leave it out"),
        ({"zone": "us-east5-a"}, "--zone: SLURM has none"),
        ({"spot": True}, "--spot: SLURM has no such machines"),
    ],
)
def test_what_slurm_does_not_have_is_refused(fields, said):
    job = make(**{"workdir": "/shared/run"} | fields)
    with pytest.raises(UserError) as raised:
        slurm.render(job, checked(job))
    assert said in str(raised.value)


def test_without_sbatch_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    job = make(tmp_path / "run")
    with pytest.raises(UserError, match="sbatch is not on this machine"):
        slurm.submit(job, checked(job))
    assert not (tmp_path / "run").exists()
