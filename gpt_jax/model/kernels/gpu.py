"""Causal attention as Pallas kernels for NVIDIA GPUs, with the frozen dropout masks computed inside.

The algorithm is that of FlashAttention-2 (Dao, 2023). A program holds a block of queries and passes over the blocks of keys up to
its own positions with a running maximum, so scores, probabilities and masks exist only in registers. For the backward pass, the
output, what its rounding has cut off, and the logarithm of each row's normalizer are kept. One kernel computes the gradients of a
block of queries in a pass over the keys, and then another those of a block of keys and values in a pass over the queries. Each
program alone writes its block, so nothing is added atomically, and the results are the same in every run.

Tiles before the diagonal have no causal mask. Lengths that are no multiple of a block are not padded; the last block is read and
written under a condition. Exponentials have base 2, with log2(e) in the scale of the scores, so that a score costs one
multiplication with subtraction and one exponential instruction.

The dropout masks are those of docs/masks.md, computed element by element. The two queries of a pair are in the same thread in
both orientations of a tile, since they are eight rows or columns apart. A query's place in its pair is a function of its place in
the block alone. The compiler therefore sees that the two share a term and a product, and computes them once. The two terms of a
key take 19 operations, and a thread needs those of 16 keys for 64 scores, so XLA computes them beforehand.

The kernels are compiled by Triton, which is the path of Pallas to GPUs that lowers in all versions of JAX that are supported (jax
0.12 announces its end). On other devices, Pallas interprets them, which is slow and serves tests.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int, UInt32

from gpt_jax.errors import UserError
from gpt_jax.model.dropout import SECOND, column_terms, row_term, threshold
from gpt_jax.model.remat import keep_bits
from gpt_jax.runtime.sharding import per_shard

HEAD_DIMS = (16, 32, 64, 128)
MAX_TIME = 8192
"""Maximum number of tokens in a sequence."""
DTYPES = ("bfloat16", "float16", "float32")
MASKED = -(2.0**100)
"""Score of a key that a query must not attend to. The product of a power of two and the scale is exact. While a row has seen no
other keys, the difference of a scaled score and the maximum is therefore 0, and not the rounding error of a number this large."""


class Blocks(NamedTuple):
    """The shape of a kernel's tiles and how Triton compiles it."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int
    """Number of tiles of which the inputs are in shared memory at once."""


class Kernels(NamedTuple):
    """The blocks of the kernels: forward, of the gradients of keys and values, and of those of queries."""

    forward: Blocks
    keys: Blocks
    queries: Blocks


def choose_blocks(time: int, dim: int, dtype: Any) -> Kernels:
    """Returns the blocks for a sequence length, a head size and a compute dtype.

    They were chosen by what Triton 3.9 makes of the kernels for compute capability 9.0. Hardly any register is spilled, at least
    eight warps run on a multiprocessor, and a program has at most 97 KiB of shared memory, which all GPUs since capability 8.0
    have. Among blocks for which this holds, an element of the scores takes few instructions. Those for float32 are small enough
    for exact products, which do not run on tensor cores.
    """
    if dtype == jnp.float32:
        kernels = Kernels(*3 * [Blocks(32, 32, 4 if dim <= 64 else 8, 2)])
    elif dim <= 64:
        kernels = Kernels(Blocks(128, 64, 4, 3), Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 3))
    else:
        kernels = Kernels(Blocks(128, 64, 8, 2), Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2))
    # Masks of dropout need a multiple of 16 queries, and the tensor cores 16 of everything.
    largest = max(16, pl.next_power_of_2(time))
    shorten = lambda blocks: blocks._replace(queries=min(blocks.queries, largest), keys=min(blocks.keys, largest))  # noqa: E731
    return Kernels(*map(shorten, kernels))


class Masks(NamedTuple):
    """The masks beside the causal one."""

    stream: UInt32[Array, "batch heads 2"] | None
    """Streams of the dropout masks; None without dropout."""
    segment_ids: Int[Array, "batch time"] | None


def pallas_gpu_attention(
    query: Float[Array, "batch time heads dim"],
    key: Float[Array, "batch time heads dim"],
    value: Float[Array, "batch time heads dim"],
    stream: UInt32[Array, "batch heads 2"] | None,
    rate: float,
    segment_ids: Int[Array, "batch time"] | None,
    precision: str,
) -> Float[Array, "batch time heads dim"]:
    """Computes causal attention of as many queries as keys; the arguments are those of `attention.attention`.

    Products of bfloat16 or float16 accumulate in float32. Those of float32 are TensorFloat-32 unless the precision is "highest".

    Raises:
      UserError: the dtype, the head size or the length is one that the kernels do not take.
    """
    if reason := refusal(query.shape[3], query.shape[1], query.dtype):
        raise UserError(reason)
    dropped = 0 if stream is None else threshold(rate)
    ids = None if segment_ids is None else segment_ids.astype(jnp.int32)
    return _attention(query, key, value, Masks(stream if dropped else None, ids), dropped, precision)


def refusal(dim: int, time: int, dtype: Any = jnp.bfloat16) -> str | None:
    """Returns the reason, for the user, why the kernels do not take heads of this size, length or dtype; None if they do."""
    if dim not in HEAD_DIMS:
        return f"pallas_gpu takes heads of size {', '.join(map(str, HEAD_DIMS[:-1]))} or {HEAD_DIMS[-1]}, not {dim}"
    if time > MAX_TIME:
        return f"pallas_gpu takes sequences of at most {MAX_TIME:,} tokens, not {time:,}"
    if jnp.dtype(dtype).name not in DTYPES:
        return f"pallas_gpu computes in {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, not {jnp.dtype(dtype)}"
    return None


# -- what the kernels share -------------------------------------------------------------------------------------------------


class Arrays(NamedTuple):
    """The inputs of a kernel, or its references to those of one head of one example (without the axes batch and heads)."""

    query: Any
    key: Any
    value: Any
    """[batch, time, heads, dim], like query and key."""
    stream: Any
    columns: Any
    """Terms C and D of the keys' masks, both uint32 [batch, heads, time]; None without dropout."""
    segment_ids: Any
    saved: Any = None
    """Results of the forward pass (`Results`). They and the rest are for the backward pass."""
    gradient: Any = None
    """Gradient of the output."""
    inner: Any = None
    """Sum over a row of probability times its gradient, without the scale of dropout; float32 [batch, heads, time]."""


class Results(NamedTuple):
    """The arrays that the forward kernel computes, or its references to them."""

    output: Any
    """[batch, time, heads, dim], compute dtype."""
    remainder: Any
    """The part of the output that rounding has cut off, in the compute dtype; None in float32. With the rounded output alone,
    `inner` would make the error of the gradients of queries and keys a fifth larger than that of `plain`."""
    log_normalizer: Any
    """Logarithm with base 2 of each row's normalizer, float32 [batch, heads, time]."""


class Call(NamedTuple):
    """All numbers that a kernel is compiled for."""

    dropped: int
    """Number of 65536 elements to drop."""
    precision: str
    blocks: Blocks
    time: int
    dim: int
    interpret: bool = False

    @property
    def score_scale(self) -> float:
        """Factor from a product of query and key to an exponent of base 2."""
        return math.log2(math.e) / math.sqrt(self.dim)

    @property
    def gradient_scale(self) -> float:
        """Factor of the gradients of queries and keys."""
        return self.dropout_scale / math.sqrt(self.dim)

    @property
    def dropout_scale(self) -> float:
        return 65536 / (65536 - self.dropped)


def _iota(size: int) -> Array:
    return jax.lax.iota(jnp.int32, size)


def _load(call: Call, ref: Any, start: Any, size: int, partial: bool = True) -> Array:
    """Returns `size` positions of [time, dim] or [time], with zeros after the end; `partial` says that the end may come."""
    at = ref.at[pl.ds(start, size)]
    if not (partial and call.time % size):
        return plgpu.load(at)
    inside = start + _iota(size) < call.time
    return plgpu.load(at, mask=inside[:, None] if len(ref.shape) == 2 else inside, other=0)


def _store(call: Call, ref: Any, start: Any, value: Array) -> None:
    size = len(value)
    inside = start + _iota(size) < call.time
    mask = None if call.time % size == 0 else inside[:, None] if value.ndim == 2 else inside
    plgpu.store(ref.at[pl.ds(start, size)], value.astype(ref.dtype), mask=mask)


def _dot(call: Call, a: Array, b: Array, transposed: bool = False) -> Array:
    """Returns a @ b, or a @ b.T if `transposed`, in float32."""
    dimensions = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=call.precision, preferred_element_type=jnp.float32)


def _inline(code: str, x: Array) -> Array:
    """Applies one PTX instruction to each element of float32 `x` ($1); the result ($0) is float32, too."""
    shape = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    return plgpu.elementwise_inline_asm(code, args=[x], constraints="=f,f", pack=1, result_shape_dtypes=[shape])[0]


def _exp2(call: Call, x: Array) -> Array:
    """Returns 2**x, or 0 if that is less than 2**-126. Results that small have no effect, but take four instructions, not one."""
    return jnp.exp2(x) if call.interpret else _inline("ex2.approx.ftz.f32 $0, $1;", x)


def _zeros(call: Call, size: int) -> Array:
    """Returns zeros [size, 1] that the compiler does not know to be zeros.

    It would otherwise select after the conversion to 16 bits instead of before it. Then two weights that were converted together
    are taken apart and put together again.
    """
    zeros = jnp.zeros(size)
    return (zeros if call.interpret else _inline("mov.f32 $0, $1;", zeros))[:, None]


class Block(NamedTuple):
    """A block of queries or of keys, apart from their vectors."""

    positions: Array
    segments: Array | None
    terms: tuple[Array, Array] | None
    """Terms of the dropout masks: R and a factor for the words of each query, or C and D of each key (docs/masks.md)."""


def _queries(call: Call, arrays: Arrays, start: Any, size: int) -> Block:
    terms = None
    if call.dropped:
        local = _iota(size).astype(jnp.uint32)
        pair = (start.astype(jnp.uint32) >> 1) + (local >> 4 << 3 | local & 7)
        terms = row_term(arrays.stream[0], pair), jnp.where(local & 8 == 0, jnp.uint32(1), jnp.uint32(SECOND))
    segments = None if arrays.segment_ids is None else _load(call, arrays.segment_ids, start, size)
    return Block(start + _iota(size), segments, terms)


def _keys(call: Call, arrays: Arrays, start: Any, size: int, partial: bool = True) -> Block:
    load = functools.partial(_load, call, start=start, size=size, partial=partial)
    terms = (load(arrays.columns[0]), load(arrays.columns[1])) if call.dropped else None
    return Block(start + _iota(size), None if arrays.segment_ids is None else load(arrays.segment_ids), terms)


def _facing(of_queries: Array, of_keys: Array, transposed: bool) -> tuple[Array, Array]:
    """Returns both in shapes that broadcast to [queries, keys], or to [keys, queries] if `transposed`."""
    return (of_queries[None, :], of_keys[:, None]) if transposed else (of_queries[:, None], of_keys[None, :])


def _visible(x: Array, hidden: float, queries: Block, keys: Block, diagonal: bool, transposed: bool = False) -> Array:
    """Replaces elements by `hidden` where a query must not attend to a key; off the diagonal, no key is later than a query."""
    if diagonal:
        of_queries, of_keys = _facing(queries.positions, keys.positions, transposed)
        x = jnp.where(of_queries >= of_keys, x, hidden)
    if queries.segments is not None and keys.segments is not None:
        of_queries, of_keys = _facing(queries.segments, keys.segments, transposed)
        x = jnp.where(of_queries == of_keys, x, hidden)
    return x


def _drop(
    call: Call, arrays: Sequence[Array], zeros: Array, queries: Block, keys: Block, transposed: bool = False
) -> list[Array]:
    """Returns arrays with zeros in place of dropped elements, without the scale of dropout."""
    if queries.terms is None or keys.terms is None:
        return list(arrays)
    row, column = _facing(queries.terms[0], keys.terms[0], transposed)
    place, multiplier = _facing(queries.terms[1], keys.terms[1], transposed)
    words = (row ^ column) * multiplier * place
    kept = words.astype(jnp.int32) >= np.int32((call.dropped << 16) - (1 << 31))
    return [jnp.where(kept, x, zeros) for x in arrays]


# -- forward ----------------------------------------------------------------------------------------------------------------


def _forward_kernel(call: Call, arrays: Arrays, results: Results) -> None:
    size, step = call.blocks[:2]
    start = (pl.num_programs(0) - 1 - pl.program_id(0)) * size  # The longest rows begin first.
    query, zeros = _load(call, arrays.query, start, size), _zeros(call, size)
    queries = _queries(call, arrays, start, size)

    def tile(diagonal: bool, j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        highest, normalizer, mixed = carry
        load = functools.partial(_load, call, start=j * step, size=step, partial=diagonal)
        keys = _keys(call, arrays, j * step, step, diagonal)
        scores = _visible(_dot(call, query, load(arrays.key), transposed=True), MASKED, queries, keys, diagonal)
        new = jnp.maximum(highest, scores.max(1) * call.score_scale)
        weights, shrink = _exp2(call, scores * call.score_scale - new[:, None]), _exp2(call, highest - new)
        normalizer = shrink * normalizer + weights.sum(1)
        (weights,) = _drop(call, [weights], zeros, queries, keys)
        value = load(arrays.value)
        return new, normalizer, shrink[:, None] * mixed + _dot(call, weights.astype(value.dtype), value)

    carry = jnp.full(size, MASKED), jnp.zeros(size), jnp.zeros((size, call.dim))
    highest, normalizer, mixed = _to_diagonal(call, start, size, step, tile, carry)
    mixed = mixed * (call.dropout_scale / normalizer)[:, None]
    _store(call, results.output, start, mixed)
    if results.remainder is not None:
        _store(call, results.remainder, start, mixed - mixed.astype(query.dtype).astype(jnp.float32))
    _store(call, results.log_normalizer, start, highest + jnp.log(normalizer) * math.log2(math.e))


def _to_diagonal(call: Call, start: Any, size: int, step: int, tile: Callable[..., Any], carry: Any) -> Any:
    """Runs `tile(diagonal, j, carry)` for the blocks of `step` keys to which the `size` queries from `start` on attend."""
    middle = start // step
    end = pl.cdiv(jnp.minimum(start + size, call.time), step)
    carry = jax.lax.fori_loop(0, middle, functools.partial(tile, False), carry)
    return jax.lax.fori_loop(middle, end, functools.partial(tile, True), carry)


# -- backward ---------------------------------------------------------------------------------------------------------------


def _keys_kernel(call: Call, arrays: Arrays, key_gradient: Any, value_gradient: Any) -> None:
    step, size = call.blocks[:2]
    start = pl.program_id(0) * size
    key, value, zeros = _load(call, arrays.key, start, size), _load(call, arrays.value, start, size), _zeros(call, size)
    keys = _keys(call, arrays, start, size)

    def tile(diagonal: bool, i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        load = functools.partial(_load, call, start=i * step, size=step)
        queries, query, gradient = _queries(call, arrays, i * step, step), load(arrays.query), load(arrays.gradient)
        # All tiles are keys by queries, so that no product needs one transposed.
        exponents = _dot(call, key, query, transposed=True) * call.score_scale - load(arrays.saved.log_normalizer)[None, :]
        weights = _visible(_exp2(call, exponents), 0.0, queries, keys, diagonal, transposed=True)
        weights_gradient = _dot(call, value, gradient, transposed=True)
        dropped, weights_gradient = _drop(call, [weights, weights_gradient], zeros, queries, keys, transposed=True)
        value_total = carry[1] + _dot(call, dropped.astype(query.dtype), gradient)
        scores_gradient = (weights * (weights_gradient - load(arrays.inner)[None, :])).astype(query.dtype)
        return carry[0] + _dot(call, scores_gradient, query), value_total

    end = pl.cdiv(call.time, step)
    middle = jnp.minimum(pl.cdiv(start + size, step), end)
    carry = jnp.zeros((size, call.dim)), jnp.zeros((size, call.dim))
    carry = jax.lax.fori_loop(start // step, middle, functools.partial(tile, True), carry)
    carry = jax.lax.fori_loop(middle, end, functools.partial(tile, False), carry)
    _store(call, key_gradient, start, carry[0] * call.gradient_scale)
    _store(call, value_gradient, start, carry[1] * call.dropout_scale)


def _queries_kernel(call: Call, arrays: Arrays, query_gradient: Any, inner: Any) -> None:
    size, step = call.blocks[:2]
    start = (pl.num_programs(0) - 1 - pl.program_id(0)) * size
    load_rows = functools.partial(_load, call, start=start, size=size)
    query, gradient, zeros = load_rows(arrays.query), load_rows(arrays.gradient), _zeros(call, size)
    output, log_normalizer = load_rows(arrays.saved.output).astype(jnp.float32), load_rows(arrays.saved.log_normalizer)[:, None]
    if arrays.saved.remainder is not None:
        output += load_rows(arrays.saved.remainder).astype(jnp.float32)
    sums = (gradient.astype(jnp.float32) * output).sum(1) / call.dropout_scale
    _store(call, inner, start, sums)
    queries = _queries(call, arrays, start, size)

    def tile(diagonal: bool, j: Array, total: Array) -> Array:
        load = functools.partial(_load, call, start=j * step, size=step, partial=diagonal)
        keys, key = _keys(call, arrays, j * step, step, diagonal), load(arrays.key)
        exponents = _dot(call, query, key, transposed=True) * call.score_scale - log_normalizer
        weights = _visible(_exp2(call, exponents), 0.0, queries, keys, diagonal)
        (weights_gradient,) = _drop(call, [_dot(call, gradient, load(arrays.value), transposed=True)], zeros, queries, keys)
        return total + _dot(call, (weights * (weights_gradient - sums[:, None])).astype(key.dtype), key)

    total = _to_diagonal(call, start, size, step, tile, jnp.zeros((size, call.dim)))
    _store(call, query_gradient, start, total * call.gradient_scale)


# -- one shard --------------------------------------------------------------------------------------------------------------


def _forward(query: Array, key: Array, value: Array, masks: Masks, *, dropped: int, precision: str) -> Results:
    batch, time, heads, dim = query.shape
    like = jax.ShapeDtypeStruct(query.shape, query.dtype)
    rows = jax.ShapeDtypeStruct((batch, heads, time), jnp.float32)
    results = Results(like, like if query.dtype != jnp.float32 else None, rows)
    call = Call(dropped, precision, choose_blocks(time, dim, query.dtype).forward, time, dim)
    (results,) = _run(_forward_kernel, call, pl.cdiv(time, call.blocks.queries), _arrays(query, key, value, masks), (results,))
    return results


def _backward(
    query: Array, key: Array, value: Array, masks: Masks, saved: Results, gradient: Array, *, dropped: int, precision: str
) -> tuple[Array, Array, Array]:
    """Returns the gradients of query, key and value; `gradient` is that of the output."""
    time, dim = query.shape[1], query.shape[3]
    arrays = _arrays(query, key, value, masks)._replace(saved=saved, gradient=gradient)
    like = jax.ShapeDtypeStruct(query.shape, query.dtype)
    blocks = choose_blocks(time, dim, query.dtype)
    call = Call(dropped, precision, blocks.queries, time, dim)
    results: tuple[Any, ...] = (like, saved.log_normalizer)
    query_gradient, inner = _run(_queries_kernel, call, pl.cdiv(time, call.blocks.queries), arrays, results)
    call, arrays = call._replace(blocks=blocks.keys), arrays._replace(inner=inner)
    key_gradient, value_gradient = _run(_keys_kernel, call, pl.cdiv(time, call.blocks.keys), arrays, (like, like))
    return query_gradient, key_gradient, value_gradient


def _arrays(query: Array, key: Array, value: Array, masks: Masks) -> Arrays:
    """Returns the inputs of the forward kernel."""
    columns = None
    if masks.stream is not None:
        first, second = masks.stream[..., 0, None], masks.stream[..., 1, None]
        columns = column_terms(first, second, jnp.arange(key.shape[1], dtype=jnp.uint32))
    return Arrays(query, key, value, masks.stream, columns, masks.segment_ids)


def _run(kernel: Callable[..., None], call: Call, programs: int, arrays: Arrays, results: tuple[Any, ...]) -> Any:
    """Runs `programs` programs of a kernel for each head of each example; `results` are shapes and dtypes."""
    batch, time, heads, dim = arrays.query.shape

    def of_head(array: Any) -> pl.BlockSpec:
        """Returns all of an array that belongs to an example, or to one of its heads if it has any."""
        if array.shape == (batch, time, heads, dim):
            return pl.BlockSpec((None, time, None, dim), lambda _, head, example: (example, 0, head, 0))
        if array.ndim == 2:
            return pl.BlockSpec((None, time), lambda _, head, example: (example, 0))
        return pl.BlockSpec((None, None, array.shape[2]), lambda _, head, example: (example, head, 0))

    def run(interpret: bool, arrays: Arrays) -> Any:
        return pl.pallas_call(
            functools.partial(kernel, call._replace(interpret=interpret)),
            grid=(programs, heads, batch),
            in_specs=[jax.tree.map(of_head, arrays)],
            out_specs=jax.tree.map(of_head, results),
            out_shape=results,
            compiler_params=plgpu.CompilerParams(num_warps=call.blocks.num_warps, num_stages=call.blocks.num_stages),
            interpret=interpret,
            name=f"attention{kernel.__name__.removesuffix('_kernel')}",
        )(arrays)

    # What counts is the platform for which this is lowered, which need not be one of this machine.
    return jax.lax.platform_dependent(arrays, cuda=functools.partial(run, False), default=functools.partial(run, True))


# -- the differentiable function ---------------------------------------------------------------------------------------------

HEADS = ("batch", None, "heads", None)
"""Logical axes of queries, keys, values and outputs."""
ROWS = ("batch", "heads", None)
"""Logical axes of streams and normalizers."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(query: Array, key: Array, value: Array, masks: Masks, dropped: int, precision: str) -> Array:
    return _attention_fwd(query, key, value, masks, dropped, precision)[0]


def _attention_fwd(
    query: Array, key: Array, value: Array, masks: Masks, dropped: int, precision: str
) -> tuple[Array, tuple[Any, ...]]:
    forward = functools.partial(_forward, dropped=dropped, precision=precision)
    names = (HEADS, HEADS, HEADS, _names(masks))
    results = per_shard(forward, names, _result_names(query))(query, key, value, masks)
    results = jax.tree.map(keep_bits, results)
    return results.output, (query, key, value, masks, results)


def _attention_bwd(dropped: int, precision: str, saved: tuple[Any, ...], gradient: Array) -> tuple[Array, Array, Array, None]:
    backward = functools.partial(_backward, dropped=dropped, precision=precision)
    names = (HEADS, HEADS, HEADS, _names(saved[3]), _result_names(gradient), HEADS)
    return *per_shard(backward, names, (HEADS, HEADS, HEADS))(*saved, gradient), None


def _result_names(output: Array) -> Any:
    """Returns the logical axes of the results of the forward pass."""
    return Results(HEADS, HEADS if output.dtype != jnp.float32 else None, ROWS)


def _names(masks: Masks) -> Any:
    """Returns the logical axes of the masks."""
    names: Any = masks
    return names._replace(
        stream=None if masks.stream is None else ROWS, segment_ids=None if masks.segment_ids is None else ("batch", None)
    )


_attention.defvjp(_attention_fwd, _attention_bwd)
