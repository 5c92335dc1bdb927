"""The commands `prepare`, `run` and `tables`."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import gpu
from benchmarks.gpu.data import prepare, use_packages
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.session import GRACE_SECONDS, RESULTS, Session
from benchmarks.gpu.sizes import FULL, REHEARSAL
from benchmarks.gpu.tables import describe
from gpt_jax.arguments import Parser
from gpt_jax.errors import UserError, one_line
from gpt_jax.inputs.numbers import POSITIVE, number
from gpt_jax.runtime.console import say
from gpt_jax.runtime.git_info import find_checkout

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "torch", "transformers")
DEVICE = """
import json, jax
device = jax.devices()[0]
print(json.dumps({"platform": device.platform, "device": device.device_kind, "devices": jax.device_count()}))
"""
"""A program that prints which devices JAX finds."""


def main() -> int:
    """Runs one of the commands; returns the exit code, which is 2 after a user's mistake."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    try:
        options = _parser().parse_args()
        if options.verb == "prepare":
            prepare((REHEARSAL if options.rehearse else FULL).novels, options.novels, options.tasks, options.data)
        elif options.verb == "run":
            use_packages(options.data)
            run(options)
        else:
            print(describe(options.out))
    except UserError as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def run(options: argparse.Namespace) -> None:
    """Measures the chosen parts one after the other.

    Raises:
      UserError: there is no GPU.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    sizes = REHEARSAL if options.rehearse else FULL
    end = time.monotonic() + 60 * (options.minutes or sizes.minutes) - GRACE_SECONDS
    with tempfile.TemporaryDirectory() as scratch:
        session = Session(sizes, options.data, options.out, Path(scratch))
        session.deadline = end
        session.append(_describe_machine(session, options.rehearse))
        chosen = {name: part for name, part in PARTS.items() if name in options.parts}
        rest = sum(part.seconds for part in chosen.values())
        for name, part in chosen.items():
            now = time.monotonic()
            session.part, session.deadline = name, now + (end - now) * part.seconds / rest
            rest -= part.seconds  # What a part does not need is for all later ones.
            if part.needs_data and not all((options.data / folder).is_dir() for folder in part.needs_data):
                session.record("all", [], 0, f"left out, because {options.data} has no text or no tasks (see `prepare`)", {})
                continue
            try:
                part.measure(session)
            except Exception as error:  # A machine that is lent for minutes should measure the other parts all the same.
                session.record("all", [], time.monotonic() - now, one_line(error), {})
    say(f"the results are in {options.out / RESULTS}")


def _describe_machine(session: Session, rehearsal: bool) -> dict[str, Any]:
    """Returns the date, the machine and the versions.

    Raises:
      UserError: there is no GPU, and this is not a rehearsal.
    """
    _, failure, printed = session.execute(["-c", DEVICE])
    if failure:
        raise UserError(f"JAX does not start here: {failure}")
    device = json.loads(printed)
    if device["platform"] == "cpu" and not rehearsal:
        raise UserError("JAX finds no GPU here; --rehearse measures a small model on the CPU")
    versions = {"python": platform.python_version()}
    for package in VERSIONS:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            say(f"{package} is not installed here, so what needs it is left out")
    date = datetime.datetime.now().astimezone().isoformat(timespec="minutes")
    command = shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]])
    return {"date": date, **device, "versions": versions, "commit": find_checkout().version, "command": command}


def _parser() -> Parser:
    parser = Parser("benchmarks.gpu", description=gpu.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    data, out = Path("gpu-data"), Path("gpu-results")

    verb = verbs.add_parser("prepare", help="make the folder to copy to the GPU machine")
    verb.add_argument("--novels", type=Path, help="a folder of text to train on (default: no text)")
    verb.add_argument("--tasks", type=Path, help="a folder with CoLA, SST-2 and RTE in GLUE's layout (default: no tasks)")
    verb.add_argument("--data", type=Path, default=data, help=f"the folder to make (default: {data})")
    verb.add_argument("--rehearse", action="store_true", help="a small vocabulary and little text, for `run --rehearse`")

    verb = verbs.add_parser("run", help="measure")
    verb.add_argument("--data", type=Path, default=data, help=f"what `prepare` made (default: {data}, if it is there)")
    verb.add_argument("--out", type=Path, default=out, help=f"folder to which the results are added (default: {out})")
    text = f"time for everything (default: {FULL.minutes}, or {REHEARSAL.minutes} to rehearse)"
    verb.add_argument("--minutes", type=number(float, POSITIVE), help=text)
    verb.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure (default: all)")
    verb.add_argument("--rehearse", action="store_true", help="measure a small model; needs no GPU")

    verb = verbs.add_parser("tables", help="print the results as Markdown")
    verb.add_argument("--out", type=Path, default=out, help=f"the folder of the results (default: {out})")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what this process has started ends, too
    sys.exit(main())
