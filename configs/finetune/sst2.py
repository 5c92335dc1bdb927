"""SST-2: does a phrase of a film review praise or blame?

    gpt-jax finetune finetune/sst2 --init.from RUN --task.path GLUE/SST-2 --workdir OUT

Without --task.path the rows come from tensorflow-datasets (glue/sst2). 67,349 training rows. The settings are the paper's,
defaults of gpt_jax/config.py; docs/paper.md ends with what differs on purpose.

Time: not measured at the paper's size. Expect: not measured either; the paper has 91.3 accuracy from GLUE's test server, Table 4.
"""

from gpt_jax.config import FinetuneConfig, TaskConfig


def config() -> FinetuneConfig:
    return FinetuneConfig(task=TaskConfig(name="sst2"))
