"""Every config that names a TPU compiles for it, fits its memory, and sends between devices what it is meant to send."""

import json

import jax
import pytest

from gpt_jax.config import MeshConfig
from gpt_jax.plan.kernel_schedules import libtpu_version
from gpt_jax.plan.program import compile_program
from gpt_jax.plan.report import make_report
from gpt_jax.plan.workload import pretraining
from gpt_jax.runtime.accelerators import parse_accelerator
from gpt_jax.runtime.mesh import RULES
from tests.plan.golden import CASES, FILE, compiled, summary
from tests.plan.test_report import small


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


@pytest.mark.slow
def test_a_broken_sharding_rule_changes_the_summary(tpu_devices, monkeypatch):
    """Parameters are gathered in bfloat16, and their gradients scattered in float32, unless a rule is wrong."""
    tpu_devices("v5e:2x2")
    sizes = {"vocab_size": 2048, "embed_dim": 512, "num_heads": 4, "mlp_dim": 2048, "attention": "plain"}
    workload = pretraining(small(layers=1, batch=16, mesh=MeshConfig(data=1, fsdp=4), **sizes))
    accelerator = parse_accelerator("v5e-4")

    def send():
        settings = {name: getattr(jax.config, name) for name in ("jax_platforms", "jax_enable_compilation_cache")}
        try:
            return summary(make_report("", compile_program(workload, accelerator), accelerator, 1))
        finally:
            for name, value in settings.items():
                jax.config.update(name, value)

    sound = send()
    assert sound.keys() == {"all-gather bf16 over fsdp", "reduce-scatter f32 over fsdp"}
    with monkeypatch.context() as patched:
        patched.setitem(RULES, "embed", ("data",))  # Every device stores all parameters.
        assert send() != sound
    monkeypatch.setitem(RULES, "batch", ("slice", "data"))  # All devices along `fsdp` process the same sequences.
    assert send() != sound
