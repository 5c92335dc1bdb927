"""The cost of a compiled TPU program, read from its optimized HLO text: cycles by part, collectives and Pallas kernels.

The TPU compiler estimates the cycles of every fusion, product and copy. The cycles of a loop's body are multiplied by its trip
count. Of a conditional, the branch with the fewest cycles counts, because the other is for exceptions, such as improbable targets
in the loss. The parts are the scopes that the model's code names with `jax.named_scope`.

Not in the estimates: asynchronous copies, collectives, waiting for memory, and Pallas kernels, whose calls are listed instead.
"""

import collections
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

PARTS = ("embedding", "attention", "layer_norm", "mlp", "loss", "optimizer")
"""Scopes of the model and the training step."""
SCAN = "scan"
"""The part of instructions that take a layer's slices out of stacked arrays, or put its results into them."""
OTHER = "other"
"""The part of instructions outside of all scopes."""
FORWARD, RECOMPUTED, BACKWARD = "forward", "recomputed", "backward"
"""Directions. Everything outside of the backward pass is forward, including the optimizer and the gradients that the loss
computes in its forward pass."""
PRODUCT, ELEMENTWISE, COPY = "product", "elementwise", "copy"
"""Kinds: with a matrix product inside; with other arithmetic; moving data only."""

PRODUCTS = {"convolution", "dot"}
MOVES = {
    *("bitcast", "broadcast", "concatenate", "constant", "copy", "dynamic-slice", "dynamic-update-slice", "get-tuple-element"),
    *("iota", "pad", "parameter", "reshape", "reverse", "slice", "transpose", "tuple"),
}
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all", "reduce-scatter")
PALLAS = 'custom_call_target="tpu_custom_call"'

BITS = {"pred": 8, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8, **{f"{kind}{n}": n for kind in "fsu" for n in (4, 8, 16, 32, 64)}}
ARRAY = re.compile(rf"\b({'|'.join(BITS)})\[([\d,]*)\]")
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
CALLED = re.compile(
    r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)|(?:branch_computations|called_computations)=\{([^}]*)\}"
)


class Instruction(NamedTuple):
    """One line of HLO."""

    name: str
    shape: str
    opcode: str
    operands: str
    """The text in parentheses after the opcode: names of instructions, or the value of a constant."""
    attributes: str

    @property
    def op_name(self) -> str:
        """The path of JAX's scopes and primitives that it comes from, "" if unknown."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def cycles(self) -> int:
        """The compiler's estimate for one execution; 0 if it makes none."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(match[1]) if match else 0

    @property
    def called(self) -> list[str]:
        """Names of the computations that it calls, other than those of a loop."""
        return [name for one, many in CALLED.findall(self.attributes) for name in [one, *re.findall(r"[\w.\-]+", many)] if name]


class Program(NamedTuple):
    """A parsed module."""

    computations: Mapping[str, Sequence[Instruction]]
    entry: str


class Cost(NamedTuple):
    """Cycles of one instruction, all its executions together."""

    cycles: int
    part: str
    direction: str
    kind: str
    times: int
    name: str
    op_name: str


class Collective(NamedTuple):
    """A transfer between devices."""

    kind: str
    """An opcode in `COLLECTIVES`."""
    dtype: str
    bytes: int
    """Bytes in one execution: those of its inputs or its results on one device, whichever are more."""
    times: int
    axes: str
    """Mesh axes whose devices take part, joined by "+"; the groups as they are written if no axes match."""
    part: str
    direction: str
    asynchronous: bool
    """Whether other instructions run between its start and its end."""


class Kernel(NamedTuple):
    """A call of a Pallas kernel."""

    name: str
    times: int
    part: str
    direction: str


class Costs(NamedTuple):
    """The costs of a program in one execution on one device."""

    costs: list[Cost]
    collectives: list[Collective]
    kernels: list[Kernel]

    @property
    def cycles(self) -> int:
        """The sum of all estimated cycles."""
        return sum(cost.cycles for cost in self.costs)

    def by(self, *fields: str) -> dict[tuple[str, ...], int]:
        """Returns the cycles by the values of fields of `Cost` ("part", "direction", "kind"), most expensive first."""
        sums: collections.Counter[tuple[str, ...]] = collections.Counter()
        for cost in self.costs:
            sums[tuple(getattr(cost, field) for field in fields)] += cost.cycles
        return dict(sums.most_common())


def read_costs(text: str, mesh: Mapping[str, int]) -> Costs:
    """Returns the costs of a program.

    Args:
      text: its optimized HLO, `compiled.as_text()`.
      mesh: sizes of the mesh's axes by name, `mesh.shape`.

    Raises:
      ValueError: the text is not an HLO module, or a loop's trip count cannot be read from it.
    """
    return _Reader(parse(text), mesh).read()


def parse(text: str) -> Program:
    """Parses the text of an HLO module.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    entry = ""
    for line in text.splitlines():
        header = COMPUTATION.match(line)
        if header:
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif match := INSTRUCTION.match(line):
            current.append(_parse_instruction(match[1], match[2]))
    if not entry:
        raise ValueError("not an HLO module: it has no entry computation")
    return Program(computations, entry)


def _parse_instruction(name: str, text: str) -> Instruction:
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


class _Reader:
    def __init__(self, program: Program, mesh: Mapping[str, int]) -> None:
        self._computations, self._entry, self._mesh = *program, mesh
        self._found = Costs([], [], [])
        self._fusions: dict[str, tuple[str, str, set[str]]] = {}
        self._chains: set[tuple[str, str]] = set()

    def read(self) -> Costs:
        self._visit(self._entry, 1)
        return self._found

    def _visit(self, computation: str, times: int) -> None:
        """Adds the costs of a computation that is executed `times` times."""
        for instruction in self._computations[computation]:
            opcode = instruction.opcode
            part, direction = self._place(instruction)
            kind = opcode.removesuffix("-start")
            if opcode == "while":
                body = _attribute(instruction, "body")
                self._visit(body, times * self._trip_count(instruction))
            elif kind in COLLECTIVES:
                self._add_collective(instruction, computation, kind, times, kind != opcode)
            elif opcode == "custom-call" and PALLAS in instruction.attributes:
                self._found.kernels.append(Kernel(re.sub(r"\.\d+$", "", instruction.name), times, part, direction))
            elif opcode == "fusion":
                self._visit_fused(instruction, times, part, direction)
            elif opcode == "conditional":
                self._visit_cheapest(instruction.called, times)
            elif opcode in ("call", "async-start"):
                for name in instruction.called:
                    self._visit(name, times)
            if instruction.cycles:
                cycles, name = times * instruction.cycles, instruction.name
                kind = self._kind(instruction)
                self._found.costs.append(Cost(cycles, part, direction, kind, times, name, instruction.op_name))

    def _visit_cheapest(self, branches: Sequence[str], times: int) -> None:
        """Adds the costs of the branch with the fewest cycles."""
        outside, found = self._found, []
        for branch in branches:
            self._found = Costs([], [], [])
            self._visit(branch, times)
            found.append(self._found)
        self._found = outside
        costs, collectives, kernels = min(found, key=lambda found: found.cycles)
        outside.costs.extend(costs)
        outside.collectives.extend(collectives)
        outside.kernels.extend(kernels)

    def _visit_fused(self, fusion: Instruction, times: int, part: str, direction: str) -> None:
        """Adds the collectives inside a fusion. The cycles of all its instructions are in its own estimate.

        The fusions that run while a collective is under way all repeat it, with the same chain.
        """
        for name in fusion.called:
            for instruction in self._computations[name]:
                if instruction.opcode == "fusion":
                    self._visit_fused(instruction, times, part, direction)
                elif instruction.opcode in COLLECTIVES:
                    chain, channel = (re.search(rf'{key}="?(\d+)', instruction.attributes) for key in ("chain_id", "channel_id"))
                    repeated = chain is not None and channel is not None and (chain[1], channel[1]) in self._chains
                    if chain is not None and channel is not None:
                        self._chains.add((chain[1], channel[1]))
                    if not repeated:
                        self._add_collective(instruction, name, instruction.opcode, times, chain is not None)

    def _trip_count(self, loop: Instruction) -> int:
        """Returns the trip count of a loop that counts from 0, as those of `jax.lax.scan` do."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition = list(self._inside(_attribute(loop, "condition")))
        compared = any(i.opcode == "compare" and "direction=LT" in i.attributes for i in condition)
        limits = {int(i.operands) for i in condition if i.opcode == "constant" and re.match(r"[su]\d+\[\]", i.shape)}
        if not compared or len(limits) != 1:
            raise ValueError(f"the trip count of loop {loop.name} ({loop.op_name}) is not a constant")
        return limits.pop()

    def _inside(self, computation: str) -> Iterator[Instruction]:
        """Yields the instructions of a computation and of those that they call."""
        for instruction in self._computations[computation]:
            yield instruction
            for name in instruction.called:
                yield from self._inside(name)

    def _fused(self, computation: str) -> tuple[str, str, set[str]]:
        """Returns the `op_name` of the first product in a fusion ("" if it has none), its kind, and the parts inside."""
        if computation not in self._fusions:
            inside = list(self._inside(computation))
            products = [i.op_name for i in inside if i.opcode in PRODUCTS]
            moves = all(i.opcode in MOVES or i.opcode == "fusion" for i in inside)
            kind = PRODUCT if products else COPY if moves else ELEMENTWISE
            parts = {part_of(i.op_name) for i in inside if i.op_name} - {OTHER}
            self._fusions[computation] = (products[0] if products else "", kind, parts)
        return self._fusions[computation]

    def _place(self, instruction: Instruction) -> tuple[str, str]:
        """Returns part and direction: those of the product in a fusion, or else its own, or else the only part inside."""
        op_name = instruction.op_name
        if instruction.opcode != "fusion":
            return part_of(op_name), direction_of(op_name)
        product, _, parts = self._fused(instruction.called[0])
        op_name = product or op_name
        part = part_of(op_name)
        return (next(iter(parts)) if part == OTHER and len(parts) == 1 else part), direction_of(op_name)

    def _kind(self, instruction: Instruction) -> str:
        if instruction.opcode == "fusion":
            return self._fused(instruction.called[0])[1]
        return PRODUCT if instruction.opcode in PRODUCTS else COPY if instruction.opcode in MOVES else ELEMENTWISE

    def _add_collective(self, instruction: Instruction, computation: str, kind: str, times: int, asynchronous: bool) -> None:
        shapes = {other.name: other.shape for other in self._computations[computation]}
        result = instruction.shape
        if instruction.opcode.endswith("-start"):  # Its own shape repeats its inputs; that of its end does not.
            ends = (other for other in self._computations[computation] if other.opcode == f"{kind}-done")
            result = next((end.shape for end in ends if f"%{instruction.name}" in end.operands.split(", ")), result)
        inputs = " ".join(shapes.get(name, "") for name in re.findall(r"%([\w.\-]+)", instruction.operands))
        dtype = "+".join(sorted({dtype for dtype, _ in ARRAY.findall(result)}))
        size = max(shape_bytes(inputs), shape_bytes(result))
        axes, place = mesh_axes(instruction.attributes, self._mesh), self._place(instruction)
        self._found.collectives.append(Collective(kind, dtype, size, times, axes, *place, asynchronous))


def _attribute(instruction: Instruction, name: str) -> str:
    match = re.search(rf"\b{name}=%?([\w.\-]+)", instruction.attributes)
    if not match:
        raise ValueError(f"instruction {instruction.name} has no {name}")
    return match[1]


def part_of(op_name: str) -> str:
    """Returns the part that an `op_name` belongs to: the innermost scope in `PARTS`, or else `SCAN` or `OTHER`."""
    scopes = [word for word in re.findall(r"\w+", op_name) if word in PARTS]
    if scopes:
        return scopes[-1]
    return SCAN if re.search(r"while/body/(jit\()?dynamic_", op_name) else OTHER


def direction_of(op_name: str) -> str:
    """Returns whether an `op_name` belongs to the forward pass, its repetition in the backward pass, or the rest of that."""
    if "rematted_computation" in op_name:
        return RECOMPUTED
    return BACKWARD if "transpose(" in op_name else FORWARD


def shape_bytes(shape: str) -> int:
    """Returns the bytes of all arrays in a shape, without padding."""
    return sum(math.prod(map(int, filter(None, dims.split(",")))) * BITS[dtype] // 8 for dtype, dims in ARRAY.findall(shape))


# -- groups of devices ------------------------------------------------------------------------------------------------------


IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
"""Numbers 0, 1, 2, ... in an array, and optionally a new order of its axes."""


def mesh_axes(attributes: str, mesh: Mapping[str, int]) -> str:
    """Returns the mesh axes over which a collective runs, joined by "+", or its groups as they are written if no axes match."""
    groups = _groups(attributes)
    devices = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
    used = [axis for axis, size in mesh.items() if size > 1]
    for chosen in range(1, 2 ** len(used)):
        axes = [axis for bit, axis in enumerate(used) if chosen >> bit & 1]
        if groups == _partition(devices, [list(mesh).index(axis) for axis in axes]):
            return "+".join(axes)
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes)
    if pairs:
        moves = [(int(source), int(target)) for source, target in re.findall(r"(\d+),(\d+)", pairs[1])]
        return _axes_of_moves(moves, devices, list(mesh))
    written = re.search(r"replica_groups=(\S.{0,60})", attributes)
    return written[1] if written else ""


def _partition(devices: np.ndarray, axes: Sequence[int]) -> set[frozenset[int]]:
    """Returns the groups of devices that differ only in their positions along some axes."""
    size = math.prod(devices.shape[axis] for axis in axes)
    moved = np.moveaxis(devices, axes, range(-len(axes), 0))
    return {frozenset(group) for group in moved.reshape(-1, size).tolist()}


def _groups(attributes: str) -> set[frozenset[int]] | None:
    """Returns the groups of a collective in any of the three notations of HLO; None if they cannot be read."""
    if named := re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({IOTA}\))? \{{([^}}]*)\}}", attributes):
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        axes = re.findall(r"'([^']+)'", named[4])
        if ":" in named[4]:
            return None  # a part of an axis
        devices = _iota(named[2] or str(math.prod(sizes.values())), named[3]).reshape(tuple(sizes.values()))
        return _partition(devices, [list(sizes).index(axis) for axis in axes])
    if tiled := re.search(rf"replica_groups=\[(\d+),(\d+)\]<={IOTA}", attributes):
        return {frozenset(group) for group in _iota(tiled[3], tiled[4]).reshape(int(tiled[1]), int(tiled[2])).tolist()}
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}", attributes):
        return {frozenset(map(int, group.split(","))) for group in re.findall(r"[\d,]*\d", listed[1])}
    return None


def _iota(dims: str, order: str | None) -> np.ndarray:
    """Returns the numbers 0, 1, 2, ... in an array of these dimensions, with its axes in another order."""
    sizes = [int(size) for size in dims.split(",")]
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return numbers.transpose([int(axis) for axis in order.split(",")]) if order else numbers


def _axes_of_moves(moves: Sequence[tuple[int, int]], devices: np.ndarray, names: Sequence[str]) -> str:
    """Returns the axes along which data moves from some devices to others."""
    places = {int(device): np.array(place) for place, device in np.ndenumerate(devices)}
    changed = np.any([places[source] != places[target] for source, target in moves], axis=0)
    return "+".join(name for name, change in zip(names, changed, strict=True) if change)
