"""The part of a TPU VM launch that runs on each worker. `tpu_vm` copies this file there, with the three files that it reads.

    python3 tpu_worker.py status [OFFSET] | install | start | stop [SECONDS]

Each command prints one line with `gpt-jax-worker HOST` and a JSON object, which may be mixed with other output of ssh. All state
is in files in the same folder: `pid`, `exit` (the training's exit code), `log` and `lock`. The training holds the lock while it
runs, so a second `start` has no effect, and a training process that was lost with its machine does not appear to be running.

This file runs before anything is installed, so it uses only the standard library of Python 3.8 or newer. It reads job.json (the
arguments), source.bundle (the commit) and uncommitted.diff.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

MARK = "gpt-jax-worker"
HOME = Path(__file__).resolve().parent
PID, EXIT, LOG, LOCK = (HOME / name for name in ("pid", "exit", "log", "lock"))
SOURCE, PYTHON, INSTALLED = HOME / "source", HOME / "venv" / "bin" / "python", HOME / "installed"
PREEMPTED = 42
LOG_CHUNK = 1 << 15


def read_job() -> dict[str, Any]:
    return json.loads((HOME / "job.json").read_text(encoding="utf-8"))


# -- the training -----------------------------------------------------------------------------------------------------------


def try_lock(file: IO[bytes], mode: int) -> bool:
    """Tries to lock an open file (`fcntl.LOCK_SH` or `fcntl.LOCK_EX`); returns False if another process holds the lock."""
    try:
        fcntl.flock(file, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_running() -> bool:
    """Returns whether the training holds the lock."""
    with open(LOCK, "ab") as file:
        return not try_lock(file, fcntl.LOCK_SH)


def status(offset: int = -1) -> dict[str, Any]:
    """Returns the state of this worker.

    Args:
      offset: the byte from which worker 0 returns its log; -1 means the last 2,000 bytes.

    Returns:
      `state` ("idle", "running" or "ended"), `step` (number of updates made) and `job` (digest of the training's arguments). If
      the training has ended, `code` and `said` are its exit code and the last line of its log. If it left no exit code, it was
      lost with its machine, which counts as a preemption. Worker 0 adds the text of its log, `log`, and the byte to continue
      from, `offset`.
    """
    running, pid, workdir = is_running(), _read(PID).split(), Path(read_job()["workdir"])
    state = "running" if running else "ended" if pid else "idle"
    answer: dict[str, Any] = {"state": state, "job": pid[2] if pid else "", "step": 0}
    with contextlib.suppress(OSError):  # The storage behind the folder may fail.
        files = [workdir / "metrics.jsonl", *workdir.glob("seed-*/metrics.jsonl")]
        answer["step"] = sum(last_step(file) for file in files if file.exists())
    if state == "ended":
        answer.update(code=int(_read(EXIT) or PREEMPTED), said=_read_log(-1)[0].strip().rpartition("\n")[2][-300:])
    if re.search("-w-[1-9][0-9]*$", _host()) is None:
        # The log is cut, because answers of other workers may be printed into a long answer. A training that has ended gives no
        # later answer, so its log is sent completely.
        answer["log"], answer["offset"] = _read_log(offset, LOG_CHUNK if running else 1 << 20)
    return answer


def _read_log(offset: int, max_bytes: int = LOG_CHUNK) -> tuple[str, int]:
    """Returns the log from a byte on, and the byte to continue from. If the log is shorter, it is read from its start."""
    with open(LOG, "ab+") as log:
        size = log.seek(0, os.SEEK_END)
        begin = max(size - 2000, 0) if offset < 0 else offset if offset <= size else 0
        log.seek(begin)
        text = log.read(max_bytes)
    return text.decode(errors="replace"), begin + len(text)


def last_step(metrics: Path) -> int:
    """Returns the step of the last complete record in a metrics.jsonl, or 0 if there is none."""
    with open(metrics, "rb") as file:
        file.seek(max(metrics.stat().st_size - 65536, 0))
        steps = re.findall(rb'"step": (\d+)[,}]', file.read())
    return int(steps[-1]) if steps else 0


def start() -> dict[str, Any]:
    """Starts the training in the background unless one is running."""
    deadline = time.monotonic() + 1
    with open(LOCK, "ab") as lock, open(LOG, "ab") as log:
        while not try_lock(lock, fcntl.LOCK_EX):  # `status` holds the lock for a moment, but the training holds it for longer
            if time.monotonic() > deadline:
                return status()
            time.sleep(0.1)
        _forget_training()
        fd = lock.fileno()
        command = [sys.executable, __file__, "run", str(fd)]
        # In its own session, the process continues after this ssh connection ends.
        runner = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[fd], start_new_session=True
        )
    while runner.poll() is None and not PID.exists():
        time.sleep(0.02)
    if runner.returncode:
        return {"state": "failed", "why": f"the training could not be started; see {LOG}"}
    return status()


def run(lock: int) -> None:
    """Runs the training and records its exit code. This is the background process of `start`; both processes inherit its lock."""
    job = read_job()
    words, begin = [str(PYTHON), "-m", "gpt_jax", *job["command"][1:]], LOG.stat().st_size
    # With a broken TPU, JAX would otherwise train on the CPU. Training waits while another process still uses the run's folder.
    environment = {"JAX_PLATFORMS": "tpu,cpu", "GPT_JAX_WAIT_FOR_LOCK": "1"}
    environment |= {"JAX_COMPILATION_CACHE_DIR": f"{job['workdir']}/compiled", **os.environ}
    training = subprocess.Popen(words, cwd=SOURCE, env=environment, pass_fds=[lock])
    _write(PID, f"{training.pid} {os.getpid()} {job['digest']}")
    code = training.wait()
    with contextlib.suppress(OSError):  # The storage behind the folder may fail.
        _keep_log(Path(job["workdir"], "logs"), begin)
    _write(EXIT, str(128 - code if code < 0 else code))


def _forget_training() -> None:
    for file in (PID, EXIT):
        file.unlink(missing_ok=True)


def _keep_log(folder: Path, begin: int) -> None:
    """Appends the log from a byte on to this worker's file in the run's folder, because the disk is lost with the machine."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(LOG, "rb") as log, open(folder / f"{_host()}.log", "ab") as kept:
        log.seek(begin)
        shutil.copyfileobj(log, kept)


def stop(seconds: float = 0) -> dict[str, Any]:
    """Asks the training to save and end, kills its processes after `seconds`, and deletes the files that describe it."""
    if is_running() and not EXIT.exists():
        _signal_training(os.kill, 0, signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while is_running() and time.monotonic() < deadline + 10:  # the last process to end releases the lock
        if time.monotonic() >= deadline:
            _signal_training(os.killpg, 1, signal.SIGKILL)
        time.sleep(0.05)
    _forget_training()
    return status()


def _signal_training(send: Callable[[int, int], None], field: int, number: int) -> None:
    """Sends a signal to a process in the file `pid`: field 0 is the training, and field 1 is its parent, the group leader."""
    with contextlib.suppress(ProcessLookupError, IndexError):
        send(int(_read(PID).split()[field]), number)


# -- the environment --------------------------------------------------------------------------------------------------------


def install() -> dict[str, Any]:
    """Mounts the job's buckets and installs its commit and its packages, unless that was already done."""
    job = read_job()
    try:
        for bucket in job["buckets"]:
            _mount(bucket)
        _check_out(job["commit"])
        _install_packages(job["extras"])
    except OSError as error:
        return {"state": "failed", "why": f"{error.filename}: {error.strerror}"}
    except subprocess.CalledProcessError as error:
        last_line = (error.stdout.decode(errors="replace").strip().splitlines() or ["no output"])[-1]
        return {"state": "failed", "why": f"{' '.join(error.cmd[:4])} ... ended with {error.returncode}: {last_line}"}
    return {"state": "installed"}


def _mount(bucket: str) -> None:
    folder = Path("/gcs", bucket)
    if os.path.ismount(folder):
        return
    listed = os.path.isdir("/gcs") and bucket in os.listdir("/gcs")
    if listed and not os.path.exists(folder):  # a mount whose gcsfuse process is gone
        _call("sudo", "umount", "--lazy", str(folder))
    if shutil.which("gcsfuse") is None:
        _call("sudo", "apt-get", "install", "--quiet", "--yes", "gcsfuse")
    _call("sudo", "mkdir", "--parents", str(folder))
    _call("sudo", "chown", str(os.getuid()), str(folder))
    # The lock of a run's folder needs a file's changes to be seen within seconds; the default is a minute.
    known = subprocess.run(
        ["gcsfuse", "--help"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
    ).stdout
    new = b"--metadata-cache-ttl-secs" in known
    cache = ["--metadata-cache-ttl-secs", "10"] if new else ["--stat-cache-ttl", "10s", "--type-cache-ttl", "10s"]
    # A checkpoint is completed by renaming its folder, which gcsfuse does not allow for folders with more files than this.
    _call("gcsfuse", "--implicit-dirs", "--rename-dir-limit", "100000", *cache, bucket, str(folder))


def _check_out(commit: str) -> None:
    git = ["git", "-C", str(SOURCE)]
    if not (SOURCE / ".git").exists():
        _call("git", "init", "--quiet", str(SOURCE))
    _call(*git, "fetch", "--quiet", "--force", str(HOME / "source.bundle"), "HEAD")
    _call(*git, "reset", "--quiet", "--hard", commit)
    _call(*git, "clean", "--quiet", "--force", "-d")
    if (HOME / "uncommitted.diff").stat().st_size:
        # --index makes new files part of the difference from the commit, which the run records.
        _call(*git, "apply", "--index", "--whitespace=nowarn", str(HOME / "uncommitted.diff"))


def _install_packages(extras: str) -> None:
    """Installs the package and its dependencies in the versions of the constraints file.

    uv installs its own Python, because the machine's Python may be too old for the package.
    """
    lock = SOURCE / "constraints" / "py312.txt"
    inputs = [extras.encode(), *(file.read_bytes() for file in (SOURCE / "setup.cfg", SOURCE / "pyproject.toml", lock))]
    stamp = hashlib.sha256(b"\0".join(inputs)).hexdigest()
    if _read(INSTALLED) == stamp:
        return
    uv = HOME / "uv" / "bin" / "uv"
    if not uv.exists():
        _call("python3", "-m", "pip", "install", "--quiet", "--target", str(HOME / "uv"), "uv")
    if not PYTHON.exists():
        _call(str(uv), "venv", "--quiet", "--python", "3.12", str(HOME / "venv"))
    package = ["--constraint", str(lock), "--editable", f"{SOURCE}[{extras}]"]
    _call(str(uv), "pip", "install", "--quiet", "--python", str(PYTHON), *package)
    _write(INSTALLED, stamp)


def _call(*words: str) -> None:
    subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True)


# -- files, and the command line ------------------------------------------------------------------------------------------


def _read(path: Path) -> str:
    """Returns the content of a file, or an empty string if there is none."""
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _host() -> str:
    """Returns this machine's name, which ends with -w- and the number of the worker."""
    return os.environ.get("HOSTNAME") or socket.gethostname()


def main(words: list[str]) -> None:
    commands: dict[str, Any] = {"status": status, "install": install, "start": start, "stop": stop, "run": run}
    answer = commands[words[0]](*map(int, words[1:]))
    if answer is not None:
        print(f"\n{MARK}", _host(), json.dumps(answer), flush=True)  # on a separate line, because other workers print too


if __name__ == "__main__":
    main(sys.argv[1:])
