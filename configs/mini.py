"""A GPT of ten million parameters for your own text, sized for an hour or so of a small machine.

    gpt-jax pretrain mini --data.source TEXT --workdir RUN

Give it 10 MB of text or more. Time and result: docs/benchmarks.md has a run on 74 MB of novels.
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
            # The paper's 0.02 at width 768, scaled with 1 / sqrt(width): post-norm models that are narrow and start smaller than
            # this stay for a long time where they only know how frequent each token is.
            init_stddev=0.05,
            # Less than an epoch of text: nothing can be learnt by heart, so nothing is gained by dropping out.
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
