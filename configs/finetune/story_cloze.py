"""Fine-tuning on Story Cloze, which asks which of two endings belongs to a story of four sentences.

    gpt-jax finetune finetune/story_cloze --init.from RUN --task.path FOLDER --workdir OUT

FOLDER contains the two files of the 2016 release, or those of 2018, whose test file has no labels. Without --task.path,
tensorflow-datasets provides the rows (story_cloze/2016) if these files are in its folder for manual downloads. As in the released
code, 374 of the 1,871 rows of the validation file are held out, and the other 1,497 are the training split. docs/paper.md lists
the intended differences from the paper.

Time: not measured.
Expect: not measured; the paper reports 86.5 accuracy on the test split (Table 3).
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
            name="story_cloze",
            lm_weight=0.5,  # section 4.1, "Fine-tuning details": lambda of equation 5
            classifier_dropout=0.1,  # section 4.1, "Fine-tuning details"
        ),
    )
