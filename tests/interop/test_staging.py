"""Folders that appear whole or not at all."""

import os
from pathlib import Path

import pytest

from gpt_jax.errors import UserError
from gpt_jax.interop.staging import staged_folder


@pytest.mark.parametrize("exists", [False, True])
def test_a_staged_folder_is_there_after_the_body(tmp_path, exists):
    out = tmp_path / "a" / "out"
    if exists:
        out.mkdir(parents=True)
    with staged_folder(out, "out") as folder:
        (folder / "file").write_text("content")
        assert not (out / "file").exists()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["a", "a/out", "a/out/file"]


@pytest.mark.parametrize("error", [ValueError("half-way"), KeyboardInterrupt("half-way"), UserError("half-way")], ids=repr)
@pytest.mark.parametrize("out", ["out", "a/b/out"])
def test_a_staged_folder_is_removed_if_the_body_fails(tmp_path, out, error):
    """So are the folders above it that were made for it."""

    def fail():
        with staged_folder(tmp_path / out, "out") as folder:
            (folder / "file").write_text("content")
            raise error

    with pytest.raises(type(error), match="half-way"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_error_names_the_folder_that_the_user_gave(tmp_path):
    def fail():
        with staged_folder(tmp_path / "out", "out") as folder:
            write_to_full_disk(folder / "file")

    def write_to_full_disk(path):
        raise UserError(f"{path}: no space left")

    with pytest.raises(UserError) as caught:
        fail()
    assert str(caught.value) == f"{tmp_path / 'out' / 'file'}: no space left"


def test_a_staged_folder_of_an_earlier_attempt_is_replaced(tmp_path):
    (tmp_path / ".out.tmp" / "content").mkdir(parents=True)
    (tmp_path / ".out.tmp" / "content" / "old").touch()
    with staged_folder(tmp_path / "out", "out") as folder:
        (folder / "new").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_staged_folder_of_another_process_is_not_touched(tmp_path):
    with staged_folder(tmp_path / "out", "out") as folder:
        (folder / "file").write_text("content")
        with pytest.raises(UserError) as caught, staged_folder(tmp_path / "out", "out"):
            pytest.fail("the body ran")
        assert str(caught.value).startswith(f"{tmp_path / 'out'}: in use by process {os.getpid()} on host ")
        assert [path.name for path in folder.iterdir()] == ["file"]
    assert (tmp_path / "out" / "file").read_text() == "content"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_was_filled_in_the_meantime_is_not_replaced(tmp_path):
    def export():
        with staged_folder(tmp_path / "out", "out") as folder:
            (folder / "file").write_text("content")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "other").touch()

    with pytest.raises(OSError, match="out"):
        export()
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == ["out", "out/other"]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
    def error_of(out):
        with pytest.raises(UserError) as caught, staged_folder(out, "workdir"):
            pytest.fail("the body ran")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    file = tmp_path / "file"
    file.write_text("content")
    hint = "is not empty; name a folder that is empty or does not exist"
    assert error_of(file) == f"--workdir: {file} {hint}"
    assert error_of(tmp_path) == f"--workdir: {tmp_path} {hint}"
    assert error_of(file / "below") == f"--workdir: {file / 'below'} cannot be created (Not a directory)"
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert error_of(Path()) == f"--workdir: {tmp_path / 'empty'} is the current folder; name one below it"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]
    assert file.read_text() == "content"
