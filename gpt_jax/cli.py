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
from gpt_jax.errors import Preempted, TrainingError, UserError, VerificationError
from gpt_jax.launch import command

DESCRIPTION = "GPT-1 in JAX: pre-train, fine-tune, evaluate, and look at what was trained. `gpt-jax VERB --help` tells more."


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
    except (UserError, TrainingError, VerificationError, Preempted) as error:
        if show_traceback:
            raise
        print(f"gpt-jax: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if show_traceback:
            raise
        print("gpt-jax: interrupted", file=sys.stderr)
        return 130
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
        sub.set_defaults(run=run, takes_overrides=config, parser=sub)
        if config:
            sub.add_argument(
                "config", metavar="CONFIG", nargs="?", help="a config's name (configs/NAME.py) or the path of a .py file"
            )
        return sub

    sub = verb("demo", _demo, "the whole story on the documentation installed on this machine; CPU, a few minutes")
    sub.add_argument("--workdir", type=_path, default=Path("runs/demo"), help="the run's folder (default: runs/demo)")

    sub = verb("prepare", _prepare, "text -> tokenizer and token store", config=True)
    sub.add_argument("--workdir", type=_path, help="prepare WORKDIR/store, unless --data.store says where")

    sub = verb("pretrain", _pretrain, "token store -> checkpoints; prepares a missing store, resumes a started run", config=True)
    sub.add_argument("--workdir", type=_path, help="the run's folder")
    sub.add_argument("--allow-changes", action="store_true", help="go on in a folder whose config differs")

    sub = verb("finetune", _finetune, "checkpoint + task -> checkpoints + scores; resumes a started run", config=True)
    sub.add_argument("--workdir", type=_path, help="the run's folder")
    sub.add_argument("--allow-changes", action="store_true", help="go on in a folder whose config differs")
    sub.add_argument("--seeds", type=int, help="run so many seeds, one after the other, in WORKDIR/seed-N")

    sub = verb("evaluate", _evaluate, "perplexity on text, a task's scores, or zero-shot scores of a checkpoint")
    sub.set_defaults(takes_overrides=True)
    sub.epilog = "A fine-tuned checkpoint is scored on its own task; --task.path and other --task.* fields say what differs."
    sub.add_argument(
        "checkpoint",
        type=_path,
        nargs="+",
        metavar="CHECKPOINT",
        help="a run's folder, or one of its checkpoints/STEP; several with --zero-shot",
    )
    sub.add_argument(
        "--text", type=_local, metavar="SOURCE", help="perplexity on a file, a folder, a glob, tfds:NAME or builtin:docs"
    )
    sub.add_argument("--max-bytes", type=int, help="of the text (default: all)")
    sub.add_argument("--split", choices=("train", "validation", "test"), help="of the task (default: validation)")
    sub.add_argument(
        "--zero-shot",
        type=_local,
        action="append",
        metavar="PROBE[=PATH]",
        help="cola, sst2, race, story_cloze (PATH: the task's folder), dprd or wsc (PATH: a file); may be given several times",
    )
    sub.add_argument("--every-checkpoint", action="store_true", help="zero-shot scores along the whole run, with a plot")
    sub.add_argument("--out", type=_path, help="folder for predictions, or for zero-shot scores and their plot")

    sub = verb("study", _study, "the paper's analyses: a series of fine-tunings, a table and a plot", config=True)
    sub.add_argument("--name", choices=("layers", "ablations", "steps"), help="which one")
    sub.add_argument("--workdir", type=_path, help="the study's folder")
    sub.add_argument("--seeds", type=int, default=1, help="fine-tunings of each variant (default: 1)")
    sub.add_argument("--lstm", type=_local, default="", metavar="RUN", help="a pre-trained LSTM, for the ablations")

    sub = verb("report", _report, "what was measured, beside the paper's figures")
    sub.add_argument("--paper", action="store_true", required=True, help="a table of the paper's figures beside the runs'")
    sub.add_argument("runs", nargs="+", type=_path, metavar="RUN", help="folders of fine-tuning runs")

    sub = verb("generate", _generate, "continue prompts with a trained model")
    sub.add_argument("checkpoint", type=_path, metavar="CHECKPOINT", help="a run's folder, or one of its checkpoints/STEP")
    sub.add_argument("--prompt", action="append", required=True, help="text to continue; may be given several times")
    sub.add_argument("--tokens", type=int, default=100, help="most tokens to append (default: 100)")
    sub.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest token (default: 1)")
    sub.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest tokens only; 0: all (default)")
    sub.add_argument(
        "--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this total probability (default: 1)"
    )
    sub.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default: 0)")

    sub = verb("export", _export, "a checkpoint in another framework's format, verified before it is there")
    sub.add_argument("checkpoint", type=_path, metavar="CHECKPOINT", help="a run's folder, or one of its checkpoints/STEP")
    sub.add_argument(
        "--format", required=True, metavar="FORMAT", help="huggingface, npz, openai (as released), stablehlo, onnx or savedmodel"
    )
    sub.add_argument("--out", required=True, type=_path, help="the folder to be made")
    sub.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of stored numbers (float32)")
    sub.add_argument("--shard-bytes", type=float, default=5e9, help="huggingface: cut larger files into several (default: 5e9)")

    sub = verb("import", _import, "a model of another format -> a run to fine-tune, evaluate or generate from")
    sub.add_argument(
        "source", type=_path, metavar="SOURCE", help="folder of a Hugging Face openai-gpt, of the released files, or npz"
    )
    sub.add_argument("--workdir", required=True, type=_path, help="the run's folder")
    sub.add_argument("--config", help="what the model must be: a pre-training config (default: what SOURCE says, or the paper's)")
    sub.add_argument("--tokenizer", type=_path, help="folder of the tokenizer, where SOURCE has none")
    sub.add_argument("--trust-pickle", action="store_true", help="read a pytorch_model.bin, which is a pickle")

    sub = verb("launch", command.launch, "run a training somewhere else: TPU VMs, GKE, SLURM, SkyPilot, or processes here")
    sub.set_defaults(takes_overrides=True)
    command.add_launch(sub)

    sub = verb("supervise", command.supervise, "start a local training again after failures, until it is done")
    command.add_supervise(sub)

    sub = verb("checkpoint", _checkpoint, "what a run has saved")
    sub.add_argument(
        "action", choices=("list", "verify", "prune"), help="list them, verify every file, or delete all but the newest and best"
    )
    sub.add_argument("run_folder", type=_path, metavar="RUN")
    sub.add_argument("--keep-latest", type=int, default=1, help="prune: newest checkpoints to keep (default: 1)")
    sub.add_argument("--keep-best", type=int, default=1, help="prune: best checkpoints to keep besides (default: 1)")

    sub = verb("bench", _bench, "measured tables")
    sub.add_argument(
        "name",
        choices=("input", "matmul", "padding"),
        help="input: tokens/s of the data pipeline; matmul: this machine's matrix products; padding: fine-tuning with batches "
        "padded to few lengths, to their longest example, and to the context",
    )
    sub.set_defaults(takes_overrides=True)
    sub.add_argument("--config", help="padding: a fine-tuning config, with its --section.field overrides")
    sub.add_argument("--store", type=_path, help="input: a token store to read (default: a temporary one of random tokens)")
    return parser


def _local(word: str, field: str = "") -> str:
    """A word that names a file or folder; `field`: of the config, where it stands there.

    Raises:
      UserError: it is a URL, of which pathlib would make a local folder called "gs:".
    """
    if "://" in word:
        raise UserError(
            (f"--{field}: " if field else "") + f"{word} is no path of this machine; a bucket is reached through its mount "
            "(docs/launch.md: Cloud Storage FUSE), so give its path there"
        )
    return word


def _path(word: str) -> Path:
    return Path(_local(word))


def _configured(options: argparse.Namespace, overrides: list[str], kind: str = "pretrain") -> Any:
    """The config that the command names, of the kind that the verb takes, with its overrides."""
    from gpt_jax.config import FinetuneConfig
    from gpt_jax.config.load import apply_overrides, config_names, flatten_config, load_config

    asked = any(word in ("-h", "--help") for word in overrides)
    names = ", ".join(name for name in config_names() if name.startswith("finetune/") == (kind == "finetune"))
    if asked:
        options.parser.print_help()
        print("  --SECTION.FIELD VALUE  any field of the config; `--help` after CONFIG lists them with their meaning")
        if options.config is None:
            print(f"\nCONFIG: {names}, or the path of a .py file.")
            raise SystemExit(0)
        print()
    if options.config is None:
        raise UserError(f"say which config: gpt-jax {options.verb} CONFIG, with CONFIG one of {names} or a .py file")
    loaded = load_config(options.config)
    if isinstance(loaded, FinetuneConfig) != (kind == "finetune"):
        raise UserError(f"{options.config} is a config for gpt-jax {'pretrain' if kind == 'finetune' else 'finetune'}")
    config = apply_overrides(loaded, overrides, f"gpt-jax {options.verb} {options.config} --workdir RUN")
    for name, (value, _) in flatten_config(config).items():
        if isinstance(value, str):
            _local(value, name)
    return config


def _demo(options: argparse.Namespace, _: list[str]) -> int:
    from gpt_jax.experiments.demo import demo

    return demo(options.workdir)


def _prepare(options: argparse.Namespace, overrides: list[str]) -> None:
    config = _configured(options, overrides)
    from gpt_jax.data.prepare import prepare
    from gpt_jax.runtime.console import say

    if not config.data.store and options.workdir is None:
        raise UserError("--data.store: say where the token store shall lie (or --workdir RUN, for RUN/store)")
    prepare(config, Path(config.data.store) if config.data.store else options.workdir / "store", say)


def _pretrain(options: argparse.Namespace, overrides: list[str]) -> None:
    config = _configured(options, overrides)
    if options.workdir is None:
        raise UserError("--workdir: say which folder shall hold the run")
    from gpt_jax.train.pretrain import pretrain

    pretrain(config, options.workdir, options.allow_changes)


def _finetune(options: argparse.Namespace, overrides: list[str]) -> None:
    config = _configured(options, overrides, "finetune")
    if options.workdir is None:
        raise UserError("--workdir: say which folder shall hold the run")
    from gpt_jax.tasks.finetune import finetune, finetune_seeds

    if options.seeds is None:
        finetune(config, options.workdir, options.allow_changes)
    else:
        from gpt_jax.experiments.bench import show_spread
        from gpt_jax.runtime.distributed import is_primary

        result = finetune_seeds(config, options.workdir, options.seeds, options.allow_changes)
        if is_primary():
            show_spread(result)


def _evaluate(options: argparse.Namespace, overrides: list[str]) -> None:
    from gpt_jax.runtime.console import say
    from gpt_jax.tasks import evaluate

    if options.text and options.zero_shot:
        raise UserError("--text and --zero-shot are different measurements; give one of them")
    chosen = "--text" if options.text else "--zero-shot" if options.zero_shot else ""
    if overrides and chosen:
        raise UserError(f"'{overrides[0]}' is not an argument of gpt-jax evaluate with {chosen}")
    if options.split and chosen:
        raise UserError(f"--split: is of a task; with {chosen}, leave it out")
    if options.max_bytes is not None and chosen != "--text":
        raise UserError("--max-bytes: goes with --text")
    if options.text and options.out:
        raise UserError("--out: perplexity is printed and leaves no files")
    if options.every_checkpoint and not options.zero_shot:
        raise UserError("--every-checkpoint goes with --zero-shot")
    checkpoint, *others = options.checkpoint
    if others and not options.zero_shot:
        raise UserError(f"{others[0]}: one checkpoint at a time; several can be compared with --zero-shot")
    if options.zero_shot:
        from gpt_jax.experiments.bench import show_zero_shot

        sources = [word.partition("=")[::2] for word in options.zero_shot]
        names = [name for name, _ in sources]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"--zero-shot: {twice} is given more than once; each probe is scored on one set of rows")
        paths = list(dict.fromkeys(options.checkpoint))
        show_zero_shot(evaluate.zero_shot(paths, dict(sources), options.every_checkpoint, say), options.out)
        return
    if options.text:
        scores = evaluate.evaluate_text(checkpoint, options.text, max_bytes=options.max_bytes or 0)
    else:
        scores = evaluate.evaluate_task(checkpoint, overrides, options.split or "validation", options.out, say)
    for name, value in scores.items():
        print(f"{name:<24}{value:>14,}" if isinstance(value, int) else f"{name:<24}{value:>14.4f}")


def _study(options: argparse.Namespace, overrides: list[str]) -> None:
    config = _configured(options, overrides, "finetune")
    if options.workdir is None:
        raise UserError("--workdir: say which folder shall hold the study")
    if options.name is None:
        raise UserError("--name: say which study: layers, ablations or steps")
    from gpt_jax.experiments.studies import study

    study(options.name, config, options.workdir, options.seeds, options.lstm)


def _report(options: argparse.Namespace, _: list[str]) -> None:
    from gpt_jax.experiments import paper_table

    paper_table.show(options.runs)


def _generate(options: argparse.Namespace, _: list[str]) -> None:
    from gpt_jax.experiments.demo import continue_prompts

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


def _export(options: argparse.Namespace, _: list[str]) -> None:
    from gpt_jax.interop.export import export
    from gpt_jax.runtime.console import say

    export(options.checkpoint, options.format, options.out, say, dtype=options.dtype, shard_bytes=options.shard_bytes)


def _import(options: argparse.Namespace, _: list[str]) -> None:
    from gpt_jax.config import PretrainConfig
    from gpt_jax.config.load import load_config
    from gpt_jax.interop.import_ import import_
    from gpt_jax.runtime.console import say

    config = load_config(options.config) if options.config else None
    if config is not None and not isinstance(config, PretrainConfig):
        raise UserError(f"--config: {options.config} is a fine-tuning config, which has no architecture")
    import_(
        options.source,
        options.workdir,
        say,
        config=config,
        tokenizer=options.tokenizer,
        trust_pickle=options.trust_pickle,
    )


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
        scores = "  ".join(f"{name} {value:.4f}" for name, value in info.metrics.items() if name != checkpoint.RANK)
        print(f"{info.step:>9}  {info.size / 1e6:9.1f} MB  {info.state:<10}  {info.problem or scores}")
    return UserError.exit_code if any(info.state == "damaged" for info in infos) else 0


def _bench(options: argparse.Namespace, overrides: list[str]) -> None:
    if options.name != "padding" and (overrides or options.config):
        raise UserError(f"'{overrides[0] if overrides else '--config'}' is not an argument of gpt-jax bench {options.name}")
    if options.name == "padding":
        if options.config is None:
            raise UserError("--config: say which fine-tuning config to time, for example finetune/cola")
        config = _configured(options, overrides, "finetune")
        from gpt_jax.experiments.bench import bench_padding

        bench_padding(config)
        return
    from gpt_jax.experiments import bench

    if options.name == "input":
        bench.bench_input(options.store)
    else:
        bench.bench_matmul()
