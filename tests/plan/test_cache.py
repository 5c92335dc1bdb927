"""Reports are found again by everything that they depend on, without JAX; a folder or file that does not work is ignored."""

import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys

import pytest

from gpt_jax.config.load import config_to_dict, load_config
from gpt_jax.plan import cache
from gpt_jax.plan.cache import cache_folder, cache_key, read, write
from gpt_jax.plan.command import find_report
from gpt_jax.plan.workload import pretraining
from gpt_jax.runtime.accelerators import parse_accelerator


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """The folder of the reports, which does not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gpt_jax" / "plans"


def key(**changes):
    return cache_key(**pretraining(load_config("mini")).facts() | {"accelerator": "v5e-4", "slices": 1} | changes)


def test_the_folder_is_the_users(monkeypatch, folder):
    assert cache_folder() == folder
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(cache_folder()) == "/home/someone/.cache/gpt_jax/plans"


def test_the_key_depends_on_the_config_and_the_hardware():
    config = load_config("mini")
    larger = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=16))
    keys = [key(), key(config=config_to_dict(larger)), key(accelerator="v5e-8"), key(slices=2)]
    assert len(set(keys)) == 4
    assert key() == keys[0]


@pytest.mark.parametrize("package", ["jax", "libtpu"])
def test_the_key_depends_on_versions(monkeypatch, package):
    before, installed = key(), importlib.metadata.distributions

    def distributions(name):
        return [type("Distribution", (), {"version": "99"})] if name == package else installed(name=name)

    monkeypatch.setattr(importlib.metadata, "distributions", distributions)
    assert key() != before


def test_the_key_depends_on_the_source_code(monkeypatch, tmp_path):
    before = key()
    package = tmp_path / "gpt_jax"
    for name in ("plan/cache.py", "model/network.py", "plan/table.json"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("1\n")
    monkeypatch.setattr(cache, "__file__", str(package / "plan" / "cache.py"))
    keys = [before, key()]
    (package / "model" / "network.py").write_text("2\n")
    keys.append(key())
    (package / "plan" / "table.json").write_text("2\n")
    keys.append(key())
    assert len(set(keys)) == 4
    (package / "plan" / "notes.txt").write_text("2\n")
    assert key() == keys[-1]


def test_the_config_may_have_another_name(folder):
    report = {"config": "mini", "time": {"step": 1.5}}
    write(key(), report)
    found = find_report("renamed.py", pretraining(load_config("mini")), parse_accelerator("v5e-4"), 1)
    assert found == {"config": "renamed.py", "time": {"step": 1.5}}


@pytest.mark.parametrize("text", ["", '{"time": {"step": 1', "[1, 2]", "null", b"\xff\xfe\x00"])
def test_a_file_that_cannot_be_read_is_ignored(folder, text):
    write("key", {"version": 1})
    assert read("key") == {"version": 1}
    (folder / "key.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert read("key") is None


def test_a_folder_that_cannot_be_made_is_ignored(folder):
    folder.parent.parent.write_text("a file, not a folder")
    write("key", {"version": 1})
    assert read("key") is None


def test_a_file_that_cannot_be_replaced_is_ignored(folder):
    (folder / "key.json").mkdir(parents=True)
    write("key", {"version": 1})
    assert read("key") is None


def test_the_oldest_reports_are_deleted(monkeypatch, folder):
    monkeypatch.setattr(cache, "KEPT", 3)
    for number in range(5):
        write(str(number), {"number": number})
        os.utime(folder / f"{number}.json", (number, number))
    write("new", {"number": 5})
    assert sorted(path.name for path in folder.iterdir()) == ["3.json", "4.json", "new.json"]


def test_a_report_in_the_cache_needs_neither_jax_nor_libtpu(folder):
    report = {"config": "mini", "time": {"step": 1.5}}
    write(key(), report)
    code = """
import sys
from gpt_jax.config.load import load_config
from gpt_jax.plan.command import find_report
from gpt_jax.plan.workload import pretraining
from gpt_jax.runtime.accelerators import parse_accelerator
import json
print(json.dumps(find_report("mini", pretraining(load_config("mini")), parse_accelerator("v5e-4"), 1)))
print(" ".join({"jax", "jaxlib", "libtpu", "tensorflow", "numpy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    found, modules = done.stdout.splitlines()
    assert json.loads(found) == report
    assert not {"jax", "jaxlib", "libtpu"} & set(modules.split())
