"""A training on a Cloud TPU VM: asked for as a queued resource, watched, and asked for again after a preemption.

`decide` is the whole judgement: from what one look shows to what is done next. `Gcloud` writes the commands, `Babysitter` runs
them. What happens on the workers is `tpu_worker`, which is copied there. Nothing is remembered here: called again, the same
command attaches to what it finds.

Sources: "Manage queued resources" and gcloud's reference for `compute tpus` (Google Cloud documentation, 2026).
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import hashlib
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax import checkout
from gpt_jax.checkout import Checkout
from gpt_jax.config import require
from gpt_jax.errors import Preempted, TrainingError, UserError

from . import tpu_worker
from .job import Checked, Job, buckets, mounted, require_reachable, require_tool
from .supervise import Budget, Fate, describe, judge, kill, spawn

RUNTIMES = {"v4": "tpu-ubuntu2204-base", "v5e": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e"}
"""Software version of a TPU VM, by family."""
EXTRAS = "tpu,gpt1"
"""Of the package: the TPU's runtime, and the released tokenizer, which the config gpt1 takes."""
NODE_LIVES = ("READY", "CREATING", "STARTING", "RESTARTING", "REPAIRING")
"""States of a node that is there, or will be again."""
PASSING = re.compile("UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL|ABORTED|timed out|did not answer")
"""Complaints of gcloud that are no refusals."""


class Timing(NamedTuple):
    """All in seconds."""

    poll: float = 15.0
    """Between two looks."""
    settle: float = 60.0
    """From the end of a training to the judgement: a preempted resource stays ACTIVE for a while after its machines are gone."""
    patience: float = 300.0
    """With a worker that does not answer while its resource is ACTIVE."""
    answer: float = 90.0
    """For one command on all workers."""
    install: float = 1800.0
    change: float = 900.0
    """For creating and deleting."""


USUAL = Timing()


# -- what is seen, and what is done about it --------------------------------------------------------------------------------


class Seen(NamedTuple):
    """What one look shows."""

    resource: str
    """State of the queued resource; "": there is none, "UNKNOWN": gcloud did not say."""
    workers: str = ""
    """Of an ACTIVE one: "idle", "running", "ended", "other" (another job's training), "silent", "gone" or "failed" (to start)."""
    codes: tuple[int, ...] = ()
    """The exit codes of those that ended."""
    why: str = ""
    """Words for the person: which worker, what it said last, gcloud's message."""
    seconds: float = 0.0
    """For how long the workers have been so."""
    first: bool = False
    """It is this call's first look, so whatever has ended, ended before."""


class Do(enum.Enum):
    CREATE = "ask for the resource"
    WAIT = "look again later"
    START = "install and start, where nothing runs"
    RESTART = "stop the rest, and start again on the same machines"
    REPLACE = "delete the resource and ask for another"
    END = "stop watching"


class Action(NamedTuple):
    do: Do
    fate: Fate | None = None
    """What it counts as; None: it does not count."""
    why: str = ""


def decide(seen: Seen, timing: Timing) -> Action:
    """What follows from what is seen."""
    match seen.resource, seen.workers:
        case "", _:
            return Action(Do.CREATE) if seen.first else Action(Do.END, Fate.CRASHED, "somebody else has deleted it")
        case "SUSPENDED" | "FAILED", _ if seen.first:
            return Action(Do.REPLACE, None, f"left {seen.resource} by an earlier call")
        case "SUSPENDED", _:
            return Action(Do.REPLACE, Fate.PREEMPTED, "SUSPENDED")
        case "FAILED", _ if "quota" in seen.why.lower():
            return Action(Do.END, Fate.MISTAKE, f"there is no quota for this: {seen.why}")
        case "FAILED", _:
            capacity = re.search("capacity|stockout|resources? (are|were|is) not available", seen.why, re.IGNORECASE)
            return Action(Do.REPLACE, Fate.PREEMPTED if capacity else Fate.CRASHED, f"FAILED: {seen.why}")
        case "ACTIVE", "gone":
            return Action(Do.REPLACE, Fate.PREEMPTED, seen.why)
        case "ACTIVE", "silent" if seen.seconds >= timing.patience:
            return Action(Do.REPLACE, Fate.CRASHED, f"{seen.why} for {timing.patience:g} s, though the resource is ACTIVE")
        case "ACTIVE", "other":
            return Action(Do.END, Fate.MISTAKE, seen.why)
        case "ACTIVE", "idle":
            return Action(Do.START)
        case "ACTIVE", "failed" if seen.seconds >= timing.settle:
            return Action(Do.RESTART, Fate.CRASHED, seen.why)
        case "ACTIVE", "ended":
            fate, code = judge(seen.codes)
            if fate is Fate.DONE:
                return Action(Do.END, fate, "done")
            if seen.first:
                return Action(Do.RESTART, None, f"an earlier attempt ended ({describe(code)})")
            if fate is Fate.MISTAKE:
                return Action(Do.END, fate, f"{seen.why}; a restart does not mend a mistake")
            if seen.seconds >= timing.settle:
                return Action(Do.RESTART, fate, describe(code))
    # "running"; CREATING, ACCEPTED, WAITING_FOR_RESOURCES, PROVISIONING; SUSPENDING, DELETING, UNKNOWN; and whatever settles
    return Action(Do.WAIT)


def together(answers: dict[str, dict[str, Any]], expected: Sequence[str], digest: str) -> tuple[str, tuple[int, ...], str]:
    """The `workers`, `codes` and `why` of `Seen`, from each worker's status.

    Args:
      answers: status by worker, "NODE worker N".
      expected: all workers.
      digest: of the job that is meant to run there.
    """
    if missing := [worker for worker in expected if worker not in answers]:
        return "silent", (), f"{' and '.join(missing[:3])}{' and others' if len(missing) > 3 else ''} did not answer"
    answers = {worker: answers[worker] for worker in expected}
    if other := [worker for worker, each in answers.items() if each["state"] == "running" and each["job"] not in ("", digest)]:
        return "other", (), f"{other[0]} runs another command; give this one another --name, or delete the resource"
    ended = {worker: each for worker, each in answers.items() if each["state"] == "ended" and each["job"] == digest}
    codes = tuple(int(each["code"]) for each in ended.values())
    if any(codes) or len(ended) == len(expected):
        telling = next((worker for worker, each in ended.items() if each["code"] == judge(codes)[1] != 0), "")
        last = f", saying: {ended[telling]['said']}" if telling and ended[telling]["said"] else ""
        return "ended", codes, f"{telling} ended ({describe(judge(codes)[1])}){last}" if telling else ""
    # A worker whose training is done waits for the others'; one that has none, beside others that have, still needs one.
    resting = all(each["state"] == "running" for worker, each in answers.items() if worker not in ended)
    return "running" if resting else "idle", (), ""


# -- gcloud -----------------------------------------------------------------------------------------------------------------


class Gcloud:
    """The words of every command."""

    def __init__(self, job: Job, checked: Checked) -> None:
        self.name = job.name
        self.nodes = [job.name] if job.slices == 1 else [f"{job.name}-{number}" for number in range(job.slices)]
        # --quiet: it can ask nobody, not even when ssh needs its first key.
        self._place = ["--quiet", "--zone", job.zone, *(["--project", job.project] if job.project else [])]
        self._nodes = ["--node-id", job.name]
        if job.slices > 1:
            self._nodes = ["--node-count", str(job.slices), "--node-prefix", job.name]
        self._spot = ["--spot"] if job.spot else []
        self._type = checked.accelerator.gcloud
        self._runtime = RUNTIMES[checked.accelerator.family]
        self.folder = f"gpt-jax/{job.name}"
        """On each worker, below the home folder."""

    def _resource(self, verb: str, *words: str) -> list[str]:
        return ["gcloud", "compute", "tpus", "queued-resources", verb, self.name, *words, *self._place]

    def create(self) -> list[str]:
        kind = ["--accelerator-type", self._type, "--runtime-version", self._runtime]
        return self._resource("create", *self._nodes, *kind, *self._spot)

    def describe(self) -> list[str]:
        return self._resource("describe", "--format", "json")

    def delete(self) -> list[str]:
        return self._resource("delete", "--force")

    def describe_node(self, node: str) -> list[str]:
        return ["gcloud", "compute", "tpus", "tpu-vm", "describe", node, "--format", "value(state)", *self._place]

    def copy(self, node: str, files: Sequence[Path]) -> list[str]:
        words = [*map(str, files), f"{node}:{self.folder}/"]
        return ["gcloud", "compute", "tpus", "tpu-vm", "scp", *words, "--worker", "all", *self._place]

    def ask(self, node: str, verb: str) -> list[str]:
        """Runs `tpu_worker VERB` on every worker of a node."""
        return self._ssh(node, f"python3 {self.folder}/tpu_worker.py {verb}")

    def status(self, node: str, offset: int) -> list[str]:
        """Asks for the status of every worker; one that has nothing yet says so."""
        known = f"python3 tpu_worker.py status {offset}"
        command = f"mkdir -p {self.folder} && cd {self.folder} && if test -f tpu_worker.py; then {known}; else "
        return self._ssh(node, f"{command}echo {tpu_worker.MARK} $HOSTNAME {{}}; fi")

    def _ssh(self, node: str, command: str) -> list[str]:
        return ["gcloud", "compute", "tpus", "tpu-vm", "ssh", node, "--worker", "all", "--command", command, *self._place]


class Done(NamedTuple):
    """A command that has ended."""

    code: int | None
    """None: it was killed when its time was up."""
    output: str
    errors: str

    @property
    def problem(self) -> str:
        """What gcloud complained of, in one line."""
        if self.code is None:
            return "gcloud did not answer in time"
        _, error, text = self.errors.strip().rpartition("ERROR:" if "ERROR:" in self.errors else "\n")
        return " ".join(f"{error}{text}".split())[:400] or f"gcloud ended with {self.code}"


def run_all(commands: Sequence[Sequence[str]], limit: float) -> list[Done]:
    """Runs commands at once; kills those that take longer than `limit` seconds, together with the ssh they wait for. What they
    have said until then counts: with one worker silent, the others have answered.
    """
    until = time.monotonic() + limit
    with tempfile.TemporaryDirectory() as folder:
        files = [[Path(folder, f"{number}.{stream}") for stream in ("out", "err")] for number in range(len(commands))]
        processes = []
        try:
            for command, (out, err) in zip(commands, files, strict=True):
                with open(out, "wb") as output, open(err, "wb") as errors:
                    processes.append(spawn(command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors))
            codes: list[int | None] = []
            for process in processes:
                try:
                    codes.append(process.wait(max(until - time.monotonic(), 0.01)))
                except subprocess.TimeoutExpired:
                    codes.append(None)
        finally:
            for process in processes:
                if process.poll() is None:
                    kill(process)
        texts = [[file.read_text(encoding="utf-8", errors="replace") for file in pair] for pair in files]
    return [Done(code, *pair) for code, pair in zip(codes, texts, strict=True)]


# -- the watch --------------------------------------------------------------------------------------------------------------


def say(line: str) -> None:
    print(f"tpu-vm: {line}", file=sys.stderr, flush=True)


@dataclasses.dataclass
class Babysitter:
    """Looks, decides, acts, until there is nothing left to do."""

    gcloud: Gcloud
    files: Sequence[Path]
    """To be copied to every worker."""
    digest: str
    """Of the job."""
    hosts: int
    """Workers of a node."""
    budget: Budget
    grace_seconds: int
    delete_on_exit: bool
    timing: Timing = USUAL
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.workers = [f"{node} worker {number}" for node in self.gcloud.nodes for number in range(self.hosts)]
        self._all = f"{len(self.workers)} worker{'s' if len(self.workers) > 1 else ''}"
        self._exists = False
        self._offset = -1  # in worker 0's log
        self._step: int | None = None
        self._failure = ""  # why the training could not be started
        self._before: tuple[Any, ...] = ()  # what the last look showed of the workers, and since when
        self._since = 0.0
        self._state = self._reason = ""  # what was said last

    def run(self) -> int:
        """Returns 0 when the training is done, 1 when it gave up, 42 after Ctrl-C.

        Raises:
          UserError: gcloud or the training refuses what was asked for.
        """
        try:
            action = self._watch()
            if action.fate is Fate.MISTAKE:
                raise UserError(action.why)
            say(action.why)
            return 0 if action.fate is Fate.DONE else TrainingError.exit_code
        except KeyboardInterrupt:
            say("interrupted" if self.delete_on_exit else "interrupted; a training that runs goes on")
            if self.delete_on_exit and self._exists:
                say(f"stopping the training, which has {self.grace_seconds} s to save")
                self._ask(f"stop {self.grace_seconds}", self.grace_seconds + self.timing.answer)
            return Preempted.exit_code
        finally:
            self._leave()

    def _watch(self) -> Action:
        first = True
        while True:
            seen = self._look(first)
            action = decide(seen, self.timing)
            first = False
            match action.do:
                case Do.CREATE:
                    self._create()
                case Do.WAIT:
                    self.sleep(self.timing.poll)
                case Do.START:
                    self._start()
                case Do.RESTART | Do.REPLACE:
                    if not self._count(action):
                        return Action(Do.END, Fate.CRASHED, f"{self.gcloud.name} is given up")
                    self._failure, self._reason, self._before = "", "", ()
                    if action.do is Do.RESTART:
                        self._ask(f"stop {self.grace_seconds}", self.grace_seconds + self.timing.answer)
                    else:
                        self._delete()
                        self._create()
                case Do.END if action.fate is Fate.DONE:
                    return action._replace(why=f"done ({self.budget})")
                case Do.END:
                    self.delete_on_exit &= seen.workers != "other"  # it is not ours
                    return action

    # -- looking --

    def _look(self, first: bool) -> Seen:
        resource, why = self._describe(first)
        if resource == "ACTIVE":
            commands = [self.gcloud.status(node, self._offset) for node in self.gcloud.nodes]
            answers = self._answers(commands, self.timing.answer)
            self._show(answers)
            workers, codes, reason = together(answers, self.workers, self.digest)
            if workers == "idle" and self._failure:
                workers, reason = "failed", self._failure
            if workers in ("silent", "failed") and (lost := self._lost_nodes()):
                workers, reason = "gone", lost
                resource, why = self._describe(first)  # which may have been taken away, or deleted, since the look began
        if resource != "ACTIVE":
            self._before = ()
            return Seen(resource, why=why, first=first)
        if (workers, codes, reason) != self._before:
            self._before, self._since = (workers, codes, reason), self.clock()
            if workers == "running":
                say(f"the training runs on {self._all}")
            elif reason and reason != self._reason and not (first and workers == "ended"):
                say(reason)
            self._reason = reason
        return Seen(resource, workers, codes, reason, self.clock() - self._since, first)

    def _describe(self, strict: bool) -> tuple[str, str]:
        """State of the queued resource, and what it says of it. `strict`: what gcloud refuses is a mistake, not a bad moment."""
        (done,) = run_all([self.gcloud.describe()], self.timing.answer)
        state, why = "UNKNOWN", done.problem
        if done.code == 0:
            answer = json.loads(done.output)["state"]
            state, why = answer["state"], " ".join(answer.get("failedData", {}).get("error", {}).get("message", "").split())
        elif "NOT_FOUND" in done.errors:
            state, why = "", ""
        elif strict and not PASSING.search(done.problem):
            raise UserError(done.problem)
        if state != self._state:
            if state or self._state:
                say(f"{self.gcloud.name} is {state or 'not there'}{': ' + why if why else ''}")
            self._state = state
        self._exists = state != ""
        return state, why

    def _lost_nodes(self) -> str:
        """Which node is not there any more, though its resource is ACTIVE; nothing if all are."""
        commands = [self.gcloud.describe_node(node) for node in self.gcloud.nodes]
        for node, done in zip(self.gcloud.nodes, run_all(commands, self.timing.answer), strict=True):
            if "NOT_FOUND" in done.errors:
                return f"node {node} is gone"
            if done.code == 0 and done.output.strip() not in NODE_LIVES:
                return f"node {node} is {done.output.strip()}"
        return ""

    def _ask(self, verb: str, limit: float) -> dict[str, dict[str, Any]]:
        """Runs a verb of `tpu_worker` on all workers; the answers of those that gave one."""
        return self._answers([self.gcloud.ask(node, verb) for node in self.gcloud.nodes], limit)

    def _answers(self, commands: Sequence[Sequence[str]], limit: float) -> dict[str, dict[str, Any]]:
        answers = {}
        for node, done in zip(self.gcloud.nodes, run_all(commands, limit), strict=True):
            for host, text in re.findall(rf"^{tpu_worker.MARK} (\S+) (.*)$", done.output, re.MULTILINE):
                number = host.rpartition("-w-")[2] if "-w-" in host else "0"
                with contextlib.suppress(ValueError):  # it was cut off
                    answers[f"{node} worker {number}"] = {"state": "idle", "job": ""} | json.loads(text)
        return answers

    def _show(self, answers: dict[str, dict[str, Any]]) -> None:
        """Prints what process 0 has said since the last look."""
        first = answers.get(self.workers[0], {})
        if "log" in first:
            sys.stderr.write(first["log"])
            sys.stderr.flush()
            self._offset, self._step = first["offset"], first["step"]

    # -- acting --

    def _create(self) -> None:
        """Asks for the resource.

        Raises:
          UserError: gcloud refuses, as it does without quota.
        """
        self._offset, until = 0, self.clock() + self.timing.patience
        say(f"asking for {self.gcloud.name}: {shlex.join(self.gcloud.create())}")
        while True:
            self._exists = True  # perhaps, once the command has begun
            (done,) = run_all([self.gcloud.create()], self.timing.change)
            if done.code == 0 or "ALREADY_EXISTS" in done.errors:
                return
            self._exists = False
            if not PASSING.search(done.problem) or self.clock() >= until:
                quota = "there is no quota for this: " if "quota" in done.problem.lower() else ""
                raise UserError(f"{quota}{done.problem}")
            say(f"{done.problem}; trying again")
            self.sleep(self.timing.poll)

    def _delete(self) -> None:
        say(f"deleting {self.gcloud.name}")
        (done,) = run_all([self.gcloud.delete()], self.timing.change)
        if done.code == 0 or "NOT_FOUND" in done.errors:
            self._exists = False
        else:
            say(f"{done.problem}; if it is still there it costs: {shlex.join(self.gcloud.delete())}")

    def _start(self) -> None:
        """Installs the commit on every worker and starts the training; a failure shows at the next look."""
        say(f"installing on {self._all}; the first time this takes minutes")
        commands = [self.gcloud.copy(node, self.files) for node in self.gcloud.nodes]
        for done in run_all(commands, self.timing.install):
            if done.code != 0:
                self._failure = f"the files could not be copied: {done.problem}"
                return
        for verb, wanted in (("install", ("installed",)), ("start", ("running", "ended"))):
            answers = self._ask(verb, self.timing.install)
            for worker in self.workers:
                answer = answers.get(worker, {"state": "", "why": "no answer"})
                if answer["state"] not in wanted:
                    self._failure = f"{verb} on {worker}: {answer.get('why', answer['state'])}"
                    return
        self._failure = ""

    def _count(self, action: Action) -> bool:
        """Counts a preemption or a crash, says so, and waits before the restart; whether there is one."""
        if action.fate is None:
            say(f"{self.gcloud.name}: {action.why}")
            return True
        after = self.budget.after_preemption if action.fate is Fate.PREEMPTED else self.budget.after_crash
        following = after(action.why, self._step)
        say(following.line)
        if following.again:
            self.sleep(following.wait)
        return following.again

    def _leave(self) -> None:
        """Deletes the resource if asked to, or says that it stays. One that FAILED is a mere name, which takes up quota."""
        with contextlib.suppress(KeyboardInterrupt):
            if self._exists and (self.delete_on_exit or self._state == "FAILED"):
                self._delete()
                return
        if self._exists:
            say(f"{self.gcloud.name} stays, and costs, until it is deleted: {shlex.join(self.gcloud.delete())}")
            say("the same command attaches to it again")


# -- the target -------------------------------------------------------------------------------------------------------------


def render(job: Job, checked: Checked, delete_on_exit: bool = False) -> str:
    """The commands that `submit` runs if nothing goes wrong, and what it does when something does.

    Raises:
      UserError: TPU VMs cannot do what the job asks for.
    """
    origin = checkout.find()
    _require_possible(job, checked, origin)
    gcloud = Gcloud(job, checked)

    def lines(*commands: Sequence[str]) -> str:
        return "".join(f"{shlex.join(command)}\n" for command in commands)

    def asked(verb: str) -> str:
        return lines(*(gcloud.ask(node, verb) for node in gcloud.nodes))

    every, stays = f"every {USUAL.poll:g} s", "" if delete_on_exit else "; in the end it stays, without --delete-on-exit"
    return (
        f"# commit {origin.commit[:12]} on {len(gcloud.nodes) * checked.accelerator.hosts} workers: {shlex.join(_command(job))}\n"
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
    origin = checkout.find()
    _require_possible(job, checked, origin)
    require_tool("gcloud", "install the Google Cloud CLI, then `gcloud auth login`")
    digest = _prepare(job, origin)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
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
    require_reachable(job, "tpu-vm")
    accelerator = checked.accelerator
    require(accelerator.kind == "tpu", "accelerator", f"{accelerator.name} is no TPU; tpu-vm takes {', '.join(RUNTIMES)}")
    require(accelerator.family in RUNTIMES, "accelerator", f"{accelerator.name} is not offered as a TPU VM; gke has it")
    require(bool(job.zone), "zone", "say in which, as in --zone us-west4-a")
    require(not job.queue, "queue", "tpu-vm has one queue; leave it out")
    require(not job.image, "image", "tpu-vm installs this commit on the workers and takes no image; leave it out")
    if not origin.commit:
        raise UserError("tpu-vm installs a commit on the workers, and this package is not in a git checkout: run it from a clone")


def _folder(job: Job) -> Path:
    """Where the files for the workers are made."""
    return Path("~/.cache/gpt_jax/launch").expanduser() / job.name


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
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(tpu_worker.__file__, folder / "tpu_worker.py")
    (folder / "job.json").write_text(json.dumps(task, indent=1) + "\n", encoding="utf-8")
    (folder / "uncommitted.diff").write_bytes(origin.diff)
    packed = subprocess.run(_bundle(job, origin), capture_output=True, text=True)
    if packed.returncode:
        raise UserError(f"{origin.folder}: git could not pack the commit: {' '.join(packed.stderr.split())}")
    return digest
