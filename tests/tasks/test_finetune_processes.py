"""Fine-tuning in separate processes: one that is killed at any instant, and two for several seeds, equal an uninterrupted one."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest

from gpt_jax.cli import main

CONFIG = """
from gpt_jax.config import FinetuneConfig, FinetuneLoopConfig, MeshConfig, OptimConfig, PipelineConfig, TaskConfig, TransferConfig


def config():
    return FinetuneConfig(
        data=PipelineConfig(pipeline="threads"),
        optim=OptimConfig(peak_lr=0.01, schedule="linear", warmup="10%", clip_norm=1.0),
        train=FinetuneLoopConfig(batch_size=8, duration="2 epochs", save_every="1 steps", keep_latest=2, tensorboard=False),
        task=TaskConfig(**{task!r}, num_length_buckets=2),
        init=TransferConfig({run!r}),
    )
"""


def trajectory(run):
    """Returns the records of updates and evaluations, without what differs between attempts."""
    records = (json.loads(line, parse_float=str) for line in (run / "metrics.jsonl").read_text().splitlines())
    kept = [record for record in records if record["kind"] in ("train", "eval")]
    return [{name: value for name, value in record.items() if name not in ("time", "attempt")} for record in kept]


@pytest.fixture(scope="module")
def config_file(pretrained, own_task, tmp_path_factory):
    path = tmp_path_factory.mktemp("processes") / "own.py"
    path.write_text(CONFIG.format(task=own_task, run=str(pretrained)))
    return path


@pytest.fixture(scope="module")
def uninterrupted(config_file):
    """The folder of uninterrupted runs of two seeds, in this process."""
    folder = config_file.with_name("uninterrupted")
    assert main(["finetune", str(config_file), "--workdir", str(folder), "--seeds", "2"]) == 0
    return folder


@pytest.mark.slow
def test_killed_at_random_instants_it_equals_the_uninterrupted_run(uninterrupted, config_file, tmp_path):
    rng = random.Random(0)
    run = tmp_path / "run"
    records = run / "metrics.jsonl"
    command = [sys.executable, "-m", "gpt_jax", "finetune", str(config_file), "--workdir", str(run)]
    kills = 0
    while kills < 30:
        with open(tmp_path / "log", "ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        before = records.read_bytes().count(b"\n") if records.exists() else 0
        wanted = before + rng.randint(2, 5)
        while process.poll() is None and not (records.exists() and records.read_bytes().count(b"\n") >= wanted):
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        process.kill()
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL, (tmp_path / "log").read_text()
        kills += 1
    assert kills > 1
    assert trajectory(run) == trajectory(uninterrupted / "seed-0")
    results = [json.loads((folder / "result.json").read_text()) for folder in (run, uninterrupted / "seed-0")]
    assert results[0]["validation"] == results[1]["validation"]
    assert results[0]["test"] == results[1]["test"]


@pytest.mark.slow
def test_two_processes_fine_tune_several_seeds_as_one_does(uninterrupted, config_file, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = tmp_path / "run"
    processes = []
    for number in (0, 1):
        command = [sys.executable, "-m", "gpt_jax", "finetune", str(config_file), "--workdir", str(run), "--seeds", "2"]
        command += ["--distributed.coordinator", f"127.0.0.1:{port}", "--distributed.num-processes", "2"]
        command += ["--distributed.process-id", str(number)]
        with open(tmp_path / f"log{number}", "wb") as log:
            environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4"}
            processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
    try:
        codes = [process.wait(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], "\n".join((tmp_path / f"log{number}").read_text() for number in (0, 1))
    num_tables = [(tmp_path / f"log{number}").read_text().count("of 2 seeds") for number in (0, 1)]
    assert num_tables == [1, 0], "the table of seeds is printed once, by the first process"
    for seed in (0, 1):
        ours, theirs = (trajectory(folder / f"seed-{seed}") for folder in (run, uninterrupted))
        assert [record["step"] for record in ours] == [record["step"] for record in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert float(one["loss"]) == pytest.approx(float(other["loss"]), rel=1e-5)
    summary, expected = (json.loads((folder / "result.json").read_text()) for folder in (run, uninterrupted))
    assert summary["validation"]["loss"]["values"] == pytest.approx(expected["validation"]["loss"]["values"], rel=1e-4)
