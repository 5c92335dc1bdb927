"""What `tpu_vm` has done on each worker. It copies this file there, with job.json, source.bundle and uncommitted.diff.

    python3 tpu_worker.py status [OFFSET] | install | start | stop [SECONDS]

Each answers with one line, `gpt-jax-worker HOST` and a JSON object, among whatever else ssh prints. The files beside this one are
all that is remembered: `pid`, `exit` (the training's exit code), `log`, and `lock`, which the training holds while it lives: so a
second start is no second training, and one that went down with its machine is not taken for a living one.

It runs before anything is installed: on the machine's own Python (3.8 or newer), with the standard library alone.
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
from pathlib import Path
from typing import Any

MARK = "gpt-jax-worker"
HOME = Path(__file__).resolve().parent
PID, EXIT, LOG, LOCK = (HOME / name for name in ("pid", "exit", "log", "lock"))
SOURCE, PYTHON, INSTALLED = HOME / "source", HOME / "venv" / "bin" / "python", HOME / "installed"
PREEMPTED = 42


class Failed(Exception):
    """A step of `install` did not succeed; the message is a line for the person."""


def job() -> dict[str, Any]:
    return json.loads((HOME / "job.json").read_text(encoding="utf-8"))


# -- the training -----------------------------------------------------------------------------------------------------------


def alive() -> bool:
    """Whether a training holds the lock."""
    with open(LOCK, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def status(offset: int = -1) -> dict[str, Any]:
    """The state: "idle", "running", or "ended" with the exit code and the log's last line; which job; the step it has reached.
    Worker 0 adds what its log says from a byte on (-1: its end).

    A training that is gone without an exit code went down with its machine, which counts as a preemption.
    """
    running, remembered = alive(), _read(PID).split()
    answer: dict[str, Any] = {"state": "running" if running else "ended" if remembered else "idle", "step": _last_step()}
    answer["job"] = remembered[2] if remembered else ""
    if answer["state"] == "ended":
        answer.update(code=int(_read(EXIT) or PREEMPTED), said=_log(-1)[0].strip().rpartition("\n")[2][-300:])
    if _first():
        # Other workers' answers may come in between a long one; of a training that has ended, though, nobody asks again.
        answer["log"], answer["offset"] = _log(offset, most=1 << 15 if running else 1 << 20)
    return answer


def _log(offset: int, most: int = 1 << 15) -> tuple[str, int]:
    """What the log says from this byte on, and the byte to go on from; of a log that is shorter than that, all."""
    if not LOG.exists():
        return "", 0
    size = LOG.stat().st_size
    begin = max(size - 2000, 0) if offset < 0 else offset if offset <= size else 0
    with open(LOG, "rb") as log:
        log.seek(begin)
        text = log.read(most)
    return text.decode(errors="replace"), begin + len(text)


def _last_step() -> int:
    """Updates that the records in the run's folder tell of, all together (a fine-tuning may have a run for each seed)."""
    total, run = 0, Path(job()["workdir"])
    with contextlib.suppress(OSError):  # whatever the folder's storage is up to
        for metrics in (run / "metrics.jsonl", *run.glob("seed-*/metrics.jsonl")):
            if metrics.exists():
                with open(metrics, "rb") as lines:
                    lines.seek(max(metrics.stat().st_size - 65536, 0))
                    total += int((re.findall(rb'"step": (\d+)', lines.read()) or [0])[-1])
    return total


def start() -> dict[str, Any]:
    """Starts the training in the background, unless one runs."""
    if alive():
        return status()
    before = _read(PID)
    with open(LOG, "ab") as log:
        runner = subprocess.Popen(
            [sys.executable, __file__, "run"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # so that it outlives this ssh
        )
    while runner.poll() is None and _read(PID) in ("", before):
        time.sleep(0.02)
    if runner.returncode:
        return {"state": "failed", "why": f"the training could not be started; see {LOG}"}
    return status()


def run() -> None:
    """The process behind `start`: holds the lock, runs the training, and writes down how it ended."""
    with open(LOCK, "ab") as lock:
        for _ in range(10):  # a `status` may hold it for a moment; a training holds it for longer
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
        else:
            return
        for file in (PID, EXIT):
            if file.exists():
                file.unlink()
        task = job()
        words, begin = [str(PYTHON), "-m", "gpt_jax", *task["command"][1:]], LOG.stat().st_size
        variables = {"JAX_PLATFORMS": "tpu,cpu", **os.environ}  # named, so that a broken TPU is no training on the CPU
        training = subprocess.Popen(words, cwd=SOURCE, env=variables, pass_fds=[lock.fileno()])
        _write(PID, f"{training.pid} {os.getpid()} {task['digest']}")
        code = training.wait()
        with contextlib.suppress(OSError):  # whatever the folder's storage is up to
            _keep_log(Path(task["workdir"], "logs"), begin)
        _write(EXIT, str(128 - code if code < 0 else code))


def _keep_log(folder: Path, begin: int) -> None:
    """Adds what the log says from a byte on to this worker's file in the run's folder, as its disk goes with the machine."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(LOG, "rb") as log, open(folder / f"{_host()}.log", "ab") as kept:
        log.seek(begin)
        shutil.copyfileobj(log, kept)


def stop(seconds: float = 0) -> dict[str, Any]:
    """Asks the training to save and end, kills what is left of it after so many seconds, and forgets it."""
    if alive() and _read(PID):
        if not EXIT.exists():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(_read(PID).split()[0]), signal.SIGTERM)
        until = time.monotonic() + seconds
        while alive() and time.monotonic() < until:
            time.sleep(0.05)
        until = time.monotonic() + 10  # the lock goes with the last of them
        while alive() and time.monotonic() < until:
            with contextlib.suppress(ProcessLookupError, IndexError):
                os.killpg(int(_read(PID).split()[1]), signal.SIGKILL)
            time.sleep(0.05)
    for file in (PID, EXIT):
        if file.exists():
            file.unlink()
    return status()


# -- the environment --------------------------------------------------------------------------------------------------------


def install() -> dict[str, Any]:
    """The job's commit, its packages and its buckets; what is there already stays."""
    task = job()
    try:
        for bucket in task["buckets"]:
            _mount(bucket)
        _check_out(task["commit"])
        _install_packages(task["extras"])
    except Failed as error:
        return {"state": "failed", "why": str(error)}
    return {"state": "installed"}


def _mount(bucket: str) -> None:
    folder = Path("/gcs", bucket)
    if os.path.ismount(folder):
        return
    try:
        folder.stat()
    except FileNotFoundError:
        pass
    except OSError:  # of a mount whose gcsfuse is gone
        _do("sudo", "umount", "--lazy", str(folder))
    if shutil.which("gcsfuse") is None:
        _do("sudo", "apt-get", "install", "--quiet", "--yes", "gcsfuse")
    _do("sudo", "mkdir", "--parents", str(folder))
    _do("sudo", "chown", str(os.getuid()), str(folder))
    # A checkpoint is committed by renaming its folder, which gcsfuse refuses above this number of files.
    _do("gcsfuse", "--implicit-dirs", "--rename-dir-limit", "100000", bucket, str(folder))


def _check_out(commit: str) -> None:
    git = ["git", "-C", str(SOURCE)]
    if not (SOURCE / ".git").exists():
        _do("git", "init", "--quiet", str(SOURCE))
    _do(*git, "fetch", "--quiet", "--force", str(HOME / "source.bundle"), "HEAD")
    _do(*git, "reset", "--quiet", "--hard", commit)
    _do(*git, "clean", "--quiet", "--force", "-d")
    if (HOME / "uncommitted.diff").stat().st_size:
        # Into the index too, so that a file which is new there differs from the commit, for the run's own record.
        _do(*git, "apply", "--index", "--whitespace=nowarn", str(HOME / "uncommitted.diff"))


def _install_packages(extras: str) -> None:
    """The package and what it depends on, in the versions of its constraints file. The machine's own Python may be too old for
    it, so uv brings one.
    """
    lock = SOURCE / "constraints" / "py312.txt"
    wanted = [SOURCE / "setup.cfg", SOURCE / "pyproject.toml", lock]
    stamp = hashlib.sha256(b"\0".join([extras.encode(), *(file.read_bytes() for file in wanted)])).hexdigest()
    if _read(INSTALLED) == stamp:
        return
    uv = HOME / "uv" / "bin" / "uv"
    if not uv.exists():
        _do("python3", "-m", "pip", "install", "--quiet", "--target", str(HOME / "uv"), "uv")
    if not PYTHON.exists():
        _do(str(uv), "venv", "--quiet", "--python", "3.12", str(HOME / "venv"))
    requirement = f"{SOURCE}[{extras}]"
    _do(str(uv), "pip", "install", "--quiet", "--python", str(PYTHON), "--constraint", str(lock), "--editable", requirement)
    _write(INSTALLED, stamp)


def _do(*words: str) -> None:
    """Runs a command.

    Raises:
      Failed: it did not succeed; the message has the last line that it said.
    """
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    except OSError as error:
        raise Failed(f"{words[0]}: {error.strerror}") from None
    if done.returncode:
        said = done.stdout.decode(errors="replace").strip().splitlines()
        raise Failed(f"{' '.join(words[:4])} ... ended with {done.returncode}: {said[-1] if said else 'without a word'}")


# -- what it says -----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> str:
    """What a file says; nothing if it is not there."""
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _host() -> str:
    """This machine's name, which ends in -w- and the worker's number."""
    return os.environ.get("HOSTNAME") or socket.gethostname()


def _first() -> bool:
    """Whether this is worker 0 of its slice."""
    return re.search("-w-[1-9][0-9]*$", _host()) is None


def main(words: list[str]) -> None:
    verbs = {"status": status, "install": install, "start": start, "stop": stop}
    if words[0] == "run":
        return run()
    answer = verbs[words[0]](*map(int, words[1:]))
    print(f"\n{MARK}", _host(), json.dumps(answer), flush=True)  # on a line of its own, whatever another worker is saying
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
