"""`gpt-jax import` of folders from elsewhere: whatever their files contain, the result is a run or an error of one line."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt_jax.cli import main
from gpt_jax.errors import UserError
from gpt_jax.interop import export, import_, tensor_files
from gpt_jax.train.restore import local_mesh
from tests.damage import damaged_bytes, damaged_json_file


def quiet(line):
    pass


@pytest.fixture(scope="module")
def exports(pretrained, fine_tuned, tmp_path_factory):
    """Folders of exports, without the manifests that would reveal any change: a language model in two formats, a classifier."""
    folder = tmp_path_factory.mktemp("exports")
    export.export(pretrained, "huggingface", folder / "huggingface", quiet, shard_bytes=20_000)
    export.export(pretrained, "npz", folder / "npz", quiet)
    export.export(fine_tuned("classification"), "huggingface", folder / "classifier", quiet)
    for path in folder.iterdir():
        (path / "gpt_jax" / "manifest.json").unlink()
    return folder


@pytest.fixture
def copy(exports, tmp_path):
    """A function that copies one of the folders, so that a test can change it."""
    return lambda name: shutil.copytree(exports / name, tmp_path / "in")


@pytest.fixture
def refused(tmp_path, pretrained, capsys):
    """A function that imports a folder and returns the one line of its error; nothing may be left behind."""

    def run(folder, *words):
        before = sorted(tmp_path.iterdir())
        capsys.readouterr()
        assert main(["import", str(folder), "--workdir", str(tmp_path / "run"), *map(str, words)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].startswith("gpt-jax: ")
        assert all("parameters" in line for line in lines[:-1])  # The line that describes the model.
        assert sorted(tmp_path.iterdir()) == before
        return lines[-1].removeprefix("gpt-jax: ")

    return run


# -- config.json ------------------------------------------------------------------------------------------------------------

DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "config.json:1: not valid JSON"),
        ("null", "config.json:1: null, not a JSON object"),
        (f'{{"model_type": {DEEP}', "its brackets are nested too deeply"),
        (b'{"model_type": "openai-gpt\xff"}', "config.json: not JSON: byte 26 is not UTF-8"),
        (b"\xef\xbb\xbf{}", "config.json"),
        ('{"n_embd": ' + "9" * 5000 + "}", "a number has more than"),
        ({"model_type": ["openai-gpt"]}, "the model type is '['openai-gpt']', but only GPT-1"),
        ({"model_type": "x" * 10_000}, f"the model type is '{'x' * 60}...'"),
        ({"afn": {"a": 1}}, "the activation (afn) is '{'a': 1}', but GPT-1 has gelu"),
        ({"n_embd": 10**400}, "n_embd must be a number of at most 2,147,483,647, not 1000"),
        ({"n_embd": 2**30}, "the config describes a model of"),
        ({"n_layer": 2**31 - 1}, "the config describes a model of"),
        ({"n_positions": 10**9}, "the config describes a model of"),
        ({"n_layer": 0}, "config.json: n_layer: must be positive, not 0"),
        ({"n_layer": -(2**40)}, "n_layer must be a number of at most 2,147,483,647"),
        ({"n_layer": True}, "n_layer must be a whole number, not True"),
        ({"n_embd": [16]}, "n_embd must be a whole number, not [16]"),
        ({"n_head": 5}, "config.json: n_head: 5 does not divide n_embd 16"),
        ({"n_head": 4, "n_embd": 17}, "config.json: n_head: 4 does not divide n_embd 17"),
        ({"embd_pdrop": float("nan")}, "embd_pdrop must be a number of at most 2,147,483,647, not nan"),
        ({"embd_pdrop": 1.0}, "config.json: embd_pdrop: must be in [0, 1), not 1.0"),
        ({"layer_norm_epsilon": float("inf")}, "layer_norm_epsilon must be a number of at most 2,147,483,647, not inf"),
        ({"layer_norm_epsilon": 10**400}, "layer_norm_epsilon must be a number of at most 2,147,483,647, not 1000"),
        ({"layer_norm_epsilon": None}, "layer_norm_epsilon must be a number, but is missing"),
        ({"initializer_range": "0.02"}, "initializer_range must be a number, not '0.02'"),
        ({"vocab_size": 258}, "the model has 258 entries, but its tokenizer has 257"),
        ({"n_layer": 3}, "transformer.h.2.attn.c_attn.weight [16, 48] is missing"),
        ({"n_positions": 33}, "transformer.positions_embed.weight is [32, 16], not [33, 16]"),
    ],
)
def test_a_config_that_does_not_fit_is_one_line(copy, refused, pretrained, content, message):
    folder = copy("huggingface")
    shutil.rmtree(folder / "gpt_jax")
    file = folder / "config.json"
    if isinstance(content, dict):
        content = json.dumps(json.loads(file.read_text()) | content)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refused(folder, "--tokenizer", pretrained / "tokenizer")
    assert message in line
    assert str(folder) in line
    assert len(line) < 1500


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": 3}, "config.json"),
        ({"model": {"num_layers": 10**9}}, "the config describes a model of"),
        ({"model": {"num_layers": "2"}}, "--model.num-layers: '2' is not a whole number"),
        ({"model": {"layers": 2}}, "no config field is named 'model.layers'"),
        ({"modle": {}}, "is not the config of a run"),
        ("[]", "a list, not a JSON object"),
        ('{"model": ' + '{"a": ' * 900 + "1" + "}" * 901, "config.json"),
    ],
)
def test_our_own_config_may_be_damaged_too(copy, refused, content, message):
    folder = copy("npz")
    file = folder / "gpt_jax" / "config.json"
    if isinstance(content, dict):
        values = json.loads(file.read_text())
        content = json.dumps(content if "modle" in content else values | {"model": merged(values["model"], content["model"])})
    file.write_text(content)
    assert message in refused(folder)


def merged(old, new):
    return old | new if isinstance(new, dict) else new


# -- weights ----------------------------------------------------------------------------------------------------------------


def change_tensor(folder, name, change):
    tensors = tensor_files.load_safetensors(folder)
    tensors[name] = change(tensors[name].copy())
    for path in folder.glob("model*"):
        path.unlink()
    tensor_files.save_safetensors(folder, tensors)


def with_nan(tensor):
    tensor.flat[7] = np.nan
    return tensor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_nan, "transformer.h.1.mlp.c_fc.weight has numbers that are not finite"),
        (lambda tensor: tensor * np.float32(np.inf), "transformer.h.1.mlp.c_fc.weight has numbers that are not finite"),
        (lambda tensor: tensor.T.copy(), "transformer.h.1.mlp.c_fc.weight is [64, 16], not [16, 64]"),
        (lambda tensor: tensor[None], "transformer.h.1.mlp.c_fc.weight is [1, 16, 64], not [16, 64]"),
        (lambda tensor: np.ones(1, np.float32), "transformer.h.1.mlp.c_fc.weight is [1], not [16, 64]"),
        (lambda tensor: tensor[:0], "transformer.h.1.mlp.c_fc.weight is [0, 64], not [16, 64]"),
        (lambda tensor: tensor.astype(np.int32), "transformer.h.1.mlp.c_fc.weight is int32, not float32, bfloat16 or float16"),
        (lambda tensor: tensor.astype(np.float64), "transformer.h.1.mlp.c_fc.weight is float64, not float32"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(copy, refused, change, message):
    folder = copy("huggingface")
    change_tensor(folder, "transformer.h.1.mlp.c_fc.weight", change)
    assert message in refused(folder)


def test_of_many_differences_the_first_are_listed(copy, refused):
    folder = copy("huggingface")
    for path in folder.glob("model*"):
        path.unlink()
    tensor_files.save_safetensors(folder, {f"layer {number}\n": np.zeros((200, 30), np.float32) for number in range(500)})
    line = refused(folder)
    assert "transformer.tokens_embed.weight [257, 16] is missing" in line
    assert "more" in line
    assert len(line) < 1500


def test_a_missing_shard_and_a_truncated_one_are_named(copy, refused):
    folder = copy("huggingface")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    assert refused(folder).startswith(f"{shard}: truncated or altered")
    shard.unlink()
    assert refused(folder) == f"{shard}: no such file"


def test_weights_of_a_smaller_model_than_the_config_describes(copy, refused, tmp_path):
    folder = copy("npz")
    tensor_files.save_npz(folder / "params.npz", {"W_e": np.zeros((257, 16), np.float32)})
    line = refused(folder)
    assert "the config describes a model of" in line
    assert "but the files have 4,112 numbers" in line


def test_the_file_with_the_head_is_needed(copy, refused):
    folder = copy("classifier")
    (folder / "gpt_jax" / "head.npz").unlink()
    assert refused(folder) == f"{folder / 'gpt_jax' / 'head.npz'}: no such file"


# -- tokenizers and manifests -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocabulary", "merges", "message"),
    [
        ("{}", "#version: 0.2\na b</w>\n", "vocab.json: must map entries, including a newline"),
        ("[", "#version: 0.2\na b</w>\n", "vocab.json:1: not valid JSON"),
        ('{"\\n</w>": 0, "a": 1}', "#version: 0.2\na b c\n", "merges.txt:2: must be two symbols with a space between them"),
    ],
)
def test_the_vocabulary_of_hugging_face_is_called_by_its_names(copy, refused, vocabulary, merges, message):
    folder = copy("huggingface")
    shutil.rmtree(folder / "gpt_jax")
    (folder / "vocab.json").write_text(vocabulary)
    (folder / "merges.txt").write_text(merges)
    assert refused(folder).startswith(f"{folder}/{message}")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "gpt_jax/../../secret", "a\0b"])
def test_a_manifest_cannot_name_files_outside_of_the_folder(copy, refused, name):
    folder = copy("npz")
    (folder / "gpt_jax" / "manifest.json").write_text(json.dumps({name: "0" * 64}))
    assert "is not a file in the folder" in refused(folder)


def test_a_pickle_of_an_old_torch_is_read(copy, tmp_path):
    """Before torch 1.6, a file was not a zip archive. A parameter is a tensor too."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    folder = copy("huggingface")
    tensors = tensor_files.load_safetensors(folder)
    for path in folder.glob("model*"):
        path.unlink()
    state = {name: torch.nn.Parameter(torch.from_numpy(tensor)) for name, tensor in tensors.items()}
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    import_.import_(folder, tmp_path / "run", quiet, trust_pickle=True)
    assert (tmp_path / "run" / "checkpoints" / "0").is_dir()


# -- fuzz -------------------------------------------------------------------------------------------------------------------

FILES = {
    "huggingface": ("config.json", "model.safetensors.index.json", "model-00002-of-00003.safetensors", "gpt_jax/config.json"),
    "npz": ("params.npz", "gpt_jax/config.json"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in FILES.items() for file in files])
@settings(
    max_examples=300,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_a_damaged_folder_is_imported_or_refused(exports, tmp_path, name, file, data):
    folder = tmp_path / "in"
    if not folder.exists():
        shutil.copytree(exports / name, folder)
        if file == "config.json":  # Our own config would be used instead of Hugging Face's.
            (folder / "gpt_jax" / "config.json").unlink()
    original = (exports / name / file).read_bytes()
    strategy = damaged_json_file(original) if file.endswith(".json") else damaged_bytes(original)
    (folder / file).write_bytes(data.draw(strategy))
    message = "none"
    try:
        foreign = import_.inspect_folder(folder)
        import_.load_params(folder, foreign, local_mesh(foreign.config.model))
    except UserError as error:
        message = str(error)
    assert message.isprintable()
    assert 0 < len(message) < 2000
