"""Fine-tuning on STS-B, which asks how similar two sentences are, from 0 to 5.

    gpt-jax finetune finetune/stsb --init.from RUN --task.path GLUE/STS-B --workdir OUT

The training split has 5,749 rows. Without --task.path, tensorflow-datasets provides the rows (glue/stsb). docs/paper.md lists the
intended differences from the paper.

Time: not measured.
Expect: not measured; the paper reports 82.0 Pearson correlation (times 100) on GLUE's test server (Table 4).
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
            name="stsb",
            lm_weight=0.5,  # section 4.1, "Fine-tuning details": lambda of equation 5
            classifier_dropout=0.1,  # section 4.1, "Fine-tuning details"
        ),
    )
