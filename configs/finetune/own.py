"""Fine-tuning with the paper's settings on a task of your own, in tables (.csv, .tsv, .jsonl, .parquet, ...) with named columns.

    gpt-jax finetune finetune/own --init.from RUN --workdir OUT \\
        --task.texts review --task.label stars --task.train my.tsv --task.validation held_out.tsv

This task classifies the texts in the column `review`. --task.kind chooses another kind of task, such as entailment, and
--task.score-range 1 5 makes it a regression. --task.texts title+review joins two columns into one text.

Time: not measured; about the time of pre-training on three times as many tokens as the rows contain.
Expect: not measured; the result is the score of the best of three epochs. `--seeds 5` shows how it varies.
"""

from gpt_jax.config import FinetuneConfig, FinetuneLoopConfig, ModelOptions, OptimConfig, TaskConfig


def config() -> FinetuneConfig:
    return FinetuneConfig(
        model=ModelOptions(  # the architecture is the checkpoint's
            embed_dropout=0.1,  # section 4.1
            attention_dropout=0.1,  # section 4.1
            residual_dropout=0.1,  # section 4.1
        ),
        optim=OptimConfig(
            kind="adam_gpt1",  # section 4.1: Adam, in the form of the released code
            peak_lr=6.25e-5,  # section 4.1, "Fine-tuning details"
            schedule="linear",  # section 4.1, "Fine-tuning details"
            warmup="0.2%",  # section 4.1, "Fine-tuning details"
            b1=0.9,  # released code
            b2=0.999,  # released code
            epsilon=1e-8,  # released code
            weight_decay=0.01,  # section 4.1
            clip_norm=1.0,  # released code
        ),
        train=FinetuneLoopConfig(
            batch_size=32,  # section 4.1, "Fine-tuning details"
            duration="3 epochs",  # section 4.1, "Fine-tuning details"
        ),
        task=TaskConfig(
            lm_weight=0.5,  # section 4.1, "Fine-tuning details": lambda of equation 5
            classifier_dropout=0.1,  # section 4.1, "Fine-tuning details"
        ),
    )
