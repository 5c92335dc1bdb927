"""Runs the commands of the measurements, each in a process of its own, and writes down what they measured."""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.sizes import Sizes
from gpt_jax.runtime.console import say

RESULTS = "results.jsonl"
GRACE_SECONDS = 10.0
"""Time between SIGTERM, at which training saves its state, and SIGKILL."""


class Session:
    """Runs commands one after the other, none beyond the deadline, and writes down what each has measured.

    Attributes:
      part: what the commands belong to.
      deadline: when a running command is stopped, on the monotonic clock.
      rate: speed of training in tokens/s.
    """

    def __init__(self, sizes: Sizes, data: Path, out: Path, scratch: Path):
        self.sizes, self.data, self.scratch = sizes, data, scratch
        self.part, self.deadline, self.rate = "", 0.0, sizes.rate
        self._log, self._results = out / "log.txt", out / RESULTS
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
        self._environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(scratch / "compiled"), "CUDA_VISIBLE_DEVICES": gpu}

    def append(self, values: dict[str, Any]) -> None:
        """Appends a line to the results."""
        with self._results.open("a", encoding="utf-8") as file:
            print(json.dumps(values), file=file)

    def record(self, name: str, words: Sequence[str], seconds: float, failure: str, result: dict[str, Any]) -> None:
        """Appends a measurement."""
        say(f"{self.part}, {name}: {failure or f'{seconds:.0f} s'}")
        command = shlex.join(["gpt-jax", *words]) if words else ""
        named = {"part": self.part, "name": name, "command": command, "seconds": round(seconds, 1)}
        self.append(named | {"failure": failure, "result": result})

    def execute(self, words: Sequence[str], variables: dict[str, str] | None = None) -> tuple[float, str, str]:
        """Runs Python with these arguments.

        Returns:
          The seconds that it took, why it failed (empty if it did not), and its standard output.
        """
        begin = time.monotonic()
        limit = self.deadline - begin
        if limit <= 0:
            return 0.0, "skipped, because the time was up", ""
        failure = ""
        with self._log.open("a+b") as log, tempfile.TemporaryFile() as output:
            log.write(f"\n$ {shlex.join(words)}\n".encode())
            log.flush()
            beginning, command = log.tell(), [sys.executable, *words]
            streams: Any = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": log}
            process = subprocess.Popen(command, env=self._environment | (variables or {}), start_new_session=True, **streams)
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                code, failure = 0, f"stopped after {limit:.0f} s"
            finally:
                _end(process)
            output.seek(0)
            log.seek(beginning)
            printed, lines = output.read().decode(errors="replace"), log.read().decode(errors="replace").strip().splitlines()
            log.write(printed.encode())
        if code:
            failure = f"exit code {code}: {(lines or ['nothing was printed'])[-1]}"
        return time.monotonic() - begin, failure, printed

    def bench(self, name: str, *words: str, rounds: int = 1) -> list[dict[str, Any]]:
        """Runs and records a benchmark; returns the comparisons that it completed."""
        file = self.scratch / "bench.json"
        file.unlink(missing_ok=True)
        command = ["bench", *words, "--rounds", str(rounds)]
        seconds, failure, _ = self.execute(["-m", "gpt_jax", *command, "--json", str(file)])
        result = json.loads(file.read_text()) if file.exists() else {"comparisons": []}
        if failure.startswith("exit code 1:") and result["comparisons"]:
            failure = ""  # The comparisons say which program failed.
        self.record(name, command, seconds, failure, result)
        comparisons: list[dict[str, Any]] = result["comparisons"]
        return comparisons

    def train(self, name: str, workdir: Path, *words: str, **variables: str) -> None:
        """Runs `pretrain` or `finetune` without tensorflow, and records its result.json."""
        command = [*words, "--data.pipeline", "threads", "--train.tensorboard", "False"]
        seconds, failure, _ = self.execute(["-m", "gpt_jax", *command, "--workdir", str(workdir)], variables)
        file = workdir / "result.json"
        self.record(name, command, seconds, failure, json.loads(file.read_text()) if file.exists() else {})


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and those that it has started, and gives it time to save what it has."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE_SECONDS)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            pass
