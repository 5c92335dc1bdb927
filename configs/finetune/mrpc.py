"""MRPC: do two sentences of the news mean the same?

    gpt-jax finetune finetune/mrpc --init.from RUN --task.path GLUE/MRPC --workdir OUT

Without --task.path the rows come from tensorflow-datasets (glue/mrpc). 3,668 training rows. The settings are the paper's,
defaults of gpt_jax/config.py; docs/paper.md ends with what differs on purpose.

Time: not measured at the paper's size. Expect: not measured either; the paper has 82.3 F1 from GLUE's test server, Table 4.
"""

from gpt_jax.config import FinetuneConfig, TaskConfig


def config() -> FinetuneConfig:
    return FinetuneConfig(task=TaskConfig(name="mrpc"))
