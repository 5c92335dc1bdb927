"""The lock of a folder: who gets it, who is refused, whose death frees it, and what a process does that has lost it."""

import contextlib
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gpt_jax.errors import Preempted, TrainingError, UserError
from gpt_jax.runtime import lock
from gpt_jax.runtime.lock import FolderLock, LockLost, locked, require_held
from gpt_jax.runtime.machine import machine_id, process_start
from gpt_jax.runtime.signals import StopSignals

THIS = f"process {os.getpid()} on host {os.uname().nodename} (since "


def silent(line):
    raise AssertionError(f"nothing should have been logged, but: {line}")


class Clock:
    """A clock that stands still between pauses, each of which takes a second and may do something."""

    def __init__(self):
        self.now = 1000.0
        self.pauses = 0
        self.during = lambda pauses: None

    def __call__(self):
        return self.now

    def pause(self):
        self.now += 1
        self.pauses += 1
        assert self.pauses < 1000, "it waits forever"
        self.during(self.pauses)


@pytest.fixture
def clock(monkeypatch):
    """The clock by which all locks wait."""
    clock = Clock()
    monkeypatch.setattr(lock, "pause", clock.pause)
    monkeypatch.setattr(FolderLock.__init__, "__defaults__", (clock,))
    return clock


@pytest.fixture
def elsewhere(clock):
    """A function that makes a held lock look as if another machine held it, whose process id this one cannot see."""

    def change(folder, **fields):
        path = lock_file(folder)
        rewrite(path, **{"machine": "another", "host": "node7", "pid": 4242} | fields)
        return path

    return change


@contextlib.contextmanager
def hold(folder, log=silent):
    with locked(folder, log):
        yield folder


def lock_file(folder):
    (path,) = folder.glob("lock.*")
    return path


def rewrite(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields) + "\n")


def abandoned(folder, **fields):
    """Writes the lock file of a holder that will never change it; by default, its process has ended."""
    with hold(folder):
        content = json.loads(lock_file(folder).read_text())
    folder.mkdir(exist_ok=True)
    path = folder / "lock.1"
    path.write_text(json.dumps(content | {"process_start": "long ago", "token": "another"} | fields))
    return path


def refusal(folder):
    """Returns the message with which another attempt is refused."""
    with pytest.raises(UserError) as caught, hold(folder, log=lambda line: None):
        pass
    return str(caught.value)


# -- one holder -------------------------------------------------------------------------------------------------------------


def test_the_lock_file_names_the_holder(tmp_path):
    with hold(tmp_path / "run") as run:
        content = json.loads(lock_file(run).read_text())
        assert (content["host"], content["pid"]) == (os.uname().nodename, os.getpid())
        assert abs(time.mktime(time.strptime(content["since"], "%Y-%m-%d %H:%M:%S UTC")) - time.timezone - time.time()) < 60
        (run / "written").touch()
    assert list((tmp_path / "run").iterdir()) == [run / "written"]


def test_a_second_process_is_refused_at_once_with_host_and_process_id_of_the_first(tmp_path):
    with hold(tmp_path):
        before = lock_file(tmp_path).read_bytes()
        assert refusal(tmp_path).startswith(f"{tmp_path}: in use by {THIS}")
        assert refusal(tmp_path).endswith("); wait until it has ended, or use another folder")
        assert lock_file(tmp_path).read_bytes() == before
        require_held()
    with hold(tmp_path):
        pass


def test_a_folder_that_was_created_for_nothing_is_removed(tmp_path):
    with hold(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError), hold(tmp_path / "c"):
        raise UserError("the config is wrong")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [UserError, TrainingError, Preempted, KeyboardInterrupt, SystemExit, MemoryError])
def test_every_error_releases_it(tmp_path, error):
    with pytest.raises(error), hold(tmp_path):
        raise error("")
    assert list(tmp_path.iterdir()) == []


def test_locks_of_folders_inside_each_other_are_independent(tmp_path):
    with hold(tmp_path / "study"), hold(tmp_path / "study" / "seed-0"):
        assert "in use" in refusal(tmp_path / "study")
        assert "in use" in refusal(tmp_path / "study" / "seed-0")
        with hold(tmp_path / "study" / "seed-1"):
            require_held()


RACE = """
import os, sys, time
from pathlib import Path
from gpt_jax.errors import UserError
from gpt_jax.runtime.lock import locked, require_held

def compete(run):
    try:
        with locked(run, lambda line: None):
            deadline = time.monotonic() + 20
            while not (run / "all others have ended").exists() and time.monotonic() < deadline:
                time.sleep(0.005)
            require_held()
            return 1
    except UserError as error:
        return 2 if "in use by process" in str(error) else 3

folder, processes, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
for number in range(rounds):
    run = folder / str(number)
    run.mkdir()
    if number % 2 and os.fork() == 0:
        with locked(run, print):
            os._exit(0)  # It dies with the lock.
    elif number % 2:
        os.wait()
    begin = time.monotonic() + 0.05
    for _ in range(processes):
        if os.fork() == 0:
            while time.monotonic() < begin:
                pass
            os._exit(compete(run))
    codes = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(processes - 1)]
    (run / "all others have ended").touch()
    codes.append(os.waitstatus_to_exitcode(os.wait()[1]))
    assert codes == [2] * (processes - 1) + [1], codes
    assert [path.name for path in run.iterdir()] == ["all others have ended"]
"""


def test_of_many_processes_that_start_at_the_same_instant_exactly_one_gets_it(tmp_path):
    """In every other folder, all of them find the lock of a process that died."""
    command = [sys.executable, "-c", RACE, tmp_path, "10", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr


class Schedule:
    """Threads that stand for processes, one of which runs at a time; at each access to a file, chance decides which goes on."""

    def __init__(self, seed, monkeypatch):
        self.random = random.Random(seed)
        self.unrest = self.random.choice((0.1, 0.3, 1.0))
        self.turns: dict[int, threading.Semaphore] = {}
        self.this = threading.local()
        self.holders: list[int] = []
        self.outcomes: list[str] = []

        def stepping(function):
            def call(*args, **options):
                self.step()
                try:
                    return function(*args, **options)
                finally:
                    self.step()

            return call

        class Idle(threading.Thread):
            def start(self):
                pass

        monkeypatch.setattr(lock, "_read", stepping(lock._read))
        monkeypatch.setattr(lock, "open", stepping(open), raising=False)
        monkeypatch.setattr(os, "listdir", stepping(os.listdir))
        monkeypatch.setattr(Path, "unlink", stepping(Path.unlink))
        monkeypatch.setattr(os, "getpid", lambda: self.this.pid)
        monkeypatch.setattr(lock, "process_start", lambda pid: "now" if pid in self.turns else "")
        monkeypatch.setattr(lock, "VERIFY_SECONDS", 0.0)
        monkeypatch.setattr(lock, "threading", type("Module", (), {"Event": threading.Event, "Thread": Idle}))

    def step(self):
        """Lets a thread go on that chance has chosen, and waits until it is this one's turn again."""
        chosen = self.random.choice(sorted(self.turns))
        if chosen != self.this.pid and self.random.random() < self.unrest:
            self.turns[chosen].release()
            self.turns[self.this.pid].acquire()

    def process(self, pid, folder, end):
        """Simulates a process that holds the lock for some steps, after which it may die without releasing it."""
        self.this.pid = pid
        self.turns[pid].acquire()
        own = FolderLock(folder, lambda line: None)
        try:
            while not own.try_acquire():
                self.step()
            self.holders.append(pid)
            for _ in range(self.random.randrange(8)):
                own.require_held()
                self.step()
                assert self.holders == [pid], f"{self.holders} hold it together"
            self.holders.remove(pid)
            self.outcomes.append("held")
            if self.random.random() < 0.5:
                own.release()
        except UserError:
            self.outcomes.append("refused")
        except BaseException as error:
            self.outcomes.append(repr(error))
        del self.turns[pid]
        self.turns[self.random.choice(sorted(self.turns))].release() if self.turns else end.set()

    def run(self, folder, pids):
        """Lets processes run that start at the same time."""
        end = threading.Event()
        self.turns = {pid: threading.Semaphore(0) for pid in pids}
        for pid in pids:
            threading.Thread(target=self.process, args=(pid, folder, end), daemon=True).start()
        self.turns[self.random.choice(pids)].release()
        assert end.wait(20)
        lock._held.clear()


def test_two_processes_never_hold_it_whatever_the_order_of_their_accesses_to_files(tmp_path, monkeypatch):
    total = {"held": 0, "refused": 0}
    for seed in range(200):
        with monkeypatch.context() as patch:
            schedule = Schedule(seed, patch)
            for pids in ((1, 2, 3), (4, 5, 6)):
                held = schedule.outcomes.count("held")
                schedule.run(tmp_path / str(seed), pids)
                assert schedule.outcomes.count("held") > held, (seed, schedule.outcomes)
        for outcome in schedule.outcomes:
            assert outcome in total, (seed, outcome)
            total[outcome] += 1
    assert min(total.values()) > 100, total


def test_a_process_that_was_late_withdraws(tmp_path, monkeypatch):
    """It has found a dead holder, and before it acts, others take over, end, and begin again with the first number."""
    abandoned(tmp_path)
    current = FolderLock(tmp_path, silent)

    def slow(path, mode, **options):
        if mode != "xb":
            return open(path, mode, **options)
        monkeypatch.undo()
        with hold(tmp_path):
            assert lock_file(tmp_path).name == "lock.2"
        assert current.try_acquire()
        assert lock_file(tmp_path).name == "lock.1"
        return open(path, mode)

    monkeypatch.setattr(lock, "open", slow, raising=False)
    late = FolderLock(tmp_path, silent)
    assert not late.try_acquire()
    assert lock_file(tmp_path).name == "lock.1"
    current.require_held()
    with pytest.raises(UserError, match="in use by"):
        late.try_acquire()
    current.release()
    assert late.try_acquire()
    late.release()


def test_a_holder_that_is_known_to_be_alive_is_named_before_one_that_is_not_known(tmp_path, clock):
    with hold(tmp_path):
        (tmp_path / "lock.0").write_text("?")
        (tmp_path / "lock.2").write_text("?")
        assert refusal(tmp_path).startswith(f"{tmp_path}: in use by {THIS}")
    assert clock.pauses == 0


def test_a_file_of_the_same_name_is_not_this_process_s_lock(tmp_path, clock):
    """On a file system where creating a file does not fail if another machine creates it, the last one wins."""
    with hold(tmp_path):
        clock.now += 2
        rewrite(lock_file(tmp_path), token="another")
        with pytest.raises(LockLost):
            require_held()
    assert lock_file(tmp_path).exists()


# -- whose death frees it ---------------------------------------------------------------------------------------------------


def start_holder(folder):
    """Starts a process that holds the lock of a folder until it is told what to do; returns it once it does."""
    code = "import sys; from pathlib import Path; from gpt_jax.runtime.lock import locked, require_held\n"
    code += "with locked(Path(sys.argv[1]), print):\n  print('held', flush=True)\n  sys.stdin.readline()\n  require_held()\n"
    process = subprocess.Popen(
        [sys.executable, "-c", code, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n", process.stderr.read()
    return process


def test_the_death_of_a_process_on_this_machine_frees_its_lock_at_once(tmp_path):
    """This holds before its parent has noticed the death, too, which may be never in a container."""
    with start_holder(tmp_path) as process:
        assert f"process {process.pid} on host" in refusal(tmp_path)
        process.kill()
        deadline = time.monotonic() + 20
        while process_start(process.pid):
            assert time.monotonic() < deadline
        assert Path(f"/proc/{process.pid}").exists(), "it has been noticed"
        with hold(tmp_path):
            require_held()


def test_a_suspended_process_on_this_machine_keeps_its_lock(tmp_path, clock):
    with start_holder(tmp_path) as process:
        process.send_signal(signal.SIGSTOP)
        assert f"process {process.pid} on host" in refusal(tmp_path)
        assert clock.pauses == 0
        process.send_signal(signal.SIGCONT)
        assert process.communicate("go on\n", timeout=20) == ("", "")
        assert process.returncode == 0


def test_the_process_id_of_a_dead_holder_may_belong_to_another_process_by_now(tmp_path):
    abandoned(tmp_path, pid=os.getpid())
    with hold(tmp_path):
        pass


def test_process_id_1_of_another_container_is_not_process_1_of_this_one(tmp_path, clock):
    """Both containers may have the same host name. Neither can see the other's processes."""
    other = machine_id().partition(" ")[0] + " pid:[4026532999]"
    abandoned(tmp_path, pid=1, machine=other, process_start=process_start(1) or "")
    lines = []
    with hold(tmp_path, lines.append):
        assert clock.pauses == 60
    assert lines[0].startswith(f"{tmp_path}: locked by process 1 on host {os.uname().nodename} (since ")
    abandoned(tmp_path, pid=os.getpid(), machine=other, process_start="long ago")
    clock.during = lambda pauses: rewrite(lock_file(tmp_path), heartbeat=f"{pauses}")
    assert "in use by process" in refusal(tmp_path)


def test_a_holder_elsewhere_is_dead_after_a_minute_of_silence(tmp_path, clock):
    abandoned(tmp_path, host="node7", machine="another", pid=4242, since="then")
    lines = []
    with hold(tmp_path, lines.append):
        require_held()
    assert clock.pauses == 60
    assert lines == [
        f"{tmp_path}: locked by process 4242 on host node7 (since then); waiting for a sign of life, up to 60 s",
        *(f"{tmp_path}: still waiting for process 4242 on host node7 (since then) ({n} s)" for n in (15, 30, 45)),
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_heartbeat_of_a_holder_elsewhere_is_a_refusal(tmp_path, clock):
    path = abandoned(tmp_path, host="node7", machine="another", pid=4242, since="then")
    clock.during = lambda pauses: rewrite(path, heartbeat="later") if pauses == 50 else None
    assert refusal(tmp_path).startswith(f"{tmp_path}: in use by process 4242 on host node7 (since then); wait")
    assert clock.pauses == 50
    assert path.exists()


def test_the_clock_of_the_other_machine_does_not_matter(tmp_path, clock):
    path = abandoned(tmp_path, machine="another", heartbeat="1970-01-01 00:00:00 UTC")
    os.utime(path, (0, 0))
    with hold(tmp_path, log=lambda line: None):
        assert clock.pauses == 60
    path = abandoned(tmp_path, machine="another", heartbeat="2999-01-01 00:00:00 UTC")
    os.utime(path, (2**33, 2**33))
    with hold(tmp_path, log=lambda line: None):
        assert clock.pauses == 120


def test_a_process_that_did_not_watch_for_a_minute_has_not_seen_a_minute_of_silence(tmp_path, clock):
    """Both processes may have been suspended, for example with the machine that they run on."""
    path = abandoned(tmp_path, machine="another")

    def sleep(pauses):
        clock.now += 600 if pauses == 3 else 0
        if pauses == 5:
            rewrite(path, heartbeat="awake again")

    clock.during = sleep
    assert "in use by" in refusal(tmp_path)


def test_the_lock_in_a_copy_of_a_folder_in_use_does_not_last(tmp_path, clock):
    with hold(tmp_path / "run") as run:
        shutil.copytree(run, tmp_path / "copy")
        with hold(tmp_path / "copy", log=lambda line: None):
            assert clock.pauses == 60
        require_held()


def test_a_folder_in_use_is_recognized_by_another_path(tmp_path, clock):
    with hold(tmp_path / "run") as run:
        (tmp_path / "link").symlink_to(run)
        assert "in use by" in refusal(tmp_path / "link")
        assert "in use by" in refusal(tmp_path / "run" / ".." / "run")
        # A path that does not lead to this one, such as that of another mount, has to be watched.
        rewrite(lock_file(run), folder="/elsewhere/run")
        (own,) = lock._held
        clock.during = lambda pauses: own.beat() if pauses == 10 else None
        assert "in use by" in refusal(run)
        assert clock.pauses == 10


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe\x00", b"[1]", b"{}", b"4242", b'"text"', b"[" * 100_000, b"1" * 6000, b'{"pid": "1", "host": 7}'],
)
def test_a_lock_file_that_names_nobody_is_watched_like_another_machines(tmp_path, clock, content):
    (tmp_path / "lock.1").write_bytes(content)
    lines = []
    with hold(tmp_path, lines.append):
        assert clock.pauses == 60
    assert lines[0].startswith(
        f"{tmp_path}: locked by an unknown process ({tmp_path}/lock.1 does not name it); waiting for a sign"
    )
    (tmp_path / "lock.1").write_bytes(content)
    clock.during = lambda pauses: (tmp_path / "lock.1").write_bytes(b"?")
    assert "in use by an unknown process" in refusal(tmp_path)


@pytest.mark.parametrize("field", ["pid", "machine", "process_start"])
@pytest.mark.parametrize("value", [-1, 0, None, [], "", 10**30, True, 1.5])
def test_a_damaged_lock_file_never_frees_a_lock_at_once(tmp_path, clock, field, value):
    path = abandoned(tmp_path, **{field: value})
    if (field == "process_start" and isinstance(value, str)) or (field, value) == ("pid", 10**30):
        return  # This is what the file of a dead process may look like.
    with hold(tmp_path, log=lambda line: None):
        assert clock.pauses == 60
    assert not path.exists()


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_what_is_not_a_lock_file_is_named(tmp_path, clock, kind):
    path = tmp_path / "lock.3"
    {"folder": path.mkdir, "link": lambda: path.symlink_to(tmp_path / "nowhere"), "pipe": lambda: os.mkfifo(path)}[kind]()
    if kind == "pipe":  # It is empty, and must not be waited for.
        with hold(tmp_path, log=lambda line: None):
            assert clock.pauses == 60
        return
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path}: this folder cannot be locked (")
    assert str(path) in message
    assert path.is_symlink() or path.exists()


def test_other_files_are_not_lock_files(tmp_path):
    names = ["lock", "lock.", "lock.x", "lock.1.tmp", "xlock.1", "lock.-1", "lock.1" + "0" * 30]
    for name in names:
        (tmp_path / name).write_text("mine")
    with hold(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, error):
    def refuse(path, mode, **options):
        raise OSError(error, os.strerror(error), str(path))

    monkeypatch.setattr(lock, "open", refuse, raising=False)
    with pytest.raises(UserError) as caught, hold(tmp_path / "run"):
        pass
    assert str(caught.value) == (f"{tmp_path}/run: this folder cannot be locked ({tmp_path}/run/lock.1: {os.strerror(error)})")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_while_the_lock_file_is_written_leaves_none(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_encode", lambda holder: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with (
        pytest.raises(UserError, match=r"this folder cannot be locked \(.*run: No space left on device\)"),
        hold(tmp_path / "run"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_the_folder_is_one_line(tmp_path):
    (tmp_path / "run").write_text("text")
    assert refusal(tmp_path / "run") == f"{tmp_path}/run: this folder cannot be locked ({tmp_path}/run: File exists)"
    assert refusal(tmp_path / "run" / "x").startswith(f"{tmp_path}/run/x: this folder cannot be locked (")


# -- waiting ----------------------------------------------------------------------------------------------------------------


def test_a_launched_process_waits_and_says_for_whom_every_15_seconds(tmp_path, clock, monkeypatch):
    monkeypatch.setenv("GPT_JAX_WAIT_FOR_LOCK", "1")
    with start_holder(tmp_path) as process:

        def end(pauses):
            if pauses == 100:
                process.communicate("go on\n", timeout=20)

        clock.during = end
        lines = []
        with hold(tmp_path, lines.append):
            assert clock.pauses == 100
    assert process.returncode == 0
    since = lines[0].partition("(since ")[2].partition(")")[0]
    holder = f"process {process.pid} on host {os.uname().nodename} (since {since})"
    assert lines == [
        f"{tmp_path}: locked by {holder}; waiting until it has ended",
        *(f"{tmp_path}: still waiting for {holder} ({seconds} s)" for seconds in range(15, 100, 15)),
    ]


@pytest.mark.parametrize("value", ["", "0"])
def test_nobody_waits_otherwise(tmp_path, clock, monkeypatch, value):
    monkeypatch.setenv("GPT_JAX_WAIT_FOR_LOCK", value)
    with hold(tmp_path):
        assert "in use by" in refusal(tmp_path)
    assert clock.pauses == 0


@pytest.mark.parametrize("value", ["yes", "2", "-1", "true"])
def test_a_variable_that_makes_no_sense_is_named(tmp_path, monkeypatch, value):
    monkeypatch.setenv("GPT_JAX_WAIT_FOR_LOCK", value)
    assert refusal(tmp_path).startswith(f"GPT_JAX_WAIT_FOR_LOCK={value}: must be 1 (wait for a lock")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_ends_the_waiting(tmp_path, clock, monkeypatch, number):
    monkeypatch.setenv("GPT_JAX_WAIT_FOR_LOCK", "1")
    with hold(tmp_path), StopSignals():
        clock.during = lambda pauses: os.kill(os.getpid(), number) if pauses == 7 else None
        with pytest.raises(Preempted, match="stop requested while waiting for the lock"), hold(tmp_path, log=lambda line: None):
            pass
        assert clock.pauses == 7
        require_held()


def test_signal_handlers_that_python_does_not_know_are_left_alone(tmp_path, clock, monkeypatch):
    """JAX's preemption service installs its own with sigaction, and `signal.signal` would replace it for good."""

    def refuse(*_):
        raise AssertionError("a handler was installed")

    abandoned(tmp_path, machine="another")
    monkeypatch.setattr(signal, "signal", refuse)
    with hold(tmp_path, log=lambda line: None):
        assert clock.pauses == 60


# -- losing it --------------------------------------------------------------------------------------------------------------


def test_a_heartbeat_changes_the_file_but_not_its_length(tmp_path, monkeypatch):
    with hold(tmp_path):
        before = lock_file(tmp_path).read_bytes()
        monkeypatch.setattr(time, "gmtime", lambda: time.struct_time((2031, 5, 6, 7, 8, 9, 0, 126, 0)))
        lock._held[0].beat()
        after = lock_file(tmp_path).read_bytes()
        assert (json.loads(after)["heartbeat"], len(after)) == ("2031-05-06 07:08:09 UTC", len(before))
        assert json.loads(before) == json.loads(after) | {"heartbeat": json.loads(before)["heartbeat"]}


def test_the_heart_beats_while_the_lock_is_held_and_not_afterwards(tmp_path, monkeypatch):
    beats = []
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(FolderLock, "beat", lambda self: beats.append(1) or (_ for _ in ()).throw(OSError("the disk is full")))
    with hold(tmp_path):
        deadline = time.monotonic() + 20
        while len(beats) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    time.sleep(0.05)
    count = len(beats)
    time.sleep(0.1)
    assert len(beats) == count


def test_a_lock_file_that_was_deleted_stays_deleted_and_ends_the_holder(tmp_path, clock):
    with hold(tmp_path / "run") as run:
        (run / "written").touch()
        clock.now += 2
        require_held()
        lock_file(run).unlink()
        lock._held[0].beat()
        assert list(run.iterdir()) == [run / "written"]
        clock.now += 2
        with pytest.raises(LockLost) as caught:
            require_held()
    assert str(caught.value) == (
        f"{run}: this process has lost the lock of this folder (its lock file was deleted), so it stopped writing; "
        "when no other process uses the folder, run the same command again"
    )
    assert caught.value.exit_code == 1


def test_a_holder_that_was_silent_for_too_long_ends_once_another_process_has_its_lock(tmp_path, clock, elsewhere):
    with hold(tmp_path):
        path = elsewhere(tmp_path)
        first = lock._held[0]
        with hold(tmp_path, log=lambda line: None):
            assert not path.exists()
            second = lock_file(tmp_path).read_bytes()
            clock.now += 2
            with pytest.raises(LockLost, match=f"of this folder \\({re.escape(THIS)}.*\\) has taken it\\)"):
                first.require_held()
            first.release()
            assert lock_file(tmp_path).read_bytes() == second, "it is not the first one's to delete"
            lock._held[-1].require_held()


def test_a_holder_that_was_silent_goes_on_if_nobody_wanted_its_lock(tmp_path, clock):
    with hold(tmp_path):
        clock.now += 1000
        require_held()


def test_a_process_that_has_lost_one_of_its_locks_writes_nothing_at_all(tmp_path, clock):
    with hold(tmp_path / "study"), hold(tmp_path / "study" / "seed-0"):
        lock_file(tmp_path / "study").unlink()
        clock.now += 2
        with pytest.raises(LockLost, match="study: this process"):
            require_held()


def test_the_file_is_read_at_most_once_a_second(tmp_path, clock, monkeypatch):
    with hold(tmp_path):
        lock_file(tmp_path).unlink()
        clock.now += 0.9
        require_held()
        clock.now += 0.2
        with pytest.raises(LockLost):
            require_held()


def test_a_file_server_that_does_not_answer_for_a_while_is_no_loss(tmp_path, clock, monkeypatch):
    def hang(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    with hold(tmp_path):
        clock.now += 2
        with monkeypatch.context() as patch:
            patch.setattr(lock, "_read", hang)
            require_held()
            clock.now += 50
            require_held()
        require_held()
        with monkeypatch.context() as patch:
            patch.setattr(lock, "_read", hang)
            clock.now += 61
            with pytest.raises(LockLost, match=r"cannot be read \(Input/output error\)"):
                require_held()


def test_a_process_that_was_suspended_while_another_took_its_lock_stops_before_it_writes(tmp_path):
    """Here, real processes are suspended; the second one believes that the first one is on another machine."""
    with start_holder(tmp_path) as process:
        process.send_signal(signal.SIGSTOP)
        rewrite(lock_file(tmp_path), machine="another")
        code = "import sys; from pathlib import Path; from gpt_jax.runtime import lock; lock.SILENCE_SECONDS = 0.5\n"
        code += "with lock.locked(Path(sys.argv[1]), print): print('taken over')"
        done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.stdout.endswith("taken over\n"), done.stderr
        time.sleep(1.1)  # as a process that was suspended
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate("go on\n", timeout=20)
    assert "LockLost" in errors
    assert process.returncode == 1
