"""STS-B: how alike are two sentences, from 0 to 5?

    gpt-jax finetune finetune/stsb --init.from RUN --task.path GLUE/STS-B --workdir OUT

Without --task.path the rows come from tensorflow-datasets (glue/stsb). 5,749 training rows. The settings are the paper's,
defaults of gpt_jax/config.py; docs/paper.md ends with what differs on purpose.

Time: not measured at the paper's size. Expect: not measured either; the paper has 82.0 Pearson correlation (times 100) from
GLUE's test server, Table 4.
"""

from gpt_jax.config import FinetuneConfig, TaskConfig


def config() -> FinetuneConfig:
    return FinetuneConfig(task=TaskConfig(name="stsb"))
