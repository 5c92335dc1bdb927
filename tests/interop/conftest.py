"""Tiny models to export: a pre-trained one (tests/conftest.py) and one fine-tuned on each kind of task."""

import dataclasses
import json
import random
from pathlib import Path

import pytest

from gpt_jax.config import FinetuneRunConfig, PipelineConfig, TaskConfig, TransferConfig

TEXTS = {
    "classification": ("text",),
    "entailment": ("first", "second"),
    "similarity": ("first", "second"),
    "multiple_choice": ("context", "a", "b", "c"),
    "regression": ("first", "second"),
}
"""The text columns of each kind of task; a regression is a similarity task with scores from 1 to 3."""
CLASSES = ("no", "yes", "maybe")
STEP = 6


def write_task(kind: str, folder: Path) -> TaskConfig:
    """Writes the rows of a task with three labels and returns its config."""
    rng = random.Random(2)
    texts, labels = TEXTS[kind], {"multiple_choice": ("0", "1", "2"), "regression": ("1", "2", "3")}.get(kind, CLASSES)
    files = {}
    for split in ("train", "validation"):
        rows = ["\t".join([*texts, "label"])]
        rows += ["\t".join(["".join(rng.choices("abcd ", k=5)) + "." for _ in texts] + [rng.choice(labels)]) for _ in range(24)]
        rows += ["\t".join(["word."] * len(texts) + [label]) for label in labels]
        files[split] = str(folder / f"{kind}-{split}.tsv")
        Path(files[split]).write_text("\n".join(rows) + "\n")
    fields = {"kind": "similarity", "score_range": (1, 3)} if kind == "regression" else {"kind": kind, "labels": labels}
    return TaskConfig(texts=texts, **fields, **files, num_length_buckets=1)


def random_params(model, head):
    """Parameters that all differ, the biases of the head and of the last layer norm far from 0; padding rows are zero."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(0)

    def draw(path, leaf):
        center = {"gain": 1.0, "bias": 0.2}.get(path[-1].key, 0.0)
        return jnp.asarray(rng.normal(center, 0.2, leaf.shape), jnp.float32)

    params = jax.tree.map_with_path(draw, jax.eval_shape(lambda: head.init(model, jax.random.key(0))))
    is_entry = jnp.arange(model.padded_vocab_size)[:, None] < model.vocab_size
    params["embedding"]["tokens"] = params["embedding"]["tokens"] * is_entry
    return params


@pytest.fixture(scope="session")
def fine_tuned(pretrained, tmp_path_factory):
    """A function from a kind of task to the folder of a finished fine-tuning, whose parameters are random instead of trained."""
    from gpt_jax.tasks.head import make_head
    from gpt_jax.tasks.registry import task_from_config
    from gpt_jax.tasks.transforms import SpecialTokens
    from gpt_jax.train.checkpoint import CheckpointWriter
    from gpt_jax.train.checkpoint_info import find_checkpoint, read_config

    folder = tmp_path_factory.mktemp("fine_tuned")

    def write_run(kind: str) -> Path:
        model = read_config(find_checkpoint(pretrained, print)).model
        config = FinetuneRunConfig(
            model=dataclasses.replace(model, vocab_size=model.vocab_size + len(SpecialTokens._fields)),
            data=PipelineConfig(pipeline="threads"),
            task=write_task(kind, folder),
            init=TransferConfig(str(pretrained)),
        )
        head = make_head(task_from_config(config.task), config)
        with CheckpointWriter(folder / kind / "checkpoints", config, "", pretrained / "tokenizer") as writer:
            writer.save(STEP, {"params": random_params(config.model, head)}, {"accuracy": 0.5})
        (folder / kind / "result.json").write_text(json.dumps({"best_step": STEP}))
        return folder / kind

    runs: dict[str, Path] = {}

    def get_run(kind: str) -> Path:
        if kind not in runs:
            runs[kind] = write_run(kind)
        return runs[kind]

    return get_run
