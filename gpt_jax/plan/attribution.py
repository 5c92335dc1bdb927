"""Attribution of instructions to parts of the model, to the forward or the backward pass, and to kinds of work.

Parts and directions come from the scopes that the model's code names with `jax.named_scope`.
"""

import re

from gpt_jax.plan.hlo import Instruction, Program
from gpt_jax.train.profile import PARTS

SCAN = "scan"
"""The part of instructions that take a layer's slices out of stacked arrays, or put its results into them."""
OTHER = "other"
"""The part of instructions outside of all scopes."""

FORWARD, RECOMPUTED, BACKWARD = "forward", "recomputed", "backward"
"""Directions. Everything outside of the backward pass is forward, including the optimizer and the gradients that the loss
computes in its forward pass."""

PRODUCT, ELEMENTWISE, COPY = "product", "elementwise", "copy"
"""Kinds of instructions: with a matrix product inside; with other arithmetic; moving data only."""

PRODUCTS = {"convolution", "dot"}
MOVES = {
    *("bitcast", "broadcast", "concatenate", "constant", "copy", "dynamic-slice", "dynamic-update-slice", "get-tuple-element"),
    *("iota", "pad", "parameter", "reshape", "reverse", "slice", "transpose", "tuple"),
}


def part_of(op_name: str) -> str:
    """Returns the part that an `op_name` belongs to: the innermost scope in `PARTS`, or else `SCAN` or `OTHER`."""
    scopes = [word for word in re.findall(r"\w+", op_name) if word in PARTS]
    if scopes:
        return scopes[-1]
    return SCAN if re.search(r"while/body/(jit\()?dynamic_", op_name) else OTHER


def direction_of(op_name: str) -> str:
    """Returns the direction of an `op_name`; what the backward pass repeats of the forward pass is `RECOMPUTED`."""
    if "rematted_computation" in op_name:
        return RECOMPUTED
    return BACKWARD if "transpose(" in op_name else FORWARD


class Attribution:
    """Attributes the instructions of a program."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._fusions: dict[str, tuple[str, str, set[str]]] = {}

    def place(self, instruction: Instruction) -> tuple[str, str]:
        """Returns part and direction: those of the product in a fusion, or else its own, or else the only part inside."""
        op_name = instruction.op_name
        if instruction.opcode != "fusion":
            return part_of(op_name), direction_of(op_name)
        product, _, parts = self._fused(instruction.called[0])
        op_name = product or op_name
        part = part_of(op_name)
        return (next(iter(parts)) if part == OTHER and len(parts) == 1 else part), direction_of(op_name)

    def kind(self, instruction: Instruction) -> str:
        """Returns the kind of an instruction."""
        if instruction.opcode == "fusion":
            return self._fused(instruction.called[0])[1]
        return PRODUCT if instruction.opcode in PRODUCTS else COPY if instruction.opcode in MOVES else ELEMENTWISE

    def _fused(self, computation: str) -> tuple[str, str, set[str]]:
        """Returns the `op_name` of the first product in a fusion ("" if it has none), its kind, and the parts inside."""
        if computation not in self._fusions:
            inside = list(self._program.inside(computation))
            products = [each.op_name for each in inside if each.opcode in PRODUCTS]
            moves = all(each.opcode in MOVES or each.opcode == "fusion" for each in inside)
            kind = PRODUCT if products else COPY if moves else ELEMENTWISE
            parts = {part_of(each.op_name) for each in inside if each.op_name} - {OTHER}
            self._fusions[computation] = (products[0] if products else "", kind, parts)
        return self._fusions[computation]
