"""The paper's analyses (section 5), each a series of fine-tunings that differ in one thing; `gpt-jax study`.

    layers      from nothing, from the embeddings alone, then from ever more pre-trained blocks (Figure 2, left)
    ablations   the full method; without pre-training; without the auxiliary loss; an LSTM in the Transformer's place (Table 5)
    steps       from every checkpoint that a pre-training run has kept (`--train.keep-latest` says how many)

A study's folder has a run for each variant and seed, NAME.json with all scores, and NAME.png. It is resumed like a run.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gpt_jax.config import FinetuneConfig, ModelConfig, TransferConfig
from gpt_jax.config.load import config_to_dict
from gpt_jax.errors import require
from gpt_jax.experiments.plots import Curve, Point, curves, require_matplotlib
from gpt_jax.runtime import distributed
from gpt_jax.runtime.console import say
from gpt_jax.runtime.rundir import write_atomic
from gpt_jax.tasks.dataset import task_of
from gpt_jax.tasks.evaluate import sound_checkpoints
from gpt_jax.tasks.finetune import find_source, finetune_seeds, resolve

Log = Callable[[str], None]
StudyName = Literal["layers", "ablations", "steps"]


class Variant(NamedTuple):
    """One fine-tuning of a study."""

    name: str
    x: float
    """Where its point lies in the figure."""
    config: FinetuneConfig


def layers(config: FinetuneConfig, log: Log) -> list[Variant]:
    """Nothing, the embeddings, then 1, 2, ... blocks taken over from `--init.from`.

    Raises:
      UserError: no checkpoint of a Transformer there, or `--init.blocks` is given.
    """
    _require_whole(config, "layers")
    config, model = _settle(config, log)
    require(model.kind == "transformer", "init.from", f"{config.init.from_} is an LSTM, which has no blocks to take over")
    parts = [Variant("nothing", -1, _from_nothing(config)), Variant("embeddings", 0, _from(config, blocks=0))]
    return parts + [Variant(f"{k} block{'s' * (k > 1)}", k, _from(config, blocks=k)) for k in range(1, model.num_layers + 1)]


def ablations(config: FinetuneConfig, log: Log, lstm: str = "") -> list[Variant]:
    """Table 5's rows; the LSTM's where the run of a pre-trained one is given.

    Raises:
      UserError: no checkpoint of a Transformer in `--init.from`, or none of an LSTM in `lstm`; or the auxiliary loss or a part of
        the blocks is left out already.
    """
    _require_whole(config, "ablations")
    require(config.task.lm_weight > 0, "task.lm_weight", "the ablations leave the auxiliary loss out themselves; give its weight")
    config, model = _settle(config, log)
    require(
        model.kind == "transformer",
        "init.from",
        f"{config.init.from_} is an LSTM; the ablations are those of a Transformer, and take the LSTM's run as --lstm",
    )
    without_lm = dataclasses.replace(config, task=dataclasses.replace(config.task, lm_weight=0.0))
    rows = [("full", config), ("w/o pre-training", _from_nothing(config)), ("w/o aux LM", without_lm)]
    if lstm:
        require(lstm != "none", "lstm", "name the run of a pre-trained LSTM")
        from_lstm, other = _settle(_from(config, from_=lstm), log)
        require(other.kind == "lstm", "lstm", f"{lstm} is a Transformer; pre-train with --model.kind lstm")
        rows.append(("LSTM w/ aux LM", from_lstm))
    else:
        log("ablations: the LSTM's row is left out; --lstm RUN names a pre-trained one")
    return [Variant(name, number, variant) for number, (name, variant) in enumerate(rows)]


def steps(config: FinetuneConfig, log: Log) -> list[Variant]:
    """Every sound checkpoint of the run in `--init.from`; and nothing, at step 0.

    Raises:
      UserError: there are none.
    """
    found = sound_checkpoints(Path(config.init.from_))
    nothing = Variant("nothing", 0, _from_nothing(_from(config, from_=str(found[-1].path))))
    return [nothing, *(Variant(f"step {info.step}", info.step, _from(config, from_=str(info.path))) for info in found)]


_X_LABELS = {"layers": "taken over from pre-training", "ablations": "", "steps": "pre-training steps"}


def study(name: StudyName, config: FinetuneConfig, workdir: Path, seeds: int, lstm: str = "") -> dict[str, Any]:
    """Runs a study and writes its folder; returns what NAME.json holds.

    All of its fine-tunings start from one checkpoint, the newest when the study began; its folder is in each run's config.

    Args:
      name: layers, ablations or steps.
      config: the fine-tuning that is varied; `--init.from` names the pre-trained run.
      seeds: fine-tunings of each variant.
      lstm: a pre-trained LSTM's run, for "ablations".

    Raises:
      UserError: as `finetune`; a checkpoint that does not fit is said before anything is trained. Or the study cannot be made of
        these settings; or matplotlib is not installed.
      TrainingError, Preempted: as `finetune`; the same command goes on.
    """
    require_matplotlib()
    require(config.init.from_ not in ("", "none"), "init.from", "say which pre-trained run the study is about")
    require(not lstm or name == "ablations", "lstm", f"is for the study 'ablations', not for '{name}'")
    require(seeds > 0, "seeds", f"must be positive, not {seeds}")
    task = task_of(config.task)
    distributed.start(config.distributed, say)
    log: Log = say if distributed.is_primary() else lambda line: None
    match name:
        case "layers":
            variants = layers(config, log)
        case "ablations":
            variants = ablations(config, log, lstm)
        case "steps":
            variants = steps(config, log)
    sources = functools.cache(lambda origin: find_source(origin, log))
    for variant in variants:
        resolve(variant.config, task, sources(dataclasses.replace(variant.config.init, blocks=-1)))
    rows: list[dict[str, Any]] = []
    for variant in variants:
        log(f"{name}: {variant.name} ({len(rows) + 1} of {len(variants)})")
        scores = finetune_seeds(variant.config, workdir / variant.name.replace(" ", "-").replace("/", ""), seeds)
        differs = {"init": dataclasses.asdict(variant.config.init), "lm_weight": variant.config.task.lm_weight}
        measured = {"validation": scores["validation"], "test": scores.get("test")}
        rows.append({"variant": variant.name, "x": variant.x, **differs, **measured})
    metric = task.metrics[0]
    result = {"study": name, "metric": metric, "seeds": seeds, "config": config_to_dict(config), "variants": rows}
    if not distributed.is_primary():
        return result
    write_atomic(workdir / f"{name}.json", json.dumps(result, indent=1) + "\n")
    spreads = [(row["x"], row["validation"][metric]) for row in rows]
    points = [Point(x, 100 * each["median"], 100 * each["min"], 100 * each["max"]) for x, each in spreads]
    drawn = f"median and range of {seeds} seeds" if seeds > 1 else f"seed {config.train.seed}"
    curves(
        workdir / f"{name}.png",
        f"{task.title}, validation; {drawn}",
        _X_LABELS[name],
        f"{metric} (%)",
        [Curve(task.title, points)],
        ticks={} if name == "steps" else {variant.x: variant.name for variant in variants},
        joined=name != "ablations",
    )
    width = max(len(row["variant"]) for row in rows) + 2
    print(f"{'variant':<{width}}{metric + ', median':>20}{'lowest':>10}{'highest':>10}")
    for row in rows:
        each = row["validation"][metric]
        print(f"{row['variant']:<{width}}{100 * each['median']:>20.1f}{100 * each['min']:>10.1f}{100 * each['max']:>10.1f}")
    print(f"{workdir / name}.json, {workdir / name}.png")
    return result


def _require_whole(config: FinetuneConfig, study: str) -> None:
    require(config.init.blocks == -1, "init.blocks", f"the study '{study}' says itself how much is taken over; leave it out")


def _settle(config: FinetuneConfig, log: Log) -> tuple[FinetuneConfig, ModelConfig]:
    """The config with one checkpoint in place of the run in `--init.from`, and that checkpoint's architecture."""
    source = find_source(config.init, log)
    assert source.info is not None
    return _from(config, from_=str(source.info.path)), source.model


def _from_nothing(config: FinetuneConfig) -> FinetuneConfig:
    return dataclasses.replace(config, init=TransferConfig(from_="none", like=config.init.from_))


def _from(config: FinetuneConfig, **fields: Any) -> FinetuneConfig:
    return dataclasses.replace(config, init=dataclasses.replace(config.init, **fields))
