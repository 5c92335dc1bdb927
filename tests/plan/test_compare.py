"""Two reports side by side."""

import copy

from gpt_jax.plan.compare import describe_comparison, rows

REPORT = {
    "memory": {"parameters": 2**30, "moments": 2**31, "temporaries": 3 * 2**30, "peak": 6 * 2**30},
    "cycles": {"mlp": {"forward": 20_000_000, "backward": 40_000_000}, "loss": {"forward": 10_000_000}},
    "collectives": [
        {"kind": "all-gather", "dtype": "bf16", "axes": "fsdp", "bytes": 2**20},
        {"kind": "all-gather", "dtype": "bf16", "axes": "fsdp", "bytes": 2**21},
    ],
    "time": {"compute": 0.05, "exposed": 0.01, "step": 0.06, "utilization": 0.5},
}


def test_a_regression_shows_as_a_row():
    after = copy.deepcopy(REPORT)
    after["memory"]["temporaries"] *= 2
    after["cycles"]["mlp"]["backward"] = 46_000_000
    after["cycles"]["scan"] = {"forward": 5_000_000}
    del after["cycles"]["loss"]
    after["collectives"].append({"kind": "all-reduce", "dtype": "f32", "axes": "data", "bytes": 2**22})
    changed = {row.name: (row.before, row.after, row.change) for row in rows(REPORT, after) if row.change}
    assert changed == {
        "memory: temporaries": (3, 6, "+100.0%"),
        "cycles: mlp": (60, 66, "+10.0%"),
        "cycles: loss": (10, 0, "gone"),
        "cycles: scan": (0, 5, "new"),
        "cycles: all": (70, 71, "+1.4%"),
        "all-reduce f32 over data": (0, 4, "new"),
    }


def test_the_same_report_has_no_changes():
    assert not [row for row in rows(REPORT, REPORT) if row.change]
    text = describe_comparison(REPORT, REPORT, ("before.json", "after.json")).splitlines()
    assert text[0].split() == ["before.json", "after.json"]
    row = "all-gather bf16 over fsdp (MiB) 3.00 3.00"
    assert row in [" ".join(line.split()) for line in text]
