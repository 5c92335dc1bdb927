"""The paper's analyses (section 5): series of fine-tuning runs that differ in one setting (`gpt-jax study`).

    layers      random parameters, pre-trained embeddings, then one more pre-trained block at a time (Figure 2, left)
    ablations   the full method; without pre-training; without the auxiliary loss; an LSTM instead of the Transformer (Table 5)
    steps       every checkpoint that a pre-training run has kept (`--train.keep-latest` of that run limits their number)

A study's folder contains a run for each variant and seed, NAME-variants.json with the settings of each variant, NAME.json with
all scores, and NAME.png. Repeating the command resumes the study, even if the pre-trained runs are gone by then.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gpt_jax.config import FinetuneConfig, ModelConfig, TransferConfig
from gpt_jax.config.load import config_from_dict, config_to_dict
from gpt_jax.errors import UserError, require
from gpt_jax.experiments.plots import Curve, plot_curves, require_matplotlib
from gpt_jax.experiments.score_tables import format_table
from gpt_jax.runtime import distributed
from gpt_jax.runtime.console import Log, say
from gpt_jax.runtime.rundir import read_json, write_atomic
from gpt_jax.tasks.evaluate import sound_checkpoints
from gpt_jax.tasks.finetune import finetune_seeds
from gpt_jax.tasks.init_source import find_init, resolve_config
from gpt_jax.tasks.registry import Task, task_from_config

StudyName = Literal["layers", "ablations", "steps"]


class Variant(NamedTuple):
    """One variant of a study: a fine-tuning config, which is run with one or more seeds."""

    name: str
    x: float
    """Position of the variant's point in the figure."""
    config: FinetuneConfig


def layer_variants(config: FinetuneConfig, log: Log) -> list[Variant]:
    """Returns the variants that transfer nothing, the embeddings, or the embeddings and 1, 2, ... blocks from `--init.from`.

    Raises:
      UserError: `--init.from` has no checkpoint of a Transformer.
    """
    config, model = _pin_checkpoint(config, log)
    require(model.kind == "transformer", "init.from", f"{config.init.from_} is an LSTM, which has no blocks to transfer")
    variants = [Variant("nothing", -1, _random_init(config)), Variant("embeddings", 0, _replace_init(config, blocks=0))]
    for blocks in range(1, model.num_layers + 1):
        name = "1 block" if blocks == 1 else f"{blocks} blocks"
        variants.append(Variant(name, blocks, _replace_init(config, blocks=blocks)))
    return variants


def ablation_variants(config: FinetuneConfig, log: Log, lstm: str = "") -> list[Variant]:
    """Returns the rows of Table 5. The LSTM's row is included only if `lstm` names the run of a pre-trained LSTM.

    Raises:
      UserError: `--init.from` has no checkpoint of a Transformer, `lstm` has no checkpoint of an LSTM, or the config has no
        auxiliary loss.
    """
    require(
        config.task.lm_weight > 0, "task.lm_weight", "must be positive; the study 'ablations' sets it to 0 for one of its rows"
    )
    config, model = _pin_checkpoint(config, log)
    require(model.kind == "transformer", "init.from", f"{config.init.from_} is an LSTM; give it as --lstm and a Transformer here")
    without_lm = dataclasses.replace(config, task=dataclasses.replace(config.task, lm_weight=0.0))
    rows = [("full", config), ("w/o pre-training", _random_init(config)), ("w/o aux LM", without_lm)]
    if lstm:
        require(lstm != "none", "lstm", "name the run of a pre-trained LSTM")
        lstm_config, lstm_model = _pin_checkpoint(_replace_init(config, from_=lstm), log)
        require(lstm_model.kind == "lstm", "lstm", f"{lstm} is a Transformer; pre-train an LSTM with --model.kind lstm")
        rows.append(("LSTM w/ aux LM", lstm_config))
    else:
        log("ablations: the LSTM's row is left out; name a pre-trained LSTM with --lstm RUN")
    return [Variant(name, x, variant) for x, (name, variant) in enumerate(rows)]


def step_variants(config: FinetuneConfig, log: Log) -> list[Variant]:
    """Returns a variant for each sound checkpoint of the run in `--init.from`, and one with random parameters at step 0.

    Raises:
      UserError: the run has no sound checkpoints.
    """
    checkpoints = sound_checkpoints(Path(config.init.from_))
    random = _random_init(_replace_init(config, from_=str(checkpoints[-1].path)))
    pretrained = [Variant(f"step {info.step}", info.step, _replace_init(config, from_=str(info.path))) for info in checkpoints]
    return [Variant("nothing", 0, random), *pretrained]


def study(name: StudyName, config: FinetuneConfig, workdir: Path, seeds: int, lstm: str = "") -> dict[str, Any]:
    """Runs a study and writes its folder.

    All runs start from one checkpoint, which is the newest one when the study begins. The config of each run records the folder
    of the checkpoint.

    Args:
      config: the fine-tuning config that is varied; `--init.from` names the pre-trained run.
      seeds: number of seeds for each variant.
      lstm: the run of a pre-trained LSTM, for "ablations".

    Returns:
      The contents of NAME.json.

    Raises:
      UserError: as `finetune`; the settings do not allow this study; matplotlib is not installed; or another process uses the
        folder. If a checkpoint does not fit, the error is raised before any training starts.
      TrainingError, Preempted: as `finetune`; the same command resumes the study.
    """
    require_matplotlib()
    require(config.init.from_ not in ("", "none"), "init.from", "name the pre-trained run that the study is about")
    require(not lstm or name == "ablations", "lstm", f"applies to the study 'ablations', not to '{name}'")
    require(name == "steps" or config.init.blocks == -1, "init.blocks", f"the study '{name}' sets this field; leave it out")
    require(seeds > 0, "seeds", f"must be positive, not {seeds}")
    task = task_from_config(config.task)
    distributed.start(config.distributed, say)
    with distributed.locked(workdir, say):
        return _run_study(name, config, workdir, seeds, lstm, task)


def _run_study(name: StudyName, config: FinetuneConfig, workdir: Path, seeds: int, lstm: str, task: Task) -> dict[str, Any]:
    """Runs a study whose settings are allowed, in a folder that this run has locked; see `study`."""
    log: Log = say if distributed.is_primary() else lambda line: None
    variants = find_variants(name, config, task, workdir / f"{name}-variants.json", lstm, log)
    rows: list[dict[str, Any]] = []
    for number, variant in enumerate(variants, 1):
        log(f"{name}: {variant.name} ({number} of {len(variants)})")
        scores = finetune_seeds(variant.config, workdir / variant.name.replace(" ", "-").replace("/", ""), seeds)
        init, lm_weight = dataclasses.asdict(variant.config.init), variant.config.task.lm_weight
        row = {"variant": variant.name, "x": variant.x, "init": init, "lm_weight": lm_weight}
        rows.append(row | {"validation": scores["validation"], "test": scores.get("test")})
    metric = task.metrics[0]
    result = {"study": name, "metric": metric, "seeds": seeds, "config": config_to_dict(config), "variants": rows}
    if distributed.is_primary():
        write_atomic(workdir / f"{name}.json", json.dumps(result, indent=1) + "\n")
        of_seeds = f"median and range of {seeds} seeds" if seeds > 1 else f"seed {config.train.seed}"
        _show(result, workdir / f"{name}.png", f"{task.title}, validation; {of_seeds}")
        print(f"{workdir / name}.json, {workdir / name}.png")
    return result


def find_variants(name: StudyName, config: FinetuneConfig, task: Task, file: Path, lstm: str, log: Log) -> list[Variant]:
    """Returns the variants of a study after checking that their settings fit their checkpoints, and records them in a file.

    If a checkpoint cannot be read, the variants are those in the file, because runs that have begun no longer need it.

    Raises:
      UserError: a checkpoint cannot be read or does not fit, and the study has not begun.
    """
    makers: dict[StudyName, Callable[[FinetuneConfig, Log], list[Variant]]]
    makers = {"layers": layer_variants, "ablations": functools.partial(ablation_variants, lstm=lstm), "steps": step_variants}
    try:
        variants = makers[name](config, log)
        find_source = functools.cache(lambda init: find_init(init, log))
        for variant in variants:
            source = find_source(dataclasses.replace(variant.config.init, blocks=-1))
            resolve_config(variant.config, task, source.architecture)
    except UserError as error:
        if not file.exists():
            raise
        log(f"continuing with the variants in {file} ({error})")
        rows = read_json(file, {"variants": [{"variant": str, "x": float, "config": dict}]})["variants"]
        return [Variant(row["variant"], row["x"], _with_settings_of(row["config"], config, file)) for row in rows]
    if distributed.is_primary():
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"variant": variant.name, "x": variant.x, "config": config_to_dict(variant.config)} for variant in variants]
        write_atomic(file, json.dumps({"variants": rows}, indent=1) + "\n")
    return variants


def _show(result: dict[str, Any], figure: Path, title: str) -> None:
    """Prints the scores of a study's variants and plots them."""
    name, metric, rows = result["study"], result["metric"], result["variants"]
    variants, x = [row["variant"] for row in rows], [row["x"] for row in rows]
    percent = [[100 * row["validation"][metric][key] for key in ("median", "min", "max")] for row in rows]
    curve = Curve(title, x, [median for median, _, _ in percent], [(low, high) for _, low, high in percent])
    x_label = {"layers": "transferred from pre-training", "ablations": "", "steps": "pre-training steps"}[name]
    names = () if name == "steps" else variants
    plot_curves(figure, [curve], title, x_label, f"{metric} (%)", names, joined=name != "ablations")
    table = [(variant, *(f"{value:.1f}" for value in values)) for variant, values in zip(variants, percent, strict=True)]
    print(format_table([("variant", f"{metric}, median", "lowest", "highest"), *table]))


def _pin_checkpoint(config: FinetuneConfig, log: Log) -> tuple[FinetuneConfig, ModelConfig]:
    """Returns the config with the run in `--init.from` replaced by its newest checkpoint, and the checkpoint's architecture."""
    source = find_init(config.init, log)
    assert source.info is not None
    return _replace_init(config, from_=str(source.info.path)), source.model


def _with_settings_of(recorded: dict[str, Any], config: FinetuneConfig, file: Path) -> FinetuneConfig:
    """Returns the config with the settings that distinguish a variant recorded in a study's file."""
    variant = config_from_dict(recorded, file)
    if not isinstance(variant, FinetuneConfig):
        raise UserError(f"{file}: contains a pre-training config; it has changed since it was written")
    return dataclasses.replace(config, init=variant.init, task=dataclasses.replace(config.task, lm_weight=variant.task.lm_weight))


def _random_init(config: FinetuneConfig) -> FinetuneConfig:
    """Returns the config with random parameters for the architecture in `--init.from`."""
    return dataclasses.replace(config, init=TransferConfig(from_="none", like=config.init.from_))


def _replace_init(config: FinetuneConfig, **fields: Any) -> FinetuneConfig:
    """Returns the config with some fields of `init` replaced."""
    return dataclasses.replace(config, init=dataclasses.replace(config.init, **fields))
