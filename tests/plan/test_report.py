"""The report of a small step that libtpu compiled is worked out again from its parts, and its FLOPs from the traced program."""

import functools
import math

import jax
import pytest

from gpt_jax.config import DataConfig, MeshConfig, ModelConfig, PretrainConfig, TokenizerConfig, TrainConfig
from gpt_jax.config.load import load_config
from gpt_jax.plan import report as report_module
from gpt_jax.plan.costs import read_costs
from gpt_jax.plan.kernel_schedules import Schedule
from gpt_jax.plan.program import compile_program
from gpt_jax.plan.report import make_report
from gpt_jax.plan.workload import generation, pretraining
from gpt_jax.runtime.accelerators import parse_accelerator
from gpt_jax.runtime.sharding import make_mesh
from gpt_jax.train.flops import flops_per_token
from gpt_jax.train.step import LANGUAGE_MODEL, abstract_batch, abstract_state, train_step

V5E_4 = parse_accelerator("v5e-4")
CLOCK = 197e12 / 131_072
"""Cycles of the compiler in a second on a v5e: 1.5 GHz."""
SCHEDULES = {
    "attention_forward": Schedule(1000, 100),
    "attention_backward": Schedule(1000, 5000),
    "layer_norm_forward": Schedule(10, 0),
    "layer_norm_backward": Schedule(700, 0),
}
KERNELS = {  # executions and cycles; a device has 2 sequences of 128 tokens, and a pair of heads or 128 rows in a grid point
    "attention_forward": (2, 2 * 2 * 1000),
    "attention_backward": (2, 2 * 2 * 8 * 5000 / 4),
    "layer_norm_forward": (4, 4 * (2 * 2 * 128 * 128 * 2 + 2 * 128 * 4) / 819e9 * CLOCK),  # rows of bfloat16, gain and bias
    "layer_norm_backward": (4, 4 * 2 * 700),
}


def small(layers=2, batch=8, micro_batches=1, mesh=None, **fields):
    """Returns a pre-training of a model of width 128, which has 445,696 parameters."""
    sizes = {"vocab_size": 256, "context_length": 128, "embed_dim": 128, "num_heads": 2, "mlp_dim": 512}
    return PretrainConfig(
        model=ModelConfig(**{**sizes, "num_layers": layers, "compute_dtype": "bfloat16", **fields}),
        data=DataConfig(tokenizer=TokenizerConfig(kind="sentencepiece")),
        train=TrainConfig(batch_size=batch, grad_accum_steps=micro_batches, duration="20 steps"),
        mesh=mesh or MeshConfig(),
    )


@pytest.fixture
def schedules(monkeypatch):
    """The variants of kernels whose schedules were looked up, of which `SCHEDULES` has those of all."""
    asked = []
    monkeypatch.setattr(report_module, "find_schedule", lambda kernel: asked.append(kernel) or SCHEDULES[kernel.name])
    return asked


@pytest.fixture(scope="module")
def compile_small(tpu_devices):
    """The function `compile_program` for a v5e-4, after which the settings of JAX are as before."""
    settings = {name: getattr(jax.config, name) for name in ("jax_platforms", "jax_enable_compilation_cache")}
    yield lambda config: compile_program(pretraining(config), V5E_4)
    for name, value in settings.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def program(compile_small):
    return compile_small(small())


@pytest.fixture
def report(program, schedules):
    return make_report("small", program, V5E_4, 1)


# -- cycles and time ----------------------------------------------------------------------------------------------------------


def test_cycles_are_those_of_the_compiler_and_of_the_kernels(report, program):
    kernels = {each["name"]: (each["times"], each["cycles"]) for each in report["kernels"]}
    assert kernels == {name: (times, pytest.approx(cycles, abs=4)) for name, (times, cycles) in KERNELS.items()}
    total = sum(sum(by.values()) for by in report["cycles"].values())
    compiler = read_costs(program.text, program.mesh.shape).cycles
    assert compiler > 100_000
    assert total == pytest.approx(compiler + sum(cycles for _, cycles in KERNELS.values()), abs=10)


def test_every_part_is_found(report):
    """The kernels' parts contain the cycles of the kernels."""
    cycles = report["cycles"]
    parts = {"embedding", "attention", "projections", "mlp", "layer_norm", "loss", "optimizer", "other"}
    assert set(cycles) == parts
    assert list(cycles) == sorted(parts, key=lambda part: -sum(cycles[part].values()))
    assert cycles["attention"]["backward"] >= KERNELS["attention_backward"][1]
    assert cycles["layer_norm"]["backward"] >= KERNELS["layer_norm_backward"][1]
    assert report["recomputed_cycles"] == sum(by.get("recomputed", 0) for by in cycles.values())


def test_time_is_cycles_over_the_clock_and_waiting_for_the_gradients(report):
    """In an open torus of 2 x 2, a device receives from two neighbors, at 50 GB/s each."""
    time = report["time"]
    gradients = 4 * 445_696 + 4  # in float32, and the loss, for which another all-reduce exists
    assert {each["kind"] for each in report["collectives"]} == {"all-reduce"}
    assert sum(each["bytes"] for each in report["collectives"]) == pytest.approx(gradients, abs=16)
    exposed = 2 * 3 / 4 * gradients / 100e9
    assert time["exposed"] == pytest.approx(exposed, rel=1e-4)
    compute = sum(sum(by.values()) for by in report["cycles"].values()) / CLOCK
    assert time["compute"] == pytest.approx(compute)
    assert time["step"] == pytest.approx(compute + exposed, rel=1e-4)
    assert time["tokens_per_second"] == pytest.approx(8 * 128 / time["step"])
    flops = 6 * (2 * 12 * 128**2 + 256 * 128) + 12 * 2 * 128 * 128
    assert report["flops"] == {"token": flops, "step": flops * 8 * 128}
    assert time["utilization"] == pytest.approx(flops * 8 * 128 / time["step"] / (4 * 197e12))
    assert time["utilization_by_computation"] == pytest.approx(flops * 8 * 128 / compute / (4 * 197e12))


def test_the_report_names_what_was_planned(report, program):
    expected = {
        "config": "small",
        "accelerator": "v5e-4",
        "slices": 1,
        "chips": 4,
        "devices": 4,
        "mesh": {"slice": 1, "data": 4, "fsdp": 1, "tensor": 1},
        "choices": {"attention": "pallas_tpu", "remat": "dots", "layer_unroll": 2, "loss_chunk": 128},
        "verb": "pretrain",
        "examples": 8,
        "sequences": 8,
        "length": 128,
        "micro_batches": 1,
        "sequences_per_device": 2,
        "num_parameters": 445_696,
        "duration": "20 steps",
    }
    assert {name: report[name] for name in expected} == expected
    activations = report["memory"]["activations"]  # There may be no temporaries.
    assert report["memory"] == program.memory | {"available": int(15.75 * 2**30), "activations": activations}
    assert activations <= program.memory["temporaries"]


def test_activations_are_counted_among_the_temporaries(program, schedules):
    pretended = program._replace(memory=program.memory | {"temporaries": 2**30})
    kept = 2 * 128 * (2 * (7 * 128 + 512) * 2 + 2 * 2 * 4)  # 2 sequences; in each of 2 layers, 7 arrays of width 128, one of 512
    outside = 2 * 128 * 128 * (3 * 2 + 4 + 1)
    assert make_report("", pretended, V5E_4, 1)["memory"]["activations"] == kept + outside


def test_each_schedule_is_looked_up_once(report, schedules):
    assert sorted(kernel.name for kernel in schedules) == sorted(KERNELS)
    assert {kernel.name for kernel in schedules if kernel.dropout} == KERNELS.keys() - {"layer_norm_forward"}
    assert {(kernel.chip, kernel.dtype, kernel.time) for kernel in schedules} == {("TPU v5 lite", "bfloat16", 128)}
    assert {kernel.name: (kernel.dim, kernel.embed) for kernel in schedules} == {
        **dict.fromkeys(("attention_forward", "attention_backward"), (64, 0)),
        **dict.fromkeys(("layer_norm_forward", "layer_norm_backward"), (0, 128)),
    }


def test_kernels_compute_a_micro_batch_and_the_heads_of_a_device(program, schedules):
    """A pretended program of 4 times the batch in 8 micro-batches on 2 x 2 devices, of which each has 2 of 3 or 6 heads."""
    mesh = make_mesh(MeshConfig(data=2, tensor=2), list(program.mesh.devices.flat))
    config = small(batch=32, micro_batches=8, num_heads=6, embed_dim=384, remat="dots")
    pretended = make_report("", program._replace(mesh=mesh, workload=pretraining(config)), V5E_4, 1)
    cycles = {each["name"]: each["cycles"] for each in pretended["kernels"]}
    assert cycles["attention_backward"] == 2 * (2 * 2) * 8 * 5000 / 4  # 2 sequences, and 3 heads, which are 2 groups
    assert [kernel.lacks_head for kernel in schedules if kernel.name == "attention_forward"] == [True]
    assert (pretended["micro_batches"], pretended["sequences_per_device"]) == (8, 16)


# -- operations ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "flops"),
    [
        # GPT-1: 84.93 million weights in layers, 31.09 million in the output layer
        (load_config("gpt1").model, 6 * (12 * (4 * 768 * 768 + 2 * 768 * 3072) + 40_478 * 768) + 12 * 12 * 768 * 512),
        (small(layers=5).model, 6 * (5 * 12 * 128 * 128 + 256 * 128) + 12 * 5 * 128 * 128),
        (small(context_length=2048, mlp_dim=100).model, 6 * (2 * (65_536 + 25_600) + 32_768) + 12 * 2 * 128 * 2048),
        # gates of four times the units from the input and the last output, which is projected back to the width
        (small(kind="lstm", lstm_units=200).model, 6 * (800 * 128 + 800 * 200 + 200 * 128 + 256 * 128)),
    ],
)
def test_flops_of_a_token_are_counted_by_hand(model, flops):
    assert flops_per_token(model) == flops


def product_flops(jaxpr, devices=1):
    """Returns the operations of all matrix products in a traced program, loops multiplied out.

    Args:
      devices: number of devices that execute what is mapped over shards.
    """
    flops = 0
    for equation in jaxpr.eqns:
        values = jax.tree.leaves(tuple(equation.params.values()))
        inner = [product_flops(value, devices) for value in values if hasattr(value, "eqns")]
        name = equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            flops += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        elif name == "while":
            assert sum(inner) == 0, "a loop of unknown length has products"
        elif name == "cond":
            flops += min(inner)  # The loss has a branch for improbable targets.
        else:
            flops += sum(inner) * {"scan": equation.params.get("length"), "shard_map": devices}.get(name, 1)
    return flops


def traced_flops(config, devices=1):
    """Returns the operations of the products in a step, on simulated CPU devices."""
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    step = functools.partial(train_step, config, LANGUAGE_MODEL, 1, 0.0)
    with jax.set_mesh(mesh):
        jaxpr = jax.make_jaxpr(step)(abstract_state(config, mesh), abstract_batch(config, mesh))
    return product_flops(jaxpr.jaxpr, devices)


PLAIN = {"attention": "plain", "remat": "off", "loss_chunk": 32}


@pytest.mark.parametrize(
    ("config", "devices"),
    [
        (small(**PLAIN, layer_unroll=2), 1),
        (small(**PLAIN, layer_unroll=1, layers=5), 1),
        (small(**PLAIN, layer_unroll=1, context_length=384), 1),
        (small(**PLAIN, layer_unroll=1, micro_batches=4), 1),
        (small(**PLAIN, layer_unroll=1), 4),
        (small(**PLAIN, layer_unroll=1, mesh=MeshConfig(data=2, fsdp=2, tensor=2), micro_batches=2), 8),
        (small(**PLAIN, layer_unroll=1, kind="lstm", lstm_units=512), 1),
    ],
)
def test_the_products_of_a_traced_step_are_the_flops_of_its_tokens(config, devices):
    tokens = config.train.batch_size * config.model.context_length
    assert traced_flops(config, devices) == pytest.approx(flops_per_token(config.model) * tokens, rel=0.01)


def test_recomputation_is_not_in_the_flops_of_the_model():
    """With `full`, the forward pass of the layers runs twice."""
    config = small(**{**PLAIN, "remat": "full"}, layer_unroll=1)
    tokens = 8 * 128
    again = 2 * (2 * 12 * 128**2 + 2 * 2 * 128 * 128) * tokens
    assert traced_flops(config) - flops_per_token(config.model) * tokens == pytest.approx(again, rel=0.01)


@pytest.mark.slow
def test_cycles_of_a_loop_over_layers_are_linear_in_their_number(compile_small, schedules):
    def cycles(layers):
        program = compile_small(small(layers=layers, layer_unroll=1))
        return sum(sum(by.values()) for by in make_report("", program, V5E_4, 1)["cycles"].values())

    four, eight, twelve = map(cycles, (4, 8, 12))
    assert four < 0.75 * eight
    assert twelve == pytest.approx(2 * eight - four, rel=0.01)


# -- other programs -----------------------------------------------------------------------------------------------------------


def test_the_time_of_a_generation_grows_by_the_same_for_each_token(tpu_devices, schedules):
    """The prompts and 10 or 20 tokens; the number of tokens is an argument of the program, not a constant in it."""
    compiled = compile_program(generation(small(), "2x16+20"), parse_accelerator("v5e-1"))
    both = make_report("small", compiled, parse_accelerator("v5e-1"), 1)
    ten = make_report(
        "small", compiled._replace(workload=compiled.workload._replace(new_tokens=10)), parse_accelerator("v5e-1"), 1
    )
    time, token = both["time"], (both["time"]["step"] - both["time"]["prompts"]) / 20
    assert 0 < time["prompts"] == ten["time"]["prompts"] < time["step"]
    assert ten["time"]["step"] == pytest.approx(time["prompts"] + 10 * token)
    assert time["tokens_per_second"] == pytest.approx(2 / token)
    assert time["compute"] == pytest.approx(sum(sum(by.values()) for by in both["cycles"].values()) / CLOCK)
    assert set().union(*both["cycles"].values()) == {"prompts", "tokens"}
    assert both["memory"]["moments"] == 0
    assert both["memory"]["parameters"] == 4 * 445_696
