"""Costs of a compiled TPU program: cycles by part of the model, collectives, and calls of Pallas kernels.

They are read from the optimized HLO, which contains the TPU compiler's estimate of the cycles of each fusion, product and
copy. The costs of a loop's body are multiplied by the loop's trip count. For a conditional, the branch with the fewest cycles
counts, because the other branch is for exceptional cases, such as improbable targets in the loss.

The compiler does not estimate asynchronous copies, waiting for memory, collectives or Pallas kernels. Collectives and kernels are
listed separately, with the properties that determine their time.
"""

import collections
import re
from collections.abc import Mapping
from typing import NamedTuple

from gpt_jax.plan.attribution import OTHER, Attribution
from gpt_jax.plan.collectives import Collective, CollectiveReader, Transfers
from gpt_jax.plan.hlo import Instruction, Program, parse
from gpt_jax.plan.kernels import Kernel, is_kernel, read_kernel


class Cost(NamedTuple):
    """The cycles of one instruction in all of its executions."""

    cycles: int
    part: str
    direction: str
    kind: str
    times: int
    """Number of executions."""
    name: str
    op_name: str


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
        """Adds other costs, multiplied by a number of executions."""
        self.costs.extend(each._replace(cycles=executions * each.cycles, times=executions * each.times) for each in other.costs)
        self.collectives.extend(each._replace(times=executions * each.times) for each in other.collectives)
        self.kernels.extend(each._replace(times=executions * each.times) for each in other.kernels)


def read_costs(text: str, mesh: Mapping[str, int], trips: int | None = None) -> Costs:
    """Returns the costs of a program.

    Args:
      text: its optimized HLO, `compiled.as_text()`.
      mesh: sizes of the mesh's axes by name, `mesh.shape`.
      trips: number of iterations of a loop whose trip count is not a constant. None: there must be no such loop.

    Raises:
      ValueError: the text is not an HLO module, or the trip count of a loop or the groups of a collective cannot be read.
    """
    program = parse(text)
    attribution = Attribution(program)
    return _read_computation(program.entry, program, attribution, CollectiveReader(program, mesh, attribution), trips)


def _read_computation(
    name: str, program: Program, attribution: Attribution, reader: CollectiveReader, trips: int | None
) -> Costs:
    """Returns the costs of one execution of a computation."""
    computation = program.computations[name]
    found = Costs([], [], [])
    transfers = Transfers(reader, computation, found.collectives)
    cycles = 0
    for each in computation.values():
        before = len(found.costs)
        if each.opcode == "while":
            body = _read_computation(each.attribute("body"), program, attribution, reader, trips)
            found.extend(_placed(body, *attribution.place(each)), trip_count(each, program, trips))
        elif each.opcode == "conditional":
            branches = (_read_computation(branch, program, attribution, reader, trips) for branch in each.called)
            found.extend(min(branches, key=lambda branch: branch.cycles))
        elif each.opcode == "call":
            found.extend(_read_computation(each.called[0], program, attribution, reader, trips))
        elif is_kernel(each):
            found.kernels.append(read_kernel(each, computation, attribution))
        else:
            transfers.follow(each, cycles, found.kernels)
        if each.cycles:
            part, direction = attribution.place(each)
            found.costs.append(Cost(each.cycles, part, direction, attribution.kind(each), 1, each.name, each.op_name))
        cycles += sum(cost.cycles for cost in found.costs[before:])
    return found


def _placed(costs: Costs, part: str, direction: str) -> Costs:
    """Returns the costs of a loop's body; those outside of all scopes get the part and direction of the loop."""
    if part == OTHER:
        return costs
    inside = [each._replace(part=part, direction=direction) if each.part == OTHER else each for each in costs.costs]
    return costs._replace(costs=inside)


def trip_count(loop: Instruction, program: Program, default: int | None) -> int:
    """Returns the trip count of a loop that counts from 0, as those of `jax.lax.scan` do, or `default` if it is not constant."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition = list(program.inside(loop.attribute("condition")))
    compared = any(each.opcode == "compare" and "direction=LT" in each.attributes for each in condition)
    constants = (each for each in condition if each.opcode == "constant" and re.match(r"[su]\d+\[\]", each.shape))
    limits = {int(each.operands) for each in constants}
    if compared and len(limits) == 1:
        return limits.pop()
    if default is None:
        raise ValueError(f"the trip count of loop {loop.name} ({loop.op_name}) is not a constant")
    return default
