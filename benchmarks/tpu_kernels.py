"""Cycles of the Pallas kernels in a training step on TPUs, from the schedules that their compiler writes; no TPU is needed.

    python -m benchmarks.tpu_kernels --chip v5e
    python -m benchmarks.tpu_kernels --chip v5p --time 1024 --heads 28 --batch 2 --add
    python -m benchmarks.tpu_kernels --renew

gpt_jax/plan/kernel_schedules.py describes how the cycles are counted, and has the table to which `--add` adds the schedules.
"""

import argparse
import sys

from gpt_jax.arguments import Parser
from gpt_jax.errors import TrainingError, UserError
from gpt_jax.inputs.numbers import POSITIVE, number
from gpt_jax.model.kernels.tpu_attention import unsupported
from gpt_jax.model.kernels.tpu_tiles import LANES
from gpt_jax.plan import kernel_schedules
from gpt_jax.plan.kernel_schedules import ATTENTION, LAYER_NORM, Schedule, Variant, kernel_cycles, libtpu_version
from gpt_jax.runtime.chips import CHIPS

KINDS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "7x": "TPU7x"}


def main() -> int:
    """Prints a table; returns the exit code, which is 2 after a user's mistake."""
    try:
        options = _parser().parse_args()
        if options.renew:
            return _renew()
        schedules = measure(options)
    except (UserError, TrainingError) as error:
        print(f"benchmarks.tpu_kernels: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{options.chip}, {options.batch} x {options.time} tokens, {options.heads} heads of {options.dim}, {options.dtype}")
    print("thousand cycles of one call, and for attention bundles for each head and sequence")
    print(f"{'kernel':20} {'dropout':>7} {'bundles':>8} {'pops':>8} {'bytes':>8} {'cycles':>8} {'a head':>7}")
    for variant, schedule in schedules.items():
        print(_row(options, variant, schedule))
    if options.add:
        kernel_schedules.write_table({**kernel_schedules.read_table(), **schedules})
    return 0


def measure(options: argparse.Namespace) -> dict[Variant, Schedule]:
    """Compiles each kernel with and without dropout.

    Raises:
      UserError: the kernels do not support the sizes.
      TrainingError: a kernel does not compile.
    """
    if options.time % LANES:
        raise UserError(f"--time: must be a multiple of {LANES}, not {options.time}")
    if reason := unsupported(options.dim, options.time, options.dtype, KINDS[options.chip]):
        raise UserError(f"--dim: {reason}")
    common = {"chip": KINDS[options.chip], "libtpu": libtpu_version(), "dtype": options.dtype, "time": options.time}
    attention = {"segments": options.segments, "dim": options.dim, "lacks_head": options.heads * options.dim % LANES > 0}
    layer_norm = {"segments": False, "dim": 0, "lacks_head": False}
    variants = [
        *(Variant(name, dropout=dropout, embed=0, **common, **attention) for name in ATTENTION for dropout in (False, True)),
        *(
            Variant(name, dropout=dropout, embed=options.heads * options.dim, **common, **layer_norm)
            for name in LAYER_NORM
            for dropout in ((False,) if name == "layer_norm_forward" else (False, True))
        ),
    ]
    return {variant: kernel_schedules.compile_schedule(variant) for variant in variants}


def _row(options: argparse.Namespace, variant: Variant, schedule: Schedule) -> str:
    """Returns the counts of one call as text."""
    batch, time, heads, dim = options.batch, options.time, options.heads, options.dim
    array = batch * time * heads * dim * (2 if variant.dtype == "bfloat16" else 4)
    logarithms = 4 * batch * heads * time
    arrays = {  # forward: queries, keys, values and output; backward: also the gradients of these four
        "attention_forward": 4 * array + logarithms,
        "attention_backward": 8 * array + logarithms,
        "layer_norm_forward": 2 * array,
        "layer_norm_backward": (4 if variant.dropout else 3) * array,
    }
    size, chip = arrays[variant.name], CHIPS[variant.chip]
    counts = [
        kernel_cycles(variant, batch, heads, 0, schedule._replace(pops=0)),
        kernel_cycles(variant, batch, heads, 0, schedule._replace(bundles=0)),
        size / chip.memory_bandwidth * chip.cycles_per_second,
        kernel_cycles(variant, batch, heads, size, schedule),
    ]
    columns = " ".join(f"{value / 1e3:8.1f}" for value in counts)
    per_head = f" {counts[0] * chip.cores / (batch * heads):7.0f}" if variant.name in ATTENTION else ""
    return f"{variant.name:20} {RATES[variant.dropout]:>7} {columns}{per_head}"


RATES = {False: "none", True: f"{kernel_schedules.RATE}"}


def _renew() -> int:
    """Compiles the kernels of the table again for this version of libtpu; returns the exit code."""
    wanted = {variant._replace(libtpu=libtpu_version()) for variant in kernel_schedules.read_table(all_sources=True)}
    found: dict[Variant, Schedule] = {**kernel_schedules.read_table()}
    for index, variant in enumerate(sorted(wanted - found.keys())):
        print(f"{index + 1} of {len(wanted - found.keys())}: {variant}", flush=True)
        found[variant] = kernel_schedules.compile_schedule(variant)
        kernel_schedules.write_table(found)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="benchmarks.tpu_kernels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chip", choices=KINDS, default="v5e", help="the TPU's generation (v5e)")
    for name, default, text in (
        ("batch", 32, "sequences on each device"),
        ("time", 512, "tokens in a sequence"),
        ("heads", 12, "attention heads on each device"),
        ("dim", 64, "size of a head"),
    ):
        parser.add_argument(f"--{name}", type=number(int, POSITIVE), default=default, help=f"{text} ({default})")
    parser.add_argument("--segments", action="store_true", help="several examples in a sequence")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--add", action="store_true", help="add the schedules to the table of gpt_jax/plan")
    parser.add_argument("--renew", action="store_true", help="compile the kernels of that table again, if their code has changed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
