"""The Dockerfile takes what it should from the checkout, in locked versions, and runs as nobody special. No docker is needed."""

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
    """(instruction, its words) of each line, continued lines joined, comments dropped."""
    text = (ROOT / "launch" / "Dockerfile").read_text()
    text = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    return [tuple(line.split(None, 1)) for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def only(instructions, name):
    return [words for instruction, words in instructions if instruction == name]


def test_the_base_has_a_full_version_that_matches_the_lock(instructions):
    (image,) = only(instructions, "FROM")
    name, _, tag = image.partition(":")
    assert name == "python"
    assert re.fullmatch(r"3\.12\.\d+-slim-[a-z]+", tag)
    assert "constraints/py312.txt holds the versions of all Python packages" in (ROOT / "launch" / "Dockerfile").read_text()


def installs(instructions):
    commands = [part.strip() for words in only(instructions, "RUN") for part in re.split(r"&&|;;|;", words)]
    return [shlex.split(command) for command in commands if command.startswith("pip install")]


def test_every_package_comes_in_its_locked_version(instructions):
    commands = installs(instructions)
    assert len(commands) == 2
    for words in commands:
        assert words[words.index("--constraint") + 1] == "constraints/py312.txt"
    pins = {line.split("==")[0] for line in (ROOT / "constraints" / "py312.txt").read_text().splitlines()}
    assert {"setuptools", "jax", "jaxlib", "ftfy", "spacy"} <= pins
    assert "--no-build-isolation" in commands[1]  # which would fetch a setuptools of its own


def test_variants_are_extras_of_the_package(instructions):
    (script,) = [words for words in only(instructions, "RUN") if "pip install" in words]
    variants = dict(re.findall(r"(\w+)\) extras=([\w,]+)", script))
    assert variants == {"tpu": "tpu,gpt1", "cuda": "cuda,gpt1", "cpu": "gpt1"}
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert {extra for extras in variants.values() for extra in extras.split(",")} <= setup["options.extras_require"].keys()
    assert "*) echo" in script  # any other variant ends the build
    assert "VARIANT=tpu" in only(instructions, "ARG")


def ignored(path):
    """Whether .dockerignore keeps a path of the checkout out, by its last pattern that fits."""
    out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            fits = any(fnmatch.fnmatch(str(part), pattern) for part in (path, *path.parents))
            if fits or (pattern.startswith("**/") and pattern[3:] in path.parts):
                out = not line.startswith("!")
    return out


def test_the_image_takes_what_an_install_needs_and_nothing_else(instructions):
    copied = {source for words in only(instructions, "COPY") for source in words.split()[:-1]}
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


def test_it_runs_gpt_jax_as_the_user_that_pods_run_as(instructions):
    assert only(instructions, "USER") == [str(gke.USER)]
    assert [name for name, _ in instructions].index("USER") > max(
        number for number, (name, _) in enumerate(instructions) if name in ("RUN", "COPY")
    )
    assert any(f"useradd --uid {gke.USER} " in words for words in only(instructions, "RUN"))
    assert [json.loads(words) for words in only(instructions, "ENTRYPOINT")] == [["gpt-jax"]]
