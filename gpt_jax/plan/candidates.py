"""Combinations of mesh, micro-batches and `model.remat` that fit a topology, ordered by the estimated time of a step.

The estimate only orders the candidates; search.py compiles the best ones. For a model with P parameters and F FLOPs a step, D
devices with a peak of p FLOP/s, and N tokens of a step on each device, it is the sum of these times:

    computing    F / (p D SHARE), and a third more if remat is `full`
    fsdp         in each micro-batch, two gathers of the weights in the compute dtype and a reduce-scatter of float32 gradients,
                 of P / tensor elements each. If the shards do not fill whole tiles (`ROWS`), an all-reduce replaces the
                 reduce-scatter
    data, slice  in each micro-batch, an all-reduce of P / (tensor x fsdp) float32 gradients
    tensor       for each layer, four all-reduces of N x embed_dim activations in the compute dtype

transfers.py models the times of these collectives. None of them is assumed to overlap with other work.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from gpt_jax.config import MeshConfig, PretrainConfig
from gpt_jax.errors import UserError, field_error
from gpt_jax.model.transformer import compute_dtype
from gpt_jax.plan.collectives import Collective
from gpt_jax.plan.transfers import Links
from gpt_jax.runtime.chips import CHIPS, GIB
from gpt_jax.runtime.mesh import check_batch, check_model, num_shards
from gpt_jax.runtime.sharding import make_mesh
from gpt_jax.train.choices import choose
from gpt_jax.train.flops import flops_per_token
from gpt_jax.train.memory_estimate import ORDER, USABLE, step_bytes

SHARE = 0.5
"""Assumed share of the devices' peak that the model's FLOPs reach with remat `dots`, without collectives."""
RECOMPUTED = 4 / 3
"""Ratio of the computing time with remat `full`, which repeats the forward pass, to the time with `dots`."""
ROWS = 8
"""Rows of a float32 tile in a TPU's memory. If embed_dim / fsdp is not a multiple of this number, the compiler may
sum whole gradients on all devices. For gpt1_1b5 on v5e, it did so with shards of 28 and 7 rows (fsdp = 64 and 256), for a few
gradients with 14 rows (fsdp = 128, tensor = 2), and not with 112 and 56 rows."""


class Candidate(NamedTuple):
    """A config that fits according to the estimate of train/memory_estimate.py."""

    config: PretrainConfig
    seconds: float
    """Estimated time of a step."""

    @property
    def options(self) -> str:
        """The options of `pretrain` that turn the original config into this one."""
        mesh, train, model = self.config.mesh, self.config.train, self.config.model
        used = ("slice", "data", "fsdp", "tensor") if mesh.slice > 1 else ("data", "fsdp", "tensor")
        axes = " ".join(f"--mesh.{axis} {getattr(mesh, axis)}" for axis in used)
        return f"{axes} --train.grad-accum-steps {train.grad_accum_steps} --model.remat {model.remat}"


def find_candidates(config: PretrainConfig, devices: Sequence[jax.Device], slices: int = 1) -> list[Candidate]:
    """Returns the candidates for the devices of one or more slices, the shortest estimated step first.

    All candidates keep the global batch size of the config, and their `mesh.slice` is the number of slices. For each mesh,
    there is a candidate with `dots` and the fewest micro-batches (1, 2, 4, ...) that fit, and one with `full` if that fits with
    fewer.

    Raises:
      UserError: the model is not a Transformer, no mesh divides the batch and the model, or none has enough memory.
    """
    if config.model.kind != "transformer":
        raise field_error("search", f"is for Transformers; the memory of a model of kind {config.model.kind} is not estimated")
    chip = CHIPS[devices[0].device_kind]
    usable = int(USABLE["tpu"] * chip.memory)
    model = choose(config.model, "tpu", devices[0].device_kind)

    def needed(candidate: PretrainConfig) -> int:
        config = dataclasses.replace(candidate, model=model)  # The estimate depends on the attention that the run would choose.
        return step_bytes(config, dataclasses.asdict(candidate.mesh), "tpu", candidate.model.remat)

    meshes = list(_meshes(config, len(devices), slices))
    if not meshes:
        batch = f"the batch of {config.train.batch_size} and the model"
        raise field_error("search", f"no mesh of {len(devices)} devices divides {batch}; use a multiple of {len(devices)}")
    found = []
    for mesh in meshes:
        fewest = math.inf
        for remat in ORDER:
            fitting = (each for each in _splits(config, mesh, remat) if needed(each) <= usable)
            first = next(fitting, None)
            if first is not None and first.train.grad_accum_steps < fewest:
                fewest = first.train.grad_accum_steps
                found.append(Candidate(first, step_seconds(first, make_mesh(mesh, devices))))
    if not found:
        smallest = min(needed(each) for mesh in meshes for remat in ORDER for each in _splits(config, mesh, remat))
        memory = f"{smallest / GIB:.2f} GiB, and {usable / GIB:.2f} of {chip.memory / GIB:.2f} GiB can be planned for"
        problem = f"{len(devices)} devices do not suffice: even the smallest step needs {memory}"
        raise field_error("topology", f"{problem}; name one with more devices or more memory")
    return sorted(found, key=lambda candidate: candidate.seconds)


def step_seconds(config: PretrainConfig, mesh: Mesh) -> float:
    """Returns the estimated time of a step by the formulas above."""
    sizes, links, model, train = mesh.shape, Links(mesh), config.model, config.train
    tokens, itemsize = train.batch_size * model.context_length, compute_dtype(model, "tpu").itemsize
    peak = CHIPS[mesh.devices.flat[0].device_kind].peak_flops["bfloat16"]

    def seconds(kind: str, axes: Sequence[str], size: float) -> float:
        axes = [axis for axis in axes if sizes[axis] > 1]
        devices = math.prod(sizes[axis] for axis in axes)
        return links.seconds(Collective(kind, "", round(size), 1, "+".join(axes), devices, "", "")) if axes else 0.0

    computing = flops_per_token(model) * tokens / (peak * mesh.size * SHARE) * (RECOMPUTED if model.remat == "full" else 1.0)
    weights = model.num_parameters / sizes["tensor"]
    gathers = 2 * seconds("all-gather", ["fsdp"], itemsize * weights)
    whole = model.embed_dim // sizes["fsdp"] % ROWS == 0
    scatter = seconds("reduce-scatter" if whole else "all-reduce", ["fsdp"], 4 * weights)
    gradients = seconds("all-reduce", ["slice", "data"], 4 * weights / sizes["fsdp"])
    activations = itemsize * tokens / num_shards(sizes, "batch") * model.embed_dim
    return (
        computing
        + train.grad_accum_steps * (gathers + scatter + gradients)
        + 4 * model.num_layers * seconds("all-reduce", ["tensor"], activations)
    )


def _meshes(config: PretrainConfig, devices: int, slices: int) -> Iterator[MeshConfig]:
    """Yields the meshes of all devices whose axes divide the batch and the model."""
    inside = devices // slices
    for tensor in _divisors(inside):
        for fsdp in _divisors(inside // tensor):
            mesh = MeshConfig(slice=slices, data=inside // tensor // fsdp, fsdp=fsdp, tensor=tensor)
            try:
                check_batch(dataclasses.asdict(mesh), config.train.batch_size, 1)
                check_model(dataclasses.asdict(mesh), config.model)
            except UserError:
                continue
            yield mesh


def _splits(config: PretrainConfig, mesh: MeshConfig, remat: Any) -> Iterator[PretrainConfig]:
    """Yields the config with a mesh, a value of `model.remat`, and 1, 2, 4, ... micro-batches."""
    model = dataclasses.replace(config.model, remat=remat)
    local = config.train.batch_size // num_shards(dataclasses.asdict(mesh), "batch")
    micro_batches = 1
    while local % micro_batches == 0:
        train = dataclasses.replace(config.train, grad_accum_steps=micro_batches)
        yield dataclasses.replace(config, mesh=mesh, train=train, model=model)
        micro_batches *= 2


def _divisors(number: int) -> list[int]:
    return [k for k in range(1, number + 1) if number % k == 0]
