"""SST-2: does a phrase of a film review praise or blame?

    gpt-jax finetune finetune/sst2 --init.from RUN --task.path GLUE/SST-2 --workdir OUT

Without --task.path the rows come from tensorflow-datasets (glue/sst2). 67,349 training rows. Every setting is the paper's, a
default of gpt_jax/config.py.

Time: not measured yet at the paper's size. Expect: not measured yet either; the paper has 91.3 accuracy from GLUE's test
server, Table 4.
"""

from gpt_jax.config import FinetuneConfig, TaskConfig


def config() -> FinetuneConfig:
    return FinetuneConfig(task=TaskConfig(name="sst2"))
