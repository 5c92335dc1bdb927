"""The command-line arguments of every verb, and how their words are converted and checked."""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from gpt_jax import __version__
from gpt_jax.errors import UserError
from gpt_jax.inputs.numbers import BYTES, NOT_NEGATIVE, POSITIVE, PROBABILITY, SEED, number
from gpt_jax.launch import command

BENCHMARKS = ("train", "attention", "loss", "generate", "finetune", "input", "tokenize", "checkpoint", "startup", "matmul", "all")
"""The names that `bench` takes."""

DESCRIPTION = "GPT-1 in JAX: pre-train, fine-tune, evaluate, generate, export. See `gpt-jax VERB --help` for the arguments."


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are single lines that begin with the name of the option, like our other messages."""

    def error(self, message: str) -> NoReturn:
        message = re.sub("invalid int value: (.*)", r"\1 is not a whole number", message.removeprefix("argument "))
        raise UserError(f"{message} (see {self.prog} --help)")


def parse(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the options of a command, and the words that override fields of a config.

    Raises:
      UserError: an argument is unknown, missing, or out of range.
    """
    options, overrides = _parser().parse_known_args(words)
    if options.verb == "generate":  # Before Python 3.13, argparse turns the value "--" into an empty list.
        options.prompt = ["--" if prompt == [] else prompt for prompt in options.prompt]
    if overrides and not options.takes_overrides:
        raise UserError(f"'{overrides[0]}' is not an argument of gpt-jax {options.verb} (see gpt-jax {options.verb} --help)")
    return options, overrides


def join_values(words: Sequence[str]) -> list[str]:
    """Joins options to values that begin with a dash, because argparse would take such a value for an option.

    The word after `--prompt` is always its value. After any option, a word with a single dash, such as -1e-3, is a value too.
    """
    joined: list[str] = []
    for word in words:
        last = joined[-1] if joined else ""
        if last == "--prompt" or (re.fullmatch("--[^=]+", last) and re.match("-[^-h]", word)):
            joined[-1] = f"{last}={word}"
        else:
            joined.append(word)
    return joined


def local(word: str, field: str = "") -> str:
    """Returns the name of a file or folder with a leading `~` replaced by the user's home folder.

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
    return os.path.expanduser(word)


def _path(word: str) -> Path:
    if not word:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(local(word))


def _source(word: str) -> str:
    if not word:
        raise argparse.ArgumentTypeError("the name is empty")
    return local(word)


def _probe(word: str) -> tuple[str, str]:
    """Returns the name and the path of PROBE=PATH."""
    name, _, path = word.partition("=")
    return name, local(path)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="gpt-jax", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"gpt_jax {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error occurred")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)

    def verb(name: str, text: str, config: bool = False) -> argparse.ArgumentParser:
        # For a verb with a config, `cli` handles --help, which also lists the fields of the config.
        sub = verbs.add_parser(name, help=text, description=text, allow_abbrev=False, add_help=not config)
        sub.set_defaults(takes_overrides=config, parser=sub)
        if config:
            text = "a config's name (configs/NAME.py) or the path of a .py file"
            sub.add_argument("config", metavar="CONFIG", nargs="?", help=text)
        return sub

    sub = verb("demo", "run every stage on the documentation installed on this machine; takes a few minutes on a CPU")
    sub.add_argument("--workdir", type=_path, default=Path("runs/demo"), help="the run's folder (default: runs/demo)")
    sub.add_argument("--seed", type=number(int, SEED), default=0, help="seed for training and for the tasks' rows (default: 0)")

    sub = verb("prepare", "build the tokenizer and the token store from text", config=True)
    sub.add_argument("--workdir", type=_path, help="prepare WORKDIR/store, unless --data.store names another folder")

    _add_training(verb("pretrain", "pre-train on a token store; prepares a missing store, resumes a run", config=True))
    sub = verb("finetune", "fine-tune a checkpoint on a task and score it; resumes a run", config=True)
    _add_training(sub)
    text = "run this many seeds, one after the other, in WORKDIR/seed-N"
    sub.add_argument("--seeds", type=number(int, POSITIVE), help=text)

    _add_evaluate(verb("evaluate", "compute perplexity on text, task scores, or zero-shot scores"))
    sub = verb("study", "run one of the paper's analyses: several fine-tuning runs, a table and a plot", config=True)
    sub.add_argument("--name", choices=("layers", "ablations", "steps"), help="the study")
    sub.add_argument("--workdir", type=_path, help="the study's folder")
    text = "fine-tuning runs of each variant (default: 1)"
    sub.add_argument("--seeds", type=number(int, POSITIVE), default=1, help=text)
    sub.add_argument("--lstm", type=_source, metavar="RUN", help="a pre-trained LSTM, for the study 'ablations'")

    sub = verb("report", "print measured scores beside the paper's figures")
    sub.add_argument("--paper", action="store_true", required=True, help="compare with the figures of the paper")
    sub.add_argument("runs", nargs="+", type=_path, metavar="RUN", help="folders of fine-tuning runs")

    _add_generate(verb("generate", "continue prompts with a trained model"))
    _add_export(verb("export", "export a checkpoint to another framework's format and verify the result"))
    _add_import(verb("import", "import a model from another format as a run"))

    sub = verb("launch", "start a run on TPU VMs, GKE, SLURM or SkyPilot, or in several local processes")
    sub.set_defaults(takes_overrides=True)
    command.add_launch(sub)
    command.add_supervise(verb("supervise", "run a command and restart it after failures until it is done"))

    _add_checkpoint_verb(verb("checkpoint", "list, verify or prune the checkpoints of a run"))
    _add_plan(verb("plan", "estimate the memory, time and cost of a run on TPUs or GPUs that are not attached", config=True))
    _add_bench(verb("bench", "run a benchmark and print a table"))
    return parser


def _add_training(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--workdir", type=_path, help="the run's folder")
    sub.add_argument("--allow-changes", action="store_true", help="continue in a folder whose config differs")


def _add_checkpoint(sub: argparse.ArgumentParser, **options: Any) -> None:
    text = "a run's folder, or the folder of a checkpoint: one of its checkpoints/STEP, or a copy"
    sub.add_argument("checkpoint", type=_path, metavar="CHECKPOINT", **{"help": text} | options)


def _add_evaluate(sub: argparse.ArgumentParser) -> None:
    sub.set_defaults(takes_overrides=True)
    sub.epilog = (
        "A fine-tuned checkpoint is scored on its own task; --task.path and other --task.* fields change the task. With --text, "
        "--data.text-field and other --data.* fields say how the text is read."
    )
    _add_checkpoint(sub, nargs="+", help="a run's folder, or one of its checkpoints/STEP; several with --zero-shot")
    text = "compute the perplexity on a file, a folder, a glob, tfds:NAME or builtin:docs"
    sub.add_argument("--text", type=_source, metavar="SOURCE", help=text)
    text = "maximum number of bytes of text to read (default: all)"
    sub.add_argument("--max-bytes", type=number(int, POSITIVE), metavar="BYTES", help=text)
    text = (
        "with --text: tokens scored at the end of each window after the first; the others are only context (default: the context "
        "length, so that windows do not overlap)"
    )
    sub.add_argument("--stride", type=number(int, POSITIVE), metavar="TOKENS", help=text)
    sub.add_argument("--split", choices=("train", "validation", "test"), help="split of the task (default: validation)")
    text = "cola, sst2, race, story_cloze (PATH: the task's folder), dprd or wsc (PATH: a file); may be given several times"
    sub.add_argument("--zero-shot", type=_probe, action="append", metavar="PROBE[=PATH]", help=text)
    sub.add_argument("--every-checkpoint", action="store_true", help="zero-shot scores of all checkpoints of a run, with a plot")
    sub.add_argument("--out", type=_path, help="folder for predictions, or for zero-shot scores and their plot")


def _add_generate(sub: argparse.ArgumentParser) -> None:
    _add_checkpoint(sub)
    text = "text to continue, or '' to start a new document; may be given several times"
    sub.add_argument("--prompt", action="append", required=True, help=text)
    text = "maximum number of tokens to append (default: 100)"
    sub.add_argument("--tokens", type=number(int, POSITIVE), default=100, help=text)
    text = "sampling temperature; 0: the most likely token (default: 1)"
    sub.add_argument("--temperature", type=number(float, NOT_NEGATIVE), default=1.0, help=text)
    text = "sample from this many of the most likely tokens (default: all)"
    sub.add_argument("--top-k", type=number(int, POSITIVE), help=text)
    text = "sample from the most likely tokens with this total probability (default: 1)"
    sub.add_argument("--top-p", type=number(float, PROBABILITY), default=1.0, help=text)
    sub.add_argument("--seed", type=number(int, SEED), default=0, help="equal seeds give equal text (default: 0)")


def _add_export(sub: argparse.ArgumentParser) -> None:
    _add_checkpoint(sub)
    text = "huggingface, npz, openai (as released), stablehlo, onnx or savedmodel"
    sub.add_argument("--format", required=True, metavar="FORMAT", help=text)
    sub.add_argument("--out", required=True, type=_path, help="the folder to create")
    dtypes = ("float32", "bfloat16", "float16")
    sub.add_argument("--dtype", default="float32", choices=dtypes, help="type of the stored numbers (default: float32)")
    text = "huggingface: split files larger than this (default: 5e9)"
    sub.add_argument("--shard-bytes", type=number(float, BYTES), metavar="BYTES", help=text)


def _add_import(sub: argparse.ArgumentParser) -> None:
    text = "folder of a Hugging Face openai-gpt model, of the released files, or of an npz file"
    sub.add_argument("source", type=_path, metavar="SOURCE", help=text)
    sub.add_argument("--workdir", required=True, type=_path, help="the run's folder")
    text = "a pre-training config that describes the model (default: the config in SOURCE, or the paper's)"
    sub.add_argument("--config", help=text)
    sub.add_argument("--tokenizer", type=_path, help="folder of the tokenizer, if SOURCE has none")
    sub.add_argument("--trust-pickle", action="store_true", help="read a pytorch_model.bin, which is a pickle")


def _add_checkpoint_verb(sub: argparse.ArgumentParser) -> None:
    text = "list them, verify every file, or delete all but the newest and best"
    sub.add_argument("action", choices=("list", "verify", "prune"), help=text)
    sub.add_argument("run_folder", type=_path, metavar="RUN", help="a run's folder, or a single checkpoint to list or verify")
    text = "prune: number of newest checkpoints to keep (default: 1)"
    sub.add_argument("--keep-latest", type=number(int, POSITIVE), help=text)
    text = "prune: number of best checkpoints to keep (default: 1)"
    sub.add_argument("--keep-best", type=number(int, NOT_NEGATIVE), help=text)


def _add_plan(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--topology", metavar="NAME", help="a TPU slice, such as v5e-256 or v5p-128, or a node with GPUs, such as h100-8"
    )
    sub.add_argument(
        "--slices", type=number(int, POSITIVE), default=1, metavar="N", help="number of slices or nodes (default: 1)"
    )
    text = "cost of one chip for an hour, in any currency, to print the cost of the run"
    sub.add_argument("--price", type=number(float, NOT_NEGATIVE), metavar="PRICE", help=text)
    text = "tokens in the training text, for runs whose length is given in epochs (default: those of --data.store)"
    sub.add_argument("--corpus-tokens", type=number(int, POSITIVE), metavar="N", help=text)
    text = "training examples of the task, for fine-tunings whose length is given in epochs"
    sub.add_argument("--examples", type=number(int, POSITIVE), metavar="N", help=text)
    text = "plan text generation with the model instead of its training: number and length of the prompts, and tokens to append"
    sub.add_argument("--generate", metavar="PROMPTSxLENGTH+TOKENS", help=text)
    sub.add_argument("--json", type=_path, metavar="FILE", help="also write the report to this file")
    either = sub.add_mutually_exclusive_group()
    text = "compare two reports: files that --json wrote, or configs, which are planned for --topology"
    either.add_argument("--compare", nargs=2, metavar=("A", "B"), help=text)
    text = "compile the most promising meshes, micro-batches and values of model.remat, and print the fastest"
    either.add_argument("--search", action="store_true", help=text)
    text = "run steps on the attached devices, and print their modeled and measured time"
    either.add_argument("--measure", action="store_true", help=text)
    text = "with --search: save the config of the fastest as this file, such as configs/NAME.py"
    sub.add_argument("--write", type=_path, metavar="FILE", help=text)


def _add_bench(sub: argparse.ArgumentParser) -> None:
    sub.epilog = (
        "train: the whole training step; attention, loss: parts of it; generate: continuing prompts; finetune: ten batches of a "
        "task; input: the input pipeline; tokenize: the tokenizer; checkpoint: saving and restoring; startup: the time to the "
        "first update; matmul: one matrix product; all: all of these except finetune, with their defaults."
    )
    sub.add_argument("name", choices=BENCHMARKS, help="what to measure (see below)")
    sub.set_defaults(takes_overrides=True)
    text = (
        "programs to measure beside ours, separated by spaces or commas: torch, torch-compiled, transformers, "
        "transformers-compiled (train; other benchmarks have some of them), torch-context (finetune), ctranslate2 (generate)"
    )
    sub.add_argument("--against", nargs="+", default=[], metavar="PEER", help=text)
    text = "the config to measure, which --section.field options change (default: gpt1; checkpoint: mini; finetune: none)"
    sub.add_argument("--config", help=text)
    text = "batch sizes (default: the config's own, or for generate 1; without --config 2, generate 1 8, input 64 256)"
    sub.add_argument("--batch-size", type=number(int, POSITIVE), nargs="+", metavar="N", help=text)
    sub.add_argument("--products", action="store_true", help="train: also time the matrix products of a step, each alone")
    sub.add_argument("--store", type=_path, help="input: a token store to read (default: a temporary file of random tokens)")
    text = "number of rounds, in which the programs take turns (default: 5)"
    sub.add_argument("--rounds", type=number(int, POSITIVE), default=5, help=text)
    sub.add_argument("--json", type=_path, metavar="FILE", help="also write all measurements to this file")
