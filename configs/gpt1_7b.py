"""A GPT-1 with 6,657,343,488 parameters, to plan and to measure large runs: 32 layers of width 4096, and 2,048 tokens of context.

    gpt-jax pretrain gpt1_7b --data.store STORE --workdir RUN

The heads have width 128, which fills the matrix units of TPUs. The rest of the architecture is that of GPT-1, as in gpt1_1b5.
Groups of 32 devices share the parameters, so that each has 128 columns of a matrix; TPUs gather narrower shards at twice the
cost. It fits v5p-256 (`gpt-jax plan gpt1_7b --topology v5p-256`). The tokenizer is a SentencePiece model with 50,000 pieces.

Time: not measured.
Expect: not measured.
"""

from gpt_jax.config import DataConfig, MeshConfig, ModelConfig, OptimConfig, PretrainConfig, TokenizerConfig, TrainConfig


def config() -> PretrainConfig:
    return PretrainConfig(
        model=ModelConfig(vocab_size=50_000, context_length=2048, num_layers=32, embed_dim=4096, num_heads=32, mlp_dim=16384),
        data=DataConfig(tokenizer=TokenizerConfig(kind="sentencepiece")),
        optim=OptimConfig(peak_lr=1e-4, clip_norm=1.0),
        mesh=MeshConfig(fsdp=32),
        train=TrainConfig(batch_size=1024, duration="1 epochs", save_every="500 steps", eval_every="500 steps"),
    )
