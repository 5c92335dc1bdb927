"""The Dockerfile: what it copies, the versions that it installs, and its user. These tests read it and need no docker."""

import configparser
import fnmatch
import json
import re
import shlex
from pathlib import Path

import pytest

from gpt_jax.launch import gke

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def instructions():
    """Each instruction with its arguments, without comments and with continued lines joined."""
    text = (ROOT / "launch" / "Dockerfile").read_text()
    text = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    return [tuple(line.split(None, 1)) for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def arguments(instructions, name):
    """Returns the arguments of every instruction of one kind."""
    return [words for instruction, words in instructions if instruction == name]


def pip_commands(instructions):
    commands = [part.strip() for words in arguments(instructions, "RUN") for part in re.split(r"&&|;;|;", words)]
    return [shlex.split(command) for command in commands if command.startswith("pip install")]


def test_the_base_has_a_full_version_whose_lock_is_installed(instructions):
    (image,) = arguments(instructions, "FROM")
    version = re.fullmatch(r"python:(\d+)\.(\d+)\.\d+-slim-[a-z]+", image)
    lock = f"constraints/py{version[1]}{version[2]}.txt"
    assert (ROOT / lock).is_file()
    assert all(lock in command for command in pip_commands(instructions))


def test_every_package_is_installed_in_its_locked_version(instructions):
    commands = pip_commands(instructions)
    assert len(commands) == 2
    for words in commands:
        assert words[words.index("--constraint") + 1] == "constraints/py312.txt"
    pins = {line.split("==")[0] for line in (ROOT / "constraints" / "py312.txt").read_text().splitlines()}
    assert {"setuptools", "jax", "jaxlib", "ftfy", "spacy"} <= pins
    assert "--no-build-isolation" in commands[1]  # With isolation, the build would download another setuptools.


def test_the_variants_are_extras_of_the_package(instructions):
    (script,) = [words for words in arguments(instructions, "RUN") if "pip install" in words]
    variants = dict(re.findall(r"(\w+)\) extras=([\w,]+)", script))
    assert variants == {"tpu": "tpu,gpt1", "cuda": "cuda,gpt1", "cpu": "gpt1"}
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert {extra for extras in variants.values() for extra in extras.split(",")} <= setup["options.extras_require"].keys()
    assert "*) echo" in script  # Any other variant ends the build.
    assert "VARIANT=tpu" in arguments(instructions, "ARG")


def ignored(path):
    """Returns whether .dockerignore excludes a path of the checkout; the last pattern that matches decides."""
    excluded = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            matches = any(fnmatch.fnmatch(str(part), pattern) for part in (path, *path.parents))
            if matches or (pattern.startswith("**/") and pattern[3:] in path.parts):
                excluded = not line.startswith("!")
    return excluded


def test_the_image_copies_what_the_installation_needs_and_nothing_else(instructions):
    copied = {source for words in arguments(instructions, "COPY") for source in words.split()[:-1]}
    assert all((ROOT / source).exists() and not ignored(Path(source)) for source in copied)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    folders = {"gpt_jax"} | {line.split("=")[1].strip() for line in setup["options"]["package_dir"].split("\n") if line}
    needed = folders | {"setup.cfg", "pyproject.toml", "README.md", "LICENSE", "constraints"}
    assert copied == needed
    assert all(
        ignored(Path(path)) for path in (".git", ".venv/bin/python", "runs/a", "tests/conftest.py", "gpt_jax/__pycache__/a.pyc")
    )
    assert not ignored(Path("gpt_jax/cli.py"))


def test_the_image_runs_gpt_jax_as_the_user_of_the_pods(instructions):
    assert arguments(instructions, "USER") == [str(gke.USER)]
    assert [name for name, _ in instructions].index("USER") > max(
        number for number, (name, _) in enumerate(instructions) if name in ("RUN", "COPY")
    )
    assert any(f"useradd --uid {gke.USER} " in words for words in arguments(instructions, "RUN"))
    assert [json.loads(words) for words in arguments(instructions, "ENTRYPOINT")] == [["gpt-jax"]]
