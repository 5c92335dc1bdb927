"""Runs recognize the checkpoint that they started from by its content: copied, moved, trained further, or gone."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from gpt_jax.config import FinetuneRunConfig, InitConfig, PretrainConfig, TransferConfig
from gpt_jax.errors import UserError
from gpt_jax.runtime.rundir import RunDir, read_json, write_atomic
from gpt_jax.train import checkpoint_info
from gpt_jax.train.restore import check_start, describe_start

FIXTURES = Path(__file__).parents[1] / "fixtures"


def fail(line):
    raise AssertionError(f"nothing should have been logged, but: {line}")


def attempt(run_folder, path, allow_changes=False, kind=FinetuneRunConfig):
    """Starts or resumes a run as trainings do; returns what it records about its start."""
    run = RunDir(run_folder)
    check_start(run, str(path), allow_changes)
    if not run.records() and str(path) not in ("", "none"):
        run.start = describe_start(checkpoint_info.find_checkpoint(Path(path), fail))
    init = TransferConfig(str(path)) if kind is FinetuneRunConfig else InitConfig(str(path))
    run.open(kind(init=init), "d0")
    run.record("train", 1, loss=1.0)
    run.close()
    return read_json(run_folder / "config.json")["init"]


@pytest.fixture
def source(tmp_path):
    """The folder of a pre-training with checkpoint 6."""
    return shutil.copytree(FIXTURES / "run_v1", tmp_path / "source")


def add_checkpoint(run, step):
    """Copies the checkpoint of a run as if it were that of another step; returns its folder."""
    [info] = checkpoint_info.list_checkpoints(run)[:1]
    folder = shutil.copytree(info.path, run / "checkpoints" / str(step))
    manifest = checkpoint_info.read_manifest(info) | {"step": step}
    (folder / "manifest.json").write_bytes(checkpoint_info.encode_manifest(manifest))
    return folder


def refusal(run, path):
    before = (run / "config.json").read_bytes()
    with pytest.raises(UserError) as error:
        attempt(run, path)
    assert (run / "config.json").read_bytes() == before
    return str(error.value)


def test_the_start_is_recorded_with_the_fingerprint_of_its_manifest(source, tmp_path):
    start = attempt(tmp_path / "run", source)
    manifest = json.loads((source / "checkpoints" / "6" / "manifest.json").read_text())
    assert (start["step"], start["fingerprint"]) == (6, manifest["sha256"])
    assert len(start["training"]) == 64
    assert attempt(tmp_path / "random", "none") is None


def test_the_same_checkpoint_at_another_path_is_the_same_start(source, tmp_path, monkeypatch):
    start = attempt(tmp_path / "run", source)
    shutil.copytree(source / "checkpoints" / "6", tmp_path / "best-model")
    (tmp_path / "link").symlink_to(source)
    monkeypatch.chdir(tmp_path)
    paths = [f"{source}/", f"{source}/../source", "source", "./source", os.path.relpath(source), "link", "best-model"]
    paths += [source / "checkpoints", source / "checkpoints" / "6", source / "checkpoints" / "6" / "..", "source//checkpoints/6/"]
    for path in paths:
        assert attempt(tmp_path / "run", path) == start
    source.rename("moved")
    for path in ("moved", "moved/checkpoints/6", "source", "link"):  # The last two lead nowhere any more.
        assert attempt(tmp_path / "run", path) == start
    (tmp_path / "run").rename("run-moved")
    assert attempt(tmp_path / "run-moved", "moved") == start


@pytest.mark.parametrize("kind", [FinetuneRunConfig, PretrainConfig])
def test_another_checkpoint_is_refused_unless_changes_are_allowed(source, tmp_path, kind):
    start, other = attempt(tmp_path / "run", source, kind=kind), FIXTURES / "adamw_v1"
    theirs = json.loads((other / "checkpoints" / "6" / "manifest.json").read_text())["sha256"]
    assert refusal(tmp_path / "run", other) == (
        f"{tmp_path}/run contains a run that started from {source} (checkpoint 6, fingerprint {start['fingerprint'][:12]}), but "
        f"--init.from is {other} (checkpoint 6, fingerprint {theirs[:12]}). Use another --workdir, or add --allow-changes if "
        "this is intended"
    )
    assert attempt(tmp_path / "run", other, allow_changes=True, kind=kind)["fingerprint"] == theirs
    assert (
        attempt(tmp_path / "run", other, kind=kind)["fingerprint"] == theirs
    )  # What was allowed once is the start from then on.
    assert f"started from {other} (" in refusal(tmp_path / "run", source)


def test_another_checkpoint_at_the_same_path_is_refused(source, tmp_path):
    attempt(tmp_path / "run", source)
    shutil.rmtree(source)
    shutil.copytree(FIXTURES / "lstm_v1", source)
    assert f"contains a run that started from {source} (checkpoint 6, fingerprint " in refusal(tmp_path / "run", source)


@pytest.mark.parametrize(("kind", "random"), [(FinetuneRunConfig, "none"), (PretrainConfig, "")])
def test_random_parameters_are_another_start(source, tmp_path, kind, random):
    attempt(tmp_path / "run", source, kind=kind)
    assert refusal(tmp_path / "run", random).endswith(
        "), but --init.from is random parameters. Use another --workdir, or add --allow-changes if this is intended"
    )
    attempt(tmp_path / "other", random, kind=kind)
    assert attempt(tmp_path / "other", random, kind=kind) is None
    assert f"started from random parameters, but --init.from is {source} (checkpoint 6," in refusal(tmp_path / "other", source)
    # A path that leads nowhere is not random parameters either.
    assert "but --init.from is nowhere. Use another" in refusal(tmp_path / "other", "nowhere")


def test_a_source_that_was_trained_on_is_the_same_start(source, tmp_path):
    """Its run has deleted the checkpoint by now. Naming another checkpoint is a change, and so is another training."""
    start = attempt(tmp_path / "run", source)
    later = add_checkpoint(source, 8)
    assert attempt(tmp_path / "run", source) == start  # Both are there.
    assert "(checkpoint 8, fingerprint " in refusal(tmp_path / "run", later)
    shutil.rmtree(source / "checkpoints" / "6")
    assert attempt(tmp_path / "run", source) == start
    other = shutil.copytree(FIXTURES / "adamw_v1", tmp_path / "adamw")
    add_checkpoint(other, 8)
    assert "(checkpoint 8, fingerprint " in refusal(tmp_path / "run", other)


def rewrite(info, init="", **entries):
    """Changes what a checkpoint says about its training."""
    config = json.loads((info.path / "config.json").read_text())
    config["init"] = {"from_": init}
    (info.path / "config.json").write_text(json.dumps(config))
    manifest = checkpoint_info.read_manifest(info) | entries
    content = (info.path / "config.json").read_bytes()
    manifest["files"]["config.json"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (info.path / "manifest.json").write_bytes(checkpoint_info.encode_manifest(manifest))


def test_trainings_that_differ_in_more_than_their_config_are_different(source, tmp_path):
    """They may have started from different parameters. Imported models were not trained here at all."""
    attempt(tmp_path / "run", source)
    continued, imported = (shutil.copytree(source, tmp_path / name) for name in ("continued", "imported"))
    rewrite(checkpoint_info.find_checkpoint(continued, fail), init="other")
    assert "started from" in refusal(tmp_path / "run", continued)
    rewrite(checkpoint_info.find_checkpoint(imported, fail), data_digest="")
    attempt(tmp_path / "from-imported", imported)
    other = shutil.copytree(imported, tmp_path / "other")
    assert attempt(tmp_path / "from-imported", other) is not None
    rewrite(checkpoint_info.find_checkpoint(other, fail), metrics={"loss": 1.0})
    assert "started from" in refusal(tmp_path / "from-imported", other)


@pytest.mark.parametrize("what_is_gone", ["all", "checkpoints", "manifest", "nothing is readable"])
def test_what_cannot_be_read_any_more_is_not_compared(source, tmp_path, what_is_gone):
    start = attempt(tmp_path / "run", source)
    manifest = source / "checkpoints" / "6" / "manifest.json"
    if what_is_gone == "all":
        shutil.rmtree(source)
    elif what_is_gone == "checkpoints":
        shutil.rmtree(source / "checkpoints")
    elif what_is_gone == "manifest":
        manifest.unlink()
    else:
        manifest.write_text("{")
    assert attempt(tmp_path / "run", source) == start


def test_a_run_of_an_earlier_version_recorded_only_the_path(source, tmp_path, monkeypatch):
    """A recorded path may still lead to the checkpoint that was there."""
    monkeypatch.chdir(tmp_path)
    attempt(tmp_path / "run", "source")
    stored = read_json(tmp_path / "run" / "config.json")
    del stored["init"]
    write_atomic(tmp_path / "run" / "config.json", json.dumps(stored))
    assert attempt(tmp_path / "run", source) is None
    assert "started from " in refusal(tmp_path / "run", FIXTURES / "adamw_v1")
    assert "is random parameters" in refusal(tmp_path / "run", "none")
    source.rename("moved")
    assert attempt(tmp_path / "run", "moved") is None


@pytest.mark.parametrize("start", [5, [], "", {}, {"step": "6", "fingerprint": "", "training": ""}])
def test_a_record_with_bad_values_is_one_line(source, tmp_path, start):
    attempt(tmp_path / "run", source)
    stored = read_json(tmp_path / "run" / "config.json")
    write_atomic(tmp_path / "run" / "config.json", json.dumps(stored | {"init": start}))
    assert refusal(tmp_path / "run", source).startswith(f"{tmp_path}/run/config.json: 'init")
