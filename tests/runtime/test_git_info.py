"""The checkout that a run came from."""

import hashlib
import subprocess

import pytest

from gpt_jax.config import PretrainConfig
from gpt_jax.runtime import git_info
from gpt_jax.runtime.rundir import RunDir


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with one file of one commit, which the package seems to run from; returns a way to run git there."""

    def git(*words):
        command = ["git", "-C", tmp_path / "clone", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, check=True, capture_output=True).stdout

    module = tmp_path / "clone" / "gpt_jax" / "checkout.py"
    module.parent.mkdir(parents=True)
    module.write_bytes(b"one, \xe9\n")  # no UTF-8
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    monkeypatch.setattr(checkout, "__file__", str(module))
    git.module = module
    return git


def test_a_clean_checkout_is_its_commit(repository):
    found = git_info.find()
    assert found.commit == repository("rev-parse", "HEAD").decode().strip() == found.version
    assert (found.diff, found.untracked) == (b"", ())


def test_what_differs_is_kept_as_git_applies_it(repository):
    repository("config", "diff.noprefix", "true")
    repository("config", "color.ui", "always")
    changed = b"two, \xe8\x00\n"
    repository.module.write_bytes(changed)
    (repository.module.parent / "new.py").touch()
    found = git_info.find()
    assert found.untracked == ("gpt_jax/new.py",)
    assert found.version == f"{found.commit}+{hashlib.sha256(found.diff).hexdigest()[:8]}"
    repository("checkout", "--quiet", ".")
    subprocess.run(["git", "-C", found.folder, "apply"], input=found.diff, check=True)
    assert repository.module.read_bytes() == changed


def test_without_a_checkout_the_environment_says_the_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(checkout, "__file__", str(tmp_path / "site-packages" / "gpt_jax" / "checkout.py"))
    assert git_info.find().version == ""
    monkeypatch.setenv("GPT_JAX_COMMIT", "c0ffee")
    assert git_info.find().version == "c0ffee"
    (tmp_path / "a.diff").write_bytes(b"a diff")
    monkeypatch.setenv("GPT_JAX_DIFF", str(tmp_path / "a.diff"))
    assert git_info.find().version == f"c0ffee+{hashlib.sha256(b'a diff').hexdigest()[:8]}"


def test_a_run_keeps_what_differed_from_its_commit(repository, tmp_path):
    def attempt():
        run = RunDir(tmp_path / "run")
        run.open(PretrainConfig(), "d" * 64)
        run.close()

    repository.module.write_text("two\n")
    attempt()
    assert (tmp_path / "run" / "uncommitted.diff").read_bytes() == git_info.find().diff != b""
    repository("checkout", "--quiet", ".")
    attempt()
    assert not (tmp_path / "run" / "uncommitted.diff").exists()
