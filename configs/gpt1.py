"""GPT-1, pre-trained as in the paper.

    gpt-jax pretrain gpt1 --data.source TEXT --data.tokenizer.path FOLDER --workdir RUN

TEXT is a corpus of your own, because the paper's BooksCorpus is no longer available. FOLDER contains the released tokenizer's
files encoder_bpe_40000.json and vocab_40000.bpe. docs/paper.md lists the intended differences from the paper.

Time: not measured; the authors report a month on 8 GPUs.
Expect: not measured; the paper reports a perplexity of 18.4 on BooksCorpus (section 4.1).
"""

from gpt_jax.config import DataConfig, ModelConfig, OptimConfig, PretrainConfig, TokenizerConfig, TrainConfig


def config() -> PretrainConfig:
    return PretrainConfig(
        model=ModelConfig(
            vocab_size=40_478,  # released vocabulary; section 4.1: 40,000 merges
            context_length=512,  # section 4.1
            num_layers=12,  # section 4.1
            embed_dim=768,  # section 4.1
            num_heads=12,  # section 4.1
            mlp_dim=3072,  # section 4.1
            init_stddev=0.02,  # section 4.1
            layer_norm_epsilon=1e-5,  # released code
            embed_dropout=0.1,  # section 4.1
            attention_dropout=0.1,  # section 4.1
            residual_dropout=0.1,  # section 4.1
        ),
        data=DataConfig(tokenizer=TokenizerConfig(kind="gpt1")),  # section 4.1: byte-pair encoding, ftfy, spaCy
        optim=OptimConfig(
            kind="adam_gpt1",  # section 4.1: Adam, in the form of the released code
            peak_lr=2.5e-4,  # section 4.1
            schedule="cosine",  # section 4.1
            warmup="2000 steps",  # section 4.1
            b1=0.9,  # released code
            b2=0.999,  # released code
            epsilon=1e-8,  # released code
            weight_decay=0.01,  # section 4.1
            clip_norm=0.0,  # no clipping: section 4.1 mentions none
        ),
        train=TrainConfig(
            batch_size=64,  # section 4.1
            duration="100 epochs",  # section 4.1
        ),
    )
