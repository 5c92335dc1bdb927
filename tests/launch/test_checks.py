"""The checks of a job that are the same for every target: options, config, mesh, memory and paths."""

import contextlib
import dataclasses
import functools
import subprocess
import sys

import jax
import pytest

from gpt_jax.config import ModelConfig, PretrainConfig, load
from gpt_jax.config.load import apply_overrides, load_config
from gpt_jax.data import sources
from gpt_jax.errors import UserError
from gpt_jax.launch import checks
from gpt_jax.launch.job import BUCKETS, CLAIMS, Job, mount_names
from gpt_jax.model.network import network
from gpt_jax.runtime.accelerators import parse_accelerator


def make(accelerator="v5e-16", **fields):
    defaults = {"verb": "pretrain", "config": "gpt1", "overrides": (), "workdir": "gs://runs/a", "name": "a"}
    return Job(accelerator=parse_accelerator(accelerator), **defaults | fields)


STORE = ("--data.store", "gs://data/store")
COLA = {"verb": "finetune", "config": "finetune/cola"}
COORDINATOR = ("--distributed.coordinator=a:1", "--distributed.num-processes=1", "--distributed.process-id=0")


def check(**fields):
    """Checks a job of `make`, which gets a store if it is a pre-training."""
    job = make(**fields)
    store = () if job.config.startswith("finetune/") else STORE
    return checks.check_job(dataclasses.replace(job, overrides=(*job.overrides, *store)))


def test_checking_a_job_returns_its_config():
    config = check(config="gpt1_1b5", overrides=("--mesh.slice", "2", "--mesh.fsdp", "16"), slices=2)
    assert (config.mesh.fsdp, config.model.num_layers) == (16, 36)
    assert check(accelerator="h100-8", **COLA, overrides=("--init.from", "gs://runs/a")).task.name == "cola"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "Big_run"}, "--name: 'Big_run'"),
        ({"name": "a" * 41}, "at most 40"),
        ({"slices": 0}, "--slices: must be at least 1, not 0"),
        ({"crashes": -1}, "--crashes: must be at least 0, not -1"),
        ({"grace_seconds": 0}, "--grace-seconds: must be at least 1"),
        ({"seeds": 0}, "--seeds: must be at least 1, not 0"),
        ({"seeds": 2}, "--seeds: applies to fine-tuning; for pre-training, set --train.seed"),
        ({"workdir": ""}, "--workdir: name the folder"),
        # Characters that no target can handle.
        ({"workdir": "gs://runs/a\n"}, r"--workdir: 'gs://runs/a\n' contains a line break or another control character"),
        ({"image": "a\n# b"}, "--image: "),
        ({"config": "gpt1\x1b"}, "--config: "),
        ({"overrides": ("--train.prompts", "a\nb")}, r"'a\nb' contains a line break"),
        ({"zone": "us east"}, "--zone: 'us east' must consist of a-z, 0-9 and '-'"),
        ({"zone": "us-east5-a;reboot"}, "--zone: "),
        ({"project": "my project"}, "--project: 'my project' must not contain blanks or quotes"),
        ({"project": "it's"}, "--project: "),
        ({"queue": 'a"b'}, "--queue: "),
        ({"accelerator": "v5e-15"}, "v5e-16"),
        ({"config": "gpt2"}, "no config is named 'gpt2'; did you mean gpt1"),
        ({"overrides": ("--mesh.fsdq", "2")}, "did you mean mesh.fsdp"),
        # The mesh and the devices.
        ({"overrides": ("--mesh.data", "3")}, "requires 3 devices, but the run has 16 devices on v5e-16"),
        ({"overrides": ("--mesh.fsdp", "3")}, "the other axes multiply to 3, which does not divide 16 devices on v5e-16"),
        ({"overrides": ("--mesh.fsdp", "3"), "slices": 2}, "which does not divide 32 devices on 2 x v5e-16"),
        ({"overrides": ("--mesh.tensor", "16")}, "16 does not divide model.num-heads 12"),
        ({"slices": 2}, "there are 2 TPU slices, so set --mesh.slice 2"),
        ({"slices": 2, "accelerator": "h100-8"}, "there are 2 nodes, so set --mesh.slice 2"),
        (
            {"accelerator": "h100-2", "overrides": ("--mesh.data", "1", "--mesh.tensor", "4")},
            "requires 4 devices, but the run has 2",
        ),
        ({"accelerator": "v5e-256"}, "64 does not split evenly over slice x data x fsdp = 256; 256 would"),
        (COLA | {"accelerator": "v5e-64", "overrides": ("--init.from", "gs://runs/a")}, "32 does not split evenly"),
        (COLA, "--init.from: name the run or checkpoint to fine-tune"),
        ({"overrides": COORDINATOR}, "--distributed.coordinator: leave it out"),
    ],
)
def test_impossible_jobs_are_refused_in_one_line(fields, message):
    with pytest.raises(UserError) as raised:
        check(**fields)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_axis_of_minus_one_takes_the_devices_of_all_slices_and_hosts():
    mesh = load_config("gpt1_1b5").mesh
    sizes = checks.mesh_sizes(dataclasses.replace(mesh, slice=2, data=-1, tensor=8), parse_accelerator("v5e-16"), 2)
    assert sizes == {"slice": 2, "data": 2, "fsdp": 1, "tensor": 8}
    sizes = checks.mesh_sizes(dataclasses.replace(mesh, slice=1, data=2, fsdp=-1), parse_accelerator("cpu-4"), 3)
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
def test_the_number_of_parameters_equals_that_of_the_initialized_network(model):
    shapes = jax.eval_shape(functools.partial(network(model).init, model), jax.random.key(0))
    padding = (model.padded_vocab_size - model.vocab_size) * model.embed_dim
    assert model.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(shapes)) - padding


def test_the_model_of_the_paper_has_its_number_of_parameters():
    assert ModelConfig().num_parameters == 116_534_784


def test_a_state_larger_than_the_devices_is_refused_with_the_axis_that_helps():
    # 1,479,539,712 parameters x (4 + 4 + 8) bytes are 22.05 GiB.
    message = r"--mesh.fsdp: 1,479,539,712 .* 22.0 GiB .* v5e-16 has 16 GiB; set --mesh.data -1 --mesh.fsdp 2$"
    with pytest.raises(UserError, match=message):
        check(config="gpt1_1b5")
    check(config="gpt1_1b5", overrides=("--mesh.fsdp", "2"))
    check(config="gpt1_1b5", overrides=("--mesh.tensor", "2"))
    check(config="gpt1_1b5", accelerator="h100-8")  # 80 GiB
    check(config="gpt1_1b5", accelerator="cpu-4")  # The memory of a CPU is unknown.
    with pytest.raises(UserError, match=r"no --mesh\.fsdp is large enough"):
        check(config="gpt1_1b5", accelerator="v5e-1")


def test_bfloat16_parameters_need_less_memory():
    assert checks.bytes_per_parameter(ModelConfig()) == 16
    assert checks.bytes_per_parameter(ModelConfig(param_dtype="bfloat16")) == 12


# -- paths ------------------------------------------------------------------------------------------------------------------


def fault(roots=(BUCKETS,), **fields):
    """Returns the message about a path that workers cannot see, or an empty string if they see all."""
    job = make(**fields)
    try:
        checks.check_paths(job, config_of(job), roots)
    except UserError as error:
        return str(error)
    return ""


def config_of(job):
    return apply_overrides(load_config(job.config), list(job.overrides), "gpt-jax")


@pytest.mark.parametrize("workdir", ["runs/a", "/home/me/runs/a", "./gs:/x", "s3://bucket/a", "~/a"])
def test_workers_do_not_see_the_folders_of_this_machine(workdir):
    assert f"--workdir: '{workdir}' cannot be reached from the workers" in fault(workdir=workdir)
    assert fault(workdir=workdir).endswith("give gs://BUCKET/PATH")


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
    def fields(path):
        random = ("--init.from", "none") if field == "init.like" else ()
        return {"config": config, "overrides": (*random, f"--{field}", path)}

    assert f"--{field}: '{value}' cannot be reached from the workers, which are other machines" in fault(**fields(value))
    assert fault(**fields("gs://data/there")) == fault(**fields("/gcs/data/there")) == ""
    # The other targets see the files of this machine and mount no buckets.
    for path, message in (
        (value, ""),
        ("gs://data/there", f"--{field}: 'gs://data/there' is not a file or folder, and this target mounts no buckets"),
    ):
        other = make(workdir="runs/a", **fields(path))
        with pytest.raises(UserError, match=f"^{message}$") if message else contextlib.nullcontext():
            checks.check_paths(other, config_of(other), ())


def test_names_that_are_not_paths_are_valid_everywhere():
    assert fault(config="smoke") == ""  # builtin:docs
    assert fault(overrides=("--data.source", "tfds:c4")) == ""
    assert fault(config="finetune/cola", overrides=("--init.from", "none", "--init.like", "gpt1")) == ""


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gs://runs/a/../b", "leads out of the mounted storage"),
        ("/gcs/runs/..", "leads out"),
        ("gs://../b", "'..' cannot be the name of a bucket"),
        ("gs://Runs/a", "'Runs' cannot be the name of a bucket"),
        ("gs:///a", "'' cannot be the name of a bucket"),
        ("/gcs/my runs/a", "'my runs' cannot be the name of a bucket"),
        ("gs://runs,ro/a", "'runs,ro' cannot be the name of a bucket"),
        ("gs://runs", "has no path inside 'runs'"),
        ("gs://runs/", "has no path inside 'runs'"),
        ("/mnt/disk/a", "cannot be reached from the workers, which are other machines; give gs://BUCKET/PATH"),
    ],
)
def test_a_path_names_something_in_a_bucket(path, message):
    assert f"--workdir: '{path}'" in fault(workdir=path)
    assert message in fault(workdir=path)
    assert f"--data.store: '{path}'" in fault(overrides=("--data.store", path))


def test_volumes_are_visible_on_targets_that_mount_them():
    both = (BUCKETS, CLAIMS)
    assert fault(both, workdir="/mnt/disk-1.a/run", overrides=("--data.store", "/mnt/disk/store")) == ""
    for name in ("Disk", "my_disk", "-disk", "a..b", "a" * 254):
        assert f"'{name}' cannot be the name of a PersistentVolumeClaim" in fault(both, workdir=f"/mnt/{name}/a")
    assert "leads out" in fault(both, workdir="/mnt/disk/../a")
    assert "give gs://BUCKET/PATH or /mnt/CLAIM/PATH" in fault(both, workdir="runs/a")


def write_config(folder, **data):
    """Writes a config file with paths of its own; returns its path."""
    file = folder / "own.py"
    file.write_text(f"from gpt_jax.config import *\n\n\ndef config():\n    return PretrainConfig(data=DataConfig(**{data}))\n")
    return str(file)


def test_the_paths_in_a_config_file_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "config_folder", lambda: tmp_path)
    write_config(tmp_path, store="my/store")
    assert "--data.store: 'my/store' cannot be reached from the workers" in fault(config="own")
    assert fault(config="own", overrides=STORE) == ""
    assert fault(config="own", overrides=("--data.store=", "--data.source", "builtin:docs")) == ""
    # A path in a bucket must be among the words that become mounts.
    for store in ("gs://data/store", "/gcs/data/store"):
        write_config(tmp_path, store=store)
        assert f"--data.store: '{store}' is only in the config; repeat it on the command line" in fault(config="own")
        assert fault(config="own", overrides=(f"--data.store={store}",)) == ""
        assert mount_names(make(overrides=(f"--data.store={store}",)).command(), BUCKETS) == ["runs", "data"]


@pytest.mark.parametrize("config", ["{}", "/mnt/disk/own.py"])
def test_workers_do_not_see_a_config_file_of_this_machine(tmp_path, monkeypatch, config):
    config, real = config.format(write_config(tmp_path, store="gs://data/store")), tmp_path / "own.py"
    monkeypatch.setattr(sys.modules[__name__], "load_config", lambda name: load.load_config(str(real)))
    message = f"--config: '{config}' is on this machine, where workers cannot read it; move it into configs/"
    assert fault(config=config, overrides=STORE) == message
    assert fault(config="/gcs/runs/own.py", overrides=STORE) == ""
    assert "leads out" in fault(config="/gcs/runs/../own.py", overrides=STORE)


def test_a_pre_training_needs_text_to_read(tmp_path):
    with pytest.raises(UserError) as raised:
        checks.check_job(make())
    with pytest.raises(UserError) as training:
        sources.open_source(PretrainConfig().data)
    assert str(raised.value) == str(training.value)
    for words in (STORE, ("--data.source", "gs://data/text")):
        checks.check_job(make(overrides=words))
    # The store may already be in the run's folder, if this machine sees that.
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "index.json").write_text("{}")
    checks.check_job(make(workdir=str(tmp_path)))


# -- imports ----------------------------------------------------------------------------------------------------------------


def test_launching_does_not_import_jax():
    code = """
import sys
from gpt_jax.launch import checks, gke, local, sky, slurm, tpu_vm
from gpt_jax.runtime.accelerators import parse_accelerator
from gpt_jax.launch.job import Job
words = ("--data.store", "gs://data/store")
job = Job("pretrain", "gpt1", words, "gs://runs/a", "a", parse_accelerator("v5e-16"), image="i")
checks.check(job, gke)
gke.render(job)
print("jax" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
