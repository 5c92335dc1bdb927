"""What a job is, and what is refused before anything is created."""

import contextlib
import dataclasses
import subprocess
import sys
import typing

import pytest

from gpt_jax.config import FinetuneConfig, ModelConfig, PretrainConfig
from gpt_jax.config.load import apply_overrides, load_config
from gpt_jax.data import sources
from gpt_jax.errors import UserError
from gpt_jax.launch import accelerators, job
from gpt_jax.launch.job import Checked, Job
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


STORE = ("--data.store", "gs://data/store")
COLA = {"verb": "finetune", "config": "finetune/cola"}
COORDINATOR = ("--distributed.coordinator=a:1", "--distributed.num-processes=1", "--distributed.process-id=0")


def check(**fields):
    """Checks a job of `make`, with a store where it is a pre-training."""
    given = make(**fields)
    store = () if given.config.startswith("finetune/") else STORE
    return job.check(dataclasses.replace(given, overrides=(*given.overrides, *store)))


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


@pytest.mark.parametrize(("family", "least"), [("v4", "v4-16"), ("v5e", "v5e-16"), ("v5p", "v5p-16"), ("7x", "7x-16")])
def test_the_smallest_slice_of_several_hosts(family, least):
    assert accelerators.smallest_of_several_hosts(family) == accelerators.find(least)


# -- jobs -------------------------------------------------------------------------------------------------------------------


def test_the_command_is_the_one_that_would_be_typed():
    given = make(overrides=("--mesh.fsdp", "2", "--train.duration", "3 epochs"), preemptions=7, crashes=1, grace_seconds=30)
    words = ["pretrain", "gpt1", "--workdir", "gs://runs/a", "--mesh.fsdp", "2", "--train.duration", "3 epochs"]
    assert given.command() == ["gpt-jax", *words]
    options = ["--preemptions", "7", "--crashes", "1", "--grace-seconds", "30"]
    assert given.supervised() == ["gpt-jax", "supervise", *options, "--", *words]
    seeds = make(verb="finetune", config="finetune/cola", overrides=("--init.from", "gs://runs/b"), seeds=5).command()
    assert seeds[1:] == ["finetune", "finetune/cola", "--workdir", "gs://runs/a", "--seeds", "5", "--init.from", "gs://runs/b"]


def test_names_are_made_of_what_every_target_takes():
    assert [job.default_name(config) for config in ("gpt1_1b5", "finetune/cola", "my/Big_run.py", "_")] == [
        "gpt1-1b5",
        "finetune-cola",
        "big-run",
        "run",
    ]


def test_a_job_that_fits_gives_its_config_and_its_accelerator():
    checked = check(config="gpt1_1b5", overrides=("--mesh.slice", "2", "--mesh.fsdp", "16"), slices=2)
    assert checked.accelerator == accelerators.find("v5e-16")
    assert (checked.config.mesh.fsdp, checked.config.model.num_layers) == (16, 36)
    assert check(accelerator="h100-8", **COLA, overrides=("--init.from", "gs://runs/a")).config.task.name == "cola"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": "Big_run"}, "--name: 'Big_run'"),
        ({"name": "a" * 41}, "at most 40"),
        ({"slices": 0}, "--slices: must be at least 1, not 0"),
        ({"crashes": -1}, "--crashes: must be at least 0, not -1"),
        ({"grace_seconds": 0}, "--grace-seconds: must be at least 1"),
        ({"seeds": 0}, "--seeds: must be at least 1, not 0"),
        ({"seeds": 2}, "--seeds: goes with a fine-tuning; a pre-training has --train.seed"),
        ({"workdir": ""}, "--workdir: say which folder"),
        # what no target could make sense of
        ({"workdir": "gs://runs/a\n"}, r"--workdir: 'gs://runs/a\n' holds a line end or another control character"),
        ({"image": "a\n# b"}, "--image: "),
        ({"config": "gpt1\x1b"}, "--config: "),
        ({"overrides": ("--train.prompts", "a\nb")}, r"'a\nb' holds a line end"),
        ({"zone": "us east"}, "--zone: 'us east' is none; its characters are a-z, 0-9 and '-'"),
        ({"zone": "us-east5-a;reboot"}, "--zone: "),
        ({"project": "my project"}, "--project: 'my project' must hold no blanks and no quotes"),
        ({"project": "it's"}, "--project: "),
        ({"queue": 'a"b'}, "--queue: "),
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
        (COLA | {"accelerator": "v5e-64", "overrides": ("--init.from", "gs://runs/a")}, "32 does not divide"),
        (COLA, "--init.from: say which run or checkpoint to fine-tune"),
        ({"overrides": COORDINATOR}, "--distributed.coordinator: leave it out"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(fields, said):
    with pytest.raises(UserError) as raised:
        check(**fields)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_all_that_are_left_are_found_over_slices_and_hosts():
    mesh = load_config("gpt1_1b5").mesh
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
        check(config="gpt1_1b5")
    check(config="gpt1_1b5", overrides=("--mesh.fsdp", "2"))
    check(config="gpt1_1b5", overrides=("--mesh.tensor", "2"))
    check(config="gpt1_1b5", accelerator="h100-8")  # 80 GiB
    check(config="gpt1_1b5", accelerator="cpu-4")  # how much a CPU has is not known
    with pytest.raises(UserError, match=r"no --mesh\.fsdp is enough"):
        check(config="gpt1_1b5", accelerator="v5e-1")


def test_bfloat16_parameters_need_less():
    assert job.bytes_per_parameter(ModelConfig()) == 16
    assert job.bytes_per_parameter(ModelConfig(param_dtype="bfloat16")) == 12


# -- where files are --------------------------------------------------------------------------------------------------------


def reach(volumes=False, **fields):
    """What the workers cannot see of a job; empty: they see all."""
    given = make(**fields)
    try:
        job.require_reachable(given, Checked(config_of(given), accelerators.find(given.accelerator)), "there", volumes=volumes)
    except UserError as error:
        return str(error)
    return ""


def config_of(given):
    return apply_overrides(load_config(given.config), list(given.overrides), "gpt-jax")


@pytest.mark.parametrize("workdir", ["runs/a", "/home/me/runs/a", "./gs:/x", "s3://bucket/a", "~/a"])
def test_workers_elsewhere_do_not_see_this_machines_folders(workdir):
    assert f"--workdir: '{workdir}' is a folder of this machine" in reach(workdir=workdir)
    assert reach(workdir=workdir).endswith("give gs://BUCKET/PATH")


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        ("gpt1", "data.source", "texts/*.txt"),
        ("gpt1", "data.store", "store"),
        ("gpt1", "data.tokenizer.path", "tokenizer"),
        ("gpt1", "init.from", "runs/b"),
        ("finetune/cola", "init.from", "/home/me/runs/b"),
        ("finetune/cola", "init.like", "runs/b"),
        ("finetune/cola", "init.tokenizer", "tokenizer"),
        ("finetune/cola", "task.path", "GLUE/CoLA"),
        ("finetune/own", "task.train", "train.tsv"),
        ("finetune/own", "task.validation", "validation.tsv"),
        ("finetune/own", "task.test", "test.tsv"),
    ],
)
def test_every_field_that_names_a_path_is_checked(config, field, value):
    def given(path):
        random = ("--init.from", "none") if field == "init.like" else ()
        return {"config": config, "overrides": (*random, f"--{field}", path)}

    assert f"--{field}: '{value}' is a path of this machine, which the workers of there do not see" in reach(**given(value))
    assert reach(**given("gs://data/there")) == reach(**given("/gcs/data/there")) == ""
    # The other targets see this machine's files and mount no buckets.
    for path, fault in (
        (value, ""),
        ("gs://data/there", f"--{field}: 'gs://data/there' is no file or folder; local mounts no buckets"),
    ):
        other = make(workdir="runs/a", **given(path))
        with pytest.raises(UserError, match=f"^{fault}$") if fault else contextlib.nullcontext():
            job.require_no_buckets(other, Checked(config_of(other), accelerators.find("cpu")), "local")


def texts(kind, prefix=""):
    """The names of the fields that take any text."""
    for name, hint in typing.get_type_hints(kind).items():
        dotted = prefix + name.rstrip("_").replace("_", "-")
        if dataclasses.is_dataclass(hint):
            yield from texts(hint, dotted + ".")
        elif hint is str:
            yield dotted


def test_no_field_that_names_a_path_was_forgotten():
    others = ["data.text-field", "distributed.coordinator", "optim.warmup", "task.label", "task.name"]
    others += ["train.duration", "train.eval-every", "train.save-every"]
    assert {*texts(PretrainConfig), *texts(FinetuneConfig)} == {*job.PATHS, *others}


def test_what_is_no_path_is_seen_everywhere():
    assert reach(config="smoke") == ""  # builtin:docs
    assert reach(overrides=("--data.source", "tfds:c4")) == ""
    assert reach(config="finetune/cola", overrides=("--init.from", "none", "--init.like", "gpt1")) == ""


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("gs://runs/a/../b", "leads out of what is mounted"),
        ("/gcs/runs/..", "leads out"),
        ("gs://../b", "no bucket is named '..'"),
        ("gs://Runs/a", "no bucket is named 'Runs'"),
        ("gs:///a", "no bucket is named ''"),
        ("/gcs/my runs/a", "no bucket is named 'my runs'"),
        ("gs://runs,ro/a", "no bucket is named 'runs,ro'"),
        ("gs://runs", "names nothing inside 'runs'"),
        ("gs://runs/", "names nothing inside 'runs'"),
        ("/mnt/disk/a", "nothing is mounted below /mnt/ on the workers of there; give gs://BUCKET/PATH"),
    ],
)
def test_a_path_names_something_in_a_bucket(path, said):
    assert f"--workdir: '{path}'" in reach(workdir=path)
    assert said in reach(workdir=path)
    assert f"--data.store: '{path}'" in reach(overrides=("--data.store", path))


def test_volumes_are_seen_where_they_are_mounted():
    fields = {"workdir": "/mnt/disk-1.a/run", "overrides": ("--data.store", "/mnt/disk/store")}
    assert reach(volumes=True, **fields) == ""
    for name in ("Disk", "my_disk", "-disk", "a..b", "a" * 254):
        assert f"no PersistentVolumeClaim is named '{name}'" in reach(volumes=True, workdir=f"/mnt/{name}/a")
    assert "leads out" in reach(volumes=True, workdir="/mnt/disk/../a")
    assert "give gs://BUCKET/PATH or /mnt/CLAIM/PATH" in reach(volumes=True, workdir="runs/a")


def own_config(folder, **data):
    """A config file with its own paths."""
    file = folder / "own.py"
    file.write_text(f"from gpt_jax.config import *\n\n\ndef config():\n    return PretrainConfig(data=DataConfig(**{data}))\n")
    return str(file)


def test_a_configs_own_paths_count(tmp_path, monkeypatch):
    monkeypatch.setattr(config_io, "config_folder", lambda: tmp_path)
    own_config(tmp_path, store="my/store")
    assert "--data.store: 'my/store' is a path of this machine" in reach(config="own")
    assert reach(config="own", overrides=STORE) == ""
    assert reach(config="own", overrides=("--data.store=", "--data.source", "builtin:docs")) == ""
    # One in a bucket must be among the words that become mounts.
    for store in ("gs://data/store", "/gcs/data/store"):
        own_config(tmp_path, store=store)
        assert f"--data.store: '{store}' stands only in the config" in reach(config="own")
        assert reach(config="own", overrides=(f"--data.store={store}",)) == ""
        assert job.buckets(make(overrides=(f"--data.store={store}",)).command()) == ["runs", "data"]


@pytest.mark.parametrize("config", ["{}", "/mnt/disk/own.py"])
def test_a_config_that_is_a_file_of_this_machine_is_not_seen(tmp_path, monkeypatch, config):
    config, real = config.format(own_config(tmp_path, store="gs://data/store")), tmp_path / "own.py"
    load = load_config
    monkeypatch.setattr(config_io, "load", lambda name: load(str(real)))
    assert f"--config: '{config}' is a file of this machine" in reach(config=config, overrides=STORE)
    assert reach(config="/gcs/runs/own.py", overrides=STORE) == ""
    assert "leads out" in reach(config="/gcs/runs/../own.py", overrides=STORE)


def test_a_pre_training_has_text_to_read(tmp_path):
    with pytest.raises(UserError) as raised:
        job.check(make())
    with pytest.raises(UserError) as training:
        sources.open_source(PretrainConfig().data)
    assert str(raised.value) == str(training.value)
    for words in (STORE, ("--data.source", "gs://data/text")):
        job.check(make(overrides=words))
    # One whose store lies in its folder already, as far as this machine sees that.
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "index.json").write_text("{}")
    job.check(make(workdir=str(tmp_path)))


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
