"""The folder of compiled programs: where it is, what is kept in it, and that it changes no number."""

import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from gpt_jax.runtime import compilation_cache, machine
from tests.tiny import tiny_config, trajectory, write_config, write_text

VARIABLES = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "JAX_ENABLE_COMPILATION_CACHE")

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from gpt_jax.runtime import compilation_cache

compilation_cache.MIN_COMPILE_SECONDS = 0.0
compilation_cache.MAX_BYTES = {max_bytes}
compilation_cache.enable(print)
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
jax.jit(lambda x: jnp.{function}(x) + 1)(np.ones(3, np.float32)).block_until_ready()
for name in ("hits", "misses"):
    print(name, events.count("/jax/compilation_cache/cache_" + name))
"""


def environment(home, **variables):
    """Returns the variables of a process that uses the default cache in `home`, unless `variables` say otherwise."""
    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return inherited | {"XDG_CACHE_HOME": str(home)} | variables


def run_program(home, function="sin", max_bytes=1 << 20, prefix="", **variables):
    """Runs `PROGRAM`, after a prefix, and returns the lines that it printed."""
    code = prefix + PROGRAM.format(function=function, max_bytes=max_bytes)
    done = subprocess.run([sys.executable, "-c", code], env=environment(home, **variables), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def subfolders(home):
    return sorted((home / "gpt_jax" / "compiled").iterdir())


# -- which folder -----------------------------------------------------------------------------------------------------------


def test_the_folder_depends_on_the_cpu_and_the_versions(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = compilation_cache.default_folder()
    assert folder.parent == tmp_path / "gpt_jax" / "compiled"
    monkeypatch.setattr(compilation_cache, "cpu_model", lambda: "flags : sse2")
    other_cpu = compilation_cache.default_folder()
    monkeypatch.setattr(compilation_cache, "installed_versions", lambda names: dict.fromkeys(names, "0.0.1"))
    other_versions = compilation_cache.default_folder()
    assert len({folder, other_cpu, other_versions}) == 3
    assert other_versions.name.endswith("-jax-0.0.1-jaxlib-0.0.1-gpt_jax-0.0.1")


def test_the_default_home_is_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compilation_cache.default_folder().is_relative_to(tmp_path / ".cache" / "gpt_jax" / "compiled")


CPU = """\
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 143
cpu MHz\t\t: {clock}
flags\t\t: fpu sse2 {flag}

processor\t: 1
"""


def test_a_cpu_is_known_by_its_instruction_sets_and_not_by_its_clock(monkeypatch):
    def model(**values):
        monkeypatch.setattr(machine.Path, "read_text", lambda path, **_: CPU.format(**values))
        return machine.cpu_model()

    assert model(clock=2000.0, flag="avx2") == model(clock=3500.0, flag="avx2")
    assert model(clock=2000.0, flag="avx2") != model(clock=2000.0, flag="avx512f")


# -- what is kept -----------------------------------------------------------------------------------------------------------


def test_a_second_process_takes_the_program_of_the_first(tmp_path):
    assert run_program(tmp_path) == ["hits 0", "misses 1"]
    (folder,) = subfolders(tmp_path)
    assert len(list(folder.glob("jit_*-cache"))) == 1
    assert run_program(tmp_path) == ["hits 1", "misses 0"]


@pytest.mark.parametrize(
    ("variable", "value"), [("JAX_ENABLE_COMPILATION_CACHE", "false"), ("JAX_COMPILATION_CACHE_DIR", "{home}/named")]
)
def test_jax_variables_switch_the_cache_off_or_name_another_folder(tmp_path, variable, value):
    lines = run_program(tmp_path, **{variable: value.format(home=tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"})
    named = "named" in value
    assert lines == ["hits 0", f"misses {int(named)}"]
    assert [path.name for path in tmp_path.iterdir()] == ["named"] * named


PLATFORM = """
import jax
jax.default_backend, jax.process_count = (lambda: "{backend}"), (lambda: {processes})
"""


@pytest.mark.parametrize(("backend", "processes", "kept"), [("gpu", 2, False), ("gpu", 1, True), ("cpu", 2, True)])
def test_processes_on_gpus_keep_programs_only_in_a_folder_that_is_named(tmp_path, backend, processes, kept):
    """There, a process that found its program in a folder of its own would leave the others waiting."""
    prefix = PLATFORM.format(backend=backend, processes=processes)
    assert run_program(tmp_path, prefix=prefix) == ["hits 0", f"misses {int(kept)}"]
    named = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "named"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    assert run_program(tmp_path, prefix=prefix, **named) == ["hits 0", "misses 1"]


@pytest.mark.parametrize("named", [True, False])
def test_a_folder_that_cannot_be_written_gives_a_warning(tmp_path, named):
    (tmp_path / "file").touch()
    variables = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "file")} if named else {}
    warning, *counts = run_program(tmp_path / "file", **variables)
    assert warning.startswith(f"warning: compiled programs cannot be kept in {tmp_path}/file")
    assert warning.endswith("set JAX_COMPILATION_CACHE_DIR to a folder that can be written")
    assert counts == ["hits 0", "misses 0"]


def test_a_user_without_a_home_folder_gets_a_warning(monkeypatch):
    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", no_home)
    lines, names = [], ("jax_enable_compilation_cache", "jax_compilation_cache_dir")
    before = {name: jax.config.values[name] for name in names}
    for name, value in zip(names, (True, None), strict=True):
        jax.config.update(name, value)
    try:
        compilation_cache.enable(lines.append)
        assert not jax.config.values["jax_enable_compilation_cache"]
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    (line,) = lines
    assert line.startswith("warning: compiled programs cannot be kept in the user's cache folder (Could not determine home")


def test_a_program_that_was_not_written_completely_is_replaced(tmp_path):
    """A process that is killed while it writes leaves a file without the time of its last use."""
    run_program(tmp_path)
    (program,) = subfolders(tmp_path)[0].glob("*-cache")
    complete = program.stat().st_size
    os.truncate(program, complete // 2)
    program.with_name(program.name.removesuffix("-cache") + "-atime").unlink()
    assert run_program(tmp_path) == ["hits 0", "misses 1"]
    assert run_program(tmp_path) == ["hits 1", "misses 0"]


def test_the_folder_is_bounded(tmp_path):
    """With room for one program, the second one replaces the first."""
    run_program(tmp_path)
    (first,) = subfolders(tmp_path)[0].glob("*-cache")
    most = first.stat().st_size * 3 // 2
    run_program(tmp_path, "cos", max_bytes=most)
    (second,) = subfolders(tmp_path)[0].glob("*-cache")
    assert second != first


def test_subfolders_that_no_run_uses_any_more_are_deleted(tmp_path):
    root = tmp_path / "gpt_jax" / "compiled"
    old, recent = root / "another-cpu", root / "another-version"
    for folder, days in ((old, 31), (recent, 29)):
        folder.mkdir(parents=True)
        (folder / "jit_f-cache").touch()
        then = time.time() - days * 24 * 3600
        os.utime(folder, (then, then))
    run_program(tmp_path)
    assert not old.exists()
    assert recent in subfolders(tmp_path)


# -- the numbers ------------------------------------------------------------------------------------------------------------


def test_a_cold_and_a_warm_cache_and_none_give_the_same_bits(tmp_path):
    """The losses, gradient norms and validation scores of three runs are equal, digit for digit."""
    config = tiny_config(write_text(tmp_path), train={"duration": "6 steps", "eval_every": "3 steps"})
    words = ["gpt_jax", "pretrain", str(write_config(config, tmp_path / "tiny.py")), "--workdir"]
    home = tmp_path / "home"
    for name, variables in (("cold", {}), ("warm", {}), ("none", {"JAX_ENABLE_COMPILATION_CACHE": "false"})):
        command = [sys.executable, "-m", *words, str(tmp_path / name)]
        subprocess.run(command, env=environment(home, **variables), capture_output=True, check=True)
    cold, warm, none = (trajectory(tmp_path / name) for name in ("cold", "warm", "none"))
    (folder,) = subfolders(home)
    assert any(path.name.startswith("jit_train_step") for path in folder.iterdir())
    assert len(none) == 8
    assert cold == none
    assert warm == none
