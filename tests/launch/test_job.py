"""What a job is, and what is refused before anything is created."""

import dataclasses
import subprocess
import sys

import pytest

from gpt_jax import config_io
from gpt_jax.config import ModelConfig
from gpt_jax.errors import UserError
from gpt_jax.launch import accelerators, job
from gpt_jax.launch.job import Job
from gpt_jax.model import network


def make(**fields):
    usual = {
        "verb": "pretrain",
        "config": "gpt1",
        "overrides": (),
        "workdir": "gs://runs/a",
        "name": "a",
        "accelerator": "v5e-16",
    }
    return Job(**usual | fields)


COORDINATOR = ("--distributed.coordinator=a:1", "--distributed.num-processes=1", "--distributed.process-id=0")


# -- accelerators -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "gcloud", "topology", "hosts", "devices", "gib"),
    [
        ("v5e-256", "v5litepod-256", "16x16", 64, 256, 16),
        ("v5e-8", "v5litepod-8", "2x4", 1, 8, 16),
        ("v5e-1", "v5litepod-1", "1x1", 1, 1, 16),
        ("v5litepod-16", "v5litepod-16", "4x4", 4, 16, 16),
        ("v6e-32", "v6e-32", "4x8", 8, 32, 32),
        ("v5p-8", "v5p-8", "2x2x1", 1, 4, 95),  # counts TensorCores, two a chip
        ("v5p-16", "v5p-16", "2x2x2", 2, 8, 95),
        ("v4-32", "v4-32", "2x2x4", 4, 16, 32),
        ("7x-8", "tpu7x-8", "2x2x1", 1, 8, 96),  # the same, and each is a device
        ("7x-128", "tpu7x-128", "4x4x4", 16, 128, 96),
    ],
)
def test_tpu_slices(name, gcloud, topology, hosts, devices, gib):
    found = accelerators.find(name)
    assert (found.gcloud, found.topology, found.hosts, found.devices, found.memory) == (
        gcloud,
        topology,
        hosts,
        devices,
        gib << 30,
    )


@pytest.mark.parametrize(
    ("name", "kind", "devices", "gib"),
    [
        ("h100-8", "gpu", 8, 80),
        ("a100-8", "gpu", 8, 40),
        ("a100-80gb-4", "gpu", 4, 80),
        ("cpu", "cpu", 1, 0),
        ("cpu-4", "cpu", 4, 0),
    ],
)
def test_nodes_of_gpus_and_cpus(name, kind, devices, gib):
    found = accelerators.find(name)
    assert (found.kind, found.hosts, found.devices, found.memory) == (kind, 1, devices, gib << 30)


@pytest.mark.parametrize(
    ("name", "hints"),
    [
        ("v5e-17", ["v5e-8", "v5e-16", "v5e-32"]),
        ("v5e-99999", ["v5e-256"]),
        ("v5p", ["v5p-8"]),
        ("h100-3", ["h100-2", "h100-4"]),
        ("v5x-8", ["v5p", "v5e"]),
        ("h10-8", ["h100"]),
        ("", ["v5e-16"]),
    ],
)
def test_an_unknown_accelerator_is_told_its_nearest(name, hints):
    with pytest.raises(UserError) as raised:
        accelerators.find(name)
    assert f"'{name}'" in str(raised.value)
    assert all(hint in str(raised.value) for hint in hints)
    assert "\n" not in str(raised.value)


def test_every_slice_is_filled_with_whole_hosts():
    for family, tpu in accelerators._TPUS.items():
        for topology in tpu.topologies.split():
            found = accelerators._tpu(family, topology)
            assert found == accelerators.find(found.name)  # no two slices of a family have one name
            assert found.hosts * found.chips_per_host * tpu.devices_per_chip == found.devices


# -- jobs -------------------------------------------------------------------------------------------------------------------


def test_the_command_is_the_one_that_would_be_typed():
    given = make(overrides=("--mesh.fsdp", "2", "--train.duration", "3 epochs"), preemptions=7, crashes=1, grace_seconds=30)
    words = ["pretrain", "gpt1", "--workdir", "gs://runs/a", "--mesh.fsdp", "2", "--train.duration", "3 epochs"]
    assert given.command() == ["gpt-jax", *words]
    options = ["--preemptions", "7", "--crashes", "1", "--grace-seconds", "30"]
    assert given.supervised() == ["gpt-jax", "supervise", *options, "--", *words]


def test_names_are_made_of_what_every_target_takes():
    assert [job.default_name(config) for config in ("gpt1_1b5", "finetune/cola", "my/Big_run.py", "_")] == [
        "gpt1-1b5",
        "finetune-cola",
        "big-run",
        "run",
    ]


def test_a_job_that_fits_gives_its_config_and_its_accelerator():
    checked = job.check(make(config="gpt1_1b5", overrides=("--mesh.slice", "2", "--mesh.fsdp", "16"), slices=2))
    assert checked.accelerator == accelerators.find("v5e-16")
    assert (checked.config.mesh.fsdp, checked.config.model.num_layers) == (16, 36)
    assert job.check(make(verb="finetune", config="finetune/cola", accelerator="h100-8")).config.task.name == "cola"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": "Big_run"}, "--name: 'Big_run'"),
        ({"name": "a" * 41}, "at most 40"),
        ({"slices": 0}, "--slices: must be at least 1, not 0"),
        ({"crashes": -1}, "--crashes: must be at least 0, not -1"),
        ({"grace_seconds": 0}, "--grace-seconds: must be at least 1"),
        ({"workdir": ""}, "--workdir: say which folder"),
        ({"accelerator": "v5e-15"}, "v5e-16"),
        ({"config": "gpt2"}, "no config is named 'gpt2'; did you mean gpt1"),
        ({"verb": "finetune"}, "gpt1 is a config for gpt-jax pretrain"),
        ({"overrides": ("--mesh.fsdq", "2")}, "did you mean mesh.fsdp"),
        # the mesh and the devices
        ({"overrides": ("--mesh.data", "3")}, "asks for 3 devices, and there are 16 devices on v5e-16"),
        ({"overrides": ("--mesh.fsdp", "3")}, "the other axes multiply to 3, and there are 16 devices on v5e-16"),
        ({"overrides": ("--mesh.tensor", "16")}, "16 does not divide model.num-heads 12"),
        ({"slices": 2}, "there are 2 TPU slices, so say --mesh.slice 2"),
        ({"slices": 2, "accelerator": "h100-8"}, "there are 2 nodes, so say --mesh.slice 2"),
        (
            {"accelerator": "h100-2", "overrides": ("--mesh.data", "1", "--mesh.tensor", "4")},
            "asks for 4 devices, and there are 2",
        ),
        ({"accelerator": "v5e-256"}, "64 does not divide over slice x data x fsdp = 256; 256 would"),
        ({"verb": "finetune", "config": "finetune/cola", "accelerator": "v5e-64"}, "32 does not divide"),
        ({"overrides": COORDINATOR}, "--distributed.coordinator: leave it out"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(fields, said):
    with pytest.raises(UserError) as raised:
        job.check(make(**fields))
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_all_that_are_left_are_found_over_slices_and_hosts():
    mesh = config_io.load("gpt1_1b5").mesh
    sizes = job.mesh_sizes(dataclasses.replace(mesh, slice=2, data=-1, tensor=8), accelerators.find("v5e-16"), 2)
    assert sizes == {"slice": 2, "data": 2, "fsdp": 1, "tensor": 8}
    sizes = job.mesh_sizes(dataclasses.replace(mesh, slice=1, data=2, fsdp=-1), accelerators.find("cpu-4"), 3)
    assert sizes == {"slice": 1, "data": 2, "fsdp": 6, "tensor": 1}


# -- memory -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        ModelConfig(),
        ModelConfig(kind="lstm"),
        ModelConfig(vocab_size=300, context_length=20, num_layers=3, embed_dim=24, num_heads=2, mlp_dim=40),
        ModelConfig(kind="lstm", vocab_size=300, embed_dim=24, num_heads=2, lstm_units=56),
    ],
)
def test_parameters_are_counted_as_the_network_counts_them(model):
    assert job.parameters(model) == network.count(model)


def test_the_papers_model_has_its_parameters():
    assert job.parameters(ModelConfig()) == 116_534_784


def test_a_state_larger_than_the_devices_is_refused_with_the_axis_that_helps():
    # 1,479,539,712 parameters x (4 + 4 + 8) bytes are 22.05 GiB.
    with pytest.raises(UserError, match=r"--mesh.fsdp: 1,479,539,712 .* 22.0 GiB .* v5e-16 has 16 GiB; .*--mesh.fsdp 2 would"):
        job.check(make(config="gpt1_1b5"))
    job.check(make(config="gpt1_1b5", overrides=("--mesh.fsdp", "2")))
    job.check(make(config="gpt1_1b5", overrides=("--mesh.tensor", "2")))
    job.check(make(config="gpt1_1b5", accelerator="h100-8"))  # 80 GiB
    job.check(make(config="gpt1_1b5", accelerator="cpu-4"))  # how much a CPU has is not known
    with pytest.raises(UserError, match=r"no --mesh\.fsdp is enough"):
        job.check(make(config="gpt1_1b5", accelerator="v5e-1"))


def test_bfloat16_parameters_need_less():
    assert job.bytes_per_parameter(ModelConfig()) == 16
    assert job.bytes_per_parameter(ModelConfig(param_dtype="bfloat16")) == 12


# -- where files are --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workdir", ["runs/a", "/home/me/runs/a", "./gs:/x", "s3://bucket/a"])
def test_workers_elsewhere_do_not_see_this_machines_folders(workdir):
    with pytest.raises(UserError, match=r"--workdir: '.*' is a folder of this machine.*gs://BUCKET/PATH"):
        job.require_reachable(make(workdir=workdir), "gke")


def test_workers_elsewhere_see_buckets_mounts_and_configs_by_name():
    for workdir in ("gs://runs/a", "/gcs/runs/a", "/mnt/disk/a"):
        job.require_reachable(make(workdir=workdir, config="finetune/cola"), "gke")
    with pytest.raises(UserError, match=r"--config: 'my/own\.py' is a file of this machine"):
        job.require_reachable(make(config="my/own.py"), "gke")


def test_buckets_become_mounts():
    words = [
        "--workdir",
        "gs://runs/a",
        "--data.store=gs://data/x/y",
        "--data.source",
        "text gs://no",
        "--init.from",
        "/mnt/disk/b",
    ]
    assert job.mounted(words) == [
        *["--workdir", "/gcs/runs/a", "--data.store=/gcs/data/x/y", "--data.source", "text gs://no", "--init.from", "/mnt/disk/b"]
    ]
    assert job.buckets([*words, "/gcs/runs/c"]) == ["runs", "data"]
    assert job.volumes(words) == ["disk"]


# -- where it comes from ----------------------------------------------------------------------------------------------------


def test_a_machine_that_only_launches_needs_no_jax_to_import_it():
    names = ("job", "accelerators", "gke", "slurm", "sky")
    code = "import sys; " + "; ".join(f"import gpt_jax.launch.{name}" for name in names) + "; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
