"""The git checkout that a run comes from."""

import hashlib
import subprocess

import pytest

from gpt_jax.config import PretrainConfig
from gpt_jax.runtime import git_info
from gpt_jax.runtime.git_info import find_checkout
from gpt_jax.runtime.rundir import RunDir


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A function that runs git in a repository of one file and one commit, from which the package seems to run."""

    def git(*words):
        command = ["git", "-C", tmp_path / "clone", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, check=True, capture_output=True).stdout

    module = tmp_path / "clone" / "gpt_jax" / "runtime" / "git_info.py"
    module.parent.mkdir(parents=True)
    module.write_bytes(b"one, \xe9\n")  # not UTF-8
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    monkeypatch.setattr(git_info, "__file__", str(module))
    git.module = module
    return git


def test_a_clean_checkout_is_its_commit(repository):
    checkout = find_checkout()
    assert checkout.commit == repository("rev-parse", "HEAD").decode().strip() == checkout.version
    assert (checkout.diff, checkout.untracked) == (b"", ())


def test_changes_are_kept_in_a_form_that_git_applies(repository):
    repository("config", "diff.noprefix", "true")
    repository("config", "color.ui", "always")
    changed = b"two, \xe8\x00\n"
    repository.module.write_bytes(changed)
    (repository.module.parent / "new.py").touch()
    checkout = find_checkout()
    assert checkout.untracked == ("gpt_jax/runtime/new.py",)
    assert checkout.version == f"{checkout.commit}+{hashlib.sha256(checkout.diff).hexdigest()[:8]}"
    repository("checkout", "--quiet", ".")
    subprocess.run(["git", "-C", checkout.folder, "apply"], input=checkout.diff, check=True)
    assert repository.module.read_bytes() == changed


def test_without_a_checkout_the_environment_names_the_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(git_info, "__file__", str(tmp_path / "site-packages" / "gpt_jax" / "runtime" / "git_info.py"))
    for name in ("GPT_JAX_COMMIT", "GPT_JAX_DIFF"):
        monkeypatch.delenv(name, raising=False)
    assert find_checkout().version == ""
    monkeypatch.setenv("GPT_JAX_COMMIT", "c0ffee")
    assert find_checkout().version == "c0ffee"
    (tmp_path / "a.diff").write_bytes(b"a diff")
    monkeypatch.setenv("GPT_JAX_DIFF", str(tmp_path / "a.diff"))
    assert find_checkout().version == f"c0ffee+{hashlib.sha256(b'a diff').hexdigest()[:8]}"


def test_a_run_keeps_its_uncommitted_changes(repository, tmp_path):
    def attempt():
        run = RunDir(tmp_path / "run")
        run.open(PretrainConfig(), "d" * 64)
        run.close()

    repository.module.write_text("two\n")
    attempt()
    assert (tmp_path / "run" / "uncommitted.diff").read_bytes() == find_checkout().diff != b""
    repository("checkout", "--quiet", ".")
    attempt()
    assert not (tmp_path / "run" / "uncommitted.diff").exists()
