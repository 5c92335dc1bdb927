"""A disk that fills at any write of a command: one line, exit 2, nothing half-written, and the same command then continues."""

import contextlib
import io
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpt_jax.cli import main
from gpt_jax.train.checkpoint_info import list_checkpoints
from tests.failing_writes import ERRORS, compiled, fail_write, play, run_scene, stop_failing
from tests.tiny import tiny_config, write_config, write_text

pytestmark = pytest.mark.slow

TUNING = """
from gpt_jax.config import *

def config():
    files = {{split: "{folder}/" + split + ".tsv" for split in ("train", "validation", "test")}}
    task = TaskConfig(num_length_buckets=1, **files)
    train = FinetuneLoopConfig(batch_size=8, duration="4 steps", eval_every="2 steps")
    return FinetuneConfig(task=task, optim=OptimConfig(peak_lr=1e-3, warmup="1 steps"), train=train)
"""


def write_inputs(folder):
    """Writes the configs tiny.py and tuning.py, and the rows of a task."""
    train = {"duration": "4 steps", "save_every": "2 steps", "eval_every": "2 steps", "tensorboard": True, "keep_latest": 1}
    write_config(tiny_config(write_text(folder), optim={"warmup": "1 steps"}, train=train), folder / "tiny.py")
    rng = random.Random(1)
    for split, size in (("train", 40), ("validation", 12), ("test", 10)):
        rows = [f"{letter * rng.randint(3, 20)}\t{label}" for letter, label in [("a", "yes"), ("b", "no")] * (size // 2)]
        (folder / f"{split}.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    (folder / "tuning.py").write_text(TUNING.format(folder=folder))


def command(verb, folder, out):
    """Returns the words of a command that writes `out`, which has the name of the verb, or of the format of an export."""
    tuning = [
        "finetune",
        folder / "tuning.py",
        "--workdir",
        out,
        "--init.from",
        folder / "pretrained",
        "--data.pipeline",
        "threads",
    ]
    words = {
        "pretrain": ["pretrain", folder / "tiny.py", "--workdir", out],
        "prepare": ["prepare", folder / "tiny.py", "--data.store", out],
        "finetune": tuning,
        "seeds": [*tuning, "--seeds", "1"],
        "import": ["import", folder / "exported", "--workdir", out],
    }
    return words.get(verb) or ["export", folder / "pretrained", "--format", verb, "--out", out]


def run(words):
    """Runs a command in this process; returns its exit code and what it prints to standard error."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = main([str(word) for word in words])
    return code, errors.getvalue()


def fail_writes(folder, verb, stride, forever):
    """Lets every `stride`-th write of a command fail in turn, and lets the same command continue each time."""
    folder = Path(folder)
    disk = folder / "disk"
    write_inputs(folder)
    if verb not in ("pretrain", "prepare"):
        assert run(command("pretrain", folder, folder / "pretrained"))[0] == 0
    if verb == "import":
        assert run(command("npz", folder, folder / "exported"))[0] == 0
    words = command(verb, folder, disk / "out")
    whole = command(verb, folder, folder / "whole")
    code, errors = run(whole)
    assert code == 0, errors
    number, failures, attempts = 1, 0, 0
    while True:
        shutil.rmtree(disk, ignore_errors=True)
        disk.mkdir()
        fail_write(disk, number, ERRORS["ENOSPC"], forever == "True")
        code, errors = run(words)
        count = stop_failing()
        attempts += 1
        if code:
            failures += 1
            lines = [line for line in errors.splitlines() if line.startswith("gpt-jax: ")]
            assert (code, len(lines)) == (2, 1), (number, errors)
            assert "no space left" in lines[0].lower(), (number, lines)
            assert errors.splitlines()[-1] == lines[0], (number, errors)
        assert "Traceback" not in errors, (number, errors)
        leftovers = [path for path in disk.rglob("*") if "tmp" in path.name or path.name.startswith("lock.")]
        assert leftovers == [], number
        resumable = verb in ("pretrain", "prepare", "finetune", "seeds")
        if code and not resumable:
            assert list(disk.iterdir()) == [], number
        for run_folder in [path.parent for path in disk.rglob("checkpoints")]:
            assert {info.state for info in list_checkpoints(run_folder)} <= {"sound"}, number
        if code or resumable:
            assert run(words)[0] == 0, number
        assert_equal(disk / "out", folder / "whole", verb, number)
        if number > count:
            break
        number += int(stride)
    print(failures, "of", attempts, "failed")


def assert_equal(folder, whole, verb, number):
    """Checks that a command that was interrupted has made what it would have made otherwise."""
    if verb in ("pretrain", "finetune"):
        assert losses(folder) == losses(whole), number
    elif verb == "seeds":
        assert losses(folder / "seed-0") == losses(whole / "seed-0"), number
    elif verb == "prepare":
        for file in whole.rglob("*"):
            assert file.is_dir() or (folder / file.relative_to(whole)).read_bytes() == file.read_bytes(), (number, file)
    elif verb == "import":
        assert [info.state for info in list_checkpoints(folder)] == ["sound"], number
    else:
        names = [sorted(str(path.relative_to(base)) for path in base.rglob("*")) for base in (folder, whole)]
        assert names[0] == names[1], number


def losses(folder):
    """Returns step, loss and gradient norm of every update. Numbers are texts: equal texts are equal bits."""
    records = [json.loads(line, parse_float=str) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records if record["kind"] == "train"]


CASES = [("pretrain", 13, False), ("pretrain", 29, True), ("prepare", 3, False), ("finetune", 31, False), ("seeds", 61, True)]
CASES += [("import", 11, False), ("npz", 7, False), ("openai", 9, True), ("huggingface", 9, False), ("stablehlo", 7, False)]


@pytest.mark.parametrize(("verb", "stride", "forever"), CASES)
def test_a_disk_that_fills_at_any_write_is_one_line_and_the_same_command_continues(tmp_path, verb, stride, forever):
    printed = run_scene(compiled(tmp_path), __file__, "fail_writes", tmp_path, verb, stride, forever)
    failures, attempts = int(printed.split()[0]), int(printed.split()[2])
    assert failures > 0.6 * attempts > 2


# -- a real file system -----------------------------------------------------------------------------------------------------


def fill_levels(folder):
    """Runs a pre-training on file systems of different sizes, each of which becomes larger after the command has failed."""
    folder = Path(folder)
    write_inputs(folder)
    disk = folder / "disk"
    disk.mkdir()
    assert run(command("pretrain", folder, folder / "whole"))[0] == 0
    codes = []
    for kilobytes in (4, 24, 64, 100, 140, 180, 220, 300, 400, 600, 4000):
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", disk], check=True)
        code, errors = run(command("pretrain", folder, disk / "out"))
        codes.append(code)
        if code:
            assert errors.splitlines()[-1].startswith("gpt-jax: "), (kilobytes, errors)
            assert errors.count("gpt-jax: ") == 1, (kilobytes, errors)
        assert "Traceback" not in errors, (kilobytes, errors)
        assert [path for path in disk.rglob("*") if "tmp" in path.name or path.name.startswith("lock.")] == [], kilobytes
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        assert run(command("pretrain", folder, disk / "out"))[0] == 0, kilobytes
        assert losses(disk / "out") == losses(folder / "whole"), kilobytes
        subprocess.run(["umount", "--lazy", disk], check=True)
    print(codes)


def test_a_file_system_that_fills_at_any_level_is_one_line_and_the_same_command_continues(tmp_path):
    prefix = ["unshare", "-rm"]
    mount = [*prefix, "mount", "-t", "tmpfs", "tmpfs", tmp_path]
    if shutil.which("unshare") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs user namespaces (unshare -rm) to mount a small file system")
    codes = json.loads(run_scene(None, __file__, "fill_levels", tmp_path, prefix=prefix))
    assert codes[0] == 2
    assert codes[-1] == 0
    assert codes.count(2) >= 5
    assert set(codes) == {0, 2}


def on_full_device(stream, words):
    """Runs a command in a process one of whose streams goes to a device that is always full."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w") as full:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {stream: full}
        command = [sys.executable, "-m", "gpt_jax", *map(str, words)]
        return subprocess.run(command, text=True, stdin=subprocess.DEVNULL, **streams)


def test_output_that_cannot_be_written_is_one_line(tmp_path):
    write_inputs(tmp_path)
    assert run(command("pretrain", tmp_path, tmp_path / "out"))[0] == 0
    done = on_full_device("stdout", ["checkpoint", "list", tmp_path / "out"])
    assert (done.returncode, done.stderr) == (2, "gpt-jax: a file could not be written: No space left on device\n")


def test_a_log_that_cannot_be_written_does_not_end_a_run_or_change_an_exit_code(tmp_path):
    write_inputs(tmp_path)
    assert on_full_device("stderr", command("pretrain", tmp_path, tmp_path / "out")).returncode == 0
    assert (tmp_path / "out" / "result.json").exists()
    assert on_full_device("stderr", ["checkpoint", "list", tmp_path / "nowhere"]).returncode == 2


if __name__ == "__main__":
    play(globals())
