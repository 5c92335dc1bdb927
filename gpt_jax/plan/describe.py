"""The text of a report: tables, and a sentence about what limits the step."""

import collections
from typing import Any

from gpt_jax.plan.report_file import Report
from gpt_jax.runtime.chips import CHIPS, GIB, MIB
from gpt_jax.runtime.prices import LIST_PRICES

SECONDS_PER_HOUR = 3600
SCALARS = 1024
"""Maximum size in bytes of sums that are not gradients, such as the loss."""
OTHER = "other"
"""The part of collectives whose place in the model the compiler does not name (attribution.py, which needs JAX)."""
FORMULAS = {"transformer": "6 x (weights of products) + 12 x layers x width x context", "lstm": "6 x (weights of products)"}
"""The FLOPs of training on a token (train/flops.py)."""


def describe(report: Report, price: float | None = None, steps: float | None = None) -> str:
    """Returns the report as text.

    Args:
      price: cost of one chip for an hour, if it is known.
      steps: number of updates in the run, if it is known.
    """
    mesh = " x ".join(f"{axis}={size}" for axis, size in report["mesh"].items() if size > 1) or "one device"
    versions = report["versions"]
    results = _generation_lines(report, price) if report["verb"] == "generate" else _training_lines(report, price, steps)
    lines = [
        f"{report['config']}: {report['num_parameters']:,} parameters on {_hardware(report)}, mesh {mesh}, {report['dtype']}",
        f"{batch_phrase(report)}; {', '.join(_choices(report))}" if report["verb"] != "generate" else batch_phrase(report),
        f"jax {versions['jax']}, libtpu {versions['libtpu']}, compiled in {report['compile_seconds']:.0f} s; nothing was run",
        "",
        *_memory_lines(report),
        "",
        *_cycle_lines(report),
        "",
        *_collective_lines(report),
        *results,
    ]
    return "\n".join(lines)


def batch_phrase(report: Report) -> str:
    """Returns a phrase about the sequences that are processed together.

    Args:
      report: its keys `sequences_per_device` and those of `Workload.shape` are used.
    """
    examples, sequences, length = report["examples"], report["sequences"], report["length"]
    if report["verb"] == "generate":
        prompts = f"{examples:,} prompt{'s' * (examples > 1)} of {length:,} tokens"
        return f"{prompts}, each continued by {report['new_tokens']:,} tokens"
    parts = f" in {report['micro_batches']} micro-batches" if report["micro_batches"] > 1 else ""
    several = f"{examples:,} examples of {sequences // examples} sequences" if sequences > examples else f"{examples:,}"
    local = report["sequences_per_device"]
    device = f"{local:,} sequence{'s' * (local > 1)} a device"
    longest = " (the longest allowed)" if report["verb"] == "finetune" else ""
    return f"batch of {several} x {length:,} tokens{longest}{parts}, {device}"


def _choices(report: Report) -> list[str]:
    """Returns the choices that matter; an LSTM has no attention and no layers to unroll."""
    unused = ("attention", "layer_unroll") if report["model"] == "lstm" else ()
    return [f"{name.replace('_', '-')} {value}" for name, value in report["choices"].items() if name not in unused]


def _training_lines(report: Report, price: float | None, steps: float | None) -> list[str]:
    """Returns lines about the time of a step, the whole run, and what limits the step."""
    time, chip = report["time"], CHIPS[report["device_kind"]]
    return [
        f"FLOPs of the model: {report['flops']['token']:.4g} a token ({FORMULAS[report['model']]}), "
        f"{report['flops']['step']:.4g} a step",
        f"modeled step: {time['step'] * 1e3:.1f} ms = {time['compute'] * 1e3:.1f} computing "
        f"+ {time['exposed'] * 1e3:.1f} waiting for collectives",
        f"{time['tokens_per_second']:,.0f} tokens/s; MFU {time['utilization']:.1%} of {chip.peak_flops['bfloat16'] / 1e12:.0f} "
        f"TFLOP/s a device ({time['utilization_by_computation']:.1%} without collectives)",
        run_line(report, price, steps),
        advice(report),
    ]


def _generation_lines(report: Report, price: float | None) -> list[str]:
    """Returns lines about the time of the prompts and of the new tokens, and what limits it."""
    time, chip = report["time"], CHIPS[report["device_kind"]]
    token = (time["step"] - time["prompts"]) / report["new_tokens"]
    width = 2 if report["dtype"] == "bfloat16" else 4
    weights = report["num_parameters"] * width / report["devices"] / chip.memory_bandwidth
    million = 1e6 / time["tokens_per_second"] * report["chips"] / SECONDS_PER_HOUR
    return [
        f"FLOPs of the model: {report['flops']['step']:.4g} in all (a third of those of training)",
        f"modeled: {time['prompts'] * 1e3:.2f} ms for the prompts, then {token * 1e3:.2f} ms a token, "
        f"of which reading the weights once takes {weights * 1e3:.2f}",
        f"{time['step'] * 1e3:.1f} ms in all; {time['tokens_per_second']:,.0f} new tokens/s for all prompts together; "
        f"MFU {time['utilization']:.2%}",
        f"a million tokens: {_figure(million)} chip-hours{_cost(report, price, million)}, not counting prompts and sampling",
        _generation_limit(report, token, weights),
    ]


def _generation_limit(report: Report, token: float, weights: float) -> str:
    """Returns a sentence about what limits generation, which takes at least the time to read the weights for each token."""
    if token < 2 * weights:
        return "limited by reading the weights: more prompts at once take little more time"
    cycles = {_words(part): by["tokens"] for part, by in report["cycles"].items()}
    largest = max(cycles, key=lambda part: cycles[part])
    share = cycles[largest] / sum(cycles.values())
    return f"limited by work other than reading the weights; the largest part is {largest} ({share:.0%})"


def _hardware(report: Report) -> str:
    slices = f"{report['slices']} x " if report["slices"] > 1 else ""
    return f"{slices}{report['accelerator']} ({report['chips']:,} chip{'s' * (report['chips'] > 1)}, {report['device_kind']})"


def _memory_lines(report: Report) -> list[str]:
    memory = report["memory"]
    share = memory["peak"] / memory["available"]
    names = ("parameters", "moments", "batch", "temporaries", "code")
    shown = {name: f"{name} {memory[name] / GIB:.2f}" for name in names if memory[name] >= 0.005 * GIB}
    if memory["activations"] and "temporaries" in shown:
        shown["temporaries"] += f" (activations about {memory['activations'] / GIB:.2f})"
    kinds = ", ".join(shown.values()) or "less than 0.01 each"
    if share > 1:
        kinds += f"; this still fits, because at most {memory['alive'] / GIB:.2f} GiB are in use at the same time"
    return ["memory of a device, GiB", f"  {memory['peak'] / GIB:.2f} of {memory['available'] / GIB:.2f} ({share:.0%}): {kinds}"]


def _cycle_lines(report: Report) -> list[str]:
    directions = ("prompts", "tokens") if report["verb"] == "generate" else ("forward", "recomputed", "backward")
    total, clock = sum(sum(by.values()) for by in report["cycles"].values()), CHIPS[report["device_kind"]].cycles_per_second
    header = f"{'million cycles by part':24}{'all':>9}{'share':>8}{'ms':>9}"
    lines = [header + "".join(f"{name:>12}" for name in directions)]
    for part, by in report["cycles"].items():
        cycles = sum(by.values())
        columns = "".join(f"{by.get(name, 0) / 1e6:12.2f}" for name in directions)
        milliseconds = f"{cycles / clock * 1e3:9.2f}"
        lines.append(f"  {_words(part):22}{cycles / 1e6:9.2f}{cycles / total:8.1%}{milliseconds}{columns}")
    lines.append(f"  {'sum':22}{total / 1e6:9.2f}{'':8}{total / clock * 1e3:9.2f}")
    if report["kernels"]:
        kernels = ", ".join(f"{k['times']} x {k['name']} {k['cycles'] / 1e6:.2f}" for k in report["kernels"])
        lines.append(f"  of these in Pallas kernels: {kernels}")
    return lines


def _collective_lines(report: Report) -> list[str]:
    if not report["collectives"]:
        return ["no collectives", ""]
    links = f"collectives, links of {report['links']['inside'] / 1e9:.4g} GB/s"
    if report["slices"] > 1:
        between = report["links"]["between_slices"]
        links += f", {between / 1e9:.4g} between slices" if between else "; unknown between slices"
    lines = [f"{links:56}{'times':>6}{'MiB':>10}{'ms':>8}{'exposed':>9}"]
    rows: dict[str, list[float]] = {}
    for each in report["collectives"]:
        notes = ", ".join(filter(None, (_purpose(each), "async" * each["asynchronous"])))
        name = f"{each['kind']} {each['dtype']} over {each['axes']}" + f" ({notes})" * bool(notes)
        figures = [each["times"], each["bytes"] / MIB, each["seconds"] * 1e3, each["exposed_seconds"] * 1e3]
        rows[name] = [a + b for a, b in zip(rows.get(name, [0] * 4), figures, strict=True)]
    shown = {name: row for name, row in rows.items() if row[2] >= 0.01}
    for name, (times, size, milliseconds, exposed) in sorted(shown.items(), key=lambda item: -item[1][2]):
        lines.append(f"  {name:54}{times:6}{size:10.1f}{milliseconds:8.2f}{exposed:9.2f}")
    if len(shown) < len(rows):
        times = sum(row[0] for name, row in rows.items() if name not in shown)
        lines.append(f"  {f'{len(rows) - len(shown)} more, below 0.01 ms':54}{times:6}")
    return [*lines, ""]


def _purpose(collective: dict[str, Any]) -> str:
    """Returns "gradients" for sums of gradients, which may combine several parts; otherwise the part and the direction.

    The result is "" if the compiler does not say, as in programs for several slices.
    """
    sums = collective["kind"] in ("all-reduce", "reduce-scatter") and "tensor" not in collective["axes"]
    if sums and (collective["direction"] == "backward" or collective["bytes"] > SCALARS * collective["times"]):
        return "gradients"
    return "" if collective["part"] == OTHER else f"{_words(collective['part'])}, {collective['direction']}"


def _words(part: str) -> str:
    """Returns the name of a part of the model as words."""
    return part.replace("_", " ")


def run_line(report: Report, price: float | None, steps: float | None) -> str:
    """Returns a line about the whole run.

    Args:
      report: its keys `verb`, `duration`, `time`, `chips` and `device_kind` are used.
      price, steps: as for `describe`.
    """
    if steps is None:
        thousand = 1000 * report["time"]["step"] * report["chips"] / SECONDS_PER_HOUR
        cost = _cost(report, price, thousand)
        hint = f"give {'--examples' if report['verb'] == 'finetune' else '--corpus-tokens'} for the length of the run"
        return f"run of {report['duration']}: 1,000 steps take {thousand:.4g} chip-hours{cost}; {hint}"
    hours = steps * report["time"]["step"] / SECONDS_PER_HOUR
    chip_hours = hours * report["chips"]
    cost = _cost(report, price, chip_hours)
    return f"run of {report['duration']}: {steps:,.0f} steps, {_figure(hours)} hours, {_figure(chip_hours)} chip-hours{cost}"


def _cost(report: Report, price: float | None, chip_hours: float) -> str:
    """Returns a phrase about the cost of some chip-hours, at the given price or the list price; "" if neither is known."""
    if price is not None:
        return f", {chip_hours * price:,.2f} at {price:g} a chip-hour"
    known = LIST_PRICES.get(report["device_kind"])
    if known is None:
        return ""
    source = f"{known.source} in {known.region}, {known.date}"
    return f", ${chip_hours * known.dollars:,.2f} at the list price of ${known.dollars:.2f} a chip-hour ({source})"


def _figure(number: float) -> str:
    """Returns a number with at least three significant digits."""
    return f"{number:,.1f}" if number >= 100 else f"{number:.3g}"


def advice(report: Report) -> str:
    """Returns a sentence about what limits the step, and what to change first."""
    time, memory = report["time"], report["memory"]
    free = 1 - memory["peak"] / memory["available"]
    total = sum(sum(by.values()) for by in report["cycles"].values())
    more = f"; {free:.0%} of the memory is free" if free > 0.2 else ""
    if time["exposed"] > 0.2 * time["step"]:
        longest = max(report["collectives"], key=lambda each: each["exposed_seconds"])
        purpose = f" ({_purpose(longest)})" if _purpose(longest) else ""
        return (
            f"limited by collectives, above all the {longest['kind']} over {longest['axes']}{purpose}: "
            f"give each device more sequences (a larger --train.batch-size or fewer devices){more}"
        )
    if report["micro_batches"] > 1 and free > 0.5:
        return f"limited by small micro-batches: lower --train.grad-accum-steps{more}"
    if report["recomputed_cycles"] > 0.15 * total and report["choices"]["remat"] == "full":
        twice = f"{report['recomputed_cycles'] / total:.0%} of the cycles"
        return f"limited by recomputation ({twice}): --model.remat dots takes more memory but less time{more}"
    products = report["product_cycles"] / total
    if products > 0.7:
        limit, rate = (
            f"limited by matrix products, which take {products:.0%} of the cycles",
            time["utilization_by_computation"] / products,
        )
        if rate > 0.6:
            return f"{limit}: this is close to what the chip can do"
        return f"{limit} but reach only {rate:.0%} of the peak: wider layers and heads of 128 fill the matrix units better"
    largest = _words(_largest_without_products(report))
    others = f"{1 - products:.0%} of the cycles"
    return f"limited by work other than matrix products ({others}), the largest part of it in {largest}{more}"


def _largest_without_products(report: Report) -> str:
    """Returns the part of the model with the most cycles outside of matrix products and kernels of attention."""
    cycles = collections.Counter[str]()
    for place, count in report["cycles_of_xla"].items():
        part, _, kind = place.split()
        cycles[part] += count if kind != "product" else 0
    for kernel in report["kernels"]:
        cycles["layer_norm"] += kernel["cycles"] if kernel["name"].startswith("layer_norm") else 0
    return cycles.most_common(1)[0][0]
