"""Every config that names a TPU compiles for it, fits its memory, and sends between devices what it is meant to send."""

import json

import pytest

from gpt_jax.plan.kernel_schedules import libtpu_version
from tests.plan.golden import CASES, FILE, compiled, summary


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_fits_and_sends_what_it_is_meant_to_send(tpu_devices, case):
    """An accidental gather of whole parameters, or a gradient that is summed twice, is another line of the summary.

    If a change is intended, run `python -m tests.plan.golden`. With a version of libtpu that has no summary, the same kinds of
    transfers may take up to a tenth more bytes.
    """
    tpu_devices("v5e:2x2")
    report = compiled(case)
    assert report["memory"]["peak"] < report["memory"]["available"]
    golden, found = json.loads(FILE.read_text())[str(case)], summary(report)
    if libtpu_version() in golden:
        assert found == golden[libtpu_version()]
        return
    known = {name for each in golden.values() for name in each}
    assert found.keys() <= known
    for name, (_, size) in found.items():
        assert size <= 1.1 * max(each[name][1] for each in golden.values() if name in each), name
