"""ONNX files, which are written operator by operator.

The existing converters are not suitable: jax2onnx traces our models at fixed sizes only, and tf2onnx does not support the
operator that our SavedModels consist of.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from gpt_jax.config import ModelConfig
from gpt_jax.interop.parity import Computation, ExportedFunction
from gpt_jax.model.kernels.blockwise import MASKED

OPSET, IR_VERSION = 20, 9
"""Versions of ONNX 1.15 (2023), the first release in which GELU is an operator."""

INLINE_BYTES = 2**31 - 2**24
"""Maximum size in bytes of the weights inside an ONNX file, which cannot exceed 2 GiB. Larger weights go into a separate file."""


def write_onnx(folder: Path, function: ExportedFunction, parameters: dict[str, np.ndarray]) -> None:
    """Writes model.onnx into `folder`, and also model.onnx.data if the weights are too large for one file.

    Args:
      parameters: float32, as `ExportedFunction.named_parameters` returns them.
    """
    import onnx
    from onnx import TensorProto, helper

    graph = _Graph(parameters)
    result = _add_function(graph, function)
    name, shape = function.output
    graph.nodes.append(helper.make_node("Identity", [result], [name]))
    inputs = [helper.make_tensor_value_info(key, TensorProto.INT32, dims) for key, dims in function.inputs.items()]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)]
    proto = helper.make_model(
        helper.make_graph(graph.nodes, "gpt_jax", inputs, outputs, graph.tensors),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="gpt_jax",
    )
    external = sum(len(tensor.raw_data) for tensor in graph.tensors) > INLINE_BYTES
    onnx.save(proto, folder / "model.onnx", save_as_external_data=external, location="model.onnx.data")


def load_onnx(folder: Path) -> Computation:
    """Returns a function that runs the graph of `write_onnx` with ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda *inputs: session.run(None, dict(zip(("tokens", "extract"), inputs, strict=False)))[0]


class _Graph:
    """An ONNX graph under construction. A call adds a node and returns the name of its output, or the names of several."""

    def __init__(self, parameters: dict[str, np.ndarray]) -> None:
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []
        self.parameters = {name.removeprefix("params/"): array for name, array in parameters.items()}

    def __call__(self, operator: str, *inputs: str | float | list[int], outputs: int = 1, **attributes: Any) -> Any:
        """Adds a node.

        Args:
          inputs: names of other nodes' outputs or of tensors. A list (a shape or axes) becomes an int64 tensor, and a number
            becomes a float32 tensor.
        """
        from onnx import helper

        names = [value if isinstance(value, str) else self._constant(value) for value in inputs]
        results = [f"{operator}_{len(self.nodes)}.{number}" for number in range(outputs)]
        self.nodes.append(helper.make_node(operator, names, results, **attributes))
        return results[0] if outputs == 1 else results

    def tensor(self, name: str, array: np.ndarray) -> str:
        """Adds a tensor with the given numbers and returns its name."""
        from onnx import numpy_helper

        self.tensors.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def parameter(self, path: str, layer: int | None, shape: tuple[int, ...]) -> str:
        """Adds one of the model's parameters, or one layer of it, in the given shape and returns its name."""
        array = self.parameters[path] if layer is None else self.parameters[path][layer]
        return self.tensor(path if layer is None else path.replace("blocks", f"blocks/{layer}"), array.reshape(shape))

    def linear(self, x: str, path: str, layer: int | None = None) -> str:
        """Adds x @ kernel + bias, with the output dimensions of the kernel merged into one axis."""
        width = math.prod(self.parameters[f"{path}/bias"].shape[0 if layer is None else 1 :])
        kernel = self.parameter(f"{path}/kernel", layer, (-1, width))
        return self("Add", self("MatMul", x, kernel), self.parameter(f"{path}/bias", layer, (width,)))

    def index(self, name: str, size: str | list[int]) -> str:
        """Adds an input of indices as int64, with negative ones replaced by `size`.

        The operators would count negative indices from the end. `size` is out of range, which ONNX Runtime reports as an error.
        """
        from onnx import TensorProto

        indices = self("Cast", name, to=TensorProto.INT64)
        return self("Where", self("Less", indices, [0]), size, indices)

    def _constant(self, value: float | list[int]) -> str:
        dtype = np.int64 if isinstance(value, list) else np.float32
        return self.tensor(f"constant_{len(self.tensors)}", np.array(value, dtype))


def _add_function(graph: _Graph, function: ExportedFunction) -> str:
    """Adds the complete function and returns the name of its output."""
    model, head = function.model, function.head
    table = graph.parameter("embedding/tokens", None, (model.vocab_size, model.embed_dim))
    tokens = graph.index("tokens", [model.vocab_size])
    if head is not None:  # The sequences are folded into the batch axis.
        tokens = graph("Reshape", tokens, graph("Concat", [-1], graph("Shape", "tokens", start=2), axis=0))
    x = graph("Gather", table, tokens)
    hidden = _add_lstm(graph, model, x) if model.kind == "lstm" else _add_transformer(graph, model, x)
    if head is None:
        return graph("MatMul", hidden, graph("Transpose", table, perm=[1, 0]))
    position = graph("Reshape", graph.index("extract", graph("Shape", "tokens", start=2)), [-1, 1])
    extracted = graph("GatherND", hidden, position, batch_dims=1)
    examples = graph("Reshape", extracted, graph("Concat", graph("Shape", "extract"), [model.embed_dim], axis=0))
    if head.choices:
        scores = graph("Squeeze", graph.linear(examples, "head"), [-1])
    else:
        scores = graph.linear(graph("ReduceSum", examples, [1], keepdims=0), "head")
    return graph("LogSoftmax", scores, axis=-1)


def _add_transformer(graph: _Graph, model: ModelConfig, x: str) -> str:
    """Adds the positions and the blocks (model/transformer.py) to embedded tokens; returns the name of the last output."""
    width = (model.embed_dim,)
    time = graph("Shape", x, start=1, end=2)
    x = graph("Add", x, graph("Slice", graph.parameter("embedding/positions", None, (-1, *width)), [0], time))
    steps = graph("CumSum", graph("Expand", [1], time), [0])
    allowed = graph("GreaterOrEqual", graph("Unsqueeze", steps, [1]), steps)  # [queries, keys]

    def norm(x: str, path: str, layer: int) -> str:
        gain, bias = (graph.parameter(f"{path}/{name}", layer, width) for name in ("gain", "bias"))
        return graph("LayerNormalization", x, gain, bias, axis=-1, epsilon=model.layer_norm_epsilon)

    for layer in range(model.num_layers):
        parts = graph("Split", graph.linear(x, "blocks/attention/qkv", layer), outputs=3, num_outputs=3, axis=-1)
        by_head = [graph("Reshape", part, [0, 0, model.num_heads, model.head_dim]) for part in parts]
        query, value = (graph("Transpose", by_head[index], perm=[0, 2, 1, 3]) for index in (0, 2))
        key = graph("Transpose", by_head[1], perm=[0, 2, 3, 1])
        scores = graph("Div", graph("MatMul", query, key), math.sqrt(model.head_dim))
        probabilities = graph("Softmax", graph("Where", allowed, scores, MASKED), axis=-1)
        mixed = graph("Transpose", graph("MatMul", probabilities, value), perm=[0, 2, 1, 3])
        mixed = graph("Reshape", mixed, [0, 0, model.embed_dim])
        x = norm(graph("Add", x, graph.linear(mixed, "blocks/attention/out", layer)), "blocks/attention_norm", layer)
        up = graph("Gelu", graph.linear(x, "blocks/mlp/up", layer), approximate="tanh")
        x = norm(graph("Add", x, graph.linear(up, "blocks/mlp/down", layer)), "blocks/mlp_norm", layer)
    return x


def _add_lstm(graph: _Graph, model: ModelConfig, x: str) -> str:
    """Adds the LSTM (model/lstm.py) to embedded tokens; returns the name of its projected output."""

    def gates(path: str) -> np.ndarray:
        """Returns [inputs, 4 x units] with the gates in the operator's order (i, o, f, g) instead of ours (i, f, g, o)."""
        return graph.parameters[f"lstm/{path}"][..., [0, 3, 1, 2], :].reshape(-1, 4 * model.lstm_units)

    kernels = [graph.tensor(f"lstm/{path}", gates(path).T[None]) for path in ("input/kernel", "recurrent")]
    no_second_bias = np.zeros((1, 4 * model.lstm_units), np.float32)
    bias = graph.tensor("lstm/input/bias", np.concatenate([gates("input/bias"), no_second_bias], axis=1))
    by_time = graph("Transpose", x, perm=[1, 0, 2])
    states = graph("Squeeze", graph("LSTM", by_time, *kernels, bias, hidden_size=model.lstm_units), [1])
    return graph.linear(graph("Transpose", states, perm=[1, 0, 2]), "lstm/output")
