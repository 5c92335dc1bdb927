"""Rates of an attached CPU or GPU, measured with small programs: products, copies, elementwise operations, and fixed costs.

The programs and their sizes are constants of this module. They do not depend on any config, so a model's step that is predicted
from the rates is a prediction. The median of several executions counts. Measuring takes about a minute; the rates are then
kept in the user's cache folder, for this kind of device, number of devices and cores, and version of jax.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gpt_jax.model.dropout import dropout, mask_stream
from gpt_jax.plan.cache import cache_folder
from gpt_jax.plan.hlo import parse
from gpt_jax.plan.loops import count_evaluations
from gpt_jax.runtime.machine import cpu_model
from gpt_jax.runtime.processor import OtherLoad, num_cores

VERSION = 1
SIZES = (64, 256, 1024, 4096, 16384)
"""Rows, columns and contracted length of the products; all combinations of at most `LARGEST` multiplications are measured."""
BATCH, BATCHED_SIZES = 32, (16, 64, 256)
"""Products in one batch, and their rows, columns and contracted lengths."""
LARGEST = 2**32
BYTES = tuple(2**power for power in range(14, 29, 2))
"""Bytes read and written by the copies, from 16 KiB to 256 MiB."""
ELEMENTS = 2**18
"""Elements of the arrays for elementwise operations. The arrays fit into the caches."""
QUIET = 0.2
"""Number of cores that other programs may keep busy while final rates are measured."""
SECONDS = 0.03
"""Time for which a program is repeated, at least `REPEATS` times."""
REPEATS = 4


class Rates(NamedTuple):
    """The rates of one device, or of the cores that all CPU devices share."""

    cores: int
    """Number of cores that execute one instruction together; 1 for a GPU."""
    products: Mapping[str, Sequence[tuple[int, int, int, float]]]
    """Rows, columns, contracted length and FLOPs per second, by the layout of the operands (`product_layout`) and the dtype."""
    curves: Mapping[str, Sequence[tuple[float, float]]]
    """Pairs of bytes and seconds: `copy`, `serial copy` (on one core) and `transpose` (bytes read and written), `reduce` (bytes
    read) and, with several devices, `all-reduce` (bytes on one device)."""
    operations: Mapping[str, float]
    """Seconds for one element, by the name of the operation. "repeated", on CPUs: any operation that loops.py counts as such."""
    iteration: float
    """Seconds of an iteration of an empty loop."""
    call: float
    """Seconds of a call of an empty program."""
    other_load: float
    """Mean number of cores that other programs used meanwhile."""

    def seconds(self, curve: str, size: float) -> float:
        """Returns the time for a number of bytes, interpolated between the measured sizes."""
        return interpolate(self.curves[curve], size)

    def product_rate(self, key: str, rows: int, columns: int, length: int) -> float:
        """Returns the FLOPs per second of a product, interpolated between the measured sizes in the logarithms of all three."""
        points: dict[tuple[int, ...], float] = {(m, n, k): rate for m, n, k, rate in self.products[key]}
        axes = [_neighbors(sorted({point[axis] for point in points}), size) for axis, size in enumerate((rows, columns, length))]
        total = 0.0
        for corner in itertools.product(*axes):
            sizes, shares = zip(*corner, strict=True)
            total += math.prod(shares) * math.log(points[_nearest(points, sizes)])
        return math.exp(total)


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    """Returns y at x, linear in the logarithms between points; constant before the first and proportional after the last."""
    points = sorted(points)
    if x <= points[0][0]:
        return points[0][1]
    if x >= points[-1][0]:
        return points[-1][1] * x / points[-1][0]
    after = next(index for index, point in enumerate(points) if point[0] > x)
    (x0, y0), (x1, y1) = points[after - 1 : after + 1]
    return float(y0 * (y1 / y0) ** (math.log(x / x0) / math.log(x1 / x0)))


def _neighbors(sizes: Sequence[int], size: int) -> list[tuple[int, float]]:
    """Returns the one or two measured sizes next to a size, each with its share in the interpolation."""
    size = min(max(size, sizes[0]), sizes[-1])
    if size in sizes:
        return [(size, 1.0)]
    above = next(index for index, each in enumerate(sizes) if each > size)
    share = math.log(size / sizes[above - 1]) / math.log(sizes[above] / sizes[above - 1])
    return [(sizes[above - 1], 1 - share), (sizes[above], share)]


def _nearest(points: Mapping[tuple[int, ...], float], sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the measured sizes that are nearest to these, which are too large if they were not measured themselves."""
    return min(points, key=lambda point: sum(abs(math.log(a / b)) for a, b in zip(point, sizes, strict=True)))


def product_layout(left: int, right: int, batched: bool) -> str:
    """Returns the name of a product's layout from the axes that are contracted, counted after the batch axes, each 0 or 1."""
    return f"{'batched ' if batched else ''}{'TN'[left]}{'NT'[right]}"


def find_rates(log: Callable[[str], None]) -> Rates:
    """Returns the rates of the attached devices from the cache, or else measures them.

    Rates that were measured while other programs were running are measured again each time, and the best ones are kept.

    Args:
      log: receives a line if they are measured.
    """
    path, before = rates_path(), None
    with contextlib.suppress(OSError, ValueError, TypeError):
        before = Rates(**json.loads(path.read_text()))
    if before is not None and before.other_load <= QUIET:
        return before
    log("measuring the rates of this device, which takes about a minute")
    rates = measure_rates()
    rates = rates if before is None else best_of(before, rates)
    with contextlib.suppress(OSError):  # They are measured again the next time.
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(rates._asdict()))
        unfinished.rename(path)
    return rates


def best_of(before: Rates, after: Rates) -> Rates:
    """Returns the higher rate and the shorter time of each program in two measurements of the same device."""
    products = {
        key: [(m, n, k, max(rate, other[3])) for (m, n, k, rate), other in zip(before.products[key], rows, strict=True)]
        for key, rows in after.products.items()
    }
    curves = {
        key: [(size, min(seconds, other[1])) for (size, seconds), other in zip(before.curves[key], rows, strict=True)]
        for key, rows in after.curves.items()
    }
    operations = {name: min(seconds, before.operations[name]) for name, seconds in after.operations.items()}
    rest = {name: min(getattr(before, name), getattr(after, name)) for name in ("iteration", "call", "other_load")}
    return Rates(after.cores, products, curves, operations, **rest)


def rates_path() -> Path:
    """Returns the path of the rates of the attached devices."""
    device = jax.devices()[0]
    facts = [VERSION, device.platform, device.device_kind, jax.device_count(), num_cores(), jax.__version__]
    facts += [cpu_model(), os.environ.get("XLA_FLAGS", "")] if device.platform == "cpu" else []
    return cache_folder().parent / "rates" / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()}.json"


def measure_rates() -> Rates:
    """Measures the rates of the attached devices."""
    cpu, others = jax.default_backend() == "cpu", OtherLoad([os.getpid()])
    call = statistics.median(_call_seconds(lambda x: x + 1, jnp.zeros(())) for _ in range(5))
    iteration = _per_iteration(lambda x: x + 1, jnp.zeros(()))
    rounds, products = [], {}
    for dtype, name in ((jnp.float32, "f32"),) if cpu else ((jnp.float32, "f32"), (jnp.bfloat16, "bf16")):
        for left, right, batched in itertools.product((1, 0), (0, 1), (False, True)):
            rows = _measure_products(left, right, batched, dtype)
            products[f"{product_layout(left, right, batched)} {name}"] = rows
        rounds.append(_measure_operations())  # The clock of a processor changes within seconds; the best round counts.
    operations = {name: min(each[name] for each in rounds) for name in rounds[0]}
    functions = {name: function for name, function in CURVES.items() if name != "all-reduce" or jax.device_count() > 1}
    curves = {
        name: [(size, max(function(size) - call * (name in CALLED), 1e-9)) for size in BYTES]
        for name, function in functions.items()
    }
    return Rates(num_cores() if cpu else 1, products, curves, operations, iteration, call, others.cores() or 0.0)


def _call_seconds(function: Callable[..., Any], out: Any, *arguments: Any) -> float:
    """Returns the median time of a call, whose result takes the memory of `out`, its first argument."""
    compiled = jax.jit(function, donate_argnums=0, keep_unused=True).lower(out, *arguments).compile()
    out = jax.block_until_ready(compiled(out, *arguments))
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(times) < REPEATS or time.perf_counter() < end:
        begin = time.perf_counter()
        out = jax.block_until_ready(compiled(out, *arguments))
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _seconds(function: Callable[..., jax.Array], out: jax.Array, first: jax.Array, *others: jax.Array, work: int) -> float:
    """Returns the median time of a function of `first` and `others`, repeated in a loop, which keeps the cores awake.

    Args:
      out: an array of the shape of the result.
      work: multiplications or bytes of the function. Long functions are repeated less often.
    """

    def body(_: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out = lax.optimization_barrier(function(*carry[1:]))
        # One element of the operand changes each time, so that XLA cannot compute the result once, before the loop.
        one = lax.slice(out, (0,) * out.ndim, (1,) * out.ndim).reshape((1,) * first.ndim)
        return out, lax.dynamic_update_slice(carry[1], one, (0,) * first.ndim), *carry[2:]

    count = min(max(2**27 // work, 1), 16)
    return _call_seconds(lambda carry: lax.fori_loop(0, count, body, carry), (out, first, *others)) / count


def _per_iteration(body: Callable[[jax.Array], jax.Array], x: jax.Array, count: int = 8) -> float:
    """Returns the time of an iteration of a loop: the difference of two lengths, divided by the difference of the lengths."""
    few, many = (_call_seconds(lambda x, n=n: lax.fori_loop(0, n, lambda _, x: body(x), x), x + 0) for n in (count, 3 * count))
    return max(many - few, 1e-9) / (2 * count)


def _measure_products(left: int, right: int, batched: bool, dtype: Any) -> list[tuple[int, int, int, float]]:
    """Returns the rates of products whose operands contract these axes."""
    first, rows = int(batched), []
    dimensions = ((first + left,), (first + right,)), ((0,), (0,)) if batched else ((), ())
    batch = (BATCH,) if batched else ()
    for m, n, k in itertools.product(BATCHED_SIZES if batched else SIZES, repeat=3):
        if m * n * k > LARGEST:
            continue
        arrays = [jnp.ones((*batch, *shape), dtype) for shape in ((m, k) if left else (k, m), (n, k) if right else (k, n))]
        out = jnp.zeros((*batch, m, n), dtype)
        work = math.prod(batch) * m * n * k
        seconds = _seconds(lambda a, b: lax.dot_general(a, b, dimensions), out, *arrays, work=work)
        rows.append((m, n, k, 2 * work / seconds))
    return rows


def _copy(size: int) -> float:
    """Returns the time of a program that reads half of the bytes and writes the other half."""
    return _seconds(lambda x: x + 1, jnp.zeros(size // 8), jnp.zeros(size // 8), work=size)


def _serial_copy(size: int) -> float:
    """Returns the time of a copy that XLA does not divide among the cores of a CPU."""
    return _call_seconds(lambda _, x: jnp.copy(x), jnp.zeros(size // 8), jnp.zeros(size // 8))


def _transpose(size: int) -> float:
    side = math.isqrt(size // 8)
    return _call_seconds(lambda _, x: x.T, jnp.zeros((side, side)), jnp.zeros((side, side)))


def _reduce(size: int) -> float:
    shape = size // 4 // 256, 256
    return _seconds(lambda x: x.sum(-1), jnp.zeros(shape[0]), jnp.zeros(shape), work=size)


def _all_reduce(size: int) -> float:
    mesh = jax.make_mesh((jax.device_count(),), ("all",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("all"))
    add = jax.shard_map(lambda x: lax.psum(x, "all"), mesh=mesh, in_specs=sharding.spec, out_specs=sharding.spec)
    return _call_seconds(add, jax.device_put(jnp.zeros(size // 4 * mesh.size), sharding))


CURVES = {"copy": _copy, "serial copy": _serial_copy, "transpose": _transpose, "reduce": _reduce, "all-reduce": _all_reduce}
"""Functions from a number of bytes to the seconds of a program. `Rates.curves` has the same names."""
CALLED = {"serial copy", "transpose", "all-reduce"}
"""The curves whose programs are called once for each time, so that the time includes a call."""


OPERATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "exponential": lambda x: jnp.exp(x),
    "log": lambda x: jnp.log(x),
    "tanh": lambda x: jnp.tanh(x),
    "divide": lambda x: 1.5 / x,
    "sqrt": lambda x: jnp.sqrt(x),
    "rsqrt": lambda x: lax.rsqrt(x),
}
"""Functions with one expensive operation each."""
CHAIN = 32
"""Number of cheap operations that are timed together."""


def _measure_operations() -> dict[str, float]:
    """Returns the seconds of each operation for one element: the time of a program that has it, less that of a copy."""

    def seconds(function: Callable[[jax.Array], jax.Array]) -> float:
        return _seconds(function, jnp.ones(ELEMENTS), jnp.full(ELEMENTS, 0.7), work=ELEMENTS)

    copy = seconds(lambda x: x * 0.5)

    def chain(x: jax.Array) -> jax.Array:
        return functools.reduce(lambda y, i: y * (x + i), range(CHAIN // 2), x)

    extra = {name: seconds(function) - copy for name, function in OPERATIONS.items()}
    extra["simple"] = (seconds(chain) - copy) / CHAIN
    found = {name: max(seconds, 1e-9) / ELEMENTS for name, seconds in extra.items()}
    return found | ({"repeated": _measure_repeated(copy / ELEMENTS)} if jax.default_backend() == "cpu" else {})


def _measure_repeated(copy: float) -> float:
    """Returns the seconds of an operation that is repeated for each element (loops.py), on all cores of a CPU.

    It is measured on dropout with square masks in a loop over layers. `copy` are the seconds of an element of a copy.
    """
    shape = 32, 128, 128

    def drop(x: jax.Array, examples: jax.Array, seed: jax.Array, step: jax.Array) -> jax.Array:
        def body(x: jax.Array, layer: jax.Array) -> tuple[jax.Array, None]:
            return dropout(x, mask_stream(seed, step, layer, 2, examples, 0), 0.1) + 1, None

        return lax.scan(body, x, jnp.arange(4))[0]

    arguments = jnp.zeros(shape), jnp.arange(shape[0]), jnp.uint32(1), jnp.int32(2)
    program = parse(jax.jit(drop).lower(*arguments).compile().as_text() or "")
    fused = (each for computation in program.computations.values() for each in computation.values() if each.opcode == "fusion")
    inside = [program.computations[each.called[0]] for each in fused]
    found = (count_evaluations(computation, list(computation.values())[-1]) for computation in inside)
    repeated = max(sum(each.times for each in evaluations.values() if each.repeated) for evaluations in found)
    seconds = _call_seconds(drop, *arguments) / 4 - copy * math.prod(shape)
    return max(seconds, 1e-9) / max(repeated, 1)
