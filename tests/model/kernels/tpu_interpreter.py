"""Runs the TPU kernels on CPUs."""

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from jax.experimental.pallas import tpu as pltpu

from gpt_jax.model import attention
from gpt_jax.model.kernels import tpu

STRICT = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
"""Like a TPU, with memory that is NaN until it is written. JAX does not differentiate it inside of `jax.checkpoint`."""
PLAIN = True
"""By ordinary JAX operations, inside any transformation."""


@contextmanager
def interpreted(how: Any) -> Iterator[None]:
    """Interprets kernels that are traced and executed in this context, and allows `pallas_tpu` on CPUs."""
    platforms, printed = dict(attention.PLATFORMS), io.StringIO()
    try:
        tpu.INTERPRET = how
        attention.PLATFORMS["pallas_tpu"] = "cpu"
        with redirect_stdout(printed):
            yield
        assert "RACE DETECTED" not in printed.getvalue()  # Before jax 0.12, races are only printed.
    finally:
        tpu.INTERPRET = False
        attention.PLATFORMS.update(platforms)
