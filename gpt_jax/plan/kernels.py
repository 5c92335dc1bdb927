"""Calls of Pallas kernels in a compiled TPU program."""

import re
from typing import NamedTuple

from gpt_jax.plan.attribution import Attribution
from gpt_jax.plan.hlo import Computation, Instruction, input_shapes, shape_bytes


class Kernel(NamedTuple):
    """A call of a Pallas kernel."""

    name: str
    """The `name` argument of `pallas_call`."""
    bytes: int
    """Bytes of operands and results in one execution. An array that occurs as several operands counts once."""
    times: int
    """Number of executions."""
    part: str
    direction: str


def is_kernel(instruction: Instruction) -> bool:
    """Returns whether an instruction calls a Pallas kernel."""
    return instruction.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in instruction.attributes


def read_kernel(call: Instruction, computation: Computation, attribution: Attribution) -> Kernel:
    """Returns one execution of the kernel that an instruction of a computation calls."""
    name = re.sub(r"\.\d+$", "", call.name)  # The compiler appends a number to names that it has used before.
    size = shape_bytes(input_shapes(call, computation)) + shape_bytes(call.shape)
    return Kernel(name, size, 1, *attribution.place(call))
