"""Files of tensors: the libraries read what we write, and a damaged or hostile file is an error of one line."""

import json
import math
import pickle
import struct

import numpy as np
import pytest
import safetensors.numpy

from gpt_jax.errors import UserError
from gpt_jax.interop.tensor_files import load_npz, load_openai, load_safetensors, save_npz, save_openai, save_safetensors

SHAPES = {"a/w": (7, 5), "a/b": (5,), "b/w": (1, 30, 20), "b/b": (20,), "c": (600, 3)}


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def save(format_, folder, tensors):
    if format_ == "huggingface":
        save_safetensors(folder, tensors)
    elif format_ == "openai":
        save_openai(folder, tensors)
    else:
        save_npz(folder / "params.npz", tensors)


def load(format_, folder):
    if format_ == "huggingface":
        return load_safetensors(folder)
    if format_ == "openai":  # The arrays have an order, but no names.
        return dict(zip(SHAPES, load_openai(folder), strict=True))
    return load_npz(folder / "params.npz")


@pytest.mark.parametrize("format_", ["huggingface", "openai", "npz"])
def test_tensors_come_back_bit_for_bit(format_, tensors, tmp_path):
    save(format_, tmp_path, tensors)
    loaded = load(format_, tmp_path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(loaded[name], tensor)
        assert loaded[name].dtype == np.float32


def test_released_files_are_ten_even_parts_of_one_array(tensors, tmp_path):
    save_openai(tmp_path, tensors)
    parts = [np.load(tmp_path / f"params_{n}.npy", allow_pickle=False) for n in range(10)]
    shapes = json.loads((tmp_path / "params_shapes.json").read_text())
    assert shapes == [list(shape) for shape in SHAPES.values()]
    total = sum(map(math.prod, shapes))
    assert {part.size for part in parts} <= {total // 10, total // 10 + 1}
    arrays = np.split(np.concatenate(parts), np.cumsum([math.prod(shape) for shape in shapes]))[:-1]
    for array, tensor in zip(arrays, tensors.values(), strict=True):
        np.testing.assert_array_equal(array.reshape(tensor.shape), tensor)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_library_reads_safetensors_in_one_file_and_in_several(dtype, tensors, tmp_path):
    tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    for name, shard_bytes in (("one", 10**9), ("several", 1000)):
        (tmp_path / name).mkdir()
        save_safetensors(tmp_path / name, tensors, shard_bytes)
    one = safetensors.numpy.load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    parts = sorted((tmp_path / "several").glob("*.safetensors"))
    assert len(parts) > 2
    assert [path.name for path in parts] == [f"model-{n:05}-of-{len(parts):05}.safetensors" for n in range(1, len(parts) + 1)]
    several = {}
    for path in parts:
        shard = safetensors.numpy.load_file(path)
        assert sum(array.nbytes for array in shard.values()) <= 1000 or len(shard) == 1
        assert {index["weight_map"][key] for key in shard} == {path.name}
        several |= shard
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in one.values())
    ours = load_safetensors(tmp_path / "several")
    assert one.keys() == several.keys() == ours.keys() == tensors.keys()
    for key, array in one.items():
        assert array.dtype.name == dtype
        for other in (several[key], ours[key], tensors[key]):
            np.testing.assert_array_equal(array, other)


# -- errors -----------------------------------------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def empty(path):
    path.write_bytes(b"")


def replace_by_objects(path):
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)


def alter_header(path):
    path.write_bytes(b"\x00" * 6 + path.read_bytes()[6:])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "truncated or altered"),
        (empty, "truncated or altered"),
        (alter_header, "truncated or altered"),
        (replace_by_objects, "has pickled objects"),
    ],
)
def test_a_damaged_released_file_is_named(damage, message, tensors, tmp_path):
    save_openai(tmp_path, tensors)
    damage(tmp_path / "params_4.npy")
    with pytest.raises(UserError, match=f"params_4.npy: {message}") as caught:
        load("openai", tmp_path)
    assert "\n" not in str(caught.value)


class Hostile:
    """An object whose pickle ends the program when it is loaded."""

    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)


def test_a_pickle_in_place_of_an_array_never_runs(tensors, tmp_path):
    save_openai(tmp_path, tensors)
    (tmp_path / "params_0.npy").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError, match=r"params_0.npy: truncated or altered"):
        load("openai", tmp_path)
    np.savez(tmp_path / "params.npz", a=np.array([Hostile()], dtype=object))
    with pytest.raises(UserError, match=r"params.npz: has pickled objects"):
        load("npz", tmp_path)
    (tmp_path / "params.npz").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError, match=r"params.npz: truncated or altered"):
        load("npz", tmp_path)


def test_released_files_that_do_not_add_up_are_an_error(tensors, tmp_path):
    save_openai(tmp_path, tensors)
    (tmp_path / "params_shapes.json").write_text("[[3, 4]]")
    with pytest.raises(UserError, match="describes 12"):
        load("openai", tmp_path)
    (tmp_path / "params_9.npy").unlink()
    with pytest.raises(UserError, match=r"params_9.npy: no such file"):
        load("openai", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (content, ": is not a list of shapes")
        for content in ("[]", "[[0]]", "[[-1]]", '[["a"]]', "[3]", '{"a": 1}', "[[1.5]]", "[[true]]")
    ]
    + [("", ":1: not valid JSON"), ("[" * 100_000, "nested too deeply"), ("[[" + "9" * 5000 + "]]", "a number has more than")],
)
def test_a_wrong_list_of_shapes_is_an_error(content, message, tensors, tmp_path):
    save_openai(tmp_path, tensors)
    (tmp_path / "params_shapes.json").write_text(content)
    with pytest.raises(UserError) as error:
        load("openai", tmp_path)
    assert "params_shapes.json:" in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("damage", [truncate, empty, alter_header])
@pytest.mark.parametrize("format_", ["huggingface", "npz"])
def test_a_damaged_file_is_named(damage, format_, tensors, tmp_path):
    save(format_, tmp_path, tensors)
    path = next(tmp_path.glob("*.npz" if format_ == "npz" else "*.safetensors"))
    damage(path)
    with pytest.raises(UserError, match=f"{path.name}: truncated or altered") as caught:
        load(format_, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_in_npz_is_noticed(tensors, tmp_path):
    save("npz", tmp_path, tensors)
    content = bytearray((tmp_path / "params.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "params.npz").write_bytes(content)
    with pytest.raises(UserError, match="truncated or altered"):
        load("npz", tmp_path)


def test_a_safetensors_file_with_another_type_is_an_error(tmp_path):
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(2))
    with pytest.raises(UserError, match=r"model.safetensors: has numbers of a type other than float32"):
        load("huggingface", tmp_path)


OUTSIDE = "is not a file in this folder; only the folder's own files are read"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "a list, not a JSON object"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "its brackets are nested too deeply"),
        ("{}", "is not an index of safetensors files: 'weight_map' is missing"),
        ('{"weight_map": []}', "is not an index of safetensors files: 'weight_map' is a list, not an object"),
        ('{"weight_map": {"a": 1}}', "is not an index of safetensors files: 'weight_map.a' is a number, not a string"),
        ('{"weight_map": {"a": "../b.safetensors"}}', f"'../b.safetensors' {OUTSIDE}"),
        ('{"weight_map": {"a": "/etc/passwd"}}', f"'/etc/passwd' {OUTSIDE}"),
        ('{"weight_map": {"a": ".."}}', f"'..' {OUTSIDE}"),
        ('{"weight_map": {"a": "a/b.safetensors"}}', f"'a/b.safetensors' {OUTSIDE}"),
        ('{"weight_map": {"a": ""}}', "'' is not a file in this folder"),
        ('{"weight_map": {"a": "' + "x" * 9000 + '"}}', "...' is not a file in this folder"),
        ('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "model-00001-of-00002.safetensors: no such file"),
        ('{"weight_map": {"a": "\\u0000"}}', "\\x00: no such file"),
    ],
)
def test_a_wrong_index_of_safetensors_files_is_an_error(content, message, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError) as error:
        load("huggingface", tmp_path)
    assert message in str(error.value)
    assert str(error.value).startswith(str(tmp_path))


def test_an_index_that_is_not_utf_8_is_an_error(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_bytes(b'{"weight_map": "\xff"}')
    with pytest.raises(UserError, match="is not UTF-8"):
        load("huggingface", tmp_path)
