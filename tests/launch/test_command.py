"""The words of `gpt-jax launch` and `gpt-jax supervise`."""

import argparse
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from gpt_jax.config.load import config_folder
from gpt_jax.errors import UserError
from gpt_jax.launch import command, gke, local, tpu_vm
from gpt_jax.launch import supervise as supervision
from gpt_jax.launch.job import Job
from gpt_jax.runtime.git_info import Checkout


def launch(*words):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    command.add_launch(parser)
    parser.set_defaults(parser=parser)
    return command.launch(*parser.parse_known_args(words))


def supervise(*words):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    command.add_supervise(parser)
    return command.supervise(*parser.parse_known_args(words))


@pytest.fixture
def submitted(monkeypatch):
    """What reaches the targets, which do nothing; the checkout has no changes."""
    calls = []
    for module in (gke, local, tpu_vm):
        monkeypatch.setattr(module, "submit", lambda job, checked, **own: calls.append((job, checked, own)) or 7)
    monkeypatch.setattr(checkout, "find", lambda: Checkout(Path("."), "c0ffee", b"", ()))
    return calls


def test_the_words_become_a_job(submitted):
    words = "tpu-vm gpt1_1b5 --workdir gs://b/run --accelerator v5e-32 --slices 2 --zone z --project p --spot --preemptions 5"
    overrides = ("--mesh.slice", "2", "--mesh.fsdp", "32", "--mesh.data", "1", "--train.batch-size", "64")
    overrides += ("--data.store", "gs://b/store")
    assert launch(*words.split(), "--crashes", "1", "--grace-seconds", "60", "--delete-on-exit", *overrides) == 7
    ((job, checked, own),) = submitted
    assert job == Job(
        verb="pretrain",
        config="gpt1_1b5",
        overrides=overrides,
        workdir="gs://b/run",
        name="gpt1-1b5",
        accelerator="v5e-32",
        slices=2,
        zone="z",
        project="p",
        spot=True,
        preemptions=5,
        crashes=1,
        grace_seconds=60,
    )
    assert checked.config.train.batch_size == 64
    assert own == {"delete_on_exit": True}


def test_what_is_not_said_has_the_defaults_of_a_job(submitted):
    assert launch("local", "smoke", "--workdir", "RUN") == 7
    ((job, _, own),) = submitted
    assert job == Job("pretrain", "smoke", (), "RUN", "smoke", "cpu-1")
    assert own == {}


def test_a_fine_tuning_is_known_by_its_config(submitted, tmp_path):
    (tmp_path / "Mine.py").write_text(
        "from gpt_jax.config import FinetuneConfig\n\n\ndef config():\n    return FinetuneConfig()\n"
    )
    for config in ("finetune/cola", str(tmp_path / "Mine.py")):
        launch("local", config, "--workdir", "RUN", "--processes", "2", "--seeds", "3", "--init.from", "BASE", "--name", "mine")
    for job, _, own in submitted:
        assert (job.verb, job.name, job.accelerator, job.overrides) == ("finetune", "mine", "cpu-2", ("--init.from", "BASE"))
        assert job.command()[-4:] == ["--seeds", "3", "--init.from", "BASE"]
        assert own == {"processes": 2}


def test_a_dry_run_prints_and_runs_nothing(submitted, tmp_path, capsys):
    assert launch("local", "smoke", "--workdir", str(tmp_path / "run"), "--processes", "2", "--dry-run") == 0
    assert capsys.readouterr().out.count("gpt-jax pretrain smoke") == 2
    assert submitted == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tpuvm smoke", "there is no target 'tpuvm'; did you mean tpu-vm?"),
        ("tpu-vm smoke --workdir gs://b/r", "--accelerator: say on what, as in --accelerator v5e-16"),
        ("tpu-vm smok --accelerator v5e-1", "no config is named 'smok'; did you mean smoke"),
        ("tpu-vm smoke --accelerator v5e-1 --processes 2", "--processes: only local has this; leave it out for tpu-vm"),
        ("tpu-vm smoke --accelerator v5e-1 --processes 1", "--processes: only local has this; leave it out for tpu-vm"),
        ("local smoke --workdir R --processes 0 --dry-run", "--processes: 0 cannot share the 1 devices of cpu-1"),
        ("local smoke --workdir R --seeds 2", "--seeds: goes with a fine-tuning"),
        ("local smoke --delete-on-exit", "--delete-on-exit: only tpu-vm has this; leave it out for local"),
        ("local smoke", "--workdir: say which folder shall hold the run"),
        ("local smoke --workdir R --optim.peak-rl 1", "--optim.peak-rl: no such field; did you mean optim.peak-lr"),
    ],
)
def test_mistakes_are_one_line(submitted, words, message):
    with pytest.raises(UserError) as error:
        launch(*words.split())
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert submitted == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("local smoke --workdir RUN", "uncommitted.diff in the run's folder will say how\n"),
        ("gke smoke --workdir gs://b/r --accelerator cpu-4 --image IMAGE", "the image holds what it was built from\n"),
        (
            "tpu-vm smoke --workdir gs://b/r --accelerator v5e-1 --zone z",
            "uncommitted.diff in the run's folder will say how\n"
            "warning: git does not track a.py, b.py, c.py, ...: the workers will not have that\n",
        ),
    ],
)
def test_uncommitted_changes_are_warned_of(submitted, monkeypatch, capsys, words, said):
    source = Checkout(Path("."), "c0ffee" * 4, b"a difference\n", ("a.py", "b.py", "c.py", "d.py"))
    monkeypatch.setattr(checkout, "find", lambda: source)
    for more in ((), ("--dry-run",)):
        launch(*words.split(), *more)
        assert capsys.readouterr().err == f"warning: files differ from commit c0ffeec0ffee; {said}"


def test_a_config_that_git_does_not_track_does_not_reach_a_tpu_vm(submitted, monkeypatch, tmp_path):
    (tmp_path / "configs" / "my").mkdir(parents=True)
    for name in ("my/own", "old"):
        (tmp_path / "configs" / f"{name}.py").write_text((config_folder() / "smoke.py").read_text())
    monkeypatch.setattr(config_io, "config_folder", lambda: tmp_path / "configs")
    source = Checkout(tmp_path, "c0ffee", b"", ("configs/my/own.py",))
    monkeypatch.setattr(checkout, "find", lambda: source)
    words = ("--workdir", "gs://b/r", "--accelerator", "v5e-1", "--zone", "z")
    for more in ((), ("--dry-run",)):
        with pytest.raises(UserError) as error:
            launch("tpu-vm", "my/own", *words, *more)
        assert (
            str(error.value) == "git does not track configs/my/own.py, so the workers will not have it: git add configs/my/own.py"
        )
    assert submitted == []
    assert launch("tpu-vm", "old", *words) == 7
    assert launch("local", "my/own", "--workdir", "RUN") == 7  # which sees this folder


def test_every_target_takes_the_same(submitted):
    for target in command.TARGETS:
        module = __import__(f"gpt_jax.launch.{target.replace('-', '_')}", fromlist=["render"])
        own = list(command.OWN.get(target, {}))
        assert [*inspect.signature(module.render).parameters] == ["job", "checked", *own], target


def test_what_is_supervised_comes_after_two_dashes(monkeypatch):
    calls = []
    monkeypatch.setattr(supervision, "supervise", lambda *call: calls.append(call) or 42)
    assert supervise("--crashes", "1", "--", "pretrain", "smoke", "--workdir", "RUN", "--crashes", "5") == 42
    assert supervise("--grace-seconds", "9", "demo") == 42
    assert calls == [(["pretrain", "smoke", "--workdir", "RUN", "--crashes", "5"], 100, 1, 120), (["demo"], 100, 3, 9)]


def test_defaults_of_the_words_are_those_of_a_job():
    parser = argparse.ArgumentParser()
    command.add_launch(parser)
    job = Job("pretrain", "", (), "", "", "")
    for name in ("slices", "spot", "preemptions", "crashes", "grace_seconds", "seeds", "image", "queue", "zone", "project"):
        assert parser.get_default(name) == getattr(job, name)


def test_help_needs_nothing_heavy():
    code = (
        "import sys; from gpt_jax.launch import command; print(sorted({'jax', 'tyro', 'yaml', 'tensorflow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
