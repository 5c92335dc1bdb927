"""How often XLA's loops on CPUs evaluate each instruction of a fusion.

XLA turns a fusion into nested loops over the axes of its result. An instruction is evaluated in the outermost loop in which the
index of its element is known; a value for each row, for example, is computed once per row. There are two exceptions, in which it
is computed again for each element, without vector instructions:

- An instruction whose elements are used under two different indices becomes a function, together with everything that it
  depends on. If this function reads an array at a position that it reads from memory, such as that of the current layer, the
  compiler does not move it out of the inner loops. An example is the hash of a dropout mask that has as many rows as columns:
  XLA merges two arrays of the same shape, one of which is used by row and the other by column.
- The innermost loop runs over several axes at once, so that the index is the result of a division.
"""

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

from gpt_jax.plan.hlo import Computation, Instruction, shape_dimensions

Index = tuple[frozenset[int], ...]
"""For each axis of an array, the loops that its index depends on, counted from the outermost."""
OTHERS = {"gather", "scatter", "reduce", "reduce-window", "dot", "convolution", "sort"}
"""Opcodes whose operands are used with other indices; these are taken to be evaluated once for each of their elements."""


class Evaluations(NamedTuple):
    """The evaluations of an instruction in one execution of its fusion."""

    times: int
    repeated: bool
    """Whether they are computed again for each element, without vector instructions."""


def count_evaluations(computation: Computation, result: Instruction) -> dict[str, Evaluations]:
    """Returns the evaluations of the instructions that a result of a fusion depends on.

    Args:
      computation: the instructions of the fusion.
      result: the one whose elements the loops compute.
    """
    sizes = _sizes(result)
    identity: Index = tuple(frozenset({axis}) for axis in range(len(sizes)))
    uses: dict[str, set[tuple[Index, str]]] = {result.name: {(identity, "")}}
    """The indices under which an instruction is used, each with the function that uses it, or "" for the loops themselves."""
    calls: dict[str, int] = {}
    reading: set[str] = set()
    """The functions that read an array at a position that they read from memory."""
    visited: dict[str, set[tuple[Index, str]]] = {}
    for each in reversed(list(computation.values())):
        if not (used := uses.get(each.name)):
            continue
        if len({index for index, function in used if function == ""}) > 1:
            calls[each.name] = sum(_executions(index, sizes) for index, function in used if function == "")
            used = {(index, function or each.name) for index, function in used}
        visited[each.name] = used
        if each.opcode == "dynamic-slice":
            reading.update(function for _, function in used if function)
        for operand in (computation[name] for name in each.inputs if name in computation):
            found = {(_operand_index(each, operand, index), function) for index, function in used}
            uses.setdefault(operand.name, set()).update(found)
    return {
        name: _count(computation[name], used, sizes, {name: calls[name] for name in reading}) for name, used in visited.items()
    }


def _count(each: Instruction, used: set[tuple[Index, str]], sizes: tuple[int, ...], calls: Mapping[str, int]) -> Evaluations:
    """Returns the evaluations of an instruction; `calls` has the functions that are called for each element."""
    repeated = {function for _, function in used} & set(calls)
    indices = {index for index, function in used if function not in calls}
    divided = any(_is_divided(index, _sizes(each), sizes) for index in indices)
    count = sum(calls[function] for function in repeated) + sum(_executions(index, sizes) for index in indices)
    return Evaluations(count, bool(repeated) or divided)


def _is_divided(index: Index, own: tuple[int, ...], sizes: tuple[int, ...]) -> bool:
    """Returns whether the index of an axis must be computed from the position in a longer innermost loop."""
    innermost = len(sizes) - 1
    return any(innermost in loops and size < sizes[-1] for loops, size in zip(index, own, strict=False))


def _executions(index: Index, sizes: tuple[int, ...]) -> int:
    """Returns the number of executions of the outermost loop in which an index is known."""
    return math.prod(sizes[: max(itertools.chain.from_iterable(index), default=-1) + 1])


def _sizes(each: Instruction) -> tuple[int, ...]:
    return next(iter(shape_dimensions(each.shape)), ())


def _operand_index(each: Instruction, operand: Instruction, index: Index) -> Index:
    before, after = _sizes(operand), _sizes(each)
    if not before:
        return ()
    if each.opcode == "broadcast":
        return tuple(index[axis] for axis in _dimensions(each))
    if each.opcode == "transpose":
        places = {axis: place for place, axis in enumerate(_dimensions(each))}
        return tuple(index[places[axis]] for axis in range(len(before)))
    if each.opcode in ("bitcast", "reshape"):
        return _reshaped(index, after, before)
    if each.opcode in OTHERS or len(before) != len(index):
        return (frozenset().union(*index),) * len(before)
    return index


def _dimensions(each: Instruction) -> list[int]:
    """Returns the attribute `dimensions={0,1}`."""
    found = each.attributes.partition("dimensions={")[2].partition("}")[0]
    return [int(axis) for axis in found.split(",") if axis]


def _reshaped(index: Index, after: tuple[int, ...], before: tuple[int, ...]) -> Index:
    """Returns the index of an operand whose axes are split or merged: each depends on the loops of the axes that it overlaps."""
    ends_after = list(itertools.accumulate(after, initial=1, func=lambda a, b: a * b))
    ends_before = list(itertools.accumulate(before, initial=1, func=lambda a, b: a * b))
    return tuple(
        frozenset().union(
            *(
                index[axis]
                for axis in range(len(after))
                if after[axis] > 1 and ends_after[axis] < ends_before[place + 1] and ends_before[place] < ends_after[axis + 1]
            )
        )
        if before[place] > 1
        else frozenset()
        for place in range(len(before))
    )
