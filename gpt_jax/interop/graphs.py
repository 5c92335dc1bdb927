"""The computation itself for other programs: as StableHLO, as a TensorFlow SavedModel, as ONNX; float32 whatever the config says.

    tokens int32 [batch, time] -> logits float32 [batch, time, vocabulary]; of a fine-tuned model
    tokens int32 [batch, sequences, time], extract int32 [batch, sequences] -> log_probabilities float32 [batch, outputs]

Batch and time are free, time up to a Transformer's context length. StableHLO and the SavedModel are traced from the model's own
functions. ONNX is written operator by operator: jax2onnx can trace our models at fixed sizes only, and tf2onnx does not know
the one operator that such a SavedModel consists of.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.extend.mlir.dialects import stablehlo

from gpt_jax.config import ModelConfig
from gpt_jax.errors import UserError
from gpt_jax.interop import tensor_files
from gpt_jax.model import network
from gpt_jax.model.attention import NEGATIVE
from gpt_jax.model.transformer import Params
from gpt_jax.tasks.head import Head

PLATFORMS = ("cpu", "cuda", "tpu")

STABLEHLO_VERSION = "1.1.0"
"""Of the SavedModel's graph: the oldest that holds the model, so that any TensorFlow reads it. What JAX 0.12, and with it jax2tf,
writes by itself is too new for TensorFlow 2.21."""

OPSET, IR_VERSION = 20, 9
"""Of ONNX 1.15 (2023), the first in which GELU is an operator."""

INLINE_BYTES = 2**31 - 2**24
"""Of weights inside an ONNX file, whose format ends at 2 GiB; more of them go into a file beside it."""

Shape = tuple[str | int, ...]  # a name stands for a free dimension
Computation = Callable[..., np.ndarray]
"""From tokens, with a head from tokens and extract, to the output."""


# -- what all of them compute -----------------------------------------------------------------------------------------------


def named(model: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    """The parameters by their paths ("params/blocks/mlp/up/kernel"), without the rows that pad the vocabulary."""
    flat = traverse_util.flatten_dict({"params": params}, sep="/")
    arrays = {name: np.asarray(array) for name, array in sorted(flat.items())}
    return arrays | {"params/embedding/tokens": arrays["params/embedding/tokens"][: model.vocab_size]}


def _computation(model: ModelConfig, head: Head | None) -> Callable[..., jax.Array]:
    """A function of parameters as `named` gives them and of the inputs."""
    model = dataclasses.replace(model, compute_dtype="float32", matmul_precision="highest", attention="plain", remat="off")

    def compute(parameters: dict[str, Any], tokens: jax.Array, *extract: jax.Array) -> jax.Array:
        params = traverse_util.unflatten_dict(parameters, sep="/")["params"]
        if head is None:
            return network.logits(model, params, network.apply(model, params, tokens))
        labels = jnp.zeros((tokens.shape[0], head.outputs), jnp.float32)  # read for their shape alone
        return head.log_probabilities(model, params, {"tokens": tokens, "extract": extract[0], "labels": labels})

    return compute


def _inputs(head: Head | None, sequences: int) -> dict[str, Shape]:
    """Names and shapes of the int32 inputs."""
    if head is None:
        return {"tokens": ("batch", "time")}
    return {"tokens": ("batch", sequences, "time"), "extract": ("batch", sequences)}


def _output(model: ModelConfig, head: Head | None) -> tuple[str, Shape]:
    """Name and shape of the float32 output."""
    return ("logits", ("batch", "time", model.vocab_size)) if head is None else ("log_probabilities", ("batch", head.outputs))


def _limits(model: ModelConfig) -> list[str]:
    """What the free dimensions must keep to; a graph traced by JAX checks it when it is called."""
    return [f"time <= {model.context_length}"] if model.kind == "transformer" else []


# -- StableHLO --------------------------------------------------------------------------------------------------------------


def _exported(model: ModelConfig, parameters: dict[str, np.ndarray], head: Head | None, sequences: int) -> jax.export.Exported:
    """The computation traced for `PLATFORMS`. The parameters are its first inputs, in the order of their names."""
    scope = jax.export.SymbolicScope(_limits(model))
    inputs = [
        jax.ShapeDtypeStruct(jax.export.symbolic_shape(", ".join(map(str, shape)), scope=scope), jnp.int32)
        for shape in _inputs(head, sequences).values()
    ]
    specs = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in parameters.items()}
    return jax.export.export(jax.jit(_computation(model, head)), platforms=PLATFORMS)(specs, *inputs)


def write_stablehlo(folder: Path, model: ModelConfig, params: Params, head: Head | None, sequences: int = 1) -> None:
    """Writes model.stablehlo, model.safetensors and signature.json into `folder`.

    The first is a serialized `jax.export.Exported`. Parameters are inputs and not constants of it: called from JAX, a
    dictionary of what is in the second; called without JAX, arrays in the order that the third tells.

    Args:
      params: float32, with the vocabulary's padding rows.
      sequences: of an example, with a head.
    """
    parameters = named(model, params)
    exported = _exported(model, parameters, head, sequences)
    (folder / "model.stablehlo").write_bytes(exported.serialize())

    known = {name: tensor_files.Tensor(array.shape, array.dtype) for name, array in parameters.items()}
    tensor_files.write_safetensors(folder, known, parameters.items(), most_bytes=sys.maxsize)

    def described(names: list[str], arrays: tuple[Any, ...]) -> list[dict[str, Any]]:
        shapes = [[size if isinstance(size, int) else str(size) for size in array.shape] for array in arrays]
        rows = zip(names, arrays, shapes, strict=True)
        return [{"name": name, "dtype": str(array.dtype), "shape": shape} for name, array, shape in rows]

    signature = {
        "inputs": described([*parameters, *_inputs(head, sequences)], exported.in_avals),
        "outputs": described([_output(model, head)[0]], exported.out_avals),
        "limits": _limits(model),
        "platforms": exported.platforms,
        "calling_convention_version": exported.calling_convention_version,
        "jax": jax.__version__,
    }
    (folder / "signature.json").write_text(json.dumps(signature, indent=1) + "\n", encoding="utf-8")


def load_stablehlo(folder: Path) -> Computation:
    """What `write_stablehlo` wrote, run by JAX."""
    exported = jax.export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
    tensors = tensor_files.read_safetensors(folder)
    parameters = {name: jnp.asarray(tensors.read(name)) for name in tensors.known}
    call = jax.jit(exported.call)
    return lambda *inputs: np.asarray(call(parameters, *inputs))


# -- SavedModel -------------------------------------------------------------------------------------------------------------


def write_savedmodel(folder: Path, model: ModelConfig, params: Params, head: Head | None, sequences: int = 1) -> None:
    """Writes a TensorFlow SavedModel with the signature `serving_default` into `folder`; its parameters are variables.

    Args:
      params: float32, with the vocabulary's padding rows.
      sequences: of an example, with a head.
    """
    tf = _tensorflow()
    from tensorflow.compiler.tf2xla.python import xla

    parameters = named(model, params)
    exported = _exported(model, parameters, head, sequences)
    graph = stablehlo.serialize_portable_artifact_str(exported.mlir_module(), STABLEHLO_VERSION)
    name, shape = _output(model, head)
    module = tf.Module()
    # A SavedModel keeps the variables that it finds in attributes.
    module.parameters = [tf.Variable(array, name=path, trainable=False) for path, array in parameters.items()]

    def serve(*data: Any) -> dict[str, Any]:
        arguments = [*(variable.read_value() for variable in module.parameters), *data]
        (output,) = xla.call_module(
            [arguments[index] for index in exported.module_kept_var_idx],
            version=exported.calling_convention_version,
            module=graph,
            Sout=[_tensorflow_shape(shape)],
            Tout=[tf.float32],
            platforms=[platform.upper() for platform in PLATFORMS],
        )
        return {name: output}

    inputs = _inputs(head, sequences).items()
    specs = [tf.TensorSpec(_tensorflow_shape(shape), tf.int32, name=name) for name, shape in inputs]
    module.serve = tf.function(serve, input_signature=specs, autograph=False)
    try:
        tf.saved_model.save(module, str(folder), signatures={"serving_default": module.serve})
    except tf.errors.ResourceExhaustedError as error:  # how it tells of a full disk
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error


def load_savedmodel(folder: Path) -> Computation:
    """What `write_savedmodel` wrote, run by TensorFlow."""
    tf = _tensorflow()
    module = tf.saved_model.load(str(folder))
    serve = module.signatures["serving_default"]

    def compute(*inputs: np.ndarray) -> np.ndarray:
        tensors = {name: tf.constant(array, tf.int32) for name, array in zip(("tokens", "extract"), inputs, strict=False)}
        (output,) = serve(**tensors).values()
        return output.numpy()

    return compute


def _tensorflow_shape(shape: Shape) -> list[int | None]:
    return [size if isinstance(size, int) else None for size in shape]


def _tensorflow() -> Any:
    """Imports tensorflow quietly and keeps it off the GPUs, all of whose memory it would take from JAX."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    return tf


# -- ONNX -------------------------------------------------------------------------------------------------------------------


def write_onnx(folder: Path, model: ModelConfig, params: Params, head: Head | None, sequences: int = 1) -> None:
    """Writes model.onnx into `folder`, and model.onnx.data beside it if the weights are too large for one file.

    Args:
      params: float32, with the vocabulary's padding rows.
      sequences: of an example, with a head.
    """
    import onnx
    from onnx import TensorProto, helper

    graph = _Graph(named(model, params))
    output = _onnx_output(graph, model, head)
    name, shape = _output(model, head)
    graph.nodes.append(helper.make_node("Identity", [output], [name]))
    proto = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "gpt_jax",
            [helper.make_tensor_value_info(key, TensorProto.INT32, dims) for key, dims in _inputs(head, sequences).items()],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)],
            graph.tensors,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="gpt_jax",
    )
    outside = sum(len(tensor.raw_data) for tensor in graph.tensors) > INLINE_BYTES
    onnx.save(proto, folder / "model.onnx", save_as_external_data=outside, location="model.onnx.data")


def load_onnx(folder: Path) -> Computation:
    """What `write_onnx` wrote, run by ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda *inputs: session.run(None, dict(zip(("tokens", "extract"), inputs, strict=False)))[0]


class _Graph:
    """Nodes and tensors in the making. Calling it adds a node and gives the name of its output."""

    def __init__(self, parameters: dict[str, np.ndarray]) -> None:
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []
        self.parameters = {name.removeprefix("params/"): array for name, array in parameters.items()}

    def __call__(self, operator: str, *inputs: str | float | list[int], outputs: int = 1, **attributes: Any) -> Any:
        """Inputs that are no names become tensors: lists (int64) where a shape or axes are meant, numbers (float32) otherwise."""
        from onnx import helper

        names = [value if isinstance(value, str) else self._constant(value) for value in inputs]
        results = [f"{operator}_{len(self.nodes)}.{number}" for number in range(outputs)]
        self.nodes.append(helper.make_node(operator, names, results, **attributes))
        return results[0] if outputs == 1 else results

    def tensor(self, name: str, array: np.ndarray) -> str:
        """A tensor with numbers of its own, by its name."""
        from onnx import numpy_helper

        self.tensors.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def parameter(self, path: str, layer: int | None, shape: tuple[int, ...]) -> str:
        """One of the model's parameters, or one layer of it, in another shape."""
        array = self.parameters[path] if layer is None else self.parameters[path][layer]
        return self.tensor(path if layer is None else path.replace("blocks", f"blocks/{layer}"), array.reshape(shape))

    def linear(self, x: str, path: str, layer: int | None = None) -> str:
        """x @ kernel + bias, with all of the kernel's output dimensions in one."""
        width = math.prod(self.parameters[f"{path}/bias"].shape[0 if layer is None else 1 :])
        kernel = self.parameter(f"{path}/kernel", layer, (-1, width))
        return self("Add", self("MatMul", x, kernel), self.parameter(f"{path}/bias", layer, (width,)))

    def _constant(self, value: float | list[int]) -> str:
        dtype = np.int64 if isinstance(value, list) else np.float32
        return self.tensor(f"constant_{len(self.tensors)}", np.array(value, dtype))


def _onnx_output(graph: _Graph, model: ModelConfig, head: Head | None) -> str:
    """All of the computation; the name of its output."""
    from onnx import TensorProto

    tokens, table = "tokens", graph.parameter("embedding/tokens", None, (model.vocab_size, model.embed_dim))
    if head is not None:  # sequences into the batch axis
        tokens = graph("Reshape", "tokens", graph("Concat", [-1], graph("Shape", "tokens", start=2), axis=0))
    x = graph("Gather", table, tokens)
    hidden = _onnx_lstm(graph, model, x) if model.kind == "lstm" else _onnx_transformer(graph, model, x)
    if head is None:
        return graph("MatMul", hidden, graph("Transpose", table, perm=[1, 0]))
    position = graph("Reshape", graph("Cast", "extract", to=TensorProto.INT64), [-1, 1])
    extracted = graph("GatherND", hidden, position, batch_dims=1)
    examples = graph("Reshape", extracted, graph("Concat", graph("Shape", "extract"), [model.embed_dim], axis=0))
    if head.choices:
        scores = graph("Squeeze", graph.linear(examples, "head"), [-1])
    else:
        scores = graph.linear(graph("ReduceSum", examples, [1], keepdims=0), "head")
    return graph("LogSoftmax", scores, axis=-1)


def _onnx_transformer(graph: _Graph, model: ModelConfig, x: str) -> str:
    """The blocks one after another (model/transformer.py), from embedded tokens to the last one's output."""
    width = (model.embed_dim,)
    time = graph("Shape", x, start=1, end=2)
    x = graph("Add", x, graph("Slice", graph.parameter("embedding/positions", None, (-1, *width)), [0], time))
    steps = graph("CumSum", graph("Expand", [1], time), [0])
    allowed = graph("GreaterOrEqual", graph("Unsqueeze", steps, [1]), steps)  # queries x keys

    def norm(x: str, path: str, layer: int) -> str:
        gain, bias = (graph.parameter(f"{path}/{name}", layer, width) for name in ("gain", "bias"))
        return graph("LayerNormalization", x, gain, bias, axis=-1, epsilon=model.layer_norm_epsilon)

    for layer in range(model.num_layers):
        parts = graph("Split", graph.linear(x, "blocks/attention/qkv", layer), outputs=3, num_outputs=3, axis=-1)
        by_head = [graph("Reshape", part, [0, 0, model.num_heads, model.head_dim]) for part in parts]
        query, value = (graph("Transpose", by_head[index], perm=[0, 2, 1, 3]) for index in (0, 2))
        key = graph("Transpose", by_head[1], perm=[0, 2, 3, 1])
        scores = graph("Div", graph("MatMul", query, key), math.sqrt(model.head_dim))
        probabilities = graph("Softmax", graph("Where", allowed, scores, NEGATIVE), axis=-1)
        mixed = graph("Transpose", graph("MatMul", probabilities, value), perm=[0, 2, 1, 3])
        mixed = graph("Reshape", mixed, [0, 0, model.embed_dim])
        x = norm(graph("Add", x, graph.linear(mixed, "blocks/attention/out", layer)), "blocks/attention_norm", layer)
        up = graph("Gelu", graph.linear(x, "blocks/mlp/up", layer), approximate="tanh")
        x = norm(graph("Add", x, graph.linear(up, "blocks/mlp/down", layer)), "blocks/mlp_norm", layer)
    return x


def _onnx_lstm(graph: _Graph, model: ModelConfig, x: str) -> str:
    """The LSTM (model/lstm.py), from embedded tokens to the projected output."""

    def gates(path: str) -> np.ndarray:
        """[inputs, 4 x units] with the operator's order of gates (i, o, f, g) instead of ours (i, f, g, o)."""
        return graph.parameters[f"lstm/{path}"][..., [0, 3, 1, 2], :].reshape(-1, 4 * model.lstm_units)

    kernels = [graph.tensor(f"lstm/{path}", gates(path).T[None]) for path in ("input/kernel", "recurrent")]
    no_second_bias = np.zeros((1, 4 * model.lstm_units), np.float32)
    bias = graph.tensor("lstm/input/bias", np.concatenate([gates("input/bias"), no_second_bias], axis=1))
    by_time = graph("Transpose", x, perm=[1, 0, 2])
    states = graph("Squeeze", graph("LSTM", by_time, *kernels, bias, hidden_size=model.lstm_units), [1])
    return graph.linear(graph("Transpose", states, perm=[1, 0, 2]), "lstm/output")


# -- the table of formats ---------------------------------------------------------------------------------------------------


class GraphFormat(NamedTuple):
    """How a graph is written and read back."""

    write: Callable[[Path, ModelConfig, Params, Head | None, int], None]
    load: Callable[[Path], Computation]
    tolerance: float
    """Largest difference from the model's float32 outputs that counts as the same."""
    requires: tuple[str, ...]
    """Packages that must be installed; the last one runs the graph."""
    install: str
    """What to give to `pip install` for them."""

    def framework(self) -> str:
        """Name and version of what `load` runs the graph with."""
        return f"{self.requires[-1]} {importlib.import_module(self.requires[-1]).__version__}"


FORMATS = {
    # flatbuffers: jax.export serializes with it and does not require it.
    "stablehlo": GraphFormat(write_stablehlo, load_stablehlo, 1e-4, ("flatbuffers", "jax"), "flatbuffers"),
    "savedmodel": GraphFormat(write_savedmodel, load_savedmodel, 1e-3, ("tensorflow",), "tensorflow"),
    "onnx": GraphFormat(write_onnx, load_onnx, 1e-3, ("onnx", "onnxruntime"), "'gpt_jax[onnx]'"),
}


def require(format_: str) -> None:
    """Raises a `UserError` where a package that the format needs is not installed; worth knowing before anything is computed."""
    _, _, _, packages, install = FORMATS[format_]
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"--format: {format_} needs {' and '.join(missing)}: pip install {install}")
