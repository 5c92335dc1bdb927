"""Estimates that need no compiler: FLOPs, memory from the shapes of arrays, and bounds on the time of a training step.

They are for TPU slices, if libtpu is not installed, and for nodes with GPUs. The memory is that of train/memory_estimate.py. The
times are lower bounds, not predictions: a step must do at least the following work, and the units that do it can at best be
busy all the time. A step is therefore at least as long as the longest of the three.

    products      the model's FLOPs, and those that `remat full` repeats, at the peak for the dtype of the products
    memory        bytes that pass between the chip and its memory, at the bandwidth of the memory
    collectives   bytes that a device receives from others, at the bandwidth of all its links

For P parameters, of which a device stores S, a dtype of c bytes for computing and p for the parameters, and A micro-batches, the
bytes are:

    optimizer       S (2p + 20): the parameters and two moments are read and written, and the gradients are read
    gradients       4 S, or with micro-batches 8 S A, because a sum is read and written
    weights         A c P / tensor for each pass over the layers: the forward pass, the backward pass, and recomputing all layers.
                    A device multiplies by whole weights, and not by the shards of `fsdp`
    activations     what is kept for the backward pass is written and read
    probabilities   `plain` attention has one number for each head, query and key; it and its gradient are written and read

Everything else could in principle remain in registers and caches, and so could small arrays among those that are counted. In each
micro-batch, a device receives:

    fsdp            the weights in the compute dtype for the forward and the backward pass, and its shard of float32 gradients
    data, slice     an all-reduce of the float32 gradients in its shard
    tensor          an all-reduce of the activations for each of two products of a layer, in both passes

An all-gather or a reduce-scatter of B bytes over n devices brings B (n - 1) / n of them to each device, and an all-reduce twice
as much. The switches of Hopper and Blackwell nodes can add ("NVLink SHARP", NVIDIA's documentation of NCCL), so that an
all-reduce there brings B. Only the chips with the fewest links are considered, which are those at the corners of a slice. The two
devices of a TPU7x chip can share what the chip receives.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax.numpy as jnp

from gpt_jax.config import FinetuneRunConfig, ModelConfig, PretrainConfig, RunConfig
from gpt_jax.errors import field_error
from gpt_jax.model.transformer import compute_dtype
from gpt_jax.plan.describe import batch_phrase
from gpt_jax.plan.workload import Workload
from gpt_jax.runtime.accelerators import Accelerator
from gpt_jax.runtime.chips import CHIPS, GIB, Chip
from gpt_jax.runtime.mesh import check_batch, check_model, num_shards
from gpt_jax.train.choices import choose_on
from gpt_jax.train.flops import flops_per_token
from gpt_jax.train.memory_estimate import StepMemory, change_that_fits, check_remat, largest_kind, step_memory

SUMMING_SWITCHES = ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA B200")
"""GPUs whose nodes have switches that can add."""
PASSES = {"default": 1, "high": 3, "highest": 6}
"""Number of bfloat16 products in a float32 product on TPUs, by `model.matmul_precision` (documentation of jax.lax.Precision)."""


class Transfer(NamedTuple):
    """The collectives of a step for one purpose."""

    kind: str
    axis: str
    purpose: str
    times: int
    """Number of executions in a step."""
    received: float
    """Bytes that each device receives in one execution."""
    seconds: float
    """Shortest time of all executions; 0 if the bandwidth is not published."""


class Estimate(NamedTuple):
    """Figures of a training step on one device; times are lower bounds, in seconds."""

    config: RunConfig
    """The config, with all choices made."""
    accelerator: Accelerator
    sizes: Mapping[str, int]
    """Sizes of the mesh axes."""
    sequences: int
    """Sequences of a step on a device."""
    memory: StepMemory
    """For an LSTM, only parameters, moments and gradients; the other kinds are 0."""
    flops: int
    """FLOPs of the model in a step, on all devices."""
    peak: float
    """Peak of matrix products in the dtype of `peak_name`, in FLOP/s."""
    peak_name: str
    products: float
    """Time of the matrix products."""
    traffic: Mapping[str, int]
    """Bytes between the chip and its memory, by the kinds above. Those of an LSTM do not include its activations."""
    transfers: tuple[Transfer, ...]

    @property
    def chip(self) -> Chip:
        """The properties of a device."""
        return CHIPS[self.accelerator.device_kind]

    @property
    def bounds(self) -> dict[str, float]:
        """Times of "matrix products", "memory" and "collectives"."""
        traffic = sum(self.traffic.values()) / self.chip.memory_bandwidth
        collectives = sum(transfer.seconds for transfer in self.transfers)
        return {"matrix products": self.products, "memory": traffic, "collectives": collectives}

    @property
    def step(self) -> float:
        """Shortest time of a step, in which products, memory and collectives overlap entirely."""
        return max(self.bounds.values())

    @property
    def step_without_overlap(self) -> float:
        """Shortest time of a step in which nothing else happens during collectives."""
        bounds = self.bounds
        return max(bounds["matrix products"], bounds["memory"]) + bounds["collectives"]

    @property
    def tokens_per_second(self) -> float:
        """Highest rate of all devices together."""
        return self.config.train.batch_size * self.config.model.context_length / self.step

    @property
    def utilization(self) -> float:
        """Highest model FLOPs utilization (MFU), relative to the peak in bfloat16."""
        return self.flops / (self.step * math.prod(self.sizes.values()) * self.chip.peak_flops["bfloat16"])


def estimate(config: RunConfig, accelerator: Accelerator, sizes: Mapping[str, int]) -> Estimate:
    """Returns the figures of a training step on TPU slices or on nodes with GPUs.

    Args:
      config: a pre-training, or the `as_pretraining` of a fine-tuning's workload, whose classifier is not counted.
      sizes: sizes of the mesh axes, as `mesh_sizes` returns them.

    Raises:
      UserError: the accelerator has only CPUs, the mesh does not divide the batch or the model, or the batch of a pre-training
        does not fit into the memory of the devices; the message says how many sequences fit.
    """
    if accelerator.kind == "cpu":
        raise field_error("topology", f"{accelerator.name} has only CPUs; name TPUs or GPUs, such as v5e-8 or h100-8")
    kind, platform, chip = accelerator.device_kind, accelerator.kind, CHIPS[accelerator.device_kind]
    check_batch(sizes, config.train.batch_size, config.train.grad_accum_steps)
    check_model(sizes, config.model)
    config = choose_on(config, sizes, platform, kind)
    if isinstance(config, PretrainConfig):
        check_remat(config, sizes, platform, kind)
    model = config.model
    memory = step_memory(config, sizes, platform, model.remat)
    if model.kind == "lstm":
        memory = memory._replace(activations=0, temporaries=0)
    tokens = config.train.batch_size * model.context_length
    peak_name, peak = _peak(model, chip, platform)
    flops = (flops_per_token(model) - 6 * _unused_weights(config)) * tokens
    return Estimate(
        config=config,
        accelerator=accelerator,
        sizes=sizes,
        sequences=config.train.batch_size // num_shards(sizes, "batch"),
        memory=memory,
        flops=flops,
        peak=peak,
        peak_name=peak_name,
        products=(flops + _repeated_flops(model) * tokens) / (peak * math.prod(sizes.values())),
        traffic=_traffic(config, sizes, memory, compute_dtype(model, platform).itemsize),
        transfers=tuple(_transfers(config, accelerator, sizes)),
    )


def check_fine_tuning(workload: Workload, figures: Estimate) -> None:
    """Checks that the largest batches of a fine-tuning fit into the memory of the devices.

    Raises:
      UserError: they do not fit; the message has the nearest change after which they do.
    """
    memory, usable = figures.memory, figures.chip.program_memory
    if workload.verb != "finetune" or sum(memory) <= usable:
        return
    sequences = workload.rows // workload.examples
    many = "s" * (workload.examples > 1)
    examples = f"{workload.examples} example{many} of {sequences} sequence{'s' * (sequences > 1)} x {workload.length} tokens"
    change = ""
    if figures.config.model.kind == "transformer":
        platform, remat = figures.accelerator.kind, figures.config.model.remat
        change = change_that_fits(figures.config, figures.sizes, platform, remat, usable, sequences)
    needed = f"need about {sum(memory) / GIB:.3g} GiB on each device, but a program can use only {usable / GIB:.3g}"
    advice = f"use {change}" if change else "lower it, or use more devices and a larger --mesh.fsdp"
    raise field_error("train.batch_size", f"{examples} {needed}; {largest_kind(memory)} take the most; {advice}")


def _peak(model: ModelConfig, chip: Chip, platform: str) -> tuple[str, float]:
    """Returns the dtype in which products are computed, and their peak in FLOP/s.

    If the peak in that dtype is not listed, the result is the one in bfloat16, which is higher.
    """
    dtype, precision = compute_dtype(model, platform).name, model.matmul_precision
    if dtype == "float32" and platform == "tpu":
        passes = PASSES[precision]
        return f"bfloat16, {passes} for each float32 product", chip.peak_flops["bfloat16"] / passes
    if dtype == "float32" and precision != "highest":
        dtype = "tf32"
    if dtype not in chip.peak_flops:
        return f"bfloat16, because no figure for {dtype} is known", chip.peak_flops["bfloat16"]
    return dtype, chip.peak_flops[dtype]


def _unused_weights(config: RunConfig) -> int:
    """Returns the number of weights of the output layer if the step does not need it."""
    unused = isinstance(config, FinetuneRunConfig) and not config.task.lm_weight
    return config.model.vocab_size * config.model.embed_dim if unused else 0


def _repeated_flops(model: ModelConfig) -> int:
    """Returns the FLOPs for each token that `remat full` repeats: the forward pass of all layers, but not of the output layer.

    Outside of a loop over the layers, the compiler can merge the repetition with the forward pass.
    """
    if model.remat != "full" or model.kind != "transformer" or model.layer_unroll == model.num_layers:
        return 0
    return (flops_per_token(model) - 6 * model.vocab_size * model.embed_dim) // 3


def _traffic(config: RunConfig, sizes: Mapping[str, int], memory: StepMemory, itemsize: int) -> dict[str, int]:
    """Returns the bytes between the chip and its memory in a step, by kind; see above."""
    model, parts = config.model, config.train.grad_accum_steps
    stored = memory.parameters // jnp.dtype(model.param_dtype).itemsize
    passes = 3 if _repeated_flops(model) else 2
    traffic = {
        "optimizer": 2 * memory.parameters + 20 * stored,
        "gradients": 4 * stored if parts == 1 else 8 * stored * parts,
        "weights": parts * passes * itemsize * (model.num_parameters - _unused_weights(config)) // sizes["tensor"],
    }
    if model.kind == "transformer":
        traffic["activations"] = 2 * parts * memory.activations
    if model.kind == "transformer" and model.attention == "plain":
        sequences = config.train.batch_size // num_shards(sizes, "batch")
        pairs = sequences * model.context_length**2 * model.num_heads // num_shards(sizes, "heads")
        traffic["probabilities"] = 4 * itemsize * pairs * model.num_layers
    return traffic


def _transfers(config: RunConfig, accelerator: Accelerator, sizes: Mapping[str, int]) -> Iterator[Transfer]:
    """Yields the collectives of a step; see above. Those of an LSTM over "tensor" are not estimated."""
    model, parts, chip = config.model, config.train.grad_accum_steps, CHIPS[accelerator.device_kind]
    itemsize = compute_dtype(model, accelerator.kind).itemsize
    inside = _bandwidth(accelerator, chip)

    def transfer(kind: str, axis: str, purpose: str, times: int, size: float) -> Transfer:
        devices, bandwidth = sizes[axis], chip.slice_bandwidth if axis == "slice" else inside
        received = size * (devices - 1) / devices
        if kind == "all-reduce":
            adds = accelerator.device_kind in SUMMING_SWITCHES and axis != "slice"
            received = min(2 * received, size) if adds else 2 * received
        return Transfer(kind, axis, purpose, times, received, times * received / bandwidth if bandwidth else 0.0)

    weights = model.num_parameters / sizes["tensor"]
    if sizes["fsdp"] > 1:
        yield transfer("all-gather", "fsdp", "weights", 2 * parts, itemsize * weights)
        yield transfer("reduce-scatter", "fsdp", "gradients", parts, 4 * weights)
    if sizes["data"] > 1:
        yield transfer("all-reduce", "data", "gradients", parts, 4 * weights / sizes["fsdp"])
    if sizes["slice"] > 1:
        # The devices of a slice add first, and then each exchanges its share with the other slices.
        yield transfer("all-reduce", "slice", "gradients", parts, 4 * weights / (sizes["fsdp"] * sizes["data"]))
    if sizes["tensor"] > 1 and model.kind == "transformer":
        tokens = config.train.batch_size * model.context_length // (num_shards(sizes, "batch") * parts)
        yield transfer("all-reduce", "tensor", "activations", 4 * model.num_layers * parts, itemsize * tokens * model.embed_dim)


def _bandwidth(accelerator: Accelerator, chip: Chip) -> float:
    """Returns the bytes that a device can receive in a second from the other devices of its slice or node.

    A chip in the corner of a slice has two links along an axis of the torus that is closed into a ring, and one along an open
    axis. Which axes are closed is described in transfers.py.
    """
    if not chip.torus:
        return (chip.link_bandwidth or chip.pcie_bandwidth) / 2
    extents = [int(extent) for extent in accelerator.topology.split("x")]
    cubes = all(extent % 4 == 0 for extent in extents)
    closed = [cubes if chip.torus == 3 else extent == 16 for extent in extents]
    links = sum(2 if ring else 1 for extent, ring in zip(extents, closed, strict=True) if extent > 1)
    of_chip = chip.link_bandwidth * accelerator.devices_per_host // accelerator.chips_per_host
    return of_chip * links / (4 * chip.torus) if links else of_chip / 2


# -- text -------------------------------------------------------------------------------------------------------------------


def describe_arithmetic(name: str, workload: Workload, figures: Estimate, run: str) -> str:
    """Returns the figures as text.

    Args:
      name: name of the config.
      run: a line about the whole run.
    """
    config, model, bounds = figures.config, figures.config.model, figures.bounds
    accelerator, sizes = figures.accelerator, figures.sizes
    where = f"{sizes['slice']} x {accelerator.name}" if sizes["slice"] > 1 else accelerator.name
    mesh = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "one device"
    attention = f", attention {model.attention}" if model.kind == "transformer" else ""
    parameters = workload.config.model.num_parameters
    token = figures.flops // (config.train.batch_size * model.context_length)
    longer = f", or {figures.step_without_overlap * 1e3:.1f} if no collective overlaps with other work"
    return "\n".join(
        [
            f"{name}: {parameters:,} parameters on {where} ({accelerator.device_kind}), mesh {mesh}{attention}",
            f"{batch_phrase({**workload.shape, 'sequences_per_device': figures.sequences})}; remat {model.remat}",
            "",
            *_memory_lines(figures),
            "",
            "lower bounds in milliseconds",
            *_bound_lines(figures),
            "",
            f"FLOPs of the model: {token:.4g} a token ({_formula(model)}), {figures.flops:.4g} a step",
            f"a step takes at least {figures.step * 1e3:.1f} ms{longer if bounds['collectives'] else ''}; "
            "these are lower bounds, not predictions",
            f"at most {figures.tokens_per_second:,.0f} tokens/s; MFU at most {figures.utilization:.1%} of "
            f"{figures.chip.peak_flops['bfloat16'] / 1e12:.4g} TFLOP/s a device",
            run,
            f"{_limit(figures)} ({REMARKS[accelerator.kind]})",
        ]
    )


REMARKS = {
    "tpu": "libtpu is not installed, so nothing was compiled; for more: pip install 'gpt_jax[tpu]'",
    "gpu": "steps for GPUs are not compiled",
}
"""The end of the text."""


def _formula(model: ModelConfig) -> str:
    """Returns the formula for the FLOPs of a token as text."""
    attention = " + 12 x layers x width x context" if model.kind == "transformer" else ""
    return f"6 x (weights of products){attention}"


def _memory_lines(figures: Estimate) -> list[str]:
    """Returns lines about the memory of a device."""
    total, usable = sum(figures.memory), figures.chip.program_memory
    kinds = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in figures.memory._asdict().items() if size)
    rest = "; activations of an LSTM are not estimated" if figures.config.model.kind == "lstm" else ""
    rest += "; this may not fit" if total > usable else ""
    share = f"{total / GIB:.2f} of {usable / GIB:.2f} ({total / usable:.0%})"
    return ["memory of a device, estimated from shapes, GiB", f"  {share}: {kinds}{rest}"]


def _bound_lines(figures: Estimate) -> list[str]:
    """Returns lines about each of the three bounds."""
    milliseconds = {name: f"  {seconds * 1e3:9.2f}  {name}" for name, seconds in figures.bounds.items()}
    again = ", counting the layers' forward pass twice" if _repeated_flops(figures.config.model) else ""
    traffic = ", ".join(f"{kind} {size / 1e9:.3g}" for kind, size in figures.traffic.items())
    bandwidth = f"{figures.chip.memory_bandwidth / 1e9:.4g} GB/s"
    lines = [
        f"{milliseconds['matrix products']} at {figures.peak / 1e12:.4g} TFLOP/s a device ({figures.peak_name}){again}",
        f"{milliseconds['memory']} at {bandwidth}; GB: {traffic}",
    ]
    if math.prod(figures.sizes.values()) > 1:
        tensor = figures.config.model.kind == "lstm" and figures.sizes["tensor"] > 1
        lines += [f"{milliseconds['collectives']}{', not counting those of an LSTM over tensor' if tensor else ''}"]
    for each in figures.transfers:
        time = f"{each.seconds * 1e3:9.2f}" if each.seconds else f"{'unknown':>9}"
        lines.append(f"  {time}    {each.kind} over {each.axis} ({each.purpose}): {each.times} x {each.received / 1e6:.1f} MB")
    return lines


def _limit(figures: Estimate) -> str:
    """Returns a sentence about the longest bound, and what to change."""
    bounds = figures.bounds
    longest = max(bounds, key=lambda name: bounds[name])
    if longest == "matrix products":
        return "the longest bound is that of matrix products"
    if longest == "collectives":
        largest = max(figures.transfers, key=lambda transfer: transfer.seconds)
        what, hint = f"{largest.kind} over {largest.axis}", "give each device more sequences, or split the model less"
    else:
        what = max(figures.traffic, key=lambda kind: figures.traffic[kind])
        others = {"activations": "use --model.remat full", "probabilities": "use another --model.attention"}
        hint = others.get(what, "give each device more sequences")
    return f"the longest bound is that of {longest}, mainly of the {what}: {hint}"
