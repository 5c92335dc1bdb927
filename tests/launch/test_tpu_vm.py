"""The watch over TPU VMs, with a stand-in for gcloud that keeps state; its workers are processes on this machine."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from gpt_jax.errors import UserError
from gpt_jax.launch import checks, supervise, tpu_vm, tpu_watch
from gpt_jax.launch.gcloud import Gcloud, Result
from gpt_jax.launch.job import Job
from gpt_jax.launch.supervise import Outcome
from gpt_jax.launch.tpu_watch import ActionKind, Observation, Timing, TpuWatcher, combine_statuses, decide
from gpt_jax.runtime import git_info
from gpt_jax.runtime.accelerators import parse_accelerator
from gpt_jax.runtime.git_info import Checkout
from tests.launch import fake_gcloud
from tests.tiny import smoke_overrides, trajectory

QUICK = Timing(poll=0.1, settle=0.1, patience=1.0, answer=20.0, install=20.0, change=20.0)
QUOTA = (
    "RESOURCE_EXHAUSTED: Quota limit 'TPUV5sLitepodPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0 in zone us-west4-a."
)

# A stand-in for the package: it makes steps up to the one that its plan has for this attempt, and ends with the exit code in the
# plan, or with 42 after SIGTERM if the plan says `wait`.
STAND_IN = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--workdir") + 1])
worker = os.environ["WORKER"]
signals = []
signal.signal(signal.SIGTERM, lambda *_: signals.append(1))
signal.alarm(60)
folder.mkdir(parents=True, exist_ok=True)
with open(folder / f"attempts-{worker}", "a+") as file:
    file.write(".")
    file.seek(0)
    attempt = len(file.read())
plan = json.loads((folder.parent / "plan.json").read_text())
words = plan.get(worker, plan["0"])
step, _, end = words[min(attempt, len(words)) - 1].partition(":")
metrics = folder / "metrics.jsonl"
made = metrics.read_text().count("\\n") if metrics.exists() else 0
for number in range(made + 1, int(step) + 1) if worker == "0" else ():
    with open(metrics, "a") as file:
        file.write(json.dumps({"kind": "train", "step": number, "attempt": attempt}) + "\\n")
    print(f"step {number}", flush=True)
while end == "wait" and not signals:
    time.sleep(0.01)
print(f"gpt-jax: attempt {attempt} ends")
sys.exit(42 if end == "wait" else int(end))
"""


class Cloud:
    """A fake gcloud on PATH, a repository to install, a job to run, and its results."""

    def __init__(self, folder, repository, capfd):
        self.folder, self.capfd = folder, capfd
        self.run = folder / "runs" / "run"
        self.run.parent.mkdir()
        self.install_from(repository)
        overrides = ("--train.duration", "7 steps")
        v5e = parse_accelerator("v5e-8")
        self.job = Job("pretrain", "smoke", overrides, str(self.run), "tiny", v5e, zone="us-west4-a")
        self.diff = ""

    def install_from(self, repository):
        self.repository = repository
        self.commit = git(repository, "rev-parse", "HEAD")

    def change(self, **fields):
        self.job = dataclasses.replace(self.job, **fields)

    def script(self, *lives, hosts=1, plan=("7:0",), others=None, **more):
        """Sets what gcloud and the training do; `others` is the plan of worker 1, if it differs."""
        script = {"hosts": hosts, "lives": lives or [{}], "metrics": str(self.run / "metrics.jsonl"), **more}
        self.change(accelerator=dataclasses.replace(self.job.accelerator, hosts=hosts))  # A real v5e-8 has one host.
        self.path = fake_gcloud.install(self.folder / "cloud", script)
        plan = {"0": plan} | ({"1": others} if others else {})
        (self.run.parent / "plan.json").write_text(json.dumps(plan))
        return self

    def submit(self, timing=QUICK, delete_on_exit=False):
        self.change(delete_on_exit=delete_on_exit)
        try:
            tpu_vm.check(self.job)
            return tpu_vm.submit(self.job, timing)
        finally:
            self.shown = self.capfd.readouterr().err
            lines = [line.removeprefix("tpu-vm: ") for line in self.shown.splitlines() if line.startswith("tpu-vm: ")]
            self.lines = [re.sub("gpt-jax=[0-9a-f]{16}", "gpt-jax=OWNER", line) for line in lines]
            print(self.shown)

    def commands(self):
        lines = (self.folder / "cloud" / "commands.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def count(self, verb):
        return sum(command[4] == verb for command in self.commands())

    def resource(self):
        return json.loads((self.folder / "cloud" / "state.json").read_text())["resource"]

    def created(self):
        state = self.folder / "cloud" / "state.json"
        with contextlib.suppress(ValueError):  # The file is being written.
            return state.exists() and json.loads(state.read_text())["created"]

    def steps(self):
        records = map(json.loads, (self.run / "metrics.jsonl").read_text().splitlines())
        return [(record["attempt"], record["step"]) for record in records]

    def attempts(self, worker=0):
        return len((self.run / f"attempts-{worker}").read_text())

    def when(self, condition, act):
        def wait():
            limit = time.monotonic() + 60
            while not condition() and time.monotonic() < limit:
                time.sleep(0.01)
            act()

        threading.Thread(target=wait, daemon=True).start()

    def interrupt_at(self, step, number=signal.SIGINT):
        file = self.run / "metrics.jsonl"
        self.when(lambda: file.exists() and f'"step": {step},' in file.read_text(), lambda: os.kill(os.getpid(), number))

    def clean(self):
        if hasattr(self, "path") and (self.folder / "cloud" / "state.json").exists() and self.resource():
            fake_gcloud.lose_machines(self.folder / "cloud", self.resource())


def without_place(command):
    """Returns a gcloud command without the options that name the zone and the project."""
    return command[: command.index("--quiet")]


def git(folder, *words):
    command = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@example.com", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="session")
def repository(tmp_path_factory):
    """The repository that is installed on the workers, whose package is the stand-in."""
    return repository_of(tmp_path_factory.mktemp("repository"), {"gpt_jax/__init__.py": "", "gpt_jax/__main__.py": STAND_IN})


def repository_of(folder, files=()):
    """Makes a repository of one commit, with the given files and those that an installation reads."""
    for name, text in {"setup.cfg": "", "pyproject.toml": "", "constraints/py312.txt": "", **dict(files)}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "a commit")
    return folder


@pytest.fixture
def cloud(tmp_path, repository, monkeypatch, capfd):
    cloud = Cloud(tmp_path, repository, capfd)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path / 'cloud' / 'gcloud'}:{os.environ['PATH']}")
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "google_compute_engine.pub").write_text(f"ssh-rsa {fake_gcloud.KEY} t@example.com\n")
    monkeypatch.setattr(supervise, "BACKOFF_SECONDS", 0.01)
    checkout = lambda: Checkout(cloud.repository, cloud.commit, cloud.diff.encode(), ())  # noqa: E731
    monkeypatch.setattr(git_info, "find_checkout", checkout)
    before = signal.getsignal(signal.SIGTERM)
    yield cloud
    signal.signal(signal.SIGTERM, before)
    cloud.clean()


DELETE = "gcloud compute tpus queued-resources delete tiny --force --quiet --zone us-west4-a"
STAYS = [f"tiny still exists and costs money until it is deleted: {DELETE}", "run the same command again to attach to it"]
REQUESTED = (
    "requesting tiny: gcloud compute tpus queued-resources create tiny --node-id tiny --accelerator-type v5litepod-8 "
    "--runtime-version v2-alpha-tpuv5-lite --labels gpt-jax=OWNER --quiet --zone us-west4-a"
)
INSTALLING = "installing on 1 worker; the first installation takes minutes"


# -- the decisions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seen", "kind", "outcome"),
    [
        (Observation(""), ActionKind.CREATE, None),
        (Observation("", requested=True), ActionKind.END, Outcome.CRASHED),
        (Observation("OTHER"), ActionKind.END, Outcome.MISTAKE),
        (Observation("REFUSED"), ActionKind.END, Outcome.MISTAKE),
        (Observation("REFUSED", seconds=299, requested=True), ActionKind.WAIT, None),
        (Observation("REFUSED", seconds=300, requested=True), ActionKind.END, Outcome.MISTAKE),
        (Observation("CREATING"), ActionKind.WAIT, None),
        (Observation("ACCEPTED"), ActionKind.WAIT, None),
        (Observation("WAITING_FOR_RESOURCES"), ActionKind.WAIT, None),
        (Observation("PROVISIONING"), ActionKind.WAIT, None),
        (Observation("SUSPENDING"), ActionKind.WAIT, None),
        (Observation("DELETING"), ActionKind.WAIT, None),
        (Observation("UNKNOWN", reason="UNAVAILABLE"), ActionKind.WAIT, None),
        (Observation("SUSPENDED", requested=True), ActionKind.REPLACE, Outcome.PREEMPTED),
        (Observation("SUSPENDED"), ActionKind.REPLACE, None),
        (Observation("FAILED", reason="Quota exceeded", requested=True), ActionKind.END, Outcome.MISTAKE),
        (
            Observation("FAILED", reason="there is no more capacity in the zone", requested=True),
            ActionKind.REPLACE,
            Outcome.PREEMPTED,
        ),
        (Observation("FAILED", reason="internal", requested=True), ActionKind.REPLACE, Outcome.CRASHED),
        (Observation("FAILED", reason="Quota exceeded"), ActionKind.REPLACE, None),
        (Observation("ACTIVE", "idle"), ActionKind.START, None),
        (Observation("ACTIVE", "running", seconds=1e9), ActionKind.WAIT, None),
        (Observation("ACTIVE", "gone"), ActionKind.REPLACE, Outcome.PREEMPTED),
        (Observation("ACTIVE", "silent", seconds=299), ActionKind.WAIT, None),
        (Observation("ACTIVE", "silent", seconds=300), ActionKind.REPLACE, Outcome.CRASHED),
        (Observation("ACTIVE", "other"), ActionKind.END, Outcome.MISTAKE),
        (Observation("ACTIVE", "failed", seconds=59), ActionKind.WAIT, None),
        (Observation("ACTIVE", "failed", seconds=60), ActionKind.RESTART, Outcome.CRASHED),
        (Observation("ACTIVE", "ended", (0, 0), ran=True), ActionKind.END, Outcome.DONE),
        (Observation("ACTIVE", "ended", (2, 1), ran=True), ActionKind.END, Outcome.MISTAKE),
        (Observation("ACTIVE", "ended", (1, 1), seconds=59, ran=True), ActionKind.WAIT, None),
        (Observation("ACTIVE", "ended", (1, 1), seconds=60, ran=True), ActionKind.RESTART, Outcome.CRASHED),
        (Observation("ACTIVE", "ended", (42, 1), seconds=60, ran=True), ActionKind.RESTART, Outcome.PREEMPTED),
        (Observation("ACTIVE", "ended", (2, 1)), ActionKind.RESTART, None),
        (Observation("ACTIVE", "ended", (0, 0)), ActionKind.END, Outcome.DONE),
    ],
)
def test_each_observation_leads_to_its_action(seen, kind, outcome):
    assert decide(seen, Timing())[:2] == (kind, outcome)


OTHER = "runs another command; choose another --name, or delete the resource"
IDLE, RUNS = {"state": "idle", "job": ""}, {"state": "running", "job": "a"}


def ended(code, job="a"):
    return {"state": "ended", "code": code, "job": job, "said": f"code {code}"}


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (RUNS, RUNS, ("running", (), "")),
        (IDLE, RUNS, ("idle", (), "")),
        (RUNS, None, ("silent", (), "t worker 1 did not answer")),
        (ended(0), RUNS, ("running", (), "")),
        (ended(0), ended(0), ("ended", (0, 0), "")),
        (
            ended(1),
            ended(137),
            ("ended", (1, 137), "t worker 1 ended (killed by SIGKILL, as when memory runs out); last line: code 137"),
        ),
        (RUNS, ended(3), ("ended", (3,), "t worker 1 ended (exit 3); last line: code 3")),
        (ended(1, "b"), IDLE, ("idle", (), "")),
        (ended(0, "b"), RUNS, ("idle", (), "")),
        *(
            (first, {"state": "running", "job": "b"}, ("other", (), f"t worker 1 {OTHER}"))
            for first in (RUNS, None)  # even if the first worker does not answer
        ),
    ],
)
def test_the_statuses_of_all_workers_are_combined(first, second, expected):
    statuses = {"t worker 0": first, "t worker 1": second}
    statuses = {worker: status for worker, status in statuses.items() if status}
    assert combine_statuses(statuses, ["t worker 0", "t worker 1"], "a") == expected


# -- the watch --------------------------------------------------------------------------------------------------------------


def test_the_watch_waits_for_the_resource_and_follows_the_training(cloud):
    cloud.script({"states": ["WAITING_FOR_RESOURCES"] * 3 + ["PROVISIONING"]}, hosts=2)
    assert cloud.submit() == 0
    assert cloud.lines == [
        REQUESTED,
        "tiny is WAITING_FOR_RESOURCES",
        "tiny is PROVISIONING",
        "tiny is ACTIVE",
        "installing on 2 workers; the first installation takes minutes",
        *[line for line in cloud.lines if line == "the training is running on 2 workers"],  # unless it was too fast
        "done (preemptions: 0, crashes: 0)",
        *STAYS,
    ]
    assert cloud.steps() == [(1, step) for step in range(1, 8)]
    assert "\nstep 1\nstep 2\n" in cloud.shown
    assert cloud.resource() is not None


def test_a_refusal_for_lack_of_quota_is_a_mistake(cloud):
    cloud.script(create_errors=[QUOTA] * 9)
    with pytest.raises(UserError) as error:
        cloud.submit()
    assert str(error.value) == f"the project has no quota for this: ERROR: (gcloud.compute.tpus.queued-resources.create) {QUOTA}"
    assert cloud.lines == [REQUESTED]
    assert cloud.count("create") == 1


def test_a_request_that_fails_for_lack_of_quota_is_a_mistake_and_is_deleted(cloud):
    cloud.script({"states": ["WAITING_FOR_RESOURCES"], "then": "FAILED", "message": QUOTA})
    with pytest.raises(UserError, match=r"^the project has no quota for this: RESOURCE_EXHAUSTED: Quota limit"):
        cloud.submit()
    assert cloud.lines[-2:] == [f"tiny is FAILED: {QUOTA}", "deleting tiny"]
    assert cloud.resource() is None


@pytest.mark.slow
def test_temporary_errors_of_gcloud_are_retried(cloud):
    cloud.script(create_errors=["UNAVAILABLE: try again"], describe_errors={"2": "UNAVAILABLE: try again"})
    assert cloud.submit() == 0
    assert "ERROR: (gcloud.compute.tpus.queued-resources.create) UNAVAILABLE: try again; trying again" in cloud.lines
    assert "tiny is UNKNOWN: ERROR: (gcloud.compute.tpus.queued-resources.describe) UNAVAILABLE: try again" in cloud.lines


def test_a_first_command_that_gcloud_refuses_is_a_mistake(cloud):
    cloud.script(describe_errors={"1": "PERMISSION_DENIED: on project p"})
    with pytest.raises(UserError, match=r"PERMISSION_DENIED: on project p$"):
        cloud.submit()
    assert cloud.count("create") == 0


def test_a_preemption_during_provisioning(cloud):
    cloud.script({"states": ["PROVISIONING", "SUSPENDING"], "then": "SUSPENDED"}, {})
    assert cloud.submit() == 0
    assert cloud.lines[1:7] == [
        "tiny is PROVISIONING",
        "tiny is SUSPENDING",
        "tiny is SUSPENDED",
        "preempted (SUSPENDED): preemption restart 1 of 100 in 0 s",
        "deleting tiny",
        REQUESTED,
    ]
    assert "done (preemptions: 1, crashes: 0)" in cloud.lines


def test_two_preemptions_during_training(cloud):
    cloud.script({"preempt": 3}, {"preempt": 5}, {}, plan=["3:wait", "5:wait", "7:0"])
    assert cloud.submit() == 0
    assert [line for line in cloud.lines if line.startswith(("preempted", "done", "tiny is S"))] == [
        "tiny is SUSPENDING",
        "tiny is SUSPENDED",
        "preempted (SUSPENDED) at step 3: preemption restart 1 of 100 in 0 s",
        "tiny is SUSPENDING",
        "tiny is SUSPENDED",
        "preempted (SUSPENDED) at step 5: preemption restart 2 of 100 in 0 s",
        "done (preemptions: 2, crashes: 0)",
    ]
    assert cloud.count("create") == 3
    assert cloud.steps() == [(1, 1), (1, 2), (1, 3), (2, 4), (2, 5), (3, 6), (3, 7)]


@pytest.mark.slow
def test_a_lost_machine_is_a_preemption_although_the_resource_is_active(cloud):
    cloud.script({"lose": 1}, {})
    assert cloud.submit() == 0
    assert "preempted (node tiny is gone): preemption restart 1 of 100 in 0 s" in cloud.lines


@pytest.mark.slow
def test_a_preempted_training_restarts_on_machines_that_stay(cloud):
    cloud.script(hosts=2, plan=["2:42", "7:0"])
    assert cloud.submit() == 0
    assert "preempted (exit 42) at step 2: preemption restart 1 of 100 in 0 s" in cloud.lines
    assert cloud.count("create") == 1
    assert (cloud.attempts(0), cloud.attempts(1)) == (2, 2)


def test_the_watch_gives_up_when_a_crash_repeats_at_one_step(cloud):
    cloud.script(hosts=2, plan=["3:0"], others=["0:7"])
    assert cloud.submit() == 1
    crashes = [line for line in cloud.lines if "worker 1" in line or "crash" in line]
    assert crashes == [
        "tiny worker 1 ended (exit 7); last line: gpt-jax: attempt 1 ends",
        "crashed (exit 7) at step 3: crash restart 1 of 3 in 0 s",
        "tiny worker 1 ended (exit 7); last line: gpt-jax: attempt 2 ends",
        "crashed (exit 7) at step 3, like the crash before it and without progress: giving up",
    ]
    assert cloud.lines[-2:] == STAYS
    assert cloud.count("create") == 1


@pytest.mark.slow
def test_crashes_have_a_separate_budget(cloud):
    cloud.change(crashes=1)
    cloud.script(plan=["1:1", "2:42", "3:1", "7:0"])
    assert cloud.submit(delete_on_exit=True) == 1
    assert "crashed (exit 1) at step 3: giving up, the budget of 1 crash restarts is spent" in cloud.lines
    assert cloud.lines[-1] == "deleting tiny"
    assert cloud.resource() is None


def test_a_mistake_in_the_training_is_not_retried(cloud):
    cloud.script(plan=["0:2"])
    with pytest.raises(UserError) as error:
        cloud.submit()
    assert str(error.value) == (
        "tiny worker 0 ended (exit 2); last line: gpt-jax: attempt 1 ends; a restart would repeat this mistake"
    )
    assert cloud.lines[-2:] == STAYS


@pytest.mark.slow
def test_a_worker_whose_ssh_hangs_is_replaced(cloud):
    cloud.script({"hang": 1}, {}, hosts=2)
    assert cloud.submit(QUICK._replace(answer=6.0)) == 0  # long enough for the other worker on a busy machine
    assert [line for line in cloud.lines if "worker 1" in line] == [
        "tiny worker 1 did not answer",
        "crashed (tiny worker 1 did not answer for 1 s, though the resource is ACTIVE): crash restart 1 of 3 in 0 s",
    ]
    assert cloud.count("create") == 2
    for pid in json.loads((cloud.folder / "cloud" / "state.json").read_text())["hanging"]:  # The ssh that hung was killed.
        assert subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip() in ("", "Z")


@pytest.mark.slow
def test_a_short_silence_of_a_worker_has_no_effect(cloud):
    cloud.script({"hang": 1, "hangs": 1}, hosts=2)
    assert cloud.submit(QUICK._replace(answer=6.0, patience=60.0)) == 0
    assert "tiny worker 1 did not answer" in cloud.lines
    assert "done (preemptions: 0, crashes: 0)" in cloud.lines


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interrupted_watch_leaves_the_training_and_attaches_to_it_again(cloud, number):
    cloud.script(plan=["3:wait"])
    cloud.interrupt_at(3, number)
    assert cloud.submit() == 42
    assert cloud.lines[-3:] == ["interrupted; if the training is running, it continues", *STAYS]
    # The training, which has run all the time, ends with 42 after SIGTERM, and the budget allows no restart.
    cloud.change(preemptions=0)
    pid = int((cloud.folder / "cloud" / "workers" / "tiny" / "0" / "gpt-jax" / "tiny" / "pid").read_text().split()[0])
    looked = cloud.count("ssh")
    cloud.when(lambda: cloud.count("ssh") > looked + 1, lambda: os.kill(pid, signal.SIGTERM))
    assert cloud.submit() == 1
    assert cloud.lines[:2] == ["tiny is ACTIVE", "the training is running on 1 worker"]
    assert "preempted (exit 42) at step 3: giving up, the budget of 0 preemption restarts is spent" in cloud.lines
    assert cloud.count("create") == 1
    assert cloud.attempts() == 1


def test_an_interrupted_watch_stops_the_training_and_deletes_the_resource_if_asked_to(cloud):
    cloud.script(plan=["3:wait"])
    cloud.interrupt_at(3)
    assert cloud.submit(delete_on_exit=True) == 42
    assert cloud.lines[-3:] == ["interrupted", "stopping the training, which has 120 s to save", "deleting tiny"]
    assert cloud.resource() is None


@pytest.mark.slow
def test_failures_before_this_call_are_not_counted(cloud):
    cloud.change(crashes=0)
    cloud.script(plan=["3:1", "7:0"])
    assert cloud.submit() == 1
    assert cloud.submit() == 0
    assert cloud.lines[1:3] == ["tiny: an earlier attempt ended (exit 1)", INSTALLING]
    assert cloud.lines[-3] == "done (preemptions: 0, crashes: 0)"
    assert cloud.submit() == 0  # A further call has nothing to do.
    assert cloud.attempts() == 2


@pytest.mark.slow
def test_the_training_of_another_command_is_left_alone(cloud):
    cloud.script(plan=["3:wait"])
    cloud.interrupt_at(3)
    assert cloud.submit() == 42
    cloud.change(overrides=())
    with pytest.raises(UserError, match="tiny worker 0 runs another command; choose another --name"):
        cloud.submit(delete_on_exit=True)
    assert cloud.resource() is not None


@pytest.mark.parametrize("made_for", [{"accelerator": "v5e-16"}, {"spot": True}, {"workdir": "gs://somebody/run"}])
@pytest.mark.parametrize("state", ["ACTIVE", pytest.param("SUSPENDED", marks=pytest.mark.slow)])
def test_a_resource_made_for_another_run_is_left_alone(cloud, made_for, state):
    cloud.script({"then": state})
    fields = {name: parse_accelerator(value) if name == "accelerator" else value for name, value in made_for.items()}
    subprocess.run(Gcloud(dataclasses.replace(cloud.job, **fields)).create, check=True)
    with pytest.raises(UserError, match="tiny already exists for another run's folder or other hardware"):
        cloud.submit(delete_on_exit=True)
    assert cloud.lines == ["tiny is OTHER: " + cloud.lines[0].removeprefix("tiny is OTHER: ")]
    assert cloud.resource() is not None


@pytest.mark.slow
def test_nothing_is_deleted_before_the_workers_show_whose_training_they_run(cloud, monkeypatch):
    cloud.script(plan=["3:wait"])
    cloud.interrupt_at(3)
    assert cloud.submit() == 42

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(TpuWatcher, "_ask", interrupted)
    assert cloud.submit(delete_on_exit=True) == 42
    assert cloud.lines == ["tiny is ACTIVE", "interrupted; if the training is running, it continues", *STAYS]
    assert cloud.resource() is not None


def test_a_second_watch_on_this_machine_is_refused(cloud):
    cloud.script()
    with tpu_vm._lock(cloud.job), pytest.raises(UserError, match="another command on this machine is watching tiny"):
        cloud.submit()
    assert not (cloud.folder / "cloud" / "commands.jsonl").exists()


def test_a_request_without_an_answer_counts_as_made(cloud):
    cloud.script({"states": ["WAITING_FOR_RESOURCES"] * 99}, create_silent=1)
    cloud.when(lambda: cloud.path and cloud.created() and cloud.count("create") == 1, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert cloud.submit(QUICK._replace(poll=60.0), delete_on_exit=True) == 42
    assert cloud.lines[-1] == "deleting tiny"
    assert cloud.resource() is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "states"), [("UNAVAILABLE: later", ["ACTIVE"]), ("", ["DELETING", ""])], ids=["no answer", "still going"]
)
def test_a_resource_that_was_never_seen_alive_is_requested(cloud, first, states):
    cloud.script({"states": states}, {}, describe_errors={"1": first} if first else {})
    if not first:
        subprocess.run(Gcloud(cloud.job).create, check=True)
    assert cloud.submit() == 0
    assert cloud.count("create") == (1 if first else 2)


@pytest.mark.slow
def test_deletion_is_retried_until_it_succeeds(cloud):
    cloud.script({"then": "SUSPENDED"}, {}, delete_errors=["DEADLINE_EXCEEDED: later"] * 2)
    assert cloud.submit() == 0
    assert cloud.count("delete") == 3
    assert cloud.count("create") == 2


@pytest.mark.slow
def test_a_crash_is_counted_once_although_stopping_fails(cloud):
    cloud.script(plan=["3:1", "7:0"], stop_errors={"tiny": 1})
    assert cloud.submit() == 0
    assert cloud.lines[-3] == "done (preemptions: 0, crashes: 1)"
    assert "tiny: an earlier attempt ended (exit 1)" in cloud.lines


@pytest.mark.slow
def test_no_training_starts_while_another_has_not_been_stopped(cloud):
    cloud.change(slices=2)
    cloud.script(plan=["3:1", "7:0"], others=["9:wait", "7:0"], stop_errors={"tiny-1": 2})
    assert cloud.submit() == 0
    verbs = [command[-1].split()[-1] for command in map(without_place, cloud.commands()) if command[4] == "ssh"]
    verbs = [verb for verb in verbs if verb in ("install", "start", "120")]
    assert verbs == ["install"] * 2 + ["start"] * 2 + ["120"] * 6 + ["install"] * 2 + ["start"] * 2
    assert (cloud.attempts(0), cloud.attempts(1)) == (2, 2)


@pytest.fixture
def watch(cloud, monkeypatch):
    """A watcher of two workers whose observations are given: `observe(state, *statuses, after=seconds)`."""
    cloud.script(hosts=2)
    now = [0.0]
    watcher = TpuWatcher(dataclasses.replace(cloud.job, preemptions=1, crashes=1), [], "a", clock=lambda: now[0])

    def observe(state, *statuses, after=0.0):
        now[0] += after
        answers = {f"tiny worker {number}": status for number, status in enumerate(statuses) if status}
        node = {"labels": {"gpt-jax": watcher.gcloud.owner}}
        text = json.dumps({"state": {"state": state}, "tpu": {"nodeSpec": [{"node": node}]}})
        monkeypatch.setattr(tpu_watch, "run_all", lambda commands, limit: [Result(0, text, "")] * len(commands))
        monkeypatch.setattr(watcher, "_ask", lambda words, limit: answers)
        monkeypatch.setattr(watcher, "_lost_node", lambda: "")
        return watcher._observe()

    watcher.observe = observe
    return watcher


def test_the_silence_of_a_worker_ends_with_its_machine(watch):
    watch.observe("ACTIVE", RUNS, RUNS)
    assert watch.observe("ACTIVE", RUNS, None, after=15).seconds == 0
    assert watch.observe("ACTIVE", RUNS, None, after=200).seconds == 200
    watch.observe("SUSPENDED", after=15)
    assert watch.observe("ACTIVE", None, None, after=1200).seconds == 0


def test_the_silence_of_each_worker_is_timed_separately(watch):
    assert watch.observe("ACTIVE", None, RUNS).seconds == 0
    assert watch.observe("ACTIVE", RUNS, None, after=200).seconds == 0
    assert watch.observe("ACTIVE", None, None, after=200).seconds == 200


def test_a_short_silence_does_not_delay_the_restart(watch):
    watch.observe("ACTIVE", RUNS, RUNS)
    assert watch.observe("ACTIVE", ended(1), RUNS, after=15).workers == "ended"
    assert watch.observe("ACTIVE", ended(1), None, after=30).workers == "silent"
    assert decide(watch.observe("ACTIVE", ended(1), RUNS, after=30), Timing()).kind is ActionKind.RESTART


def test_a_resource_whose_workers_never_answered_is_not_deleted(watch):
    watch.observe("ACTIVE", None, None)
    assert decide(watch.observe("ACTIVE", None, None, after=300), Timing())[:2] == (ActionKind.END, Outcome.CRASHED)
    watch.observe("ACTIVE", RUNS, RUNS, after=15)
    watch.observe("ACTIVE", RUNS, None, after=15)
    assert decide(watch.observe("ACTIVE", RUNS, None, after=300), Timing())[:2] == (ActionKind.REPLACE, Outcome.CRASHED)


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        ("PERMISSION_DENIED: no", True),
        ("Reauthentication failed. cannot prompt during non-interactive execution.", True),
        (QUOTA, True),
        ("UNAVAILABLE: later", False),
        ("There was a problem refreshing your current auth tokens: Max retries exceeded. Run: gcloud auth login", False),
        ("gcloud crashed (ConnectionError): ('Connection aborted.')", False),
        ("an unknown error", False),
    ],
)
def test_refusals_are_distinguished_from_temporary_errors(error, refused):
    assert Result(1, "", f"ERROR: (gcloud.compute.tpus.queued-resources.create) {error}").refused is refused


def test_the_resource_is_deleted_although_standard_error_is_closed(cloud, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    cloud.script({"states": ["WAITING_FOR_RESOURCES"] * 999})
    cloud.when(lambda: cloud.created() and cloud.count("describe") > 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    monkeypatch.setattr(sys, "stderr", Gone())
    assert tpu_vm.submit(dataclasses.replace(cloud.job, delete_on_exit=True), QUICK) == 42
    assert cloud.resource() is None


@pytest.mark.parametrize("hosts", [1, 2])
def test_a_corrected_mistake_does_not_affect_the_next_call(cloud, hosts):
    cloud.script(plan=["0:2", "7:0"], hosts=hosts)
    with pytest.raises(UserError, match="a restart would repeat this mistake"):
        cloud.submit()
    assert cloud.submit() == 0


def test_a_refusal_ends_the_watch(cloud):
    cloud.script(describe_errors={"all": "Reauthentication failed"})
    with pytest.raises(UserError, match="Reauthentication failed"):
        cloud.submit()
    assert cloud.count("describe") == 1


@pytest.mark.slow
def test_a_refusal_that_lasts_ends_the_watch(cloud):
    cloud.script({"states": ["PROVISIONING"] * 99}, describe_errors={str(number): "PERMISSION_DENIED" for number in range(3, 99)})
    with pytest.raises(UserError, match="PERMISSION_DENIED"):
        cloud.submit()
    assert cloud.lines[-2:] == STAYS


@pytest.mark.parametrize("answer", ["", "[]", "{}", '{"state": null}', '{"state": {"state": "ACTIVE"}}'])
def test_an_unreadable_answer_leaves_the_state_unknown(cloud, answer):
    assert Gcloud(cloud.job).parse_resource(Result(0, answer, "")) == ("UNKNOWN", "gcloud's answer could not be read")


def test_the_ssh_key_for_several_workers_is_checked_before_anything_is_created(cloud):
    cloud.script(hosts=2)
    key = cloud.folder / ".ssh" / "google_compute_engine.pub"
    key.write_text("ssh-rsa OTHER t@example.com\n")
    with pytest.raises(UserError, match="only if the ssh agent has its key"):
        cloud.submit()
    key.unlink()
    with pytest.raises(UserError, match="gcloud has no ssh key yet"):
        cloud.submit()
    assert not (cloud.folder / "cloud" / "commands.jsonl").exists()


def test_a_shallow_clone_is_refused(cloud, tmp_path):
    cloud.script()
    git(cloud.repository, "commit", "--quiet", "--allow-empty", "--message", "another")
    git(tmp_path, "clone", "--quiet", "--depth", "1", f"file://{cloud.repository}", "shallow")
    cloud.install_from(tmp_path / "shallow")
    with pytest.raises(UserError, match="is a shallow clone, whose commit cannot be packed; run git fetch --unshallow"):
        cloud.submit()


def test_the_log_is_kept_in_the_runs_folder(cloud):
    cloud.script(plan=["2:1", "7:0"], hosts=2)
    assert cloud.submit() == 0
    logs = {file.name: file.read_text() for file in (cloud.run / "logs").iterdir()}
    assert sorted(logs) == ["t1v-n-tiny-w-0.log", "t1v-n-tiny-w-1.log"]
    assert logs["t1v-n-tiny-w-0.log"].count("gpt-jax: attempt") == 2


@pytest.mark.slow
def test_a_resource_that_someone_else_deletes_is_not_created_again(cloud):
    cloud.script({"vanish": 5}, plan=["3:wait"])  # during an observation, after `describe`
    assert cloud.submit() == 1
    assert cloud.lines[-2:] == ["tiny is not there", "the resource was deleted by someone else"]
    assert cloud.count("create") == 1


@pytest.mark.slow
def test_a_second_command_uses_the_resource_that_the_first_has_created(cloud):
    cloud.script(describe_errors={"1": "NOT_FOUND: it was not there yet"})
    create = Gcloud(cloud.job).create
    subprocess.run(create, check=True)
    assert cloud.submit() == 0
    assert cloud.count("create") == 2
    assert cloud.lines[:2] == [REQUESTED, "tiny is ACTIVE"]


@pytest.mark.slow
def test_an_installation_that_fails_is_a_crash(cloud):
    cloud.script()
    (cloud.folder / "cloud" / "no-index").touch()
    assert cloud.submit() == 1
    failure = "install on tiny worker 0: "
    assert sum(line.startswith(failure) and line.endswith("error: no index to install from") for line in cloud.lines) == 2
    giving_up = "no index to install from) at step 0, like the crash before it and without progress: giving up"
    assert cloud.lines[-3].endswith(giving_up)


def test_the_workers_get_the_commit_and_the_uncommitted_changes(cloud):
    file, new = cloud.repository / "setup.cfg", cloud.repository / "configs" / "mine.py"
    file.write_text("[changed]\n")
    new.parent.mkdir()
    new.write_text("new = True\n")
    git(cloud.repository, "add", "configs/mine.py")
    cloud.diff = git(cloud.repository, "diff", "HEAD", "--binary") + "\n"
    git(cloud.repository, "reset", "--quiet", "--hard")
    cloud.script()
    assert cloud.submit() == 0
    installed = cloud.folder / "cloud" / "workers" / "tiny" / "0" / "gpt-jax" / "tiny" / "source"
    assert git(installed, "rev-parse", "HEAD") == cloud.commit
    assert (installed / "setup.cfg").read_text() == "[changed]\n"
    assert (installed / "configs" / "mine.py").read_text() == "new = True\n"
    assert git(installed, "diff", "HEAD", "--binary") + "\n" == cloud.diff
    (packages,) = [line for line in (cloud.folder / "cloud" / "uv.log").read_text().splitlines() if line.startswith("pip")]
    assert packages.endswith(f"--constraint {installed}/constraints/py312.txt --editable {installed}[tpu,gpt1]")


@pytest.mark.slow
def test_an_unchanged_installation_is_kept(cloud):
    cloud.script(plan=["2:1", "4:42", "7:0"])
    assert cloud.submit() == 0
    assert (cloud.folder / "cloud" / "uv.log").read_text().count("pip install") == 1


@pytest.mark.slow
def test_several_slices_are_several_nodes(cloud):
    cloud.change(slices=2, spot=True, project="p")
    cloud.script(hosts=2)
    assert cloud.submit() == 0
    assert "installing on 4 workers; the first installation takes minutes" in cloud.lines
    (create,) = [command for command in cloud.commands() if command[4] == "create"]
    assert shlex.join(create[6:]) == (
        "--node-count 2 --node-prefix tiny --accelerator-type v5litepod-8 --runtime-version v2-alpha-tpuv5-lite --spot "
        f"--labels gpt-jax={Gcloud(cloud.job).owner} --quiet --zone us-west4-a --project p"
    )
    assert sorted(path.name for path in (cloud.folder / "cloud" / "workers").iterdir()) == ["tiny-0", "tiny-1"]


def test_a_dry_run_prints_the_commands_that_are_run(cloud):
    cloud.script(plan=["2:42", "7:0"])
    printed = tpu_vm.render(cloud.job)
    assert not (cloud.folder / ".cache").exists()
    commands = [shlex.split(line) for line in printed.splitlines() if line.startswith("gcloud")]
    assert cloud.submit(delete_on_exit=True) == 0

    def shape(command):
        return [word if " status " not in word else "status" for word in command]

    executed = [shape(command) for command in cloud.commands()]
    for command in commands:
        assert shape(command) in executed or command[3:5] == ["tpu-vm", "describe"]  # Every worker answered.
    for command in executed:
        assert command in [shape(printed) for printed in commands]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workdir": "runs/here"}, "--workdir: 'runs/here' cannot be reached from the workers"),
        ({"zone": ""}, "--zone: name the zone"),
        ({"image": "x"}, "--image: leave it out; tpu-vm installs this commit"),
        ({"queue": "x"}, "--queue: leave it out; Cloud TPU has one queue"),
        ({"accelerator": parse_accelerator("h100-8")}, "h100-8 is not a TPU; tpu-vm takes v4, v5e, v5p, v6e"),
        ({"accelerator": parse_accelerator("7x-8")}, "7x-8 is not offered as a TPU VM; use gke"),
    ],
)
def test_jobs_that_tpu_vms_cannot_run_are_refused(cloud, change, message):
    job = dataclasses.replace(cloud.job, workdir="gs://runs/a")
    checks.check(job, tpu_vm)
    with pytest.raises(UserError, match=message):
        checks.check(dataclasses.replace(job, **change), tpu_vm)


def test_without_gcloud_the_message_describes_how_to_install_it(cloud, tmp_path, monkeypatch):
    cloud.script()
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "git").symlink_to(shutil.which("git"))
    monkeypatch.setenv("PATH", str(tmp_path / "tools"))
    with pytest.raises(UserError, match="gcloud is not installed on this machine: install the Google Cloud CLI"):
        cloud.submit()


# -- on a worker ------------------------------------------------------------------------------------------------------------

DEAF = """
import pathlib, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.alarm(60)
with open(pathlib.Path(__file__).parents[2] / "trainings", "a") as file:
    file.write(".")
print("deaf", flush=True)
time.sleep(60)
"""


@pytest.fixture
def worker(tmp_path):
    """Runs tpu_worker.py in a folder whose training ignores SIGTERM; `ask` returns its answer."""
    package = tmp_path / "source" / "gpt_jax"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(DEAF)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "uncommitted.diff").touch()
    task = {"command": ["gpt-jax", "pretrain"], "digest": "d", "workdir": str(tmp_path / "run")}
    (tmp_path / "job.json").write_text(json.dumps(task))
    shutil.copy(tpu_vm.tpu_worker.__file__, tmp_path / "tpu_worker.py")

    def begin(*words):
        command = [sys.executable, "-SE", str(tmp_path / "tpu_worker.py"), *words]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"HOSTNAME": "t1v-n-x-w-0"})

    def ask(*words):
        (line,) = begin(*words).communicate(timeout=60)[0].strip().splitlines()
        assert line.startswith("gpt-jax-worker t1v-n-x-w-0 {")
        return json.loads(line.split(" ", 2)[2])

    yield SimpleNamespace(begin=begin, ask=ask, folder=tmp_path)
    ask("stop", "0")


def test_a_second_start_does_not_begin_a_second_training(worker):
    both = [worker.begin("start"), worker.begin("start")]
    assert ['"state": "running"' in process.communicate(timeout=60)[0] for process in both] == [True, True]
    assert worker.ask("start")["state"] == "running"
    while not (log := worker.ask("status", "2")["log"]):
        time.sleep(0.05)
    assert log == "af\n"
    assert (worker.folder / "trainings").read_text() == "."


def test_a_training_that_ignores_sigterm_is_killed_and_forgotten(worker):
    assert worker.ask("status")["state"] == "idle"
    assert worker.ask("start")["state"] == "running"
    assert worker.ask("stop", "0")["state"] == "idle"
    assert worker.ask("status")["state"] == "idle"


def test_a_training_that_went_down_with_its_machine_counts_as_preempted(worker):
    worker.ask("start")
    os.killpg(int((worker.folder / "pid").read_text().split()[1]), signal.SIGKILL)
    while (status := worker.ask("status"))["state"] == "running":
        time.sleep(0.05)
    assert (status["state"], status["code"], status["job"]) == ("ended", 42, "d")


# -- with real trainings ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_training_that_is_preempted_twice_equals_an_undisturbed_one(cloud, tmp_path, monkeypatch):
    """Two runs of the same two processes, with two devices each, are equal bit for bit."""
    environment = {
        "JAX_COORDINATOR_ADDRESS": "127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "{workers}",
        "JAX_PROCESS_ID": "{worker}",
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_PLATFORMS": "cpu",
    }
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    cloud.install_from(repository_of(tmp_path / "empty"))  # so that the package of this environment runs
    changes = {"data": {"store": str(tmp_path / "store")}, "train": {"duration": "60 steps"}}
    cloud.change(overrides=smoke_overrides(tmp_path, **changes))
    real = {"hosts": 2, "flags": "", "environment": environment}
    patient = QUICK._replace(poll=0.2, answer=60.0, install=60.0)
    cloud.script({"preempt": 17, "at_once": True}, {"preempt": 37, "at_once": True}, {}, **real)
    assert cloud.submit(patient) == 0
    assert cloud.lines[-3] == "done (preemptions: 2, crashes: 0)"
    assert cloud.shown.count("resuming at step ") == 2
    cloud.clean()
    shutil.rmtree(cloud.folder / "cloud")
    whole = cloud.run.with_name("whole")
    cloud.change(workdir=str(whole))
    cloud.script(**real)
    assert cloud.submit(patient) == 0
    assert "resuming" not in cloud.shown
    assert len(trajectory(whole)) == 60 + 12
    assert trajectory(cloud.run) == trajectory(whole)
