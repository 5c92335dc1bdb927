"""`gpt-jax export` and `gpt-jax import`: nothing unverified is left behind, and what is exported comes back the same."""

import errno
import json
import shutil

import jax
import numpy as np
import pytest

from gpt_jax.cli import main
from gpt_jax.config import DataConfig, FinetuneRunConfig, ModelConfig, PretrainConfig, TokenizerConfig
from gpt_jax.config.load import config_from_dict
from gpt_jax.data.tokenizers import Bytes
from gpt_jax.errors import UserError
from gpt_jax.interop import export, graphs, huggingface, import_, param_map, tensor_files
from gpt_jax.tasks.finetune import head_of
from gpt_jax.tasks.registry import task_from_config
from gpt_jax.train import checkpoint
from gpt_jax.train.restore import load_model
from gpt_jax.train.step import LANGUAGE_MODEL


def quiet(line):
    pass


def parameters(run):
    """A checkpoint's parameters as NumPy arrays, a fine-tuned one's with its head."""
    config = config_from_dict(checkpoint.read_config(checkpoint.resolve(run, quiet)))
    model_fns = LANGUAGE_MODEL
    if isinstance(config, FinetuneRunConfig):
        model_fns = head_of(task_from_config(config.task), config).model_fns()
    return jax.tree.map(np.asarray, load_model(run, model_fns).params)


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("format_", ["huggingface", "openai", "npz"])
def test_what_is_exported_comes_back_bit_for_bit(format_, pretrained, tmp_path, capsys):
    out, run = tmp_path / "out", tmp_path / "run"
    assert main(["export", str(pretrained), "--format", format_, "--out", str(out)]) == 0
    found = json.loads((out / "parity.json").read_text())
    assert found["logits"]["positions"] >= 2000
    assert found["logits"]["max_abs_difference"] <= found["logits"]["tolerance"]
    assert main(["import", str(out), "--workdir", str(run)]) == 0
    assert_equal(parameters(run), parameters(pretrained))
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert main(["generate", str(run), "--prompt", "abc", "--tokens", "4"]) == 0
    config = json.loads((run / "config.json").read_text())
    assert config["imported_from"] == str(out)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", ["classification", "multiple_choice"])
@pytest.mark.parametrize("format_", ["huggingface", "npz"])
def test_a_fine_tuned_model_comes_back_with_its_head(format_, kind, fine_tuned, tmp_path):
    run = fine_tuned(kind)
    found = export.export(run, format_, tmp_path / "out", quiet)
    assert found["outputs"]["examples"] == 64
    import_.import_(tmp_path / "out", tmp_path / "run", quiet)
    best = run / "checkpoints" / str(json.loads((run / "result.json").read_text())["best_step"])
    assert_equal(parameters(tmp_path / "run"), parameters(best))
    assert np.abs(parameters(best)["head"]["bias"]).max() > 1e-4  # or else its way is not tested


@pytest.mark.parametrize("kind", ["classification", "similarity"])
def test_the_classifiers_bias_is_inside_its_weights(kind, fine_tuned, tmp_path):
    """Without their library: hidden states times score.weight are the scores, bias included, of both orders half each."""
    run = fine_tuned(kind)
    export.export(run, "huggingface", tmp_path / "out", quiet)
    score = tensor_files.read_safetensors(tmp_path / "out").read("score.weight")
    subject = export.find(run, quiet)
    params = parameters(subject.info.path)
    hidden = np.random.default_rng(0).normal(size=(5, subject.model.embed_dim))
    hidden = (hidden - hidden.mean(1, keepdims=True)) / hidden.std(1, keepdims=True)
    hidden = hidden * params["blocks"]["mlp_norm"]["gain"][-1] + params["blocks"]["mlp_norm"]["bias"][-1]
    bias = params["head"]["bias"] / (2 if kind == "similarity" else 1)
    np.testing.assert_allclose(hidden @ score.T, hidden @ params["head"]["kernel"] + bias, atol=1e-4)


@pytest.mark.parametrize(("dtype", "format_"), [("bfloat16", "huggingface"), ("float16", "huggingface"), ("float16", "npz")])
def test_shorter_numbers_are_rounded_once(dtype, format_, pretrained, tmp_path):
    found = export.export(pretrained, format_, tmp_path / "out", quiet, dtype=dtype, shard_bytes=5000)
    assert found["dtype"] == dtype
    import_.import_(tmp_path / "out", tmp_path / "run", quiet)
    expected = jax.tree.map(lambda x: tensor_files.narrow(x, dtype).astype(np.float32), parameters(pretrained))
    assert_equal(parameters(tmp_path / "run"), expected)
    if format_ == "huggingface":
        assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1


@pytest.mark.parametrize("format_", ["stablehlo", "savedmodel"])
def test_graphs_are_verified_too(format_, pretrained, fine_tuned, tmp_path):
    found = export.export(pretrained, format_, tmp_path / "out", quiet)
    assert found["logits"]["positions"] >= 2000
    assert found["logits"]["tolerance"] == graphs.FORMATS[format_].tolerance
    found = export.export(fine_tuned("similarity"), format_, tmp_path / "pair", quiet)
    assert found["outputs"]["examples"] == 64
    with pytest.raises(UserError, match="is a graph"):
        import_.import_(tmp_path / "out", tmp_path / "run", quiet)


def test_a_folder_made_elsewhere_is_imported(pretrained, tmp_path):
    """Without our side folder: their old names, tied output layer and mask included, and a tokenizer given by hand."""
    export.export(pretrained, "huggingface", tmp_path / "out", quiet)
    shutil.rmtree(tmp_path / "out" / "gpt_jax")
    tensors = tensor_files.read_safetensors(tmp_path / "out")
    held = {name.removeprefix("transformer."): tensors.read(name) for name in tensors.known}
    held |= {"lm_head.weight": held["tokens_embed.weight"], "h.0.attn.bias": np.ones((1, 1, 32, 32), np.float32)}
    known = {name: tensor_files.Tensor(array.shape, array.dtype) for name, array in held.items()}
    tensor_files.write_safetensors(tmp_path / "out", known, held.items(), 10**9)
    with pytest.raises(UserError, match="no tokenizer"):
        import_.import_(tmp_path / "out", tmp_path / "run", quiet)
    import_.import_(tmp_path / "out", tmp_path / "run", quiet, tokenizer=pretrained / "tokenizer")
    assert_equal(parameters(tmp_path / "run"), parameters(pretrained))


# -- what goes wrong --------------------------------------------------------------------------------------------------------


def refused(capsys, *words):
    """Runs a command that must fail; its one line on standard error."""
    assert main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("gpt-jax: ")
    return lines[-1]


def test_an_export_that_computes_something_else_is_removed(pretrained, tmp_path, monkeypatch, capsys):
    original = param_map.Piece.to

    def wrong(piece, part):
        tensor = original(piece, part)
        return tensor + 0.1 if piece.name.endswith("c_fc.bias") else tensor

    monkeypatch.setattr(param_map.Piece, "to", wrong)
    assert main(["export", str(pretrained), "--format", "huggingface", "--out", str(tmp_path / "out")]) == 1
    assert "differs from the checkpoint by" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(pretrained, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_npz", full)
    assert "no space left" in refused(capsys, "export", pretrained, "--format", "npz", "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--format", "hugingface"], "did you mean huggingface?"),
        (["--format", "npz", "--dtype", "bfloat16"], "--dtype: npz is written in float32 or float16"),
        (["--format", "openai", "--dtype", "float16"], "--dtype: openai is written in float32"),
        (["--format", "stablehlo", "--dtype", "float16"], "--dtype: stablehlo is written in float32"),
        (["--format", "npz", "--shard-bytes", "0"], "--shard-bytes: must be a number of bytes"),
    ],
)
def test_wrong_words_are_refused(words, said, pretrained, tmp_path, capsys):
    assert said in refused(capsys, "export", pretrained, "--out", tmp_path / "out", *words)
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_in_use_is_refused(pretrained, tmp_path, capsys):
    (tmp_path / "mine").write_text("keep")
    assert "holds something already" in refused(capsys, "export", pretrained, "--format", "npz", "--out", tmp_path)
    assert "holds something already" in refused(capsys, "import", pretrained, "--workdir", tmp_path)
    assert (tmp_path / "mine").read_text() == "keep"


def test_the_released_layout_has_no_head(fine_tuned, tmp_path, capsys):
    said = refused(capsys, "export", fine_tuned("classification"), "--format", "openai", "--out", tmp_path / "out")
    assert "no place for a fine-tuned head" in said


def test_unknown_folders_say_what_was_looked_for(tmp_path, capsys):
    said = refused(capsys, "import", tmp_path, "--workdir", tmp_path / "run")
    for name in ("model.safetensors", "params_shapes.json", "params.npz"):
        assert name in said
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert "'gpt2'" in refused(capsys, "import", tmp_path, "--workdir", tmp_path / "run")


@pytest.fixture
def exported(pretrained, tmp_path):
    export.export(pretrained, "huggingface", tmp_path / "out", quiet)
    return tmp_path / "out"


def test_an_altered_export_is_named(exported, tmp_path, capsys):
    content = bytearray((exported / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (exported / "model.safetensors").write_bytes(content)
    said = refused(capsys, "import", exported, "--workdir", tmp_path / "run")
    assert "model.safetensors was truncated or altered" in said


def test_another_architecture_and_other_shapes_are_listed(exported, tmp_path, capsys):
    (exported / "gpt_jax" / "manifest.json").unlink()
    said = refused(capsys, "import", exported, "--workdir", tmp_path / "run", "--config", "smoke")
    assert "entries, and its tokenizer 257" in said
    config = tmp_path / "wide.py"
    config.write_text(
        "from gpt_jax.config import DataConfig, ModelConfig, PretrainConfig, TokenizerConfig\n"
        "def config():\n"
        "    model = ModelConfig(vocab_size=257, context_length=64, num_layers=3, embed_dim=16, num_heads=2, mlp_dim=64)\n"
        "    return PretrainConfig(model=model, data=DataConfig(tokenizer=TokenizerConfig(kind='bytes')))\n"
    )
    said = refused(capsys, "import", exported, "--workdir", tmp_path / "run", "--config", config)
    assert "transformer.positions_embed.weight is [32, 16], not [64, 16]" in said
    assert "transformer.h.2.ln_1.bias [16] is missing" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "it holds no object"),
        ("{", "is not valid JSON"),
        ({"n_head": "2"}, "n_head must be a whole number, not '2'"),
        ({"n_layer": 1.0}, "n_layer must be a whole number, not 1.0"),
        ({"vocab_size": None}, "vocab_size must be a whole number, and is missing"),
        ({"embd_pdrop": "x"}, "embd_pdrop must be a number, not 'x'"),
        ({"n_head": 5}, "5 does not divide"),
        ({"afn": "relu"}, "has the activation 'relu'"),
        ({"tie_word_embeddings": False}, "has an output layer of its own"),
        ({"model_type": "gpt2"}, "'gpt2'"),
    ],
)
def test_a_wrong_config_is_said_in_one_line(content, said, exported, pretrained, tmp_path, capsys):
    shutil.rmtree(exported / "gpt_jax")
    file = exported / "config.json"
    file.write_text(content if isinstance(content, str) else json.dumps(json.loads(file.read_text()) | content))
    tokenizer = ["--tokenizer", pretrained / "tokenizer"]
    assert said in refused(capsys, "import", exported, "--workdir", tmp_path / "run", *tokenizer)
    assert not (tmp_path / "run").exists()


def test_an_output_layer_that_is_not_the_embeddings_is_refused(exported, pretrained, tmp_path, capsys):
    shutil.rmtree(exported / "gpt_jax")
    tensors = tensor_files.read_safetensors(exported)
    held = {name: tensors.read(name) for name in tensors.known}
    held["lm_head.weight"] = held["transformer.tokens_embed.weight"] + 1
    known = {name: tensor_files.Tensor(array.shape, array.dtype) for name, array in held.items()}
    tensor_files.write_safetensors(exported, known, held.items(), 10**9)
    said = refused(capsys, "import", exported, "--workdir", tmp_path / "run", "--tokenizer", pretrained / "tokenizer")
    assert "lm_head.weight differs from the embeddings" in said


def test_the_card_may_be_changed(exported, tmp_path):
    (exported / "README.md").write_text("# Mine\n")
    import_.import_(exported, tmp_path / "run", quiet)
    assert (tmp_path / "run" / "checkpoints" / "0").is_dir()


def test_an_import_that_fails_leaves_nothing_and_can_be_repeated(exported, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", full)
        assert "no space left" in refused(capsys, "import", exported, "--workdir", tmp_path / "run")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    import_.import_(exported, tmp_path / "run", quiet)


@pytest.mark.parametrize("value", ["nan", "inf", "0.5", "-1"])
def test_a_size_must_be_a_number_of_bytes(value, pretrained, tmp_path, capsys):
    said = refused(capsys, "export", pretrained, "--format", "npz", "--out", tmp_path / "out", "--shard-bytes", value)
    assert "--shard-bytes: must be a number of bytes" in said


def test_a_bias_that_has_no_place_in_the_weights_is_said():
    kernel, bias = np.ones((4, 2)), np.array([0.5, -0.5])
    for gain, shift in ((np.ones(4), np.zeros(4)), (np.array([1.0, 0, 1, 1]), np.ones(4)), (np.ones(4), np.full(4, 1e-9))):
        with pytest.raises(UserError, match="has no bias"):
            huggingface.score_weight(kernel, bias, gain, shift)
    assert np.isfinite(huggingface.score_weight(kernel, np.zeros(2), np.ones(4), np.zeros(4))).all()


def test_a_pickle_is_read_only_if_it_is_trusted(exported, tmp_path, capsys):
    (exported / "gpt_jax" / "manifest.json").unlink()
    (exported / "model.safetensors").unlink()
    (exported / "pytorch_model.bin").write_bytes(b"no pickle at all")
    assert "--trust-pickle" in refused(capsys, "import", exported, "--workdir", tmp_path / "run")
    said = refused(capsys, "import", exported, "--workdir", tmp_path / "run", "--trust-pickle")
    assert "truncated, altered" in said or "pip install 'gpt_jax[huggingface]'" in said


def test_training_does_not_go_on_in_an_imported_folder(exported, pretrained, tmp_path, capsys):
    import_.import_(exported, tmp_path / "run", quiet)
    config = pretrained.parent / "tiny.py"
    store = ["--data.store", pretrained / "store"]
    said = refused(capsys, "pretrain", config, "--workdir", tmp_path / "run", *store)
    assert "imported" in said
    assert f"--init.from {tmp_path / 'run'}" in said
    assert (
        main([str(word) for word in ["pretrain", config, "--workdir", tmp_path / "on", *store, "--init.from", tmp_path / "run"]])
        == 0
    )


def test_a_models_feed_forward_width_must_be_theirs(tmp_path):
    with pytest.raises(UserError, match="feed-forward width"):
        param_map.pieces("huggingface", ModelConfig(embed_dim=48, num_heads=4, mlp_dim=100))


def test_their_config_describes_our_model():
    model = ModelConfig(vocab_size=257, num_layers=3, embed_dim=32, num_heads=4, mlp_dim=128, embed_dropout=0.0, init_stddev=0.5)
    config = PretrainConfig(model=model, data=DataConfig(tokenizer=TokenizerConfig(kind="bytes")))
    values = json.loads(json.dumps(huggingface.model_config(config, Bytes(), None, None, "float32")))
    assert huggingface.model_of(values, "config.json") == model
