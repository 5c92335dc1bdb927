"""The arguments of `gpt-jax launch` and `gpt-jax supervise`, and what is called for them."""

import argparse
import dataclasses
import inspect
import itertools
import os
import re
import shlex
import subprocess
import sys

import pytest

from gpt_jax.config import load
from gpt_jax.errors import UserError
from gpt_jax.launch import command, gke, local, tpu_vm
from gpt_jax.launch import supervise as supervision
from gpt_jax.launch.job import Job
from gpt_jax.runtime import git_info
from gpt_jax.runtime.accelerators import parse_accelerator
from gpt_jax.runtime.git_info import Checkout


def launch(*words):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    command.add_launch(parser)
    return command.launch(*parser.parse_known_args(words))


def supervise(*words):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    command.add_supervise(parser)
    return command.supervise(*parser.parse_known_args(words))


@pytest.fixture
def submitted(monkeypatch, tmp_path):
    """The jobs that reach a target, which does nothing with them; the checkout has no changes."""
    jobs = []
    for module in (gke, local, tpu_vm):
        monkeypatch.setattr(module, "submit", lambda job: jobs.append(job) or 7)
    monkeypatch.setattr(git_info, "find_checkout", lambda: Checkout(tmp_path, "c0ffee", b"", ()))
    return jobs


def test_the_arguments_become_a_job(submitted):
    words = "tpu-vm gpt1_1b5 --workdir gs://b/run --accelerator v5e-32 --slices 2 --zone us-west4-a --project p --spot"
    overrides = ("--mesh.slice", "2", "--mesh.fsdp", "32", "--mesh.data", "1", "--train.batch-size", "64")
    overrides += ("--data.store", "gs://b/store")
    words += " --preemptions 5 --crashes 1 --grace-seconds 60 --delete-on-exit"
    assert launch(*words.split(), *overrides) == 7
    expected = Job(
        verb="pretrain",
        config="gpt1_1b5",
        overrides=overrides,
        workdir="gs://b/run",
        name="gpt1-1b5",
        accelerator=parse_accelerator("v5e-32"),
        slices=2,
        zone="us-west4-a",
        project="p",
        spot=True,
        preemptions=5,
        crashes=1,
        grace_seconds=60,
        delete_on_exit=True,
    )
    assert submitted == [expected]


def test_options_that_are_left_out_have_the_defaults_of_a_job(submitted):
    assert launch("local", "smoke", "--workdir", "RUN") == 7
    assert submitted == [Job("pretrain", "smoke", (), os.path.abspath("RUN"), "smoke", parse_accelerator("cpu-1"))]


def test_a_fine_tuning_is_recognized_by_its_config(submitted, tmp_path):
    (tmp_path / "Mine.py").write_text(
        "from gpt_jax.config import FinetuneConfig\n\n\ndef config():\n    return FinetuneConfig()\n"
    )
    for config in ("finetune/cola", str(tmp_path / "Mine.py")):
        launch("local", config, "--workdir", "RUN", "--processes", "2", "--seeds", "3", "--init.from", "BASE", "--name", "mine")
    assert len(submitted) == 2
    for job in submitted:
        assert (job.verb, job.name, job.accelerator.name) == ("finetune", "mine", "cpu-2")
        assert job.overrides == ("--init.from", os.path.abspath("BASE"))
        assert job.command()[-4:] == ["--seeds", "3", "--init.from", os.path.abspath("BASE")]
        assert job.processes == 2


def test_a_dry_run_prints_and_runs_nothing(submitted, tmp_path, capsys):
    assert launch("local", "smoke", "--workdir", str(tmp_path / "run"), "--processes", "2", "--dry-run") == 0
    assert capsys.readouterr().out.count("gpt-jax pretrain smoke") == 2
    assert submitted == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tpuvm smoke", "there is no target 'tpuvm'; did you mean tpu-vm?"),
        ("tpu-vm smoke --workdir gs://b/r", "--accelerator: name the hardware, for example --accelerator v5e-16"),
        ("tpu-vm smok --accelerator v5e-1", "no config is named 'smok'; did you mean smoke"),
        ("tpu-vm smoke --accelerator v5e-1 --processes 2", "--processes: only local takes it; leave it out for tpu-vm"),
        ("tpu-vm smoke --accelerator v5e-1 --processes 1", "--processes: only local takes it; leave it out for tpu-vm"),
        ("local smoke --workdir R --processes 0 --dry-run", "--processes: 0 cannot share the 1 devices of cpu-1"),
        ("local smoke --workdir R --seeds 2", "--seeds: applies to fine-tuning"),
        ("local smoke --delete-on-exit", "--delete-on-exit: only tpu-vm takes it; leave it out for local"),
        ("local smoke", "--workdir: name the folder for the run"),
        ("local smoke --workdir R --optim.peak-rl 1", "--optim.peak-rl: no such field; did you mean optim.peak-lr"),
    ],
)
def test_mistakes_are_reported_in_one_line(submitted, words, message):
    with pytest.raises(UserError) as error:
        launch(*words.split())
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert submitted == []


@pytest.mark.parametrize(
    ("words", "warning"),
    [
        ("local smoke --workdir RUN", "the run keeps them as uncommitted.diff\n"),
        ("gke smoke --workdir gs://b/r --accelerator cpu-4 --image IMAGE", "the image contains the files it was built from\n"),
        (
            "tpu-vm smoke --workdir gs://b/r --accelerator v5e-1 --zone us-west4-a",
            "the run keeps them as uncommitted.diff\n"
            "warning: git does not track a.py, b.py, c.py, ...; the workers will not have these files\n",
        ),
    ],
)
def test_uncommitted_changes_cause_a_warning(submitted, monkeypatch, tmp_path, capsys, words, warning):
    changed = Checkout(tmp_path, "c0ffee" * 4, b"a difference\n", ("a.py", "b.py", "c.py", "d.py"))
    monkeypatch.setattr(git_info, "find_checkout", lambda: changed)
    for more in ((), ("--dry-run",)):
        launch(*words.split(), "--no-plan", *more)
        assert capsys.readouterr().err == f"warning: files differ from commit c0ffeec0ffee; {warning}"


def test_a_config_that_git_does_not_track_does_not_reach_a_tpu_vm(submitted, monkeypatch, tmp_path):
    (tmp_path / "configs" / "my").mkdir(parents=True)
    for name in ("my/own", "old"):
        (tmp_path / "configs" / f"{name}.py").write_text((load.config_folder() / "smoke.py").read_text())
    for module in (load, tpu_vm):
        monkeypatch.setattr(module, "config_folder", lambda: tmp_path / "configs")
    monkeypatch.setattr(git_info, "find_checkout", lambda: Checkout(tmp_path, "c0ffee", b"", ("configs/my/own.py",)))
    words = ("--workdir", "gs://b/r", "--accelerator", "v5e-1", "--zone", "us-west4-a")
    message = "configs/my/own.py is not tracked by git, so the workers would not have it; run git add configs/my/own.py"
    for more in ((), ("--dry-run",)):
        with pytest.raises(UserError) as error:
            launch("tpu-vm", "my/own", *words, *more)
        assert str(error.value) == message
    assert submitted == []
    assert launch("tpu-vm", "old", *words) == 7
    assert launch("local", "my/own", "--workdir", "RUN") == 7  # which sees this folder


@pytest.mark.parametrize("target", ["slurm", "local"])
def test_all_paths_are_absolute_where_the_processes_see_this_machines_files(monkeypatch, tmp_path, capsys, target):
    """A batch file may be submitted from another folder, and its commands may be run there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    text = (load.config_folder() / "smoke.py").read_text()
    config = re.sub("DataConfig\\(", 'DataConfig(store="made/store", ', text, count=1)
    assert config != text
    (tmp_path / "mine.py").write_text(config)
    (tmp_path / "finetune.py").write_text("from gpt_jax.config import *\n\n\ndef config():\n    return FinetuneConfig()\n")
    words = "--data.source=texts/*.txt --data.tokenizer.path ~/vocabulary --optim.peak-lr 1e-3 --accelerator cpu-2 --dry-run"
    assert launch(target, "mine.py", "--workdir", "runs/my run", *words.split()) == 0
    words = "--workdir tuned --init.from none --init.like gpt1 --init.tokenizer vocab --task.name cola"
    words += " --task.path=./glue/../glue/CoLA --accelerator cpu-2 --dry-run"
    assert launch(target, "finetune.py", *words.split()) == 0
    printed = capsys.readouterr().out
    for path in ("runs/my run/logs", "mine.py", "texts/*.txt", "home/vocabulary", "made/store", "tuned", "finetune.py", "vocab"):
        assert f"{tmp_path}/{path}" in printed, path
    assert "--init.from none --init.like gpt1" in printed
    lines = printed.replace("\\\n", " ").splitlines()
    (first, second) = [shlex.split(line) for line in lines if re.search("gpt-jax (pretrain|finetune)", line)]
    for command_line, paths in ((first, 5), (second, 4)):
        names = ("--workdir", "--data.source", "--data.store", "--data.tokenizer.path", "--init.tokenizer", "--task.path")
        joined = [word.partition("=")[2] for word in command_line if word.partition("=")[0] in names and "=" in word]
        apart = [value for name, value in itertools.pairwise(command_line) if name in names]
        config = command_line[command_line.index("--workdir") - 1]
        assert len([*joined, *apart, config]) == paths
        assert all(path.startswith("/") for path in (*joined, *apart, config))


ZONES = "tpu-vm smoke --workdir gs://b/r --accelerator v5e-1", "gke smoke --workdir gs://b/r --accelerator v5e-4 --image I"


@pytest.mark.parametrize("words", [*ZONES, "sky smoke --workdir gs://b/r --accelerator cpu-4 --image I"])
@pytest.mark.parametrize("region", ["us-central1", "europe-west4", "northamerica-northeast1", "me-central2"])
def test_a_region_is_not_a_zone(submitted, words, region):
    with pytest.raises(UserError) as error:
        launch(*words.split(), "--zone", region, "--dry-run")
    assert str(error.value) == f"--zone: '{region}' is a region; name one of its zones, for example {region}-a"


@pytest.mark.parametrize("words", ZONES)
@pytest.mark.parametrize(
    "zone", ["us-central-1a", "us-central1a", "central1-a", "us-central1-a-", "us-east-1a", "a", "us-central1-aa"]
)
def test_what_cannot_be_a_zone_of_google_cloud_is_refused_there(submitted, words, zone):
    with pytest.raises(UserError) as error:
        launch(*words.split(), "--zone", zone, "--dry-run")
    assert str(error.value) == f"--zone: '{zone}' is not a zone of Google Cloud, such as us-central1-a"


@pytest.mark.parametrize("words", ZONES)
@pytest.mark.parametrize("zone", ["us-central1-a", "us-east5-b", "australia-southeast1-c", "me-central2-a", "us-central1-ai1a"])
def test_zones_of_google_cloud_are_accepted(submitted, capsys, words, zone):
    assert launch(*words.split(), "--zone", zone, "--dry-run") == 0
    assert zone in capsys.readouterr().out


def test_zones_of_other_clouds_are_accepted_by_sky_but_not_their_regions(submitted, capsys):
    words = ("sky", "smoke", "--workdir", "gs://b/r", "--accelerator", "cpu-4", "--image", "I", "--dry-run", "--zone")
    for zone in ("us-east-1a", "us-gov-west-1b", "us-west-2-lax-1a", "1"):
        assert launch(*words, zone) == 0
        assert f"zone: {zone}" in capsys.readouterr().out.replace("'", "")
    with pytest.raises(UserError, match="--zone: 'us-east-1' is a region; name one of its zones, for example us-east-1a"):
        launch(*words, "us-east-1")


def test_all_targets_have_the_same_interface():
    for name in command.TARGETS:
        target = __import__(f"gpt_jax.launch.{name.replace('-', '_')}", fromlist=["render"])
        for function in (target.check, target.render):
            assert [*inspect.signature(function).parameters] == ["job"], name
        assert next(iter(inspect.signature(target.submit).parameters)) == "job", name
        assert set(target.UNSUPPORTED) <= command.OPTIONS.keys(), name
        assert set(target.MOUNTS) <= {"/gcs/", "/mnt/"}, name


def test_the_supervised_command_follows_two_dashes(monkeypatch):
    calls = []
    monkeypatch.setattr(supervision, "supervise", lambda *call: calls.append(call) or 42)
    assert supervise("--crashes", "1", "--", "pretrain", "smoke", "--workdir", "RUN", "--crashes", "5") == 42
    assert supervise("--grace-seconds", "9", "demo") == 42
    assert calls == [(["pretrain", "smoke", "--workdir", "RUN", "--crashes", "5"], 100, 1, 120), (["demo"], 100, 3, 9)]


def test_every_option_of_a_job_is_an_argument_with_a_help_text():
    parser = argparse.ArgumentParser()
    command.add_launch(parser)
    helps = {action.dest: action.help for action in parser._actions}
    fields = {field.name for field in dataclasses.fields(Job)} - {"verb", "overrides"}
    assert fields <= helps.keys()
    assert all(helps.values())
    assert {
        name: parser.get_default(name) for name in ("slices", "spot", "preemptions", "crashes", "grace_seconds", "seeds")
    } == {"slices": 1, "spot": False, "preemptions": 100, "crashes": 3, "grace_seconds": 120, "seeds": 1}
    assert {parser.get_default(name) for name in ("image", "queue", "zone", "project")} == {""}


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from gpt_jax.launch import command; print(sorted({'jax', 'tyro', 'yaml', 'tensorflow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
