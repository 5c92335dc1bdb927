"""The estimates without a compiler are worked out by hand for GPT-1."""

import pytest

from gpt_jax.config.load import apply_overrides, load_config
from gpt_jax.errors import UserError
from gpt_jax.plan.arithmetic import describe_arithmetic
from gpt_jax.runtime.accelerators import parse_accelerator
from gpt_jax.runtime.mesh import mesh_sizes

FLOPS = 6 * (12 * (4 * 768 * 768 + 2 * 768 * 3072) + 40_478 * 768) + 12 * 12 * 768 * 512
"""FLOPs of a token of GPT-1, which test_report.py works out."""


def text_of(topology, *overrides, slices=1):
    config = apply_overrides(load_config("gpt1"), [f"--{each}" for each in overrides], "test")
    accelerator = parse_accelerator(topology)
    return describe_arithmetic("gpt1", config, accelerator, mesh_sizes(config.mesh, accelerator, slices))


@pytest.mark.parametrize(
    ("topology", "overrides", "first", "second", "milliseconds"),
    [
        # 256 x 512 tokens of 752.8 million FLOPs on 8 chips of 197 TFLOP/s
        ("v5e-8", ["train.batch-size=256"], "TPU v5 lite), mesh data=8", "32 sequences a device; remat dots", 62.6),
        ("v5p-16", ["train.batch-size=64"], "TPU v5), mesh data=8", "8 sequences a device; remat dots", 6.7),
        ("v6e-1", ["train.batch-size=8"], "TPU v6 lite), mesh one device", "8 sequences a device; remat dots", 3.4),
        (
            "v5e-8",
            ["train.batch-size=256", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "model.remat=full"],
            "TPU v5 lite), mesh data=2 x fsdp=2 x tensor=2",
            "64 sequences a device; remat full",
            62.6,
        ),
    ],
)
def test_the_estimates_of_gpt1(topology, overrides, first, second, milliseconds):
    lines = text_of(topology, *overrides).splitlines()
    assert lines[0] == f"gpt1: 116,534,784 parameters on {topology} ({first}"
    assert lines[1] == second
    tokens = 512 * int(overrides[0].partition("=")[2])
    assert lines[3] == f"{FLOPS * tokens:.4g} FLOPs a step, which take at least {milliseconds} ms"
    assert "libtpu is not installed" in lines[-1]


def test_memory_is_at_least_that_of_the_state_and_the_gradients():
    """Parameters, their two moments and their gradients in float32, and the parameters in bfloat16: 18 bytes for each."""

    def memory(*overrides):
        used, total = text_of("v5e-8", "train.batch-size=8", *overrides).splitlines()[2].split(": ")[1].split(" of ")
        assert total == "16.00 GiB"
        return float(used)

    state = 18 * 116_534_784 / 2**30
    assert state < memory() < 1.5 * state
    assert memory("mesh.data=1", "mesh.fsdp=8") < memory() - state / 2


def test_several_slices_are_named():
    assert "on 2 x v5e-8 (TPU v5 lite), mesh slice=2 x data=8\n16 seq" in text_of(
        "v5e-8", "train.batch-size=256", "mesh.slice=2", slices=2
    )


def test_a_batch_that_does_not_fit_is_an_error():
    with pytest.raises(UserError, match=r"--train.batch-size: 8192 is 1024 sequences a device, .* at most \d+ a device fit"):
        text_of("v5e-8", "train.batch-size=8192")
