"""The programs that `make test-slow` compiles for TPUs, and a summary of what each sends between devices.

python -m tests.plan.golden        # writes the summaries for the installed libtpu to collectives.json
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax.config.load import apply_overrides, load_config
from gpt_jax.plan.kernel_schedules import libtpu_version
from gpt_jax.plan.program import compile_program
from gpt_jax.plan.report import make_report
from gpt_jax.plan.workload import pretraining
from gpt_jax.runtime.accelerators import parse_accelerator

FILE = Path(__file__).with_name("collectives.json")
MIB = 1 << 20


class Case(NamedTuple):
    config: str
    topology: str
    slices: int = 1
    overrides: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.config} on {self.slices} x {self.topology}"


LOOP = "--model.layer-unroll=1"
"""Compiles faster. The layers send the same."""
CASES = [
    Case("gpt1", "v5e-8", 1, ("--train.batch-size=256", LOOP)),
    Case("gpt1", "v5p-16", 1, ("--train.batch-size=256", LOOP)),
    Case("gpt1", "v6e-8", 1, ("--train.batch-size=256", LOOP)),
    Case("gpt1", "v5e-16", 2, ("--train.batch-size=512", "--mesh.slice=2", LOOP)),
    Case("gpt1_1b5", "v5e-256", 1, ("--mesh.fsdp=16",)),
    Case("gpt1_1b5", "v5p-128", 1, ("--mesh.fsdp=16",)),
    Case("gpt1_7b", "v5p-256"),
]


def compiled(case: Case) -> dict[str, Any]:
    """Returns the report of a case."""
    config: Any = apply_overrides(load_config(case.config), list(case.overrides), "test")
    accelerator = parse_accelerator(case.topology)
    return make_report(case.config, compile_program(pretraining(config), accelerator, case.slices), accelerator, case.slices)


def summary(report: dict[str, Any]) -> dict[str, list[int]]:
    """Returns the number of executions and the MiB of each kind of transfer of more than 1 MiB."""
    found: dict[str, list[int]] = {}
    for each in report["collectives"]:
        row = found.setdefault(f"{each['kind']} {each['dtype']} over {each['axes']}", [0, 0])
        row[0] += each["times"]
        row[1] += each["bytes"]
    return {name: [times, round(size / MIB)] for name, (times, size) in sorted(found.items()) if size > MIB}


def main() -> None:
    goldens = json.loads(FILE.read_text()) if FILE.exists() else {}
    for case in [case for case in CASES if not sys.argv[1:] or str(case) in sys.argv[1:]]:
        report = compiled(case)
        goldens.setdefault(str(case), {})[libtpu_version()] = summary(report)
        print(case, f"{report['memory']['peak'] / 2**30:.2f} GiB, {report['compile_seconds']:.0f} s", summary(report), flush=True)
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(by_version)}" for name, by_version in sorted(goldens.items()))
        FILE.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
