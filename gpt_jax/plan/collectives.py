"""Collectives of a compiled TPU program, and the instructions that run during the asynchronous ones.

The compiler writes a collective in one of these ways:

- as an instruction of its own, or as a pair of instructions that start and end it;
- inside a fusion (a reduce-scatter is then an all-reduce from whose result the device slices its shard);
- inside a chain of fusions: one starts it, some compute while it is under way, and the last one ends it;
- as a call that a SparseCore executes;
- between slices of TPUs, as a transfer through the hosts, which begins with `send` and ends with `recv-done`.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from gpt_jax.plan.attribution import Attribution
from gpt_jax.plan.hlo import Computation, Instruction, Program, input_shapes, shape_bytes, shape_dtypes
from gpt_jax.plan.kernels import Kernel
from gpt_jax.plan.replica_groups import read_groups

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all", "reduce-scatter")
SLICE = "slice"
"""The mesh axis between slices of TPUs."""


class Collective(NamedTuple):
    """A transfer between devices."""

    kind: str
    """An opcode in `COLLECTIVES`."""
    dtype: str
    bytes: int
    """Bytes of the operands or of the results on one device in one execution, whichever are more."""
    times: int
    """Number of executions."""
    axes: str
    """Mesh axes along which data is transferred, joined by "+"; if no axes match, the number and size of the groups."""
    devices: int
    """Devices in one group; 2 for a collective-permute."""
    part: str
    """Part of the model. If the compiler has combined several collectives, it is the part of one of them."""
    direction: str
    asynchronous: bool = False
    """Whether other instructions may run between its start and its end."""
    overlap_cycles: int = 0
    """Estimated cycles of the instructions between start and end, in one execution. Together with the cycles of
    `overlap_kernels`, they limit how much of the transfer is hidden. An instruction that runs during several transfers counts
    for each of them."""
    overlap_kernels: tuple[Kernel, ...] = ()
    """Pallas kernels between start and end; their `times` are for one execution of the transfer."""


class CollectiveReader:
    """Reads the collectives of a program."""

    def __init__(self, program: Program, mesh: Mapping[str, int], attribution: Attribution) -> None:
        self._computations, self._attribution = program.computations, attribution
        self._slices = mesh.get(SLICE, 1)
        one_slice = program.num_partitions * self._slices == math.prod(mesh.values())
        # Each of several slices executes its own module, which numbers only the devices of that slice.
        self._mesh = {**mesh, SLICE: 1} if one_slice else mesh

    def read(self, instruction: Instruction, computation: Computation) -> Collective:
        """Returns the collective that an instruction performs or starts."""
        inputs = input_shapes(instruction, computation)
        kind = instruction.opcode.removesuffix("-start")
        # The result of a start repeats its operands, so the result of its end counts instead.
        result = instruction.shape if instruction.opcode == kind else ""
        dtype = "+".join(sorted(shape_dtypes(inputs)))
        axes, devices = read_groups(instruction.attributes, self._mesh)
        size = max(shape_bytes(inputs), shape_bytes(result))
        return Collective(kind, dtype, size, 1, axes, devices, *self._attribution.place(instruction))

    def read_called(self, call: Instruction) -> list[Collective]:
        """Returns the collectives in the computation that an instruction calls a SparseCore to execute."""
        computation = self._computations[call.called[0]]
        return [self.read(each, computation) for each in computation.values() if each.opcode in COLLECTIVES]

    def read_send(self, send: Instruction, computation: Computation) -> Collective:
        """Returns the transfer between slices that an instruction starts."""
        kind = send.attribute("_xla_megascale_transfer_type").lower().replace("_", "-")
        kind, devices = ("collective-permute", 2) if kind == "one-to-one" else (kind, self._slices)
        inputs = input_shapes(send, computation)
        dtype = "+".join(sorted(shape_dtypes(inputs)))
        return Collective(kind, dtype, shape_bytes(inputs), 1, SLICE, devices, *self._attribution.place(send))

    def read_fused(self, outer: Instruction, fusion: Instruction) -> Iterator[tuple[Collective, str, bool]]:
        """Yields each collective in a fusion, the name of its chain ("" if it has none), and whether the fusion starts it.

        Args:
          outer: the instruction of the computation that is being read. It gives the part if the collective does not name one.
          fusion: `outer`, or a fusion inside it.
        """
        computation = self._computations[fusion.called[0]]
        starts = 'custom_call_target="AsyncCollectiveStart"'
        started = {each.inputs[0] for each in computation.values() if starts in each.attributes}
        sliced = {each.inputs[0] for each in computation.values() if each.opcode == "dynamic-slice"}
        for each in computation.values():
            if each.opcode == "fusion":
                yield from self.read_fused(outer, each)
            elif each.opcode in COLLECTIVES:
                collective = self.read(each, computation)
                if not each.op_name:
                    part, direction = self._attribution.place(outer)
                    collective = collective._replace(part=part, direction=direction)
                if each.opcode == "all-reduce" and each.name in sliced:
                    collective = collective._replace(kind="reduce-scatter")
                chain = re.search(r'chain_id="?(\d+)', each.attributes)
                yield collective, f"chain {chain[1]}" if chain else "", not chain or each.name in started


class Transfers:
    """Follows the collectives of one computation from their starts to their ends."""

    def __init__(self, reader: CollectiveReader, computation: Computation, collectives: list[Collective]) -> None:
        """Prepares to follow a computation; `collectives` is the list to which they are added in the order of their starts."""
        self._reader, self._computation, self._collectives = reader, computation, collectives
        self._started: dict[str, tuple[range, int, int]] = {}

    def follow(self, instruction: Instruction, cycles: int, kernels: Sequence[Kernel]) -> None:
        """Adds the collectives that an instruction performs or starts, and updates those that it continues or ends.

        Args:
          instruction: the next instruction of the computation.
          cycles: estimated cycles of all instructions before it.
          kernels: kernels that run before it.
        """
        opcode, name, first = instruction.opcode, instruction.name, next(iter(instruction.inputs), "")
        now = cycles, len(kernels)
        if opcode in COLLECTIVES:
            self._collectives.append(self._reader.read(instruction, self._computation))
        elif opcode.removesuffix("-start") in COLLECTIVES:
            self._start(name, [self._reader.read(instruction, self._computation)], now)
        elif opcode.removesuffix("-done") in COLLECTIVES:
            self._update(first, cycles, kernels, shape_bytes(instruction.shape))
        elif opcode == "call-start":
            self._start(name, self._reader.read_called(instruction), now)
        elif opcode == "call-update":  # It passes the operands, and the SparseCore has only waited for them until now.
            self._started[name] = self._started[first][0], *now
        elif opcode == "call-done":
            self._update(first, cycles, kernels)
        elif opcode == "send" and (rendezvous := _rendezvous(instruction)):
            self._start(rendezvous, [self._reader.read_send(instruction, self._computation)], now)
        elif opcode == "recv-done" and (rendezvous := _rendezvous(self._computation[first])):
            self._update(rendezvous, cycles, kernels, shape_bytes(instruction.shape))
        elif opcode == "fusion":
            for collective, chain, starts in self._reader.read_fused(instruction, instruction):
                if not chain:
                    self._collectives.append(collective)
                elif starts:
                    self._start(chain, [collective], now)
                elif chain in self._started:  # Otherwise, it started outside of the loop that continues it.
                    self._update(chain, cycles, kernels)

    def _start(self, key: str, collectives: Sequence[Collective], now: tuple[int, int]) -> None:
        """Adds asynchronous collectives. What runs from now on overlaps with them."""
        first = len(self._collectives)
        self._collectives.extend(each._replace(asynchronous=True) for each in collectives)
        self._started[key] = range(first, len(self._collectives)), *now

    def _update(self, key: str, cycles: int, kernels: Sequence[Kernel], size: int = 0) -> None:
        """Sets the overlap of collectives to all that has run since their start; `size` is the size of a result in bytes."""
        indices, cycles_before, kernels_before = self._started[key]
        for index in indices:
            each = self._collectives[index]
            self._collectives[index] = each._replace(
                bytes=max(each.bytes, size),
                overlap_cycles=cycles - cycles_before,
                overlap_kernels=tuple(kernels[kernels_before:]),
            )


def _rendezvous(instruction: Instruction) -> str:
    """Returns the name that the two ends of a transfer between slices have in common, or "" for other instructions."""
    match = re.search(r'_xla_host_transfer_rendezvous="([^"]+)",.*_xla_megascale_transfer_type=', instruction.attributes)
    return match[1] if match else ""
