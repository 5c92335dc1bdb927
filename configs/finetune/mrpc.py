"""MRPC: do two sentences of the news mean the same?

    gpt-jax finetune finetune/mrpc --init.from RUN --task.path GLUE/MRPC --workdir OUT

Without --task.path the rows come from tensorflow-datasets (glue/mrpc). 3,668 training rows. Every setting is the paper's, a
default of gpt_jax/config.py.

Time: not measured yet at the paper's size. Expect: not measured yet either; the paper has 82.3 F1 from GLUE's test server,
Table 4.
"""

from gpt_jax.config import FinetuneConfig, TaskConfig


def config() -> FinetuneConfig:
    return FinetuneConfig(task=TaskConfig(name="mrpc"))
