"""One training that is to run somewhere else, and what can be known about it before anything is created there.

The same words mean the same on every target. Nothing here needs an accelerator: what fits is arithmetic on the config.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from gpt_jax.config import FinetuneConfig, MeshConfig, ModelConfig, PretrainConfig, RunConfig
from gpt_jax.config.load import apply_overrides, config_names, flatten_config, load_config
from gpt_jax.errors import Preempted, UserError, require

from . import accelerators
from .accelerators import GIB, Accelerator

RESTART_CODE = Preempted.exit_code
"""Exit code of a run that was told to stop and has saved: start it again."""
PORT = 1234
"""Port of process 0, where the other processes find it."""
PATHS = (
    "data.source",
    "data.store",
    "data.tokenizer.path",
    "init.from",
    "init.like",
    "init.tokenizer",
    "task.path",
    "task.train",
    "task.validation",
    "task.test",
)
"""The config's fields that name files or folders which processes read or write."""
BUCKET = "[a-z0-9]([a-z0-9._-]*[a-z0-9])?"
KUBERNETES_NAME = r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*"
"""A DNS subdomain, which the names of most Kubernetes objects are."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One training to be run somewhere else: what, on what, where, and how often it may be started again."""

    verb: Literal["pretrain", "finetune"]
    config: str
    """Name or path, as on the command line."""
    overrides: tuple[str, ...]
    """The words `--section.field value`, as given."""
    workdir: str
    """The run's folder: a path that all workers see, or gs://BUCKET/PATH where the target mounts buckets."""
    name: str
    """Of the job, made of a-z, 0-9 and "-"; `default_name` makes one from the config."""
    accelerator: str
    """A family and a size: "v5e-256", "v5p-8", "h100-8", "cpu-4"; see `accelerators`."""
    slices: int = 1
    """TPU slices, or nodes of GPUs or CPUs."""
    zone: str = ""
    project: str = ""
    image: str = ""
    """Container image; empty: an environment installed from this commit."""
    spot: bool = False
    preemptions: int = 100
    """Restarts after preemptions (exit code 42)."""
    crashes: int = 3
    """Restarts after failures."""
    grace_seconds: int = 120
    """Between SIGTERM and the end: a save must fit."""
    queue: str = ""
    """Kueue's local queue or SLURM's partition; empty: the cluster's default."""
    seeds: int = 1
    """Fine-tunings, one after the other, each with a seed of its own."""

    def command(self) -> list[str]:
        """The words that each process of the training runs."""
        seeds = ["--seeds", str(self.seeds)] if self.seeds > 1 else []
        return ["gpt-jax", self.verb, self.config, "--workdir", self.workdir, *seeds, *self.overrides]

    def supervised(self) -> list[str]:
        """The same under `gpt-jax supervise`, which restarts a process in its place."""
        budgets = {"preemptions": self.preemptions, "crashes": self.crashes, "grace-seconds": self.grace_seconds}
        options = [word for name, value in budgets.items() for word in (f"--{name}", str(value))]
        return ["gpt-jax", "supervise", *options, "--", *self.command()[1:]]


class Checked(NamedTuple):
    """A job's config, with its overrides, and what it runs on."""

    config: RunConfig
    accelerator: Accelerator


def default_name(config: str) -> str:
    """A job's name from a config's: "finetune/cola" becomes "finetune-cola", "my/Big.py" becomes "big"."""
    stem = Path(config).stem if config.endswith(".py") else config
    return re.sub("[^a-z0-9]+", "-", stem.lower()).strip("-")[:40].strip("-") or "run"


# -- checks -----------------------------------------------------------------------------------------------------------------


def check(job: Job) -> Checked:
    """Loads the config and checks all that arithmetic can tell. Where files are is checked by the targets, with
    `require_reachable` or `require_no_buckets`.

    Raises:
      UserError: a word, the name, the accelerator, the config or its overrides are wrong; there is nothing to read or to start
        from; the mesh does not fit the devices, or the batch and the model do not divide over it; parameters, gradients and
        optimiser alone exceed the devices' memory.
    """
    _check_words(job)
    require(
        re.fullmatch("[a-z]([-a-z0-9]{0,38}[a-z0-9])?", job.name) is not None,
        "name",
        f"'{job.name}' must be at most 40 of a-z, 0-9 and '-', begin with a letter and not end with '-'",
    )
    for field, least in (("slices", 1), ("preemptions", 0), ("crashes", 0), ("grace_seconds", 1), ("seeds", 1)):
        require(getattr(job, field) >= least, field, f"must be at least {least}, not {getattr(job, field)}")
    require(job.verb == "finetune" or job.seeds == 1, "seeds", "goes with a fine-tuning; a pre-training has --train.seed")
    require(bool(job.workdir), "workdir", "say which folder shall hold the run")
    accelerator = accelerators.find(job.accelerator)
    config = _config(job)
    _check_source(job, config)
    mesh = mesh_sizes(config.mesh, accelerator, job.slices)
    _check_division(config, mesh)
    if not isinstance(config, FinetuneConfig):  # whose architecture is its checkpoint's
        _check_memory(config.model, mesh, accelerator)
    return Checked(config, accelerator)


def _check_words(job: Job) -> None:
    """What no cloud, shell, manifest or batch file could make sense of."""
    for field in dataclasses.fields(job):
        value = getattr(job, field.name)
        words = value if isinstance(value, tuple) else (str(value),)
        for word in words:
            if re.search(r"[\x00-\x1f\x7f-\x9f]", word):
                name = "" if field.name == "overrides" else f"--{field.name}: "
                raise UserError(f"{name}{word!r} holds a line end or another control character; leave it out")
    require(
        re.fullmatch("[a-z0-9-]*", job.zone) is not None, "zone", f"'{job.zone}' is none; its characters are a-z, 0-9 and '-'"
    )
    for name in ("project", "queue"):
        value = getattr(job, name)
        require(re.search(r"[\s'\"`]", value) is None, name, f"{value!r} must hold no blanks and no quotes")


def _check_source(job: Job, config: RunConfig) -> None:
    """That a fine-tuning will know what to start from, and a pre-training what to read, unless this machine sees that its store
    is there already.
    """
    if isinstance(config, FinetuneConfig):
        require(bool(config.init.from_), "init.from", "say which run or checkpoint to fine-tune, or none for random parameters")
    if not isinstance(config, PretrainConfig) or config.data.store or config.data.source:
        return
    if not (Path(job.workdir) / "store" / "index.json").exists():
        from gpt_jax.data import sources

        sources.open_source(config.data)  # which says what is missing, as the training would


def _config(job: Job) -> RunConfig:
    config = load_config(job.config)
    if isinstance(config, FinetuneConfig) != (job.verb == "finetune"):
        raise UserError(f"{job.config} is a config for gpt-jax {'pretrain' if job.verb == 'finetune' else 'finetune'}")
    config = apply_overrides(config, list(job.overrides), f"gpt-jax {job.verb} {job.config}")
    require(not config.distributed.coordinator, "distributed.coordinator", "leave it out: the launcher says it")
    return config


def mesh_sizes(mesh: MeshConfig, accelerator: Accelerator, slices: int) -> dict[str, int]:
    """The size of each mesh axis on so many slices, "all that are left" resolved.

    Raises:
      UserError: they do not multiply to the number of devices, or the slice axis is not that of the slices or nodes.
    """
    sizes = dataclasses.asdict(mesh)
    devices = accelerator.devices * slices
    there = f"there are {devices} devices on " + (f"{slices} x " if slices > 1 else "") + accelerator.name
    fixed = math.prod(size for size in sizes.values() if size != -1)
    for axis, size in sizes.items():
        if size == -1:
            require(devices % fixed == 0, "mesh", f"the other axes multiply to {fixed}, and {there}")
            sizes[axis] = devices // fixed
    shape = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    require(
        math.prod(sizes.values()) == devices,
        "mesh",
        f"{shape} asks for {fixed} devices, and {there}; set one axis to -1 to take all that are left",
    )
    # So the other axes stay on the fast interconnect of a slice or node. Of CPUs nobody expects speed.
    if accelerator.kind != "cpu" and slices > 1:
        what = "TPU slices" if accelerator.kind == "tpu" else "nodes"
        require(sizes["slice"] == slices, "mesh.slice", f"there are {slices} {what}, so say --mesh.slice {slices}")
    return sizes


def _check_division(config: RunConfig, sizes: dict[str, int]) -> None:
    if not isinstance(config, FinetuneConfig):
        from jax.sharding import AbstractMesh  # JAX takes a second to import

        from gpt_jax.runtime import sharding

        mesh: Any = AbstractMesh(tuple(sizes.values()), tuple(sizes))
        sharding.check_divisibility(mesh, config.model, config.train.batch_size, config.train.grad_accum_steps)
        return
    shards = sizes["slice"] * sizes["data"] * sizes["fsdp"] * config.train.grad_accum_steps
    require(
        config.train.batch_size % shards == 0,
        "train.batch_size",
        f"{config.train.batch_size} does not divide over slice x data x fsdp x micro-batches = {shards}",
    )


def _check_memory(model: ModelConfig, sizes: dict[str, int], accelerator: Accelerator) -> None:
    if not accelerator.memory:  # a CPU's is not known here
        return
    total = parameters(model) * bytes_per_parameter(model)
    shards = sizes["fsdp"] * sizes["tensor"]
    if total / shards <= accelerator.memory:
        return
    room = sizes["data"] * sizes["fsdp"]  # devices that these two axes have between them
    fitting = [
        size
        for size in range(1, room + 1)
        if room % size == 0 and model.embed_dim % size == 0 and total / (size * sizes["tensor"]) <= accelerator.memory
    ]
    advice = f"--mesh.data -1 --mesh.fsdp {fitting[0]} would share them out" if fitting else "no --mesh.fsdp is enough: take more"
    raise UserError(
        f"--mesh.fsdp: {parameters(model):,} parameters, their gradients and two moments need {total / shards / GIB:.1f} GiB on "
        f"each device, before any activation, and {accelerator.name} has {accelerator.memory / GIB:.0f} GiB; {advice}"
    )


def bytes_per_parameter(model: ModelConfig) -> int:
    """Of the parameter, its gradient in the same type, and Adam's two moments in float32."""
    return 2 * {"float32": 4, "bfloat16": 2}[model.param_dtype] + 2 * 4


def parameters(model: ModelConfig) -> int:
    """Number of parameters, as `gpt_jax.model.network.count` finds it by tracing the model."""
    width, embeddings = model.embed_dim, model.vocab_size * model.embed_dim
    if model.kind == "lstm":
        units = model.lstm_units
        gates = 4 * units * (width + units + 1)
        return embeddings + gates + (units + 1) * width
    attention = (width + 1) * 3 * width + (width + 1) * width
    feed_forward = (width + 1) * model.mlp_dim + (model.mlp_dim + 1) * width
    norms = 2 * 2 * width
    return embeddings + model.context_length * width + model.num_layers * (attention + feed_forward + norms)


# -- where files are --------------------------------------------------------------------------------------------------------


def require_reachable(job: Job, checked: Checked, target: str, volumes: bool = False) -> None:
    """Checks that workers which are other machines can see the config and every path that it and --workdir name.

    Args:
      job: what is to run.
      checked: its config.
      target: where, for the person.
      volumes: /mnt/CLAIM/... is a volume's, mounted there; otherwise nothing is mounted below /mnt/.

    Raises:
      UserError: a path is on this machine, is no sound path, or stands where the launcher does not see that it must be mounted.
    """
    visible = ("/gcs/", "/mnt/") if volumes else ("/gcs/",)
    require(
        not job.config.endswith(".py") or job.config.startswith(visible),
        "config",
        f"'{job.config}' is a file of this machine, which the workers of {target} do not see; put it under configs/",
    )
    if job.config.endswith(".py"):
        _require_mountable("config", job.config, target, volumes)
    given = {word.partition("=")[2] if word.startswith("--") else word for word in job.command()}
    for field, path in _paths(job, checked.config):
        _require_mountable(field, path, target, volumes)
        require(
            path in given, field, f"'{path}' stands only in the config; say it on the command line too, so that it is mounted"
        )


def require_no_buckets(job: Job, checked: Checked, target: str) -> None:
    """Checks that no path is in a bucket.

    Raises:
      UserError: one is.
    """
    for field, path in _paths(job, checked.config):
        require("://" not in path, field, f"'{path}' is no file or folder; {target} mounts no buckets")


def _paths(job: Job, config: RunConfig) -> Iterator[tuple[str, str]]:
    """Each field that names a file or a folder, and which."""
    yield "workdir", job.workdir
    fields = flatten_config(config)
    for field in PATHS:
        path = fields[field][0] if field in fields else ""
        named = (
            (field == "data.source" and path.startswith(("builtin:", "tfds:")))
            or (field == "init.from" and path == "none")
            or (field == "init.like" and path in config_names())
        )
        if path and not named:
            yield field, path


def _require_mountable(field: str, path: str, target: str, volumes: bool) -> None:
    where = "gs://BUCKET/PATH or /mnt/CLAIM/PATH" if volumes else "gs://BUCKET/PATH"
    match = re.match("(gs://|/gcs/|/mnt/)([^/]*)(.*)", path)
    if match is None:
        what = f"a {'folder' if field == 'workdir' else 'path'} of this machine"
        raise UserError(f"--{field}: '{path}' is {what}, which the workers of {target} do not see; give {where}")
    mount, name, inside = match.groups()
    if mount == "/mnt/":
        require(volumes, field, f"'{path}': nothing is mounted below /mnt/ on the workers of {target}; give {where}")
        sound = re.fullmatch(KUBERNETES_NAME, name) is not None and len(name) <= 253
        require(sound, field, f"'{path}': no PersistentVolumeClaim is named '{name}'; names are of a-z, 0-9, '-' and '.'")
    else:
        sound = re.fullmatch(BUCKET, name) is not None
        require(sound, field, f"'{path}': no bucket is named '{name}'; names are of a-z, 0-9, '-', '_' and '.'")
    require(bool(inside.strip("/")), field, f"'{path}' names nothing inside '{name}'; give {where}")
    require(".." not in inside.split("/"), field, f"'{path}' leads out of what is mounted; leave the '..' out")


def mounted(words: Iterable[str]) -> list[str]:
    """The words with gs://BUCKET/PATH turned into /gcs/BUCKET/PATH, where the workers have the bucket mounted."""
    return [re.sub(r"^((?:--[^=]*=)?)gs://", r"\1/gcs/", word) for word in words]


def buckets(words: Iterable[str]) -> list[str]:
    """The buckets that the words name, each once."""
    return _names_below("/gcs/", words)


def volumes(words: Iterable[str]) -> list[str]:
    """The volumes that the words name, as the first part of a path below /mnt/, each once."""
    return _names_below("/mnt/", words)


def _names_below(mount: str, words: Iterable[str]) -> list[str]:
    found = (re.match(f"(?:--[^=]*=)?{mount}([^/]+)", word) for word in mounted(words))
    return list(dict.fromkeys(match[1] for match in found if match))


# -- what targets share -----------------------------------------------------------------------------------------------------


def require_tool(name: str, install: str) -> None:
    """Checks that a command of another product is on this machine.

    Raises:
      UserError: it is not; `install` says how to get it.
    """
    if shutil.which(name) is None:
        raise UserError(f"{name} is not on this machine: {install}; --dry-run prints the job without it")


def to_yaml(value: Any) -> str:
    """Nested lists and dictionaries as YAML for people: in their order, without references, texts of several lines as such."""

    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, data: str) -> yaml.Node:
        return dumper.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)

    Plain.add_representer(str, text)
    return yaml.dump(value, Dumper=Plain, sort_keys=False, width=120)
