"""QQP: do two questions ask the same?

    gpt-jax finetune finetune/qqp --init.from RUN --task.path GLUE/QQP --workdir OUT

Without --task.path the rows come from tensorflow-datasets (glue/qqp). 363,849 training rows or a few less, by release. Every
setting is the paper's, a default of gpt_jax/config.py.

Time: not measured yet at the paper's size. Expect: not measured yet either; the paper has 70.3 F1 from GLUE's test server,
Table 4.
"""

from gpt_jax.config import FinetuneConfig, TaskConfig


def config() -> FinetuneConfig:
    return FinetuneConfig(task=TaskConfig(name="qqp"))
