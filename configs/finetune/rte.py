"""RTE: does a passage entail a sentence?

    gpt-jax finetune finetune/rte --init.from RUN --task.path GLUE/RTE --workdir OUT

Without --task.path the rows come from tensorflow-datasets (glue/rte). 2,490 training rows. The settings are the paper's, defaults
of gpt_jax/config.py; docs/paper.md ends with what differs on purpose.

Time: not measured at the paper's size. Expect: not measured either; the paper has 56.0 accuracy from GLUE's test server, Table 2.
"""

from gpt_jax.config import FinetuneConfig, TaskConfig


def config() -> FinetuneConfig:
    return FinetuneConfig(task=TaskConfig(name="rte"))
