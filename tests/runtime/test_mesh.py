"""The shape of the mesh and what divides over it, without devices."""

import pytest

from gpt_jax.config import MeshConfig, ModelConfig
from gpt_jax.errors import UserError
from gpt_jax.runtime.mesh import AXES, RULES, check_batch, check_model, num_shards, resolve_mesh

MIXED = {"slice": 1, "data": 2, "fsdp": 2, "tensor": 2}
DATA = {"slice": 1, "data": 8, "fsdp": 1, "tensor": 1}
TENSOR = {"slice": 1, "data": 1, "fsdp": 1, "tensor": 8}
FSDP = {"slice": 1, "data": 1, "fsdp": 8, "tensor": 1}


def error_of(function, *arguments):
    """Returns the message of the `UserError` that a call ends in, which is one line."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- sizes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), (1, 8, 1, 1)),
        (MeshConfig(slice=2, data=1, fsdp=-1), (2, 1, 4, 1)),
        (MeshConfig(slice=-1, data=2), (4, 2, 1, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=2), (1, 2, 2, 2)),
        (MeshConfig(data=1, tensor=8), (1, 1, 1, 8)),
        (MeshConfig(data=-1, fsdp=8), (1, 1, 8, 1)),
    ],
)
def test_one_axis_takes_the_devices_that_are_left(config, sizes):
    assert resolve_mesh(config, 8) == dict(zip(AXES, sizes, strict=True))


def test_sizes_of_one_device():
    assert resolve_mesh(MeshConfig(), 1) == dict.fromkeys(AXES, 1)


HINT = "set one axis to -1 to use all remaining devices"


@pytest.mark.parametrize(
    ("config", "num_devices", "message"),
    [
        (MeshConfig(data=3), 8, f"slice=1 x data=3 x fsdp=1 x tensor=1 requires 3 devices, but the run has 8 devices; {HINT}"),
        (
            MeshConfig(data=4, tensor=4),
            8,
            f"slice=1 x data=4 x fsdp=1 x tensor=4 requires 16 devices, but the run has 8 devices; {HINT}",
        ),
        (MeshConfig(data=2), 1, f"slice=1 x data=2 x fsdp=1 x tensor=1 requires 2 devices, but the run has 1 device; {HINT}"),
        (MeshConfig(fsdp=3), 8, "the other axes multiply to 3, which does not divide 8 devices"),
        (MeshConfig(fsdp=3, tensor=2), 8, "the other axes multiply to 6, which does not divide 8 devices"),
        (MeshConfig(fsdp=2), 1, "the other axes multiply to 2, which does not divide 1 device"),
    ],
)
def test_sizes_that_do_not_fit_the_devices_are_refused(config, num_devices, message):
    assert error_of(resolve_mesh, config, num_devices) == f"--mesh: {message}"


def test_a_message_says_where_the_devices_are():
    message = error_of(resolve_mesh, MeshConfig(fsdp=3), 32, " on 2 x v5e-16")
    assert message == "--mesh: the other axes multiply to 3, which does not divide 32 devices on 2 x v5e-16"


def test_the_number_of_shards_is_the_product_of_the_mesh_axes_of_a_logical_axis():
    sizes = {"slice": 2, "data": 3, "fsdp": 5, "tensor": 7}
    assert {axis: num_shards(sizes, axis) for axis in RULES} == {"batch": 30, "embed": 5, "heads": 7, "mlp": 7, "vocab": 7}


# -- batches ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "batch_size", "grad_accum_steps", "message"),
    [
        (DATA, 20, 1, "20 does not split evenly over slice x data x fsdp = 8; 16 or 24 would"),
        (DATA, 5, 1, "5 does not split evenly over slice x data x fsdp = 8; 8 would"),
        (MIXED, 10, 1, "10 does not split evenly over slice x data x fsdp = 4; 8 or 12 would"),
        (MIXED | {"slice": 3}, 10, 1, "10 does not split evenly over slice x data x fsdp = 12; 12 would"),
        (DATA, 24, 2, "24 does not split evenly over slice x data x fsdp = 8 in 2 micro-batches; 16 or 32 would"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(sizes, batch_size, grad_accum_steps, message):
    assert error_of(check_batch, sizes, batch_size, grad_accum_steps) == f"--train.batch-size: {message}"


@pytest.mark.parametrize(
    ("sizes", "batch_size", "grad_accum_steps"), [(DATA, 24, 1), (DATA, 32, 4), (MIXED, 8, 2), (TENSOR, 1, 1)]
)
def test_a_batch_that_divides_is_accepted(sizes, batch_size, grad_accum_steps):
    check_batch(sizes, batch_size, grad_accum_steps)


# -- models -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "model", "message"),
    [
        (TENSOR, {"num_heads": 4}, "--mesh.tensor: 8 does not divide model.num-heads 4; 1, 2, 4 would"),
        (
            TENSOR,
            {"num_heads": 8, "embed_dim": 48, "mlp_dim": 100},
            "--mesh.tensor: 8 does not divide model.mlp-dim 100; 2, 4, 5 would",
        ),
        (TENSOR | {"tensor": 5}, {}, "--mesh.tensor: 5 does not divide model.vocab-size 40576; 1, 2, 4 would"),
        (TENSOR | {"tensor": 5}, {"vocab_size": 640}, "--mesh.tensor: 5 does not divide model.num-heads 12; 2, 3, 4 would"),
        (TENSOR | {"tensor": 6}, {}, "--mesh.tensor: 6 does not divide model.vocab-size 40576; 1, 2, 4 would"),
        (FSDP, {"embed_dim": 36}, "--mesh.fsdp: 8 does not divide model.embed-dim 36; 3, 4, 6 would"),
        (TENSOR, {"kind": "lstm", "lstm_units": 12}, "--mesh.tensor: 8 does not divide model.lstm-units 12; 3, 4, 6 would"),
        (FSDP, {"kind": "lstm", "embed_dim": 36}, "--mesh.fsdp: 8 does not divide model.embed-dim 36; 3, 4, 6 would"),
    ],
)
def test_a_model_that_does_not_divide_is_refused(sizes, model, message):
    assert error_of(check_model, sizes, ModelConfig(**model)) == message


@pytest.mark.parametrize(
    ("sizes", "model"),
    [
        (MIXED, {}),
        (TENSOR, {"vocab_size": 1001, "num_heads": 8}),  # 1,001 is not a multiple of 8; padded, it is 1,024.
        (TENSOR, {"kind": "lstm", "num_heads": 3, "mlp_dim": 5}),  # The LSTM has neither heads nor a feed-forward network.
        (DATA, {"embed_dim": 36, "mlp_dim": 5}),
    ],
)
def test_a_model_that_divides_is_accepted(sizes, model):
    check_model(sizes, ModelConfig(**model))
