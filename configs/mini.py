"""A GPT with ten million parameters for your own text, small enough to train in about an hour on a small machine.

    gpt-jax pretrain mini --data.source TEXT --workdir RUN

TEXT should be at least 10 MB long. The figures below are from a run on 74.2 MB of novels (docs/benchmarks.md).

Time: 71 minutes on two cores of a shared cloud machine.
Expect: a validation loss of 5.193 nats/token, which is a perplexity of 180.0.
"""

from gpt_jax.config import DataConfig, ModelConfig, OptimConfig, PretrainConfig, TokenizerConfig, TrainConfig


def config() -> PretrainConfig:
    return PretrainConfig(
        model=ModelConfig(
            vocab_size=16_384,
            context_length=256,
            num_layers=4,
            embed_dim=320,
            num_heads=5,
            mlp_dim=1280,
            # The paper's 0.02 at width 768, scaled with 1 / sqrt(width). A narrow post-norm model that starts with smaller
            # parameters predicts only token frequencies for a long time.
            init_stddev=0.05,
            # The run is shorter than one epoch, so the model cannot overfit, and dropout would only slow it down.
            embed_dropout=0.0,
            attention_dropout=0.0,
            residual_dropout=0.0,
        ),
        data=DataConfig(tokenizer=TokenizerConfig(kind="sentencepiece")),
        optim=OptimConfig(peak_lr=1e-3, warmup="6%", b2=0.98, clip_norm=1.0),
        train=TrainConfig(
            batch_size=8,
            duration="3e6 tokens",
            eval_every="10%",
            eval_windows=256,
            save_every="10%",
            prompts=("It was", "She looked at him and said", "The old house"),
        ),
    )
