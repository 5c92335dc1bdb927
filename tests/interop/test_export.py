"""`gpt-jax export` and `gpt-jax import`: nothing unverified is left behind, and an exported model is imported unchanged."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from gpt_jax.cli import main
from gpt_jax.config import DataConfig, ModelConfig, PretrainConfig, TokenizerConfig
from gpt_jax.data.tokenizers import Bytes
from gpt_jax.errors import UserError
from gpt_jax.interop import export, huggingface, import_, param_map, tensor_files
from gpt_jax.train.checkpoint import CheckpointWriter
from tests.tiny import tiny_config, write_config


def quiet(line):
    pass


def load_params(run):
    """Returns a checkpoint's parameters as NumPy arrays, those of a fine-tuned model with its head."""
    return jax.tree.map(np.asarray, export.load_checkpoint(run, "npz", quiet).params)


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("format_", ["huggingface", "openai", "npz"])
def test_an_exported_model_is_imported_bit_for_bit(format_, pretrained, tmp_path, capsys):
    out, run = tmp_path / "out", tmp_path / "run"
    assert main(["export", str(pretrained), "--format", format_, "--out", str(out)]) == 0
    report = json.loads((out / "parity.json").read_text())
    assert report["logits"]["positions"] >= 2000
    assert report["logits"]["max_abs_difference"] <= report["logits"]["tolerance"]
    assert main(["import", str(out), "--workdir", str(run)]) == 0
    assert_equal(load_params(run), load_params(pretrained))
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert main(["generate", str(run), "--prompt", "abc", "--tokens", "4"]) == 0
    config = json.loads((run / "config.json").read_text())
    assert config["imported_from"] == str(out)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", ["classification", "multiple_choice"])
@pytest.mark.parametrize("format_", ["huggingface", "npz"])
def test_a_fine_tuned_model_is_imported_with_its_head(format_, kind, fine_tuned, tmp_path):
    run = fine_tuned(kind)
    report = export.export(run, format_, tmp_path / "out", quiet)
    assert report["outputs"]["examples"] == 64
    import_.import_(tmp_path / "out", tmp_path / "run", quiet)
    best = run / "checkpoints" / str(json.loads((run / "result.json").read_text())["best_step"])
    assert_equal(load_params(tmp_path / "run"), load_params(best))
    assert np.abs(load_params(best)["head"]["bias"]).max() > 0.01  # Otherwise the test would not notice a lost bias.


@pytest.mark.parametrize("kind", ["classification", "similarity"])
def test_the_classifiers_bias_is_folded_into_its_weights(kind, fine_tuned, tmp_path):
    """Hidden states times score.weight are the scores with the bias, of which each order of a pair has half."""
    run = fine_tuned(kind)
    export.export(run, "huggingface", tmp_path / "out", quiet)
    score = tensor_files.load_safetensors(tmp_path / "out")["score.weight"]
    exported = export.load_checkpoint(run, "huggingface", quiet)
    params = load_params(run)
    hidden = np.random.default_rng(0).normal(size=(5, exported.config.model.embed_dim))
    hidden = (hidden - hidden.mean(1, keepdims=True)) / hidden.std(1, keepdims=True)
    hidden = hidden * params["blocks"]["mlp_norm"]["gain"][-1] + params["blocks"]["mlp_norm"]["bias"][-1]
    bias = params["head"]["bias"] / (2 if kind == "similarity" else 1)
    np.testing.assert_allclose(hidden @ score.T, hidden @ params["head"]["kernel"] + bias, atol=1e-4)


@pytest.mark.parametrize(("dtype", "format_"), [("bfloat16", "huggingface"), ("float16", "huggingface"), ("float16", "npz")])
def test_shorter_numbers_are_rounded_once(dtype, format_, pretrained, tmp_path):
    shard_bytes = 5000 if format_ == "huggingface" else None
    report = export.export(pretrained, format_, tmp_path / "out", quiet, dtype=dtype, shard_bytes=shard_bytes)
    assert report["dtype"] == dtype
    import_.import_(tmp_path / "out", tmp_path / "run", quiet)
    expected = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), load_params(pretrained))
    assert_equal(load_params(tmp_path / "run"), expected)
    if format_ == "huggingface":
        assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1


@pytest.mark.parametrize("kind", ["similarity", "multiple_choice"])
def test_a_fine_tuned_model_is_exported_in_shorter_numbers(kind, fine_tuned, tmp_path):
    report = export.export(fine_tuned(kind), "huggingface", tmp_path / "out", quiet, dtype="bfloat16")
    assert report["outputs"]["max_abs_difference"] <= 1e-4


@pytest.mark.parametrize("format_", ["stablehlo", "savedmodel"])
def test_graphs_are_verified_too(format_, pretrained, fine_tuned, tmp_path):
    report = export.export(pretrained, format_, tmp_path / "out", quiet)
    assert report["logits"]["positions"] >= 2000
    assert report["logits"]["tolerance"] == export.FORMATS[format_].tolerance
    report = export.export(fine_tuned("similarity"), format_, tmp_path / "pair", quiet)
    assert report["outputs"]["examples"] == 64
    with pytest.raises(UserError, match="is a graph"):
        import_.import_(tmp_path / "out", tmp_path / "run", quiet)


def test_a_folder_of_another_origin_is_imported(pretrained, tmp_path):
    """The folder has old names, the tied output layer and a causal mask, no files of ours, and a tokenizer given by hand."""
    export.export(pretrained, "huggingface", tmp_path / "out", quiet)
    shutil.rmtree(tmp_path / "out" / "gpt_jax")
    tensors = tensor_files.load_safetensors(tmp_path / "out")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    tensors |= {"lm_head.weight": tensors["tokens_embed.weight"], "h.0.attn.bias": np.ones((1, 1, 32, 32), np.float32)}
    tensor_files.save_safetensors(tmp_path / "out", tensors)
    with pytest.raises(UserError, match="no tokenizer"):
        import_.import_(tmp_path / "out", tmp_path / "run", quiet)
    import_.import_(tmp_path / "out", tmp_path / "run", quiet, tokenizer=pretrained / "tokenizer")
    assert_equal(load_params(tmp_path / "run"), load_params(pretrained))


# -- errors -----------------------------------------------------------------------------------------------------------------


def refused(capsys, *words):
    """Runs a command that must fail and returns its one line on standard error."""
    assert main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("gpt-jax: ")
    return lines[-1]


def test_an_export_that_computes_something_else_is_removed(pretrained, tmp_path, monkeypatch, capsys):
    original = param_map.TensorMap.to_external

    def wrong(tensor_map, part):
        tensor = original(tensor_map, part)
        return tensor + 0.1 if tensor_map.name.endswith("c_fc.bias") else tensor

    monkeypatch.setattr(param_map.TensorMap, "to_external", wrong)
    assert main(["export", str(pretrained), "--format", "huggingface", "--out", str(tmp_path / "out")]) == 1
    assert "differs from the checkpoint by" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("format_", "writer", "error"),
    [
        ("npz", (np, "savez"), OSError(errno.ENOSPC, "No space left on device")),
        (
            "huggingface",
            (safetensors.numpy, "save_file"),
            safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        ),
    ],
)
def test_a_full_disk_leaves_nothing(format_, writer, error, pretrained, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(*writer, full)
    assert "no space left" in refused(capsys, "export", pretrained, "--format", format_, "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format_", "kilobytes"),
    [("npz", 40), ("npz", 60), ("huggingface", 40), ("openai", 60), ("stablehlo", 60), ("savedmodel", 60)],
)
def test_a_disk_that_fills_at_some_point_of_an_export_leaves_nothing(format_, kilobytes, pretrained, tmp_path):
    """The folder is on a file system of this size that only this process sees."""
    (tmp_path / "disk").mkdir()
    script = 'mount -t tmpfs -o size="$1" none "$2" && shift 2 || exit 99; "$@"; code=$?; ls -A "$OUT"; exit $code'
    command = [sys.executable, "-m", "gpt_jax", "export", pretrained, "--format", format_, "--out", tmp_path / "disk" / "out"]
    isolated = [
        "unshare",
        "--map-root-user",
        "--mount",
        "bash",
        "-c",
        script,
        "bash",
        f"{kilobytes}k",
        tmp_path / "disk",
        *command,
    ]
    try:
        environment = os.environ | {"OUT": str(tmp_path / "disk")}
        done = subprocess.run(list(map(str, isolated)), capture_output=True, text=True, timeout=300, env=environment)
    except FileNotFoundError:
        pytest.skip("this system has no unshare")
    if done.returncode == 99 or "unshare:" in done.stderr:
        pytest.skip(f"this system does not let a process mount a file system of its own: {done.stderr}")
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"gpt-jax: {tmp_path / 'disk' / 'out'}")
    assert "no space left on the device; free some space" in last


@pytest.mark.slow
@pytest.mark.parametrize(("format_", "line"), [("npz", "writing"), ("stablehlo", "writing"), ("stablehlo", "verifying")])
def test_ctrl_c_leaves_nothing(format_, line, pretrained, tmp_path):
    # A process that was started in the background ignores the signal, and so would those that it starts.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from gpt_jax.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "export", pretrained, "--format", format_, "--out", tmp_path / "a" / "out"]
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True) as process:
        while not process.stderr.readline().startswith(line):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        error = process.stderr.read()
    assert process.returncode == 130, error
    assert error.splitlines()[-1] == "gpt-jax: interrupted"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "hugingface"], "did you mean huggingface?"),
        (["--format", "npz", "--dtype", "bfloat16"], "--dtype: npz is written in float32 or float16"),
        (["--format", "openai", "--dtype", "float16"], "--dtype: openai is written in float32"),
        (["--format", "stablehlo", "--dtype", "float16"], "--dtype: stablehlo is written in float32"),
        (["--format", "npz", "--shard-bytes", "5e9"], "--shard-bytes: only huggingface files are split, not npz; leave it out"),
        (["--format", "huggingface", "--shard-bytes", "0"], "--shard-bytes: must be a number of bytes, 1 or more, not 0"),
    ],
)
def test_wrong_arguments_are_refused(words, message, pretrained, tmp_path, capsys):
    assert message in refused(capsys, "export", pretrained, "--out", tmp_path / "out", *words)
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_in_use_is_refused(pretrained, tmp_path, capsys):
    (tmp_path / "mine").write_text("keep")
    assert "is not empty" in refused(capsys, "export", pretrained, "--format", "npz", "--out", tmp_path)
    assert "is not empty" in refused(capsys, "import", pretrained, "--workdir", tmp_path)
    assert (tmp_path / "mine").read_text() == "keep"


def test_the_released_files_have_no_head(fine_tuned, tmp_path, capsys):
    message = refused(capsys, "export", fine_tuned("classification"), "--format", "openai", "--out", tmp_path / "out")
    assert "cannot store a fine-tuned head" in message


def test_the_message_for_an_unknown_folder_lists_the_formats(tmp_path, capsys):
    message = refused(capsys, "import", tmp_path, "--workdir", tmp_path / "run")
    for name in ("model.safetensors", "params_shapes.json", "params.npz"):
        assert name in message
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
    message = refused(capsys, "import", exported, "--workdir", tmp_path / "run")
    assert "model.safetensors was truncated or altered" in message


def test_another_architecture_and_other_shapes_are_listed(exported, tmp_path, capsys):
    (exported / "gpt_jax" / "manifest.json").unlink()
    message = refused(capsys, "import", exported, "--workdir", tmp_path / "run", "--config", "smoke")
    assert "entries, but its tokenizer has 257" in message
    config = write_config(tiny_config(tmp_path, model={"context_length": 64, "num_layers": 3}), tmp_path / "wide.py")
    message = refused(capsys, "import", exported, "--workdir", tmp_path / "run", "--config", config)
    assert "transformer.positions_embed.weight is [32, 16], not [64, 16]" in message
    assert "transformer.h.2.ln_1.bias [16] is missing" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "a list, not a JSON object"),
        ("{", "not valid JSON"),
        ({"n_head": "2"}, "n_head must be a whole number, not '2'"),
        ({"n_layer": 1.0}, "n_layer must be a whole number, not 1.0"),
        ({"vocab_size": None}, "vocab_size must be a whole number, but is missing"),
        ({"embd_pdrop": "x"}, "embd_pdrop must be a number, not 'x'"),
        ({"n_head": 5}, "5 does not divide"),
        ({"afn": "relu"}, "the activation (afn) is 'relu'"),
        ({"tie_word_embeddings": False}, "the output layer has its own weights"),
        ({"model_type": "gpt2"}, "'gpt2'"),
    ],
)
def test_the_message_for_a_wrong_config_is_one_line(content, message, exported, pretrained, tmp_path, capsys):
    shutil.rmtree(exported / "gpt_jax")
    file = exported / "config.json"
    file.write_text(content if isinstance(content, str) else json.dumps(json.loads(file.read_text()) | content))
    tokenizer = ["--tokenizer", pretrained / "tokenizer"]
    assert message in refused(capsys, "import", exported, "--workdir", tmp_path / "run", *tokenizer)
    assert not (tmp_path / "run").exists()


def test_an_output_layer_that_is_not_the_embeddings_is_refused(exported, pretrained, tmp_path, capsys):
    shutil.rmtree(exported / "gpt_jax")
    tensors = tensor_files.load_safetensors(exported)
    tensors["lm_head.weight"] = tensors["transformer.tokens_embed.weight"] + 1
    tensor_files.save_safetensors(exported, tensors)
    message = refused(capsys, "import", exported, "--workdir", tmp_path / "run", "--tokenizer", pretrained / "tokenizer")
    assert "lm_head.weight differs from the embeddings" in message


def test_the_card_may_be_changed(exported, tmp_path):
    (exported / "README.md").write_text("# Mine\n")
    import_.import_(exported, tmp_path / "run", quiet)
    assert (tmp_path / "run" / "checkpoints" / "0").is_dir()


def test_an_import_that_fails_leaves_nothing_and_can_be_repeated(exported, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "save", full)
        assert "no space left" in refused(capsys, "import", exported, "--workdir", tmp_path / "run")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    import_.import_(exported, tmp_path / "run", quiet)


def test_a_bias_that_cannot_be_folded_into_the_weights_is_an_error():
    kernel, bias = np.ones((4, 2)), np.array([0.5, -0.5])
    for gain, shift in ((np.ones(4), np.zeros(4)), (np.array([1.0, 0, 1, 1]), np.ones(4)), (np.ones(4), np.full(4, 1e-9))):
        with pytest.raises(UserError, match="has no bias"):
            huggingface.score_weight(kernel, bias, gain, shift)
    assert np.isfinite(huggingface.score_weight(kernel, np.zeros(2), np.ones(4), np.zeros(4))).all()


def test_a_pickle_is_read_only_if_it_is_trusted(exported, tmp_path, capsys):
    (exported / "gpt_jax" / "manifest.json").unlink()
    (exported / "model.safetensors").unlink()
    (exported / "pytorch_model.bin").write_bytes(b"not a pickle at all")
    assert "--trust-pickle" in refused(capsys, "import", exported, "--workdir", tmp_path / "run")
    message = refused(capsys, "import", exported, "--workdir", tmp_path / "run", "--trust-pickle")
    assert "truncated, altered" in message or "pip install 'gpt_jax[huggingface]'" in message


def test_a_trusted_pickle_of_tensors_is_imported(exported, pretrained, tmp_path, capsys):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    (exported / "gpt_jax" / "manifest.json").unlink()
    tensors = tensor_files.load_safetensors(exported)
    (exported / "model.safetensors").unlink()
    state = {name: torch.from_numpy(tensor).bfloat16() for name, tensor in tensors.items()}
    torch.save(state, exported / "pytorch_model.bin")
    import_.import_(exported, tmp_path / "run", quiet, trust_pickle=True)
    rounded = jax.tree.map(lambda x: x.astype("bfloat16").astype(np.float32), load_params(pretrained))
    assert_equal(load_params(tmp_path / "run"), rounded)
    for content in ([1], {"a": "text"}, {"a": torch.zeros(2, dtype=torch.float8_e4m3fn)}):
        torch.save(content, exported / "pytorch_model.bin")
        message = refused(capsys, "import", exported, "--workdir", tmp_path / "other", "--trust-pickle")
        assert "not a dictionary of tensors" in message


def test_training_does_not_continue_in_an_imported_folder(exported, pretrained, tmp_path, capsys):
    import_.import_(exported, tmp_path / "run", quiet)
    command = ["pretrain", pretrained.parent / "tiny.py", "--data.store", pretrained / "store"]
    message = refused(capsys, *command, "--workdir", tmp_path / "run")
    assert "imported" in message
    assert f"--init.from {tmp_path / 'run'}" in message
    command += ["--workdir", tmp_path / "next", "--init.from", tmp_path / "run"]
    assert main([str(word) for word in command]) == 0


def test_a_models_feed_forward_width_must_be_theirs():
    with pytest.raises(UserError, match="feed-forward width"):
        param_map.tensor_maps("huggingface", ModelConfig(embed_dim=48, num_heads=4, mlp_dim=100))


def test_config_json_describes_our_model(tmp_path):
    model = ModelConfig(vocab_size=257, num_layers=3, embed_dim=32, num_heads=4, mlp_dim=128, embed_dropout=0.0, init_stddev=0.5)
    config = PretrainConfig(model=model, data=DataConfig(tokenizer=TokenizerConfig(kind="bytes")))
    values = json.loads(json.dumps(huggingface.to_config_json(config, Bytes(), None, None, "float32")))
    assert huggingface.from_config_json(values, tmp_path / "config.json") == model


def test_exported_files_have_ordinary_permissions(exported):
    modes = {path.stat().st_mode & 0o777 for path in exported.iterdir() if path.is_file()}
    assert len(modes) == 1
