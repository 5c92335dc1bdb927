"""CoLA: is a sentence acceptable English?

    gpt-jax finetune finetune/cola --init.from RUN --task.path GLUE/CoLA --workdir OUT

Without --task.path the rows come from tensorflow-datasets (glue/cola). 8,551 training rows. The settings are the paper's,
defaults of gpt_jax/config.py; docs/paper.md ends with what differs on purpose.

Time: not measured at the paper's size. Expect: not measured either; the paper has 45.4 Matthews correlation (times 100) from
GLUE's test server, Table 4.
"""

from gpt_jax.config import FinetuneConfig, TaskConfig


def config() -> FinetuneConfig:
    return FinetuneConfig(task=TaskConfig(name="cola"))
