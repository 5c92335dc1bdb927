"""The SkyPilot task: it is valid, and every node has its number and the address of the first."""

import functools
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from gpt_jax.errors import UserError
from gpt_jax.launch import checks, sky
from gpt_jax.launch.job import Job
from gpt_jax.runtime import git_info
from gpt_jax.runtime.accelerators import parse_accelerator
from gpt_jax.runtime.git_info import Checkout

check_job = functools.cache(checks.check_job)  # A check takes a large part of a second.
ROOT = Path(__file__).parents[2]
STORE = ("--data.store", "gs://data/store")
GPUS = {
    "config": "gpt1_1b5",
    "accelerator": "h100-8",
    "slices": 2,
    "overrides": (*STORE, "--mesh.slice", "2", "--mesh.fsdp", "8"),
}
KINDS = {"slice": {}, "GPU nodes": GPUS, "CPU": {"accelerator": "cpu-4"}, "image": {"image": "host/image:1"}}


def make(accelerator="v5e-16", **fields):
    defaults = {"verb": "pretrain", "config": "gpt1", "overrides": STORE, "name": "a", "workdir": "gs://runs/a"}
    return Job(accelerator=parse_accelerator(accelerator), **defaults | fields)


@pytest.fixture(autouse=True)
def checkout(tmp_path, monkeypatch):
    """A checkout without changes, and an empty home folder."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(checks, "check_job", check_job)
    clean = Checkout(ROOT, "c" * 40, b"", ())
    monkeypatch.setattr(git_info, "find_checkout", lambda: clean)
    return clean


def rendered(job):
    checks.check(job, sky)
    return sky.render(job)


def task(**fields):
    return yaml.safe_load(rendered(make(**fields)))


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_the_task_is_valid(fields, invalid):
    document = task(**fields)
    assert invalid(document, "sky") == []
    assert len(invalid(document | {"nodes": 2}, "sky")) == 1
    script = document["run"] + document.get("setup", "")
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""


@pytest.mark.slow
@pytest.mark.skipif("GPT_JAX_SKY" not in os.environ, reason="make sky sets GPT_JAX_SKY")
@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_skypilots_own_loader_accepts_the_task(fields, tmp_path):
    """GPT_JAX_SKY names a Python with SkyPilot, whose packages conflict with those of this project."""
    job, file = make(**fields), tmp_path / "task.yaml"
    file.write_text(rendered(job))
    code = "import sys, sky; task = sky.Task.from_yaml(sys.argv[1]); print(task.name, task.num_nodes, len(task.resources))"
    done = subprocess.run([os.environ["GPT_JAX_SKY"], "-c", code, file], capture_output=True, text=True)
    assert done.stdout.split()[-3:] == [job.name, str(job.slices), "1"], done.stderr
    assert "default" not in done.stdout + done.stderr  # It had to fill in nothing.


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"use_spot": False, "cloud": "gcp", "accelerators": "tpu-v5litepod-16"}),
        ({}, {"accelerator_args": {"runtime_version": "v2-alpha-tpuv5-lite"}}),
        ({"spot": True, "zone": "us-east5-a"}, {"use_spot": True, "zone": "us-east5-a"}),
        (GPUS, {"accelerators": "H100:8"}),
        ({"accelerator": "cpu-4"}, {"cpus": "4+"}),
        ({"image": "host/image:1"}, {"image_id": "docker:host/image:1"}),
    ],
)
def test_the_resources_are_those_of_the_job(fields, expected):
    resources = task(**fields)["resources"]
    assert {name: resources.get(name) for name in expected} == expected


def test_failures_are_counted_and_preemptions_are_not():
    recovery = {"max_restarts_on_errors": 2, "recover_on_exit_codes": [42]}
    assert task(crashes=2)["resources"]["job_recovery"] == recovery


def test_the_checkout_is_installed_with_its_locked_versions():
    document = task()
    assert document["workdir"] == str(ROOT)
    assert "--constraint constraints/py312.txt '.[tpu,gpt1]'" in document["setup"]
    assert "'.[cuda,gpt1]'" in task(**GPUS)["setup"]
    assert "'.[gpt1]'" in task(accelerator="cpu-4")["setup"]
    assert (ROOT / "constraints" / "py312.txt").is_file()
    assert not {"workdir", "setup"} & task(image="host/image:1").keys()


def run_on(node, document, tmp_path):
    """Returns the arguments of `gpt-jax` on one node, and its place among the processes."""
    program = tmp_path / ".venv" / "bin" / "gpt-jax"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text('#!/bin/sh\necho "$JAX_PLATFORMS|$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS|$*"\n')
    program.chmod(0o755)
    (program.parent / "activate").write_text(f"PATH={program.parent}:$PATH\n")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.9"}
    environment |= {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": str(node)}
    script = document["run"].replace("/gcs/", f"{tmp_path}/gcs/")
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip().replace(f"{tmp_path}/gcs/", "/gcs/")


def test_nodes_have_their_number_and_the_address_of_the_first(tmp_path):
    words = "pretrain gpt1_1b5 --workdir /gcs/runs/a --data.store /gcs/data/store --mesh.slice 2 --mesh.fsdp 8"
    for node in (0, 1):
        assert run_on(node, task(**GPUS), tmp_path) == f"cuda,cpu|{node} of 2 at 10.0.0.7:1234|{words}"


def test_the_hosts_of_a_slice_need_no_addresses(tmp_path):
    words = "pretrain gpt1 --workdir /gcs/runs/a --data.store /gcs/data/store"
    assert run_on(0, task(), tmp_path) == f"tpu,cpu| of  at |{words}"
    assert task()["file_mounts"] == {
        "/gcs/runs": {"source": "gs://runs", "mode": "MOUNT"},
        "/gcs/data": {"source": "gs://data", "mode": "MOUNT"},
        "~/uncommitted.diff": str(sky._diff_file(make())),
    }


def test_the_commit_and_the_uncommitted_changes_are_sent(checkout):
    document = task()
    assert document["file_mounts"]["~/uncommitted.diff"] == str(sky._diff_file(make()))
    assert document["envs"] == {"GPT_JAX_COMMIT": checkout.commit, "GPT_JAX_DIFF": "~/uncommitted.diff"}
    document = task(image="host/image:1")  # An image has its own record.
    assert "~/uncommitted.diff" not in document["file_mounts"]
    assert "envs" not in document


def changed_checkout(tmp_path):
    """Returns the description of a new repository with a changed file."""
    git = ["git", "-C", str(tmp_path / "my clone"), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "my clone").mkdir()
    (tmp_path / "my clone" / "file").write_text("one\n")
    for words in (["init", "--quiet"], ["add", "file"], ["commit", "--quiet", "--message", "one"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "my clone" / "file").write_text("two\n")
    diff = subprocess.run([*git, "diff", "--binary", "HEAD"], capture_output=True, check=True).stdout
    return Checkout(tmp_path / "my clone", "c" * 40, diff, ())


def test_the_printed_command_writes_the_file_that_the_task_sends(tmp_path, monkeypatch):
    changed = changed_checkout(tmp_path)
    monkeypatch.setattr(git_info, "find_checkout", lambda: changed)
    first, *_ = rendered(make()).splitlines()
    assert not (tmp_path / "home").exists()
    subprocess.run(["bash", "-c", first.removeprefix("# ")], check=True, cwd="/")
    file = tmp_path / "home" / ".cache" / "gpt_jax" / "launch" / "a" / "uncommitted.diff"
    assert file.read_bytes() == changed.diff
    assert task()["file_mounts"]["~/uncommitted.diff"] == str(file)


@pytest.mark.parametrize("there", [True, False])
def test_the_setup_uses_uv_and_installs_it_if_it_is_missing(tmp_path, there):
    programs = {"uv": f'#!/bin/sh\necho "$*" >> {tmp_path}/uv\n', "python3": "#!/bin/sh\n"}
    programs["python3"] += (
        f'echo "$*" >> {tmp_path}/pip\nmkdir -p "$HOME/.local/bin"; cp {tmp_path}/bin/uv-of-pip "$HOME/.local/bin/uv"\n'
    )
    (tmp_path / "bin").mkdir()
    for name, text in (("uv" if there else "uv-of-pip", programs["uv"]), ("python3", programs["python3"])):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "HOME": str(tmp_path / "home")}
    subprocess.run(["bash", "-e", "-c", task()["setup"]], env=environment, check=True)
    assert [line.split()[0] for line in (tmp_path / "uv").read_text().splitlines()] == ["venv", "pip"]
    assert (tmp_path / "pip").exists() != there
    assert there or (tmp_path / "pip").read_text() == "-m pip install --quiet --user uv\n"


def test_sky_gets_what_a_dry_run_prints(tmp_path, monkeypatch, checkout):
    program = tmp_path / "sky"
    program.write_text(f'#!/bin/sh\necho "$*" > {tmp_path}/words\nfor file; do :; done\ncat "$file" > {tmp_path}/given\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(git_info, "find_checkout", lambda: checkout._replace(diff=b"a diff\n"))
    job = make(image="host/image:1")
    assert sky.submit(job) == 0
    assert not (tmp_path / "home").exists()  # An image needs no file with changes.
    job = make()
    assert sky.submit(job) == 0
    assert (tmp_path / "words").read_text().startswith("jobs launch --yes --detach-run --name a /")
    assert (tmp_path / "given").read_text() == rendered(job)
    assert sky._diff_file(job).read_text() == "a diff\n"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"workdir": "runs/a"}, "--workdir: 'runs/a' cannot be reached from the workers"),
        ({"project": "mine"}, "--project: leave it out"),
        ({"queue": "team"}, "--queue: leave it out"),
        ({"preemptions": 5}, "--preemptions: leave it out; SkyPilot replaces lost machines without a limit"),
        ({"grace_seconds": 60}, "--grace-seconds: leave it out"),
        (
            {"workdir": "/mnt/disk/a"},
            "--workdir: '/mnt/disk/a' cannot be reached from the workers, which are other machines; give gs://",
        ),
        ({"overrides": ("--data.store", "store")}, "--data.store: 'store' cannot be reached from the workers"),
        ({"slices": 2, "overrides": (*STORE, "--mesh.slice", "2")}, "--slices: sky cannot connect several TPU slices"),
        ({"accelerator": "7x-8"}, "--accelerator: 7x-8 is available with gke only"),
    ],
)
def test_jobs_that_skypilot_cannot_run_are_refused(fields, message):
    with pytest.raises(UserError) as raised:
        checks.check(make(**fields), sky)
    assert message in str(raised.value)


def test_without_a_commit_an_image_is_required(monkeypatch, checkout):
    monkeypatch.setattr(git_info, "find_checkout", lambda: checkout._replace(commit=""))
    with pytest.raises(UserError, match="this package is not in one; run it from a clone, or give --image"):
        task()
    assert "workdir" not in task(image="host/image:1")


def test_without_skypilot_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="sky is not installed on this machine: run pip install"):
        sky.submit(make())
    assert list(tmp_path.iterdir()) == []
