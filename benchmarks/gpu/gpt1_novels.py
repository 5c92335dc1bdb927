"""GPT-1's model for one short run on novels, with a vocabulary that is trained on the same novels.

With the released vocabulary, reading a task would require ftfy and spaCy, which few GPU machines have.
"""

import dataclasses

from gpt_jax.config import DataConfig, OptimConfig, PretrainConfig, TokenizerConfig, TrainConfig
from gpt_jax.config.load import load_config


def config() -> PretrainConfig:
    paper = load_config("gpt1")
    assert isinstance(paper, PretrainConfig)
    return dataclasses.replace(
        paper,
        # The run sees its text once or twice, so that dropout would only slow it down.
        model=dataclasses.replace(paper.model, embed_dropout=0.0, attention_dropout=0.0, residual_dropout=0.0),
        data=DataConfig(tokenizer=TokenizerConfig(kind="sentencepiece")),
        optim=OptimConfig(peak_lr=5e-4, warmup="10%", b2=0.98, clip_norm=1.0),  # for a thousand updates, not a million
        train=TrainConfig(batch_size=64),
    )
