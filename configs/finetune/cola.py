"""CoLA: is a sentence acceptable English?

    gpt-jax finetune finetune/cola --init.from RUN --task.path GLUE/CoLA --workdir OUT

Without --task.path the rows come from tensorflow-datasets (glue/cola). 8,551 training rows. The settings are the paper's,
defaults of gpt_jax/config.py; docs/paper.md ends with what differs on purpose.

Time: 81 minutes from random parameters on one core of a cloud machine that other work shared; on an accelerator, not measured.
Expect: 7.9 Matthews correlation (times 100) on the development split from random parameters (one seed), where the paper has 18.9;
from pre-trained ones it has 45.4 (not measured here). The paper's figures are from GLUE's test server, tables 5 and 4.
"""

from gpt_jax.config import FinetuneConfig, TaskConfig


def config() -> FinetuneConfig:
    return FinetuneConfig(task=TaskConfig(name="cola"))
