"""The text of a report that was made up from round numbers, and its advice."""

import copy

import pytest

from gpt_jax.plan.describe import advice, describe

REPORT = {
    "version": 2,
    "verb": "pretrain",
    "model": "transformer",
    "config": "gpt1",
    "accelerator": "v5e-8",
    "slices": 2,
    "chips": 16,
    "device_kind": "TPU v5 lite",
    "devices": 16,
    "versions": {"jax": "1.2", "libtpu": "3.4"},
    "mesh": {"slice": 2, "data": 8, "fsdp": 1, "tensor": 1},
    "choices": {"attention": "pallas_tpu", "remat": "dots", "layer_unroll": 12, "loss_chunk": 128},
    "dtype": "bfloat16",
    "examples": 2048,
    "sequences": 2048,
    "length": 512,
    "new_tokens": 0,
    "micro_batches": 4,
    "sequences_per_device": 128,
    "num_parameters": 116_534_784,
    "memory": {
        "parameters": 2**29,
        "moments": 2**30,
        "batch": 0,
        "temporaries": 10 * 2**30,
        "code": 2**28,
        "peak": 13 * 2**30,
        "activations": 7 * 2**30,
        "available": 2**34,
    },
    "flops": {"token": 750_000_000, "step": 786_432_000_000_000},
    "cycles": {
        "mlp": {"forward": 100_000_000, "recomputed": 20_000_000, "backward": 180_000_000},
        "layer_norm": {"forward": 80_000_000, "backward": 20_000_000},
    },
    "product_cycles": 240_000_000,
    "recomputed_cycles": 20_000_000,
    "cycles_of_xla": {
        "mlp forward product": 240_000_000,
        "mlp backward elementwise": 60_000_000,
        "layer_norm forward copy": 10**8,
    },
    "kernels": [{"name": "attention_backward", "times": 48, "cycles": 25_000_000}],
    "collectives": [
        {
            "kind": "all-reduce",
            "dtype": "f32",
            "axes": "data",
            "part": "layer_norm",
            "direction": "backward",
            "asynchronous": True,
            "times": 12,
            "bytes": 100 * 2**20,
            "seconds": 0.03,
            "exposed_seconds": 0.02,
        },
        {
            "kind": "all-gather",
            "dtype": "bf16",
            "axes": "fsdp",
            "part": "mlp",
            "direction": "forward",
            "asynchronous": False,
            "times": 7,
            "bytes": 4,
            "seconds": 9e-6,
            "exposed_seconds": 9e-6,
        },
    ],
    "links": {"inside": 50e9, "between_slices": 3.125e9},
    "time": {
        "compute": 0.18,
        "exposed": 0.02,
        "step": 0.2,
        "prompts": 0.0,
        "tokens_per_second": 5_242_880.0,
        "utilization": 0.125,
        "utilization_by_computation": 0.138889,
    },
    "duration": "100 epochs",
    "compile_seconds": 61.4,
}

TEXT = """\
gpt1: 116,534,784 parameters on 2 x v5e-8 (16 chips, TPU v5 lite), mesh slice=2 x data=8, bfloat16
batch of 2,048 x 512 tokens in 4 micro-batches, 128 sequences a device; \
attention pallas_tpu, remat dots, layer-unroll 12, loss-chunk 128
jax 1.2, libtpu 3.4, compiled in 61 s; nothing was run

memory of a device, GiB
  13.00 of 16.00 (81%): parameters 0.50, moments 1.00, temporaries 10.00 (activations about 7.00), code 0.25

million cycles by part        all   share       ms     forward  recomputed    backward
  mlp                      300.00   75.0%   199.60      100.00       20.00      180.00
  layer norm               100.00   25.0%    66.53       80.00        0.00       20.00
  sum                      400.00           266.14
  of these in Pallas kernels: 48 x attention_backward 25.00

collectives, links of 50 GB/s, 3.125 between slices      times       MiB      ms  exposed
  all-reduce f32 over data (gradients, async)               12     100.0   30.00    20.00
  1 more, below 0.01 ms                                      7

FLOPs of the model: 7.5e+08 a token (6 x (weights of products) + 12 x layers x width x context), 7.864e+14 a step
modeled step: 200.0 ms = 180.0 computing + 20.0 waiting for collectives
5,242,880 tokens/s; MFU 12.5% of 197 TFLOP/s a device (13.9% without collectives)
run of 100 epochs: 18,000 steps, 1 hours, 16 chip-hours, 19.20 at 1.2 a chip-hour
limited by work other than matrix products (40% of the cycles), the largest part of it in layer norm"""


def changed(**sections):
    """Returns the report with other values; those of a section, a dictionary, are added to it."""
    report = copy.deepcopy(REPORT)
    for name, value in sections.items():
        report[name] = report[name] | value if isinstance(value, dict) else value
    return report


def test_the_text_of_a_report():
    """A run of 18,000 steps of 0.2 s takes an hour on 16 chips, which cost 1.2 each."""
    assert describe(REPORT, price=1.2, steps=18_000) == TEXT


def test_a_run_of_unknown_length_has_the_cost_of_some_steps():
    """A thousand steps of 0.2 s on 16 chips are 3,200 seconds of a chip, and the list price of a v5e is 1.20."""
    last = describe(REPORT).splitlines()[-2]
    listed = "$1.07 at the list price of $1.20 a chip-hour (Google Cloud in us-central1, 2024-12)"
    hint = "give --corpus-tokens for the length of the run"
    assert last == f"run of 100 epochs: 1,000 steps take 0.8889 chip-hours, {listed}; {hint}"
    assert f"1,000 steps take 0.8889 chip-hours, 1.60 at 1.8 a chip-hour; {hint}" in describe(REPORT, price=1.8)
    unlisted = describe(changed(device_kind="TPU7x")).splitlines()[-2]
    assert unlisted == f"run of 100 epochs: 1,000 steps take 0.8889 chip-hours; {hint}"


def test_the_purpose_of_a_collective_is_left_out_if_it_is_unknown():
    collectives = [REPORT["collectives"][0] | {"kind": "all-gather", "part": "other", "direction": "forward"}]
    text = describe(changed(collectives=collectives, time={"exposed": 0.1}))
    assert "\n  all-gather f32 over data (async)   " in text
    assert text.splitlines()[-1].startswith("limited by collectives, above all the all-gather over data: give")
    assert "collectives, links of 50 GB/s; unknown between slices  " in describe(changed(links={"between_slices": 0.0}))
    assert "collectives, links of 50 GB/s    " in describe(changed(slices=1))


def test_a_device_alone():
    text = describe(changed(mesh={"slice": 1, "data": 1}, slices=1, chips=1, micro_batches=1, collectives=[], kernels=[]))
    assert "on v5e-8 (1 chip, TPU v5 lite), mesh one device, bfloat16\nbatch of 2,048 x 512 tokens, 128 sequences" in text
    assert "\n\nno collectives\n\nFLOPs of the model" in text
    assert "micro-batches" not in text
    assert "Pallas" not in text


def test_lines_fit_into_a_terminal_beside_each_other():
    """Numbers of a table stand below each other even if the names of its rows are long."""
    lines = describe(REPORT).splitlines()
    assert {len(line) for line in lines if "(gradients" in line or line.startswith("collectives")} == {89}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"time": {"exposed": 0.05}},
            "limited by collectives, above all the all-reduce over data (gradients): give each device more sequences (a larger "
            "--train.batch-size or fewer devices)",
        ),
        (
            {"memory": {"peak": 2**32}},
            "limited by small micro-batches: lower --train.grad-accum-steps; 75% of the memory is free",
        ),
        (
            {"choices": {"remat": "full"}, "recomputed_cycles": 80_000_000},
            "limited by recomputation (20% of the cycles): --model.remat dots takes more memory but less time",
        ),
        ({"choices": {"remat": "full"}, "recomputed_cycles": 59_000_000}, "limited by work other than"),
        ({"choices": {"remat": "dots"}, "recomputed_cycles": 80_000_000}, "limited by work other than"),
        (
            {"product_cycles": 300_000_000, "time": {"utilization_by_computation": 0.46}},
            "limited by matrix products, which take 75% of the cycles: this is close to what the chip can do",
        ),
        (
            {"product_cycles": 300_000_000, "time": {"utilization_by_computation": 0.3}},
            "limited by matrix products, which take 75% of the cycles but reach only 40% of the peak: wider layers ",
        ),
        (
            {"cycles": {"layer_norm": {"forward": 10**9}}, "micro_batches": 1, "memory": {"peak": 2**33}},
            "limited by work other than matrix products (82% of the cycles), the largest part of it in layer norm; 50%",
        ),
    ],
)
def test_advice(changes, sentence):
    assert advice(changed(**changes)).startswith(sentence)
    assert "_" not in advice(changed(**changes))


def test_free_memory_is_mentioned_if_it_is_much():
    assert advice(changed(time={"exposed": 0.05}, memory={"peak": 2**33})).endswith("fewer devices); 50% of the memory is free")
    assert "free" not in advice(changed(time={"exposed": 0.05}))


def test_the_text_of_a_fine_tuning():
    """A batch of 32 examples of two sequences each."""
    lines = describe(changed(verb="finetune", examples=32, sequences=64, micro_batches=1, sequences_per_device=4)).splitlines()
    assert lines[1].startswith(
        "batch of 32 examples of 2 sequences x 512 tokens (the longest allowed), 4 sequences a device; att"
    )
    assert lines[-2].endswith("; give --examples for the length of the run")


GENERATION = {
    "verb": "generate",
    "examples": 8,
    "sequences": 8,
    "length": 32,
    "new_tokens": 100,
    "devices": 1,
    "collectives": [],
    "kernels": [],
    "chips": 1,
    "flops": {"step": 3e12},
    "time": {"step": 0.101, "prompts": 0.001, "tokens_per_second": 8000.0, "utilization": 0.00123},
}


def test_the_text_of_a_generation():
    """116,534,784 weights of 2 bytes take 0.28 ms at 819 GB/s; after 1 ms, 100 tokens take 1 ms each.

    A million tokens at 8,000 a second take 125 seconds.
    """
    cycles = {"mlp": {"prompts": 1_500_000, "tokens": 120_000_000}, "other": {"prompts": 0, "tokens": 30_000_000}}
    text = describe(changed(**GENERATION) | {"cycles": cycles})
    assert "\n8 prompts of 32 tokens, each continued by 100 tokens\njax 1.2" in text
    assert "  mlp                      121.50   80.2%    80.84        1.50      120.00\n" in text
    expected = [
        "FLOPs of the model: 3e+12 in all (a third of those of training)",
        "modeled: 1.00 ms for the prompts, then 1.00 ms a token, of which reading the weights once takes 0.28",
        "101.0 ms in all; 8,000 new tokens/s for all prompts together; MFU 0.12%",
        "a million tokens: 0.0347 chip-hours, $0.04 at the list price of $1.20 a chip-hour "
        "(Google Cloud in us-central1, 2024-12), not counting prompts and sampling",
        "limited by work other than reading the weights; the largest part is mlp (80%)",
    ]
    assert text.splitlines()[-5:] == expected
    faster = GENERATION | {"examples": 1, "time": GENERATION["time"] | {"step": 0.051}}
    fast = describe(changed(**faster) | {"cycles": cycles}, 2.0)
    assert "\n1 prompt of 32 tokens, " in fast
    assert "\na million tokens: 0.0347 chip-hours, 0.07 at 2 a chip-hour, not counting" in fast
    assert fast.splitlines()[-1] == "limited by reading the weights: more prompts at once take little more time"


def test_an_lstm_has_neither_attention_nor_layers_to_unroll():
    text = describe(changed(model="lstm"))
    assert ", 128 sequences a device; remat dots, loss-chunk 128\n" in text
    assert "a token (6 x (weights of products)), 7.864e+14 a step" in text


def test_a_sum_of_several_kilobytes_is_one_of_gradients():
    """The compiler names a combined sum after one of its parts, which may be that of the loss, a scalar."""
    sums = [REPORT["collectives"][0] | {"part": "loss", "direction": "forward", "asynchronous": False}]
    assert "all-reduce f32 over data (gradients) " in describe(changed(collectives=sums))
    scalar = [sums[0] | {"bytes": 12 * 8}]
    assert "all-reduce f32 over data (loss, forward) " in describe(changed(collectives=scalar))


def test_memory_that_is_not_in_use_at_the_same_time():
    line = describe(changed(memory={"peak": 17 * 2**30, "alive": 12 * 2**30})).splitlines()[5]
    assert line.startswith("  17.00 of 16.00 (106%): parameters 0.50, ")
    assert line.endswith("; this still fits, because at most 12.00 GiB are in use at the same time")
    small = dict.fromkeys(("parameters", "moments", "temporaries", "code", "activations"), 0)
    assert describe(changed(memory={"peak": 2**20, **small})).splitlines()[5] == "  0.00 of 16.00 (0%): less than 0.01 each"
