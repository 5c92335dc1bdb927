"""The tables of a GPU machine's results."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.session import RESULTS
from benchmarks.gpu.tables import describe
from gpt_jax.errors import UserError

MACHINE = {
    "date": "2027-01-02T03:04+00:00",
    "platform": "gpu",
    "device": "NVIDIA H100 80GB HBM3",
    "devices": 1,
    "versions": {"python": "3.12.3", "jax": "0.11.2", "torch": "2.11.0"},
    "commit": "0123456789abcdef",
    "command": "python -m benchmarks.gpu run",
}


def program(*seconds: float, **others: Any) -> dict[str, Any]:
    """Returns a program as `gpt-jax bench --json` writes it."""
    return {"seconds": seconds, "median": seconds[0], "setup": 12.34, "speed_ratio": 1.5, "details": {}} | others


def comparison(title: str, reference: str, programs: dict[str, Any], work: float = 0, flops: float = 0) -> dict[str, Any]:
    return {"title": title, "reference": reference, "work": work, "flops": flops, "programs": programs}


def record(part: str, name: str, failure: str = "", *comparisons: dict[str, Any], **result: Any) -> dict[str, Any]:
    contents = {"comparisons": comparisons} if comparisons else result
    return {"part": part, "name": name, "command": "", "seconds": 1.0, "failure": failure, "result": contents}


ERRORS = {"relative error of the output": 1.23e-3, "largest relative error of a gradient": 4.56e-3}
CASE = {"length": 512, "dim": 64, "segment": 0, "dtype": "bfloat16"}
RECORDS = [
    MACHINE,
    record(
        "kernels",
        "pallas_gpu",
        errors=[
            CASE | {"errors": [1e-3, 2e-3, 3e-3, 2e-3], "plain": [2e-3, 2e-3, 2e-3, 2.5e-3], "repeatable": True},
            CASE | {"segment": 200, "failure": "ValueError: no"},
        ],
        times=[
            {"kernel": "forward", "blocks": [128, 64, 4, 3], "ms": 0.1234},
            {"kernel": "keys", "blocks": [64, 64, 4, 2], "failure": "out of memory"},
        ],
    ),
    record(
        "attention",
        "bfloat16",
        "",
        comparison("attention, output, no dropout: batch 32", "torch", {"plain": program(1e-3), "torch": program(5e-4)}),
        comparison("attention, output and gradients, dropout 0.1: batch 32", "", {"plain": program(2e-3, details=ERRORS)}),
    ),
    record(
        "determinism",
        "comparison",
        updates=100,
        equal_updates=99,
        arrays=44,
        equal_arrays=43,
        update_seconds={"first": 0.012, "second": 0.011, "default": 0.01},
    ),
    record(
        "training",
        "torch",
        "stopped after 9 s",
        comparison(
            "train gpt1: batch 64 x 512, dropout 0.1",
            "torch",
            # 1 PFLOP in 4 seconds is 25.3 % of 989.4 TFLOP/s.
            {"gpt_jax": program(4.0, 3.0, 5.0), "torch": {"failure": "out of memory"}},
            work=8000,
            flops=1e15,
        ),
    ),
    record(
        "training",
        "pallas_gpu, batch 64",
        "",
        comparison("train gpt1: batch 64 x 512, dropout 0.1", "gpt_jax", {"gpt_jax": program(2.0)}, work=8000, flops=1e15),
    ),
    record(
        "finetuning",
        "cola",
        "",
        comparison("finetune cola: 10 batches", "gpt_jax", {"gpt_jax": program(0.5, details={"padding, %": 12.34})}, work=320),
    ),
    record("pretraining", "novels", tokens=17_000_000, seconds=60.0, tokens_per_second=283_333.3, loss=4.321, perplexity=75.3),
    record("tasks", "cola from novels", validation={"matthews": 0.123, "loss": 0.6}),
    record("tasks", "cola from nothing", validation={"matthews": -0.01, "loss": 0.6}),
    record("tasks", "rte from novels", validation={"accuracy": 0.5}),
    record("tasks", "rte from nothing", "left out, because the time was over"),
]
EXPECTED = """## NVIDIA H100 80GB HBM3 (2027-01-02)

python 3.12.3, jax 0.11.2, torch 2.11.0; commit 0123456.

    python -m benchmarks.gpu run

| `pallas_gpu` | length | head | segments | relative error of output | of the worst result | of `plain`'s worst | repeatable |
|---|---|---|---|---|---|---|---|
| bfloat16 | 512 | 64 |  | 1.0e-03 | 3.0e-03 | 2.5e-03 | yes |
| bfloat16 | 512 | 64 | 200 | failed: ValueError: no |  |  |  |

| kernel | queries x keys | warps | stages | ms of output and gradients |
|---|---|---|---|---|
| forward | 128 x 64 | 4 | 3 | 0.123 |
| keys | 64 x 64 | 4 | 2 | failed: out of memory |

| attention | dtype | what | ms | relative error of the output | of the worst gradient |
|---|---|---|---|---|---|
| `plain` | bfloat16 | output, no dropout | 1.00 |  |  |
| `torch` | bfloat16 | output, no dropout | 0.500 |  |  |
| `plain` | bfloat16 | output and gradients, dropout 0.1 | 2.00 | 1.2e-03 | 4.6e-03 |

In two runs with deterministic operations, in separate processes without caches, 99 of 100 updates have the same
loss and the same norm of the gradient bit for bit, and of the final states 43 of 44 arrays.
An update took 12.0 ms, and 10.0 ms with the default operations (+20%).

| training | program | tokens/s | ratio to the best peer | set-up, s | MFU |
|---|---|---|---|---|---|
| batch 64 x 512, dropout 0.1 | `gpt_jax` | 2,000 (1,600 to 2,667) | 1.50 | 12.3 | 25.3% |
| batch 64 x 512, dropout 0.1 | `torch` | failed: out of memory |  |  |  |
| batch 64 x 512, dropout 0.1, pallas_gpu attention | `gpt_jax` | 4,000 |  | 12.3 | 50.5% |

| fine-tuning | program | examples/s | ratio to the best peer | set-up, s | padding, % |
|---|---|---|---|---|---|
| 10 batches | `gpt_jax` | 640 |  | 12.3 | 12.3 |

| pre-training | tokens | seconds | tokens/s | validation loss | perplexity |
|---|---|---|---|---|---|
| novels | 17,000,000 | 60.0 | 283,333 | 4.32 | 75.3 |

| validation, % | from the novels | from nothing |
|---|---|---|
| fine-tuning on cola, matthews | 12.3 | -1.0 |
| fine-tuning on rte, accuracy | 50.0 |  |

Not measured completely:

- training, torch: stopped after 9 s
- tasks, rte from nothing: left out, because the time was over
"""


def write(folder: Path, *records: dict[str, Any]) -> Path:
    (folder / RESULTS).write_text("".join(json.dumps(line) + "\n" for line in records))
    return folder


def test_every_part_has_its_table(tmp_path):
    assert describe(write(tmp_path, *RECORDS)) == EXPECTED


def test_results_of_several_machines_are_apart_and_a_part_without_results_has_no_table(tmp_path):
    other = MACHINE | {"device": "cpu", "devices": 2, "commit": ""}
    text = describe(write(tmp_path, MACHINE, RECORDS[7], other, RECORDS[6]))
    assert text.index("| novels |") < text.index("## 2 x cpu (2027-01-02)") < text.index("| 10 batches |")
    assert "commit unknown" in text
    assert "attention" not in text
    assert "Not measured" not in text


def test_missing_and_damaged_results_are_one_line(tmp_path):
    with pytest.raises(UserError, match=rf"{RESULTS}: No such file or directory; `run` writes it"):
        describe(tmp_path)
    (tmp_path / RESULTS).write_text("{\n")
    with pytest.raises(UserError, match="is not a file of results"):
        describe(tmp_path)


def test_a_last_line_that_was_not_written_completely_is_left_out(tmp_path):
    write(tmp_path, *RECORDS)
    text = describe(tmp_path)
    with (tmp_path / RESULTS).open("a") as file:
        file.write('{"part": "atten')
    assert describe(tmp_path) == text
