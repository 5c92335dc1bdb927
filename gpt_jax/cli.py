"""The command line: calls the function of each verb and prints results.

The modules that a verb needs are imported when the verb runs, so that `gpt-jax --help` needs neither JAX nor TensorFlow.
"""

import _thread
import argparse
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpt_jax import arguments
from gpt_jax.errors import Preempted, TrainingError, UserError, VerificationError, field_error
from gpt_jax.launch import command


def main(words: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code (README, "A run's folder").

    Args:
      words: the words of the command; None: those of this process, which may then exit without returning.
    """
    code = _main(words)
    if words is None and "gpt_jax.train.compilation" in sys.modules:
        from gpt_jax.train.compilation import exit_now_if_compiling

        exit_now_if_compiling(code)
    return code


def _main(words: Sequence[str] | None) -> int:
    """Runs one command and returns its exit code; an error becomes one line."""
    _prepare_output()
    own_process = words is None
    if own_process:  # SIGTERM unwinds the stack, so that locks are released. Training replaces this handler by one that saves.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        sys.unraisablehook = _interrupt_again
    words = arguments.join_values(sys.argv[1:] if words is None else words)
    show_traceback = "--traceback" in words
    try:
        return _run([word for word in words if word != "--traceback"])
    except (UserError, TrainingError, VerificationError, Preempted) as error:
        if show_traceback:
            raise
        _complain(str(error))
        return error.exit_code
    except (KeyboardInterrupt, SystemError) as error:
        # A signal that arrives inside one of NumPy's C functions becomes a SystemError.
        interrupted = isinstance(error, KeyboardInterrupt) or isinstance(error.__cause__, KeyboardInterrupt)
        if show_traceback or not interrupted:
            raise
        _complain("interrupted")
        if own_process:
            os._exit(130)  # If a compilation was interrupted, XLA would crash when Python exits.
        return 130
    except BrokenPipeError:  # The reader of the output, for example `head`, has exited before the end.
        return 128 + signal.SIGPIPE
    except OSError as error:
        from gpt_jax.runtime.rundir import DISK_ERRORS

        if show_traceback or (error.filename is None and error.errno not in DISK_ERRORS):
            raise
        _complain(f"{error.filename or 'a file could not be written'}: {error.strerror}")
        return UserError.exit_code
    except ValueError as error:
        from gpt_jax.runtime.environment import explain_import_error

        mistake = explain_import_error(error)
        if show_traceback or mistake is None:
            raise
        _complain(str(mistake))
        return mistake.exit_code


def _interrupt_again(unraisable: Any) -> None:
    """Interrupts the program again if Ctrl-C has hit a callback, such as JAX's in garbage collection; Python ignores it there."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        timer = threading.Timer(0.01, _thread.interrupt_main)  # Within this function, it would be ignored once more.
        timer.daemon = True
        timer.start()
    else:
        sys.__unraisablehook__(unraisable)


def _complain(line: str) -> None:
    """Prints a line to standard error, or nowhere if it cannot be written, for example to a log on a full disk."""
    try:
        print(f"gpt-jax: {line}", file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _prepare_output() -> None:
    """Redirects closed streams to nowhere, and escapes characters that the terminal's encoding lacks."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # Otherwise, the next file opened would get the stream's number and receive libraries' output.
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _run(words: list[str]) -> int:
    """Runs one command, and writes all of its output before it returns its exit code.

    Raises:
      OSError: the output cannot be written.
    """
    try:
        options, overrides = arguments.parse(words)
        if options.verb not in WITHOUT_JAX:
            from gpt_jax.runtime.environment import check_variables, require_devices

            check_variables()
            if options.verb in ON_THIS_MACHINE:
                require_devices()
        try:
            return VERBS[options.verb](options, overrides) or 0
        except UserError as error:
            if "allow_changes" not in options:  # The demo and a study compare their runs, so they do not offer it.
                error.args = (str(error).replace(", or add --allow-changes if this is intended", ""),)
            raise
    finally:
        try:
            sys.stdout.flush()
        except OSError:
            # Python would try again when it exits, and print a warning.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise


def _load_config(options: argparse.Namespace, overrides: list[str], verb: str = "pretrain") -> Any:
    """Returns the config that the command names, with its overrides.

    Args:
      verb: the verb that the config must be for, "pretrain" or "finetune"; "" means either.
    """
    from gpt_jax.config import FinetuneConfig
    from gpt_jax.config.load import apply_overrides, config_names, flatten_config, load_config

    suitable = {"pretrain": (False,), "finetune": (True,)}.get(verb, (False, True))
    names = ", ".join(name for name in config_names() if name.startswith("finetune/") in suitable)
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
    if verb not in (actual, ""):
        raise UserError(f"{options.config} is a config for gpt-jax {actual}")
    config = apply_overrides(loaded, overrides, f"gpt-jax {options.verb} {options.config} --workdir RUN")
    for name, (value, affects) in flatten_config(config).items():
        if affects == "input" and options.verb != "plan":  # Only the workers of a planned run need to see the files.
            arguments.local(value, name)
    return config


def _workdir(options: argparse.Namespace, what: str = "the run") -> Path:
    if options.workdir is None:
        raise field_error("workdir", f"name the folder for {what}")
    return options.workdir


# -- verbs ------------------------------------------------------------------------------------------------------------------


def _demo(options: argparse.Namespace, _: list[str]) -> int:
    from gpt_jax.experiments.elapsed import show_elapsed_time

    with show_elapsed_time(4.0):  # This includes the imports, which take a while.
        from gpt_jax.experiments.demo import demo

        return demo(options.workdir, options.seed)


def _prepare(options: argparse.Namespace, overrides: list[str]) -> None:
    config = _load_config(options, overrides)
    from gpt_jax.data.prepare import prepare
    from gpt_jax.runtime.console import say

    if not config.data.store and options.workdir is None:
        raise UserError("--data.store: name the folder for the token store (or --workdir RUN, for RUN/store)")
    prepare(config, Path(config.data.store) if config.data.store else options.workdir / "store", say, options.workdir)


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

        sources = dict(options.zero_shot)
        paths = list(dict.fromkeys(options.checkpoint))
        print_zero_shot_scores(evaluate.zero_shot(paths, sources, options.every_checkpoint, say), options.out)
        return
    checkpoint = options.checkpoint[0]
    if options.text:
        data = evaluate.text_config(options.text, overrides)
        scores = evaluate.evaluate_text(checkpoint, data, say, stride=options.stride, max_bytes=options.max_bytes)
    else:
        scores = evaluate.evaluate_task(checkpoint, overrides, options.split or "validation", options.out, say)
    if options.text:
        scores = {"loss (nats per token)": scores.pop("loss"), **scores}
    for name, value in scores.items():
        print(f"{name:<24}{value:>14,}" if isinstance(value, int) else f"{name:<24}{value:>14.4f}")


def _check_evaluate(options: argparse.Namespace, overrides: list[str]) -> None:
    """Checks that the arguments of `evaluate` can be combined."""
    if options.text and options.zero_shot:
        raise UserError("--text and --zero-shot are different measurements; give one of them")
    chosen = "--text" if options.text else "--zero-shot" if options.zero_shot else ""
    if overrides and options.zero_shot:
        raise UserError(f"'{overrides[0]}' is not an argument of gpt-jax evaluate with --zero-shot")
    if options.split and chosen:
        raise field_error("split", f"applies to tasks; with {chosen}, leave it out")
    for name in ("max_bytes", "stride"):
        if getattr(options, name) is not None and not options.text:
            raise field_error(name, "requires --text")
    if options.text and options.out:
        raise field_error("out", "perplexity is only printed; leave it out with --text")
    if options.every_checkpoint and not options.zero_shot:
        raise field_error("every_checkpoint", "requires --zero-shot")
    if len(options.checkpoint) > 1 and not options.zero_shot:
        raise UserError(f"{options.checkpoint[1]}: one checkpoint at a time; several can be compared with --zero-shot")
    probes = [probe for probe, _ in options.zero_shot or ()]
    for probe in probes:
        if probes.count(probe) > 1:
            raise field_error("zero_shot", f"{probe} is given more than once; each probe is scored on one set of rows")


def _study(options: argparse.Namespace, overrides: list[str]) -> None:
    config, workdir = _load_config(options, overrides, "finetune"), _workdir(options, "the study")
    if options.name is None:
        raise field_error("name", "name a study: layers, ablations or steps")
    from gpt_jax.experiments.studies import study

    study(options.name, config, workdir, options.seeds, options.lstm or "")


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
    from gpt_jax.train.checkpoint import prune
    from gpt_jax.train.checkpoint_info import is_checkpoint, list_checkpoints, own_checkpoints

    run = options.run_folder
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; give a run's folder")
    if options.action == "prune" and is_checkpoint(run):
        raise UserError(f"{run}: is a single checkpoint; give a run's folder")
    keep = {name: value for name in ("keep_latest", "keep_best") if (value := getattr(options, name)) is not None}
    if options.action == "prune":
        for info in prune(run, **{"keep_latest": 1, "keep_best": 1} | keep):
            print(f"deleted {info.path}")
        return 0
    if keep:
        raise field_error(next(iter(keep)), "requires prune")
    infos = list_checkpoints(run, checksums=options.action == "verify")
    if not infos:
        raise UserError(f"{run}: has no checkpoints")
    own = {info.path for info in own_checkpoints(run, checksums=False)}
    for info in infos:
        step = "?" if info.step < 0 else info.step
        scores = "  ".join(f"{name} {value:.4f}" for name, value in info.metrics.items())
        folder = info.path.name + (f" -> {info.path.readlink()}" if info.path.is_symlink() else "")
        name = "" if info.named_by_step else f"  (in {folder if folder.isprintable() else repr(folder)})"
        name += "" if info.path in own else "  (of another run)"
        print(f"{step:>9}  {info.size / 1e6:9.1f} MB  {info.state:<10}  {info.problem or scores}{name}")
    return UserError.exit_code if any(info.state == "damaged" for info in infos) else 0


def _plan(options: argparse.Namespace, overrides: list[str]) -> None:
    from gpt_jax.plan.command import compare, plan

    if options.write is not None and not options.search:
        raise field_error("write", "requires --search")
    if options.compare is None:
        plan(options, _load_config(options, overrides, ""))
        return
    if options.config is not None:
        hint = "write a value of a field as --section.field=VALUE"
        raise UserError(f"'{options.config}' is not an argument of gpt-jax plan --compare A B; {hint}")

    def load(name: str) -> Any:
        options.config = name
        return _load_config(options, overrides, "")

    compare(options, load)


def _bench(options: argparse.Namespace, overrides: list[str]) -> int:
    from gpt_jax.bench import command as bench

    bench.check_options(options, overrides)
    verb = "finetune" if options.name == "finetune" else "pretrain"
    return bench.bench(options, _load_config(options, overrides, verb) if options.config else None)


VERBS: dict[str, Callable[[argparse.Namespace, list[str]], int | None]] = {
    "demo": _demo,
    "prepare": _prepare,
    "pretrain": _pretrain,
    "finetune": _finetune,
    "evaluate": _evaluate,
    "study": _study,
    "report": _report,
    "generate": _generate,
    "export": _export,
    "import": _import,
    "launch": command.launch,
    "supervise": command.supervise,
    "checkpoint": _checkpoint,
    "plan": _plan,
    "bench": _bench,
}
"""The function of each verb. It takes the options and the words that override fields of a config."""
WITHOUT_JAX = ("prepare", "launch", "supervise", "plan", "bench")
ON_THIS_MACHINE = ("evaluate", "generate", "export", "import")
"""The verbs that compute in a single process. Others join the processes of a run before they use devices."""
