"""The folder that travels to the GPU machine: its contents, and how it is made."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from gpt_jax.errors import UserError, require
from gpt_jax.runtime.console import say

MAX_BYTES = 60 << 20
"""Maximum size of the folder."""
TASKS = {"cola": "CoLA", "sst2": "SST-2", "rte": "RTE"}
"""Names of the tasks, and of their folders."""
REQUIRED = ("filelock", "flax", "jax", "jaxtyping", "optax", "orbax", "tyro", "yaml")
"""Modules without which no command runs. Training on text and tasks also needs sentencepiece, scipy and sklearn."""
CARRIED = ("docstring_parser", "filelock", "jaxtyping", "typeguard", "tyro", "wadler_lindig")
"""The pure Python packages among them and among what these import."""


def prepare(config: str, novels: Path | None, tasks: Path | None, out: Path) -> None:
    """Makes the folder.

    Args:
      config: the config that is trained on the novels.
      novels: a folder of text; None: no text.
      tasks: a folder with the folders in `TASKS`; None: no tasks.

    Raises:
      UserError: a file of a task or a package is missing, or the folder is too large.
    """
    out.mkdir(parents=True, exist_ok=True)
    if tasks is not None:
        for name in TASKS.values():
            for split in ("train", "dev", "test"):
                source, target = tasks / name / f"{split}.tsv", out / name / f"{split}.tsv"
                require(source.is_file(), "tasks", f"there is no file {source}; name a folder with {', '.join(TASKS.values())}")
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(source, target)
    for package in CARRIED:
        try:
            files = importlib.metadata.files(package) or ()
        except importlib.metadata.PackageNotFoundError:
            raise UserError(f"{package} is not installed here; prepare the folder where gpt_jax is installed") from None
        for file in files:
            if ".." not in file.parts and file.suffix != ".pyc":  # without scripts, but with the metadata, which typeguard reads
                target = out / "packages" / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(str(file.locate()), target)
    if novels is not None:
        words = ["prepare", config, "--data.source", str(novels), "--data.store", str(out / "store")]
        if code := subprocess.run([sys.executable, "-m", "gpt_jax", *words]).returncode:
            raise SystemExit(code)
    sizes = {path.name: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in out.iterdir()}
    listed = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in sorted(sizes.items()))
    if sum(sizes.values()) > MAX_BYTES:
        raise UserError(f"{out} is larger than {MAX_BYTES >> 20} MiB ({listed}); delete it and prepare fewer novels")
    say(f"{out} is complete: {sum(sizes.values()) / 2**20:.1f} MiB ({listed})")


def use_packages(folder: Path) -> None:
    """Lets this process and those that it starts import the packages that this machine lacks.

    Raises:
      UserError: the folder does not have them either.
    """
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    lacking = [name for name in missing if not (folder / "packages" / name).is_dir()]
    if lacking:
        hint = "use another interpreter (make gpu PYTHON=...), or bring the folder that `prepare` makes"
        raise UserError(f"{sys.executable} lacks {', '.join(lacking)}, which are not in {folder} either: {hint}")
    if missing:
        say(f"{sys.executable} lacks {', '.join(missing)}, so {folder / 'packages'} is used")
        sys.path.insert(0, str(folder / "packages"))
        os.environ["PYTHONPATH"] = os.pathsep.join([str(folder / "packages"), os.environ["PYTHONPATH"]])
