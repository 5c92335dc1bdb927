"""The Makefile: the rule that installs shows the elapsed time and fails as its commands do, and `make gpu` installs nothing."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PYTHON = """#!/bin/sh
# Stands for Python: makes an environment that contains itself, and installs nothing.
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *"print(311"*) echo 311 ;;
  "-m pip "*) sleep SECONDS; echo "ERROR: pip says why" >&2; exit CODE ;;
esac
"""


@pytest.fixture
def install(tmp_path):
    """A function that runs `make demo` with a pip that takes some seconds and then exits with a code."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")

    def run(seconds, code):
        for name in ("Makefile", "setup.cfg", "pyproject.toml"):
            shutil.copy(ROOT / name, tmp_path)
        python = tmp_path / "python"
        python.write_text(PYTHON.replace("SECONDS", str(seconds)).replace("CODE", str(code)))
        python.chmod(0o755)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        return subprocess.run(
            ["make", "demo", f"PYTHON={python}"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
        )

    return run


def test_a_failed_installation_shows_the_message_and_the_code_of_pip_and_is_tried_again(install, tmp_path):
    done = install(0, 3)
    assert done.returncode == 2
    assert "ERROR: pip says why" in done.stderr
    assert "Error 3" in done.stderr
    assert not (tmp_path / ".venv" / ".installed-core").exists()


def test_the_gpu_is_measured_with_the_environment_or_else_with_the_python_of_the_machine(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    shutil.copy(ROOT / "Makefile", tmp_path)

    def commands() -> str:
        words = ["make", "--dry-run", "gpu", "PYTHON=python3.99", "ARGS=--rehearse"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        return subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout

    assert commands() == "python3.99 -m benchmarks.gpu run --rehearse\n"
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    assert commands() == ".venv/bin/python -m benchmarks.gpu run --rehearse\n"


@pytest.mark.slow
def test_an_installation_that_takes_long_shows_the_elapsed_time(install):
    done = install(9, 1)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("installing the core packages")
    assert [line for line in lines if line.endswith(" s")] == ["  4 s", "  8 s"]
