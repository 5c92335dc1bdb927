"""GPT-1 as the paper has it: 12 layers of width 768, the released vocabulary, 100 epochs of 64 windows of 512 tokens.

    gpt-jax prepare gpt1 --data.source TEXT --data.tokenizer.path FOLDER --data.store STORE
    gpt-jax pretrain gpt1 --data.store STORE --data.tokenizer.path FOLDER --workdir RUN

FOLDER holds the released encoder_bpe_40000.json and vocab_40000.bpe; TEXT is yours, as BooksCorpus is not to be had. Every
setting is a default of gpt_jax/config.py, where its section of the paper stands beside it.

Time: not measured; the authors report a month on 8 GPUs. Expect: the paper's perplexity of 18.4 belongs to BooksCorpus.
"""

from gpt_jax.config import PretrainConfig


def config() -> PretrainConfig:
    return PretrainConfig()
