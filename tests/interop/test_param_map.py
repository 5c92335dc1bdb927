"""Tensors of other formats against the released shapes and slices taken by hand, and the conversion in both directions."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from gpt_jax.config import MeshConfig, ModelConfig, RunConfig
from gpt_jax.errors import UserError
from gpt_jax.interop import param_map
from gpt_jax.runtime.sharding import make_mesh
from gpt_jax.tasks.head import Head
from gpt_jax.train.step import abstract_state

MODEL = ModelConfig(vocab_size=300, context_length=32, num_layers=3, embed_dim=32, num_heads=4, mlp_dim=128)
CONFIG = RunConfig(model=MODEL)
HEADS = {"classes": Head(3, False, 0.5, 0.1), "choices": Head(3, True, 0.5, 0.1)}
FORMATS = ("huggingface", "openai", "npz")


def random_params(model, head=None):
    """Parameters that all differ; the rows that pad the vocabulary are zero."""
    rng = np.random.default_rng(0)
    shapes = param_map.parameter_shapes(model, head)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    params["embedding"]["tokens"][model.vocab_size :] = 0
    return params


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL)


def test_openai_tensors_have_the_released_shapes_in_their_order(shared_data):
    released = json.loads((shared_data("gpt1-bpe") / "params_shapes.json").read_text())
    assert [list(m.shape) for m in param_map.tensor_maps("openai", ModelConfig())] == released


def test_hugging_face_tensors_are_these_slices_of_ours(params):
    tensors = param_map.to_tensors(param_map.tensor_maps("huggingface", MODEL), params, "float32")
    embed, blocks = MODEL.embed_dim, params["blocks"]
    kernel, bias = blocks["attention"]["qkv"]["kernel"][2], blocks["attention"]["qkv"]["bias"][2]
    for part, begin in enumerate((0, embed, 2 * embed)):  # Query, key, value; head h has columns 8 h to 8 h + 7 of each.
        theirs = tensors["transformer.h.2.attn.c_attn.weight"][:, begin : begin + embed]
        for head in range(MODEL.num_heads):
            np.testing.assert_array_equal(theirs[:, 8 * head : 8 * head + 8], kernel[:, part, head])
            at = begin + 8 * head
            np.testing.assert_array_equal(tensors["transformer.h.2.attn.c_attn.bias"][at : at + 8], bias[part, head])
    output = tensors["transformer.h.0.attn.c_proj.weight"]
    np.testing.assert_array_equal(output[8:16], blocks["attention"]["out"]["kernel"][0, 1])
    np.testing.assert_array_equal(tensors["transformer.h.1.ln_1.weight"], blocks["attention_norm"]["gain"][1])
    np.testing.assert_array_equal(tensors["transformer.h.1.ln_1.bias"], blocks["attention_norm"]["bias"][1])
    np.testing.assert_array_equal(tensors["transformer.h.1.ln_2.weight"], blocks["mlp_norm"]["gain"][1])
    np.testing.assert_array_equal(tensors["transformer.h.1.mlp.c_fc.weight"], blocks["mlp"]["up"]["kernel"][1])
    np.testing.assert_array_equal(tensors["transformer.h.1.mlp.c_proj.bias"], blocks["mlp"]["down"]["bias"][1])
    np.testing.assert_array_equal(tensors["transformer.tokens_embed.weight"], params["embedding"]["tokens"][:300])
    np.testing.assert_array_equal(tensors["transformer.positions_embed.weight"], params["embedding"]["positions"])
    assert len(tensors) == 2 + 12 * MODEL.num_layers


def test_the_head_of_a_multiple_choice_is_transposed():
    head = HEADS["choices"]
    params = random_params(MODEL, head)
    tensors = param_map.to_tensors(param_map.tensor_maps("huggingface", MODEL, head), params, "float32")
    np.testing.assert_array_equal(tensors["multiple_choice_head.summary.weight"], params["head"]["kernel"].T)
    np.testing.assert_array_equal(tensors["multiple_choice_head.summary.bias"], params["head"]["bias"])


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}], ids=str)
@pytest.mark.parametrize("format_", FORMATS)
def test_parameters_come_back_bit_for_bit_on_any_mesh(format_, axes, params, tmp_path):
    mesh = make_mesh(MeshConfig(**({"data": 1} | axes)))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(CONFIG, mesh)["params"])
    maps = param_map.tensor_maps(format_, MODEL)
    tensors = param_map.to_tensors(maps, jax.device_put(params, shardings), "float32")
    restored = param_map.to_params(tmp_path, tensors, maps, CONFIG, mesh, None)
    assert jax.tree.structure(restored) == jax.tree.structure(params)
    for ours, theirs, sharding in zip(*map(jax.tree.leaves, (params, restored, shardings)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert theirs.dtype == np.float32
        assert theirs.sharding == sharding


def test_npz_has_the_papers_names_and_a_fine_tuned_head():
    names = [m.name for m in param_map.tensor_maps("npz", MODEL, HEADS["classes"])]
    assert names[:2] == ["W_e", "W_p"]
    assert set(names[-2:]) == {"W_y", "b_y"}
    assert "h2/attn/c_attn/w" in names


def test_an_lstm_fits_into_npz_only(tmp_path):
    model = ModelConfig(kind="lstm", vocab_size=300, embed_dim=16, lstm_units=32, context_length=16)
    maps = param_map.tensor_maps("npz", model)
    assert "lstm/recurrent" in [m.name for m in maps]
    params, mesh = random_params(model), make_mesh(MeshConfig(data=8))
    restored = param_map.to_params(
        tmp_path, param_map.to_tensors(maps, params, "float32"), maps, RunConfig(model=model), mesh, None
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, restored, params))
    for format_ in ("huggingface", "openai"):
        with pytest.raises(UserError, match="LSTM"):
            param_map.tensor_maps(format_, model)


MEMORY = """
import resource, sys
from pathlib import Path
import jax, jax.numpy as jnp
from gpt_jax.config import ModelConfig
from gpt_jax.interop import param_map, tensor_files

folder, format_ = Path(sys.argv[1]), sys.argv[2]
model = ModelConfig(num_layers=4)
params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), param_map.parameter_shapes(model))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tensors = param_map.to_tensors(param_map.tensor_maps(format_, model), params, "float32")
if format_ == "npz":
    tensor_files.save_npz(folder / "params.npz", tensors)
elif format_ == "openai":
    tensor_files.save_openai(folder, tensors)
else:
    tensor_files.save_safetensors(folder, tensors)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024, 4 * model.num_parameters)
"""


@pytest.mark.slow
@pytest.mark.parametrize("format_", FORMATS)
def test_writing_takes_at_most_the_memory_of_the_parameters(format_, tmp_path):
    """docs/interop.md promises it. The model has four layers of the paper's size: 240 MB of parameters."""
    command = [sys.executable, "-c", MEMORY, str(tmp_path), format_]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    used, size = map(int, done.stdout.split())
    assert used < 1.2 * size + 32e6


# -- errors -----------------------------------------------------------------------------------------------------------------


def test_all_differences_are_listed_at_once(params, tmp_path):
    maps = param_map.tensor_maps("huggingface", MODEL)
    tensors = param_map.to_tensors(maps, params, "float32")
    del tensors["transformer.h.0.ln_1.bias"]
    tensors["transformer.h.1.ln_1.bias"] = np.zeros(31, np.float32)
    tensors["transformer.h.2.ln_1.bias"] = np.zeros(32, np.int8)
    tensors["surplus"] = np.zeros(2, np.float32)
    with pytest.raises(UserError) as caught:
        param_map.to_params(tmp_path, tensors, maps, CONFIG, make_mesh(MeshConfig(data=8)), None)
    message = str(caught.value)
    assert "transformer.h.0.ln_1.bias [32] is missing" in message
    assert "transformer.h.1.ln_1.bias is [31], not [32]" in message
    assert "transformer.h.2.ln_1.bias is int8" in message
    assert "surplus [2] is unknown" in message
    assert "\n" not in message


def test_numbers_that_are_not_finite_are_an_error(params, tmp_path):
    maps = param_map.tensor_maps("npz", MODEL)
    tensors = param_map.to_tensors(maps, params, "float32")
    tensors["h1/ln_2/g"] = np.full_like(tensors["h1/ln_2/g"], np.nan)
    with pytest.raises(UserError, match="h1/ln_2/g has numbers that are not finite"):
        param_map.to_params(tmp_path, tensors, maps, CONFIG, make_mesh(MeshConfig(data=8)), None)
