"""QQP: do two questions ask the same?

    gpt-jax finetune finetune/qqp --init.from RUN --task.path GLUE/QQP --workdir OUT

Without --task.path the rows come from tensorflow-datasets (glue/qqp). 363,849 training rows or a few less, by release. The
settings are the paper's, defaults of gpt_jax/config.py; docs/paper.md ends with what differs on purpose.

Time: not measured at the paper's size. Expect: not measured either; the paper has 70.3 F1 from GLUE's test server, Table 4.
"""

from gpt_jax.config import FinetuneConfig, TaskConfig


def config() -> FinetuneConfig:
    return FinetuneConfig(task=TaskConfig(name="qqp"))
