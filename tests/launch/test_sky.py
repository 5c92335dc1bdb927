"""The SkyPilot task is valid, and every node knows its place."""

import functools
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from gpt_jax.errors import UserError
from gpt_jax.launch import sky
from gpt_jax.launch.job import Job, check
from gpt_jax.runtime.git_info import Checkout

checked = functools.cache(check)  # which takes a good part of a second
ROOT = Path(__file__).parents[2]
STORE = ("--data.store", "gs://data/store")
GPUS = {
    "config": "gpt1_1b5",
    "accelerator": "h100-8",
    "slices": 2,
    "overrides": (*STORE, "--mesh.slice", "2", "--mesh.fsdp", "8"),
}
KINDS = {"slice": {}, "GPU nodes": GPUS, "CPU": {"accelerator": "cpu-4"}, "image": {"image": "host/image:1"}}


def make(**fields):
    usual = {"verb": "pretrain", "config": "gpt1", "overrides": STORE, "name": "a"}
    return Job(**usual | {"workdir": "gs://runs/a", "accelerator": "v5e-16"} | fields)


@pytest.fixture(autouse=True)
def origin(tmp_path, monkeypatch):
    """The checkout as a commit of which nothing differs, and an empty home."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    source = Checkout(ROOT, "c" * 40, b"", ())
    monkeypatch.setattr(sky.checkout, "find", lambda: source)
    return source


def task(**fields):
    job = make(**fields)
    return yaml.safe_load(sky.render(job, checked(job)))


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
def test_skypilots_own_loader_takes_the_task(fields, tmp_path):
    """GPT_JAX_SKY: a Python that has SkyPilot, whose packages do not go with ours."""
    job, file = make(**fields), tmp_path / "task.yaml"
    file.write_text(sky.render(job, checked(job)))
    code = "import sys, sky; task = sky.Task.from_yaml(sys.argv[1]); print(task.name, task.num_nodes, len(task.resources))"
    done = subprocess.run([os.environ["GPT_JAX_SKY"], "-c", code, file], capture_output=True, text=True)
    assert done.stdout.split()[-3:] == [job.name, str(job.slices), "1"], done.stderr
    assert "default" not in done.stdout + done.stderr  # nothing that it would have to guess


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
def test_machines_are_those_that_were_asked_for(fields, expected):
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
    """What `gpt-jax` is told on one node, and how it finds itself there."""
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


def test_nodes_find_the_first_one(tmp_path):
    words = "pretrain gpt1_1b5 --workdir /gcs/runs/a --data.store /gcs/data/store --mesh.slice 2 --mesh.fsdp 8"
    for node in (0, 1):
        assert run_on(node, task(**GPUS), tmp_path) == f"cuda,cpu|{node} of 2 at 10.0.0.7:1234|{words}"


def test_hosts_of_a_slice_find_each_other_without_help(tmp_path):
    words = "pretrain gpt1 --workdir /gcs/runs/a --data.store /gcs/data/store"
    assert run_on(0, task(), tmp_path) == f"tpu,cpu| of  at |{words}"
    assert task()["file_mounts"] == {
        "/gcs/runs": {"source": "gs://runs", "mode": "MOUNT"},
        "/gcs/data": {"source": "gs://data", "mode": "MOUNT"},
    }


def test_what_differs_from_the_commit_travels_along(monkeypatch, origin):
    monkeypatch.setattr(sky.checkout, "find", lambda: origin._replace(diff=b"a diff\n"))
    document = task()
    assert document["file_mounts"]["~/uncommitted.diff"] == str(sky._diff_file(make()))
    assert document["envs"] == {"GPT_JAX_COMMIT": origin.commit, "GPT_JAX_DIFF": "~/uncommitted.diff"}
    document = task(image="host/image:1")  # which says so itself
    assert "~/uncommitted.diff" not in document["file_mounts"]
    assert "envs" not in document


def differing(tmp_path):
    """A repository with a change, as `checkout.find` describes it."""
    git = ["git", "-C", str(tmp_path / "my clone"), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "my clone").mkdir()
    (tmp_path / "my clone" / "file").write_text("one\n")
    for words in (["init", "--quiet"], ["add", "file"], ["commit", "--quiet", "--message", "one"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "my clone" / "file").write_text("two\n")
    diff = subprocess.run([*git, "diff", "--binary", "HEAD"], capture_output=True, check=True).stdout
    return Checkout(tmp_path / "my clone", "c" * 40, diff, ())


def test_the_printed_command_makes_the_file_that_the_task_takes_along(tmp_path, monkeypatch):
    origin = differing(tmp_path)
    monkeypatch.setattr(sky.checkout, "find", lambda: origin)
    job = make()
    first, *_ = sky.render(job, checked(job)).splitlines()
    assert not (tmp_path / "home").exists()
    subprocess.run(["bash", "-c", first.removeprefix("# ")], check=True, cwd="/")
    file = tmp_path / "home" / ".cache" / "gpt_jax" / "launch" / "a" / "uncommitted.diff"
    assert file.read_bytes() == origin.diff
    assert task()["file_mounts"]["~/uncommitted.diff"] == str(file)


@pytest.mark.parametrize("there", [True, False])
def test_the_setup_finds_uv_or_installs_it_for_the_user(tmp_path, there):
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


def test_what_is_printed_is_what_sky_gets(tmp_path, monkeypatch, origin):
    program = tmp_path / "sky"
    program.write_text(f'#!/bin/sh\necho "$*" > {tmp_path}/words\nfor file; do :; done\ncat "$file" > {tmp_path}/given\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(sky.checkout, "find", lambda: origin._replace(diff=b"a diff\n"))
    job = make(image="host/image:1")
    assert sky.submit(job, checked(job)) == 0
    assert not (tmp_path / "home").exists()  # an image says itself what it was built from
    job = make()
    assert sky.submit(job, checked(job)) == 0
    assert (tmp_path / "words").read_text().startswith("jobs launch --yes --detach-run --name a /")
    assert (tmp_path / "given").read_text() == sky.render(job, checked(job))
    assert sky._diff_file(job).read_text() == "a diff\n"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"workdir": "runs/a"}, "--workdir: 'runs/a' is a folder of this machine"),
        ({"project": "mine"}, "--project: leave it out"),
        ({"queue": "team"}, "--queue: leave it out"),
        ({"preemptions": 5}, "--preemptions: leave it out: SkyPilot replaces lost machines without limit"),
        ({"grace_seconds": 60}, "--grace-seconds: leave it out"),
        ({"workdir": "/mnt/disk/a"}, "--workdir: '/mnt/disk/a': nothing is mounted below /mnt/ on the workers of sky"),
        ({"overrides": ("--data.store", "store")}, "--data.store: 'store' is a path of this machine"),
        ({"slices": 2, "overrides": (*STORE, "--mesh.slice", "2")}, "--slices: several TPU slices"),
        ({"accelerator": "7x-8"}, "--accelerator: 7x-8 is to be had with gke only"),
    ],
)
def test_what_skypilot_does_not_have_is_refused(fields, said):
    with pytest.raises(UserError) as raised:
        task(**fields)
    assert said in str(raised.value)


def test_without_a_commit_there_is_an_image(monkeypatch, origin):
    monkeypatch.setattr(sky.checkout, "find", lambda: origin._replace(commit=""))
    with pytest.raises(UserError, match="this package is not in one of git: run it from a clone, or give --image"):
        task()
    assert "workdir" not in task(image="host/image:1")


def test_without_skypilot_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    job = make()
    with pytest.raises(UserError, match="sky is not on this machine: pip install"):
        sky.submit(job, checked(job))
    assert list(tmp_path.iterdir()) == []
