"""A very small GPT, trained on installed documentation, to check that everything works on this machine.

    gpt-jax pretrain smoke --workdir RUN

Time: less than 1 minute on two CPU cores, including the preparation of the text.
Expect: the training loss falls from about 7.6 to about 6.2 nats/token.
"""

from gpt_jax.config import DataConfig, ModelConfig, OptimConfig, PretrainConfig, TokenizerConfig, TrainConfig


def config() -> PretrainConfig:
    return PretrainConfig(
        model=ModelConfig(
            vocab_size=2048,
            context_length=64,
            num_layers=2,
            embed_dim=64,
            num_heads=4,
            mlp_dim=256,
            init_stddev=0.07,  # the paper's 0.02 at width 768, scaled with 1 / sqrt(width)
        ),
        data=DataConfig(
            source="builtin:docs",
            max_bytes=1_000_000,
            validation_share=0.02,
            tokenizer=TokenizerConfig(kind="sentencepiece", sample_bytes=1_000_000),
        ),
        optim=OptimConfig(peak_lr=3e-3, warmup="10 steps"),
        train=TrainConfig(
            batch_size=16, duration="60 steps", eval_every="20 steps", eval_windows=64, save_every="10 steps", sample_tokens=20
        ),
    )
