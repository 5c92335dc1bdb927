"""The tool that lists the cycles of the TPU kernels."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--time", "1000"], "--time: must be a multiple of 128, not 1000"),
        (["--dim", "32"], "--dim: pallas_tpu takes heads of size 64 or 128, not 32"),
        (["--heads", "0"], "--heads: must be positive, not 0"),
        (["--chip", "v9"], "--chip: invalid choice: 'v9'"),
    ],
)
def test_a_wrong_option_is_one_line(arguments, message):
    command = [sys.executable, "-m", "benchmarks.tpu_kernels", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"benchmarks.tpu_kernels: {message}")
    assert done.stderr.count("\n") == 1
