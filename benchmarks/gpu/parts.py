"""The parts of the measurements."""

import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.gpu.data import TASKS
from benchmarks.gpu.session import Session


def attention(session: Session) -> None:
    """Measures the implementations of attention, and their distance from `plain` in float32 with the same masks."""
    words = ["attention", "--config", session.sizes.model, "--batch-size", str(session.sizes.attention_batch)]
    session.bench("bfloat16", *words, "--model.compute-dtype", "bfloat16", *_against("torch"))
    session.bench("float32", *words, "--model.compute-dtype", "float32", "--model.matmul-precision", "highest")


LARGEST_ERROR = {"bfloat16": 2e-2, "float32": 1e-5}


def kernels(session: Session) -> None:
    """Checks the kernels of `pallas_gpu` on this device, and times them with several sizes of blocks."""
    words = ["-m", "benchmarks.gpu.kernels", *map(str, session.sizes.kernel_shape)]
    seconds, failure, printed = session.execute(words)
    result = {} if failure else json.loads(printed)
    wrong = [case for case in result.get("errors", ()) if _is_wrong(case)]
    session.record("pallas_gpu", [], seconds, failure or (f"{len(wrong)} of the cases are wrong" if wrong else ""), result)


def _is_wrong(case: dict[str, Any]) -> bool:
    if "failure" in case or not case["repeatable"]:
        return True
    return not all(error < LARGEST_ERROR[case["dtype"]] for error in case["errors"])  # NaN is not less, either.


EVALUATE_LAST = ("--train.eval-every", "100%", "--train.eval-windows", "256", "--train.sample-tokens", "0")
COMPARE = """
import json, sys
import jax, numpy
from orbax.checkpoint import v1 as ocp
first, second = (jax.tree.leaves(ocp.load(path)) for path in sys.argv[1:])
equal = [numpy.asarray(a).tobytes() == numpy.asarray(b).tobytes() for a, b in zip(first, second, strict=True)]
print(json.dumps({"arrays": len(equal), "equal_arrays": sum(equal)}))
"""
"""A program that compares the training states in two checkpoints bit for bit."""


def determinism(session: Session) -> None:
    """Trains twice with deterministic operations, in two processes without caches, and a third time without such operations."""
    sizes, total = session.sizes, f"{session.sizes.updates} steps"
    words = ["pretrain", sizes.model, "--data.source", "builtin:docs", "--data.max-bytes", "1000000", *EVALUATE_LAST]
    words += ["--train.save-every", "100%"]  # A save would count as time of updates.
    words += ["--data.store", str(session.scratch / "bytes"), "--data.tokenizer.kind", "bytes", "--model.vocab-size", "257"]
    words += ["--train.batch-size", "16", "--train.duration", total, "--optim.warmup", "2 steps"]
    runs = {name: session.scratch / name for name in ("first", "second", "default")}
    updates = {}
    for name, run in runs.items():
        flags = "" if name == "default" else "--xla_gpu_deterministic_ops=true"
        flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
        session.train(name, run, *words, XLA_FLAGS=flags, JAX_ENABLE_COMPILATION_CACHE="false")
        file = run / "metrics.jsonl"
        records = map(json.loads, file.read_text().splitlines() if file.exists() else ())
        updates[name] = [record for record in records if record["kind"] == "train"]
    paths = [str(runs[name] / "checkpoints" / str(sizes.updates)) for name in ("first", "second")]
    seconds, failure, printed = session.execute(["-c", COMPARE, *paths])
    first, second = ([record | {"time": 0} for record in updates[name]] for name in ("first", "second"))
    equal = sum(a == b for a, b in zip(first, second, strict=False))
    result = {"updates": sizes.updates, "equal_updates": equal, "update_seconds": {}}
    result["update_seconds"] = {name: _seconds_per_update(records) for name, records in updates.items()}
    session.record("comparison", [], seconds, failure, result if failure else result | json.loads(printed))


def _seconds_per_update(records: list[dict[str, Any]]) -> float | None:
    """Returns the mean duration of an update after the first three; None if there are too few."""
    times = [record["time"] for record in records[3:]]
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


def training(session: Session) -> None:
    """Searches for the fastest batch of the training step; times it there with other implementations of attention; and compares
    it with the peers, with and without dropout."""
    words, best = ["train", "--config", session.sizes.model], (0.0, session.sizes.batch_sizes[0])
    for size in session.sizes.batch_sizes:
        comparisons = session.bench(f"batch {size}", *words, "--batch-size", str(size))
        rate = max((_rates(comparison).get("gpt_jax", 0.0) for comparison in comparisons), default=0.0)
        if rate <= 1.03 * best[0]:
            break
        best = rate, size
    session.rate = best[0] or session.rate
    for attention in session.sizes.attentions:
        name = f"{attention}, batch {best[1]}"
        session.bench(name, *words, "--batch-size", str(best[1]), "--model.attention", attention)
    off = [word for name in ("embed", "attention", "residual") for word in (f"--model.{name}-dropout", "0")]
    for dropout, overrides in (("with dropout", []), ("without dropout", off)):
        for peers in session.sizes.peers:
            if not (against := _against(*peers)):
                continue
            for size in (best[1], best[1] // 2):  # The GPU's memory may not suffice for all programs.
                name = f"{peers[0]}, {dropout}, batch {size}"
                comparisons = session.bench(name, *words, "--batch-size", str(size), *against, *overrides, rounds=2)
                if all(len(_rates(comparison)) == len(comparison["programs"]) for comparison in comparisons):
                    break


def modeled(session: Session) -> None:
    """Compares the modeled time of training steps with the measured time."""
    for size in session.sizes.modeled_batch_sizes:
        file = session.scratch / f"modeled-{size}.json"
        words = ["plan", session.sizes.model, "--measure", "--json", str(file), "--train.batch-size", str(size)]
        seconds, failure, _ = session.execute(["-m", "gpt_jax", *words])
        session.record(f"batch {size}", words, seconds, failure, {} if failure else json.loads(file.read_text()))


def _rates(comparison: dict[str, Any]) -> dict[str, float]:
    """Returns the speed of each program that did not fail, in units of work per second."""
    programs: dict[str, Any] = comparison["programs"]
    return {name: comparison["work"] / program["median"] for name, program in programs.items() if "median" in program}


def _against(*peers: str) -> list[str]:
    """Returns the option of `bench` that names these peers, or nothing if they are not installed."""
    return ["--against", *peers] if all(map(importlib.util.find_spec, ("torch", peers[0]))) else []


def finetuning(session: Session) -> None:
    """Compares the speed of fine-tuning with that of PyTorch loops."""
    words = ["finetune", "--config", "finetune/cola", *_from_nothing(session), "--task.path", str(session.data / TASKS["cola"])]
    session.bench("cola", *words, *_against("torch", "torch-context"))


def pretraining(session: Session) -> None:
    """Trains on the novels for as many tokens as the time of this part allows."""
    seconds = session.deadline - time.monotonic() - session.sizes.startup
    if seconds < 0:
        session.record("novels", [], 0, "skipped, because too little time was left", {})
        return
    words = ["pretrain", session.sizes.novels, "--data.source", "", "--data.store", str(session.data / "store"), *EVALUATE_LAST]
    words += ["--train.save-every", "50%"]
    duration = f"{min(0.8 * seconds * session.rate, session.sizes.tokens):.0f} tokens"
    session.train("novels", session.scratch / "novels", *words, "--train.duration", duration, "--optim.warmup", "10%")


def tasks(session: Session) -> None:
    """Fine-tunes on each task, from the model of the novels and from random parameters."""
    for task in session.sizes.tasks:
        for start, words in (("novels", ["--init.from", str(session.scratch / "novels")]), ("nothing", _from_nothing(session))):
            where = ["--task.path", str(session.data / TASKS[task]), "--task.max-train", str(session.sizes.train_rows)]
            run = session.scratch / f"{task}-{start}"
            session.train(f"{task} from {start}", run, "finetune", f"finetune/{task}", *words, *where)
            shutil.rmtree(run, ignore_errors=True)  # Its checkpoints have several GB.


def _from_nothing(session: Session) -> list[str]:
    tokenizer = str(session.data / "store" / "tokenizer")
    return ["--init.from", "none", "--init.like", session.sizes.novels, "--init.tokenizer", tokenizer]


class Part(NamedTuple):
    """A part of the measurements."""

    measure: Callable[[Session], None]
    seconds: int
    """Its share of the time, in proportion to those of the others."""
    needs_data: tuple[str, ...] = ()
    """Folders of gpu-data without which the part is left out."""


PARTS = {
    "kernels": Part(kernels, 60),
    "attention": Part(attention, 120),
    "determinism": Part(determinism, 80),
    "training": Part(training, 300),
    "modeled": Part(modeled, 60),
    "finetuning": Part(finetuning, 60, ("store", TASKS["cola"])),
    "pretraining": Part(pretraining, 50, ("store",)),
    "tasks": Part(tasks, 50, ("store", *TASKS.values())),
}
