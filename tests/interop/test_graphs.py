"""ONNX, StableHLO and SavedModel: a graph computes what the model computes, at any size, and runs without gpt_jax."""

import dataclasses
import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config import ModelConfig
from gpt_jax.errors import UserError
from gpt_jax.interop import onnx, tensor_files
from gpt_jax.interop.export import FORMATS, Format, require_format
from gpt_jax.interop.onnx import load_onnx, write_onnx
from gpt_jax.interop.parity import ExportedFunction
from gpt_jax.interop.stablehlo import write_stablehlo
from gpt_jax.model import transformer
from gpt_jax.model.network import network
from gpt_jax.model.transformer import Params
from gpt_jax.tasks.head import Head
from gpt_jax.train.choices import choose

SIZES: dict[str, Any] = {
    "vocab_size": 257,
    "context_length": 12,
    "num_layers": 2,
    "embed_dim": 16,
    "num_heads": 2,
    "mlp_dim": 24,
    "lstm_units": 20,
}
GRAPHS = [name for name, format_ in FORMATS.items() if format_.write]
FUNCTIONS = {
    "language model": ExportedFunction(ModelConfig(**SIZES)),
    "classes of a pair": ExportedFunction(ModelConfig(**SIZES), Head(3, choices=False, lm_weight=0.5, dropout=0.1), 2),
    "choices": ExportedFunction(ModelConfig(**SIZES), Head(4, choices=True, lm_weight=0.5, dropout=0.1), 4),
    "lstm": ExportedFunction(ModelConfig(**SIZES, kind="lstm")),
    "lstm with a head": ExportedFunction(ModelConfig(**SIZES, kind="lstm"), Head(2, choices=False, lm_weight=0, dropout=0.1)),
}
LANGUAGE_MODEL = FUNCTIONS["language model"]
# ONNX is written by hand, with a path for each function. The other formats are traced, and compiling takes seconds.
SLOW = ("choices", "lstm with a head")
ALL = pytest.mark.parametrize("format_", GRAPHS)


def random_params(function: ExportedFunction) -> Params:
    """Parameters that are random everywhere, also in the rows that pad the vocabulary."""
    init = network(function.model).init if function.head is None else function.head.init
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init(function.model, jax.random.key(0)))
    draw = lambda path, leaf: rng.normal(path[-1].key == "gain", 0.4, leaf.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(jnp.asarray, jax.tree.map_with_path(draw, shapes))


def random_inputs(function: ExportedFunction, batch: int, time: int) -> list[np.ndarray]:
    rng = np.random.default_rng(batch)
    rows = (batch,) if function.head is None else (batch, function.sequences)
    tokens = rng.integers(0, function.model.vocab_size, (*rows, time), np.int32)
    return [tokens] if function.head is None else [tokens, rng.integers(0, time, rows, np.int32)]


def expected_output(function: ExportedFunction, params: Params, inputs: list[np.ndarray]) -> np.ndarray:
    """The output of the model's own functions, without `ExportedFunction`."""
    model, head = function.model, function.head

    @jax.jit
    def compute(params: Params, tokens: jax.Array, *extract: jax.Array) -> jax.Array:
        if head is None:
            return transformer.logits(model, params, network(model).apply(model, params, tokens))
        batch = {"tokens": tokens, "extract": extract[0], "labels": jnp.zeros((len(tokens), head.outputs))}
        return head.log_probabilities(model, params, batch)

    return np.asarray(compute(params, *inputs))


def require(format_: str) -> Format:
    """A format whose packages are installed; the test is skipped otherwise."""
    for package in FORMATS[format_].packages:
        pytest.importorskip(package)
    return FORMATS[format_]


def write(format_: str, folder: Path, function: ExportedFunction, params: Params) -> None:
    require(format_).write(folder, function, function.named_parameters(params))


@pytest.mark.parametrize(
    ("format_", "function"),
    [
        pytest.param(format_, case, id=f"{format_}, {name}", marks=[pytest.mark.slow] * (format_ != "onnx" and name in SLOW))
        for format_ in GRAPHS
        for name, case in FUNCTIONS.items()
    ],
)
def test_a_graph_computes_what_the_model_computes_at_any_size(format_: str, function: ExportedFunction, tmp_path: Path) -> None:
    params = random_params(function)
    # The types in the config have no effect on a graph.
    model = dataclasses.replace(function.model, compute_dtype="bfloat16", param_dtype="bfloat16")
    write(format_, tmp_path, dataclasses.replace(function, model=model), params)
    compute = FORMATS[format_].load(tmp_path)
    for batch, time in ((1, function.model.context_length), (3, 5)):
        inputs = random_inputs(function, batch, time)
        expected, actual = expected_output(function, params, inputs), compute(*inputs)
        assert (actual.shape, actual.dtype) == (expected.shape, np.float32)
        assert np.ptp(expected) > 0.1
        np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=0)


@ALL
def test_more_tokens_than_positions_are_an_error(format_: str, tmp_path: Path) -> None:
    write(format_, tmp_path, LANGUAGE_MODEL, random_params(LANGUAGE_MODEL))
    compute = FORMATS[format_].load(tmp_path)
    with pytest.raises(Exception, match=r"shape|Broadcast"):
        compute(*random_inputs(LANGUAGE_MODEL, 1, LANGUAGE_MODEL.model.context_length + 1))


PAIR = FUNCTIONS["classes of a pair"]


@pytest.mark.parametrize(
    ("format_", "function", "change"),
    [
        pytest.param(format_, function, change, id=f"{format_}, {name}", marks=[pytest.mark.slow] * (format_ == "savedmodel"))
        for format_ in GRAPHS
        for name, function, change in (
            ("ids", LANGUAGE_MODEL, [("tokens", 257), ("tokens", -1), ("tokens", -257), ("tokens", 10**6)]),
            ("ids and positions", PAIR, [("tokens", 257), ("tokens", -1), ("extract", 5), ("extract", -1)]),
        )
    ],
)
def test_an_index_out_of_range_is_never_taken_for_another_one(
    format_: str, function: ExportedFunction, change: list[tuple[str, int]], tmp_path: Path
) -> None:
    """ONNX Runtime refuses it, and in the other graphs the outputs of its example are NaN; those of other examples are right."""
    params = random_params(function)
    write(format_, tmp_path, function, params)
    compute = FORMATS[format_].load(tmp_path)
    inputs = dict(zip(function.inputs, random_inputs(function, 2, 5), strict=True))
    expected = compute(*inputs.values())
    assert np.isfinite(expected).all()
    for name, index in change:
        changed = inputs | {name: inputs[name].copy()}
        changed[name][1, ..., 0] = index
        if format_ == "onnx":
            with pytest.raises(Exception, match=r"out of data bounds|invalid index"):
                compute(*changed.values())
        else:
            output = compute(*changed.values())
            np.testing.assert_array_equal(output[0], expected[0])
            assert np.isnan(output[1]).all()


@pytest.mark.parametrize("format_", ["onnx", pytest.param("savedmodel", marks=pytest.mark.slow)])
def test_ids_of_another_type_are_refused(format_: str, tmp_path: Path) -> None:
    """The cards of these formats say so."""
    write(format_, tmp_path, LANGUAGE_MODEL, random_params(LANGUAGE_MODEL))
    (tokens,) = random_inputs(LANGUAGE_MODEL, 1, 3)
    if format_ == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        with pytest.raises(Exception, match=r"tensor\(int64\).*expected: \(tensor\(int32\)\)"):
            session.run(None, {"tokens": tokens.astype(np.int64)})
    else:
        import tensorflow as tf

        serve = tf.saved_model.load(str(tmp_path)).signatures["serving_default"]
        with pytest.raises(Exception, match="expected to be a int32 tensor but is a int64 tensor"):
            serve(tokens=tf.constant(tokens.astype(np.int64)))


ALONE = {
    "stablehlo": """
block("gpt_jax", "flax", "tensorflow")
import jax
from safetensors.numpy import load_file
exported = jax.export.deserialize(bytearray(open("model.stablehlo", "rb").read()))
output = exported.call(load_file("model.safetensors"), tokens)
""",
    "savedmodel": """
block("gpt_jax", "jax")
import tensorflow as tf
module = tf.saved_model.load(".")
output = module.signatures["serving_default"](tokens=tf.constant(tokens))["logits"].numpy()
""",
    "onnx": """
block("gpt_jax", "jax", "tensorflow", "onnx")
import onnxruntime
(output,) = onnxruntime.InferenceSession("model.onnx").run(["logits"], {"tokens": tokens})
""",
}


@ALL
def test_a_graph_runs_where_only_its_framework_is_installed(format_: str, tmp_path: Path) -> None:
    params, (tokens,) = random_params(LANGUAGE_MODEL), random_inputs(LANGUAGE_MODEL, 2, 7)
    write(format_, tmp_path, LANGUAGE_MODEL, params)
    np.save(tmp_path / "tokens.npy", tokens)
    code = f"""
import sys
import numpy as np
block = lambda *names: sys.modules.update(dict.fromkeys(names))  # Importing them is an error.
tokens = np.load("tokens.npy")
{ALONE[format_]}
np.save("output.npy", output)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    expected = expected_output(LANGUAGE_MODEL, params, [tokens])
    np.testing.assert_allclose(np.load(tmp_path / "output.npy"), expected, atol=1e-5, rtol=0)


def test_the_signature_lists_inputs_and_outputs_in_order(tmp_path: Path) -> None:
    function = FUNCTIONS["classes of a pair"]
    write_stablehlo(tmp_path, function, function.named_parameters(random_params(function)))
    signature = json.loads((tmp_path / "signature.json").read_text())
    *parameters, tokens, extract = signature["inputs"]
    assert tokens == {"name": "tokens", "dtype": "int32", "shape": ["batch", 2, "time"]}
    assert extract == {"name": "extract", "dtype": "int32", "shape": ["batch", 2]}
    assert signature["outputs"] == [{"name": "log_probabilities", "dtype": "float32", "shape": ["batch", 3]}]
    assert signature["limits"] == ["time <= 12"]
    assert signature["platforms"] == ["cpu", "cuda", "tpu"]
    tensors = tensor_files.load_safetensors(tmp_path)
    assert {entry["name"]: (tuple(entry["shape"]), entry["dtype"]) for entry in parameters} == {
        name: (tensor.shape, tensor.dtype.name) for name, tensor in tensors.items()
    }
    assert tensors["params/embedding/tokens"].shape == (257, 16)  # No padding rows.
    assert tensors["params/blocks/mlp/up/kernel"].shape == (2, 16, 24)
    # Without names, the order of the arrays matters; it is the order in which JAX flattens a dictionary.
    exported = jax.export.deserialize(bytearray((tmp_path / "model.stablehlo").read_bytes()))
    structure, _ = exported.in_tree.unflatten([entry["name"] for entry in signature["inputs"]])
    assert all(name == key for key, name in structure[0].items())
    assert structure[1:] == ("tokens", "extract")
    # The signature agrees with the graph.
    for entry, array in zip(signature["inputs"] + signature["outputs"], [*exported.in_avals, *exported.out_avals], strict=True):
        assert entry["dtype"] == array.dtype.name
        assert entry["shape"] == [size if isinstance(size, int) else str(size) for size in array.shape]


@pytest.mark.parametrize("name", ["language model", "choices"])
@pytest.mark.parametrize("attention", ["auto", "pallas_tpu"])
def test_a_graph_that_a_tpu_writes_contains_no_kernels(
    name: str, attention: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Kernels would restrict the graph to one platform and to lengths that they take."""
    sizes: Any = SIZES | {"context_length": 256, "embed_dim": 256, "num_heads": 2, "mlp_dim": 128, "attention": attention}
    function = dataclasses.replace(FUNCTIONS[name], model=ModelConfig(**sizes))
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert choose(function.model, jax.default_backend()).attention == "pallas_tpu"
    write_stablehlo(tmp_path, function, function.named_parameters(random_params(function)))
    graph = jax.export.deserialize(bytearray((tmp_path / "model.stablehlo").read_bytes())).mlir_module()
    assert "stablehlo.dot_general" in graph
    calls = set(re.findall(r"custom_call @(\w+)", graph))
    assert calls <= {"shape_assertion"}


@pytest.mark.parametrize(("format_", "file"), [("stablehlo", "model.stablehlo"), ("savedmodel", "saved_model.pb")])
def test_weights_are_not_part_of_the_graph(format_: str, file: str, tmp_path: Path) -> None:
    function = ExportedFunction(ModelConfig(**SIZES | {"embed_dim": 64}))
    params = random_params(function)
    write(format_, tmp_path, function, params)
    weights = sum(array.nbytes for array in function.named_parameters(params).values())
    sizes = {path.name: path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()}
    assert sizes[file] < weights / 2
    assert max(sizes.values()) > weights


def test_large_weights_of_onnx_are_in_a_file_beside_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require("onnx")
    from onnx import checker

    params, inputs = random_params(LANGUAGE_MODEL), random_inputs(LANGUAGE_MODEL, 2, 3)
    outputs = []
    for limit in (onnx.INLINE_BYTES, 1000):
        monkeypatch.setattr(onnx, "INLINE_BYTES", limit)
        folder = tmp_path / str(limit)
        folder.mkdir()
        write_onnx(folder, LANGUAGE_MODEL, LANGUAGE_MODEL.named_parameters(params))
        checker.check_model(folder / "model.onnx", full_check=True)
        assert (folder / "model.onnx.data").exists() == (limit == 1000)
        outputs.append(load_onnx(folder)(*inputs))
    assert (tmp_path / "1000" / "model.onnx").stat().st_size < (folder / "model.onnx.data").stat().st_size
    np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize(
    ("format_", "package", "install"),
    [
        ("stablehlo", "flatbuffers", "pip install flatbuffers"),
        ("savedmodel", "tensorflow", "pip install tensorflow"),
        ("onnx", "onnxruntime", "pip install 'gpt_jax[onnx]'"),
    ],
)
def test_a_missing_package_is_one_line(format_: str, package: str, install: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    installed = {name for name in FORMATS[format_].packages if name != package}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find("json") if name in installed else None)
    with pytest.raises(UserError, match=f"--format: {format_} needs {package}: ") as caught:
        require_format(format_)
    assert str(caught.value).endswith(install)
    assert "\n" not in str(caught.value)


@ALL
def test_the_packages_of_a_format_can_be_imported(format_: str) -> None:
    package = require(format_).packages[-1]
    require_format(format_)
    assert package in ("jax", "tensorflow", "onnxruntime")
    assert importlib.import_module(package).__version__[0].isdigit()
