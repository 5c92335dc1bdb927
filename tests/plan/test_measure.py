"""Modeled and measured steps: the comparison, its text, and errors. No test depends on how long something takes."""

import re

import jax
import pytest

from gpt_jax.config import DataConfig, MeshConfig, ModelConfig, PretrainConfig, TokenizerConfig, TrainConfig
from gpt_jax.errors import TrainingError, UserError
from gpt_jax.plan import measure as measure_module
from gpt_jax.plan.attribution import part_of
from gpt_jax.plan.measure import compare_parts, describe_measured, measure, measured_parts
from gpt_jax.runtime.chips import CHIPS
from gpt_jax.runtime.sharding import make_mesh
from gpt_jax.train.choices import choose_for
from tests.plan.hlo_text import line, module
from tests.plan.rates_by_hand import rates


def config(**mesh):
    model = ModelConfig(vocab_size=512, context_length=16, num_layers=2, embed_dim=32, num_heads=2, mlp_dim=64)
    data = DataConfig(tokenizer=TokenizerConfig(kind="sentencepiece"))
    return PretrainConfig(model=model, data=data, train=TrainConfig(batch_size=8), mesh=MeshConfig(**mesh))


# Python 3.12 warns about a type of jaxlib's profiler.
pytestmark = pytest.mark.filterwarnings("ignore:builtin type")


@pytest.fixture(autouse=True)
def known_rates(monkeypatch):
    monkeypatch.setattr(measure_module, "find_rates", lambda log: rates(call=0.5, other_load=0.25))


def test_a_step_is_modeled_and_measured(monkeypatch):
    result = measure("small", config())
    assert result["devices"] == 8  # of the tests
    assert result["fastest"] <= result["measured"] <= result["slowest"]
    assert result["modeled"] > 0.5  # the call alone
    assert result["error"] == pytest.approx(result["modeled"] / result["measured"] - 1)
    assert result["tokens_per_second"] == pytest.approx(8 * 16 / result["measured"])
    assert result["flops"] == pytest.approx(result["expected_flops"], rel=0.1)  # The formula leaves some products out.
    assert result["unmodeled"].keys() == {"all-reduce"}  # These rates have none.
    parts = result["parts"]
    assert sum(row["measured"] for row in parts.values()) == pytest.approx(result["measured"])
    assert sum(row["modeled"] for row in parts.values()) == pytest.approx(result["modeled"] - 0.5)
    for part in ("attention", "mlp", "loss", "optimizer"):
        assert min(parts[part].values()) > 0
    text = describe_measured(result)
    assert re.search(r"not modeled, and counted as 0 s: \d+ x all-reduce\n", text)


def test_operations_that_run_together_divide_the_time_among_them():
    events = [("a", 0.0, 4.0), ("b", 2.0, 6.0), ("c", 8.0, 10.0), ("unknown", 8.0, 10.0)]
    scopes = {"a": "jit(f)/mlp/dot", "b": "jit(f)/loss/exp", "c": "jit(f)/mlp/add"}
    assert measured_parts(events, scopes, part_of) == {"mlp": 0.5, "loss": 3 / 8, "other": 1 / 8}
    assert measured_parts([], scopes, part_of) == {}


def test_two_executions_of_one_operation_at_once_count_as_two():
    events = [("a", 0.0, 2.0), ("a", 0.0, 2.0), ("b", 0.0, 2.0)]
    shares = measured_parts(events, {"a": "mlp", "b": "loss"}, part_of)
    assert shares == {"mlp": pytest.approx(2 / 3), "loss": pytest.approx(1 / 3)}


def test_parts_are_compared_in_the_order_of_their_measured_time():
    rows = compare_parts({"mlp": 1.0, "scan": 0.5}, {"mlp": 0.25, "loss": 0.75}, 2.0)
    assert list(rows) == ["loss", "mlp", "scan"]
    assert rows["mlp"] == {"modeled": 1.0, "measured": 0.5}
    assert rows["scan"] == {"modeled": 0.5, "measured": 0.0}
    assert compare_parts({"mlp": 1.0}, {}, 2.0) == {}


RESULT = {
    **{"config": "demo", "device": "some processor", "cores": 2, "devices": 1, "jax": "1.2.3", "batch_size": 8},
    **{"context_length": 128, "num_parameters": 1_234_567, "steps": 9, "measured": 0.2, "fastest": 0.19, "slowest": 0.25},
    **{"modeled": 0.19, "error": -0.05, "unmodeled": {}, "flops": 2e9, "expected_flops": 1.9e9, "tokens_per_second": 5120.0},
    **{"parts": {"layer_norm": {"modeled": 0.03, "measured": 0.05}}, "other_load": 0.3, "rates_load": 0.0},
}


def test_the_text_shows_both_times_and_the_error_of_each_part():
    assert describe_measured(RESULT).splitlines() == [
        "demo: 1,234,567 parameters, batch of 8 x 128 tokens, on 1 x some processor, 2 cores; jax 1.2.3",
        "modeled step:      190.00 ms",
        "measured step:     200.00 ms, the median of 9 (190.00 to 250.00); 5,120 tokens/s",
        "error of the model: -5.0%",
        "FLOPs of products: 2e+09 in the program, 1.9e+09 by the formula",
        "",
        "ms by part             modeled  measured  difference",
        "  layer norm             30.00     50.00      -10.0%",
        "  differences are shares of the step",
        "every instruction is modeled",
        "other programs during the steps: 0.30 cores busy on average",
        "other programs during the measurement of the device's rates: 0.00 cores busy on average",
    ]


def test_the_text_says_what_is_not_known():
    unknown = RESULT | {"cores": None, "parts": {}, "other_load": None, "rates_load": None, "unmodeled": {"fft": 2, "sort": 1}}
    text = describe_measured(unknown)
    assert not re.search("ms by part|cores;", text)
    assert "not modeled, and counted as 0 s: 2 x fft, 1 x sort" in text
    assert text.endswith("measurement of the device's rates: not known")


def test_bad_input_is_named(monkeypatch):
    with pytest.raises(UserError, match=r"--mesh: .* does not divide 8 devices"):
        measure("small", config(tensor=3, data=-1))
    monkeypatch.setattr(measure_module, "_available_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"--measure: the step needs 0\.0 GiB, but 0\.0 GiB are available; use a smaller"):
        measure("small", config())


@pytest.mark.parametrize(
    ("message", "error", "text"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory", UserError, "--measure: the step does not fit into the memory: .*Out of memory"),
        ("INTERNAL: broken", TrainingError, "the step does not run on this machine: .*broken"),
    ],
)
def test_an_error_of_the_device_is_one_line(monkeypatch, message, error, text):
    def fail(*arguments):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(measure_module, "_model", fail)
    with pytest.raises(error, match=text):
        measure("small", config())


def test_the_available_memory_is_positive_where_it_is_known():
    available = measure_module._available_memory()
    assert available is None or available > 2**20


def test_on_tpus_the_report_of_the_plan_is_the_model(tpu_devices):
    devices = tpu_devices("v5e:2x2")
    mesh = make_mesh(MeshConfig(), devices)
    lines = [
        line("%p", "f32[8]{0}", "parameter", "0"),
        line("%a", "f32[8]{0}", "add", "%p, %p", op_name="jit(f)/mlp/add", cycles=3000),
        line("%b", "f32[8]{0}", "negate", "%a", op_name="jit(f)/loss/neg", cycles=1000),
    ]
    modeled = measure_module._model("small", choose_for(config(), mesh), mesh, module(lines))
    clock = CHIPS[mesh.devices.flat[0].device_kind].cycles_per_second
    assert modeled["seconds"] == pytest.approx(4000 / clock)
    assert modeled["parts"] == {"mlp": pytest.approx(3000 / clock), "loss": pytest.approx(1000 / clock), "collectives": 0.0}
    part = make_mesh(MeshConfig(), devices[:2])
    with pytest.raises(UserError, match="2 x TPU v5 lite is not the size of a slice that can be planned"):
        measure_module._model("small", config(), part, module(lines))
