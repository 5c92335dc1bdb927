"""Parts of the model and directions, read from the scopes that the model's code names with `jax.named_scope`."""

import re

PARTS = ("embedding", "attention", "layer_norm", "mlp", "loss", "optimizer")
"""Scopes of the model and of the training step."""
SCAN = "scan"
"""The part of instructions that take a layer's slices out of stacked arrays, or put its results into them."""
OTHER = "other"
"""The part of instructions outside of all scopes."""

FORWARD, RECOMPUTED, BACKWARD = "forward", "recomputed", "backward"
"""Directions. Everything outside of the backward pass is forward, including the optimizer and the gradients that the loss
computes in its forward pass."""


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
