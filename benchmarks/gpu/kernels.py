"""Checks the kernels of `pallas_gpu` on the device, and times them with several sizes of blocks.

    python -m benchmarks.gpu.kernels BATCH TIME HEADS DIM     the shape to time

Prints one line of JSON: {"errors": [...], "times": [...]}, with what `check` and `time_blocks` return.
"""

import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.errors import one_line
from gpt_jax.model.attention import attention
from gpt_jax.model.dropout import Site, mask_stream
from gpt_jax.model.kernels import gpu_kernels
from gpt_jax.model.kernels.gpu import pallas_gpu_attention
from gpt_jax.model.kernels.gpu_tuning import TuningConfig

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

DTYPES = ("bfloat16", "float32")
CASES = ((1, 64, 0), (200, 64, 70), (512, 64, 0), (512, 64, 200), (300, 128, 0), (512, 128, 200))
"""Length, size of a head, and length of a segment (0: no segments) of what is checked, with three heads and dropout 0.1."""
REHEARSED = CASES[1:2]
TRIED = {
    "forward": ((128, 64, 4, 3), (128, 64, 4, 2), (64, 64, 4, 3), (128, 128, 8, 2), (128, 32, 4, 3)),
    "query_gradients": ((64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 4, 3), (128, 128, 8, 2), (64, 32, 4, 3)),
    "key_value_gradients": ((64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 8, 2), (32, 64, 4, 3), (128, 64, 4, 2)),
}
"""The fields of each `TuningConfig` to time, by kernel. The first is the one that is chosen for bfloat16 and heads of 64."""
REPETITIONS = 20


def problem(shape: Sequence[int], dtype: str, segment: int = 0) -> tuple[list[jax.Array], jax.Array, jax.Array | None]:
    """Returns queries, keys, values and a gradient of the output; streams of the masks; and numbers of segments."""
    batch, length, heads, _ = shape
    arrays = [jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(length), 4)]
    stream = mask_stream(1, 2, 3, Site.ATTENTION, jnp.arange(batch)[:, None], jnp.arange(heads))
    positions = jnp.arange(length)
    # In odd examples, a query also sees keys before and after ones that it does not see.
    kinds = [positions // segment, positions // (segment // 2) % 2] if segment else []
    return arrays, stream, jnp.stack([kinds[row % 2] for row in range(batch)]) if segment else None


def compute(attend: Attend, arrays: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Returns the output and the gradients of query, key and value."""
    output, backward = jax.vjp(attend, *arrays[:3])
    return output, *backward(arrays[3])


def check(length: int, dim: int, segment: int, dtype: str) -> dict[str, Any]:
    """Compares the kernels with `plain` in float32 and the same masks.

    Returns:
      The case; the relative L2 distances of output and gradients ("errors") and those of `plain` in the same dtype ("plain"); and
      whether a second run has the same bits ("repeatable"). If the kernels fail, the reason ("failure") instead.
    """
    arrays, stream, segments = problem((2, length, 3, dim), dtype, segment)
    masks = {"stream": stream, "rate": 0.1, "segment_ids": segments, "precision": "highest"}
    plain = jax.jit(functools.partial(compute, functools.partial(attention, **masks, implementation="plain")))
    exact = [np.asarray(array, np.float64) for array in plain([array.astype(jnp.float32) for array in arrays])]

    def distances(results: Sequence[jax.Array]) -> list[float]:
        pairs = zip((np.asarray(array, np.float64) for array in results), exact, strict=True)
        return [float(np.linalg.norm(ours - theirs) / (np.linalg.norm(theirs) or 1)) for ours, theirs in pairs]

    case = {"length": length, "dim": dim, "segment": segment, "dtype": dtype}
    kernels = jax.jit(functools.partial(compute, lambda *qkv: pallas_gpu_attention(*qkv, *list(masks.values()))))
    try:
        first, second = kernels(arrays), kernels(arrays)
        same = all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(first, second, strict=True))
        return case | {"errors": distances(first), "plain": distances(plain(arrays)), "repeatable": same}
    except Exception as error:
        return case | {"failure": one_line(error)}


def time_blocks(shape: Sequence[int], tried: dict[str, Sequence[tuple[int, int, int, int]]]) -> Iterator[dict[str, Any]]:
    """Times output and gradients in bfloat16 with dropout 0.1, with another tuning of one kernel at a time.

    Yields:
      The kernel, its block sizes and compiler options ("blocks"), and the median time of `REPETITIONS` calls in milliseconds
      ("ms") or the reason for a "failure".
    """
    arrays, stream, _ = problem(shape, "bfloat16")
    chosen = gpu_kernels.choose_tuning(shape[1], shape[3], jnp.bfloat16)
    for kernel, candidates in tried.items():
        for blocks in candidates:
            result = {"kernel": kernel, "blocks": blocks}
            tuning = chosen._replace(**{kernel: TuningConfig(*blocks)})
            try:
                with mock.patch.object(gpu_kernels, "choose_tuning", return_value=tuning):
                    yield result | {"ms": 1000 * _median_seconds(arrays, stream)}
            except Exception as error:
                yield result | {"failure": one_line(error)}


def _median_seconds(arrays: Sequence[jax.Array], stream: jax.Array) -> float:
    """Compiles the kernels with the current blocks, and times them."""
    run = jax.jit(lambda arrays: compute(lambda *qkv: pallas_gpu_attention(*qkv, stream, 0.1, None, "default"), arrays))
    jax.block_until_ready(run(arrays))
    seconds = []
    for _ in range(REPETITIONS):
        begin = time.perf_counter()
        jax.block_until_ready(run(arrays))
        seconds.append(time.perf_counter() - begin)
    return float(np.median(seconds))


def main(words: Sequence[str]) -> None:
    """Measures, and prints the results."""
    on_gpu = jax.default_backend() == "gpu"
    errors = [check(*case, dtype) for dtype in DTYPES for case in (CASES if on_gpu else REHEARSED)]
    tried = TRIED if on_gpu else {"forward": ((16, 16, 4, 2),)}
    print(json.dumps({"errors": errors, "times": list(time_blocks(tuple(map(int, words)), tried))}))


if __name__ == "__main__":
    main(sys.argv[1:])
