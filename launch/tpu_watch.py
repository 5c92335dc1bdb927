"""The watch over a training on Cloud TPU VMs: looks, decides, acts, until there is nothing left to do.

`decide` is the whole judgement: from what one look shows to what is done next. `gcloud` has the commands, `Babysitter` runs them.

Source: "Manage queued resources" (Google Cloud documentation, 2026).
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax.errors import Preempted, TrainingError, UserError

from . import tpu_worker
from .gcloud import LABEL, Gcloud, run_all
from .supervise import Budget, Fate, describe, judge

NODE_LIVES = ("READY", "CREATING", "STARTING", "RESTARTING", "REPAIRING")
"""States of a node that is there, or will be again."""
ALIVE = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
"""States of a resource that is there, or will be."""


class Timing(NamedTuple):
    """All in seconds."""

    poll: float = 15.0
    """Between two looks."""
    settle: float = 60.0
    """From the end of a training to the judgement: a preempted resource stays ACTIVE for a while after its machines are gone."""
    patience: float = 300.0
    """With a worker that does not answer while its resource is ACTIVE, and with gcloud when it refuses."""
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
    """State of the queued resource; "": there is none, "UNKNOWN": gcloud did not say, "REFUSED": gcloud refuses to say, "OTHER":
    what has this name is not this run's.
    """
    workers: str = ""
    """Of an ACTIVE one: "idle", "running", "ended", "other" (another command runs), "silent", "gone", or "failed" (to start)."""
    codes: tuple[int, ...] = ()
    """The exit codes of those that ended."""
    why: str = ""
    """Words for the person: which worker, what it said last, gcloud's message."""
    seconds: float = 0.0
    """For how long it has been so."""
    asked: bool = False
    """This call has asked for the resource, or has seen it alive: what becomes of it now was not there before."""
    ran: bool = False
    """This call has started the training that ended, or has seen it run."""
    ours: bool = True
    """This call has made the resource, or its workers have said that no other command's training runs there."""


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
        case "OTHER", _:
            return Action(Do.END, Fate.MISTAKE, seen.why)
        case "REFUSED", _ if not seen.asked or seen.seconds >= timing.patience:
            return Action(Do.END, Fate.MISTAKE, seen.why)
        case "UNKNOWN", _ if not seen.asked and seen.seconds >= timing.patience:
            return Action(Do.END, Fate.MISTAKE, seen.why)
        case "", _:
            return Action(Do.END, Fate.CRASHED, "somebody else has deleted it") if seen.asked else Action(Do.CREATE)
        case "SUSPENDED" | "FAILED", _ if not seen.asked:
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
            why = f"{seen.why} for {timing.patience:g} s, though the resource is ACTIVE"
            return Action(Do.REPLACE if seen.ours else Do.END, Fate.CRASHED, why)
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
            if not seen.ran:  # or it was counted already, and its machines have not heard yet that they are to forget it
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
    answers = {worker: answers[worker] for worker in expected if worker in answers}
    if other := [worker for worker, each in answers.items() if each["state"] == "running" and each["job"] not in ("", digest)]:
        return "other", (), f"{other[0]} runs another command; give this one another --name, or delete the resource"
    if missing := [worker for worker in expected if worker not in answers]:
        return "silent", (), f"{' and '.join(missing[:3])}{' and others' if len(missing) > 3 else ''} did not answer"
    ended = {worker: each for worker, each in answers.items() if each["state"] == "ended" and each["job"] == digest}
    codes = tuple(int(each["code"]) for each in ended.values())
    if any(codes) or len(ended) == len(expected):
        telling = next((worker for worker, each in ended.items() if each["code"] == judge(codes)[1] != 0), "")
        last = f", saying: {ended[telling]['said']}" if telling and ended[telling]["said"] else ""
        return "ended", codes, f"{telling} ended ({describe(judge(codes)[1])}){last}" if telling else ""
    # A worker whose training is done waits for the others'; one that has none, beside others that have, still needs one.
    resting = all(each["state"] == "running" for worker, each in answers.items() if worker not in ended)
    return "running" if resting else "idle", (), ""


# -- the watch --------------------------------------------------------------------------------------------------------------


def say(line: str) -> None:
    with contextlib.suppress(OSError):  # who read it may be gone; what costs must still be deleted
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
        self._exists = False  # perhaps
        self._ours = False  # and not another command's
        self._asked = self._ran = False  # as in `Seen`
        self._offset = -1  # in worker 0's log
        self._step: int | None = None
        self._failure = ""  # why the training could not be started
        self._asking: float | None = None  # since when asking for the resource has failed
        self._unheard = False  # the last `stop` has not reached every worker
        self._times: dict[str, float] = {}  # since when gcloud, or a worker, does not answer; since when the training has ended
        self._state = self._workers = self._reason = ""  # what was said last

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
            deletes = self.delete_on_exit and self._ours
            say("interrupted" if deletes else "interrupted; a training that runs goes on")
            if deletes and self._state == "ACTIVE":
                say(f"stopping the training, which has {self.grace_seconds} s to save")
                self._stop()
            return Preempted.exit_code
        finally:
            self._leave()

    def _watch(self) -> Action:
        while True:
            seen = self._look()
            action = decide(seen, self.timing)
            match action.do:
                case Do.CREATE:
                    if not self._create():
                        return Action(Do.END, Fate.CRASHED, f"{self.gcloud.name} could not be made")
                case Do.WAIT:
                    self.sleep(self.timing.poll)
                case Do.START if self._unheard:
                    self.sleep(self.timing.poll)
                    self._stop()
                case Do.START:
                    self._start()
                case Do.RESTART | Do.REPLACE:
                    if not self._count(action):
                        return Action(Do.END, Fate.CRASHED, f"{self.gcloud.name} is given up")
                    self._failure = self._workers = self._reason = ""
                    self._ran = False
                    self._times.clear()
                    if action.do is Do.RESTART:
                        self._stop()
                    elif self._describe()[0] != "OTHER" and not self._delete():
                        return Action(Do.END, Fate.CRASHED, f"{self.gcloud.name} could not be deleted")
                case Do.END if action.fate is Fate.DONE:
                    return action._replace(why=f"done ({self.budget})")
                case Do.END:
                    return action

    # -- looking --

    def _look(self) -> Seen:
        resource, why = self._describe()
        workers, reason, seconds = "", why, 0.0
        codes: tuple[int, ...] = ()
        if resource == "ACTIVE":
            commands = [self.gcloud.status(node, self._offset) for node in self.gcloud.nodes]
            answers = self._answers(commands, self.timing.answer)
            self._show(answers)
            workers, codes, reason = together(answers, self.workers, self.digest)
            self._ours = self._ours if workers == "silent" else workers != "other"
            if workers == "idle" and self._failure:
                workers, reason = "failed", self._failure
            if workers in ("silent", "failed") and (lost := self._lost_nodes()):
                resource, why = self._describe()  # which may have been taken away, or deleted, since the look began
                workers, codes, reason = ("gone", (), lost) if resource == "ACTIVE" else ("", (), why)
            seconds = self._wait_times(workers, answers)
        elif resource in ("UNKNOWN", "REFUSED"):
            seconds = self._age("gcloud")
        else:
            self._times.clear()
        if workers != self._workers and workers == "running":
            say(f"the training runs on {self._all}")
        if workers and reason and reason != self._reason and (self._ran or workers != "ended"):
            say(reason)
        self._workers, self._reason = workers, reason
        self._ran |= workers == "running"
        return Seen(resource, workers, codes, reason, seconds, self._asked, self._ran, self._ours)

    def _wait_times(self, workers: str, answers: dict[str, dict[str, Any]]) -> float:
        """How long the workers have been so. One that is silent now and then neither ends its own waiting nor the others'."""
        self._times.pop("gcloud", None)
        for worker in self.workers:
            if worker in answers:
                self._times.pop(worker, None)
        if workers == "silent":
            return max(self._age(worker) for worker in self.workers if worker not in answers)
        if workers in ("ended", "failed"):
            return self._age("the end")
        self._times.pop("the end", None)
        return 0.0

    def _age(self, what: str) -> float:
        """Seconds since this was first so."""
        return self.clock() - self._times.setdefault(what, self.clock())

    def _describe(self) -> tuple[str, str]:
        """State of the queued resource as in `Seen`, and what is said of it."""
        (done,) = run_all([self.gcloud.describe()], self.timing.answer)
        state, why = "", ""
        if done.code == 0:
            state, why = self._read(done.output)
        elif "NOT_FOUND" not in done.errors:
            state, why = "REFUSED" if done.refused else "UNKNOWN", done.problem
        if state != self._state:
            if state or self._state:
                say(f"{self.gcloud.name} is {state or 'not there'}{': ' + why if why else ''}")
            self._state = state
        if state not in ("UNKNOWN", "REFUSED"):
            self._exists = state not in ("", "OTHER")
            self._ours &= self._exists
            self._asked |= state in ALIVE
            self._ours |= self._exists and state != "ACTIVE"  # of an ACTIVE one the workers tell
        return state, why

    def _read(self, output: str) -> tuple[str, str]:
        """State and message in what `describe` printed."""
        try:
            answer = json.loads(output)
            state, failure = answer["state"]["state"], answer["state"].get("failedData", {})
            (spec, *_) = answer["tpu"]["nodeSpec"]
            owner = spec["node"].get("labels", {}).get(LABEL, "none")
        except (ValueError, KeyError, TypeError, AttributeError):
            return "UNKNOWN", "gcloud's answer did not make sense"
        if owner != self.gcloud.owner:
            return "OTHER", (
                f"there is a {self.gcloud.name} already, for another run's folder or other hardware (label {LABEL}: {owner}); "
                f"give this one another --name, or delete that: {shlex.join(self.gcloud.delete())}"
            )
        return state, " ".join(failure.get("error", {}).get("message", "").split())

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
            with contextlib.suppress(OSError):
                sys.stderr.write(first["log"])
                sys.stderr.flush()
            self._offset, self._step = first["offset"], first["step"]

    # -- acting --

    def _create(self) -> bool:
        """Asks for the resource; whether there is use in looking for it. If gcloud gave no answer, it may still have been made.

        Raises:
          UserError: gcloud refuses, as it does without quota.
        """
        self._offset, began = 0, self.clock()
        say(f"asking for {self.gcloud.name}: {shlex.join(self.gcloud.create())}")
        self._exists = self._ours = True  # perhaps, once the command has begun
        (done,) = run_all([self.gcloud.create()], self.timing.change)
        if done.code == 0:
            self._asked, self._asking = True, None
            return True
        if "ALREADY_EXISTS" in done.errors:  # by an answer that did not come, or somebody else's: the next look tells
            self._ours = False
        elif done.refused:
            self._exists = self._ours = False
            quota = "there is no quota for this: " if "quota" in done.problem.lower() else ""
            raise UserError(f"{quota}{done.problem}")
        else:
            say(done.problem)
        self._asking = began if self._asking is None else self._asking
        self.sleep(self.timing.poll)
        return began - self._asking < self.timing.patience

    def _delete(self) -> bool:
        """Deletes the resource, trying again while gcloud does not refuse; whether it is gone."""
        say(f"deleting {self.gcloud.name}")
        until = self.clock() + 2 * self.timing.change
        while True:
            (done,) = run_all([self.gcloud.delete()], self.timing.change)
            gone = done.code == 0 or "NOT_FOUND" in done.errors
            if gone or (state := self._describe()[0]) == "":
                self._exists = self._ours = self._asked = self._unheard = False
                self._state = ""
                return True
            if (done.refused and state != "DELETING") or self.clock() >= until:
                say(f"{done.problem}; if it is still there it costs: {shlex.join(self.gcloud.delete())}")
                return False
            say(f"{done.problem}; trying again")
            self.sleep(self.timing.poll)

    def _start(self) -> None:
        """Installs the commit on every worker and starts the training; a failure shows at the next look."""
        say(f"installing on {self._all}; the first time this takes minutes")
        commands = [self.gcloud.copy(node, self.files) for node in self.gcloud.nodes]
        for done in run_all(commands, self.timing.install):
            if done.code != 0:
                self._failure = f"the files could not be copied: {done.problem}"
                return
        for verb, wanted in (("install", ("installed",)), ("start", ("running", "ended"))):
            self._ran |= verb == "start"  # though its answer may be lost
            answers = self._ask(verb, self.timing.install)
            for worker in self.workers:
                answer = answers.get(worker, {"state": "", "why": "no answer"})
                if answer["state"] not in wanted:
                    self._failure = f"{verb} on {worker}: {answer.get('why', answer['state'])}"
                    return
        self._failure = ""

    def _stop(self) -> None:
        """Stops the training on every worker. If one does not hear, none may be started: they would be of two attempts."""
        answers = self._ask(f"stop {self.grace_seconds}", self.grace_seconds + self.timing.answer)
        self._unheard = any(worker not in answers for worker in self.workers)

    def _count(self, action: Action) -> bool:
        """Counts a preemption or a crash, says so, and waits before the restart; whether there is one."""
        if action.fate is None:
            say(f"{self.gcloud.name}: {action.why}")
            self.sleep(self.timing.poll)
            return True
        after = self.budget.after_preemption if action.fate is Fate.PREEMPTED else self.budget.after_crash
        following = after(action.why, self._step)
        say(following.line)
        if following.again:
            self.sleep(following.wait)
        return following.again

    def _leave(self) -> None:
        """Deletes the resource if asked to, or says that it stays. One that FAILED is a mere name, which takes up quota."""
        if not self._exists:
            return
        with contextlib.suppress(KeyboardInterrupt):
            if self._ours and (self.delete_on_exit or self._state == "FAILED"):
                self._delete()
                return
        say(f"{self.gcloud.name} stays, and costs, until it is deleted: {shlex.join(self.gcloud.delete())}")
        say("the same command attaches to it again")
