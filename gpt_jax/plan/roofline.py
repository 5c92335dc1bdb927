"""The modeled time of a compiled program on a CPU or a GPU: its optimized HLO, and the measured rates of the device.

    product:     FLOPs / the rate of products of this shape and layout
    other:       the time to move its bytes + the sum of (elements x seconds of one element) over its operations
    computation: a schedule in which an instruction starts when its operands exist and the cores are shared

An instruction that this cannot read is listed as not modeled.
"""

import collections
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from gpt_jax.plan.attribution import MOVES, Attribution
from gpt_jax.plan.collectives import COLLECTIVES
from gpt_jax.plan.costs import trip_count
from gpt_jax.plan.hlo import Computation, Instruction, Program, parse, shape_bytes, shape_dimensions
from gpt_jax.plan.loops import count_evaluations
from gpt_jax.plan.rates import Rates, product_layout

FREE = {
    *("add-dependency", "after-all", "async-update", "bitcast", "constant", "get-tuple-element", "iota", "opt-barrier"),
    *("parameter", "partition-id", "replica-id", "reshape", "tuple"),
}
"""Instructions that do no work, or whose work is part of other ones."""
OPAQUE = {"cholesky", "custom-call", "fft", "rng", "rng-bit-generator", "sort", "triangular-solve", "infeed", "outfeed"}
"""Instructions whose work cannot be read from their shapes."""
OPERATION = {
    **dict.fromkeys(("exponential", "exponential-minus-one"), "exponential"),
    **dict.fromkeys(("log", "log-plus-one"), "log"),
    **dict.fromkeys(("tanh", "logistic", "erf", "cosine", "sine", "power", "cbrt"), "tanh"),
    **dict.fromkeys(("divide", "remainder"), "divide"),
    "sqrt": "sqrt",
    "rsqrt": "rsqrt",
}
"""The measured operation that stands for an opcode; all others count as "simple"."""
SLICES = {"dynamic-slice", "slice", "gather"}
VIEWS = {"bitcast", "reshape"}


class Work(NamedTuple):
    """All executions of one instruction."""

    seconds: float
    """Modeled time on all cores: the time that it takes alone, times its share of the cores."""
    part: str
    direction: str
    kind: str
    times: int
    name: str


class Estimate(NamedTuple):
    """The modeled time of a program."""

    seconds: float
    """Time of one execution, which is at least the sum of the time of all work."""
    work: list[Work]
    flops: float
    """FLOPs of all products."""
    unmodeled: dict[str, int]
    """Numbers of executed instructions whose time is not modeled, by opcode and custom-call target."""

    def by_part(self) -> dict[str, float]:
        """Returns the seconds by part of the model, scaled to the time of the execution, the longest first."""
        sums: dict[str, float] = collections.defaultdict(float)
        for each in self.work:
            sums[each.part] += each.seconds
        total = sum(sums.values()) or 1.0
        return {part: sums[part] * self.seconds / total for part in sorted(sums, key=lambda part: -sums[part])}


class Task(NamedTuple):
    """An instruction in a schedule."""

    inputs: tuple[str, ...]
    work: float
    """Seconds of one core."""
    cores: int
    """Maximum number of cores that execute it together."""


def schedule(tasks: Mapping[str, Task], cores: int) -> float:
    """Returns the time until all tasks are done if those whose inputs exist are executed, in order, as far as cores are free.

    Args:
      tasks: tasks by name. Inputs that are not among them exist from the beginning.
    """
    left = {name: task.work for name, task in tasks.items()}
    waiting = {name: {each for each in task.inputs if each in tasks} for name, task in tasks.items()}
    users = collections.defaultdict(list)
    for name, inputs in waiting.items():
        for each in inputs:
            users[each].append(name)
    ready = [name for name, inputs in waiting.items() if not inputs]
    now = 0.0
    while ready:
        free, speeds = cores, {}
        for name in ready:
            speeds[name] = min(tasks[name].cores, free)
            free -= speeds[name]
        step = min(left[name] / speed for name, speed in speeds.items() if speed)
        now += step
        for name, speed in speeds.items():
            left[name] -= step * speed
        done = [name for name, speed in speeds.items() if speed and left[name] <= 1e-12]
        ready = [name for name in ready if name not in done]
        for name in done:
            for user in users[name]:
                waiting[user].discard(name)
                if not waiting[user]:
                    ready.append(user)
    return now


def estimate(text: str, rates: Rates) -> Estimate:
    """Returns the modeled time of a program from its optimized HLO, `compiled.as_text()`.

    Raises:
      ValueError: the text is not an HLO module.
    """
    program = parse(text)
    return _Reader(program, rates).read(program.entry)


class _Reader:
    """Models the instructions of a program."""

    def __init__(self, program: Program, rates: Rates) -> None:
        self._program, self._rates, self._attribution = program, rates, Attribution(program)
        self.read = functools.cache(self._read)

    def _read(self, name: str) -> Estimate:
        """Returns the modeled time of one execution of a computation."""
        computation, tasks, work = self._program.computations[name], {}, []
        flops, unmodeled = 0.0, collections.Counter[str]()
        for each in computation.values():
            inner, times = self._inner(each)
            cores = self._rates.cores
            if inner is not None:
                work += [row._replace(seconds=row.seconds * times, times=row.times * times) for row in inner.work]
                flops += inner.flops * times
                unmodeled.update({key: count * times for key, count in inner.unmodeled.items()})
                seconds = inner.seconds * times + self._rates.iteration * times * (each.opcode == "while")
            elif (modeled := self._instruction(each, computation)) is None:
                seconds = 0.0
                unmodeled[_label(each)] += 1
            else:
                seconds, cores = modeled
                flops += self._flops(each, computation)
                if seconds:
                    share = seconds * cores / self._rates.cores
                    work.append(Work(share, *self._attribution.place(each), self._attribution.kind(each), 1, each.name))
            tasks[each.name] = Task(tuple(each.inputs), seconds * cores, cores)
        return Estimate(schedule(tasks, self._rates.cores), work, flops, dict(unmodeled))

    def _inner(self, each: Instruction) -> tuple[Estimate | None, int]:
        """Returns the estimate of a computation that an instruction executes, and how often; None if it executes none."""
        if each.opcode == "while":
            try:
                return self.read(each.attribute("body")), trip_count(each, self._program, None)
            except ValueError:
                return None, 0
        if each.opcode == "conditional":
            return min((self.read(name) for name in each.called), key=lambda branch: branch.seconds), 1
        return (self.read(each.called[0]), 1) if each.opcode in ("call", "async-start") else (None, 0)

    def _instruction(self, each: Instruction, computation: Computation) -> tuple[float, int] | None:
        """Returns the seconds that an instruction takes alone, and on how many cores; None if its time is not modeled."""
        if each.opcode in FREE or each.opcode.endswith("-done"):
            return 0.0, 1
        kind = each.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            return self._collective(each, kind, computation)
        if products := list(self._products(each, computation)):
            times = [self._product(*product) for product in products]
            if None in times:
                return None
            return sum(filter(None, times)) + self._operations(each, self._rates.cores), self._rates.cores
        if each.opcode in OPAQUE or each.opcode == "while":
            return None
        cores = self._cores(each)
        size, strided = self._traffic(each, computation)
        if self._reduces(each):
            seconds = self._rates.seconds("reduce", size)
        elif strided:
            seconds = self._rates.seconds("transpose", size) * self._rates.cores / cores
        else:
            seconds = self._rates.seconds("copy" if cores == self._rates.cores else "serial copy", size)
        return seconds + self._operations(each, cores), cores

    def _collective(self, each: Instruction, kind: str, computation: Computation) -> tuple[float, int] | None:
        """Returns the time of a collective. A gather and a scatter of sums are the two halves of an all-reduce."""
        halves = {"all-reduce": 1.0, "all-gather": 0.5, "reduce-scatter": 0.5}
        if kind not in halves or "all-reduce" not in self._rates.curves:
            return None
        size = max(shape_bytes(each.shape), sum(shape_bytes(computation[name].shape) for name in each.inputs))
        return halves[kind] * self._rates.seconds("all-reduce", size), self._rates.cores

    def _cores(self, each: Instruction) -> int:
        """Returns the number of cores that execute an instruction: on CPUs, its partitions, or all for a library's fusion."""
        if self._rates.cores == 1 or "fusion_config" in each.attributes:
            return self._rates.cores
        found = re.search(r'"outer_dimension_partitions":\[([^\]]*)\]', each.attributes)
        parts = math.prod(int(number) for number in re.findall(r"\d+", found[1])) if found else 1
        return min(parts, self._rates.cores)

    # --- products ---------------------------------------------------------------------------------------------------

    def _products(self, each: Instruction, computation: Computation) -> Iterator[tuple[Instruction, Computation]]:
        """Yields the products in an instruction, each with the computation that contains its operands."""
        if each.opcode == "fusion":
            for called in each.called:
                for inside in self._program.computations[called].values():
                    yield from self._products(inside, self._program.computations[called])
        elif each.opcode == "dot" or (each.opcode == "custom-call" and "gemm" in _label(each)):
            yield each, computation

    def _product(self, each: Instruction, computation: Computation) -> float | None:
        """Returns the seconds of a product; None if its layout or dtype was not measured."""
        shape = _product_shape(each, computation)
        if shape is None:
            return None
        key, batch, rows, columns, length = shape
        if key not in self._rates.products:
            return None
        flops = 2.0 * batch * rows * columns * length
        return flops / self._rates.product_rate(key, rows, columns, length)

    def _flops(self, each: Instruction, computation: Computation) -> float:
        shapes = (_product_shape(*product) for product in self._products(each, computation))
        return sum(2.0 * math.prod(shape[1:]) for shape in shapes if shape)

    # --- everything else --------------------------------------------------------------------------------------------

    def _inside(self, each: Instruction) -> Computation:
        """Returns the instructions of a fusion, or the instruction itself."""
        return self._program.computations[each.called[0]] if each.opcode == "fusion" else {each.name: each}

    def _reduces(self, each: Instruction) -> bool:
        return any(inside.opcode in ("reduce", "reduce-window") for inside in self._inside(each).values())

    def _operations(self, each: Instruction, cores: int) -> float:
        """Returns the seconds of the elementwise operations of an instruction on some cores."""
        seconds, inside = self._rates.operations, self._inside(each)
        evaluations = {}
        if each.opcode == "fusion" and "repeated" in seconds and "fusion_config" not in each.attributes:
            root = list(inside.values())[-1]
            update = _behind_views(root, inside)
            replaces = update.opcode == "dynamic-update-slice"
            evaluations = count_evaluations(inside, inside[_operands(update)[1]] if replaces else root)
        total = 0.0
        for one in inside.values():
            if one.opcode in MOVES or one.opcode in ("convert", "custom-call", "dot", "fusion", "reduce"):
                continue
            count, repeated = evaluations.get(one.name) or (_elements(one.shape), False)
            total += count * seconds["repeated" if repeated else OPERATION.get(one.opcode, "simple")]
        return total * self._rates.cores / cores

    def _traffic(self, each: Instruction, computation: Computation) -> tuple[int, bool]:
        """Returns the bytes that an instruction reads and writes, and whether it changes the order of elements.

        Of an operand that is only sliced, the slices count; of a result that is an array with a slice replaced, twice the slice.
        """
        inputs, inside = [computation[name] for name in _operands(each)], self._inside(each)
        root = _behind_views(list(inside.values())[-1], inside)
        size = 2 * shape_bytes(_updated(root, inside)) if root.opcode == "dynamic-update-slice" else shape_bytes(each.shape)
        if each.opcode == "fusion":
            for parameter in (one for one in inside.values() if one.opcode == "parameter"):
                users = list(_users(parameter, inside))
                if all(user.opcode in SLICES for user in users):
                    size += min(sum(shape_bytes(user.shape) for user in users), shape_bytes(parameter.shape))
                elif not (root.opcode == "dynamic-update-slice" and users == [root]):
                    size += shape_bytes(inputs[int(parameter.operands)].shape)
        elif each.opcode in SLICES:
            size *= 2
        elif each.opcode != "dynamic-update-slice":
            size += sum(shape_bytes(one.shape) for one in inputs)
        strided = any(_moves_last_axis(one, inside if each.opcode == "fusion" else computation) for one in inside.values())
        return size, strided


def _label(each: Instruction) -> str:
    """Returns the opcode of an instruction and, for a custom call, its target."""
    target = re.search(r'custom_call_target="([^"]*)"', each.attributes)
    return f"{each.opcode} {target[1]}" if target else each.opcode


def _operands(each: Instruction) -> list[str]:
    """Returns the names of the operands, with repetitions."""
    return re.findall(r"%([\w.\-]+)", each.operands)


def _elements(shape: str) -> int:
    return max((math.prod(dimensions) for dimensions in shape_dimensions(shape)), default=0)


def _behind_views(each: Instruction, computation: Computation) -> Instruction:
    """Returns the instruction whose result an instruction only gives another shape."""
    while each.opcode in VIEWS:
        each = computation[each.inputs[0]]
    return each


def _updated(update: Instruction, computation: Computation) -> str:
    """Returns the shape of the slice that a dynamic-update-slice replaces."""
    names = _operands(update)
    return computation[names[1]].shape if len(names) > 1 and names[1] in computation else update.shape


def _users(each: Instruction, computation: Computation) -> Iterator[Instruction]:
    """Yields the instructions that use a result, directly or in another shape."""
    for user in computation.values():
        if each.name in user.inputs:
            yield from _users(user, computation) if user.opcode in VIEWS else (user,)


def _moves_last_axis(each: Instruction, computation: Computation) -> bool:
    """Returns whether an instruction transposes the axis along which memory is contiguous."""
    if each.opcode != "copy" or each.inputs[0] not in computation:
        return False
    source = computation[each.inputs[0]].shape
    return _last_axis(source) != _last_axis(each.shape)


def _last_axis(shape: str) -> str:
    found = re.search(r"\]\{(\d+)", shape)
    return found[1] if found else ""


def _product_shape(each: Instruction, computation: Computation) -> tuple[str, int, int, int, int] | None:
    """Returns the key of a product's rates, and its batch, rows, columns and contracted length; None if they cannot be read."""
    names = _operands(each)[:2]
    if len(names) < 2 or any(name not in computation for name in names):
        return None
    shapes = [computation[name].shape for name in names]
    sides = []
    for side, shape in zip(("lhs", "rhs"), shapes, strict=True):
        sizes = next(iter(shape_dimensions(shape)), ())
        contracted, batch = (_axes(each.attributes, f"{side}_{kind}") for kind in ("contracting_dim", "batch_dim"))
        if not contracted or max([*contracted, *batch]) >= len(sizes):
            return None
        free = [axis for axis in range(len(sizes)) if axis not in (*contracted, *batch)]
        last = contracted[-1] > max(free, default=-1)
        sides.append((math.prod(sizes[a] for a in batch), math.prod(sizes[a] for a in free), last))
        length = math.prod(sizes[axis] for axis in contracted)
    dtype = shapes[0].partition("[")[0]
    batch_size, rows, left = sides[0]
    layout = product_layout(int(left), int(sides[1][2]), batch_size > 1)
    return f"{layout} {dtype}", batch_size, rows, sides[1][1], length


def _axes(attributes: str, name: str) -> list[int]:
    """Returns axes from `name`s={1,2} of a dot, or from "nameensions":["1"] in the configuration of a custom call."""
    found = re.search(rf'\b{name}(?:s=\{{|ensions":\[)([\d,"]*)', attributes)
    return [int(number) for number in re.findall(r"\d+", found[1])] if found else []
