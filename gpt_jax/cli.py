"""The command line: parses arguments, calls the function of each verb, and prints results.

The modules that a verb needs are imported when the verb runs, so that `gpt-jax --help` needs neither JAX nor TensorFlow.
"""

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gpt_jax import __version__
from gpt_jax.errors import Preempted, TrainingError, UserError, VerificationError, field_error
from gpt_jax.launch import command

DESCRIPTION = "GPT-1 in JAX: pre-train, fine-tune, evaluate, generate, export. See `gpt-jax VERB --help` for the arguments."


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line."""

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
    except BrokenPipeError:  # The reader of the output, for example `head`, has exited.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if show_traceback or (error.filename is None and error.errno != errno.ENOSPC):
            raise
        print(f"gpt-jax: {error.filename or 'a file could not be written'}: {error.strerror}", file=sys.stderr)
        return UserError.exit_code


# -- arguments --------------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="gpt-jax", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"gpt_jax {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error occurred")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)

    def verb(name: str, run: Callable[..., int | None], text: str, config: bool = False) -> argparse.ArgumentParser:
        # For a verb with a config, `_load_config` handles --help, which also lists the fields of the config.
        sub = verbs.add_parser(name, help=text, description=text, allow_abbrev=False, add_help=not config)
        sub.set_defaults(run=run, takes_overrides=config, parser=sub)
        if config:
            text = "a config's name (configs/NAME.py) or the path of a .py file"
            sub.add_argument("config", metavar="CONFIG", nargs="?", help=text)
        return sub

    sub = verb("demo", _demo, "run every stage on the documentation installed on this machine; takes a few minutes on a CPU")
    sub.add_argument("--workdir", type=_path, default=Path("runs/demo"), help="the run's folder (default: runs/demo)")

    sub = verb("prepare", _prepare, "build the tokenizer and the token store from text", config=True)
    sub.add_argument("--workdir", type=_path, help="prepare WORKDIR/store, unless --data.store names another folder")

    _add_training(verb("pretrain", _pretrain, "pre-train on a token store; prepares a missing store, resumes a run", config=True))
    sub = verb("finetune", _finetune, "fine-tune a checkpoint on a task and score it; resumes a run", config=True)
    _add_training(sub)
    sub.add_argument("--seeds", type=int, help="run this many seeds, one after the other, in WORKDIR/seed-N")

    _add_evaluate(verb("evaluate", _evaluate, "compute perplexity on text, task scores, or zero-shot scores"))
    sub = verb("study", _study, "run one of the paper's analyses: several fine-tuning runs, a table and a plot", config=True)
    sub.add_argument("--name", choices=("layers", "ablations", "steps"), help="the study")
    sub.add_argument("--workdir", type=_path, help="the study's folder")
    sub.add_argument("--seeds", type=int, default=1, help="fine-tuning runs of each variant (default: 1)")
    sub.add_argument("--lstm", type=_local, default="", metavar="RUN", help="a pre-trained LSTM, for the study 'ablations'")

    sub = verb("report", _report, "print measured scores beside the paper's figures")
    sub.add_argument("--paper", action="store_true", required=True, help="compare with the figures of the paper")
    sub.add_argument("runs", nargs="+", type=_path, metavar="RUN", help="folders of fine-tuning runs")

    _add_generate(verb("generate", _generate, "continue prompts with a trained model"))
    _add_export(verb("export", _export, "export a checkpoint to another framework's format and verify the result"))
    _add_import(verb("import", _import, "import a model from another format as a run"))

    sub = verb("launch", command.launch, "start a run on TPU VMs, GKE, SLURM or SkyPilot, or in several local processes")
    sub.set_defaults(takes_overrides=True)
    command.add_launch(sub)
    command.add_supervise(verb("supervise", command.supervise, "run a command and restart it after failures until it is done"))

    sub = verb("checkpoint", _checkpoint, "list, verify or prune the checkpoints of a run")
    text = "list them, verify every file, or delete all but the newest and best"
    sub.add_argument("action", choices=("list", "verify", "prune"), help=text)
    sub.add_argument("run_folder", type=_path, metavar="RUN")
    sub.add_argument("--keep-latest", type=int, default=1, help="prune: number of newest checkpoints to keep (default: 1)")
    sub.add_argument("--keep-best", type=int, default=1, help="prune: number of best checkpoints to keep (default: 1)")

    sub = verb("bench", _bench, "run a benchmark and print a table")
    text = "input: the input pipeline; matmul: matrix products; padding: fine-tuning with batches padded in three ways"
    sub.add_argument("name", choices=("input", "matmul", "padding"), help=text)
    sub.set_defaults(takes_overrides=True)
    sub.add_argument("--config", help="padding: a fine-tuning config, with its --section.field overrides")
    sub.add_argument("--store", type=_path, help="input: a token store to read (default: a temporary one of random tokens)")
    return parser


def _add_training(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--workdir", type=_path, help="the run's folder")
    sub.add_argument("--allow-changes", action="store_true", help="continue in a folder whose config differs")


def _add_checkpoint(sub: argparse.ArgumentParser, **options: Any) -> None:
    text = "a run's folder, or one of its checkpoints/STEP"
    sub.add_argument("checkpoint", type=_path, metavar="CHECKPOINT", **{"help": text} | options)


def _add_evaluate(sub: argparse.ArgumentParser) -> None:
    sub.set_defaults(takes_overrides=True)
    sub.epilog = "A fine-tuned checkpoint is scored on its own task; --task.path and other --task.* fields change the task."
    _add_checkpoint(sub, nargs="+", help="a run's folder, or one of its checkpoints/STEP; several with --zero-shot")
    text = "compute the perplexity on a file, a folder, a glob, tfds:NAME or builtin:docs"
    sub.add_argument("--text", type=_local, metavar="SOURCE", help=text)
    sub.add_argument("--max-bytes", type=int, help="maximum number of bytes of text to read (default: all)")
    sub.add_argument("--split", choices=("train", "validation", "test"), help="split of the task (default: validation)")
    text = "cola, sst2, race, story_cloze (PATH: the task's folder), dprd or wsc (PATH: a file); may be given several times"
    sub.add_argument("--zero-shot", type=_local, action="append", metavar="PROBE[=PATH]", help=text)
    sub.add_argument("--every-checkpoint", action="store_true", help="zero-shot scores of all checkpoints of a run, with a plot")
    sub.add_argument("--out", type=_path, help="folder for predictions, or for zero-shot scores and their plot")


def _add_generate(sub: argparse.ArgumentParser) -> None:
    _add_checkpoint(sub)
    sub.add_argument("--prompt", action="append", required=True, help="text to continue; may be given several times")
    sub.add_argument("--tokens", type=int, default=100, help="maximum number of tokens to append (default: 100)")
    sub.add_argument("--temperature", type=float, default=1.0, help="sampling temperature; 0: the most likely token (default: 1)")
    sub.add_argument("--top-k", type=int, default=0, help="sample from the k most likely tokens; 0: all (default)")
    text = "sample from the most likely tokens with this total probability (default: 1)"
    sub.add_argument("--top-p", type=float, default=1.0, help=text)
    sub.add_argument("--seed", type=int, default=0, help="equal seeds give equal text (default: 0)")


def _add_export(sub: argparse.ArgumentParser) -> None:
    _add_checkpoint(sub)
    text = "huggingface, npz, openai (as released), stablehlo, onnx or savedmodel"
    sub.add_argument("--format", required=True, metavar="FORMAT", help=text)
    sub.add_argument("--out", required=True, type=_path, help="the folder to create")
    dtypes = ("float32", "bfloat16", "float16")
    sub.add_argument("--dtype", default="float32", choices=dtypes, help="type of the stored numbers (default: float32)")
    sub.add_argument("--shard-bytes", type=float, default=5e9, help="huggingface: split files larger than this (default: 5e9)")


def _add_import(sub: argparse.ArgumentParser) -> None:
    text = "folder of a Hugging Face openai-gpt, of the released files, or of an npz file"
    sub.add_argument("source", type=_path, metavar="SOURCE", help=text)
    sub.add_argument("--workdir", required=True, type=_path, help="the run's folder")
    text = "a pre-training config that describes the model (default: the config in SOURCE, or the paper's)"
    sub.add_argument("--config", help=text)
    sub.add_argument("--tokenizer", type=_path, help="folder of the tokenizer, if SOURCE has none")
    sub.add_argument("--trust-pickle", action="store_true", help="read a pytorch_model.bin, which is a pickle")


def _local(word: str, field: str = "") -> str:
    """Returns a word that names a file or folder.

    Args:
      field: the config field that the word comes from, if any.

    Raises:
      UserError: the word is a URL, which pathlib would turn into a local folder called "gs:".
    """
    if "://" in word:
        raise UserError(
            (f"--{field}: " if field else "") + f"{word} is not a path on this machine; to use a bucket, mount it "
            "(docs/launch.md: Cloud Storage FUSE) and give the mounted path"
        )
    return word


def _path(word: str) -> Path:
    return Path(_local(word))


def _load_config(options: argparse.Namespace, overrides: list[str], verb: str = "pretrain") -> Any:
    """Returns the config that the command names, with its overrides; `verb` is the verb that the config must be for."""
    from gpt_jax.config import FinetuneConfig
    from gpt_jax.config.load import apply_overrides, config_names, flatten_config, load_config

    names = ", ".join(name for name in config_names() if name.startswith("finetune/") == (verb == "finetune"))
    if any(word in ("-h", "--help") for word in overrides):
        options.parser.print_help()
        print("  --SECTION.FIELD VALUE  any field of the config; `--help` after CONFIG lists them with their meaning\n")
        if options.config is None:
            print(f"CONFIG: {names}, or the path of a .py file.")
            raise SystemExit(0)
    if options.config is None:
        raise UserError(f"name a config: gpt-jax {options.verb} CONFIG, with CONFIG one of {names} or a .py file")
    loaded = load_config(options.config)
    actual = "finetune" if isinstance(loaded, FinetuneConfig) else "pretrain"
    if actual != verb:
        raise UserError(f"{options.config} is a config for gpt-jax {actual}")
    config = apply_overrides(loaded, overrides, f"gpt-jax {options.verb} {options.config} --workdir RUN")
    for name, (value, _) in flatten_config(config).items():
        if isinstance(value, str):
            _local(value, name)
    return config


def _workdir(options: argparse.Namespace, what: str = "the run") -> Path:
    if options.workdir is None:
        raise field_error("workdir", f"name the folder for {what}")
    return options.workdir


# -- verbs ------------------------------------------------------------------------------------------------------------------


def _demo(options: argparse.Namespace, _: list[str]) -> int:
    from gpt_jax.experiments.demo import demo

    return demo(options.workdir)


def _prepare(options: argparse.Namespace, overrides: list[str]) -> None:
    config = _load_config(options, overrides)
    from gpt_jax.data.prepare import prepare
    from gpt_jax.runtime.console import say

    if not config.data.store and options.workdir is None:
        raise UserError("--data.store: name the folder for the token store (or --workdir RUN, for RUN/store)")
    prepare(config, Path(config.data.store) if config.data.store else options.workdir / "store", say)


def _pretrain(options: argparse.Namespace, overrides: list[str]) -> None:
    config, workdir = _load_config(options, overrides), _workdir(options)
    from gpt_jax.train.pretrain import pretrain

    pretrain(config, workdir, options.allow_changes)


def _finetune(options: argparse.Namespace, overrides: list[str]) -> None:
    config, workdir = _load_config(options, overrides, "finetune"), _workdir(options)
    from gpt_jax.experiments.score_tables import print_seed_scores
    from gpt_jax.runtime.distributed import is_primary
    from gpt_jax.tasks.finetune import finetune, finetune_seeds

    if options.seeds is None:
        finetune(config, workdir, options.allow_changes)
        return
    result = finetune_seeds(config, workdir, options.seeds, options.allow_changes)
    if is_primary():
        print_seed_scores(result)


def _evaluate(options: argparse.Namespace, overrides: list[str]) -> None:
    from gpt_jax.runtime.console import say
    from gpt_jax.tasks import evaluate

    _check_evaluate(options, overrides)
    if options.zero_shot:
        from gpt_jax.experiments.score_tables import print_zero_shot_scores

        sources = dict(word.partition("=")[::2] for word in options.zero_shot)
        paths = list(dict.fromkeys(options.checkpoint))
        print_zero_shot_scores(evaluate.zero_shot(paths, sources, options.every_checkpoint, say), options.out)
        return
    checkpoint = options.checkpoint[0]
    if options.text:
        scores = evaluate.evaluate_text(checkpoint, options.text, max_bytes=options.max_bytes or 0)
    else:
        scores = evaluate.evaluate_task(checkpoint, overrides, options.split or "validation", options.out, say)
    for name, value in scores.items():
        print(f"{name:<24}{value:>14,}" if isinstance(value, int) else f"{name:<24}{value:>14.4f}")


def _check_evaluate(options: argparse.Namespace, overrides: list[str]) -> None:
    """Checks that the arguments of `evaluate` can be combined."""
    if options.text and options.zero_shot:
        raise UserError("--text and --zero-shot are different measurements; give one of them")
    chosen = "--text" if options.text else "--zero-shot" if options.zero_shot else ""
    if overrides and chosen:
        raise UserError(f"'{overrides[0]}' is not an argument of gpt-jax evaluate with {chosen}")
    if options.split and chosen:
        raise field_error("split", f"applies to tasks; with {chosen}, leave it out")
    if options.max_bytes is not None and chosen != "--text":
        raise field_error("max_bytes", "requires --text")
    if options.text and options.out:
        raise field_error("out", "perplexity is only printed; leave it out with --text")
    if options.every_checkpoint and not options.zero_shot:
        raise field_error("every_checkpoint", "requires --zero-shot")
    if len(options.checkpoint) > 1 and not options.zero_shot:
        raise UserError(f"{options.checkpoint[1]}: one checkpoint at a time; several can be compared with --zero-shot")
    probes = [word.partition("=")[0] for word in options.zero_shot or ()]
    for probe in probes:
        if probes.count(probe) > 1:
            raise field_error("zero_shot", f"{probe} is given more than once; each probe is scored on one set of rows")


def _study(options: argparse.Namespace, overrides: list[str]) -> None:
    config, workdir = _load_config(options, overrides, "finetune"), _workdir(options, "the study")
    if options.name is None:
        raise field_error("name", "name a study: layers, ablations or steps")
    from gpt_jax.experiments.studies import study

    study(options.name, config, workdir, options.seeds, options.lstm)


def _report(options: argparse.Namespace, _: list[str]) -> None:
    from gpt_jax.experiments.paper_table import print_paper_table

    print_paper_table(options.runs)


def _generate(options: argparse.Namespace, _: list[str]) -> None:
    from gpt_jax.experiments.generate import continue_prompts

    settings = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "seed")}
    texts = continue_prompts(options.checkpoint, options.prompt, options.tokens, **settings)
    for prompt, text in zip(options.prompt, texts, strict=True):
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
        raise field_error("config", f"{options.config} is a fine-tuning config, which has no architecture")
    settings = {"tokenizer": options.tokenizer, "trust_pickle": options.trust_pickle}
    import_(options.source, options.workdir, say, config=config, **settings)


def _checkpoint(options: argparse.Namespace, _: list[str]) -> int:
    from gpt_jax.train.checkpoint import list_checkpoints, prune

    run = options.run_folder
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; give a run's folder")
    if options.action == "prune":
        for info in prune(run, options.keep_latest, options.keep_best):
            print(f"deleted {info.path}")
        return 0
    infos = list_checkpoints(run, checksums=options.action == "verify")
    if not infos:
        raise UserError(f"{run}: has no checkpoints")
    for info in infos:
        scores = "  ".join(f"{name} {value:.4f}" for name, value in info.metrics.items())
        print(f"{info.step:>9}  {info.size / 1e6:9.1f} MB  {info.state:<10}  {info.problem or scores}")
    return UserError.exit_code if any(info.state == "damaged" for info in infos) else 0


def _bench(options: argparse.Namespace, overrides: list[str]) -> None:
    if options.name == "padding":
        if options.config is None:
            raise field_error("config", "name the fine-tuning config to time, for example finetune/cola")
        config = _load_config(options, overrides, "finetune")
        from gpt_jax.experiments.bench import bench_padding

        bench_padding(config)
        return
    if overrides or options.config:
        raise UserError(f"'{overrides[0] if overrides else '--config'}' is not an argument of gpt-jax bench {options.name}")
    from gpt_jax.experiments.bench import bench_input, bench_matmul

    if options.name == "input":
        bench_input(options.store)
    else:
        bench_matmul()
