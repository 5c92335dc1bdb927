"""The gcloud commands that `tpu_watch` runs, with functions to run several at once and to parse their output.

Sources: gcloud's reference for `compute tpus queued-resources` and `compute tpus tpu-vm` (Google Cloud documentation, 2026).
"""

import contextlib
import hashlib
import json
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax.runtime.accelerators import RUNTIMES

from . import tpu_worker
from .job import Job, to_mount_paths
from .supervise import kill, spawn

LABEL = "gpt-jax"
"""Label of a queued resource. Its value identifies the run that the resource was created for."""
REFUSALS = re.compile(
    "PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ARGUMENT|FAILED_PRECONDITION|OUT_OF_RANGE|UNIMPLEMENTED|SERVICE_DISABLED|quota"
    "|reauthentication|credentials|gcloud auth|does not have permission|not been used in project|arguments?|must be specified"
    "|invalid|HTTPError 40[013]",
    re.IGNORECASE,
)
"""Errors that a second attempt would repeat. Any other error may be temporary."""
NETWORK = re.compile("Max retries|Connection|resol(ve|ution)|timed? ?out|Temporary|UNAVAILABLE|DEADLINE_EXCEEDED")
"""Network errors, for which gcloud may wrongly advise the user to log in again."""


class Result(NamedTuple):
    """The result of a command."""

    code: int | None
    """Exit code; None if the command was killed at its time limit."""
    output: str
    errors: str

    @property
    def problem(self) -> str:
        """The error message of gcloud as one line."""
        if self.code is None:
            return "gcloud did not answer in time"
        _, error, text = self.errors.strip().rpartition("ERROR:" if "ERROR:" in self.errors else "\n")
        return " ".join(f"{error}{text}".split())[:400] or f"gcloud ended with {self.code}"

    @property
    def refused(self) -> bool:
        """Whether a second attempt would fail in the same way."""
        return bool(REFUSALS.search(self.problem)) and not NETWORK.search(self.problem)


class Gcloud:
    """The commands for one job's queued resource, its nodes (one for each slice) and their workers."""

    def __init__(self, job: Job) -> None:
        self.name = job.name
        self.nodes = [job.name] if job.slices == 1 else [f"{job.name}-{number}" for number in range(job.slices)]
        # --quiet makes gcloud fail instead of asking a question, even when ssh needs its first key.
        self._place = ["--quiet", "--zone", job.zone, *(["--project", job.project] if job.project else [])]
        nodes = ["--node-id", job.name]
        if job.slices > 1:
            nodes = ["--node-count", str(job.slices), "--node-prefix", job.name]
        kind = ["--accelerator-type", job.accelerator.gcloud, "--runtime-version", RUNTIMES[job.accelerator.family]]
        hardware = [*nodes, *kind, *(["--spot"] if job.spot else [])]
        owner = json.dumps([to_mount_paths([job.workdir]), hardware])
        self.owner = hashlib.sha256(owner.encode()).hexdigest()[:16]
        """Value of the label. Two commands share a resource if the run's folder and the hardware are the same."""
        self.folder = f"gpt-jax/{job.name}"
        """Folder on each worker, below the home folder."""
        self.create = self._resource("create", *hardware, "--labels", f"{LABEL}={self.owner}")
        self.describe = self._resource("describe", "--format", "json")
        self.delete = self._resource("delete", "--force")
        self.describe_nodes = [self._node("describe", node, "--format", "value(state)") for node in self.nodes]

    def copy(self, files: Sequence[Path]) -> list[list[str]]:
        """Returns a command for each node that copies files to its workers."""
        paths = [str(file) for file in files]
        return [self._node("scp", *paths, f"{node}:{self.folder}/", "--worker", "all") for node in self.nodes]

    def ask(self, words: str) -> list[list[str]]:
        """Returns a command for each node that runs `tpu_worker.py WORDS` on its workers; without the files, they answer {}."""
        missing = f"if test ! -f tpu_worker.py -o ! -f job.json; then echo; echo {tpu_worker.MARK} $HOSTNAME {{}}; exit; fi"
        script = f"mkdir -p {self.folder} && cd {self.folder} && {missing}; python3 tpu_worker.py {words}"
        return [self._node("ssh", node, "--worker", "all", "--command", script) for node in self.nodes]

    def _resource(self, verb: str, *words: str) -> list[str]:
        return ["gcloud", "compute", "tpus", "queued-resources", verb, self.name, *words, *self._place]

    def _node(self, verb: str, *words: str) -> list[str]:
        return ["gcloud", "compute", "tpus", "tpu-vm", verb, *words, *self._place]

    def parse_resource(self, result: Result) -> tuple[str, str]:
        """Returns the queued resource's state (as in `tpu_watch.Observation`) and a message, from the output of `describe`."""
        if result.code != 0:
            missing = "NOT_FOUND" in result.errors
            return ("", "") if missing else ("REFUSED" if result.refused else "UNKNOWN", result.problem)
        try:
            answer = json.loads(result.output)
            state, failure = answer["state"]["state"], answer["state"].get("failedData", {})
            (spec, *_) = answer["tpu"]["nodeSpec"]
            owner = spec["node"].get("labels", {}).get(LABEL, "none")
        except (ValueError, KeyError, TypeError, AttributeError):
            return "UNKNOWN", "gcloud's answer could not be read"
        if owner != self.owner:
            return "OTHER", (
                f"{self.name} already exists for another run's folder or other hardware (label {LABEL}: {owner}); "
                f"choose another --name, or delete it: {shlex.join(self.delete)}"
            )
        return state, " ".join(failure.get("error", {}).get("message", "").split())


def parse_statuses(node: str, output: str) -> dict[str, dict[str, Any]]:
    """Returns the answers of `tpu_worker.py` in the output of an ssh command, by worker ("NODE worker N")."""
    answers = {}
    for host, text in re.findall(rf"^{tpu_worker.MARK} (\S+) (.*)$", output, re.MULTILINE):
        number = host.rpartition("-w-")[2] if "-w-" in host else "0"
        with contextlib.suppress(ValueError):  # The answer was cut off.
            answers[f"{node} worker {number}"] = {"state": "idle", "job": ""} | json.loads(text)
    return answers


def run_all(commands: Sequence[Sequence[str]], limit: float) -> list[Result]:
    """Runs commands at the same time, and kills those that take longer than `limit` seconds, including their ssh processes.

    The output of a killed command is kept, because other workers may have answered even if one is silent.
    """
    deadline = time.monotonic() + limit
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder:
        files = [[Path(folder, f"{number}.{stream}") for stream in ("out", "err")] for number in range(len(commands))]
        try:
            for command, (out, err) in zip(commands, files, strict=True):
                with open(out, "wb") as output, open(err, "wb") as errors:
                    processes.append(spawn(command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors))
            for process in processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(deadline - time.monotonic(), 0.01))
            codes = [process.poll() for process in processes]
        finally:
            kill(processes)
        texts = [[file.read_text(encoding="utf-8", errors="replace") for file in pair] for pair in files]
    return [Result(code, *pair) for code, pair in zip(codes, texts, strict=True)]
