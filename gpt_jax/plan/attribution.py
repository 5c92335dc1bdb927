"""Attribution of instructions to parts of the model, to the forward or the backward pass, and to kinds of work.

Parts and directions come from the scopes that the model's code names with `jax.named_scope`.
"""

import re

from gpt_jax.plan.hlo import Instruction, Program
from gpt_jax.train.profile import PARTS

SCAN = "scan"
"""The part of instructions that read a layer's slices from stacked arrays or write its results into them."""
OTHER = "other"
"""The part of instructions outside of all scopes."""

FORWARD, RECOMPUTED, BACKWARD = "forward", "recomputed", "backward"
"""The directions. Everything outside of the backward pass counts as forward, including the optimizer and the gradients that the
loss computes in its forward pass."""

PRODUCT, ELEMENTWISE, COPY = "product", "elementwise", "copy"
"""The kinds of instructions: those that contain a matrix product, those with other arithmetic, and those that only move data."""

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
    """Returns the direction of an `op_name`; work of the forward pass that the backward pass repeats is `RECOMPUTED`."""
    if "rematted_computation" in op_name:
        return RECOMPUTED
    return BACKWARD if "transpose(" in op_name else FORWARD


class Attribution:
    """Attributes the instructions of a program."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._fusions: dict[str, tuple[str, str, set[str]]] = {}

    def place(self, instruction: Instruction) -> tuple[str, str]:
        """Returns the part and the direction of an instruction.

        A fusion has those of the first product inside it. Without a product, they follow from the fusion's own `op_name`. If that
        is outside of all scopes and only one part occurs inside the fusion, the result is this part.
        """
        op_name = instruction.op_name
        if instruction.opcode != "fusion":
            return part_of(op_name), direction_of(op_name)
        product, _, parts = self._fused(instruction.called[0])
        op_name = product or op_name
        part = part_of(op_name)
        alone = part == OTHER and len(parts) == 1 and not product
        return (next(iter(parts)) if alone else part), direction_of(op_name)

    def kind(self, instruction: Instruction) -> str:
        """Returns the kind of an instruction."""
        if instruction.opcode == "fusion":
            return self._fused(instruction.called[0])[1]
        return PRODUCT if instruction.opcode in PRODUCTS else COPY if instruction.opcode in MOVES else ELEMENTWISE

    def _fused(self, computation: str) -> tuple[str, str, set[str]]:
        """Returns the `op_name` of the first product in a fusion ("" without one), the fusion's kind, and the parts inside."""
        if computation not in self._fusions:
            inside = list(self._program.inside(computation))
            products = [each.op_name for each in inside if each.opcode in PRODUCTS]
            moves = all(each.opcode in MOVES or each.opcode == "fusion" for each in inside)
            kind = PRODUCT if products else COPY if moves else ELEMENTWISE
            parts = {part_of(each.op_name) for each in inside if each.op_name} - {OTHER}
            self._fusions[computation] = (products[0] if products else "", kind, parts)
        return self._fusions[computation]
