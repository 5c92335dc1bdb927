"""A pre-training that takes seconds: its text, its config (also as a file or as command-line words), and the numbers of a run."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

from gpt_jax.config import DataConfig, ModelConfig, OptimConfig, PretrainConfig, TokenizerConfig, TrainConfig
from gpt_jax.config.load import flatten_config, load_config

COMPARED = {"train": ("loss", "grad_norm", "learning_rate"), "eval": ("loss", "perplexity", "bits_per_byte")}
"""The numbers by which two runs are compared, by the kind of their record."""


def write_text(folder: Path) -> Path:
    """Writes text.jsonl, 60 documents of about 25 KB in all, and returns its path."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 8))) for _ in range(200)]
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(rng.choices(words, k=70))}) + "\n" for _ in range(60)))
    return path


def tiny_config(source: Path, **changes: dict[str, Any]) -> PretrainConfig:
    """Returns a pre-training of 20 updates on the text at `source`, with the bytes tokenizer.

    Args:
      source: what `write_text` returns.
      changes: as for `replace_fields`.
    """
    config = PretrainConfig(
        model=ModelConfig(
            vocab_size=257,
            context_length=32,
            num_layers=2,
            embed_dim=16,
            num_heads=2,
            mlp_dim=64,
            attention="blockwise",  # as for longer sequences
            loss_chunk=16,
        ),
        data=DataConfig(
            source=str(source), validation_share=0.1, processes=1, pipeline="threads", tokenizer=TokenizerConfig(kind="bytes")
        ),
        optim=OptimConfig(peak_lr=0.01, warmup="3 steps"),
        train=TrainConfig(
            batch_size=8,
            duration="20 steps",
            eval_every="5 steps",
            eval_windows=20,
            save_every="5 steps",
            sample_tokens=0,
            tensorboard=False,
        ),
    )
    return replace_fields(config, **changes)


def replace_fields(config: PretrainConfig, **changes: dict[str, Any]) -> PretrainConfig:
    """Returns the config with other values for fields of some sections, such as `train={"duration": "2 steps"}`."""
    sections = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in changes.items()}
    return dataclasses.replace(config, **sections)


def write_config(config: PretrainConfig, path: Path) -> Path:
    """Writes a config file whose `config()` returns `config`, and returns its path."""
    path.write_text(f"from gpt_jax.config import *\n\n\ndef config():\n    return {config!r}\n")
    return path


def as_overrides(config: PretrainConfig, base: PretrainConfig) -> tuple[str, ...]:
    """Returns the command-line words that turn the config `base` into `config`."""
    before, after = flatten_config(base), flatten_config(config)
    changed = [(name, value) for name, (value, _) in after.items() if value != before[name][0]]
    return tuple(word for name, value in changed for word in (f"--{name}", str(value)))


def smoke_overrides(folder: Path, **changes: dict[str, Any]) -> tuple[str, ...]:
    """Returns command-line words that turn the config `smoke` into `tiny_config` with `changes`, on a text in `folder`."""
    return as_overrides(tiny_config(write_text(folder), **changes), load_config("smoke"))


def trajectory(run: Path) -> list[tuple[Any, ...]]:
    """Returns step, kind and numbers of a run's updates and evaluations. Numbers are texts: equal texts are equal bits."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [record for record in (json.loads(line, parse_float=str) for line in lines) if record["kind"] in COMPARED]
    return [(record["step"], record["kind"], *(record[name] for name in COMPARED[record["kind"]])) for record in records]
