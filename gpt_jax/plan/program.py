"""Compiles a training step or the generation of text for TPUs that are not attached."""

import math
import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from gpt_jax.config import FinetuneRunConfig, MeshConfig
from gpt_jax.errors import TrainingError, UserError, one_line
from gpt_jax.model.decode import lower_generation
from gpt_jax.plan.topology import topology_devices
from gpt_jax.plan.workload import Workload
from gpt_jax.runtime.accelerators import Accelerator
from gpt_jax.runtime.sharding import abstract_batch, make_mesh
from gpt_jax.tasks.batches import batch_spec
from gpt_jax.tasks.head import make_head
from gpt_jax.train.choices import choose_for
from gpt_jax.train.memory_estimate import change_that_fits, largest_kind, step_memory
from gpt_jax.train.step import State, abstract_state, lower_step, settle

SIZE = r"\(([\d.]+)([TGMK]?)\)"
TOO_LARGE = re.compile(rf"total memory required for .{{0,40}}? {SIZE} exceeds available HBM {SIZE}")
GIB_OF = {"T": 2.0**10, "G": 1.0, "M": 2.0**-10, "K": 2.0**-20, "": 2.0**-30}
"""The units in the compiler's messages, expressed in GiB."""
USABLE_AFTER_CHANGE = 0.95
"""Share of the memory that a program may need after a suggested change, because the effect of the change is estimated."""


class DoesNotFit(UserError):
    """The program needs more memory than a device has, even if it fits according to train/memory_estimate.py."""


class Program(NamedTuple):
    """A compiled program and its properties."""

    text: str
    """The optimized HLO."""
    mesh: Mesh
    workload: Workload
    """The workload; its config has all choices made."""
    memory: dict[str, int]
    """Bytes on one device: `parameters`, `moments` (0 for generation), `batch`, `temporaries`, `code`; `peak`, the sum of these
    and of outputs that do not reuse the memory of an input; and `alive`, the most that is in use at the same time."""
    seconds: float
    """Time for lowering and compiling, in seconds."""


def compile_program(workload: Workload, accelerator: Accelerator, slices: int = 1) -> Program:
    """Compiles a workload for TPU slices.

    Raises:
      UserError: libtpu is not installed; the devices, the batch or the model cannot be divided evenly over the mesh; or the batch
        of a pre-training does not fit according to train/memory_estimate.py.
      DoesNotFit: the program does not fit according to the compiler.
      TrainingError: the program does not compile for another reason.
    """
    jax.config.update("jax_platforms", "cpu")  # Do not look for a TPU.
    jax.config.update("jax_enable_compilation_cache", False)  # JAX cannot read these programs back.
    sizes = workload.mesh_sizes(accelerator, slices)
    mesh = make_mesh(MeshConfig(**sizes), topology_devices(topology_name(accelerator), slices)[: math.prod(sizes.values())])
    workload = workload._replace(config=choose_for(workload.config, mesh))
    started = time.monotonic()
    lowered, state = _lower(workload, mesh)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise _compile_error(error, workload, sizes, accelerator) from None
    seconds = time.monotonic() - started
    memory: Any = compiled.memory_analysis()
    bytes_of = {
        "parameters": _bytes(state["params"]),
        "moments": _bytes(state["moments"]),
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    bytes_of["batch"] = max(memory.argument_size_in_bytes - bytes_of["parameters"] - bytes_of["moments"], 0)
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.argument_size_in_bytes + outputs + bytes_of["temporaries"] + bytes_of["code"]
    alive = memory.peak_memory_in_bytes + bytes_of["code"]
    return Program(compiled.as_text() or "", mesh, workload, bytes_of | {"peak": peak, "alive": alive}, seconds)


def _lower(workload: Workload, mesh: Mesh) -> tuple[jax.stages.Lowered, State]:
    """Returns the lowered program, and the parameters and moments that it takes as abstract arrays."""
    config = workload.config
    if workload.verb == "generate":
        params = abstract_state(config, mesh)["params"]
        model = settle(config.model, mesh)
        lowered = lower_generation(model, params, workload.rows, workload.length, workload.new_tokens)
        return lowered, {"params": params, "moments": {}}
    if isinstance(config, FinetuneRunConfig) and workload.task is not None:
        head = make_head(workload.task, config)
        examples = config.train.batch_size
        batch = abstract_batch(mesh, batch_spec(examples, workload.rows // examples, head.outputs), workload.length)
        trainable = head.trainable_model()
        return lower_step(config, mesh, model=trainable, batch=batch), abstract_state(config, mesh, trainable)
    return lower_step(config, mesh), abstract_state(config, mesh)


def topology_name(accelerator: Accelerator) -> str:
    """Returns libtpu's name of a slice, such as "v5e:4x4"."""
    return f"{'tpu7x' if accelerator.family == '7x' else accelerator.family}:{accelerator.topology}"


def _bytes(tree: Any) -> int:
    """Returns the bytes of abstract arrays on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _compile_error(
    error: Exception, workload: Workload, sizes: Mapping[str, int], accelerator: Accelerator
) -> TrainingError | DoesNotFit:
    """Returns an error that says why a program does not compile; if it is too large, the error suggests a change."""
    found = TOO_LARGE.search(str(error))
    if not found:
        return TrainingError(f"the program does not compile for a {accelerator.name}: {one_line(error)}")
    needed, available = (float(number) * GIB_OF[unit] for number, unit in (found.groups()[:2], found.groups()[2:]))
    problem = f"the program needs {needed:.2f} GiB on each device of a {accelerator.name}, but can use only {available:.2f}"
    if workload.verb == "generate":
        return DoesNotFit(f"{problem}; generate fewer or shorter texts at once, or use a slice with more devices")
    step, remat = workload.as_pretraining, workload.config.model.remat
    if step.model.kind != "transformer":
        return DoesNotFit(f"{problem}; lower --train.batch-size")
    memory = step_memory(step, sizes, "tpu", remat)
    # The compiler's count is exact. The estimate only tells by how much a change lowers it.
    usable = int(USABLE_AFTER_CHANGE * available / needed * sum(memory))
    change = change_that_fits(step, sizes, "tpu", remat, usable, workload.rows // workload.examples)
    share = f"{largest_kind(memory)} take the most, about {max(memory) / sum(memory):.0%}"
    return DoesNotFit(f"{problem}; {share}; use {change or 'more devices or a smaller --train.batch-size'}")
