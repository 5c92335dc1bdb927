"""The identity of processes: dead, alive, replaced by another one, or not to be seen."""

import os
import subprocess
import sys
import time

import pytest

from gpt_jax.runtime import machine
from gpt_jax.runtime.machine import machine_id, process_start


def test_the_machine_is_the_same_for_all_processes_that_see_each_other():
    code = "from gpt_jax.runtime.machine import machine_id; print(machine_id(), end='')"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout == machine_id() != ""


@pytest.fixture(params=["proc", "ps"])
def source(request, monkeypatch):
    """Where the start of a process is read: Linux's /proc, or the program ps, as on macOS."""
    if request.param == "ps":
        if machine._output("ps", "-o", "stat=,lstart=", "-p", str(os.getpid())) == "":
            pytest.skip("this machine has no ps")
        monkeypatch.setattr(machine.Path, "read_bytes", lambda path: (_ for _ in ()).throw(FileNotFoundError()))
    return request.param


def test_a_process_keeps_its_start(source):
    start = process_start(os.getpid())
    assert start
    assert process_start(os.getpid()) == start


def test_processes_that_started_at_different_times_differ(source):
    assert process_start(os.getpid()) != process_start(1)


def test_a_process_that_has_ended_has_no_start_even_before_its_parent_notices(source):
    with subprocess.Popen([sys.executable, "-SEc", ""]) as process:
        deadline = time.monotonic() + 20
        while process_start(process.pid):
            assert time.monotonic() < deadline
        assert process_start(process.pid) == ""
    assert process_start(process.pid) == ""


def test_no_process_has_such_a_number():
    assert process_start(2**22 + 5) == ""
    assert process_start(10**30) == ""


def test_a_process_that_cannot_be_seen_is_not_taken_for_dead(monkeypatch):
    """Other users' processes are hidden on some clusters (hidepid)."""

    def refuse(pid, number):
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    monkeypatch.setattr(machine.Path, "read_bytes", lambda path: (_ for _ in ()).throw(FileNotFoundError()))
    monkeypatch.setattr(machine, "_output", lambda *command: "")
    assert process_start(4242) is None
