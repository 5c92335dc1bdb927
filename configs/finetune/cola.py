"""CoLA: is a sentence acceptable English?

    gpt-jax finetune finetune/cola --init.from RUN --task.path GLUE/CoLA --workdir OUT

Without --task.path the rows come from tensorflow-datasets (glue/cola). 8,551 training rows. Every setting is the paper's, a
default of gpt_jax/config.py.

Time: not measured yet at the paper's size. Expect: not measured yet either; the paper has 45.4 Matthews correlation (times
100) from GLUE's test server, Table 4.
"""

from gpt_jax.config import FinetuneConfig, TaskConfig


def config() -> FinetuneConfig:
    return FinetuneConfig(task=TaskConfig(name="cola"))
