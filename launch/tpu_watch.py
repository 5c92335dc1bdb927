"""Watches a run on Cloud TPU VMs: observes its state, decides what to do, and acts, until the run is done.

`decide` contains all rules, from an observation to the next action. `TpuWatcher` makes the observations and carries out the
actions with the commands of `gcloud`.

Source: "Manage queued resources" (Google Cloud documentation, 2026).
"""

import contextlib
import dataclasses
import enum
import re
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax.errors import Preempted, TrainingError, UserError

from .gcloud import Gcloud, Result, parse_statuses, run_all
from .job import Job
from .supervise import Outcome, RestartBudget, classify_exit, describe_exit, show

NODE_ALIVE = ("READY", "CREATING", "STARTING", "RESTARTING", "REPAIRING")
"""States of a node that exists or will exist again."""
RESOURCE_ALIVE = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
"""States of a resource that exists or will exist."""

Statuses = dict[str, dict[str, Any]]
"""Answers of `tpu_worker.py` by worker ("NODE worker N")."""


class Timing(NamedTuple):
    """Intervals and time limits, all in seconds."""

    poll: float = 15.0
    """Time between two observations."""
    settle: float = 60.0
    """Time from the end of the training to its classification. A resource stays ACTIVE for a while after its machines are
    gone."""
    patience: float = 300.0
    """Time limit for a worker that does not answer while its resource is ACTIVE, and for gcloud when it reports errors."""
    answer: float = 90.0
    """Time limit for one command on all workers."""
    install: float = 1800.0
    """Time limit for copying the files, for installing, and for starting."""
    change: float = 900.0
    """Time limit for creating or deleting a resource."""


DEFAULT_TIMING = Timing()


# -- observations and actions -----------------------------------------------------------------------------------------------


class Observation(NamedTuple):
    """The state of the resource and of the training on it at one moment."""

    resource: str
    """State of the queued resource: Cloud TPU's own, or "" (there is none), "UNKNOWN" (gcloud does not answer), "REFUSED" (gcloud
    refuses to answer) or "OTHER" (the resource of this name was created for another run).
    """
    workers: str = ""
    """State of an ACTIVE resource's workers: "idle", "running", "ended", "failed" (installing or starting the training failed),
    "other" (another command's training runs), "silent" (a worker does not answer) or "gone" (a machine is lost).
    """
    codes: tuple[int, ...] = ()
    """Exit codes of the training on those workers where it has ended."""
    reason: str = ""
    """Details for the user: which worker, the last line of its log, or gcloud's message."""
    seconds: float = 0.0
    """Time for which this state has lasted."""
    requested: bool = False
    """Whether this command has requested the resource or has seen it alive; otherwise an earlier command may have left it so."""
    ran: bool = False
    """Whether this command has started the training that ended, or has seen it run."""
    ours: bool = True
    """Whether this command has created the resource, or its workers have answered that no other command's training runs there."""


class ActionKind(enum.Enum):
    """The kinds of actions, with their descriptions."""

    CREATE = "request the resource"
    WAIT = "wait for the next observation"
    START = "install and start the training on workers where it does not run"
    RESTART = "stop the training everywhere and start it again on the same machines"
    REPLACE = "delete the resource and request another one"
    END = "stop watching"


class Action(NamedTuple):
    """The next action of the watcher, and its reason."""

    kind: ActionKind
    outcome: Outcome | None = None
    """Outcome of the attempt that this action ends; None if it is not counted."""
    reason: str = ""


def decide(seen: Observation, timing: Timing) -> Action:
    """Returns the action that follows an observation."""
    match seen.resource, seen.workers:
        case "OTHER", _:
            return Action(ActionKind.END, Outcome.MISTAKE, seen.reason)
        case "REFUSED", _ if not seen.requested or seen.seconds >= timing.patience:
            return Action(ActionKind.END, Outcome.MISTAKE, seen.reason)
        case "UNKNOWN", _ if not seen.requested and seen.seconds >= timing.patience:
            return Action(ActionKind.END, Outcome.MISTAKE, seen.reason)
        case "", _ if not seen.requested:
            return Action(ActionKind.CREATE)
        case "", _:
            return Action(ActionKind.END, Outcome.CRASHED, "the resource was deleted by someone else")
        case "SUSPENDED" | "FAILED", _ if not seen.requested:
            return Action(ActionKind.REPLACE, None, f"an earlier command left it {seen.resource}")
        case "SUSPENDED", _:
            return Action(ActionKind.REPLACE, Outcome.PREEMPTED, "SUSPENDED")
        case "FAILED", _ if "quota" in seen.reason.lower():
            return Action(ActionKind.END, Outcome.MISTAKE, f"the project has no quota for this: {seen.reason}")
        case "FAILED", _:
            capacity = re.search("capacity|stockout|resources? (are|were|is) not available", seen.reason, re.IGNORECASE)
            return Action(ActionKind.REPLACE, Outcome.PREEMPTED if capacity else Outcome.CRASHED, f"FAILED: {seen.reason}")
        case "ACTIVE", "gone":
            return Action(ActionKind.REPLACE, Outcome.PREEMPTED, seen.reason)
        case "ACTIVE", "silent" if seen.seconds >= timing.patience:
            reason = f"{seen.reason} for {timing.patience:g} s, though the resource is ACTIVE"
            return Action(ActionKind.REPLACE if seen.ours else ActionKind.END, Outcome.CRASHED, reason)
        case "ACTIVE", "other":
            return Action(ActionKind.END, Outcome.MISTAKE, seen.reason)
        case "ACTIVE", "idle":
            return Action(ActionKind.START)
        case "ACTIVE", "failed" if seen.seconds >= timing.settle:
            return Action(ActionKind.RESTART, Outcome.CRASHED, seen.reason)
        case "ACTIVE", "ended":
            outcome, code = classify_exit(seen.codes)
            if outcome is Outcome.DONE:
                return Action(ActionKind.END, outcome, "done")
            if not seen.ran:  # The failure was already counted, but the workers have not yet received the command to stop.
                return Action(ActionKind.RESTART, None, f"an earlier attempt ended ({describe_exit(code)})")
            if outcome is Outcome.MISTAKE:
                return Action(ActionKind.END, outcome, f"{seen.reason}; a restart would repeat this mistake")
            if seen.seconds >= timing.settle:
                return Action(ActionKind.RESTART, outcome, describe_exit(code))
    # The training runs; the resource is being created or deleted; gcloud does not answer; or a state has not lasted long enough.
    return Action(ActionKind.WAIT)


def combine_statuses(statuses: Statuses, expected: Sequence[str], digest: str) -> tuple[str, tuple[int, ...], str]:
    """Returns `workers`, `codes` and `reason` of an `Observation`.

    Args:
      statuses: the answers of the workers that answered.
      expected: all workers.
      digest: digest of the job that should run on them.
    """
    statuses = {worker: statuses[worker] for worker in expected if worker in statuses}
    for worker, status in statuses.items():
        if status["state"] == "running" and status["job"] not in ("", digest):
            return "other", (), f"{worker} runs another command; choose another --name, or delete the resource"
    if missing := [worker for worker in expected if worker not in statuses]:
        return "silent", (), f"{' and '.join(missing[:3])}{' and others' if len(missing) > 3 else ''} did not answer"
    ended = {worker: status for worker, status in statuses.items() if status["state"] == "ended" and status["job"] == digest}
    codes = tuple(int(status["code"]) for status in ended.values())
    if any(codes) or len(ended) == len(expected):
        _, code = classify_exit(codes)
        cause = next((worker for worker, status in ended.items() if status["code"] == code != 0), "")
        last_line = f"; last line: {ended[cause]['said']}" if cause and ended[cause]["said"] else ""
        return "ended", codes, f"{cause} ended ({describe_exit(code)}){last_line}" if cause else ""
    # A worker whose training is done waits for the others. A worker where nothing runs must still start, even if others have
    # ended.
    started = all(status["state"] == "running" for worker, status in statuses.items() if worker not in ended)
    return "running" if started else "idle", (), ""


# -- the watcher ------------------------------------------------------------------------------------------------------------


def say(line: str) -> None:
    """Shows a line with the prefix of the watcher."""
    show(f"tpu-vm: {line}\n")


@dataclasses.dataclass
class TpuWatcher:
    """Requests the resource for a job, runs the training on it, and replaces or restarts what fails."""

    job: Job
    files: Sequence[Path]
    """Files to copy to every worker."""
    digest: str
    """Digest of the job, which its workers report."""
    timing: Timing = DEFAULT_TIMING
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.gcloud = Gcloud(self.job)
        self.name = self.job.name
        self.budget = RestartBudget(self.job.preemptions, self.job.crashes)
        self.workers = [f"{node} worker {number}" for node in self.gcloud.nodes for number in range(self.job.accelerator.hosts)]
        self._all_workers = f"{len(self.workers)} worker{'s' if len(self.workers) > 1 else ''}"
        # Whether the resource may exist, and fields of `Observation`.
        self._exists = self._requested = self._ran = self._ours = False
        self._offset = -1  # where to continue in worker 0's log
        self._step: int | None = None
        self._failure = ""  # why the training could not be installed or started
        self._must_stop = False  # the last `stop` did not reach every worker
        self._since: dict[str, float] = {}  # start of the silence of gcloud or a worker, or of the "end" of the training
        self._state = self._workers = self._reason = ""  # what was reported last

    def run(self) -> int:
        """Watches until the end; returns 0 if the training is done, 1 after giving up, and 42 after Ctrl-C.

        Raises:
          UserError: gcloud or the training reports a mistake.
        """
        try:
            self._watch()
            say(f"done ({self.budget})")
            return 0
        except TrainingError as error:
            say(str(error))
            return error.exit_code
        except KeyboardInterrupt:
            deletes = self.job.delete_on_exit and self._ours
            say("interrupted" if deletes else "interrupted; if the training is running, it continues")
            if deletes and self._state == "ACTIVE":
                say(f"stopping the training, which has {self.job.grace_seconds} s to save")
                self._stop()
            return Preempted.exit_code
        finally:
            self._leave()

    def _watch(self) -> None:
        """Observes and acts until the training is done.

        Raises:
          UserError: gcloud or the training reports a mistake.
          TrainingError: another restart would not help, or gcloud keeps failing.
        """
        while True:
            action = decide(self._observe(), self.timing)
            match action.kind:
                case ActionKind.CREATE:
                    self._create()
                case ActionKind.WAIT:
                    self.sleep(self.timing.poll)
                case ActionKind.START if self._must_stop:
                    self.sleep(self.timing.poll)
                    self._stop()
                case ActionKind.START:
                    say(f"installing on {self._all_workers}; the first installation takes minutes")
                    self._failure = self._start()
                case ActionKind.RESTART | ActionKind.REPLACE:
                    self._count(action)
                    self._failure = self._workers = self._reason = ""
                    self._ran = False
                    self._since.clear()
                    if action.kind is ActionKind.RESTART:
                        self._stop()
                    elif self._describe()[0] != "OTHER" and not self._delete():
                        raise TrainingError(f"{self.name} could not be deleted")
                case ActionKind.END if action.outcome is Outcome.DONE:
                    return
                case ActionKind.END:
                    raise (UserError if action.outcome is Outcome.MISTAKE else TrainingError)(action.reason)

    # -- observing --

    def _observe(self) -> Observation:
        resource, reason = self._describe()
        workers, seconds = "", 0.0
        codes: tuple[int, ...] = ()
        if resource == "ACTIVE":
            statuses = self._ask(f"status {self._offset}", self.timing.answer)
            self._show_log(statuses.get(self.workers[0], {}))
            workers, codes, reason = combine_statuses(statuses, self.workers, self.digest)
            self._ours = self._ours if workers == "silent" else workers != "other"
            if workers == "idle" and self._failure:
                workers, reason = "failed", self._failure
            if workers in ("silent", "failed") and (lost := self._lost_node()):
                resource, message = self._describe()  # It may have been preempted or deleted since.
                workers, reason = ("gone", lost) if resource == "ACTIVE" else ("", message)
            seconds = self._state_age(workers, statuses)
        elif resource in ("UNKNOWN", "REFUSED"):
            seconds = self._age("gcloud")
        else:
            self._since.clear()
        if workers == "running" and self._workers != "running":
            say(f"the training is running on {self._all_workers}")
        if workers and reason and reason != self._reason and (self._ran or workers != "ended"):
            say(reason)
        self._workers, self._reason = workers, reason
        self._ran |= workers == "running"
        return Observation(resource, workers, codes, reason, seconds, self._requested, self._ran, self._ours)

    def _state_age(self, workers: str, statuses: Statuses) -> float:
        """Returns the seconds for which workers have been silent, or for which the training has ended.

        Each worker's silence is timed separately. The time since the end continues to count while a worker is silent.
        """
        causes = {"silent": [worker for worker in self.workers if worker not in statuses], "ended": ["end"], "failed": ["end"]}
        over = {"gcloud", *statuses, *([] if workers in causes else ["end"])}
        self._since = {cause: begin for cause, begin in self._since.items() if cause not in over}
        return max(map(self._age, causes.get(workers, [])), default=0.0)

    def _age(self, cause: str) -> float:
        """Returns the seconds since this cause was first noted, which may be now."""
        return self.clock() - self._since.setdefault(cause, self.clock())

    def _describe(self) -> tuple[str, str]:
        """Returns the state and the message of the resource as in `Observation`, and reports a change."""
        (result,) = run_all([self.gcloud.describe], self.timing.answer)
        state, message = self.gcloud.parse_resource(result)
        if state != self._state:
            say(f"{self.name} is {state or 'not there'}{': ' + message if message else ''}")
            self._state = state
        if state not in ("UNKNOWN", "REFUSED"):
            self._exists = state not in ("", "OTHER")
            self._requested |= state in RESOURCE_ALIVE
            # Only the workers of an ACTIVE resource know whether another command's training runs there.
            self._ours = self._exists and (self._ours or state != "ACTIVE")
        return state, message

    def _lost_node(self) -> str:
        """Returns a line about a node that no longer exists although the resource is ACTIVE, or an empty string."""
        for node, result in self._run_on_nodes(self.gcloud.describe_nodes, self.timing.answer):
            if "NOT_FOUND" in result.errors:
                return f"node {node} is gone"
            if result.code == 0 and result.output.strip() not in NODE_ALIVE:
                return f"node {node} is {result.output.strip()}"
        return ""

    def _show_log(self, status: dict[str, Any]) -> None:
        """Shows the output of process 0 since the last observation."""
        if "log" in status:
            show(status["log"])
            self._offset, self._step = status["offset"], status["step"]

    # -- acting --

    def _run_on_nodes(self, commands: Sequence[Sequence[str]], limit: float) -> Iterator[tuple[str, Result]]:
        """Runs a command for each node at the same time; returns each node with the result."""
        return zip(self.gcloud.nodes, run_all(commands, limit), strict=True)

    def _ask(self, words: str, limit: float) -> Statuses:
        """Runs `tpu_worker.py WORDS` on every worker; returns the answers of the workers that answered."""
        statuses: Statuses = {}
        for node, result in self._run_on_nodes(self.gcloud.ask(words), limit):
            statuses |= parse_statuses(node, result.output)
        return statuses

    def _create(self) -> None:
        """Requests the resource, and tries again unless the error would repeat. A request without an answer may have succeeded.

        Raises:
          UserError: gcloud reports a mistake or, for example, a lack of quota.
          TrainingError: gcloud keeps failing.
        """
        say(f"requesting {self.name}: {shlex.join(self.gcloud.create)}")
        self._offset, deadline = 0, self.clock() + self.timing.patience
        self._exists = self._ours = True  # possibly, once the command has begun
        while (result := run_all([self.gcloud.create], self.timing.change)[0]).code != 0:
            # It exists if an answer was lost, or if someone else has created it; the next observation shows which.
            if "ALREADY_EXISTS" in result.errors:
                self._ours = False
                return
            if result.refused:
                self._describe()
                quota = "the project has no quota for this: " if "quota" in result.problem.lower() else ""
                raise UserError(f"{quota}{result.problem}")
            if self.clock() >= deadline:
                raise TrainingError(f"{self.name} could not be created: {result.problem}")
            say(f"{result.problem}; trying again")
            self.sleep(self.timing.poll)
        self._requested = True

    def _delete(self) -> bool:
        """Deletes the resource, and tries again unless the error would repeat; returns whether the resource is gone."""
        say(f"deleting {self.name}")
        deadline = self.clock() + 2 * self.timing.change
        while True:
            (result,) = run_all([self.gcloud.delete], self.timing.change)
            gone = result.code == 0 or "NOT_FOUND" in result.errors
            if gone or (state := self._describe()[0]) == "":
                self._exists = self._ours = self._requested = self._must_stop = False
                self._state = ""
                return True
            if (result.refused and state != "DELETING") or self.clock() >= deadline:
                say(f"{result.problem}; if the resource still exists, it costs money: {shlex.join(self.gcloud.delete)}")
                return False
            say(f"{result.problem}; trying again")
            self.sleep(self.timing.poll)

    def _start(self) -> str:
        """Installs the commit on every worker and starts the training; returns the reason for a failure, or an empty string."""
        for _, result in self._run_on_nodes(self.gcloud.copy(self.files), self.timing.install):
            if result.code != 0:
                return f"the files could not be copied: {result.problem}"
        for verb, expected in (("install", ("installed",)), ("start", ("running", "ended"))):
            self._ran |= verb == "start"  # even if its answer is lost
            statuses = self._ask(verb, self.timing.install)
            for worker in self.workers:
                status = statuses.get(worker, {"state": "no answer"})
                if status["state"] not in expected:
                    return f"{verb} on {worker}: {status.get('why', status['state'])}"
        return ""

    def _stop(self) -> None:
        """Stops the training on every worker. Until all have answered, none may be started, because two attempts would mix."""
        statuses = self._ask(f"stop {self.job.grace_seconds}", self.job.grace_seconds + self.timing.answer)
        self._must_stop = any(worker not in statuses for worker in self.workers)

    def _count(self, action: Action) -> None:
        """Reports a preemption or crash, and counts it if it has an outcome; waits before the restart.

        Raises:
          TrainingError: the training is not restarted.
        """
        if action.outcome is None:
            say(f"{self.name}: {action.reason}")
            self.sleep(self.timing.poll)
            return
        decision = self.budget.decide(action.outcome, action.reason, self._step)
        if not decision.restart:
            raise TrainingError(decision.message)
        say(decision.message)
        self.sleep(decision.delay)

    def _leave(self) -> None:
        """Deletes the resource if requested or if it is FAILED, which still uses quota; otherwise reports that it stays."""
        if not self._exists:
            return
        with contextlib.suppress(KeyboardInterrupt):
            if self._ours and (self.job.delete_on_exit or self._state == "FAILED"):
                self._delete()
                return
        say(f"{self.name} still exists and costs money until it is deleted: {shlex.join(self.gcloud.delete)}")
        say("run the same command again to attach to it")
