"""The words of `gpt-jax launch` and `gpt-jax supervise`, and what is called for them; imports nothing heavy until it is."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
from typing import Any

from gpt_jax.errors import UserError, nearest
from gpt_jax.runtime import git_info
from gpt_jax.runtime.git_info import Checkout

TARGETS = {
    "local": "processes on this machine, supervised",
    "tpu-vm": "Cloud TPU VMs, through gcloud's queued resources, watched until the training is done",
    "gke": "Google Kubernetes Engine, as a JobSet",
    "slurm": "a SLURM cluster, as a batch job",
    "sky": "SkyPilot, as a managed job",
}
OWN = {"local": {"processes": "--processes"}, "tpu-vm": {"delete_on_exit": "--delete-on-exit"}}
"""The options that only one target has."""


def add_launch(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gpt-jax launch`; those after them are overrides of the config's fields."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "targets:\n"
        + "".join(f"  {name:<8}{text}\n" for name, text in TARGETS.items())
        + "\n--SECTION.FIELD VALUE after these: any field of the config, as for gpt-jax pretrain and finetune\n"
    )
    parser.add_argument("target", metavar="TARGET", help="where: " + ", ".join(TARGETS))
    parser.add_argument("config", metavar="CONFIG", help="a config's name (configs/NAME.py) or the path of a .py file")
    parser.add_argument("--workdir", default="", help="the run's folder, which all workers see; gs://BUCKET/PATH in a cloud")
    parser.add_argument("--name", default="", help="of the job (default: the config's)")
    parser.add_argument(
        "--accelerator", default="", help="family and size: v5e-16, v5p-8, h100-8, cpu-4 (local: one CPU device each)"
    )
    parser.add_argument("--slices", type=int, default=1, help="TPU slices, or nodes of GPUs or CPUs (default: 1)")
    parser.add_argument("--seeds", type=int, default=1, help="of a fine-tuning: run so many, one after the other (default: 1)")
    parser.add_argument("--zone", default="", help="of the cloud")
    parser.add_argument("--project", default="", help="of the cloud, or SLURM's account (default: the configured one)")
    parser.add_argument("--queue", default="", help="Kueue's local queue, or SLURM's partition (default: the cluster's)")
    parser.add_argument("--image", default="", help="container image, for gke and sky")
    parser.add_argument("--spot", action="store_true", help="take machines that may be preempted, for less")
    add_budgets(parser)
    parser.add_argument("--processes", type=int, help="local: so many share the accelerator's devices (default: 1)")
    parser.add_argument("--delete-on-exit", action="store_true", help="tpu-vm: delete the resource in the end, and on Ctrl-C")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and run nothing")


def add_supervise(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gpt-jax supervise`."""
    add_budgets(parser)
    parser.add_argument("words", metavar="-- VERB ...", nargs=argparse.REMAINDER, help="what to run, as after gpt-jax")


def add_budgets(parser: argparse.ArgumentParser) -> None:
    """How often a training is started again; the defaults are those of `Job`."""
    parser.add_argument("--preemptions", type=int, default=100, help="restarts after preemptions, exit code 42 (default: 100)")
    parser.add_argument("--crashes", type=int, default=3, help="restarts after failures (default: 3)")
    parser.add_argument("--grace-seconds", type=int, default=120, help="from SIGTERM to SIGKILL; a save must fit (default: 120)")


def launch(options: argparse.Namespace, overrides: list[str]) -> int:
    """Runs `gpt-jax launch`; returns the exit code.

    Raises:
      UserError: the target is none, the job cannot work, or its target refuses it or will not have its config.
    """
    target = options.target
    if target not in TARGETS:
        raise UserError(f"there is no target '{target}'; {nearest(target, TARGETS)}")
    own = {name: value for name in OWN.get(target, {}) if (value := getattr(options, name)) is not None}
    for other, names in OWN.items():
        for name, word in names.items():
            if other != target and getattr(options, name) != options.parser.get_default(name):
                raise UserError(f"{word}: only {other} has this; leave it out for {target}")
    from . import job as jobs

    job = _job(options, overrides)
    checked = jobs.check(job)
    source = git_info.find()
    if target == "tpu-vm":
        _require_tracked(job, source)
    module: Any = importlib.import_module("." + target.replace("-", "_"), __package__)
    printed = module.render(job, checked, **own) if options.dry_run else ""
    _warn_of_changes(job, target, source)
    if options.dry_run:
        print(printed, end="")
        return 0
    return module.submit(job, checked, **own)


def supervise(options: argparse.Namespace, _: list[str]) -> int:
    """Runs `gpt-jax supervise`; returns the exit code.

    Raises:
      UserError: there is nothing to run, or a budget makes no sense.
    """
    from .supervise import supervise

    words = options.words[1:] if options.words[:1] == ["--"] else options.words
    return supervise(words, options.preemptions, options.crashes, options.grace_seconds)


def _job(options: argparse.Namespace, overrides: list[str]) -> Any:
    from gpt_jax.config import FinetuneConfig
    from gpt_jax.config.load import load_config

    from .job import Job, default_name

    accelerator = options.accelerator or (f"cpu-{options.processes or 1}" if options.target == "local" else "")
    if not accelerator:
        raise UserError("--accelerator: say on what, as in --accelerator v5e-16")
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(Job) if hasattr(options, field.name)}
    return Job(
        **given
        | {
            "verb": "finetune" if isinstance(load_config(options.config), FinetuneConfig) else "pretrain",
            "overrides": tuple(overrides),
            "name": options.name or default_name(options.config),
            "accelerator": accelerator,
        }
    )


def _require_tracked(job: Any, source: Checkout) -> None:
    """That the workers, which get the commit and what differs from it, will have a config of configs/."""
    from gpt_jax.config.load import config_folder

    path = config_folder().resolve() / f"{job.config}.py"
    name = str(path.relative_to(source.folder)) if path.is_relative_to(source.folder) else ""
    if name in source.untracked:
        raise UserError(f"git does not track {name}, so the workers will not have it: git add {name}")


def _warn_of_changes(job: Any, target: str, source: Checkout) -> None:
    """Says that what runs is not the commit alone."""
    if source.diff:
        will = "the image holds what it was built from" if job.image else "uncommitted.diff in the run's folder will say how"
        print(f"warning: files differ from commit {source.commit[:12]}; {will}", file=sys.stderr)
    if source.untracked and target == "tpu-vm":  # the others see this folder, take a copy of it, or have an image
        names = f"{', '.join(source.untracked[:3])}{', ...' if len(source.untracked) > 3 else ''}"
        print(f"warning: git does not track {names}: the workers will not have that", file=sys.stderr)
