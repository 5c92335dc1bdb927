"""SciTail: does a sentence from the web entail the answer to a question of science?

    gpt-jax finetune finetune/scitail --init.from RUN --task.path FOLDER/SciTailV1.1 --workdir OUT

Without --task.path the rows come from tensorflow-datasets (sci_tail). 23,596 training rows; tensorflow-datasets has fewer, as it
runs some together (those are dropped and counted). The settings are the paper's, defaults of gpt_jax/config.py; docs/paper.md
ends with what differs on purpose.

Time: not measured at the paper's size. Expect: not measured either; the paper has 88.3 accuracy on the test split, Table 2.
"""

from gpt_jax.config import FinetuneConfig, TaskConfig


def config() -> FinetuneConfig:
    return FinetuneConfig(task=TaskConfig(name="scitail"))
