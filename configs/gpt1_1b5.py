"""A larger GPT-1 with 1,479,539,712 parameters, for experiments at scale: 36 layers of width 1792, and 1,024 tokens of context.

    gpt-jax pretrain gpt1_1b5 --data.store STORE --mesh.fsdp 16 --workdir RUN

The rest of the architecture is that of GPT-1: heads of width 64, a feed-forward width of four times the model's width, layer
normalization after each residual sum, and learned positions. All sizes are divisible by 2 and 4, for meshes with 2 or 4 devices
on the axis `tensor`. The tokenizer is a SentencePiece model with 50,000 pieces.

Time: not measured.
Expect: not measured.
"""

from gpt_jax.config import DataConfig, ModelConfig, OptimConfig, PretrainConfig, TokenizerConfig, TrainConfig


def config() -> PretrainConfig:
    return PretrainConfig(
        model=ModelConfig(
            vocab_size=50_000, context_length=1024, num_layers=36, embed_dim=1792, num_heads=28, mlp_dim=7168, remat="dots"
        ),
        data=DataConfig(tokenizer=TokenizerConfig(kind="sentencepiece")),
        optim=OptimConfig(peak_lr=1.5e-4, clip_norm=1.0),
        train=TrainConfig(batch_size=512, duration="1 epochs", save_every="500 steps", eval_every="500 steps"),
    )
