"""Costs of a compiled TPU program: cycles by part of the model, collectives, and calls of Pallas kernels.

They are read from the program's optimized HLO, in which the TPU compiler has noted its estimate of the cycles of every fusion,
product and copy. The costs of a loop's body are multiplied by its trip count. Of a conditional, the branch with the fewest cycles
counts, because the other branch is for exceptions, such as improbable targets in the loss.

The compiler makes no estimates of asynchronous copies, of waiting for memory, of collectives, and of Pallas kernels. Collectives
and kernels are listed with what a model of their time needs.
"""

import collections
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from gpt_jax.plan.hlo import Computation, Instruction, Program, parse, shape_bytes, shape_dtypes
from gpt_jax.plan.replica_groups import read_groups
from gpt_jax.plan.scopes import OTHER, direction_of, part_of

PRODUCT, ELEMENTWISE, COPY = "product", "elementwise", "copy"
"""Kinds of instructions: with a matrix product inside; with other arithmetic; moving data only."""

PRODUCTS = {"convolution", "dot"}
MOVES = {
    *("bitcast", "broadcast", "concatenate", "constant", "copy", "dynamic-slice", "dynamic-update-slice", "get-tuple-element"),
    *("iota", "pad", "parameter", "reshape", "reverse", "slice", "transpose", "tuple"),
}
SLICE = "slice"
"""The mesh axis between slices of TPUs."""
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all", "reduce-scatter")
STARTS_CHAIN = 'custom_call_target="AsyncCollectiveStart"'
PALLAS = 'custom_call_target="tpu_custom_call"'


class Cost(NamedTuple):
    """Cycles of one instruction, all its executions together."""

    cycles: int
    part: str
    direction: str
    kind: str
    times: int
    """Number of executions."""
    name: str
    op_name: str


class Kernel(NamedTuple):
    """A call of a Pallas kernel."""

    name: str
    """The name that `pallas_call` was given."""
    bytes: int
    """Bytes of operands and results in one execution. An array that is several operands counts once."""
    times: int
    """Number of executions."""
    part: str
    direction: str


class Collective(NamedTuple):
    """A transfer between devices."""

    kind: str
    """An opcode in `COLLECTIVES`. Transfers between slices also have the kind "one-to-one"."""
    dtype: str
    bytes: int
    """Bytes in one execution: those of its operands or of its results on one device, whichever are more."""
    times: int
    """Number of executions."""
    axes: str
    """Mesh axes whose devices take part, joined by "+"; the number and size of the groups if no axes match."""
    devices: int
    """Devices in one group; 2 for a collective-permute."""
    part: str
    """Part of the model. If the compiler has combined several collectives, it is the part of one of them."""
    direction: str
    asynchronous: bool = False
    """Whether other instructions may run between its start and its end."""
    overlap_cycles: int = 0
    """Estimated cycles of the instructions between start and end, in one execution. The transfer can hide at most these, and
    the cycles of `overlap_kernels`. An instruction that runs during several transfers counts for each of them."""
    overlap_kernels: tuple[Kernel, ...] = ()
    """Pallas kernels between start and end; their `times` are those in one execution of the transfer."""


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

    def extend(self, other: "Costs", executions: int = 1) -> None:
        """Adds the costs of a number of executions of something else."""
        self.costs.extend(each._replace(cycles=executions * each.cycles, times=executions * each.times) for each in other.costs)
        self.collectives.extend(each._replace(times=executions * each.times) for each in other.collectives)
        self.kernels.extend(each._replace(times=executions * each.times) for each in other.kernels)


def read_costs(text: str, mesh: Mapping[str, int]) -> Costs:
    """Returns the costs of a program.

    Args:
      text: its optimized HLO, `compiled.as_text()`.
      mesh: sizes of the mesh's axes by name, `mesh.shape`.

    Raises:
      ValueError: the text is not an HLO module, or the trip count of a loop or the groups of a collective cannot be read.
    """
    program = parse(text)
    return _Reader(program, mesh).read(program.entry)


class _Reader:
    """Reads the costs of the computations of one program."""

    def __init__(self, program: Program, mesh: Mapping[str, int]) -> None:
        self._computations, self._mesh = program.computations, mesh
        if program.num_partitions * mesh.get(SLICE, 1) == math.prod(mesh.values()):
            self._mesh = {**mesh, SLICE: 1}  # The module is that of one slice, and numbers only its devices.
        self._slices = mesh.get(SLICE, 1)
        self._fusions: dict[str, tuple[str, str, set[str]]] = {}

    def read(self, name: str) -> Costs:
        """Returns the costs of one execution of a computation."""
        computation = self._computations[name]
        found = Costs([], [], [])
        transfers = _Transfers(found)
        for instruction in computation.values():
            opcode = instruction.opcode
            if opcode == "while":
                found.extend(self.read(instruction.attribute("body")), self._trip_count(instruction))
            elif opcode == "conditional":
                found.extend(min(map(self.read, instruction.called), key=lambda branch: branch.cycles))
            elif opcode == "call":
                found.extend(self.read(instruction.called[0]))
            elif opcode == "custom-call" and PALLAS in instruction.attributes:
                found.kernels.append(self._kernel(instruction, computation))
            elif opcode == "fusion":
                for collective, chain, starts in self._fused_collectives(instruction, instruction):
                    if starts:
                        transfers.start(chain, [collective])
                    elif chain in transfers:  # Otherwise it was started outside of a loop that continues it.
                        transfers.update(chain)
            else:
                self._read_transfers(instruction, computation, transfers)
            if instruction.cycles:
                place, kind = self._place(instruction), self._kind(instruction)
                found.costs.append(Cost(instruction.cycles, *place, kind, 1, instruction.name, instruction.op_name))
        return found

    def _read_transfers(self, instruction: Instruction, computation: Computation, transfers: "_Transfers") -> None:
        """Adds the collectives that an instruction performs or starts, and ends those that end with it."""
        opcode, name = instruction.opcode, instruction.name
        if opcode in COLLECTIVES:
            transfers.start("", [self._collective(instruction, computation)])
        elif opcode.removesuffix("-start") in COLLECTIVES:
            transfers.start(name, [self._collective(instruction, computation)])
        elif opcode.removesuffix("-done") in COLLECTIVES:
            transfers.update(instruction.inputs[0], shape_bytes(instruction.shape))
        elif opcode == "call-start":  # A SparseCore executes the computation. Its cycles do not delay the TensorCore.
            inside = self._computations[instruction.called[0]]
            started = [self._collective(each, inside) for each in inside.values() if each.opcode in COLLECTIVES]
            transfers.start(name, started)
        elif opcode == "call-update":  # It passes the operands, for which the SparseCore has waited since its start.
            transfers.restart(instruction.inputs[0], name)
        elif opcode == "call-done":
            transfers.update(instruction.inputs[0])
        elif opcode == "send" and (key := _rendezvous(instruction)):
            transfers.start(key, [self._transfer_between_slices(instruction, computation)])
        elif opcode == "recv-done" and (key := _rendezvous(computation[instruction.inputs[0]])):
            transfers.update(key)

    def _trip_count(self, loop: Instruction) -> int:
        """Returns the trip count of a loop that counts from 0, as those of `jax.lax.scan` do."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition = list(self._inside(loop.attribute("condition")))
        compared = any(each.opcode == "compare" and "direction=LT" in each.attributes for each in condition)
        constants = (each for each in condition if each.opcode == "constant" and re.match(r"[su]\d+\[\]", each.shape))
        limits = {int(each.operands) for each in constants}
        if not compared or len(limits) != 1:
            raise ValueError(f"the trip count of loop {loop.name} ({loop.op_name}) is not a constant")
        return limits.pop()

    def _kernel(self, call: Instruction, computation: Computation) -> Kernel:
        name = re.sub(r"\.\d+$", "", call.name)  # The compiler appends a number to names that it has used before.
        return Kernel(name, shape_bytes(_input_shapes(call, computation)) + shape_bytes(call.shape), 1, *self._place(call))

    def _collective(self, instruction: Instruction, computation: Computation) -> Collective:
        """Returns a collective that is asynchronous if the instruction is its start."""
        inputs = _input_shapes(instruction, computation)
        kind = instruction.opcode.removesuffix("-start")
        # The result of a start repeats its operands, so that of its end counts instead.
        result = instruction.shape if instruction.opcode == kind else ""
        dtype = "+".join(sorted(shape_dtypes(inputs)))
        axes, devices = read_groups(instruction.attributes, self._mesh)
        size = max(shape_bytes(inputs), shape_bytes(result))
        return Collective(kind, dtype, size, 1, axes, devices, *self._place(instruction))

    def _transfer_between_slices(self, send: Instruction, computation: Computation) -> Collective:
        kind = send.attribute("_xla_megascale_transfer_type").lower().replace("_", "-")
        inputs = _input_shapes(send, computation)
        dtype = "+".join(sorted(shape_dtypes(inputs)))
        return Collective(kind, dtype, shape_bytes(inputs), 1, SLICE, self._slices, *self._place(send))

    def _fused_collectives(self, outer: Instruction, fusion: Instruction) -> Iterator[tuple[Collective, str, bool]]:
        """Yields the collectives inside a fusion: each with the name of its chain, and whether the fusion starts it.

        An asynchronous collective is repeated in a chain of fusions: one starts it, some compute while it is under way, and the
        last one ends it. The name of the chain is "" if the collective is synchronous. A reduce-scatter may be written as an
        all-reduce from whose result the device slices its shard.

        Args:
          outer: the instruction of the computation that is being read. It gives the part if the collective does not name one.
          fusion: `outer`, or a fusion inside it.
        """
        computation = self._computations[fusion.called[0]]
        started = {each.inputs[0] for each in computation.values() if STARTS_CHAIN in each.attributes}
        sliced = {each.inputs[0] for each in computation.values() if each.opcode == "dynamic-slice"}
        for each in computation.values():
            if each.opcode == "fusion":
                yield from self._fused_collectives(outer, each)
            elif each.opcode in COLLECTIVES:
                collective = self._collective(each, computation)
                if not each.op_name:
                    part, direction = self._place(outer)
                    collective = collective._replace(part=part, direction=direction)
                if each.opcode == "all-reduce" and each.name in sliced:
                    collective = collective._replace(kind="reduce-scatter")
                chain = re.search(r'chain_id="?(\d+)', each.attributes)
                yield collective, f"chain {chain[1]}" if chain else "", not chain or each.name in started

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

    def _fused(self, computation: str) -> tuple[str, str, set[str]]:
        """Returns the `op_name` of the first product in a fusion ("" if it has none), its kind, and the parts inside."""
        if computation not in self._fusions:
            inside = list(self._inside(computation))
            products = [each.op_name for each in inside if each.opcode in PRODUCTS]
            moves = all(each.opcode in MOVES or each.opcode == "fusion" for each in inside)
            kind = PRODUCT if products else COPY if moves else ELEMENTWISE
            parts = {part_of(each.op_name) for each in inside if each.op_name} - {OTHER}
            self._fusions[computation] = (products[0] if products else "", kind, parts)
        return self._fusions[computation]

    def _inside(self, computation: str) -> Iterator[Instruction]:
        """Yields the instructions of a computation and of those that they call."""
        for instruction in self._computations[computation].values():
            yield instruction
            for name in instruction.called:
                yield from self._inside(name)


class _Transfers:
    """Collectives of one computation, with what runs between the start and the end of each."""

    def __init__(self, found: Costs) -> None:
        self._found = found
        self._started: dict[str, tuple[range, int, int]] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._started

    def start(self, key: str, collectives: Sequence[Collective]) -> None:
        """Adds collectives, which are synchronous if the key is "". What is found from now on runs beside the others."""
        first = len(self._found.collectives)
        self._found.collectives.extend(each._replace(asynchronous=bool(key)) for each in collectives)
        if key:
            self._started[key] = range(first, first + len(collectives)), len(self._found.costs), len(self._found.kernels)

    def restart(self, key: str, new: str) -> None:
        """Gives collectives another key. Only what is found from now on runs beside them."""
        self._started[new] = self._started.pop(key)[0], len(self._found.costs), len(self._found.kernels)

    def update(self, key: str, size: int = 0) -> None:
        """Sets the overlap of collectives to all that has been found since their start; `size` are the bytes of a result."""
        indices, first_cost, first_kernel = self._started[key]
        cycles = sum(cost.cycles for cost in self._found.costs[first_cost:])
        kernels = tuple(self._found.kernels[first_kernel:])
        for index in indices:
            each = self._found.collectives[index]
            self._found.collectives[index] = each._replace(
                bytes=max(each.bytes, size), overlap_cycles=cycles, overlap_kernels=kernels
            )


def _rendezvous(instruction: Instruction) -> str:
    """Returns the name that the two ends of a transfer between slices have in common, or "" for other instructions."""
    match = re.search(r'_xla_host_transfer_rendezvous="([^"]+)",.*_xla_megascale_transfer_type=', instruction.attributes)
    return match[1] if match else ""


def _input_shapes(instruction: Instruction, computation: Computation) -> str:
    """Returns the shapes of an instruction's operands."""
    return " ".join(computation[name].shape for name in instruction.inputs)
