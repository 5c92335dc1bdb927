"""Steps that are compiled for absent TPUs: their memory is added up by hand, and what does not fit is an error in one line."""

import dataclasses

import jax
import pytest

from gpt_jax.config import FinetuneLoopConfig, MeshConfig
from gpt_jax.config.load import load_config
from gpt_jax.errors import TrainingError, UserError
from gpt_jax.plan import program as program_module
from gpt_jax.plan.program import DoesNotFit, compile_program, topology_name
from gpt_jax.plan.workload import Workload, pretraining
from gpt_jax.runtime.accelerators import parse_accelerator
from gpt_jax.tasks.init_source import resolve_config
from gpt_jax.tasks.registry import get_task
from tests.plan.test_report import small

V5E_1, V5E_4 = parse_accelerator("v5e-1"), parse_accelerator("v5e-4")


@pytest.fixture(autouse=True)
def same_settings(tpu_devices):
    """Sets what `compile_program` changes in JAX back to what it was."""
    settings = {name: getattr(jax.config, name) for name in ("jax_platforms", "jax_enable_compilation_cache")}
    yield
    for name, value in settings.items():
        jax.config.update(name, value)


def test_parameters_and_moments_are_those_of_the_shards():
    """Two devices split the width of the weights (fsdp), and two the heads, the hidden layer and the vocabulary (tensor)."""
    sizes = {"embed_dim": 256, "num_heads": 4, "mlp_dim": 512}
    program = compile_program(step(layers=1, mesh=MeshConfig(data=1, fsdp=2, tensor=2), **sizes), V5E_4)
    both = 256 * 256 + 4 * 256 * 256 + 2 * 256 * 512  # the token table; query, key, value, output; two layers of the MLP
    one = 128 * 256 + 3 * 256 + 256 + 512 + 256  # positions and biases
    parameters = 4 * (both // 4 + one // 2 + 4 * 256)  # in float32; gain and bias of layer norms on each device
    assert (program.memory["parameters"], program.memory["moments"]) == (parameters, 2 * parameters)
    assert dict(program.mesh.shape) == {"slice": 1, "data": 1, "fsdp": 2, "tensor": 2}
    assert "num_partitions=4" in program.text.partition("\n")[0]
    assert program.workload.config.model.attention == "pallas_tpu"
    assert program.workload.config.model.layer_unroll == 1
    listed = sum(size for name, size in program.memory.items() if name not in ("peak", "alive"))
    assert listed <= program.memory["peak"] < listed + 2**16  # metrics are results, too
    assert listed - program.memory["temporaries"] <= program.memory["alive"] < listed + 2**20


def step(**fields):
    """Returns the step of a small pre-training."""
    return pretraining(small(**fields))


def test_the_parameters_of_a_fine_tuning_include_the_head():
    """Three more vocabulary entries do not enlarge the padded table; the head has 128 x 2 weights and 2 biases."""
    config = dataclasses.replace(load_config("finetune/rte"), train=FinetuneLoopConfig(batch_size=4))
    resolved = resolve_config(config, get_task("rte"), dataclasses.replace(small().model, vocab_size=250))
    workload = Workload("finetune", resolved, 4, 128, get_task("rte"))
    program = compile_program(workload, V5E_1)
    assert program.memory["parameters"] == 4 * (445_696 + 128 * 2 + 2)
    assert "f32[128,2]" in program.text


class Lowered:
    """A step whose compilation fails."""

    def __init__(self, message):
        self.message = message

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


@pytest.mark.parametrize(
    ("message", "kind", "problem"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (21.20G) "
            "exceeds available HBM (15.75G).",
            DoesNotFit,
            "the program needs 21.20 GiB on each device of a v5e-1, but can use only 15.75; ",
        ),
        (
            "the total memory required for HLO temporaries (512.00M) exceeds available HBM (0.25G).",
            DoesNotFit,
            "the program needs 0.50 GiB on each device of a v5e-1, but can use only 0.25; ",
        ),
        (
            "INTERNAL: Mosaic failed\n  to compile",
            TrainingError,
            "the program does not compile for a v5e-1: JaxRuntimeError: INTERNAL: ",
        ),
    ],
)
def test_an_error_of_the_compiler_is_one_line(monkeypatch, message, kind, problem):
    monkeypatch.setattr(program_module, "lower_step", lambda config, mesh: Lowered(message))
    with pytest.raises(kind) as caught:
        compile_program(step(), V5E_1)
    assert type(caught.value) is kind
    assert str(caught.value).startswith(problem)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"mesh": MeshConfig(fsdp=3)}, "--mesh: the other axes multiply to 3, which does not divide 4 devices"),
        ({"batch": 6}, "--train.batch-size: 6 does not split evenly"),
        ({"mesh": MeshConfig(data=1, tensor=4)}, "--mesh.tensor: 4 does not divide model.num-heads 2"),
        ({"batch": 10**6, "num_heads": 4, "embed_dim": 256}, "--train.batch-size: 1000000 is 250000 sequences a device"),
    ],
)
def test_what_cannot_be_a_step_is_not_compiled(monkeypatch, fields, problem):
    monkeypatch.setattr(program_module, "lower_step", lambda config, mesh: pytest.fail("it is lowered"))
    with pytest.raises(UserError) as caught:
        compile_program(step(**fields), V5E_4)
    assert str(caught.value).startswith(problem)


@pytest.mark.parametrize(
    ("name", "topology"), [("v5e-8", "v5e:2x4"), ("v5p-128", "v5p:4x4x4"), ("7x-8", "tpu7x:2x2x1"), ("v4-8", "v4:2x2x1")]
)
def test_the_names_of_topologies_are_those_of_libtpu(tpu_devices, name, topology):
    accelerator = parse_accelerator(name)
    assert topology_name(accelerator) == topology
    assert len(tpu_devices(topology)) == accelerator.devices
    assert {device.device_kind for device in tpu_devices(topology)} == {accelerator.device_kind}


@pytest.mark.slow
def test_parameters_that_do_not_fit_are_counted_by_the_compiler():
    """A table of 2^20 x 2,048 has 24 GiB with its moments; `remat` is named, so nothing is estimated before."""
    with pytest.raises(
        DoesNotFit,
        match=r"^the program needs \d\d\.\d\d GiB on each device of a v5e-1, but can use only \d+\.\d\d; moments take the most",
    ) as caught:
        compile_program(step(layers=1, batch=1, vocab_size=2**20, embed_dim=2048, num_heads=32, remat="dots"), V5E_1)
    assert 24 < float(str(caught.value).split()[3]) < 48


@pytest.mark.slow
def test_the_batch_that_the_message_suggests_fits():
    """The compiler agrees, and finds that more than half of the memory is used."""
    sizes = {"mesh": MeshConfig(data=1), "context_length": 1024, "num_heads": 4, "embed_dim": 256, "layer_unroll": 1}
    with pytest.raises(UserError, match=r"at most \d+ a device fit") as caught:
        compile_program(step(batch=10**5, **sizes), V5E_1)
    batch = int(str(caught.value).partition("--train.batch-size ")[2].partition(")")[0])
    program = compile_program(step(batch=batch, **sizes), V5E_1)
    assert 8 * 2**30 < program.memory["peak"] < 15.75 * 2**30
