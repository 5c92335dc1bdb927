"""Jobs: their commands, their names, and the storage that their paths name."""

from gpt_jax.launch.job import BUCKETS, CLAIMS, Job, default_name, mount_names, to_mount_paths
from gpt_jax.runtime.accelerators import parse_accelerator


def make(**fields):
    defaults = {"verb": "pretrain", "config": "gpt1", "overrides": (), "workdir": "gs://runs/a", "name": "a"}
    return Job(accelerator=parse_accelerator("v5e-16"), **defaults | fields)


def test_the_command_is_the_one_that_a_user_would_type():
    job = make(overrides=("--mesh.fsdp", "2", "--train.duration", "3 epochs"), preemptions=7, crashes=1, grace_seconds=30)
    words = ["pretrain", "gpt1", "--workdir", "gs://runs/a", "--mesh.fsdp", "2", "--train.duration", "3 epochs"]
    assert job.command() == ["gpt-jax", *words]
    options = ["--preemptions=7", "--crashes=1", "--grace-seconds=30"]
    assert job.supervised_command() == ["gpt-jax", "supervise", *options, "--", *words]
    seeds = make(verb="finetune", config="finetune/cola", overrides=("--init.from", "gs://runs/b"), seeds=5).command()
    assert seeds[1:] == ["finetune", "finetune/cola", "--workdir", "gs://runs/a", "--seeds", "5", "--init.from", "gs://runs/b"]


def test_default_names_are_valid_on_every_target():
    assert [default_name(config) for config in ("gpt1_1b5", "finetune/cola", "my/Big_run.py", "_")] == [
        "gpt1-1b5",
        "finetune-cola",
        "big-run",
        "run",
    ]


def test_buckets_become_mounts():
    words = ["--workdir", "gs://runs/a", "--data.store=gs://data/x/y", "--data.source", "text gs://no", "--init.from"]
    words += ["/mnt/disk/b"]
    assert to_mount_paths(words) == [
        *["--workdir", "/gcs/runs/a", "--data.store=/gcs/data/x/y", "--data.source", "text gs://no", "--init.from", "/mnt/disk/b"]
    ]
    assert mount_names([*words, "/gcs/runs/c"], BUCKETS) == ["runs", "data"]
    assert mount_names(words, CLAIMS) == ["disk"]


def test_machines_that_may_be_replaced_keep_compiled_programs_in_the_runs_folder():
    folders = [make(workdir=workdir).environment["JAX_COMPILATION_CACHE_DIR"] for workdir in ("gs://runs/a", "/mnt/disk/b")]
    assert folders == ["/gcs/runs/a/compiled", "/mnt/disk/b/compiled"]
    assert make().environment["JAX_PLATFORMS"] == "tpu,cpu"
