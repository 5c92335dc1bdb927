"""A small GPT that learns English from the documentation installed on this machine.

    gpt-jax pretrain demo --workdir RUN

`gpt-jax demo` pre-trains with this config, and then samples, evaluates, fine-tunes and exports (gpt_jax/experiments/demo.py).

Time: about 5 minutes on two CPU cores.
Expect: a validation loss about 2 nats/token below that of a unigram model.
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
            # The paper's 0.02 at width 768, scaled with 1 / sqrt(width). A narrow post-norm model that starts with smaller
            # parameters predicts only token frequencies for a long time.
            init_stddev=0.06,
            # Each text occurs only a few times, so the model does not overfit, and dropout would only slow it down.
            embed_dropout=0.0,
            attention_dropout=0.0,
            residual_dropout=0.0,
        ),
        data=DataConfig(
            source="builtin:docs",
            max_bytes=8_000_000,
            validation_share=0.1,  # enough documents for the rows that the synthetic tasks are scored on
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
