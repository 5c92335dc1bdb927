"""Configs written as Python files are read back as the same configs, and look like those under configs/."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpt_jax.config import DistributedConfig, MeshConfig, ProfileConfig
from gpt_jax.config.load import config_folder, config_names, load_config
from gpt_jax.plan.config_source import config_source
from tests.tiny import replace_fields

NAMES = [name for name in config_names() if not name.startswith("finetune/")]
PROMPTS = ('It "was"', "it's", "ünïcode \n\t\\ {x}", "a" * 100, "b" * 80)


def configs():
    yield from (load_config(name) for name in NAMES)
    demo = load_config("demo")
    yield replace_fields(demo, train={"prompts": PROMPTS}, data={"source": "/" + "z" * 150})
    everything = {
        "distributed": DistributedConfig(coordinator="host:1", num_processes=2, process_id=0),
        "profile": ProfileConfig(steps="1:2"),
        "mesh": MeshConfig(data=2, fsdp=8),
        "init": {"from_": "runs/x"},
    }
    sections = {name: value if isinstance(value, dict) else vars(value) for name, value in everything.items()}
    yield replace_fields(demo, train={"prompts": ("one",)}, model={"remat": "dots"}, **sections)


@pytest.mark.parametrize("config", list(configs()))
def test_the_file_gives_the_config_and_is_formatted(monkeypatch, tmp_path, config):
    monkeypatch.chdir(tmp_path)
    path = Path("saved.py")  # The header names it, and its line must not be too long.
    path.write_text(config_source(config, path, 'A "config" with \\ in its name.'), encoding="utf-8")
    assert load_config(str(path)) == config
    assert ast.get_docstring(ast.parse(path.read_text())).startswith('A "config" with \\ in its name.\n\n    gpt-jax pretrain ')
    if not shutil.which("ruff", path=f"{sys.prefix}/bin"):
        pytest.skip("ruff is not installed")
    root = config_folder().resolve().parent
    for words in (["format", "--check"], ["check"]):
        command = [f"{sys.prefix}/bin/ruff", *words, "--config", str(root / "pyproject.toml"), str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_numbers_are_written_as_in_the_configs():
    text = config_source(load_config("gpt1_1b5"), config_folder() / "x.py", "A config.")
    assert re.search(r"\bvocab_size=50_000\b", text)
    assert re.search(r"\bcontext_length=1024\b", text)


def test_the_command_names_the_file_as_the_command_line_does(tmp_path):
    config = load_config("gpt1")

    def command(path, config=config):
        return config_source(config, path, "A config.").splitlines()[2].strip()

    assert command(config_folder() / "large.py") == "gpt-jax pretrain large --data.store STORE --workdir RUN"
    assert command(tmp_path / "large.py") == f"gpt-jax pretrain {tmp_path}/large.py --data.store STORE --workdir RUN"
    assert command(tmp_path / "a b.py") == f"gpt-jax pretrain '{tmp_path}/a b.py' --data.store STORE --workdir RUN"
    assert command(config_folder() / "x.py", load_config("demo")) == "gpt-jax pretrain x --workdir RUN"
