"""The lock of a folder, such as a run's: at most one process writes there.

A lock is a file `lock.N` in the folder, one JSON object that names its holder (host, process id, start) and changes every ten
seconds (the heartbeat). All it needs from the file system is that creating a file fails if it exists, so it works on network file
systems and mounted buckets, where `flock` is often missing or local to one machine.

To take the lock, a process

1. reads all lock files, and stops if one of them may belong to a running process;
2. creates `lock.N+1`, where N is the largest number, which only one process can do;
3. reads all lock files again, and deletes its own if another one may now belong to a running process;
4. deletes the files of dead processes.

A process holds the lock once it has completed step 4 and while its file is still there. Two processes cannot hold it: both
created a file in step 2, and the one that did so later found the other's file in step 3. Only one process deletes a dead holder's
file, because only one can create the next number; so two processes that find the same dead holder do not delete each other's
files.

A holder is dead if its process has ended. On its own machine, this can be seen at once: the process id is gone, or belongs to a
process that started at another time. A process id means nothing on another machine or in another container, even if the host has
the same name there. In that case, a holder is dead if its file has not changed for `SILENCE_SECONDS` while this process was
watching: the clocks of two machines are never compared.

Such a holder may only have been suspended. So a holder calls `require_held` before it writes, and stops if its file is no longer
there. No check can be closer to the write than the file system's own delay. What a suspended process may still write in that
instant is a line of a record or an unfinished checkpoint, which the new holder ignores.
"""

import contextlib
import json
import os
import random
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Self

from gpt_jax.errors import Preempted, TrainingError, UserError
from gpt_jax.runtime.console import Log
from gpt_jax.runtime.machine import machine_id, process_start
from gpt_jax.runtime.signals import stop_requested

HEARTBEAT_SECONDS = 10.0
SILENCE_SECONDS = 60.0
"""Time without a change of the lock file after which a holder that cannot be observed otherwise counts as dead."""
REPORT_SECONDS = 15.0
"""Time between lines that say what this process is waiting for."""
LONGEST_LOOK_SECONDS = 5.0
"""Maximum time that counts between two looks at a silent lock file, because a suspended process does not watch."""
VERIFY_SECONDS = 1.0
"""Minimum time between two reads of a process's own lock file, each of which is a request to the server on some file systems."""
WAIT = "GPT_JAX_WAIT_FOR_LOCK"
"""Environment variable; if it is 1, a process waits for a lock that another one holds. `supervise` and launched jobs set it."""

_held: list["FolderLock"] = []
"""The locks that this process holds."""


class LockLost(TrainingError):
    """This process no longer holds a lock that it took, so it must not write. Exit code 1."""


class Holder(NamedTuple):
    """The contents of a lock file."""

    host: str
    pid: int
    since: str
    """When the lock was taken, by the holder's clock, in UTC."""
    heartbeat: str
    """The time of the last heartbeat, by the holder's clock. All that matters is that it changes."""
    folder: str
    """Absolute path of the folder. It differs in a copy of the folder, whose lock file is a copy as well."""
    machine: str
    """`machine.machine_id()` of the holder."""
    process_start: str
    """`machine.process_start(pid)` of the holder."""
    token: str
    """Differs each time that a lock is taken."""

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host} (since {self.since})"

    @classmethod
    def parse(cls, content: bytes) -> Self | None:
        """Returns the holder in a lock file, or None if the content is not that of a lock file."""
        try:
            holder = cls(**json.loads(content))
        except (ValueError, TypeError, RecursionError):  # not JSON, or not these fields
            return None
        types = all(type(value) is cls.__annotations__[name] for name, value in holder._asdict().items())
        return holder if types and holder.pid > 0 else None


def seconds() -> float:
    """Returns the time since some fixed moment, including time in which the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class FolderLock:
    """The lock of one folder. The folder is created if it is missing, and deleted at the end if nothing was written.

    Args:
      log: receives a line when this process has to wait, and another one every `REPORT_SECONDS`.
      clock: returns the time in seconds.
    """

    def __init__(self, folder: Path, log: Log, clock: Callable[[], float] = seconds):
        self._folder, self._log, self._clock = folder, log, clock
        self._created: list[Path] = []
        self._own: tuple[Path, Holder] | None = None
        self._verified = 0.0  # when our own lock file was last read
        self._released = threading.Event()
        self._seen: dict[str, tuple[bytes, float]] = {}  # content of the other lock files, and `_watched` when it was new
        self._started = self._looked = clock()
        self._watched = 0.0
        self._reported: float | None = None

    # -- taking it --

    def try_acquire(self) -> bool:
        """Takes the lock if nobody holds it; returns False if the caller should try again after `pause`.

        Raises:
          UserError: another process holds it, and this one does not wait; or the folder cannot be written.
        """
        now = self._clock()
        self._watched += min(now - self._looked, LONGEST_LOOK_SECONDS)
        self._looked = now
        try:
            self._created += [path for path in (self._folder, *self._folder.parents) if not path.exists()]
            self._folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # The last holder has just removed the folder, which it had created.
                return self._try_acquire(_waits())
        except OSError as error:
            path = error.filename or self._folder
            raise UserError(f"{self._folder}: this folder cannot be locked ({path}: {error.strerror})") from None
        return False

    def _try_acquire(self, waits: bool) -> bool:
        others = self._read_all()
        if (found := self._find_holder(others)) is not None:
            holder, alive = found
            if alive and not waits:
                raise UserError(f"{self._folder}: in use by {holder}; wait until it has ended, or use another folder")
            self._report(holder, alive)
            return False
        own = f"lock.{1 + max((int(name.partition('.')[2]) for name in others), default=0)}"
        if not self._create(own):
            return False  # Another process was faster.
        others = {name: content for name, content in self._read_all().items() if name != own}
        if self._find_holder(others) is not None or not self._is_own():
            self.release()
            return False
        for name in others:
            (self._folder / name).unlink(missing_ok=True)
        self._verified = self._clock()
        _held.append(self)
        threading.Thread(target=self._keep_beating, name="lock heartbeat", daemon=True).start()
        return True

    def _read_all(self) -> dict[str, bytes]:
        """Returns the contents of all lock files by name."""
        contents = {}
        for name in os.listdir(self._folder):
            if re.fullmatch("lock[.][0-9]{1,18}", name):
                with contextlib.suppress(FileNotFoundError):  # Its holder has released it.
                    contents[name] = _read(self._folder / name)
        return contents

    def _find_holder(self, others: dict[str, bytes]) -> tuple[str, bool] | None:
        """Returns a phrase for a holder that may be alive and whether it is known to be alive, or None if all are dead."""
        found: list[tuple[str, bool]] = []
        for name, content in others.items():
            holder = Holder.parse(content)
            alive = self._is_alive(name, content, holder)
            if alive is not False:
                phrase = str(holder or f"an unknown process ({self._folder / name} does not name it)")
                found.append((phrase, bool(alive)))
        return max(found, key=lambda item: item[1], default=None)

    def _is_alive(self, name: str, content: bytes, holder: Holder | None) -> bool | None:
        """Returns whether a holder is alive, or None if that is not known yet."""
        if holder is not None and holder.machine and (holder.host, holder.machine) == (socket.gethostname(), machine_id()):
            start = process_start(holder.pid)
            if start is not None and start != holder.process_start:
                return False
            if start is not None and holder.folder == str(self._folder.resolve()):
                return True
        known, since = self._seen.setdefault(name, (content, self._watched))
        if known != content:
            self._seen[name] = content, self._watched
            return True
        return False if self._watched - since >= SILENCE_SECONDS else None

    def _report(self, holder: str, alive: bool) -> None:
        now = self._clock()
        if self._reported is None:
            until = "until it has ended" if alive else f"for a sign of life, up to {SILENCE_SECONDS:.0f} s"
            self._log(f"{self._folder}: locked by {holder}; waiting {until}")
        elif now - self._reported >= REPORT_SECONDS:
            self._log(f"{self._folder}: still waiting for {holder} ({now - self._started:.0f} s)")
        else:
            return
        self._reported = now

    def _create(self, name: str) -> bool:
        """Creates a lock file of this process; returns False if a file of this name exists."""
        path, pid = self._folder / name, os.getpid()
        folder, start = str(self._folder.resolve()), process_start(pid) or ""
        holder = Holder(socket.gethostname(), pid, _now(), _now(), folder, machine_id(), start, uuid.uuid4().hex)
        try:
            file = open(path, "xb")  # noqa: SIM115
        except FileExistsError:
            return False
        try:
            with file:
                file.write(_encode(holder))
        except OSError:
            path.unlink(missing_ok=True)
            raise
        self._own = path, holder
        return True

    # -- holding it --

    def require_held(self) -> None:
        """Checks that this process still holds the lock. The file is read at most once every `VERIFY_SECONDS`.

        Raises:
          LockLost: the lock file was deleted, or another process has taken the lock.
        """
        now = self._clock()
        if now - self._verified < VERIFY_SECONDS:
            return
        try:
            if not self._is_own():
                raise LockLost(self._describe_loss())
        except OSError as error:  # The file server does not answer.
            if now - self._verified >= SILENCE_SECONDS:
                raise LockLost(f"{self._folder}: the lock of this folder cannot be read ({error.strerror})") from error
            return
        self._verified = now

    def _is_own(self) -> bool:
        """Returns whether the lock file that this process has created is still there."""
        if self._own is None:
            return False
        path, own = self._own
        try:
            holder = Holder.parse(_read(path))
        except FileNotFoundError:
            return False
        return holder is not None and holder.token == own.token

    def _describe_loss(self) -> str:
        others: list[Holder | None] = []
        with contextlib.suppress(OSError):
            others = [Holder.parse(content) for content in self._read_all().values()]
        cause = next((f"{other} has taken it" for other in others if other), "its lock file was deleted")
        hint = "when no other process uses the folder, run the same command again"
        return f"{self._folder}: this process has lost the lock of this folder ({cause}), so it stopped writing; {hint}"

    def beat(self) -> None:
        """Changes the lock file, as a sign of life. It is changed in place, because a deleted file must stay deleted."""
        own = self._own
        if own is not None and self._is_own():
            path, holder = own
            with os.fdopen(os.open(path, os.O_WRONLY), "wb") as file:
                file.write(_encode(holder._replace(heartbeat=_now())))  # the same length as before

    def _keep_beating(self) -> None:
        released = self._released
        while not released.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # The next heartbeat may succeed.
                self.beat()

    def release(self) -> None:
        """Releases the lock: deletes its file unless another process has taken it, and a folder created in vain."""
        self._released.set()
        if self in _held:
            _held.remove(self)
        with contextlib.suppress(OSError):
            if self._own is not None and self._is_own():
                self._own[0].unlink()
        self._own, self._released = None, threading.Event()
        while self._created:  # from the inside out
            with contextlib.suppress(OSError):  # It is not empty.
                self._created.pop(0).rmdir()


@contextlib.contextmanager
def locked(folder: Path, log: Log) -> Iterator[None]:
    """Holds the lock of a folder. This is for a single process; `distributed.locked` is for a run's processes.

    Raises:
      UserError: another process holds it, and this one does not wait (`WAIT`); or the folder cannot be written.
      Preempted: a surrounding `StopSignals` has received a signal while this process was waiting.
    """
    lock = FolderLock(folder, log)
    try:
        # No signal handler is installed here: restoring the earlier one would remove the handler of JAX's preemption service.
        while not lock.try_acquire():
            pause()
            if stop_requested():
                raise Preempted(f"{folder}: stop requested while waiting for the lock of this folder")
        yield
    finally:
        lock.release()


def pause() -> None:
    """Waits before the next attempt, for a time that differs between processes, so that they do not stay in step."""
    time.sleep(random.uniform(0.2, 1.0))


def require_held() -> None:
    """Checks, before this process writes, that it still holds all locks that it has taken.

    Raises:
      LockLost: it does not.
    """
    for lock in _held:
        lock.require_held()


def release_all() -> None:
    """Releases all locks of this process, which is about to end without unwinding its stack."""
    for lock in list(_held):
        lock.release()


def _waits() -> bool:
    """Returns whether this process waits for locks.

    Raises:
      UserError: the environment variable is neither 0 nor 1.
    """
    value = os.environ.get(WAIT) or "0"
    if value not in ("0", "1"):
        raise UserError(f"{WAIT}={value}: must be 1 (wait for a lock that another process holds) or 0 (do not wait)")
    return value == "1"


def _read(path: Path) -> bytes:
    """Returns the content of a lock file. A link or a pipe is not one, and must be neither followed nor waited for."""
    with open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
        return file.read(4096)


def _encode(holder: Holder) -> bytes:
    return (json.dumps(holder._asdict()) + "\n").encode()


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
