"""Graphs for other programs compute what the model computes, at any batch size and length, without us and without JAX."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config import ModelConfig
from gpt_jax.errors import UserError
from gpt_jax.interop import graphs, tensor_files
from gpt_jax.model import network
from gpt_jax.model.transformer import Params
from gpt_jax.tasks.head import Head

SIZES: dict[str, Any] = {
    "vocab_size": 257,
    "context_length": 12,
    "num_layers": 2,
    "embed_dim": 16,
    "num_heads": 2,
    "mlp_dim": 24,
    "lstm_units": 20,
}
# ONNX is written by hand, a path for each case; the others are traced, and compiling takes them seconds.
SLOW = ("choices", "lstm with a head")
ALL = pytest.mark.parametrize("format_", graphs.FORMATS)


class Case(NamedTuple):
    model: ModelConfig
    head: Head | None
    sequences: int

    def params(self) -> Params:
        """Random in every place, the rows that pad the vocabulary too."""
        init = network.init if self.head is None else self.head.init
        rng = np.random.default_rng(0)
        shapes = jax.eval_shape(lambda: init(self.model, jax.random.key(0)))
        draw = lambda path, leaf: rng.normal(path[-1].key == "gain", 0.4, leaf.shape).astype(np.float32)  # noqa: E731
        return jax.tree.map(jnp.asarray, jax.tree.map_with_path(draw, shapes))

    def inputs(self, batch: int, time: int) -> list[np.ndarray]:
        rng = np.random.default_rng(batch)
        rows = (batch,) if self.head is None else (batch, self.sequences)
        tokens = rng.integers(0, self.model.vocab_size, (*rows, time), np.int32)
        return [tokens] if self.head is None else [tokens, rng.integers(0, time, rows, np.int32)]

    def expected(self, params: Params, inputs: list[np.ndarray]) -> np.ndarray:
        @jax.jit
        def compute(params: Params, tokens: jax.Array, *extract: jax.Array) -> jax.Array:
            if self.head is None:
                return network.logits(self.model, params, network.apply(self.model, params, tokens))
            batch = {"tokens": tokens, "extract": extract[0], "labels": jnp.zeros((len(tokens), self.head.outputs))}
            return self.head.log_probabilities(self.model, params, batch)

        return np.asarray(compute(params, *inputs))


CASES = {
    "language model": Case(ModelConfig(**SIZES), None, 1),
    "classes of a pair": Case(ModelConfig(**SIZES), Head(3, choices=False, lm_weight=0.5, dropout=0.1), 2),
    "choices": Case(ModelConfig(**SIZES), Head(4, choices=True, lm_weight=0.5, dropout=0.1), 4),
    "lstm": Case(ModelConfig(**SIZES, kind="lstm"), None, 1),
    "lstm with a head": Case(ModelConfig(**SIZES, kind="lstm"), Head(2, choices=False, lm_weight=0, dropout=0.1), 1),
}
LANGUAGE_MODEL = CASES["language model"]


def need(format_: str) -> graphs.GraphFormat:
    """A format whose packages are installed; the test is skipped otherwise."""
    for package in graphs.FORMATS[format_].requires:
        pytest.importorskip(package)
    return graphs.FORMATS[format_]


@pytest.mark.parametrize(
    ("format_", "case"),
    [
        pytest.param(format_, case, id=f"{format_}, {name}", marks=[pytest.mark.slow] * (format_ != "onnx" and name in SLOW))
        for format_ in graphs.FORMATS
        for name, case in CASES.items()
    ],
)
def test_a_graph_computes_what_the_model_computes_at_any_size(format_: str, case: Case, tmp_path: Path) -> None:
    graph, params = need(format_), case.params()
    asked = dataclasses.replace(case.model, compute_dtype="bfloat16", param_dtype="bfloat16")  # of no effect on a graph
    graph.write(tmp_path, asked, params, case.head, case.sequences)
    compute = graph.load(tmp_path)
    for batch, time in ((1, case.model.context_length), (3, 5)):
        inputs = case.inputs(batch, time)
        expected, found = case.expected(params, inputs), compute(*inputs)
        assert (found.shape, found.dtype) == (expected.shape, np.float32)
        assert np.ptp(expected) > 0.1
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


@ALL
def test_more_tokens_than_positions_are_an_error(format_: str, tmp_path: Path) -> None:
    graph, case = need(format_), LANGUAGE_MODEL
    graph.write(tmp_path, case.model, case.params(), None, 1)
    compute = graph.load(tmp_path)
    with pytest.raises(Exception, match=r"shape|Broadcast"):
        compute(*case.inputs(1, case.model.context_length + 1))


ALONE = {
    "stablehlo": """
block("gpt_jax", "flax", "tensorflow")
import jax
from safetensors.numpy import load_file
exported = jax.export.deserialize(bytearray(open("model.stablehlo", "rb").read()))
found = exported.call(load_file("model.safetensors"), tokens)
""",
    "savedmodel": """
block("gpt_jax", "jax")
import tensorflow as tf
module = tf.saved_model.load(".")
found = module.signatures["serving_default"](tokens=tf.constant(tokens))["logits"].numpy()
""",
    "onnx": """
block("gpt_jax", "jax", "tensorflow", "onnx")
import onnxruntime
(found,) = onnxruntime.InferenceSession("model.onnx").run(["logits"], {"tokens": tokens})
""",
}


@ALL
def test_a_graph_runs_where_only_its_framework_is(format_: str, tmp_path: Path) -> None:
    graph, case = need(format_), LANGUAGE_MODEL
    params, (tokens,) = case.params(), case.inputs(2, 7)
    graph.write(tmp_path, case.model, params, None, 1)
    np.save(tmp_path / "tokens.npy", tokens)
    code = f"""
import sys
import numpy as np
block = lambda *names: sys.modules.update(dict.fromkeys(names))  # to import them is an error
tokens = np.load("tokens.npy")
{ALONE[format_]}
np.save("found.npy", found)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), case.expected(params, [tokens]), atol=1e-5, rtol=0)


def test_the_signature_tells_inputs_and_outputs_in_order(tmp_path: Path) -> None:
    case = CASES["classes of a pair"]
    graphs.write_stablehlo(tmp_path, case.model, case.params(), case.head, case.sequences)
    signature = json.loads((tmp_path / "signature.json").read_text())
    *parameters, tokens, extract = signature["inputs"]
    assert tokens == {"name": "tokens", "dtype": "int32", "shape": ["batch", 2, "time"]}
    assert extract == {"name": "extract", "dtype": "int32", "shape": ["batch", 2]}
    assert signature["outputs"] == [{"name": "log_probabilities", "dtype": "float32", "shape": ["batch", 3]}]
    assert signature["limits"] == ["time <= 12"]
    assert signature["platforms"] == ["cpu", "cuda", "tpu"]
    known = tensor_files.read_safetensors(tmp_path).known
    assert {each["name"]: (tuple(each["shape"]), each["dtype"]) for each in parameters} == {
        name: (tensor.shape, tensor.dtype.name) for name, tensor in known.items()
    }
    assert known["params/embedding/tokens"].shape == (257, 16)  # no padding rows
    assert known["params/blocks/mlp/up/kernel"].shape == (2, 16, 24)
    # Of arrays that are not named the order counts; it is the one in which JAX takes a dictionary.
    exported = jax.export.deserialize(bytearray((tmp_path / "model.stablehlo").read_bytes()))
    structure, _ = exported.in_tree.unflatten([each["name"] for each in signature["inputs"]])
    assert all(name == key for key, name in structure[0].items())
    assert structure[1:] == ("tokens", "extract")


@pytest.mark.parametrize(("format_", "file"), [("stablehlo", "model.stablehlo"), ("savedmodel", "saved_model.pb")])
def test_weights_are_not_part_of_the_graph(format_: str, file: str, tmp_path: Path) -> None:
    graph, case = need(format_), LANGUAGE_MODEL._replace(model=ModelConfig(**SIZES | {"embed_dim": 64}))
    graph.write(tmp_path, case.model, case.params(), None, 1)
    weights = sum(array.nbytes for array in graphs.named(case.model, case.params()).values())
    sizes = {path.name: path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()}
    assert sizes[file] < weights / 2
    assert max(sizes.values()) > weights


def test_large_weights_of_onnx_lie_beside_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    need("onnx")
    import onnx

    case = LANGUAGE_MODEL
    params, inputs = case.params(), case.inputs(2, 3)
    found = []
    for limit in (graphs.INLINE_BYTES, 1000):
        monkeypatch.setattr(graphs, "INLINE_BYTES", limit)
        folder = tmp_path / str(limit)
        folder.mkdir()
        graphs.write_onnx(folder, case.model, params, None)
        onnx.checker.check_model(folder / "model.onnx", full_check=True)
        assert (folder / "model.onnx.data").exists() == (limit == 1000)
        found.append(graphs.load_onnx(folder)(*inputs))
    assert (tmp_path / "1000" / "model.onnx").stat().st_size < (folder / "model.onnx.data").stat().st_size
    np.testing.assert_array_equal(*found)


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
    installed = {name for name in graphs.FORMATS[format_].requires if name != package}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find("json") if name in installed else None)
    with pytest.raises(UserError, match=f"--format: {format_} needs {package}: ") as caught:
        graphs.require(format_)
    assert str(caught.value).endswith(install)
    assert "\n" not in str(caught.value)


@ALL
def test_a_format_names_what_runs_it(format_: str) -> None:
    name, version = need(format_).framework().split()
    graphs.require(format_)
    assert name in ("jax", "tensorflow", "onnxruntime")
    assert version[0].isdigit()
