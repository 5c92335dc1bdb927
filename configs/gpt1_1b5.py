"""A sibling of GPT-1 with 1.5 billion parameters, for work on scale: 48 layers of width 1600, contexts of 1,024 tokens.

    gpt-jax pretrain gpt1_1b5 --data.store STORE --mesh.fsdp 16 --mesh.data -1 --workdir RUN

The proportions are those of the largest GPT-2; everything else is GPT-1's: normalisation after the sums, learned positions, the
optimiser. The tokenizer is a SentencePiece one with 50,000 pieces. Mesh sizes must divide 25 heads if `tensor` is used.

Time and result: not measured.
"""

from gpt_jax.config import DataConfig, ModelConfig, OptimConfig, PretrainConfig, TokenizerConfig, TrainConfig


def config() -> PretrainConfig:
    return PretrainConfig(
        model=ModelConfig(
            vocab_size=50_000,
            context_length=1024,
            num_layers=48,
            embed_dim=1600,
            num_heads=25,
            mlp_dim=6400,
            remat="dots",
        ),
        data=DataConfig(tokenizer=TokenizerConfig(kind="sentencepiece")),
        optim=OptimConfig(peak_lr=1.5e-4, clip_norm=1.0),
        train=TrainConfig(batch_size=512, duration="1 epochs", save_every="500 steps", eval_every="500 steps"),
    )
