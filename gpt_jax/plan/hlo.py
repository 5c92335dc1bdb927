"""Parses the text of an optimized HLO module, `compiled.as_text()`, into computations and instructions."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

BITS = {"pred": 8, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8, **{f"{kind}{n}": n for kind in "fsu" for n in (4, 8, 16, 32, 64)}}
"""Bits of one element, by the name of its dtype in HLO."""

ARRAY = re.compile(rf"\b({'|'.join(BITS)})\[([\d,]*)\]")
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
CALLED = re.compile(
    r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)|(?:branch_computations|called_computations)=\{([^}]*)\}"
)


class Instruction(NamedTuple):
    """One instruction, which is one line of HLO."""

    name: str
    shape: str
    """Dtype, dimensions and layout of the result; if the result is a tuple, those of all its arrays, in parentheses."""
    opcode: str
    operands: str
    """The text in parentheses after the opcode: names of instructions, or the value of a constant."""
    attributes: str

    @property
    def op_name(self) -> str:
        """The path of the JAX scopes and primitives that the instruction comes from, or "" if it is unknown."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def cycles(self) -> int:
        """The compiler's estimate of the cycles of one execution, or 0 if it has made none."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(match[1]) if match else 0

    @property
    def inputs(self) -> list[str]:
        """Names of the instructions whose results are the operands, without repetitions."""
        return list(dict.fromkeys(re.findall(r"%([\w.\-]+)", self.operands)))

    @property
    def called(self) -> list[str]:
        """Names of the computations that the instruction calls, except for the condition and the body of a loop."""
        return [name for one, many in CALLED.findall(self.attributes) for name in [one, *re.findall(r"[\w.\-]+", many)] if name]

    def attribute(self, name: str) -> str:
        """Returns the value of an attribute that is a single word, such as `name` in `body=%name`.

        Raises:
          ValueError: the instruction does not have the attribute.
        """
        match = re.search(rf'\b{name}=[%"]?([\w.\-]+)', self.attributes)
        if not match:
            raise ValueError(f"instruction {self.name} has no attribute {name!r}")
        return match[1]


Computation = Mapping[str, Instruction]
"""Instructions by name, in the order of the text, which is the order of execution if the module is scheduled."""


class Program(NamedTuple):
    """An HLO module."""

    computations: Mapping[str, Computation]
    entry: str
    """Name of the computation that is executed first."""
    num_partitions: int
    """Number of devices that execute the module together. Each of several TPU slices executes its own module."""

    def inside(self, name: str) -> Iterator[Instruction]:
        """Yields the instructions of a computation and of the computations that they call, except for loops."""
        for instruction in self.computations[name].values():
            yield instruction
            for called in instruction.called:
                yield from self.inside(called)


def parse(text: str) -> Program:
    """Parses the text of an HLO module.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    current: dict[str, Instruction] = {}
    entry = ""
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif match := INSTRUCTION.match(line):
            current[match[1]] = _parse_instruction(match[1], match[2])
    if not entry:
        raise ValueError("not an HLO module: it has no entry computation")
    partitions = re.search(r"^HloModule .*\bnum_partitions=(\d+)", text)
    return Program(computations, entry, int(partitions[1]) if partitions else 1)


def _parse_instruction(name: str, text: str) -> Instruction:
    """Parses the text after the equals sign: shape, opcode, operands in parentheses, and attributes."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    return Instruction(name, shape, rest[:opening], rest[opening + 1 : closing], rest[closing + 1 :])


def _closing(text: str, opening: int) -> int:
    """Returns the index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for match in re.finditer(r"[()]", text[opening:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return opening + match.start()
    raise ValueError(f"unbalanced parentheses: {text[:80]}")


def input_shapes(instruction: Instruction, computation: Computation) -> str:
    """Returns the shapes of an instruction's operands, one after the other."""
    return " ".join(computation[name].shape for name in instruction.inputs)


def shape_bytes(shape: str) -> int:
    """Returns the bytes of all arrays in a shape, without padding."""
    return sum(math.prod(map(int, filter(None, dims.split(",")))) * BITS[dtype] // 8 for dtype, dims in ARRAY.findall(shape))


def shape_dtypes(shape: str) -> set[str]:
    """Returns the dtypes of all arrays in a shape, by their names in HLO."""
    return {dtype for dtype, _ in ARRAY.findall(shape)}


def shape_dimensions(shape: str) -> list[tuple[int, ...]]:
    """Returns the dimensions of all arrays in a shape."""
    return [tuple(map(int, filter(None, dims.split(",")))) for _, dims in ARRAY.findall(shape)]
