"""The estimates without a compiler are worked out by hand for GPT-1."""

import jax
import pytest

from gpt_jax.config import DataConfig, MeshConfig, ModelConfig, PretrainConfig, TokenizerConfig, TrainConfig
from gpt_jax.config.load import apply_overrides, load_config
from gpt_jax.errors import UserError
from gpt_jax.plan.arithmetic import describe_arithmetic, estimate
from gpt_jax.plan.workload import pretraining, workload_of
from gpt_jax.runtime.accelerators import parse_accelerator
from gpt_jax.runtime.mesh import mesh_sizes
from gpt_jax.runtime.sharding import make_mesh
from gpt_jax.train.step import lower_step

WEIGHTS = 12 * (4 * 768 * 768 + 2 * 768 * 3072) + 40_478 * 768
"""Weights of GPT-1 in matrix products: twelve layers and the output layer."""
FLOPS = 6 * WEIGHTS + 12 * 12 * 768 * 512
"""FLOPs of a token of GPT-1."""
PARAMETERS = 116_534_784
PADDED = PARAMETERS + 98 * 768
"""Parameters with the rows that pad the table to a multiple of 128."""
KEPT = 12 * (2 * (7 * 768 + 3072) + 4 * 12) + 3 * 2 * 768 + 4 * 768 + 768
"""Bytes that are kept of each token with `remat dots`.

Of each layer, these are 7 arrays as wide as the embedding and the input of GELU in bfloat16, and a float32 number for each head;
outside of the layers, three arrays in bfloat16, one in float32, and a dropout mask.
"""


def inputs(topology, *overrides, slices=1):
    config = apply_overrides(load_config("gpt1"), [f"--{each}" for each in overrides], "test")
    accelerator = parse_accelerator(topology)
    return config, accelerator, mesh_sizes(config.mesh, accelerator, slices)


def figures_of(topology, *overrides, slices=1):
    return estimate(*inputs(topology, *overrides, slices=slices))


def text_of(topology, *overrides, slices=1):
    config, *_ = inputs(topology, *overrides, slices=slices)
    return describe_arithmetic(
        "gpt1", pretraining(config), figures_of(topology, *overrides, slices=slices), "the run"
    ).splitlines()


# -- matrix products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topology", "overrides", "teraflops", "dtype"),
    [
        ("v5e-8", [], 8 * 197, "bfloat16"),
        ("v5p-16", [], 8 * 459, "bfloat16"),
        ("7x-8", [], 4 * 2307, "bfloat16"),  # four chips
        ("v6e-1", [], 918, "bfloat16"),
        ("v6e-1", ["model.compute-dtype=float32"], 918, "bfloat16, 1 for each float32 product"),
        ("v6e-1", ["model.compute-dtype=float32", "model.matmul-precision=high"], 306, "bfloat16, 3 for each float32 product"),
        ("v6e-1", ["model.compute-dtype=float32", "model.matmul-precision=highest"], 153, "bfloat16, 6 for each float32 product"),
        ("l4-4", [], 4 * 121, "bfloat16"),
        ("a100-1", [], 312, "bfloat16"),
        ("a100-80gb-2", [], 2 * 312, "bfloat16"),
        ("h100-8", [], 8 * 989.4, "bfloat16"),
        ("h200-8", [], 8 * 989.4, "bfloat16"),
        ("b200-8", [], 8 * 2250, "bfloat16"),
        ("a100-1", ["model.compute-dtype=float32"], 156, "tf32"),
        ("a100-1", ["model.compute-dtype=float32", "model.matmul-precision=high"], 156, "tf32"),
        ("a100-1", ["model.compute-dtype=float32", "model.matmul-precision=highest"], 19.5, "float32"),
        ("b200-1", ["model.compute-dtype=float32"], 2250, "bfloat16, because no figure for tf32 is known"),
    ],
)
def test_products_take_as_long_as_at_the_peak_of_their_dtype(topology, overrides, teraflops, dtype):
    figures = figures_of(topology, "train.batch-size=16", *overrides)
    assert figures.flops == FLOPS * 16 * 512
    assert figures.products == pytest.approx(FLOPS * 16 * 512 / (teraflops * 1e12))
    assert figures.peak_name == dtype


def test_full_recomputation_repeats_the_forward_pass_of_the_layers():
    """The forward pass takes 2 of the 6 FLOPs for each weight; the output layer has 40,478 x 768 weights."""
    again = 2 * (WEIGHTS - 40_478 * 768) + 4 * 12 * 768 * 512
    figures = figures_of("v5e-8", "train.batch-size=256", "model.remat=full")
    assert figures.flops == FLOPS * 256 * 512
    assert figures.step == figures.products == pytest.approx((FLOPS + again) * 32 * 512 / 197e12)
    assert figures.utilization == pytest.approx(FLOPS / (FLOPS + again))
    assert figures.tokens_per_second == pytest.approx(8 * 197e12 / (FLOPS + again))
    assert any(", counting the layers' forward pass twice" in line for line in text_of("v5e-8", "model.remat=full"))
    for overrides in (["model.remat=dots"], ["model.remat=full", "model.layer-unroll=12"]):  # The latter has no loop.
        assert figures_of("v5e-8", "train.batch-size=256", *overrides).utilization == pytest.approx(1)


# -- memory -----------------------------------------------------------------------------------------------------------------


def test_the_memory_by_kind():
    """Parameters, two moments and gradients have 4 bytes each."""
    figures = figures_of("h100-8", "train.batch-size=256")
    parameters, moments, gradients, activations, temporaries = figures.memory
    assert (parameters, moments, gradients) == (4 * PADDED, 8 * PADDED, 4 * PADDED)
    assert activations == 32 * 512 * KEPT
    # The parameters in bfloat16, the gradient of the table, and probabilities of 32 x 12 heads.
    assert temporaries > 2 * PADDED + 4 * 40_576 * 768 + 12 * 32 * 12 * 512 * 512
    split = figures_of("h100-8", "train.batch-size=256", "mesh.data=1", "mesh.fsdp=8", "train.grad-accum-steps=4").memory
    assert split.moments == pytest.approx(PADDED, rel=0.01)  # Layer norms and some biases are whole.
    assert split.gradients == split.moments  # two sets
    assert split.activations == activations // 4


@pytest.mark.parametrize(
    ("topology", "bandwidth", "probabilities"),
    [
        ("l4-8", 300, True),
        ("a100-8", 1555, True),
        ("a100-80gb-8", 2039, True),
        ("h100-8", 3350, True),
        ("h200-8", 4800, True),
        ("b200-8", 8000, True),
        ("v5e-8", 819, False),
        ("v5p-16", 2765, False),
    ],
)
def test_the_traffic_of_the_memory(topology, bandwidth, probabilities):
    """16 sequences a device; TPUs have kernels that keep no probabilities."""
    figures = figures_of(topology, "train.batch-size=128")
    expected = {
        "optimizer": (4 + 8 + 4 + 4 + 8) * PADDED,  # reads parameters, moments and gradients; writes parameters and moments
        "gradients": 4 * PADDED,
        "weights": 2 * 2 * PARAMETERS,
        "activations": 2 * 16 * 512 * KEPT,
    }
    if probabilities:
        expected["probabilities"] = 2 * 2 * 2 * 16 * 12 * 12 * 512 * 512  # they and their gradients, in bfloat16
    assert figures.traffic == expected
    assert figures.bounds["memory"] == pytest.approx(sum(expected.values()) / (bandwidth * 1e9))


def test_micro_batches_read_the_weights_and_add_gradients_again():
    whole, parts = (figures_of("v5e-8", "train.batch-size=128", f"train.grad-accum-steps={k}").traffic for k in (1, 4))
    assert parts["weights"] == 4 * whole["weights"]
    assert parts["gradients"] == 4 * 2 * whole["gradients"]
    assert (parts["optimizer"], parts["activations"]) == (whole["optimizer"], whole["activations"])
    full = figures_of("v5e-8", "train.batch-size=128", "model.remat=full").traffic
    assert full["weights"] == 1.5 * whole["weights"]
    assert full["activations"] < whole["activations"] / 4


@pytest.mark.parametrize("remat", ["off", "dots", "full"])
def test_no_step_does_less(remat):
    """XLA counts the operations and bytes of the step that it compiles for a CPU, whose arrays are those of a GPU."""
    sizes = {"vocab_size": 384, "context_length": 128, "num_layers": 1, "embed_dim": 128, "num_heads": 2, "mlp_dim": 512}
    model = ModelConfig(**sizes, compute_dtype="float32", attention="plain", remat=remat, loss_chunk=128)
    data = DataConfig(tokenizer=TokenizerConfig(kind="sentencepiece"))
    config = PretrainConfig(model=model, data=data, train=TrainConfig(batch_size=8))
    counted = lower_step(config, make_mesh(MeshConfig(), jax.devices()[:1])).compile().cost_analysis()
    figures = estimate(config, parse_accelerator("h100-1"), {"slice": 1, "data": 1, "fsdp": 1, "tensor": 1})
    assert 0.75 * counted["flops"] < figures.products * figures.peak < counted["flops"]
    assert counted["bytes accessed"] / 16 < sum(figures.traffic.values()) < counted["bytes accessed"]


# -- collectives ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topology", "gigabytes"),
    [
        ("v5e-8", 2 * 50),  # 2 x 4 chips: one link of 50 GB/s along each axis at a corner
        ("v5e-256", 4 * 50),  # 16 x 16 chips are a torus
        ("v6e-8", 2 * 100),
        ("v5p-16", 3 * 100),  # 2 x 2 x 2 chips
        ("v5p-128", 6 * 100),  # a cube of 4 x 4 x 4 chips, whose axes are closed
        ("v4-8", 2 * 50),  # 2 x 2 x 1 chips
        ("7x-8", 2 * 100),  # 2 x 2 x 1 chips, two devices each
        ("a100-8", 300),
        ("l4-4", 32),
    ],
)
def test_gradients_are_summed_at_the_bandwidth_of_all_links(topology, gigabytes):
    (transfer,) = figures_of(topology, "train.batch-size=256").transfers
    devices = parse_accelerator(topology).devices
    assert (transfer.kind, transfer.axis, transfer.times) == ("all-reduce", "data", 1)
    assert transfer.received == pytest.approx(2 * 4 * PARAMETERS * (devices - 1) / devices)
    assert transfer.seconds == pytest.approx(transfer.received / (gigabytes * 1e9))


@pytest.mark.parametrize(("topology", "gigabytes"), [("h100-8", 450), ("h200-4", 450), ("b200-8", 900), ("b200-2", 900)])
def test_switches_that_add_send_each_sum_once(topology, gigabytes):
    (transfer,) = figures_of(topology, "train.batch-size=64").transfers
    assert transfer.seconds == pytest.approx(4 * PARAMETERS / (gigabytes * 1e9))


def test_the_collectives_of_a_mesh_with_all_axes():
    """Two micro-batches of 32 sequences a device; half of the weights are on each of two devices."""
    mesh = [f"mesh.{axis}=2" for axis in ("slice", "data", "fsdp", "tensor")]
    figures = figures_of("v5e-8", "train.batch-size=512", "train.grad-accum-steps=2", *mesh, slices=2)
    half, activations = PARAMETERS / 2, 32 * 512 * 768
    received = [
        ("all-gather", "fsdp", 2 * 2, 2 * half / 2, 100),  # in bfloat16, for two passes
        ("reduce-scatter", "fsdp", 2, 4 * half / 2, 100),
        ("all-reduce", "data", 2, 2 * 4 * half / 2 / 2, 100),
        ("all-reduce", "slice", 2, 2 * 4 * half / 2 / 2 / 2, 6400 / 256 / 8),  # the data center network
        ("all-reduce", "tensor", 4 * 12 * 2, 2 * 2 * activations / 2, 100),
    ]
    assert [(each.kind, each.axis, each.times) for each in figures.transfers] == [
        (kind, axis, n) for kind, axis, n, *_ in received
    ]
    for transfer, (_, _, times, size, gigabytes) in zip(figures.transfers, received, strict=True):
        assert transfer.received == pytest.approx(size)
        assert transfer.seconds == pytest.approx(times * size / (gigabytes * 1e9))
    total = sum(times * size / (gigabytes * 1e9) for _, _, times, size, gigabytes in received)
    products = FLOPS * 512 * 512 / (16 * 197e12)
    assert figures.bounds["collectives"] == pytest.approx(total)
    assert figures.step == pytest.approx(max(products, total))
    assert figures.step_without_overlap == pytest.approx(products + total)


def test_a_bandwidth_that_is_not_published_takes_no_time():
    inside, between = figures_of("v4-16", "train.batch-size=64", "mesh.slice=2", slices=2).transfers
    assert (inside.axis, between.axis, between.seconds) == ("data", "slice", 0)
    lines = text_of("v4-16", "train.batch-size=64", "mesh.slice=2", slices=2)
    assert "    unknown    all-reduce over slice (gradients): 1 x 58.3 MB" in lines
    assert "on 2 x v4-16 (TPU v4), mesh slice=2 x data=8, attention pallas_tpu" in lines[0]


# -- the LSTM ---------------------------------------------------------------------------------------------------------------

LSTM_WEIGHTS = 4 * 2048 * (768 + 2048) + 2048 * 768 + 40_478 * 768
"""Weights of four gates with 768 inputs and 2,048 states, of the projection, and of the output layer."""
LSTM_PARAMETERS = LSTM_WEIGHTS + 4 * 2048 + 768


@pytest.mark.parametrize("topology", ["h100-8", "v5e-8"])
def test_an_lstm(topology):
    """Biases are parameters, too. What an LSTM keeps for the backward pass is not estimated."""
    figures = figures_of(topology, "model.kind=lstm", "train.batch-size=64")
    padded = LSTM_PARAMETERS + 98 * 768
    assert figures.flops == 6 * LSTM_WEIGHTS * 64 * 512
    assert figures.memory == (4 * padded, 8 * padded, 4 * padded, 0, 0)
    assert figures.traffic == {"optimizer": 28 * padded, "gradients": 4 * padded, "weights": 4 * LSTM_PARAMETERS}
    text = "\n".join(text_of(topology, "model.kind=lstm", "train.batch-size=64"))
    assert f"{LSTM_PARAMETERS:,} parameters" in text
    assert "; activations of an LSTM are not estimated" in text
    assert "(6 x (weights of products)), " in text
    assert "attention" not in text
    assert "over tensor" not in text
    split = text_of(topology, "model.kind=lstm", "train.batch-size=64", "mesh.data=4", "mesh.tensor=2")
    assert any(line.endswith("collectives, not counting those of an LSTM over tensor") for line in split)


# -- fine-tuning ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lm_weight", [0.5, 0.0])
def test_a_fine_tuning(lm_weight):
    """32 stories with two endings, and sequences of 128 tokens. Without a language-model loss, there is no output layer."""
    overrides = ["init.from=none", "init.like=gpt1", "task.max-tokens=128", f"task.lm-weight={lm_weight}"]
    config = apply_overrides(load_config("finetune/story_cloze"), [f"--{each}" for each in overrides], "test")
    workload, accelerator = workload_of(config, None), parse_accelerator("a100-8")
    figures = estimate(workload.as_pretraining, accelerator, workload.mesh_sizes(accelerator, 1))
    table = (40_478 + 3) * 768  # with the special tokens
    products = WEIGHTS + (3 if lm_weight else -40_478) * 768
    assert figures.flops == workload.flops == (6 * products + 12 * 12 * 768 * 128) * 64 * 128
    assert figures.sequences == 8
    parameters = PARAMETERS + 3 * 768 - (512 - 128) * 768  # Positions beyond the sequences are not counted.
    assert figures.traffic["weights"] == 2 * 2 * (parameters - (0 if lm_weight else table))
    assert figures.memory.activations == 8 * 128 * KEPT


# -- text -------------------------------------------------------------------------------------------------------------------


def test_the_text_of_a_node_with_gpus():
    memory = "0.43, moments 0.87, gradients 0.43, activations 3.23, temporaries 2.16"
    traffic = "optimizer 3.27, gradients 0.466, weights 0.466, activations 6.94, probabilities 9.66"
    assert text_of("h100-8", "train.batch-size=256") == [
        "gpt1: 116,534,784 parameters on h100-8 (NVIDIA H100 80GB HBM3), mesh data=8, attention plain",
        "batch of 256 x 512 tokens, 32 sequences a device; remat dots",
        "",
        "memory of a device, estimated from shapes, GiB",
        f"  7.13 of 59.74 (12%): parameters {memory}",
        "",
        "lower bounds in milliseconds",
        "      12.47  matrix products at 989.4 TFLOP/s a device (bfloat16)",
        f"       6.21  memory at 3350 GB/s; GB: {traffic}",
        "       1.04  collectives",
        "       1.04    all-reduce over data (gradients): 1 x 466.1 MB",
        "",
        "FLOPs of the model: 7.528e+08 a token (6 x (weights of products) + 12 x layers x width x context), 9.866e+13 a step",
        "a step takes at least 12.5 ms, or 13.5 if no collective overlaps with other work; "
        "these are lower bounds, not predictions",
        "at most 10,514,994 tokens/s; MFU at most 100.0% of 989.4 TFLOP/s a device",
        "the run",
        "the longest bound is that of matrix products (steps for GPUs are not compiled)",
    ]


@pytest.mark.parametrize(
    ("topology", "overrides", "mesh", "second", "milliseconds"),
    [
        # 256 x 512 tokens of 752.8 million FLOPs on 8 chips of 197 TFLOP/s
        (
            "v5e-8",
            ["train.batch-size=256"],
            "mesh data=8",
            "batch of 256 x 512 tokens, 32 sequences a device; remat dots",
            "62.6 ms, or 70.8 if no",
        ),
        (
            "v6e-1",
            ["train.batch-size=1"],
            "mesh one device",
            "batch of 1 x 512 tokens, 1 sequence a device; remat dots",
            "2.7 ms; these are lower bounds",
        ),
        (
            "v5e-8",
            ["train.batch-size=256", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "train.grad-accum-steps=2"],
            "mesh data=2 x fsdp=2 x tensor=2",
            "batch of 256 x 512 tokens in 2 micro-batches, 64 sequences a device; remat dots",
            "62.6 ms, or 93.8 if no",
        ),
    ],
)
def test_the_text_of_a_slice(topology, overrides, mesh, second, milliseconds):
    lines = text_of(topology, *overrides)
    assert lines[0].startswith(f"gpt1: 116,534,784 parameters on {topology} (TPU v")
    assert f"), {mesh}, attention pallas_tpu" in lines[0]
    assert lines[1] == second
    assert any(line.startswith(f"a step takes at least {milliseconds}") for line in lines)
    assert " (libtpu is not installed, so nothing was compiled; " in lines[-1]


@pytest.mark.parametrize(
    ("topology", "overrides", "sentence"),
    [
        ("v5e-8", ["batch-size=256"], "matrix products"),
        ("v5e-8", ["batch-size=8"], "collectives, mainly of the all-reduce over data: give each device more sequences, or"),
        ("v5e-1", ["batch-size=1"], "memory, mainly of the optimizer: give each device more sequences"),
        ("l4-1", ["batch-size=4"], "memory, mainly of the probabilities: use another --model.attention"),
    ],
)
def test_what_limits_a_step(topology, overrides, sentence):
    long = ["model.context-length=4096", "model.remat=dots"] if topology == "l4-1" else []
    (line,) = [line for line in text_of(topology, *(f"train.{each}" for each in overrides), *long) if "longest" in line]
    assert line.startswith(f"the longest bound is that of {sentence}")


def test_what_exceeds_the_memory_of_a_program_is_refused():
    """JAX allocates three quarters of the memory of a GPU."""
    with pytest.raises(UserError, match=r"about 73\.\d+ GiB .* more than the 59\.74 GiB that a step can use on each NVIDIA H100"):
        text_of("h100-1", "train.batch-size=450", "model.remat=dots")


# -- bad input --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topology", "overrides", "problem"),
    [
        ("v5e-8", ["train.batch-size=8192"], "--train.batch-size: 8192 is 1024 sequences a device, which need about 44.9"),
        ("h100-8", ["train.batch-size=65536"], "--train.batch-size: 65536 is 8192 sequences a device, which need about "),
        (
            "l4-1",
            ["train.batch-size=512", "model.remat=off"],
            "--train.batch-size: 512 is 512 sequences a device, which with --model.remat off need ",
        ),
        ("h100-8", ["train.batch-size=12"], "--train.batch-size: 12 does not split evenly over slice x data x fsdp = 8; 8 or 16"),
        ("a100-8", ["mesh.data=1", "mesh.tensor=8"], "--mesh.tensor: 8 does not divide model.num-heads 12; "),
        ("h100-4", ["model.attention=pallas_tpu"], "--model.attention: pallas_tpu runs on TPUs, and the devices are GPUs"),
        ("cpu-4", [], "--topology: cpu-4 has only CPUs; name TPUs or GPUs, such as v5e-8 or h100-8"),
    ],
)
def test_what_cannot_run_is_an_error_in_one_line(topology, overrides, problem):
    with pytest.raises(UserError) as caught:
        text_of(topology, *overrides)
    assert str(caught.value).startswith(problem)
    assert "\n" not in str(caught.value)
