"""The schedules of the TPU kernels, as libtpu writes them."""

import subprocess
import sys

import pytest

from benchmarks.tpu_kernels import Sizes, measure_kernel

SIZES = Sizes(batch=2, time=512, heads=2, dim=64, rate=0.1, segments=False, dtype="bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "bundles"), [("attention_forward", 950), ("attention_backward", 1750)])
def test_attention_on_a_v5e_takes_few_bundles_and_dropout_few_of_them(tpu_devices, kernel, bundles):
    with_dropout, without = (measure_kernel(kernel, "v5e:2x2", SIZES._replace(rate=rate))["per_head"] for rate in (0.1, 0.0))
    assert 500 < without < with_dropout < 1.15 * without
    assert with_dropout < bundles


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--time", "1000"], "--time: must be a multiple of 128, not 1000"),
        (["--dim", "32"], "--dim: pallas_tpu takes heads of size 64 or 128, not 32"),
        (["--heads", "0"], "--heads: must be positive, not 0"),
    ],
)
def test_a_wrong_option_is_one_line(arguments, message):
    command = [sys.executable, "-m", "benchmarks.tpu_kernels", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"benchmarks.tpu_kernels: {message}")
    assert done.stderr.count("\n") == 1
