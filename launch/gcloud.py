"""The words of every gcloud command that `tpu_watch` runs, and the running of several at once.

Sources: gcloud's reference for `compute tpus queued-resources` and `compute tpus tpu-vm` (Google Cloud documentation, 2026).
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from . import tpu_worker
from .accelerators import RUNTIMES
from .job import Checked, Job, mounted
from .supervise import kill, spawn

LABEL = "gpt-jax"
"""Of a resource; its value says whose it is."""
REFUSALS = re.compile(
    "PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ARGUMENT|FAILED_PRECONDITION|OUT_OF_RANGE|UNIMPLEMENTED|SERVICE_DISABLED|quota"
    "|reauthentication|credentials|gcloud auth|does not have permission|not been used in project|arguments?|must be specified"
    "|invalid|HTTPError 40[013]",
    re.IGNORECASE,
)
"""What gcloud complains of when asking again is no use; anything else may pass."""
NETWORK = re.compile("Max retries|Connection|resol(ve|ution)|timed? ?out|Temporary|UNAVAILABLE|DEADLINE_EXCEEDED")
"""In complaints of a network that is gone, for which gcloud may advise to log in again."""


class Gcloud:
    """The words of every command."""

    def __init__(self, job: Job, checked: Checked) -> None:
        self.name = job.name
        self.nodes = [job.name] if job.slices == 1 else [f"{job.name}-{number}" for number in range(job.slices)]
        # --quiet: it can ask nobody, not even when ssh needs its first key.
        self._place = ["--quiet", "--zone", job.zone, *(["--project", job.project] if job.project else [])]
        nodes = ["--node-id", job.name]
        if job.slices > 1:
            nodes = ["--node-count", str(job.slices), "--node-prefix", job.name]
        kind = ["--accelerator-type", checked.accelerator.gcloud, "--runtime-version", RUNTIMES[checked.accelerator.family]]
        self._wanted = [*nodes, *kind, *(["--spot"] if job.spot else [])]
        run = json.dumps([mounted([job.workdir]), self._wanted])
        self.owner = hashlib.sha256(run.encode()).hexdigest()[:16]
        """The label's value: two commands share a resource if it is for the same run's folder, and the same hardware."""
        self.folder = f"gpt-jax/{job.name}"
        """On each worker, below the home folder."""

    def _resource(self, verb: str, *words: str) -> list[str]:
        return ["gcloud", "compute", "tpus", "queued-resources", verb, self.name, *words, *self._place]

    def create(self) -> list[str]:
        return self._resource("create", *self._wanted, "--labels", f"{LABEL}={self.owner}")

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
        command = f"mkdir -p {self.folder} && cd {self.folder} && if test -f tpu_worker.py -a -f job.json; then {known}; else "
        return self._ssh(node, f"{command}echo; echo {tpu_worker.MARK} $HOSTNAME {{}}; fi")

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

    @property
    def refused(self) -> bool:
        """Whether asking again is no use."""
        return bool(REFUSALS.search(self.problem)) and not NETWORK.search(self.problem)


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
