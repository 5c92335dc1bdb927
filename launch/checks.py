"""Checks of a job before anything is created: whether its config fits the hardware, and whether its processes can see all paths.

None of them needs JAX or the accelerator.
"""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gpt_jax.config import FinetuneConfig, ModelConfig, PretrainConfig, RunConfig
from gpt_jax.config.load import apply_overrides, config_names, flatten_config, load_config
from gpt_jax.data.sources import open_source
from gpt_jax.errors import UserError, require
from gpt_jax.runtime.accelerators import Accelerator
from gpt_jax.runtime.chips import GIB
from gpt_jax.runtime.mesh import check_batch, check_model, mesh_sizes

from .job import BUCKETS, CLAIMS, Job, to_mount_paths

MINIMUMS = {"slices": 1, "preemptions": 0, "crashes": 0, "grace_seconds": 1, "seeds": 1}
REGION = "[a-z]+-[a-z]+[0-9]+"
"""Pattern of a region of Google Cloud, such as us-central1; a zone in it is us-central1-a, or us-central1-ai1a."""
BUCKET_NAME = "[a-z0-9]([a-z0-9._-]*[a-z0-9])?"
KUBERNETES_NAME = r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*"
"""Pattern of a DNS subdomain, which is the form of most names in Kubernetes."""


def check(job: Job, target: Any) -> None:
    """Checks that a target can run a job, as far as this machine can tell.

    Args:
      job: the job.
      target: the target's module. It has `MOUNTS` (see `check_paths`), `UNSUPPORTED` (the options that it does not accept, each
        with the reason) and a function `check(job)` for its own requirements.

    Raises:
      UserError: as `check_job` and `check_paths`, or the target does not support something that the job requests.
    """
    check_paths(job, check_job(job), target.MOUNTS)
    for name, reason in target.UNSUPPORTED.items():
        require(getattr(job, name) == getattr(Job, name), name, f"leave it out; {reason}")
    target.check(job)


# -- the job by itself ------------------------------------------------------------------------------------------------------


def check_job(job: Job) -> RunConfig:
    """Performs the checks that are the same on every target; returns the job's config with its overrides.

    Raises:
      UserError: an option, the name, the config or an override is wrong; there is no text or checkpoint to start from; the mesh
        does not fit the devices, or does not divide the batch and the model; or the parameters, gradients and optimizer state
        alone exceed the memory of the devices.
    """
    _check_options(job)
    config = apply_overrides(load_config(job.config), list(job.overrides), f"gpt-jax {job.verb} {job.config}")
    require(not config.distributed.coordinator, "distributed.coordinator", "leave it out; the launcher sets it")
    _check_input(job, config)
    sizes = mesh_sizes(config.mesh, job.accelerator, job.slices)
    check_batch(sizes, config.train.batch_size, config.train.grad_accum_steps)
    if not isinstance(config, FinetuneConfig):  # For fine-tuning, the architecture is that of the checkpoint.
        check_model(sizes, config.model)
        _check_memory(config.model, sizes, job.accelerator)
    return config


def _check_options(job: Job) -> None:
    options = {field.name: getattr(job, field.name) for field in dataclasses.fields(job)}
    words = [(f"--{name}: ", str(value)) for name, value in options.items() if name != "overrides"]
    words += [("", word) for word in job.overrides]
    for prefix, word in words:
        if re.search(r"[\x00-\x1f\x7f-\x9f]", word):
            raise UserError(f"{prefix}{word!r} contains a line break or another control character; remove it")
    valid = re.fullmatch("[a-z]([-a-z0-9]{0,38}[a-z0-9])?", job.name) is not None
    rule = "must have at most 40 characters a-z, 0-9 and '-', start with a letter, and not end with '-'"
    require(valid, "name", f"'{job.name}' {rule}")
    require(re.fullmatch("[a-z0-9-]*", job.zone) is not None, "zone", f"'{job.zone}' must consist of a-z, 0-9 and '-'")
    if re.fullmatch(f"{REGION}|[a-z]+(-[a-z]+)+-[0-9]+", job.zone):  # of Google Cloud, or of AWS
        example = job.zone + ("-a" if re.fullmatch(REGION, job.zone) else "a")
        raise UserError(f"--zone: '{job.zone}' is a region; name one of its zones, for example {example}")
    for name in ("project", "queue"):
        require(re.search(r"[\s'\"`]", options[name]) is None, name, f"{options[name]!r} must not contain blanks or quotes")
    for name, minimum in MINIMUMS.items():
        require(options[name] >= minimum, name, f"must be at least {minimum}, not {options[name]}")
    require(job.verb == "finetune" or job.seeds == 1, "seeds", "applies to fine-tuning; for pre-training, set --train.seed")
    require(bool(job.workdir), "workdir", "name the folder for the run")


def require_google_zone(zone: str) -> None:
    """Checks that a zone, if one is given, has the form of Google Cloud's zones."""
    valid = not zone or re.fullmatch(f"{REGION}-(ai[0-9]+)?[a-z]", zone) is not None
    require(valid, "zone", f"'{zone}' is not a zone of Google Cloud, such as us-central1-a")


def _check_input(job: Job, config: RunConfig) -> None:
    """Checks that fine-tuning has a checkpoint to start from, or that pre-training has text to read."""
    if isinstance(config, FinetuneConfig):
        require(bool(config.init.from_), "init.from", "name the run or checkpoint to fine-tune, or none for random parameters")
    if isinstance(config, PretrainConfig) and not (config.data.store or config.data.source):
        store = Path(job.workdir) / "store" / "index.json"
        if not store.exists():
            open_source(config.data)  # raises the error that the run would raise


def _check_memory(model: ModelConfig, sizes: Mapping[str, int], accelerator: Accelerator) -> None:
    """Checks that the training state fits into the devices' memory, if the size of the memory is known."""
    total = model.num_parameters * bytes_per_parameter(model)
    needed = total / (sizes["fsdp"] * sizes["tensor"])
    if not accelerator.memory or needed <= accelerator.memory:
        return
    devices = sizes["data"] * sizes["fsdp"]  # the number of devices to divide between these two axes
    possible = (size for size in range(1, devices + 1) if devices % size == 0 and model.embed_dim % size == 0)
    fitting = [size for size in possible if total / (size * sizes["tensor"]) <= accelerator.memory]
    advice = f"set --mesh.data -1 --mesh.fsdp {fitting[0]}" if fitting else "no --mesh.fsdp is large enough: use more devices"
    raise UserError(
        f"--mesh.fsdp: {model.num_parameters:,} parameters, their gradients and the optimizer state need {needed / GIB:.1f} GiB "
        f"on each device, without activations, and {accelerator.name} has {accelerator.memory / GIB:.0f} GiB; {advice}"
    )


def bytes_per_parameter(model: ModelConfig) -> int:
    """Returns the bytes of a parameter, its gradient in the same type, and the two moments of Adam in float32."""
    return 2 * {"float32": 4, "bfloat16": 2}[model.param_dtype] + 2 * 4


# -- paths ------------------------------------------------------------------------------------------------------------------


def with_absolute_paths(job: Job) -> Job:
    """Returns the job with absolute paths, because a batch file or commands may be run in another folder.

    Paths that only the config contains are added to the overrides.
    """
    config = apply_overrides(load_config(job.config), list(job.overrides), f"gpt-jax {job.verb} {job.config}")
    paths = {field: str(Path(path).absolute()) for field, path in _paths(job, config) if path and "://" not in path}
    overrides: list[str] = []
    last = ""
    for word in job.overrides:
        option, equals, _ = word.partition("=")
        field = (option if equals else last).removeprefix("--").replace("_", "-")
        last = word
        if field in paths and (equals or not word.startswith("--")):
            word = f"{option}={paths[field]}" if equals else paths[field]
        overrides.append(word)
    given = {word.partition("=")[0].removeprefix("--").replace("_", "-") for word in overrides if word.startswith("--")}
    for field, path in paths.items():
        if field not in given | {"workdir"}:
            overrides += [f"--{field}", path]
    file = os.path.abspath(os.path.expanduser(job.config)) if job.config.endswith(".py") else job.config
    return dataclasses.replace(job, workdir=paths.get("workdir", job.workdir), config=file, overrides=tuple(overrides))


def check_paths(job: Job, config: RunConfig, roots: tuple[str, ...]) -> None:
    """Checks that the processes can see the config file and every path that it and --workdir name.

    Args:
      job: the job.
      config: the job's config.
      roots: folders in which the target mounts storage on its workers, if they are other machines (`BUCKETS`, `CLAIMS`); empty if
        the processes see the same files as this machine, and no buckets.

    Raises:
      UserError: a path is only on this machine, is not valid, or is only in the config, so that the launcher would not mount it.
    """
    if not roots:
        for field, path in _paths(job, config):
            require("://" not in path, field, f"'{path}' is not a file or folder, and this target mounts no buckets")
        return
    if job.config.endswith(".py"):
        visible = job.config.startswith(roots)
        require(visible, "config", f"'{job.config}' is on this machine, where workers cannot read it; move it into configs/")
        _check_mount("config", job.config, roots)
    arguments = {word.partition("=")[2] if word.startswith("--") else word for word in job.command()}
    for field, path in _paths(job, config):
        _check_mount(field, path, roots)
        require(path in arguments, field, f"'{path}' is only in the config; repeat it on the command line, so that it is mounted")


def _paths(job: Job, config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yields each option or field that names a file or folder, and its path."""
    yield "workdir", job.workdir
    for field, (path, affects) in flatten_config(config).items():
        other = (
            (field == "data.source" and path.startswith(("builtin:", "tfds:")))
            or (field == "init.from" and path == "none")
            or (field == "init.like" and path in config_names())
        )
        if affects == "input" and path and not other:
            yield field, path


def _check_mount(field: str, path: str, roots: tuple[str, ...]) -> None:
    """Checks that a path is in storage that the workers mount."""
    form = "gs://BUCKET/PATH or /mnt/CLAIM/PATH" if CLAIMS in roots else "gs://BUCKET/PATH"
    match = re.fullmatch(f"({BUCKETS}|{CLAIMS})([^/]*)(.*)", to_mount_paths([path])[0])
    if match is None or match[1] not in roots:
        raise UserError(f"--{field}: '{path}' cannot be reached from the workers, which are other machines; give {form}")
    root, name, inside = match.groups()
    kind, pattern, characters = {
        BUCKETS: ("bucket", BUCKET_NAME, "a-z, 0-9, '-', '_' and '.'"),
        CLAIMS: ("PersistentVolumeClaim", KUBERNETES_NAME, "a-z, 0-9, '-' and '.'"),
    }[root]
    valid = re.fullmatch(pattern, name) is not None
    require(valid, field, f"'{path}': '{name}' cannot be the name of a {kind}, which consists of {characters}")
    require(bool(inside.strip("/")), field, f"'{path}' has no path inside '{name}'; give {form}")
    require(".." not in inside.split("/"), field, f"'{path}' leads out of the mounted storage; remove the '..'")
