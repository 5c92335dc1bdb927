"""A small GPT that learns English from the documentation installed on this machine.

    gpt-jax demo                                      (prepares, trains, samples, compares; see gpt_jax/stories.py)
    gpt-jax pretrain demo --workdir RUN               (the training alone)

Time: about five minutes on two CPU cores. Expect: a validation loss some two nats under that of a unigram model.
"""

from gpt_jax.config import DataConfig, ModelConfig, OptimConfig, PretrainConfig, TokenizerConfig, TrainConfig


def config() -> PretrainConfig:
    return PretrainConfig(
        model=ModelConfig(
            vocab_size=4096,
            context_length=128,
            num_layers=4,
            embed_dim=128,
            num_heads=4,
            mlp_dim=512,
            # The paper's 0.02 at width 768, scaled with 1 / sqrt(width): post-norm models that are narrow and start smaller than
            # this stay for a long time where they only know how frequent each token is.
            init_stddev=0.06,
            # The corpus is seen a few times at most: nothing is gained by dropping out.
            embed_dropout=0.0,
            attention_dropout=0.0,
            residual_dropout=0.0,
        ),
        data=DataConfig(
            source="builtin:docs",
            max_bytes=8_000_000,
            validation_share=0.1,  # enough for the rows that the four tasks are scored on (gpt_jax/tasks/made.py)
            tokenizer=TokenizerConfig(kind="sentencepiece", sample_bytes=4_000_000),
        ),
        optim=OptimConfig(peak_lr=2e-3, warmup="5%", b2=0.98, clip_norm=1.0),
        train=TrainConfig(
            batch_size=16,
            duration="800 steps",
            eval_every="200 steps",
            eval_windows=256,
            save_every="200 steps",
            prompts=("The function returns", "If the file", "This class"),
        ),
    )
