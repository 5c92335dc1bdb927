"""The command line: parses, calls, prints.

Each verb's work is imported when the verb runs, so that `gpt-jax --help` needs neither JAX nor TensorFlow.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from gpt_jax import __version__
from gpt_jax.errors import Preempted, TrainingError, UserError

DESCRIPTION = "GPT-1 in JAX: pre-train, generate, and look at what was trained. `gpt-jax VERB --help` tells more."


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, 2 for a user's mistake, 1 for failed training, 42 for a preemption."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    show_traceback = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    try:
        options, overrides = _parser().parse_known_args(words)
        if overrides and not options.takes_overrides:
            raise UserError(f"'{overrides[0]}' is not an argument of gpt-jax {options.verb} (see gpt-jax {options.verb} --help)")
        return options.run(options, overrides) or 0
    except (UserError, TrainingError, Preempted) as error:
        if show_traceback:
            raise
        print(f"gpt-jax: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if show_traceback or (error.filename is None and error.errno != errno.ENOSPC):
            raise
        print(f"gpt-jax: {error.filename or 'a file could not be written'}: {error.strerror}", file=sys.stderr)
        return UserError.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="gpt-jax", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"gpt_jax {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)

    def verb(name: str, run: Any, text: str, config: bool = False) -> argparse.ArgumentParser:
        # A verb with a config leaves --help to the config's own fields, once it knows which config.
        sub = verbs.add_parser(name, help=text, description=text, allow_abbrev=False, add_help=not config)
        sub.set_defaults(run=run, takes_overrides=config)
        if config:
            sub.add_argument(
                "config", metavar="CONFIG", nargs="?", help="a config's name (configs/NAME.py) or the path of a .py file"
            )
        return sub

    sub = verb("demo", _demo, "the whole story on the documentation installed on this machine; CPU, a few minutes")
    sub.add_argument("--workdir", type=Path, default=Path("runs/demo"), help="the run's folder (default: runs/demo)")

    sub = verb("prepare", _prepare, "text -> tokenizer and token store", config=True)
    sub.add_argument("--workdir", type=Path, help="prepare WORKDIR/store, unless --data.store says where")

    sub = verb("pretrain", _pretrain, "token store -> checkpoints; prepares a missing store, resumes a started run", config=True)
    sub.add_argument("--workdir", type=Path, help="the run's folder")
    sub.add_argument("--allow-changes", action="store_true", help="go on in a folder whose config differs")

    sub = verb("generate", _generate, "continue prompts with a trained model")
    sub.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a run's folder, or one of its checkpoints/STEP")
    sub.add_argument("--prompt", action="append", required=True, help="text to continue; may be given several times")
    sub.add_argument("--tokens", type=int, default=100, help="most tokens to append (default: 100)")
    sub.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest token (default: 1)")
    sub.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest tokens only; 0: all (default)")
    sub.add_argument(
        "--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this total probability (default: 1)"
    )
    sub.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default: 0)")

    sub = verb("checkpoint", _checkpoint, "what a run has saved")
    sub.add_argument(
        "action", choices=("list", "verify", "prune"), help="list them, verify every file, or delete all but the newest and best"
    )
    sub.add_argument("run_folder", type=Path, metavar="RUN")
    sub.add_argument("--keep-latest", type=int, default=1, help="prune: newest checkpoints to keep (default: 1)")
    sub.add_argument("--keep-best", type=int, default=1, help="prune: best checkpoints to keep besides (default: 1)")

    sub = verb("bench", _bench, "measured tables")
    sub.add_argument(
        "name", choices=("input", "matmul"), help="input: tokens/s of the data pipeline; matmul: this machine's matrix products"
    )
    sub.add_argument("--store", type=Path, help="input: a token store to read (default: a temporary one of random tokens)")
    return parser


def _configured(options: argparse.Namespace, overrides: list[str]) -> Any:
    from gpt_jax import config

    if options.config is None:
        if any(word in ("-h", "--help") for word in overrides):
            print(f"usage: gpt-jax {options.verb} CONFIG --workdir RUN [--section.field VALUE ...]\n")
            print(f"CONFIG: {', '.join(config.names())}, or the path of a .py file.")
            print(f"`gpt-jax {options.verb} CONFIG --help` lists every field with its meaning.")
            raise SystemExit(0)
        raise UserError(
            f"say which config: gpt-jax {options.verb} CONFIG, with CONFIG one of {', '.join(config.names())} or a .py file"
        )
    loaded = config.load(options.config)
    if any(word in ("-h", "--help") for word in overrides):
        print(f"gpt-jax {options.verb} also takes --workdir RUN, --traceback (show where in the code an error arose)", end="")
        print(" and --allow-changes (go on in a folder whose config differs)." if options.verb == "pretrain" else ".")
    return config.override(loaded, overrides, f"gpt-jax {options.verb} {options.config} --workdir RUN")


def _demo(options: argparse.Namespace, _: list[str]) -> int:
    from gpt_jax.stories import demo

    return demo(options.workdir)


def _prepare(options: argparse.Namespace, overrides: list[str]) -> None:
    config = _configured(options, overrides)
    from gpt_jax.data.prepare import prepare
    from gpt_jax.train.progress import say

    if not config.data.store and options.workdir is None:
        raise UserError("--data.store: say where the token store shall lie (or --workdir RUN, for RUN/store)")
    prepare(config, Path(config.data.store) if config.data.store else options.workdir / "store", say)


def _pretrain(options: argparse.Namespace, overrides: list[str]) -> None:
    config = _configured(options, overrides)
    if options.workdir is None:
        raise UserError("--workdir: say which folder shall hold the run")
    from gpt_jax.train.pretrain import pretrain

    pretrain(config, options.workdir, options.allow_changes)


def _generate(options: argparse.Namespace, _: list[str]) -> None:
    from gpt_jax.stories import continue_prompts

    for prompt, text in continue_prompts(
        options.checkpoint,
        options.prompt,
        options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    ):
        print(prompt + text)


def _checkpoint(options: argparse.Namespace, _: list[str]) -> int:
    from gpt_jax.train import checkpoint

    run = options.run_folder
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; give a run's folder")
    if options.action == "prune":
        for info in checkpoint.prune(run, options.keep_latest, options.keep_best):
            print(f"deleted {info.path}")
        return 0
    infos = checkpoint.inspect(run, checksums=options.action == "verify")
    if not infos:
        raise UserError(f"{run}: holds no checkpoints")
    for info in infos:
        scores = "  ".join(f"{name} {value:.4f}" for name, value in info.metrics.items())
        print(f"{info.step:>9}  {info.size / 1e6:9.1f} MB  {info.state:<10}  {info.problem or scores}")
    return UserError.exit_code if any(info.state == "damaged" for info in infos) else 0


def _bench(options: argparse.Namespace, _: list[str]) -> None:
    from gpt_jax import present

    if options.name == "input":
        present.bench_input(options.store)
    else:
        present.bench_matmul()
