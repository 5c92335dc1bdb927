"""Tiny models to carry over: a pre-trained one (tests/conftest.py), and one fine-tuned on each kind of task."""

import dataclasses
import random
from pathlib import Path

import pytest

from gpt_jax.config import FinetuneConfig, FinetuneLoopConfig, OptimConfig, PipelineConfig, TaskConfig, TransferConfig

KINDS = {
    "classification": ("text",),
    "entailment": ("first", "second"),
    "similarity": ("first", "second"),
    "multiple_choice": ("context", "a", "b", "c"),
}


@pytest.fixture(scope="session")
def fine_tuned(pretrained, tmp_path_factory):
    """For each kind of task the folder of a finished fine-tuning, a few updates with a rate at which the head's bias moves."""
    from gpt_jax.tasks.finetune import finetune

    folder = tmp_path_factory.mktemp("fine_tuned")
    rng = random.Random(2)

    def run(kind: str) -> Path:
        texts = KINDS[kind]
        labels = ("0", "1", "2") if kind == "multiple_choice" else ("no", "yes", "maybe")
        for split in ("train", "validation"):
            rows = ["\t".join([*texts, "label"])]
            rows += [
                "\t".join(["".join(rng.choices("abcd ", k=5)) + "." for _ in texts] + [rng.choice(labels)]) for _ in range(24)
            ]
            rows += ["\t".join(["word."] * len(texts) + [label]) for label in labels]
            (folder / f"{kind}-{split}.tsv").write_text("\n".join(rows) + "\n")
        config = FinetuneConfig(
            data=PipelineConfig(pipeline="threads"),
            optim=OptimConfig(peak_lr=0.02, schedule="linear", warmup="10%", clip_norm=1.0),
            train=FinetuneLoopConfig(batch_size=8, duration="2 epochs", tensorboard=False),
            task=TaskConfig(
                kind=kind,
                texts=texts,
                labels=labels,
                train=str(folder / f"{kind}-train.tsv"),
                validation=str(folder / f"{kind}-validation.tsv"),
                num_length_buckets=1,
            ),
            init=TransferConfig(str(pretrained)),
        )
        finetune(dataclasses.replace(config), folder / kind)
        return folder / kind

    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = run(kind)
        return made[kind]

    return get
