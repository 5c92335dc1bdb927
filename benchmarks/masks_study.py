"""The study behind gpt_jax/model/dropout.py: statistical quality and cost of hashes for dropout masks (docs/masks.md).

    python benchmarks/masks_study.py            everything except "deep", about 5 minutes on two cores
    python benchmarks/masks_study.py quality    z-scores of 123 statistics over 192 masks of 512 x 512 per hash
    python benchmarks/masks_study.py deep       the same for the frozen hash over 1,536 masks
    python benchmarks/masks_study.py cpu        nanoseconds per element of a [12, 512, 512] mask under jax.jit
    python benchmarks/masks_study.py tpu        VLIW bundles of a 512 x 512 Pallas kernel; needs libtpu but no TPU

Every candidate computes two 32-bit words from a pair of queries (q, q + 8) and a key. The upper 16 bits of a word, with
the sign bit flipped, are the value of an element. Terms of the query or the key alone are computed once per row or
column.
"""

import importlib.metadata
import importlib.util
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpt_jax.model import dropout

SIZE = 512  # queries and keys of a mask
RATE = 0.1
FAIL = 5.0  # a larger |z| is a failure; its probability for a sound hash is 6e-7 per test and 5e-4 for the whole study
u32 = np.uint32


# --- the candidates -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A hash: `row(a, b, pair)` and `column(a, b, key)` return tuples of terms, `words(row, column)` the words of q and q + 8."""

    name: str
    formula: str
    row: Callable[[Any, Any, Any], tuple]
    column: Callable[[Any, Any, Any], tuple]
    words: Callable[[tuple, tuple], tuple]
    control: bool = False  # weak on purpose: the tests must reject it


def fold(x: Any) -> tuple[Any, Any]:
    """Returns words for both halves of `x`. The upper half is mixed into the lower one, as the low bits of a product are weak."""
    return x ^ x << u32(16), x


def murmur(row: tuple, column: tuple) -> tuple[Any, Any]:
    """MurmurHash3's finalizer of the packed position, with the stream's second word mixed in halfway."""
    x = row[0] ^ column[0]
    x = (x ^ x >> u32(16)) * u32(0x85EBCA6B) ^ row[1]
    x = (x ^ x >> u32(13)) * u32(0xC2B2AE35)
    return fold(x)


def add_shift_xor(row: tuple, column: tuple) -> tuple[Any, Any]:
    """Three rounds of add, shift and exclusive or on the packed position."""
    x = row[0] ^ column[0]
    for left, right in ((10, 6), (3, 11), (15, 7)):
        x = x + (x << u32(left))
        x = x ^ x >> u32(right)
        x = x + row[1]
    return fold(x)


def multiply_shift_multiply(row: tuple, column: tuple) -> tuple[Any, Any]:
    x = (row[0] ^ column[0]) * u32(0x21F0AAAD)
    return fold((x ^ x >> u32(15)) * u32(0xD35A2D97))


def keyed(row: tuple, column: tuple) -> tuple[Any, Any]:
    """The frozen hash, `dropout.keep_pair`."""
    x = (row[0] ^ column[0]) * column[1]
    return x, x * u32(dropout.SECOND)


def affine(row: tuple, column: tuple) -> tuple[Any, Any]:
    x = row[0] * column[1] + column[0]
    return x, x * u32(dropout.SECOND)


def packed_row(a: Any, b: Any, pair: Any) -> tuple:
    return a ^ pair << u32(16), b


def packed_column(a: Any, b: Any, key: Any) -> tuple:
    return (key,)


def hashed_row(a: Any, b: Any, pair: Any) -> tuple:
    return (dropout.row_term(a, pair),)


def hashed_column(a: Any, b: Any, key: Any) -> tuple:
    return dropout.column_terms(a, b, key)


CANDIDATES = [
    Candidate("murmur", "fmix32(a ^ (p << 16 | k)), b in the middle", packed_row, packed_column, murmur),
    Candidate("shift-add", "three rounds of add, shift, xor", packed_row, packed_column, add_shift_xor),
    Candidate("fixed", "((R ^ C) * m) xor-shifted * n", hashed_row, hashed_column, multiply_shift_multiply),
    Candidate("keyed", "(R ^ C) * D, and that * M", hashed_row, hashed_column, keyed),
    Candidate("keyed, folded", "(R ^ C) * D", hashed_row, hashed_column, lambda r, c: fold((r[0] ^ c[0]) * c[1])),
    Candidate("affine", "R * D + C, and that * M", hashed_row, hashed_column, affine),
    Candidate(
        "one multiply", "(R ^ C) * m", hashed_row, hashed_column, lambda r, c: fold((r[0] ^ c[0]) * u32(0x21F0AAAD)), control=True
    ),
    Candidate(
        "bare halves",
        "(R ^ C) * D, its lower half as it is",
        hashed_row,
        hashed_column,
        lambda r, c: (((r[0] ^ c[0]) * c[1]) << u32(16), (r[0] ^ c[0]) * c[1]),
        control=True,
    ),
    Candidate("no mixing", "R ^ C", hashed_row, hashed_column, lambda r, c: fold(r[0] ^ c[0]), control=True),
]


def values(candidate: Candidate, stream: Any, size: int = SIZE) -> np.ndarray:
    """Returns the 16-bit values [size, size] of one stream."""
    a, b = np.asarray(stream, np.uint32)[:, None, None]
    pairs, keys = np.arange(size // 2, dtype=np.uint32)[:, None], np.arange(size, dtype=np.uint32)[None]
    words = candidate.words(candidate.row(a, b, pairs), candidate.column(a, b, keys))
    pairs_of_rows = np.stack([w.reshape(-1, 8, size) for w in words], 1)
    return (pairs_of_rows.reshape(size, size) >> u32(16) ^ u32(0x8000)).astype(np.uint16)


# --- quality --------------------------------------------------------------------------------------------------------


class Scores:
    """Collects statistics over masks and converts them to standard deviations."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}
        self.tables: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.samples: dict[str, list[float]] = {}

    def mean_zero(self, name: str, total: float, variance: float) -> None:
        """Adds a sum whose expectation is zero, with its variance."""
        entry = self.sums.setdefault(name, [0.0, 0.0])
        entry[0] += total
        entry[1] += variance

    def table(self, name: str, counts: np.ndarray, shares: np.ndarray) -> None:
        """Adds counts of categories with the probabilities `shares`, for a chi-square test."""
        old = self.tables.get(name, (0, None))[0]
        self.tables[name] = (old + counts.astype(np.int64), shares)

    def mean_one(self, name: str, value: float) -> None:
        """Adds a statistic of one mask whose expectation is one; its variance is estimated from the masks."""
        self.samples.setdefault(name, []).append(value)

    def z(self) -> dict[str, float]:
        """Returns each statistic's distance from its expectation in standard deviations."""
        scores = {name: total / variance**0.5 for name, (total, variance) in self.sums.items()}
        for name, (counts, shares) in self.tables.items():
            expected = counts.sum() * shares
            degrees = len(shares) - 1
            chi2 = ((counts - expected) ** 2 / expected).sum()
            # Wilson and Hilferty's cube root makes chi-square normal even for few degrees of freedom.
            scores[name] = ((chi2 / degrees) ** (1 / 3) - 1 + 2 / (9 * degrees)) / (2 / (9 * degrees)) ** 0.5
        for name, sample in self.samples.items():
            spread = np.std(sample, ddof=1) / len(sample) ** 0.5
            scores[name] = (np.mean(sample) - 1) / max(spread, 1e-12)
        return scores


PAIRS = np.triu_indices(SIZE, 1)
MANY = 14  # number of elements dropped in both of two rows that makes them "alike"; about 5 of 512 are expected
P_BOTH = (dropout.threshold(RATE) / 65536) ** 2
P_MANY = 1 - sum(math.comb(SIZE, n) * P_BOTH**n * (1 - P_BOTH) ** (SIZE - n) for n in range(MANY))
LAGS = [(0, 1), (0, 2), (0, 8), (0, 16), (0, 128), (1, 0), (2, 0), (8, 0), (16, 0), (128, 0), (1, 1), (8, 1), (16, 16)]
RECTANGLES = [(1, 1), (1, 8), (8, 1), (8, 8), (16, 1), (16, 16), (128, 128)]
NEIGHBORS = ["step", "seed", "layer", "site", "example", "head"]


def shifted(x: np.ndarray, lag: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the elements of x that have a partner at distance `lag`, and the partners. A query lag of 8 means the same pair."""
    dq, dk = lag
    first, second = x[: SIZE - dq, : SIZE - dk], x[dq:, dk:]
    if dq == 8:  # only queries with bit 3 clear, whose partner is in the same pair
        rows = np.flatnonzero(np.arange(SIZE - 8) // 8 % 2 == 0)
        first, second = first[rows], second[rows]
    return first, second


def joint(scores: Scores, name: str, x: np.ndarray, y: np.ndarray) -> None:
    """Tests whether two values are independent in their top four bits, and in their bottom four bits."""
    for part, shift in (("top", 12), ("low", 0)):
        pairs = (x >> shift & 15).astype(np.int64) << 4 | (y >> shift & 15)
        scores.table(f"{name}, {part} bits", np.bincount(pairs.ravel(), minlength=256), np.full(256, 1 / 256))


def score_mask(scores: Scores, value: np.ndarray) -> np.ndarray:
    """Makes all tests within one mask, and returns the mask with mean 0 and variance 1."""
    dropped = value < dropout.threshold(RATE)
    p = dropout.threshold(RATE) / 65536
    mask = ((dropped - p) / (p * (1 - p)) ** 0.5).astype(np.float32)

    scores.table("values uniform", np.bincount(value.ravel(), minlength=65536), np.full(65536, 1 / 65536))
    scores.mean_zero("share dropped", mask.sum(dtype=np.float64), mask.size)
    for bit in range(16):
        signs = 1 - 2 * (value >> bit & 1).astype(np.int8)
        scores.mean_zero(f"bit {bit}", signs.sum(), signs.size)
        for lag in ((1, 1), (8, 1), (16, 8)):
            first, second = shifted(signs, lag)
            across, down = shifted(np.roll(signs, -lag[1], 1), (lag[0], 0)), shifted(signs, (lag[0], 0))
            product = down[0] * down[1] * across[0] * across[1]
            product = product[:, : SIZE - lag[1]]
            scores.mean_zero(f"rectangle of bit {bit} {lag}", product.sum(), product.size)
    for lag in LAGS:
        first, second = shifted(mask, lag)
        scores.mean_zero(f"masks {lag}", (first * second).sum(dtype=np.float64), first.size)
    for lag in ((0, 1), (1, 0), (8, 0), (16, 0)):
        joint(scores, f"values {lag}", *shifted(value, lag))
    for dq, dk in RECTANGLES:
        columns = mask[:, : SIZE - dk] * mask[:, dk:]
        first, second = shifted(columns, (dq, 0))
        scores.mean_zero(f"rectangles {dq, dk}", (first * second).sum(dtype=np.float64), first.size)
    for name, m in (("queries", mask), ("keys", mask.T)):
        triple = m[:-32] * m[8:-24] * m[16:-16]
        scores.mean_zero(f"triples of {name}", triple.sum(dtype=np.float64), triple.size)
        # The squared inner products of all pairs of rows contain every rectangle of the mask.
        inner = (m @ m.T)[PAIRS] / SIZE**0.5
        scores.mean_one(f"all pairs of {name}", float(np.mean(inner.astype(np.float64) ** 2)))
        # The share of pairs of rows that drop far too many elements together.
        d = (m > 0).astype(np.float32)
        scores.mean_one(f"alike pairs of {name}", float(np.mean((d @ d.T)[PAIRS] >= MANY) / P_MANY))
        scores.mean_one(f"drops a row, by {name}", float(np.mean(m.sum(1, dtype=np.float64) ** 2) / SIZE))
    blocks = mask.reshape(SIZE // 16, 16, SIZE // 16, 16).sum((1, 3), dtype=np.float64)
    scores.mean_one("drops a 16 x 16 block", float(np.mean(blocks**2) / 256))
    limit = 40
    for name, d in (("keys", dropped), ("queries", dropped.T)):
        gaps = np.minimum(np.diff(np.flatnonzero(d.ravel())), limit) - 1  # a run of kept elements between two drops
        shares = p * (1 - p) ** np.arange(limit)
        shares[-1] = (1 - p) ** (limit - 1)
        scores.table(f"runs along {name}", np.bincount(gaps, minlength=limit), shares)
    return mask


def streams(count: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns streams as in a training run, and for each argument the streams with the next value of that argument."""
    i = np.arange(count)
    place = {"seed": 0 * i, "step": i, "layer": i % 12, "site": 0 * i + 1, "example": i * 7 % 64, "head": i * 5 % 12}
    near = {name: {**place, name: place[name] + 1} for name in NEIGHBORS}

    def make(at: dict[str, Any]) -> np.ndarray:
        return np.asarray(dropout.mask_stream(**at))

    return make(place), {name: make(at) for name, at in near.items()}


def score_hash(draw: Callable[[np.ndarray], np.ndarray], count: int) -> dict[str, float]:
    """Returns the z-scores of all tests over `count` masks, whose values `draw` returns for a stream."""
    scores = Scores()
    here, near = streams(count)
    for i in range(count):
        value = draw(here[i])
        mask = score_mask(scores, value)
        name = NEIGHBORS[i % len(NEIGHBORS)]
        other = draw(near[name][i])
        joint(scores, f"next {name}", value, other)
        p = dropout.threshold(RATE) / 65536
        other_mask = ((other < dropout.threshold(RATE)) - p) / (p * (1 - p)) ** 0.5
        scores.mean_zero(f"masks, next {name}", float((mask * other_mask).sum(dtype=np.float64)), mask.size)
    return scores.z()


def quality(count: int = 192, only: str | None = None) -> None:
    """Prints the quality of every candidate, or of the one named `only`. Exits with an error if the outcome is unexpected."""
    print(f"## quality: {count} masks of {SIZE} x {SIZE}, rate {RATE}; a test fails at |z| > {FAIL}\n")
    print("| hash | tests | failed | of these on masks | largest abs z |\n|---|---|---|---|---|")
    generator = np.random.Generator(np.random.Philox(0))
    draws: dict[str, Callable] = {}
    if only is None:
        draws["Philox (reference)"] = lambda _: generator.integers(0, 65536, (SIZE, SIZE), np.uint16)
    draws |= {c.name: partial(values, c) for c in CANDIDATES if only in (None, c.name)}
    must_fail = {c.name for c in CANDIDATES if c.control}
    for name, draw in draws.items():
        z = score_hash(draw, count)
        failed = [k for k in z if abs(z[k]) > FAIL]
        low = [k for k in failed if "bit" in k]  # tests of single bits or of groups of four bits
        worst = sorted(z, key=lambda k: -abs(z[k]))[: 3 if failed else 1]
        label = name + " (control)" * (name in must_fail)
        print(f"| {label} | {len(z)} | {len(failed)} | {len(failed) - len(low)} |", end=" ")
        print("; ".join(f"{k} {z[k]:.1f}" for k in worst) + " |", flush=True)
        if name in must_fail and not failed:
            sys.exit(f"the tests accept {name}: they are too weak")
        if name in ("Philox (reference)", "keyed") and failed:
            sys.exit(f"{name} should have passed: {failed}")


def deep() -> None:
    """Prints the quality of the frozen hash over eight times as many masks."""
    quality(1536, "keyed")


# --- cost on a CPU --------------------------------------------------------------------------------------------------


def by_pairs(candidate: Candidate, stream: jax.Array) -> jax.Array:
    """Returns masks [..., SIZE, SIZE], computed once for both queries of a pair."""
    a, b = stream[..., 0, None, None], stream[..., 1, None, None]
    pairs, keys = jnp.arange(SIZE // 2, dtype=jnp.uint32)[:, None], jnp.arange(SIZE, dtype=jnp.uint32)[None]
    words = candidate.words(candidate.row(a, b, pairs), candidate.column(a, b, keys))
    limit = np.int32((dropout.threshold(RATE) << 16) - 2**31)
    kept = [(w.astype(np.int32) >= limit).reshape(*stream.shape[:-1], SIZE // 16, 8, SIZE) for w in words]
    return jnp.stack(kept, -3).reshape(*stream.shape[:-1], SIZE, SIZE)


def cpu(heads: int = 12) -> None:
    """Prints the time of each candidate on a CPU."""
    stream = dropout.mask_stream(0, 1, 2, dropout.Site.ATTENTION, 3, np.arange(heads))
    position = jnp.arange(SIZE)
    makers: dict[str, Callable] = {c.name: partial(by_pairs, c) for c in CANDIDATES if not c.control}
    makers["dropout.keep"] = lambda s: dropout.keep(s, position, position, RATE)
    key = jax.random.key(0)
    makers["jax.random.bernoulli, threefry"] = lambda _: jax.random.bernoulli(key, 1 - RATE, (heads, SIZE, SIZE))
    print(f"## cpu: a [{heads}, {SIZE}, {SIZE}] mask under jax.jit, {os.cpu_count()} cores, best of 10\n")
    print("| hash | ns per element |\n|---|---|")
    for name, make in makers.items():
        run = partial(lambda compiled: compiled(stream).block_until_ready(), jax.jit(make))
        run()
        best = min(timed(run) for _ in range(10))
        print(f"| {name} | {best / (heads * SIZE * SIZE) * 1e9:.2f} |", flush=True)


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# --- cost on a TPU, from the compiler's schedule --------------------------------------------------------------------


def tpu() -> None:
    """Prints the cost of each candidate on a TPU v5e, from the schedule that the compiler makes."""
    if importlib.util.find_spec("libtpu") is None:
        print("## tpu: left out because libtpu is not installed (pip install 'jax[tpu]')")
        return
    with tempfile.TemporaryDirectory() as dump:
        flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_hlo_text=true --xla_jf_dump_llo_text=true"
        quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        # libtpu reads its flags when it is loaded, so the compiler runs in a separate process.
        child = subprocess.run(
            [sys.executable, __file__, "tpu-compile"],
            env={**os.environ, **quiet, "JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": flags},
            capture_output=True,
            text=True,
        )
        if child.returncode:
            sys.exit(child.stderr)
        bare, *rest = [schedule(Path(dump), name) for name in ["bare", *kernels()][: len(kernels()) + 1]]
    version = importlib.metadata.version("libtpu")
    print(f"## tpu: where(keep, x * scale, 0) on [{SIZE}, {SIZE}] float32, v5e, libtpu {version}\n")
    print("| hash | bundles | added | vector operations added per 1024 elements |\n|---|---|---|---|")
    print(f"| none: x * scale | {bare[0]} | | |")
    for name, (bundles, operations) in zip(kernels(), rest, strict=True):
        registers = SIZE * SIZE / 1024
        print(f"| {name} | {bundles} | {bundles - bare[0]} | {(operations - bare[1]) / registers:.1f} |")


def kernels() -> dict[str, tuple[Candidate, bool]]:
    """Returns the candidates to compile: all but the controls, and the frozen hash with an unsigned comparison."""
    signed = {c.name: (c, True) for c in CANDIDATES if not c.control}
    return signed | {"keyed, unsigned comparison": (next(c for c in CANDIDATES if c.name == "keyed"), False)}


def kernel_name(name: str) -> str:
    return "study_" + "".join(c for c in name if c.isalpha())


def schedule(dump: Path, name: str) -> tuple[int, int]:
    """Returns the numbers of bundles and of vector-unit operations of a compiled kernel, from the compiler's dump."""
    (analysis,) = dump.glob(f"*-{kernel_name(name)}.1-*-schedule-analysis_final_bundles.txt")
    bundles = int(analysis.read_text().split("total scheduled bundles:")[1].split()[0])
    (use,) = dump.glob(f"*-{kernel_name(name)}.1-*-final_hlo-static-per-bundle-utilization.txt")
    header, rows = use.read_text().split("== UTILIZATION:")
    column = [unit.strip() for unit in header.splitlines()[1].split(",")].index("VALU")
    return bundles, sum(int(line.split()[column]) for line in rows.splitlines() if line.strip())


def tpu_compile() -> None:
    """Compiles one kernel for each candidate."""
    from jax.experimental import pallas as pl
    from jax.experimental import topologies
    from jax.experimental.pallas import tpu as pltpu
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    def body(candidate: Candidate | None, signed: bool) -> Callable[[Any, Any, Any], None]:
        def kernel(stream, x, out):
            scaled = x[...] * (1 / (1 - RATE))
            if candidate is None:
                out[...] = scaled
                return
            a, b = stream[0], stream[1]
            # A column vector fills whole registers anyway. All 128 lanes compute it, so no broadcast is needed.
            pairs = jax.lax.broadcasted_iota(jnp.int32, (SIZE // 2, 128), 0).astype(jnp.uint32)
            keys = jax.lax.broadcasted_iota(jnp.int32, (8, SIZE), 1).astype(jnp.uint32)
            row = tuple(t if t.ndim == 0 else t[:, :1] for t in candidate.row(a, b, pairs))
            column = tuple(t[:1] for t in candidate.column(a, b, keys))
            limit = dropout.threshold(RATE) << 16
            halves = scaled.reshape(SIZE // 16, 2, 8, SIZE)
            kept = []
            for i, word in enumerate(candidate.words(row, column)):
                word = word.reshape(SIZE // 16, 8, SIZE)
                survives = word.astype(jnp.int32) >= np.int32(limit - 2**31) if signed else word >= u32(limit)
                kept.append(jnp.where(survives, halves[:, i], 0.0))
            out[...] = jnp.stack(kept, 1).reshape(SIZE, SIZE)

        return kernel

    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    sharding = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())
    for name, (candidate, signed) in {"bare": (None, True), **kernels()}.items():
        call = pl.pallas_call(
            body(candidate, signed),
            grid=(8,),
            in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec((None, SIZE, SIZE), lambda i: (i, 0, 0))],
            out_specs=pl.BlockSpec((None, SIZE, SIZE), lambda i: (i, 0, 0)),
            out_shape=jax.ShapeDtypeStruct((8, SIZE, SIZE), jnp.float32),
            name=kernel_name(name),
        )
        shapes = [((2,), jnp.uint32), ((8, SIZE, SIZE), jnp.float32)]
        arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
        jax.jit(call).lower(*arguments).compile()


def main(parts: list[str]) -> None:
    if parts == ["tpu-compile"]:
        return tpu_compile()
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("jax", "numpy"))
    print(f"# masks study, {time.strftime('%Y-%m-%d')}, Python {platform.python_version()}, {versions}\n")
    for part in parts or ["quality", "cpu", "tpu"]:
        {"quality": quality, "deep": deep, "cpu": cpu, "tpu": tpu}[part]()
        print()
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
