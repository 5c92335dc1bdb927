"""Named tensors of other formats: against the released shapes, slices taken by hand, the libraries of the files, and back."""

import dataclasses
import json
import math
import pickle
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from gpt_jax.config import MeshConfig, ModelConfig, PretrainConfig
from gpt_jax.errors import UserError
from gpt_jax.interop import param_map, tensor_files, weights
from gpt_jax.runtime import sharding
from gpt_jax.tasks.head import Head
from gpt_jax.train import checkpoint
from gpt_jax.train.step import abstract_state, init_state

MODEL = ModelConfig(vocab_size=300, context_length=32, num_layers=3, embed_dim=32, num_heads=4, mlp_dim=128)
HEAD = Head(3, False, 0.5, 0.1)


@pytest.fixture(scope="module")
def config():
    return PretrainConfig(model=dataclasses.replace(MODEL), data=dataclasses.replace(PretrainConfig().data, tokenizer=TOKENIZER))


TOKENIZER = dataclasses.replace(PretrainConfig().data.tokenizer, kind="sentencepiece")


@pytest.fixture(scope="module")
def saved(config, tmp_path_factory):
    """A checkpoint of parameters that all differ, saved from eight devices; and its parameters as NumPy arrays."""
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=8))
    params = init_state(config, mesh)["params"]
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    params = jax.tree.unflatten(
        tree, [x + jax.device_put(rng.normal(size=x.shape).astype(np.float32), x.sharding) for x in leaves]
    )
    padding = jax.numpy.arange(MODEL.padded_vocab_size)[:, None] < MODEL.vocab_size
    params["embedding"]["tokens"] = params["embedding"]["tokens"] * padding
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with checkpoint.Checkpoints(
        folder, keep_latest=1, keep_best=0, config_json="{}", config_digest="", data_digest="", tokenizer=None
    ) as saver:
        saver.save(7, {"params": params}, {})
    return checkpoint.resolve(folder / "7", print), jax.tree.map(np.asarray, params)


def test_the_openai_layout_has_the_released_shapes_in_their_order(shared_data):
    released = json.loads((shared_data("gpt1-bpe") / "params_shapes.json").read_text())
    assert [list(piece.shape) for piece in param_map.pieces("openai", ModelConfig())] == released


def test_hugging_face_tensors_are_these_slices_of_ours(saved):
    info, params = saved
    found = dict(weights.stream(info, param_map.pieces("huggingface", MODEL), "float32"))
    embed, blocks = MODEL.embed_dim, params["blocks"]
    kernel, bias = blocks["attention"]["qkv"]["kernel"][2], blocks["attention"]["qkv"]["bias"][2]
    for part, begin in enumerate((0, embed, 2 * embed)):  # query, key, value; head h has columns h * 8 to h * 8 + 7 of each
        theirs = found["transformer.h.2.attn.c_attn.weight"][:, begin : begin + embed]
        for head in range(MODEL.num_heads):
            np.testing.assert_array_equal(theirs[:, 8 * head : 8 * head + 8], kernel[:, part, head])
            at = begin + 8 * head
            np.testing.assert_array_equal(found["transformer.h.2.attn.c_attn.bias"][at : at + 8], bias[part, head])
    output = found["transformer.h.0.attn.c_proj.weight"]
    np.testing.assert_array_equal(output[8:16], blocks["attention"]["out"]["kernel"][0, 1])
    np.testing.assert_array_equal(found["transformer.h.1.ln_1.weight"], blocks["attention_norm"]["gain"][1])
    np.testing.assert_array_equal(found["transformer.h.1.ln_1.bias"], blocks["attention_norm"]["bias"][1])
    np.testing.assert_array_equal(found["transformer.h.1.ln_2.weight"], blocks["mlp_norm"]["gain"][1])
    np.testing.assert_array_equal(found["transformer.h.1.mlp.c_fc.weight"], blocks["mlp"]["up"]["kernel"][1])
    np.testing.assert_array_equal(found["transformer.h.1.mlp.c_proj.bias"], blocks["mlp"]["down"]["bias"][1])
    np.testing.assert_array_equal(found["transformer.tokens_embed.weight"], params["embedding"]["tokens"][:300])
    np.testing.assert_array_equal(found["transformer.positions_embed.weight"], params["embedding"]["positions"])
    assert len(found) == 2 + 12 * MODEL.num_layers


def write(layout, info, folder, dtype="float32", most_bytes=10**9):
    pieces = param_map.pieces(layout, MODEL)
    known, tensors = weights.described(pieces, dtype), weights.stream(info, pieces, dtype)
    if layout == "huggingface":
        tensor_files.write_safetensors(folder, known, tensors, most_bytes)
    elif layout == "openai":
        tensor_files.write_openai(folder, known, tensors)
    else:
        tensor_files.write_npz(folder / "params.npz", tensors)


def read(layout, folder):
    if layout == "huggingface":
        return tensor_files.read_safetensors(folder)
    if layout == "openai":
        return tensor_files.read_openai(folder, [piece.name for piece in param_map.pieces("openai", MODEL)])
    return tensor_files.read_npz(folder / "params.npz")


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}], ids=str)
@pytest.mark.parametrize("layout", ["huggingface", "openai", "npz"])
def test_parameters_come_back_bit_for_bit_on_any_mesh(layout, axes, saved, config, tmp_path):
    info, params = saved
    write(layout, info, tmp_path)
    mesh = sharding.make_mesh(MeshConfig(**({"data": 1} | axes)))
    back = weights.assemble(read(layout, tmp_path), param_map.pieces(layout, MODEL), config, mesh)
    wanted = abstract_state(config, mesh)["params"]
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for ours, theirs, abstract in zip(*map(jax.tree.leaves, (params, back, wanted)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert theirs.dtype == np.float32
        assert theirs.sharding == abstract.sharding


def test_released_files_are_ten_even_parts_of_one_array(saved, tmp_path):
    info, params = saved
    write("openai", info, tmp_path)
    parts = [np.load(tmp_path / f"params_{n}.npy", allow_pickle=False) for n in range(10)]
    shapes = json.loads((tmp_path / "params_shapes.json").read_text())
    total = sum(map(math.prod, shapes))
    assert {part.size for part in parts} <= {total // 10, total // 10 + 1}
    tensors = np.split(np.concatenate(parts), np.cumsum([math.prod(shape) for shape in shapes]))[:-1]
    np.testing.assert_array_equal(tensors[0].reshape(shapes[0]), params["embedding"]["positions"])
    np.testing.assert_array_equal(tensors[1].reshape(shapes[1]), params["embedding"]["tokens"][:300])
    np.testing.assert_array_equal(tensors[-2], params["blocks"]["mlp_norm"]["gain"][2])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_library_reads_safetensors_in_one_file_and_in_several(dtype, saved, tmp_path):
    info, params = saved
    for name, most_bytes in (("one", 10**9), ("several", 40_000)):
        folder = tmp_path / name
        folder.mkdir()
        write("huggingface", info, folder, dtype, most_bytes)
    one = safetensors.numpy.load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    parts = sorted((tmp_path / "several").glob("*.safetensors"))
    assert len(parts) > 2
    assert [path.name for path in parts] == [f"model-{n:05}-of-{len(parts):05}.safetensors" for n in range(1, len(parts) + 1)]
    several = {}
    for path in parts:
        held = safetensors.numpy.load_file(path)
        assert sum(array.nbytes for array in held.values()) <= 40_000 or len(held) == 1
        assert {index["weight_map"][key] for key in held} == {path.name}
        several |= held
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in one.values())
    assert one.keys() == several.keys()
    for key, array in one.items():
        assert array.dtype.name == dtype
        np.testing.assert_array_equal(array, several[key])
    expected = params["blocks"]["mlp"]["up"]["kernel"][1].astype(one["transformer.h.0.ln_1.bias"].dtype)
    np.testing.assert_array_equal(one["transformer.h.1.mlp.c_fc.weight"], expected)


def test_npz_has_the_papers_names_and_a_fine_tuned_head():
    names = [piece.name for piece in param_map.pieces("npz", MODEL, HEAD)]
    assert names[:2] == ["W_e", "W_p"]
    assert set(names[-2:]) == {"W_y", "b_y"}
    assert "h2/attn/c_attn/w" in names


def test_an_lstm_fits_into_npz_only(tmp_path):
    model = ModelConfig(kind="lstm", vocab_size=300, embed_dim=16, lstm_units=32, context_length=16)
    assert "lstm/recurrent" in [piece.name for piece in param_map.pieces("npz", model)]
    for layout in ("huggingface", "openai"):
        with pytest.raises(UserError, match="LSTM"):
            param_map.pieces(layout, model)


MEMORY = """
import resource, sys
from pathlib import Path
import jax.numpy as jnp
from gpt_jax.config import ModelConfig
from gpt_jax.interop import tensor_files, param_map, weights
from gpt_jax.train import checkpoint

folder, format_ = Path(sys.argv[1]), sys.argv[2]
model = ModelConfig(num_layers=4)
if format_ == "save":
    import jax
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), param_map.parameter_shapes(model))
    options = dict(keep_latest=1, keep_best=0, config_json="{}", config_digest="", data_digest="", tokenizer=None)
    with checkpoint.Checkpoints(folder / "checkpoints", **options) as saver:
        saver.save(1, {"params": params}, {})
else:
    pieces = param_map.pieces(format_, model)
    known = weights.described(pieces, "float32")
    info = checkpoint.resolve(folder / "checkpoints" / "1", print)
    checkpoint.read_array(checkpoint.open_arrays(info)["blocks"]["mlp"]["up"]["kernel"][0])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if format_ == "npz":
        tensor_files.write_npz(folder / "params.npz", weights.stream(info, pieces, "float32"))
    elif format_ == "openai":
        tensor_files.write_openai(folder, known, weights.stream(info, pieces, "float32"))
    else:
        tensor_files.write_safetensors(folder, known, weights.stream(info, pieces, "float32"), 10**9)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print((after - before) * 1024, max(tensor.nbytes for tensor in known.values()))
"""


@pytest.mark.slow
def test_writing_takes_the_memory_of_the_largest_tensor(tmp_path):
    """Of four layers of the paper's size: 240 MB of parameters, of which the embeddings are 124 MB."""

    def run(format_):
        command = [sys.executable, "-c", MEMORY, str(tmp_path), format_]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("save")
    for format_ in ("huggingface", "npz", "openai"):
        used, largest = map(int, run(format_).split())
        assert used < 1.3 * largest + 32e6, format_


# -- what is refused --------------------------------------------------------------------------------------------------------


def test_all_differences_are_listed_at_once(config):
    pieces = param_map.pieces("huggingface", MODEL)
    known = weights.described(pieces, "float32")
    del known["transformer.h.0.ln_1.bias"]
    known["transformer.h.1.ln_1.bias"] = tensor_files.Tensor((31,), np.dtype(np.float32))
    known["transformer.h.2.ln_1.bias"] = tensor_files.Tensor((32,), np.dtype(np.int8))
    known["surplus"] = tensor_files.Tensor((2,), np.dtype(np.float32))
    with pytest.raises(UserError) as caught:
        weights.check(tensor_files.Tensors("FOLDER", known, dict.get), pieces)
    message = str(caught.value)
    assert "transformer.h.0.ln_1.bias [32] is missing" in message
    assert "transformer.h.1.ln_1.bias is [31], not [32]" in message
    assert "transformer.h.2.ln_1.bias is int8" in message
    assert "surplus [2] is not wanted" in message
    assert "\n" not in message


@pytest.fixture
def released(saved, tmp_path):
    write("openai", saved[0], tmp_path)
    return tmp_path


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def pickled(path):
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)


def alter_header(path):
    path.write_bytes(b"\x00" * 6 + path.read_bytes()[6:])


@pytest.mark.parametrize(("damage", "said"), [(truncate, "truncated"), (pickled, "pickle"), (alter_header, "params_4.npy")])
def test_a_damaged_released_file_is_named(damage, said, released):
    damage(released / "params_4.npy")
    with pytest.raises(UserError, match=said) as caught:
        read("openai", released)
    assert "params_4.npy" in str(caught.value)


def test_a_pickle_in_the_place_of_an_array_never_runs(released):
    class Hostile:
        def __reduce__(self):
            return exec, ("raise SystemExit('it ran')",)

    (released / "params_0.npy").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError, match="pickle"):
        read("openai", released)


def test_released_files_that_do_not_add_up_are_refused(released):
    (released / "params_shapes.json").write_text("[[3, 4]]")
    with pytest.raises(UserError, match="describes 12"):
        read("openai", released)
    (released / "params_9.npy").unlink()
    with pytest.raises(UserError, match=r"params_9.npy: missing"):
        read("openai", released)


@pytest.mark.parametrize("layout", ["huggingface", "npz"])
def test_truncated_files_are_named(layout, saved, tmp_path):
    write(layout, saved[0], tmp_path)
    path = next(tmp_path.glob("*.npz" if layout == "npz" else "*.safetensors"))
    truncate(path)
    with pytest.raises(UserError, match="truncated or altered") as caught:
        read(layout, tmp_path)
    assert path.name in str(caught.value)


def test_a_flipped_bit_in_npz_is_noticed(saved, config, tmp_path):
    write("npz", saved[0], tmp_path)
    content = bytearray((tmp_path / "params.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "params.npz").write_bytes(content)
    mesh = sharding.make_mesh(MeshConfig(data=8))
    with pytest.raises(UserError, match="altered"):
        weights.assemble(read("npz", tmp_path), param_map.pieces("npz", MODEL), config, mesh)


def test_numbers_that_are_not_finite_are_refused(saved, config, tmp_path):
    info, _ = saved
    pieces = param_map.pieces("npz", MODEL)
    tensors = (
        (name, np.full_like(array, np.nan) if name == "h1/ln_2/g" else array)
        for name, array in weights.stream(info, pieces, "float32")
    )
    tensor_files.write_npz(tmp_path / "params.npz", tensors)
    with pytest.raises(UserError, match="h1/ln_2/g holds numbers that are not finite"):
        weights.assemble(read("npz", tmp_path), pieces, config, sharding.make_mesh(MeshConfig(data=8)))
