"""The planning of a job by `gpt-jax plan`: what the launcher shows, and when it refuses or does not ask."""

import os
import subprocess
import sys
import time

import pytest

from gpt_jax.cli import main
from gpt_jax.config import load
from gpt_jax.errors import UserError
from gpt_jax.launch import gke, planning
from gpt_jax.launch.job import Job
from gpt_jax.plan.describe import describe
from gpt_jax.runtime.accelerators import parse_accelerator

run_plan = planning.run_plan  # before a fixture replaces it
PLAN = [sys.executable, "-m", "gpt_jax", "plan"]
GKE = ("--workdir", "gs://b/run", "--image", "I", "--accelerator", "v5e-16", "--dry-run")
STORE = ("--data.store", "gs://b/store")
ROWS = ("--task.train", "gs://b/train.tsv", "--task.validation", "gs://b/dev.tsv")
TOKENIZER = ("--init.tokenizer", "gs://b/tokenizer")
DOES_NOT_FIT = "--train.batch-size: 9 do not fit; at most 8 do"


def make(accelerator="v5e-16", config="gpt1", **fields):
    defaults = {"verb": "pretrain", "overrides": (), "workdir": "gs://runs/a", "name": "a"}
    return Job(config=config, accelerator=parse_accelerator(accelerator), **defaults | fields)


# -- when a job is planned --------------------------------------------------------------------------------------------------


def test_a_job_is_planned_before_it_is_created(plans, capsys, monkeypatch):
    created = []
    monkeypatch.setattr(gke, "submit", lambda job: created.append(job) or 0)
    plans.answer = 2, "", DOES_NOT_FIT
    for more in (GKE, GKE[:-1]):
        assert main(["launch", "gke", "gpt1", *more, *STORE]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.splitlines()[-1] == f"gpt-jax: {DOES_NOT_FIT}"
    assert created == []
    assert plans == [[*PLAN, "gpt1", "--topology", "v5e-16", "--slices", "1"]] * 2
    plans.answer = 0, "header\n\nmemory\n  1 of 2\n\nlimited\n", ""
    assert main(["launch", "gke", "gpt1", *GKE[:-1], *STORE]) == 0
    assert capsys.readouterr().err.splitlines()[-2:] == ["plan: memory: 1 of 2", "plan: limited"]
    assert len(created) == 1


def test_the_report_is_not_mixed_into_the_manifest(plans, capsys):
    assert main(["launch", "gke", "gpt1", *GKE, *STORE]) == 0
    manifest = capsys.readouterr().out
    plans.answer = 0, "header\n\nmemory\n  1 of 2\n\nlimited\n", ""
    assert main(["launch", "gke", "gpt1", *GKE, *STORE]) == 0
    assert capsys.readouterr().out == manifest


@pytest.mark.parametrize(
    "words",
    [("gke", "gpt1", *GKE, *STORE, "--no-plan"), ("local", "smoke", "--workdir", "RUN", "--accelerator", "cpu-2", "--dry-run")],
)
def test_other_jobs_are_not_planned(plans, words):
    assert main(["launch", *words]) == 0
    assert plans == []


def test_mistakes_are_reported_before_a_plan_is_made(plans):
    assert main(["launch", "gke", "gpt1", *GKE, *STORE, "--zone", "us-central1"]) == 2
    assert main(["launch", "gke", "gpt1", *GKE]) == 2  # There is no text to read.
    assert plans == []


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (("finetune/cola", "--init.from", "gs://b/base"), "the architecture of gs://b/base"),
        (("finetune/cola", "--init.from", "none", "--init.like", "/gcs/b/base"), "the architecture of /gcs/b/base"),
        (("finetune/own", *ROWS, "--init.from", "none", "--init.like", "smoke", *TOKENIZER), "the labels in gs://b/train.tsv"),
    ],
)
def test_a_fine_tuning_whose_files_are_elsewhere_is_launched_without_a_plan(plans, capsys, words, missing):
    assert main(["launch", "gke", words[0], *GKE, *words[1:]]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == f"plan: skipped, because it needs {missing}, which is not on this machine"
    assert plans == []


# -- what is planned --------------------------------------------------------------------------------------------------------


def test_paths_that_only_the_workers_see_are_not_planned(tmp_path):
    paths = ("--data.tokenizer.path=gs://b/t", "--data.source", "gs://b/s", *STORE)
    job = make(overrides=("--train.prompts", "a", "b", *paths, "--train.batch-size", "32", "--mesh.slice=2"), slices=2)
    kept = ["--train.prompts", "a", "b", "--train.batch-size", "32", "--mesh.slice=2"]
    assert planning.plan_command(job) == [*PLAN, "gpt1", "--topology", "v5e-16", "--slices", "2", *kept]
    # A config may contain paths as well.
    config = tmp_path / "own.py"
    text = (load.config_folder() / "gpt1.py").read_text()
    config.write_text(text.replace("DataConfig(tok", 'DataConfig(store="gs://b/store", tok'))
    command = planning.plan_command(make(config=str(config), overrides=STORE))
    assert command == [*PLAN, str(config), "--topology", "v5e-16", "--slices", "1", "--data.store="]
    fields = load.flatten_config(load.apply_overrides(load.load_config(str(config)), command[-1:], ""))
    assert not any(value for value, affects in fields.values() if affects == "input")


def test_a_fine_tuning_is_planned_with_its_checkpoint_and_its_task(plans, tmp_path):
    """The labels of its task are known, so its rows may be anywhere."""
    base = tmp_path / "base"
    base.mkdir()
    named = ("--init.from", str(base), "--task.path", "gs://b/cola", "--train.batch-size", "64")
    like = ("--init.from=none", "--init.like", "gpt1", "--init.tokenizer", "gs://b/tokenizer")
    labeled = (*like, *ROWS, "--task.labels", "x", "y")
    for config, overrides in (("finetune/cola", named), ("finetune/cola", like), ("finetune/own", labeled)):
        planning.check_plan(make(verb="finetune", config=config, overrides=overrides))
        assert plans.pop() == [*PLAN, config, "--topology", "v5e-16", "--slices", "1", *overrides]


def test_a_run_on_gpus_is_planned_too(plans):
    planning.check_plan(make("h100-8"))
    assert plans == [[*PLAN, "gpt1", "--topology", "h100-8", "--slices", "1"]]


# -- what a plan answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((2, "", DOES_NOT_FIT), DOES_NOT_FIT),
        ((1, "", "it needs 20 GiB"), "it needs 20 GiB; --no-plan launches the job without a plan"),
        ((3, "", ""), "gpt-jax plan failed with exit code 3; --no-plan launches the job without a plan"),
        (
            (-9, "", ""),
            "gpt-jax plan was killed by signal 9, perhaps because memory ran out; --no-plan launches the job without a plan",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(plans, answer, message):
    plans.answer = answer
    with pytest.raises(UserError) as raised:
        planning.check_plan(make())
    assert str(raised.value) == message


def test_the_progress_of_a_plan_is_shown_and_its_error_is_returned(capfd):
    code = "import sys; print('compiling', file=sys.stderr); print('gpt-jax: too large', file=sys.stderr); sys.exit(2)"
    assert run_plan([sys.executable, "-c", code]) == (2, "", "too large")
    assert capfd.readouterr() == ("", "compiling\n")
    assert run_plan([sys.executable, "-c", "print('x' * 10**6)"]) == (0, "x" * 10**6 + "\n", "")


def test_an_interrupted_launch_ends_its_plan(monkeypatch, tmp_path):
    def interrupt(text):
        raise KeyboardInterrupt

    monkeypatch.setattr(planning, "say", interrupt)
    code = f"import os, pathlib, sys, time; pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))"
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_plan([sys.executable, "-c", f"{code}; print('compiling', file=sys.stderr, flush=True); time.sleep(60)"])
    assert time.monotonic() - started < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


REPORT = {
    **{"config": "gpt1", "accelerator": "v5e-16", "slices": 1, "chips": 16, "device_kind": "TPU v5 lite", "dtype": "bfloat16"},
    **{
        "num_parameters": 1000,
        "verb": "pretrain",
        "model": "transformer",
        "cycles_of_xla": {"mlp forward product": 90},
        "examples": 512,
        "sequences": 512,
        "length": 512,
        "micro_batches": 1,
        "sequences_per_device": 32,
    },
    **{"mesh": {"data": 16}, "choices": {"remat": "dots"}, "versions": {"jax": "1", "libtpu": "2"}, "compile_seconds": 60.0},
    "memory": dict.fromkeys(("parameters", "moments", "batch", "temporaries", "code"), 2**30)
    | {"activations": 0, "peak": 5 << 30},
    "cycles": {"mlp": {"forward": 100}},
    "product_cycles": 90,
    "recomputed_cycles": 0,
    "kernels": [],
    "links": {"inside": 50e9, "between_slices": 3e9},
    "flops": {"token": 10.0, "step": 1000.0},
    "time": {"compute": 0.1, "exposed": 0.01, "step": 0.11, "tokens_per_second": 1000.0, "utilization": 0.5},
    "duration": "100 epochs",
}
REPORT["memory"]["available"] = 16 << 30
REPORT["time"]["utilization_by_computation"] = 0.6
COLLECTIVE = {"kind": "all-reduce", "dtype": "f32", "axes": "data", "part": "mlp", "direction": "backward", "times": 2}
COLLECTIVE |= {"bytes": 100, "seconds": 0.01, "exposed_seconds": 0.01, "asynchronous": False}


@pytest.mark.parametrize("collectives", [[], [COLLECTIVE]])
def test_a_launch_shows_five_lines_of_a_report(collectives):
    shown = planning.summary(describe(REPORT | {"collectives": collectives}))
    memory = "5.00 of 16.00 (31%): parameters 1.00, moments 1.00, batch 1.00, temporaries 1.00, code 1.00"
    assert shown[0] == f"memory of a device, GiB: {memory}"
    assert shown[1] == "modeled step: 110.0 ms = 100.0 computing + 10.0 waiting for collectives"
    assert shown[2].startswith("1,000 tokens/s; MFU 50.0% of 197 TFLOP/s a device")
    assert shown[3].startswith("run of 100 epochs: 1,000 steps take 0.4889 chip-hours, $0.59 at the list price of $1.20 ")
    assert shown[3].endswith(")")
    assert shown[4].startswith("limited by matrix products")
    assert len(shown) == 5


def test_without_libtpu_a_launch_is_planned_by_arithmetic(tmp_path):
    """This is the only test here that runs `gpt-jax plan`."""
    (tmp_path / "sitecustomize.py").write_text("import sys\n\nsys.modules['libtpu'] = None\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}

    def launch(*words):
        command = [sys.executable, "-m", "gpt_jax", "launch", "gke", "gpt1", *GKE, *STORE, *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout, [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]

    large = ("--model.remat", "off", "--train.batch-size")
    assert main(["launch", "gke", "gpt1", *GKE, *STORE, *large, "16384"]) == 0  # The other checks accept it.
    code, manifest, lines = launch(*large, "16384")
    assert (code, manifest, len(lines)) == (2, "", 1)
    assert "gpt-jax: --train.batch-size: 16384 is 1024 sequences a device, which with --model.remat off need about " in lines[0]
    advice = lines[0].partition("(--train.batch-size ")[2].partition(")")[0]
    code, manifest, lines = launch(*large, advice)
    assert (code, manifest.startswith("# create:")) == (0, True)
    assert all(line.startswith("plan: ") for line in lines)
    assert [line.split()[1] for line in lines] == ["memory", "a", "at", "at", "the"]
    assert lines[3].startswith("plan: at least for the run of 100 epochs: 1,000 steps take ")
    assert "give" not in lines[3]
    assert "(libtpu is not installed, so nothing was compiled; " in lines[4]
