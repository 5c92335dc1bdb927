"""Parts and directions are read from the paths of scopes that JAX gives to instructions."""

import pytest

from gpt_jax.plan.attribution import direction_of, part_of


@pytest.mark.parametrize(
    ("op_name", "part", "direction"),
    [
        ("jit(train_step)/jvp(embedding)/gather", "embedding", "forward"),
        ("jit(train_step)/transpose(jvp(embedding))/scatter-add", "embedding", "backward"),
        ("jit(train_step)/jvp()/while/body/closed_call/attention/bqhd,bkhd->bhqk/dot_general", "attention", "forward"),
        ("jit(t)/transpose(jvp())/while/body/checkpoint/rematted_computation/mlp/tanh", "mlp", "recomputed"),
        ("jit(t)/transpose(jvp())/while/body/checkpoint/mlp/dot_general", "mlp", "backward"),
        ("jit(t)/jvp()/while/body/jit(dynamic_index_in_dim)/dynamic_slice", "scan", "forward"),
        ("jit(t)/jvp()/while/body/dynamic_update_slice", "scan", "forward"),
        ("jit(t)/jvp(loss)/shard_map/while/body/dynamic_slice", "loss", "forward"),
        ("jit(t)/attention/layer_norm/mul", "layer_norm", "forward"),
        ("jit(t)/convert_element_type", "other", "forward"),
        ("", "other", "forward"),
    ],
)
def test_parts_and_directions_come_from_the_names_of_scopes(op_name, part, direction):
    assert (part_of(op_name), direction_of(op_name)) == (part, direction)
