"""A task of your own: tables (.tsv, .csv, .jsonl) with named columns, and the paper's settings.

    gpt-jax finetune finetune/own --init.from RUN --workdir OUT \\
        --task.kind classification --task.texts review --task.label stars --task.train my.tsv --task.validation held_out.tsv

Time: that of a pre-training on three times the tokens in the rows. Expect: the scores of the best of three epochs;
`--seeds 5` for their spread.
"""

from gpt_jax.config import FinetuneConfig


def config() -> FinetuneConfig:
    return FinetuneConfig()
