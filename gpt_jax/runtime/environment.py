"""Checks of the environment variables that JAX, XLA, CUDA and clusters read.

A wrong value is a user's mistake, but it is not reported as one: JAX raises an exception from deep inside, XLA aborts the
process, CUDA hides the GPUs, and processes that lack a variable train alone. So the values are checked before JAX reads them.
"""

import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpt_jax.config import DistributedConfig
from gpt_jax.errors import UserError, field_error, shortened
from gpt_jax.runtime.memory import keep_freed_memory

ADDRESS = r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.%]+\]):([0-9]{1,5})"
"""Pattern of HOST:PORT; an IPv6 address is in brackets."""
NODE = r"[A-Za-z0-9._-]+(\[[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*\][A-Za-z0-9._-]*)*"
"""Pattern of one entry in a list of SLURM's nodes, such as "node7" or "node[001-004,007]"."""
GPU = r"[0-9]+|(GPU|MIG)-[0-9A-Za-z/-]+"
"""Pattern of one entry of CUDA_VISIBLE_DEVICES: a number or a UUID."""
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
"""The variables by which JAX recognizes a step of a SLURM job; it needs all of them."""
JOIN = "JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID"


# -- values -----------------------------------------------------------------------------------------------------------------


def _mistake(name: str, expected: str) -> UserError:
    return UserError(f"{name}={shortened(os.environ[name])}: {expected}")


def _require(name: str, pattern: str, expected: str) -> None:
    """Checks a variable, if it is set, against a pattern."""
    if name in os.environ and re.fullmatch(pattern, os.environ[name]) is None:
        raise _mistake(name, f"must be {expected}")


def _number(name: str, least: int, most: int | None = None) -> int:
    """Returns the value of a variable that must be a whole number from `least` to `most` (None: no limit)."""
    if not os.environ.get(name):
        raise UserError(f"{name} is not set, but the processes of a run need it; set {JOIN}, or unset all of them")
    value = int(os.environ[name]) if re.fullmatch("[0-9]{1,18}", os.environ[name]) else -1
    if value < least or (most is not None and value > most):
        raise _mistake(name, f"must be a whole number {f'of at least {least}' if most is None else f'from {least} to {most}'}")
    return value


def _require_address(name: str, value: str) -> None:
    match = re.fullmatch(ADDRESS, value)
    if match is None or not 0 < int(match[2]) < 1 << 16:
        expected = f"'{shortened(value)}' is not HOST:PORT with a port from 1 to 65535, such as 10.0.0.2:1234"
        raise field_error(name, expected) if "." in name else UserError(f"{name}: {expected}")


# -- the processes of a run -------------------------------------------------------------------------------------------------


def cluster_arguments(config: DistributedConfig) -> dict[str, Any] | None:
    """Returns the arguments of jax.distributed.initialize, {} if JAX detects them, or None for a single process.

    Raises:
      UserError: a variable that describes the processes is missing or invalid.
    """
    env = os.environ
    arguments: dict[str, Any] | None
    if config.coordinator:
        _require_address("distributed.coordinator", config.coordinator)
        arguments = {"coordinator_address": config.coordinator}
        arguments |= {"num_processes": config.num_processes, "process_id": config.process_id}
    elif "JAX_COORDINATOR_ADDRESS" in env:
        _require_address("JAX_COORDINATOR_ADDRESS", env["JAX_COORDINATOR_ADDRESS"])
        count = _number("JAX_NUM_PROCESSES", 1)
        indexed = not env.get("JAX_PROCESS_ID") and "JOB_COMPLETION_INDEX" in env
        number = _number("JOB_COMPLETION_INDEX" if indexed else "JAX_PROCESS_ID", 0, count - 1)
        arguments = {"coordinator_address": env["JAX_COORDINATOR_ADDRESS"], "num_processes": count, "process_id": number}
    else:
        for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
            if env.get(name) and env.get("JAX_NUM_PROCESSES") != "1":
                raise _mistake(name, f"has no effect without JAX_COORDINATOR_ADDRESS; set {JOIN}, or unset all of them")
        arguments = {} if _is_slurm_step() or _is_indexed_job() or _is_tpu_pod() else None
    if arguments is not None:
        _check_jax_details()
    return arguments


def _is_slurm_step() -> bool:
    """Returns whether this process is one of several in a step of a SLURM job, after checking the variables that JAX reads."""
    if "SLURM_STEP_NUM_TASKS" not in os.environ or _number("SLURM_STEP_NUM_TASKS", 1) == 1:
        return False
    for name in SLURM:
        if name not in os.environ:
            raise UserError(f"{name} is not set, but SLURM_STEP_NUM_TASKS is; start the processes with srun, or set {JOIN}")
    return True


def _is_indexed_job() -> bool:
    if not {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= os.environ.keys():
        return False
    _number("JOB_COMPLETION_INDEX", 0)
    return True


def _has_tpu_device() -> bool:
    """Returns whether a TPU is attached to this machine."""
    return any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def _has_tpu() -> bool:
    """Returns whether this machine has a TPU that JAX may use."""
    return (
        _has_tpu_device()
        and "tpu" in (os.environ.get("JAX_PLATFORMS") or "tpu")
        and importlib.util.find_spec("libtpu") is not None
    )


def _is_tpu_pod() -> bool:
    if not _has_tpu():
        return False
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES") or ""
    if "TPU_WORKER_ID" in os.environ:
        _number("TPU_WORKER_ID", 0, hosts.count(",") if hosts else None)
    slices = _number("MEGASCALE_NUM_SLICES", 1) if os.environ.get("MEGASCALE_NUM_SLICES") else None
    if os.environ.get("MEGASCALE_SLICE_ID"):
        _number("MEGASCALE_SLICE_ID", 0, slices - 1 if slices else None)
    return True


def _check_jax_details() -> None:
    """Checks the other variables that jax.distributed.initialize reads."""
    env = os.environ
    if env.keys() >= set(SLURM):  # JAX then takes from SLURM what it is not told, such as the number of the GPU.
        _number("SLURM_JOB_ID", 0)
        _number("SLURM_PROCID", 0, _number("SLURM_NTASKS", 1) - 1)
        _number("SLURM_LOCALID", 0)
        for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"):
            _require(name, f"{NODE}(,{NODE})*", "a list of nodes, such as node1,node2 or node[01-04]")
    if "JAX_COORDINATOR_BIND_ADDRESS" in env:
        _require_address("JAX_COORDINATOR_BIND_ADDRESS", env["JAX_COORDINATOR_BIND_ADDRESS"])
    if "JAX_COORDINATOR_PORT" in env:
        _number("JAX_COORDINATOR_PORT", 1, (1 << 16) - 1)
    _require("JAX_LOCAL_DEVICE_IDS", "([0-9]+(,[0-9]+)*)?", "the numbers of this process's devices, such as 0,1")
    for name in ("JAX_PARTITION_INDEX", "JAX_SLICE_INDEX"):
        _require(name, "[0-9]+", "a whole number")


# -- devices and compilers --------------------------------------------------------------------------------------------------


def check_variables() -> None:
    """Checks the variables that XLA, CUDA and JAX read when they are first used.

    Raises:
      UserError: a value is invalid.
    """
    if (flags := os.environ.get("XLA_FLAGS", "").strip()) and (problem := _xla_flags_problem(flags)):
        raise _mistake("XLA_FLAGS", problem)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if visible not in ("", "-1", "NoDevFiles", "void", "none", "all"):
        _require(
            "CUDA_VISIBLE_DEVICES", f"({GPU})( *, *({GPU}))*", "the numbers of GPUs, such as 0,1, or their UUIDs; -1 for none"
        )
        entries = re.split(" *, *", visible)
        if len(set(entries)) < len(entries):
            raise _mistake("CUDA_VISIBLE_DEVICES", "must not name a GPU twice")
    _require("JAX_NUM_CPU_DEVICES", "-1|0*[1-9][0-9]{0,5}", "the number of devices that the CPU simulates, at least 1")


def explain_import_error(error: ValueError) -> UserError | None:
    """Returns an error that names the variable whose value JAX rejected on import; None for other errors."""
    match = re.search("JAX flag (jax_[a-z0-9_]+)|environment '(JAX_[A-Z0-9_]+)'", str(error))
    name = (match[1] or match[2]).upper() if match else ""
    return _mistake(name, f"JAX does not accept this value ({str(error).splitlines()[0]})") if name in os.environ else None


@functools.cache
def _xla_flags_problem(flags: str) -> str:
    """Returns what is wrong with a value of XLA_FLAGS; empty if nothing is.

    XLA parses the flags when it is first used, and aborts the process if they are wrong. So another process parses them first,
    which takes about 0.2 s.
    """
    code = "from jaxlib import _jax; _jax.CompileOptions()"  # without importing JAX, which takes longer
    environment = os.environ | {"XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, errors="replace")
    for pattern, problem in (
        (
            r"Unknown flags? in XLA_FLAGS: (.*)",
            "XLA has no such flag: {}; correct or remove it (flags of libtpu belong in LIBTPU_INIT_ARGS)",
        ),
        (r"Couldn't interpret value (.*?)\.?$", "XLA cannot read the value {}"),
        (
            r"Could not open file (\"[^\"]*\")",
            "must consist of flags like --xla_dump_to=FOLDER, or name a file of flags; there is no file {}",
        ),
    ):
        if done.returncode and (match := re.search(pattern, done.stderr, re.MULTILINE)):
            return problem.format(shortened(match[1], 200))
    return ""


def _may_use_accelerators() -> bool:
    """Returns whether JAX may find GPUs or TPUs, which is not known before it has started their plugins."""
    plugins = any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
    return os.environ.get("JAX_PLATFORMS", "") != "cpu" and plugins


def _has_libtpu_only() -> bool:
    """Returns whether libtpu is installed, for compiling, on a machine without TPUs and without plugins for GPUs."""
    return bool(importlib.util.find_spec("libtpu")) and not importlib.util.find_spec("jax_plugins") and not _has_tpu_device()


def require_devices() -> None:
    """Starts JAX's backends and checks that they have the requested devices, and lets JAX keep compiled programs.

    Freed memory is kept for reuse, unless a plugin for GPUs or TPUs is installed.

    Raises:
      UserError: a platform in JAX_PLATFORMS is not available, or CUDA_VISIBLE_DEVICES names GPUs that do not exist.
    """
    requested = os.environ.get("JAX_PLATFORMS")
    if not requested and _has_libtpu_only():
        # JAX would start libtpu, which takes seconds and prints warnings. This also applies to processes that this one starts.
        os.environ["JAX_PLATFORMS"] = "cpu"
    if not _may_use_accelerators():
        keep_freed_memory()
    import jax

    if not requested and os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])  # JAX may have been imported before.
    from gpt_jax.runtime import compilation_cache, console

    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX 0.10 asserts if a platform's plugin is not installed.
        reason = (str(error).splitlines() or ["its plugin is not installed"])[0].partition(" (set JAX_PLATFORMS")[0].rstrip(".")
        hint = "name platforms that this machine has, such as cpu, or unset it"
        if requested:
            raise _mistake("JAX_PLATFORMS", f"JAX cannot use this ({reason}); {hint}") from error
        raise UserError(f"JAX cannot use the devices of this machine ({reason}); JAX_PLATFORMS=cpu uses the CPU") from error
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES", "").count(",") + 1
    if devices[0].platform == "gpu" and jax.process_count() == 1 and len(devices) < wanted:
        raise _mistake("CUDA_VISIBLE_DEVICES", f"names {wanted} GPUs, but only {len(devices)} of them can be used")
    compilation_cache.enable(console.say if jax.process_index() == 0 else lambda line: None)
