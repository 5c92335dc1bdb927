"""The paper's analyses (section 5), each a series of fine-tunings that differ in one thing; `gpt-jax study`.

    layers      from nothing, from the embeddings alone, then from ever more pre-trained blocks (Figure 2, left)
    ablations   the full method; without pre-training; without the auxiliary loss; an LSTM in the Transformer's place (Table 5)
    steps       from every checkpoint that a pre-training run has kept (`--train.keep-latest` says how many)

A study's folder has a run for each variant and seed, NAME.json with all scores, and NAME.png. It is resumed like a run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax import config_io, distributed
from gpt_jax.config import FinetuneConfig, TransferConfig, require
from gpt_jax.plots import Curve, Point, curves, require_matplotlib
from gpt_jax.rundir import write_atomic
from gpt_jax.tasks.dataset import task_of
from gpt_jax.tasks.evaluate import sound_checkpoints
from gpt_jax.tasks.finetune import finetune_seeds
from gpt_jax.train import checkpoint
from gpt_jax.train.progress import say


class Variant(NamedTuple):
    """One fine-tuning of a study."""

    name: str
    x: float
    """Where its point lies in the figure."""
    config: FinetuneConfig


def layers(config: FinetuneConfig, lstm: str) -> list[Variant]:
    """Nothing, the embeddings, then 1, 2, ... blocks taken over from `--init.from`."""
    number = 0 if (model := _pretrained(config).model).kind == "lstm" else model.num_layers
    parts = [Variant("nothing", -1, _from_nothing(config)), Variant("embeddings", 0, _from(config, blocks=0))]
    return parts + [Variant(f"{k} blocks", k, _from(config, blocks=k)) for k in range(1, number + 1)]


def ablations(config: FinetuneConfig, lstm: str) -> list[Variant]:
    """Table 5's rows; the LSTM's where a pre-trained one is given."""
    no_lm = dataclasses.replace(config, task=dataclasses.replace(config.task, lm_weight=0.0))
    rows = [
        ("full", config),
        ("w/o pre-training", _from_nothing(config)),
        ("w/o aux LM", no_lm),
        *([("LSTM w/ aux LM", _from(config, from_=lstm))] if lstm else []),
    ]
    return [Variant(name, number, variant) for number, (name, variant) in enumerate(rows)]


def steps(config: FinetuneConfig, lstm: str) -> list[Variant]:
    """Every sound checkpoint of the run in `--init.from`; and nothing, at step 0."""
    found = sound_checkpoints(Path(config.init.from_))
    return [Variant("nothing", 0, _from_nothing(config))] + [
        Variant(f"step {path.name}", int(path.name), _from(config, from_=str(path))) for path in found
    ]


STUDIES: dict[str, Callable[[FinetuneConfig, str], list[Variant]]] = {"layers": layers, "ablations": ablations, "steps": steps}
X_LABELS = {
    "layers": "pre-trained blocks taken over (-1: no embeddings either)",
    "ablations": "",
    "steps": "pre-training steps",
}


def study(name: str, config: FinetuneConfig, workdir: Path, seeds: int, lstm: str = "") -> dict[str, Any]:
    """Runs a study and writes its folder; returns what NAME.json holds.

    Args:
      name: of a study in STUDIES.
      config: the fine-tuning that is varied; `--init.from` names the pre-trained run.
      seeds: fine-tunings of each variant.
      lstm: a pre-trained LSTM's run, for "ablations".

    Raises:
      UserError: as `finetune`; or matplotlib is not installed.
      TrainingError, Preempted: as `finetune`; the same command goes on.
    """
    require_matplotlib()
    require(config.init.from_ not in ("", "none"), "init.from", "say which pre-trained run the study is about")
    task = task_of(config.task)
    variants = STUDIES[name](config, lstm)
    rows: list[dict[str, Any]] = []
    for variant in variants:
        say(f"{name}: {variant.name} ({len(rows) + 1} of {len(variants)})")
        scores = finetune_seeds(variant.config, workdir / variant.name.replace(" ", "-").replace("/", ""), seeds)
        rows.append({"variant": variant.name, "x": variant.x, "validation": scores["validation"], "test": scores.get("test")})
    metric = task.metrics[0]
    result = {"study": name, "metric": metric, "seeds": seeds, "config": config_io.to_dict(config), "variants": rows}
    if not distributed.is_primary():
        return result
    write_atomic(workdir / f"{name}.json", json.dumps(result, indent=1) + "\n")
    spreads = [(row["x"], row["validation"][metric]) for row in rows]
    points = [Point(x, 100 * each["median"], 100 * each["min"], 100 * each["max"]) for x, each in spreads]
    ticks = [variant.name for variant in variants] if name == "ablations" else []
    curves(
        workdir / f"{name}.png",
        f"{task.title}, validation; median and range of {seeds} seeds",
        X_LABELS[name],
        f"{metric} (%)",
        [Curve(task.title, points)],
        ticks,
    )
    width = max(len(row["variant"]) for row in rows) + 2
    print(f"{'variant':<{width}}{metric + ', median':>20}{'lowest':>10}{'highest':>10}")
    for row in rows:
        each = row["validation"][metric]
        print(f"{row['variant']:<{width}}{100 * each['median']:>20.1f}{100 * each['min']:>10.1f}{100 * each['max']:>10.1f}")
    print(f"{workdir / name}.json, {workdir / name}.png")
    return result


def _pretrained(config: FinetuneConfig) -> Any:
    """The config of the run in `--init.from`."""
    return config_io.from_dict(checkpoint.read_config(checkpoint.resolve(Path(config.init.from_), say)))


def _from_nothing(config: FinetuneConfig) -> FinetuneConfig:
    return dataclasses.replace(config, init=TransferConfig(from_="none", like=config.init.from_))


def _from(config: FinetuneConfig, **fields: Any) -> FinetuneConfig:
    return dataclasses.replace(config, init=dataclasses.replace(config.init, **fields))
