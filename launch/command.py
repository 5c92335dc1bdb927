"""The commands `gpt-jax launch` and `gpt-jax supervise`: their arguments, and the calls that run them.

Importing this module needs only the standard library. The target's module and the checks are imported when a job is launched.
"""

import argparse
import dataclasses
import importlib
import os
import sys
from collections.abc import Iterable
from typing import Any

from gpt_jax.errors import UserError, nearest, require
from gpt_jax.runtime import git_info
from gpt_jax.runtime.accelerators import parse_accelerator

from .job import Job, default_name

TARGETS = {
    "local": "processes on this machine, restarted after failures",
    "tpu-vm": "Cloud TPU VMs, requested as a queued resource and watched until the training is done",
    "gke": "Google Kubernetes Engine, as a JobSet",
    "slurm": "a SLURM cluster, as a batch job",
    "sky": "SkyPilot, as a managed job",
}
"""The targets with their help texts. Each target has a module of the same name."""
OPTIONS = {field.name: field for field in dataclasses.fields(Job) if "help" in field.metadata}
EXCLUSIVE = {"processes": "local", "delete_on_exit": "tpu-vm"}
"""The options that only one target accepts, with the target."""


def add_launch(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `gpt-jax launch`. Unknown arguments are treated as overrides of config fields."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    targets = "".join(f"  {name:<8}{text}\n" for name, text in TARGETS.items())
    overrides = "--SECTION.FIELD VALUE: any field of the config, as for gpt-jax pretrain and finetune"
    parser.epilog = f"targets:\n{targets}\n{overrides}\n"
    parser.add_argument("target", metavar="TARGET", help="where to run: " + ", ".join(TARGETS))
    parser.add_argument("config", metavar="CONFIG", help="a config's name (configs/NAME.py) or the path of a .py file")
    text = "folder of the run, visible to all workers; in the cloud, gs://BUCKET/PATH"
    parser.add_argument("--workdir", type=os.path.expanduser, default="", help=text)
    parser.add_argument("--name", default="", help="name of the job (default: derived from CONFIG)")
    parser.add_argument("--accelerator", default="", help="family and size, such as v5e-16, v5p-8, h100-8, cpu-4")
    _add_options(parser, OPTIONS)
    text = "do not plan the job; planning for TPUs takes minutes unless the same step was planned before"
    parser.add_argument("--no-plan", action="store_true", help=text)
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, without running it")


def add_supervise(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `gpt-jax supervise`."""
    _add_options(parser, ("preemptions", "crashes", "grace_seconds"))
    parser.add_argument("words", metavar="-- VERB ...", nargs=argparse.REMAINDER, help="the command to run, without gpt-jax")


def _add_options(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    for name in names:
        default, text = OPTIONS[name].default, OPTIONS[name].metadata["help"]
        flag, unset = "--" + name.replace("_", "-"), None if name in EXCLUSIVE else default
        if default is False:
            parser.add_argument(flag, action="store_true", default=unset, help=text)
        else:
            shown = f" (default: {default})" if default else ""
            parser.add_argument(flag, type=type(default), default=unset, help=text + shown)


def launch(options: argparse.Namespace, overrides: list[str]) -> int:
    """Runs `gpt-jax launch`; returns the exit code.

    Raises:
      UserError: there is no such target, the job cannot run there, or its plan says that it does not fit.
    """
    name = options.target
    if name not in TARGETS:
        raise UserError(f"there is no target '{name}'; {nearest(name, TARGETS)}")
    for option, only in EXCLUSIVE.items():
        require(name == only or getattr(options, option) is None, option, f"only {only} takes it; leave it out for {name}")
    from .checks import check, with_absolute_paths
    from .planning import check_plan

    job = _job(options, overrides)
    target: Any = importlib.import_module(f".{name.replace('-', '_')}", __package__)
    if not target.MOUNTS:  # The processes see the same files as this one.
        job = with_absolute_paths(job)
    check(job, target)
    _warn_of_changes(job, name)
    if not options.no_plan:
        check_plan(job)
    if not options.dry_run:
        return target.submit(job)
    print(target.render(job), end="")
    return 0


def supervise(options: argparse.Namespace, _: list[str]) -> int:
    """Runs `gpt-jax supervise`; returns the exit code.

    Raises:
      UserError: there is nothing to run, or an option is out of range.
    """
    from .supervise import supervise

    words = options.words[1:] if options.words[:1] == ["--"] else options.words
    return supervise(words, options.preemptions, options.crashes, options.grace_seconds)


def _job(options: argparse.Namespace, overrides: list[str]) -> Job:
    from gpt_jax.config import FinetuneConfig
    from gpt_jax.config.load import load_config

    accelerator = options.accelerator or (f"cpu-{options.processes or 1}" if options.target == "local" else "")
    require(bool(accelerator), "accelerator", "name the hardware, for example --accelerator v5e-16")
    return Job(
        verb="finetune" if isinstance(load_config(options.config), FinetuneConfig) else "pretrain",
        config=options.config,
        overrides=tuple(overrides),
        workdir=options.workdir,
        name=options.name or default_name(options.config),
        accelerator=parse_accelerator(accelerator),
        **{name: value for name in OPTIONS if (value := getattr(options, name)) is not None},
    )


def _warn_of_changes(job: Job, target: str) -> None:
    """Warns if the job runs something other than the commit, or if workers will not have some of the files."""
    checkout = git_info.find_checkout()
    if checkout.diff:
        record = "the image contains the files it was built from" if job.image else "the run keeps them as uncommitted.diff"
        print(f"warning: files differ from commit {checkout.commit[:12]}; {record}", file=sys.stderr)
    if checkout.untracked and target == "tpu-vm":  # The other targets see this folder, copy it, or run an image.
        names = f"{', '.join(checkout.untracked[:3])}{', ...' if len(checkout.untracked) > 3 else ''}"
        print(f"warning: git does not track {names}; the workers will not have these files", file=sys.stderr)
