"""A small GPT that learns English from the documentation installed on this machine.

    gpt-jax pretrain demo --workdir RUN

`gpt-jax demo` pre-trains with this config, and then samples, evaluates, fine-tunes and exports (gpt_jax/experiments/demo.py).

Time: 32 seconds on two CPU cores.
Expect: a validation loss of 3.865 nats/token, 0.281 below that of an interpolated bigram model.
"""

from gpt_jax.config import DataConfig, ModelConfig, OptimConfig, PretrainConfig, TokenizerConfig, TrainConfig


def config() -> PretrainConfig:
    return PretrainConfig(
        model=ModelConfig(
            # Within a minute, two layers learn more than four, and small batches more than large ones (docs/benchmarks.md).
            vocab_size=2048,
            context_length=128,
            num_layers=2,
            embed_dim=128,
            num_heads=4,
            mlp_dim=512,
            # The paper's 0.02 at width 768, scaled with 1 / sqrt(width). A narrow post-norm model that starts with smaller
            # parameters predicts only token frequencies for a long time.
            init_stddev=0.06,
            # Each text occurs at most once, so the model does not overfit, and dropout would only slow it down.
            embed_dropout=0.0,
            attention_dropout=0.0,
            residual_dropout=0.0,
        ),
        data=DataConfig(
            source="builtin:docs",
            max_bytes=8_000_000,
            validation_share=0.2,  # enough documents for the rows that the synthetic tasks are scored on
            tokenizer=TokenizerConfig(kind="sentencepiece", sample_bytes=2_000_000),
            pipeline="threads",  # TensorFlow takes longer to start than it would save here.
        ),
        optim=OptimConfig(peak_lr=4e-3, warmup="5%", b2=0.98, clip_norm=1.0),
        train=TrainConfig(
            batch_size=8,
            duration="1200 steps",
            eval_every="400 steps",
            eval_windows=256,
            save_every="400 steps",
            prompts=("The function returns", "If the file", "This class"),
            log_seconds=3.5,
        ),
    )
