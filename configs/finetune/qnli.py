"""QNLI: does a sentence hold the answer to a question?

    gpt-jax finetune finetune/qnli --init.from RUN --task.path GLUE/QNLI --workdir OUT

Without --task.path the rows come from tensorflow-datasets (glue/qnli). 104,743 training rows. The settings are the paper's,
defaults of gpt_jax/config.py; docs/paper.md ends with what differs on purpose.

Time: not measured at the paper's size. Expect: not measured either; the paper has 88.1 accuracy from GLUE's test server, Table 2,
on the rows of 2018, which GLUE has since replaced by others.
"""

from gpt_jax.config import FinetuneConfig, TaskConfig


def config() -> FinetuneConfig:
    return FinetuneConfig(task=TaskConfig(name="qnli"))
