"""Estimate of the training step's memory on one device, computed from array shapes, and the choice of `model.remat` from it.

The estimate is the sum of

    state              the parameters and their moments
    gradients          two sets if micro-batches are accumulated, otherwise one; also the parameters in the compute dtype
    table              the gradient of the token table before it is summed over the devices
    gathered arrays    with fsdp, the table and four layers, in the compute dtype
    kept arrays        arrays that the backward pass needs, from each layer (`KEPT`) and from outside the layers (`OUTSIDE`)
    workspace          one layer in the backward pass (`LAYER`) or a chunk of the loss, whichever is larger, and the
                       probabilities of `plain` attention

A test compares the estimate with the TPU compiler's count. Neither the estimate nor the choice of `model.remat` depends on the
version of any library.
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gpt_jax.config import ModelConfig, RunConfig
from gpt_jax.errors import UserError, field_error
from gpt_jax.model.network import network
from gpt_jax.model.remat import choose_remat
from gpt_jax.model.transformer import ParamSpec, compute_dtype
from gpt_jax.runtime.chips import CHIPS, GIB
from gpt_jax.runtime.mesh import num_shards

ORDER = ("dots", "full")
"""The values of `model.remat` that "auto" chooses from, best first.

`off` is not among them, because writing and reading the arrays that it keeps takes longer than recomputing them. With 32
sequences on each v5e, gpt1 takes 200.6 million cycles with `off` and 177.0 million with `dots`; with 16 sequences, it takes 106.4
and 105.3 million (docs/kernels.md, not counting Pallas kernels). GPUs were not measured."""

USABLE = {"tpu": 0.9, "gpu": 0.68}
"""Share of a chip's memory that the estimate may fill. The remainder is for the runtime and for the error of the estimate. On
GPUs, JAX allocates only three quarters of the memory."""


class StepMemory(NamedTuple):
    """Estimated memory of the training step on one device, in bytes."""

    parameters: int
    moments: int
    gradients: int
    activations: int
    """The kept arrays."""
    temporaries: int
    """The workspace, the gathered arrays, the gradient of the table, and the parameters in the compute dtype."""


class Kept(NamedTuple):
    """Numbers of arrays that the backward pass of a layer needs for each token, by width and dtype."""

    embed: int = 0
    """Number of arrays of width `embed_dim` in the compute dtype."""
    heads: int = 0
    """Number of arrays of width `embed_dim` in the compute dtype whose axis is split like the attention heads."""
    mlp: int = 0
    """Number of arrays of width `mlp_dim` in the compute dtype."""
    embed_float32: int = 0
    """Number of arrays of width `embed_dim` in float32."""
    embed_bool: int = 0
    """Number of dropout masks of width `embed_dim`."""
    normalizers: int = 0
    """Number of float32 values for each head."""


KEPT = {
    "full": Kept(embed=1),  # the layer's input
    "dots": Kept(embed=3, heads=4, mlp=1, normalizers=1),  # the residual sums; query, key, value, output; the input of GELU
    "off": Kept(embed=3, heads=4, mlp=5, embed_float32=6, embed_bool=2, normalizers=1),
}
"""The arrays that a layer keeps, by `model.remat`."""
KEPT_BY_KERNELS = KEPT | {"off": Kept(embed=4, heads=4, mlp=5, normalizers=1)}
"""The arrays that a layer keeps with the kernels of `pallas_tpu`, whose layer norms keep no float32 arrays and no masks."""
OUTSIDE = Kept(embed=3, embed_float32=1, embed_bool=1)
"""The arrays that the embeddings and the loss keep."""
LAYER = Kept(embed=4, heads=4, mlp=5, embed_float32=1, normalizers=1)
"""The arrays of one layer in its backward pass, most of which are recomputed, and the gradient of the layer's output."""
PLAIN_KEPT = {"full": 0, "dots": 0, "off": 7}
"""Bytes that `plain` attention keeps for each head, query and key: probabilities before and after dropout, and the mask."""
PLAIN_WORKSPACE = 12
"""Bytes for each head, query and key in the backward pass of `plain` attention."""


LARGEST_ARRAY, COPIES = 2**31, 3
"""Elements of the loss's scores up to which the TPU compiler keeps only one copy of them, and the number of copies beyond. With
`mini` on a v5e, libtpu 0.0.42.1 needs 7.6 GiB of temporaries for 1,280 sequences, but 19.8 for 1,536."""


def remat_that_fits(config: RunConfig, sizes: Mapping[str, int], platform: str, kind: str) -> str:
    """Returns the value of `model.remat` that "auto" stands for in pre-training.

    Args:
      config: the run's config, with all other choices made.
      sizes: sizes of the mesh axes.
      platform, kind: platform and kind of the devices. Only Transformers on the chips in `CHIPS` are estimated.

    Raises:
      UserError: the batch does not fit into the chips' memory.
    """
    if config.model.remat != "auto":
        return config.model.remat
    if not _is_known(config.model, platform, kind):
        return choose_remat(config.model)
    usable = int(USABLE[platform] * CHIPS[kind].memory)
    for remat in ORDER:
        if step_bytes(config, sizes, platform, remat) <= usable:
            return remat
    raise _too_large(config, sizes, platform, kind, ORDER[-1], usable)


def check_remat(config: RunConfig, sizes: Mapping[str, int], platform: str, kind: str) -> None:
    """Checks that pre-training with the chosen `model.remat` does not need more memory than a program can use.

    Raises:
      UserError: it does.
    """
    model = config.model
    if _is_known(model, platform, kind) and step_bytes(config, sizes, platform, model.remat) > CHIPS[kind].program_memory:
        raise _too_large(config, sizes, platform, kind, model.remat, CHIPS[kind].program_memory)


def _is_known(model: ModelConfig, platform: str, kind: str) -> bool:
    return model.kind == "transformer" and platform in USABLE and kind in CHIPS


def step_bytes(config: RunConfig, sizes: Mapping[str, int], platform: str, remat: str, sequences: int | None = None) -> int:
    """Returns the estimated memory of the training step on one device, in bytes; see `step_memory`."""
    return sum(step_memory(config, sizes, platform, remat, sequences))


def step_memory(
    config: RunConfig, sizes: Mapping[str, int], platform: str, remat: str, sequences: int | None = None
) -> StepMemory:
    """Returns the estimated memory of the training step on one device, by kind.

    The last two kinds are meaningful only for Transformers.

    Args:
      config: the run's config, with all choices but `model.remat` made.
      sizes: sizes of the mesh axes.
      platform: platform of the devices, "tpu" or "gpu".
      remat: a key of `KEPT`.
      sequences: number of sequences that a device processes at once; None means its share of the config's micro-batches.
    """
    model, train = config.model, config.train
    local = sequences or -(-train.batch_size // (num_shards(sizes, "batch") * train.grad_accum_steps))
    dtype = compute_dtype(model, platform).itemsize
    tokens, table = local * model.context_length, _table_size(model, sizes)
    parameters, bytes_of_parameters = _local_parameters(model, tuple(sorted(sizes.items())))

    gradients = 4 * parameters * (2 if train.grad_accum_steps > 1 else 1)
    gathered = dtype * (table + 4 * _layer_size(model, sizes)) if num_shards(sizes, "embed") > 1 else 0
    unrolled = model.attention == "pallas_tpu" and model.layer_unroll == model.num_layers
    if unrolled and remat == "off":
        remat = "dots"  # The TPU compiler recomputes about as much by itself; gpt1 then has the same temporaries with both.
    layer = (KEPT_BY_KERNELS if model.attention == "pallas_tpu" else KEPT)[remat]
    kept = model.num_layers * _kept_bytes(layer, model, sizes, dtype) + _kept_bytes(OUTSIDE, model, sizes, dtype)
    odds = local * min(model.loss_chunk, model.context_length) * table // model.embed_dim * dtype
    if platform == "tpu" and odds > dtype * LARGEST_ARRAY:
        odds *= COPIES
    workspace = max(odds, tokens * _kept_bytes(LAYER, model, sizes, dtype))
    if model.attention == "plain":
        pairs = tokens * model.context_length * model.num_heads // num_shards(sizes, "heads")
        workspace += pairs * (PLAIN_WORKSPACE + PLAIN_KEPT[remat] * model.num_layers)
    temporaries = dtype * parameters + 4 * table + gathered + workspace
    return StepMemory(bytes_of_parameters, 8 * parameters, gradients, tokens * kept, temporaries)


def largest_kind(memory: StepMemory) -> str:
    """Returns the name of the largest kind of memory."""
    return max(memory._asdict().items(), key=lambda item: item[1])[0]


def change_that_fits(
    config: RunConfig, sizes: Mapping[str, int], platform: str, remat: str, usable: int, sequences: int = 1
) -> str:
    """Returns the options with which the step needs at most `usable` bytes, or "" if there are none.

    The options do not change the batch. The first of these that suffices is taken: more micro-batches; full recomputation; shards
    of the model instead of copies, with as few micro-batches as possible.

    Args:
      config: the run's config, with all choices but `model.remat` made.
      sequences: sequences per example; they stay in the same micro-batch.
    """
    for steps in _micro_batches(config, sizes, platform, remat, usable, sequences):
        return f"--train.grad-accum-steps {steps}"
    if step_bytes(config, sizes, platform, "full") <= usable:
        return "--model.remat full"
    for factor in range(2, sizes["data"] + 1):
        split = {**sizes, "fsdp": sizes["fsdp"] * factor, "data": sizes["data"] // factor}
        if sizes["data"] % factor == 0 and config.model.embed_dim % split["fsdp"] == 0:
            if step_bytes(config, split, platform, remat) <= usable:
                return f"--mesh.fsdp {split['fsdp']}"
            for steps in _micro_batches(config, split, platform, remat, usable, sequences):
                return f"--mesh.fsdp {split['fsdp']} --train.grad-accum-steps {steps}"
    return ""


def _micro_batches(
    config: RunConfig, sizes: Mapping[str, int], platform: str, remat: str, usable: int, sequences: int
) -> Iterator[int]:
    """Yields the numbers of micro-batches, greater than the config's, with which the step needs at most `usable` bytes.

    Numbers that are much greater than necessary, such as those for a prime number of sequences, are left out.
    """
    train, unit = config.train, num_shards(sizes, "batch") * sequences
    accumulating = dataclasses.replace(config, train=dataclasses.replace(train, batch_size=2, grad_accum_steps=2))
    fits = bisect.bisect(
        range(1, train.batch_size // unit + 1),
        usable,
        key=lambda number: step_bytes(accumulating, sizes, platform, remat, number * sequences),
    )
    if fits:
        enough = max(-(-train.batch_size // (unit * fits)), train.grad_accum_steps + 1)
        yield from (steps for steps in range(enough, 4 * enough) if train.batch_size % (unit * steps) == 0)


def _kept_bytes(kept: Kept, model: ModelConfig, sizes: Mapping[str, int], dtype: int) -> int:
    """Returns the bytes of the arrays per token."""
    heads, mlp = (num_shards(sizes, axis) for axis in ("heads", "mlp"))
    embed = kept.embed * dtype + kept.embed_float32 * 4 + kept.embed_bool + kept.heads * dtype / heads
    return math.ceil(
        model.embed_dim * embed + kept.mlp * model.mlp_dim * dtype / mlp + kept.normalizers * 4 * model.num_heads / heads
    )


def _table_size(model: ModelConfig, sizes: Mapping[str, int]) -> int:
    """Returns the number of elements of the embedding table on one device after gathering over fsdp."""
    return model.padded_vocab_size * model.embed_dim // num_shards(sizes, "vocab")


def _layer_size(model: ModelConfig, sizes: Mapping[str, int]) -> int:
    """Returns the number of elements of a layer's matrices on one device after gathering over fsdp."""
    return model.embed_dim * (4 * model.embed_dim + 2 * model.mlp_dim) // num_shards(sizes, "mlp")


@functools.lru_cache(maxsize=64)
def _local_parameters(model: ModelConfig, sizes: tuple[tuple[str, int], ...]) -> tuple[int, int]:
    """Returns the number of parameters on one device, and their size in bytes."""
    shapes = jax.eval_shape(lambda: network(model).init(model, jax.random.key(0)))
    is_spec = lambda leaf: isinstance(leaf, ParamSpec)  # noqa: E731
    specs: Any = jax.tree.leaves(network(model).param_specs(model), is_leaf=is_spec)
    shards = [math.prod(num_shards(dict(sizes), axis) for axis in spec.axes if axis) for spec in specs]
    local = [leaf.size // pieces for leaf, pieces in zip(jax.tree.leaves(shapes), shards, strict=True)]
    return sum(local), sum(local) * jnp.dtype(model.param_dtype).itemsize


def _too_large(config: RunConfig, sizes: Mapping[str, int], platform: str, kind: str, remat: str, usable: int) -> UserError:
    """Returns the error for a batch that does not fit into `usable` bytes with a value of `model.remat`."""
    batch, steps, shards = config.train.batch_size, config.train.grad_accum_steps, num_shards(sizes, "batch")
    local = -(-batch // (shards * steps))
    fits = bisect.bisect(range(1, local), usable, key=lambda number: step_bytes(config, sizes, platform, remat, number))
    at_once = f" in {steps} micro-batches" if steps > 1 else ""
    recomputing = "" if config.model.remat == "auto" else f"with --model.remat {remat} "
    needed = step_memory(config, sizes, platform, remat)
    parts = f"about {sum(needed) / GIB:.4g} GiB ({max(needed) / GIB:.3g} for {largest_kind(needed)})"
    limit = f"more than the {usable / GIB:.4g} GiB that a step can use on each {kind}"
    sequences = (
        f"{local} sequences a device, which {recomputing}need" if local > 1 else f"1 sequence a device, which {recomputing}needs"
    )
    problem = f"{batch}{at_once} is {sequences} {parts}, {limit}"
    change = change_that_fits(config, sizes, platform, remat, usable)
    if not fits:
        advice = change or "--mesh.fsdp or --mesh.tensor, and perhaps more devices"
        return field_error("train.batch_size", f"{problem}; not even one fits; use {advice}")
    hint = f"at most {fits} a device fit (--train.batch-size {fits * shards * steps})"
    return field_error("train.batch_size", f"{problem}; {hint}" + (f", or {change}" if change.startswith("--train") else ""))
