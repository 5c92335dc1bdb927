"""Graphs that are traced from the model's own functions: StableHLO files, and TensorFlow SavedModels that wrap StableHLO."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.extend.mlir.dialects import stablehlo

from gpt_jax.data.pipeline import import_tensorflow
from gpt_jax.interop import tensor_files
from gpt_jax.interop.parity import Computation, ExportedFunction, Shape

PLATFORMS = ("cpu", "cuda", "tpu")

STABLEHLO_VERSION = "1.1.0"
"""StableHLO version of the SavedModel's graph. It is the oldest version that can express the model, so that every TensorFlow can
read it. The version that JAX 0.12 and its jax2tf write by default is too new for TensorFlow 2.21."""


def _trace(function: ExportedFunction, parameters: dict[str, np.ndarray]) -> jax.export.Exported:
    """Traces a function for all `PLATFORMS`. The parameters are its first inputs, in the order of their names."""
    scope = jax.export.SymbolicScope(function.limits)
    inputs = [
        jax.ShapeDtypeStruct(jax.export.symbolic_shape(", ".join(map(str, shape)), scope=scope), jnp.int32)
        for shape in function.inputs.values()
    ]
    specs = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in parameters.items()}

    def compute(parameters: dict[str, Any], *inputs: jax.Array) -> jax.Array:
        return function(traverse_util.unflatten_dict(parameters, sep="/")["params"], *inputs)

    return jax.export.export(jax.jit(compute), platforms=PLATFORMS)(specs, *inputs)


# -- StableHLO --------------------------------------------------------------------------------------------------------------


def write_stablehlo(folder: Path, function: ExportedFunction, parameters: dict[str, np.ndarray]) -> None:
    """Writes model.stablehlo, model.safetensors and signature.json into `folder`.

    The first file is a serialized `jax.export.Exported`. The second file has the parameters, which are inputs of the graph, not
    constants. From JAX, the graph is called with a dictionary of parameters. Without JAX, it is called with arrays in the order
    that the third file lists.

    Args:
      parameters: float32, as `ExportedFunction.named_parameters` returns them.
    """
    exported = _trace(function, parameters)
    (folder / "model.stablehlo").write_bytes(exported.serialize())
    tensor_files.save_safetensors(folder, parameters)

    arrays = [(name, "float32", array.shape) for name, array in parameters.items()]
    inputs = [(name, "int32", shape) for name, shape in function.inputs.items()]
    name, shape = function.output
    signature = {
        "inputs": [{"name": name, "dtype": dtype, "shape": shape} for name, dtype, shape in arrays + inputs],
        "outputs": [{"name": name, "dtype": "float32", "shape": shape}],
        "limits": function.limits,
        "platforms": exported.platforms,
        "calling_convention_version": exported.calling_convention_version,
        "jax": jax.__version__,
    }
    (folder / "signature.json").write_text(json.dumps(signature, indent=1) + "\n", encoding="utf-8")


def load_stablehlo(folder: Path) -> Computation:
    """Returns a function that runs the graph of `write_stablehlo` with JAX."""
    exported = jax.export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
    parameters = jax.tree.map(jnp.asarray, tensor_files.load_safetensors(folder))
    call = jax.jit(exported.call)
    return lambda *inputs: np.asarray(call(parameters, *inputs))


# -- SavedModel -------------------------------------------------------------------------------------------------------------


def write_savedmodel(folder: Path, function: ExportedFunction, parameters: dict[str, np.ndarray]) -> None:
    """Writes a TensorFlow SavedModel with the signature `serving_default` into `folder`. The parameters are its variables.

    Args:
      parameters: float32, as `ExportedFunction.named_parameters` returns them.
    """
    tf = import_tensorflow()
    from tensorflow.compiler.tf2xla.python import xla

    exported = _trace(function, parameters)
    graph = stablehlo.serialize_portable_artifact_str(exported.mlir_module(), STABLEHLO_VERSION)
    name, shape = function.output
    module = tf.Module()
    # TensorFlow saves the variables that it finds in the module's attributes.
    module.parameters = [tf.Variable(array, name=path, trainable=False) for path, array in parameters.items()]

    def serve(*inputs: Any) -> dict[str, Any]:
        arguments = [*(variable.read_value() for variable in module.parameters), *inputs]
        (output,) = xla.call_module(
            [arguments[index] for index in exported.module_kept_var_idx],
            version=exported.calling_convention_version,
            module=graph,
            Sout=[_tensorflow_shape(shape)],
            Tout=[tf.float32],
            platforms=[platform.upper() for platform in PLATFORMS],
        )
        return {name: output}

    specs = [tf.TensorSpec(_tensorflow_shape(dims), tf.int32, name=key) for key, dims in function.inputs.items()]
    module.serve = tf.function(serve, input_signature=specs, autograph=False)
    try:
        tf.saved_model.save(module, str(folder), signatures={"serving_default": module.serve})
    except tf.errors.ResourceExhaustedError as error:  # This is how TensorFlow reports a full disk.
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error


def load_savedmodel(folder: Path) -> Computation:
    """Returns a function that runs the graph of `write_savedmodel` with TensorFlow."""
    tf = import_tensorflow()
    module = tf.saved_model.load(str(folder))
    serve = module.signatures["serving_default"]

    def compute(*inputs: np.ndarray) -> np.ndarray:
        tensors = {name: tf.constant(array, tf.int32) for name, array in zip(("tokens", "extract"), inputs, strict=False)}
        (output,) = serve(**tensors).values()
        return output.numpy()

    return compute


def _tensorflow_shape(shape: Shape) -> list[int | None]:
    return [size if isinstance(size, int) else None for size in shape]
