"""Compilation in the background: the order, what is said about it, and errors that appear where a program is used."""

import contextlib
import functools
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.train import compilation
from gpt_jax.train.compilation import BackgroundCompiler, CompiledByShape
from tests.tiny import tiny_config, write_config, write_text


def abstract(length):
    return {"x": jax.ShapeDtypeStruct((length,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))}


def placed(length):
    return {"x": jax.device_put(np.arange(length, dtype=np.float32), jax.devices()[0])}


class Recorder:
    """A function to compile that records the length and the thread of each compilation."""

    def __init__(self):
        self.compiled = []
        self.function = CompiledByShape(self.lower)

    def lower(self, batch):
        self.compiled.append((*batch["x"].shape, threading.current_thread().name.startswith("compilation")))
        return jax.jit(lambda scale, batch: scale * batch["x"].sum()).lower(2.0, batch)


@pytest.fixture
def compiler():
    with contextlib.closing(BackgroundCompiler(lambda line: None)) as compiler:
        yield compiler


def test_shapes_are_compiled_once_in_the_given_order_and_others_on_first_use(compiler):
    recorder = Recorder()
    recorder.function.compile_ahead(compiler, {"three": abstract(3), "two": abstract(2)})
    for length in (2, 3, 4, 4, 2):
        assert float(recorder.function(2.0, placed(length))) == length * (length - 1)
    assert recorder.compiled == [(3, True), (2, True), (4, False)]
    assert recorder.function.num_shapes == 3


def test_the_caller_goes_on_while_a_program_is_compiled(compiler):
    compiling, may_end = threading.Event(), threading.Event()

    def slow():
        compiling.set()
        assert may_end.wait(60)
        return "program"

    future = compiler.submit("a program", slow)
    assert compiling.wait(60)
    assert not future.done()
    may_end.set()
    assert future.result() == "program"


def test_lines_name_what_is_compiled_and_how_many_are_left(monkeypatch):
    monkeypatch.setattr(compilation, "REPORTED_SECONDS", 0.0)
    lines, start = [], threading.Event()
    with contextlib.closing(BackgroundCompiler(lines.append)) as compiler:
        futures = [compiler.submit(name, functools.partial(start.wait, 60)) for name in ("one", "two", "three")]
        start.set()
        assert all(future.result() for future in futures)
    assert [line.partition(" in ")[0] for line in lines] == ["compiled one", "compiled two", "compiled three"]
    assert [line.partition(" s")[2] for line in lines] == ["; 2 left, next two", "; 1 left, next three", ""]


def test_an_error_is_raised_where_the_program_is_used(compiler):
    def lower(batch):
        if batch["x"].shape == (3,):
            raise ValueError("too long")
        return Recorder().lower(batch)

    function = CompiledByShape(lower)
    function.compile_ahead(compiler, {"three": abstract(3), "two": abstract(2)})
    assert float(function(1.0, placed(2))) == 1.0
    with pytest.raises(ValueError, match="too long"):
        function(1.0, placed(3))


def test_programs_that_are_not_needed_any_more_are_dropped():
    started, may_end, compiled = threading.Event(), threading.Event(), []

    def first():
        started.set()
        assert may_end.wait(60)
        compiled.append("first")

    with contextlib.closing(BackgroundCompiler(lambda line: None)) as compiler:
        future = compiler.submit("first", first)
        dropped = compiler.submit("second", lambda: compiled.append("second"))
        assert started.wait(60)
    assert dropped.cancelled()
    may_end.set()
    future.result()
    assert compiled == ["first"]


def test_a_stop_ends_the_wait_for_a_program(compiler):
    may_end = threading.Event()

    def lower(batch):
        assert may_end.wait(60)
        return Recorder().lower(batch)

    function = CompiledByShape(lower)
    function.compile_ahead(compiler, {"three": abstract(3)})
    assert not function.wait(placed(3), lambda: True)
    assert function.wait(placed(2), lambda: True)  # It is compiled by the caller.
    may_end.set()
    assert function.wait(placed(3), lambda: False)
    assert float(function(1.0, placed(3))) == 3.0
    assert function.wait(placed(3), lambda: True)


PROGRAM = """
import threading, time
from gpt_jax.train.compilation import BackgroundCompiler, exit_now_if_compiling

started = threading.Event()
compiler = BackgroundCompiler(print)
compiler.submit("one", lambda: (started.set(), time.sleep(SECONDS)))
compiler.submit("two", lambda: print("two"))
started.wait()
compiler.close()
print("end")
exit_now_if_compiling(42)
raise SystemExit(43)
"""


def test_a_process_ends_without_waiting_for_a_program_that_is_being_compiled():
    command = [sys.executable, "-c", PROGRAM.replace("SECONDS", "600")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (42, "end\n", "")


@pytest.mark.slow
def test_sigterm_during_a_compilation_ends_the_command_at_once(tmp_path):
    """As on a machine that is about to be preempted, which may have less time than the compiler needs."""
    write_config(tiny_config(write_text(tmp_path)), tmp_path / "tiny.py")
    command = [sys.executable, "-c", COMMAND, "pretrain", tmp_path / "tiny.py", "--workdir", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 42, done.stderr
    assert done.stderr.splitlines()[-1] == (
        "gpt-jax: stop requested: there is nothing to save before the first update; run the same command again to continue"
    )
    assert list((tmp_path / "run").glob("lock.*")) == []


COMMAND = """
import os, signal, sys, time
from gpt_jax.cli import main
from gpt_jax.train import run

class Slow:
    def compile(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)

run.lower_step = lambda *args, **kwargs: Slow()
sys.exit(main())
"""
