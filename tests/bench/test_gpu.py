"""The measurements on a GPU machine: commands that fail or take too long, what travels to it, and what is measured."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typing_extensions

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import data, parts, tables
from benchmarks.gpu.session import RESULTS, Session
from benchmarks.gpu.sizes import REHEARSAL
from gpt_jax.errors import UserError
from gpt_jax.runtime.machine import process_start

ROOT = Path(__file__).parents[2]


@pytest.fixture
def session(tmp_path: Path) -> Session:
    """A session that has a minute."""
    for name in ("data", "out", "scratch"):
        (tmp_path / name).mkdir()
    session = Session(REHEARSAL, tmp_path / "data", tmp_path / "out", tmp_path / "scratch")
    session.part, session.deadline = "test", time.monotonic() + 60
    return session


def results(session: Session) -> list[dict[str, Any]]:
    """Returns the lines of the results."""
    return [json.loads(line) for line in (session.scratch.parent / "out" / RESULTS).read_text().splitlines()]


# -- running commands -------------------------------------------------------------------------------------------------------


def test_a_command_is_recorded_with_its_output_and_its_failure(session):
    _, failure, printed = session.execute(["-c", "print('a figure')"])
    assert (failure, printed) == ("", "a figure\n")
    _, failure, _ = session.execute(["-c", "import sys; print('first', file=sys.stderr); raise ValueError('last')"])
    assert failure == "exit code 1: ValueError: last"
    log = (session.scratch.parent / "out" / "log.txt").read_text()
    assert "a figure\n" in log
    assert "first\n" in log


def test_a_command_ends_with_the_time_of_its_part_and_so_does_what_it_has_started(session, tmp_path):
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    session.deadline = time.monotonic() + 5
    assert session.execute(["-c", code])[1] == "stopped after 5 s"
    number, waiting = int((tmp_path / "pid").read_text()), time.monotonic() + 10
    while process_start(number):
        assert time.monotonic() < waiting
    assert session.execute(["-c", "pass"])[1] == "skipped, because the time was up"


def test_training_that_is_stopped_may_save_its_state(session, tmp_path):
    code = f"""
import signal, sys, time
def save(*_):
    open({str(tmp_path / "saved")!r}, "w")
    sys.exit(42)
signal.signal(signal.SIGTERM, save)
time.sleep(60)
"""
    session.deadline = time.monotonic() + 5
    session.execute(["-c", code])
    assert (tmp_path / "saved").exists()


def test_a_benchmark_that_fails_is_recorded_and_has_no_comparisons(session):
    assert session.bench("wrong", "matmul", "--batch-size", "3") == []
    [record] = results(session)
    assert record["command"] == "gpt-jax bench matmul --batch-size 3 --rounds 1"
    assert record["failure"].startswith("exit code 2: gpt-jax: --batch-size: belongs to")


# -- what travels -----------------------------------------------------------------------------------------------------------


def test_a_machine_without_a_package_uses_the_one_that_travels(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "REQUIRED", ("json", "a_package_of_the_test"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    with pytest.raises(UserError, match="lacks a_package_of_the_test, which are not in"):
        data.use_packages(tmp_path)
    (tmp_path / "packages" / "a_package_of_the_test").mkdir(parents=True)
    data.use_packages(tmp_path)
    assert os.environ["PYTHONPATH"] == f"{tmp_path / 'packages'}{os.pathsep}elsewhere"
    assert sys.path[0] == str(tmp_path / "packages")


def write_tasks(folder: Path) -> Path:
    """Writes tasks with a few rows in GLUE's layout."""
    for name in data.TASKS.values():
        (folder / name).mkdir(parents=True)
        for split in ("train", "dev", "test"):
            rows = [f"source\t{number % 2}\t\tThis is sentence number {number}." for number in range(64)]
            (folder / name / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    header = "index\tsentence\n"
    (folder / "CoLA" / "test.tsv").write_text(header + "".join(f"{number}\tThis is one.\n" for number in range(64)))
    return folder


def test_the_packages_that_travel_can_be_imported_alone(tmp_path):
    data.prepare("smoke", None, None, tmp_path / "data")
    (tmp_path / "typing_extensions.py").write_text(Path(typing_extensions.__file__).read_text())  # It comes with PyTorch.
    paths = os.pathsep.join([str(tmp_path / "data" / "packages"), str(tmp_path)])
    command = [sys.executable, "-S", "-c", "import filelock, jaxtyping, tyro; print(tyro.__file__)"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.stdout.startswith(str(tmp_path)), done.stderr


def test_a_task_that_is_missing_and_too_much_text_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"--tasks: there is no file .*CoLA/train.tsv; name a folder with CoLA, SST-2, RTE"):
        data.prepare("smoke", None, tmp_path, tmp_path / "data")
    monkeypatch.setattr(data, "MAX_BYTES", 1 << 20)
    with pytest.raises(UserError, match=r"is larger than 1 MiB \(CoLA 0.0, RTE 0.0, SST-2 0.0, packages \d.\d\); delete it"):
        data.prepare("smoke", None, write_tasks(tmp_path / "glue"), tmp_path / "data")


# -- the measurements -------------------------------------------------------------------------------------------------------


def test_without_a_gpu_nothing_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "run", "--out", str(tmp_path / "out")])
    assert command.main() == 2
    assert capsys.readouterr().err == "benchmarks.gpu: JAX finds no GPU here; --rehearse measures a small model on the CPU\n"


def test_a_part_that_fails_and_one_without_data_do_not_keep_the_others_from_being_measured(session, monkeypatch):
    def broken(session: Session) -> None:
        raise ValueError("not what was expected")

    def measured(session: Session) -> None:
        session.record("all", [], 0, "", {"seconds": session.deadline - time.monotonic()})

    kinds = {"first": broken, "second": measured, "third": measured, "fourth": measured}
    chosen = {name: parts.Part(measure, 10, ("store",) if name == "third" else ()) for name, measure in kinds.items()}
    monkeypatch.setattr(command, "PARTS", chosen)
    out = session.scratch.parent / "out"
    words = ["run", "--rehearse", "--minutes", "1", "--data", str(session.data), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["gpu", *words, "--parts", "fourth", "first", "third", "second"])
    assert command.main() == 0
    machine, *records = results(session)
    assert machine["versions"].keys() >= {"python", "jax", "numpy"}
    assert [(record["part"], record["failure"]) for record in records] == [
        ("first", "ValueError: not what was expected"),
        ("second", ""),
        ("third", f"left out, because {session.data} has no text or no tasks (see `prepare`)"),
        ("fourth", ""),
    ]
    second, _, fourth = (record["result"].get("seconds") for record in records[1:])
    assert second < 60 / 3 < fourth < 60  # A third of what is left, and all of it.


def test_the_kernels_are_checked_and_timed(session, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    session = Session(session.sizes, session.data, session.scratch.parent / "out", session.scratch)
    session.part, session.deadline = "kernels", time.monotonic() + 200
    parts.kernels(session)
    [record] = results(session)
    assert record["failure"] == ""
    cases = {case["dtype"]: case for case in record["result"]["errors"]}
    assert cases.keys() == {"bfloat16", "float32"}
    assert all(case["repeatable"] for case in cases.values())
    assert max(cases["float32"]["errors"]) < 1e-5
    for name in ("errors", "plain"):
        assert 1e-3 < max(cases["bfloat16"][name]) < 5e-3
    [timed] = record["result"]["times"]
    assert (timed["kernel"], timed["blocks"]) == ("forward", [16, 16, 4, 2])
    assert timed["ms"] > 0


@pytest.mark.parametrize(
    "case",
    [{"failure": "no"}, {"repeatable": False, "errors": [1e-3]}, {"errors": [1e-3, 3e-2]}, {"errors": [1e-3, float("nan")]}],
)
def test_kernels_that_are_wrong_are_counted(session, monkeypatch, case):
    good = {"dtype": "bfloat16", "errors": [1e-3], "repeatable": True}
    printed = json.dumps({"errors": [good, good | case], "times": []})
    monkeypatch.setattr(session, "execute", lambda words: (1.0, "", printed))
    parts.kernels(session)
    assert results(session)[0]["failure"] == "1 of the cases are wrong"


@pytest.mark.parametrize("failure", ["", "stopped after 9 s"])
def test_modeled_steps_are_compared_with_measured_ones(session, monkeypatch, failure):
    """A tenth slower than modeled; two operations are not modeled."""
    measured = {"modeled": 0.009, "measured": 0.010, "error": -0.1, "unmodeled": {"gemm": 2}}

    def execute(words):
        assert words[:5] == ["-m", "gpt_jax", "plan", "smoke", "--measure"]
        assert words[-2:] == ["--train.batch-size", "8"]
        Path(words[words.index("--json") + 1]).write_text(json.dumps(measured))
        return 3.0, failure, ""

    monkeypatch.setattr(session, "execute", execute)
    parts.modeled(session)
    [record] = results(session)
    assert (record["name"], record["failure"], record["result"]) == ("batch 8", failure, {} if failure else measured)
    rows = "".join(tables.PARTS["modeled"]([record], ""))
    assert ("batch 8" in rows) == (not failure)
    assert ("9.00" in rows and "10.00" in rows and "-10.0 %" in rows) == (not failure)


@pytest.mark.slow
def test_the_rehearsal_of_training_needs_no_tensorflow(tmp_path, monkeypatch, capsys):
    (tmp_path / "blocked" / "tensorflow").mkdir(parents=True)
    (tmp_path / "blocked" / "tensorflow" / "__init__.py").write_text("raise ImportError('tensorflow was imported')")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 8))) for _ in range(8000)]
    (tmp_path / "novels").mkdir()
    for number in range(200):
        (tmp_path / "novels" / f"{number}.txt").write_text(" ".join(rng.choices(words, k=500)))
    data.prepare("smoke", tmp_path / "novels", write_tasks(tmp_path / "glue"), tmp_path / "data")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'blocked'}{os.pathsep}{ROOT}")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    monkeypatch.setattr(command, "REHEARSAL", REHEARSAL._replace(tokens=20_000))
    options = ["run", "--rehearse", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["gpu", *options, "--parts", "determinism", "pretraining", "tasks"])
    assert command.main() == 0
    machine, *records = [json.loads(line) for line in (tmp_path / "out" / RESULTS).read_text().splitlines()]
    assert machine["platform"] == "cpu"
    assert not any(record["failure"] for record in records), records
    measured = {(record["part"], record["name"]): record["result"] for record in records}
    assert measured["determinism", "comparison"]["equal_updates"] == REHEARSAL.updates
    compared = measured["determinism", "comparison"]
    assert compared["equal_arrays"] == compared["arrays"] > 10
    assert measured["pretraining", "novels"]["tokens"] > 10_000
    assert {name for part, name in measured if part == "tasks"} == {"cola from novels", "cola from nothing"}
    monkeypatch.setattr(sys, "argv", ["gpu", "tables", "--out", str(tmp_path / "out")])
    assert command.main() == 0
    assert f"{REHEARSAL.updates} of {REHEARSAL.updates} updates" in capsys.readouterr().out


@pytest.mark.parametrize(("rates", "tried"), [([100, 150, 151, 400], [16, 32, 64]), ([100, None], [16, 32]), ([None], [16])])
def test_the_batch_grows_until_it_is_not_faster_or_too_large(session, monkeypatch, rates, tried):
    calls: list[tuple[str, ...]] = []

    def bench(name: str, *words: str, rounds: int = 1) -> list[dict[str, Any]]:
        calls.append(words)
        rate = rates[len(calls) - 1]
        program = {"failure": "out of memory"} if rate is None else {"median": 1000 / rate}
        return [{"work": 1000, "programs": {"gpt_jax": program}}]

    session.sizes = REHEARSAL._replace(batch_sizes=(16, 32, 64, 128), attentions=(), peers=())
    monkeypatch.setattr(session, "bench", bench)
    parts.training(session)
    assert [int(words[words.index("--batch-size") + 1]) for words in calls] == tried
    assert session.rate == max([rate for rate in rates[: len(tried)] if rate and rate != 151], default=REHEARSAL.rate)


def test_other_implementations_of_attention_are_timed_with_the_fastest_batch(session, monkeypatch):
    calls = []

    def bench(name: str, *words: str, rounds: int = 1) -> list[dict[str, Any]]:
        size = int(words[words.index("--batch-size") + 1])
        calls.append((name, size, words[words.index("--model.attention") + 1] if "--model.attention" in words else "auto"))
        return [{"work": size, "programs": {"gpt_jax": {"median": 1.0 if size <= 32 else 2.0}}}]

    session.sizes = REHEARSAL._replace(batch_sizes=(16, 32, 64), attentions=("plain", "pallas_gpu"), peers=())
    monkeypatch.setattr(session, "bench", bench)
    parts.training(session)
    assert calls[:3] == [(f"batch {size}", size, "auto") for size in (16, 32, 64)]
    assert calls[3:] == [("plain, batch 32", 32, "plain"), ("pallas_gpu, batch 32", 32, "pallas_gpu")]


def test_a_comparison_for_which_the_memory_does_not_suffice_is_repeated_with_half_the_batch(session, monkeypatch):
    calls = []

    def bench(name: str, *words: str, rounds: int = 1) -> list[dict[str, Any]]:
        calls.append((int(words[words.index("--batch-size") + 1]), "--against" in words, "--model.embed-dropout" in words))
        peer = {"failure": "out of memory"} if calls[-1][0] == 32 else {"median": 1.0}
        return [{"work": 1, "programs": {"gpt_jax": {"median": 1.0}} | ({"torch": peer} if calls[-1][1] else {})}]

    session.sizes = REHEARSAL._replace(batch_sizes=(32, 64), attentions=())
    monkeypatch.setattr(session, "bench", bench)
    monkeypatch.setattr(parts, "_against", lambda *peers: ["--against", *peers])
    parts.training(session)
    assert calls == [
        (32, False, False),
        (64, False, False),
        (32, True, False),
        (16, True, False),
        (32, True, True),
        (16, True, True),
    ]
