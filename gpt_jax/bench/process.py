"""The controlling side of worker processes: starts one for each program of a comparison, and exchanges JSON lines with it."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import IO, Any

from gpt_jax.bench.program import ProgramSpec
from gpt_jax.errors import UserError
from gpt_jax.runtime.processor import num_cores


class WorkerError(Exception):
    """A program failed for a reason that is not a user's mistake."""


class Worker:
    """The controlling side of one `worker` process."""

    def __init__(self, spec: ProgramSpec, process: subprocess.Popen[bytes], log: IO[bytes]):
        assert process.stdin is not None
        assert process.stdout is not None
        self._spec, self._process, self._log = spec, process, log
        self._requests, self._answers = process.stdin, process.stdout

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def setup(self) -> float:
        """Builds the program and runs it once; returns the seconds that this took."""
        return float(self._ask(self._spec)["setup"])

    def run(self, count: int) -> float:
        """Runs the program `count` times; returns the seconds that this took."""
        return float(self._ask(count)["seconds"])

    def finish(self) -> dict[str, Any]:
        """Ends the process; returns its peak memory, its details and its devices."""
        self._requests.close()
        answer = self._answer()
        self._process.wait()
        return answer

    def _ask(self, request: Any) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # The process has ended, and `_answer` says why.
            self._requests.write(json.dumps(request).encode() + b"\n")
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        """Returns the next answer.

        Raises:
          UserError: the program reported a user's mistake.
          WorkerError: the program failed, or its process ended.
        """
        line = self._answers.readline()
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            last = (self._log.read().decode(errors="replace").strip().splitlines() or ["nothing was printed"])[-1]
            raise WorkerError("killed, probably for lack of memory" if code == -9 else f"ended with exit code {code}: {last}")
        answer: dict[str, Any] = json.loads(line)
        if "mistake" in answer:
            raise UserError(answer["mistake"])
        if "failure" in answer:
            raise WorkerError(answer["failure"])
        return answer


@contextlib.contextmanager
def start_worker(spec: ProgramSpec, one_gpu: bool = False) -> Iterator[Worker]:
    """Starts the process of a program, and ends it and deletes its temporary files when the block exits.

    Args:
      one_gpu: whether to hide all GPUs but the first from the program.
    """
    command = [sys.executable, "-m", "gpt_jax.bench.worker"]
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryDirectory() as scratch,
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            command, bufsize=0, env=worker_environment(scratch, one_gpu), stdin=pipe, stdout=pipe, stderr=log
        ) as process,
    ):
        try:
            yield Worker(spec, process, log)
        finally:
            process.kill()


def worker_environment(scratch: str, one_gpu: bool) -> dict[str, str]:
    """Returns a program's environment: a thread for each core, a folder of its own, and GPUs that it shares with the others.

    Compiled programs are not kept, so that the set-up always includes compilation.
    """
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(num_cores()))
    jax = {"JAX_ENABLE_COMPILATION_CACHE": "false", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    gpu = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]} if one_gpu else {}
    return {**os.environ, **threads, **jax, **gpu, "TMPDIR": scratch}
