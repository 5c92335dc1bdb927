"""A text, a token store and a model so small that a whole pre-training takes seconds."""

import json
import random

import pytest

from gpt_jax.config.load import apply_overrides, load_config
from gpt_jax.data.prepare import prepare

CONFIG = """
from gpt_jax.config import DataConfig, ModelConfig, OptimConfig, PretrainConfig, TokenizerConfig, TrainConfig


def config():
    return PretrainConfig(
        model=ModelConfig(
            vocab_size=257, context_length=16, num_layers=2, embed_dim=16, num_heads=4, mlp_dim=32, loss_chunk=8
        ),
        data=DataConfig(
            source="{source}",
            store="{store}",
            validation_share=0.1,
            processes=1,
            pipeline="threads",
            tokenizer=TokenizerConfig(kind="bytes"),
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
"""


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A .jsonl file of 60 documents, 30 KB."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 8))) for _ in range(200)]
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(rng.choices(words, k=90))}) + "\n" for _ in range(60)))
    return path


@pytest.fixture(scope="session")
def config_file(text):
    """The path of a config for a run of 20 steps on a store of that text, which is ready."""
    path = text.with_name("tiny.py")
    path.write_text(CONFIG.format(source=text, store=text.with_name("store")))
    prepare(load_config(str(path)), text.with_name("store"), lambda line: None)
    return path


@pytest.fixture(scope="session")
def tiny(config_file):
    """A function from overrides, as on the command line, to that config."""

    def override(*arguments):
        return apply_overrides(load_config(str(config_file)), list(arguments), "pytest")

    return override
