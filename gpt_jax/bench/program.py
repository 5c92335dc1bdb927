"""The programs that benchmarks time. A worker process builds each from the name of a function and its arguments."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Program(NamedTuple):
    """A program that is ready to run."""

    run: Callable[[int], object]
    """Does the work the given number of times and returns when the results exist. The first call may compile."""
    details: Callable[[], dict[str, float]] = dict
    """Returns further figures at the end, by name, for example seconds of parts of the work."""
    device: str = ""
    """Kind of accelerator that it computes on; empty for a CPU."""
    num_devices: int = 1
    """Number of accelerators that share the work."""


class ProgramSpec(NamedTuple):
    """How to build a program in another process."""

    function: str
    """MODULE:NAME of a function that returns a `Program`."""
    arguments: Mapping[str, Any]
    """Keyword arguments of the function, which must survive JSON."""

    def build(self) -> Program:
        """Returns the program."""
        module, _, name = self.function.partition(":")
        program: Program = getattr(importlib.import_module(module), name)(**self.arguments)
        return program


def start_jax() -> str:
    """Starts JAX's devices, as the commands that train do; returns their kind, or "" for a CPU.

    Raises:
      UserError: the environment is wrong, or there is no such device.
    """
    from gpt_jax.runtime.environment import check_variables, require_devices

    check_variables()
    require_devices()
    import jax

    device = jax.devices()[0]
    return "" if device.platform == "cpu" else str(device.device_kind)
