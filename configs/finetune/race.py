"""RACE: which of four answers is right about a passage? Questions from middle and from high schools.

    gpt-jax finetune finetune/race --init.from RUN --task.path FOLDER/RACE --workdir OUT

Without --task.path the rows come from tensorflow-datasets (race). 87,866 training rows. The settings are the paper's, defaults of
gpt_jax/config.py; docs/paper.md ends with what differs on purpose.

Time: not measured at the paper's size. Expect: not measured either; the paper has 59.0 accuracy on the test split, 62.9 on its
middle-school and 57.4 on its high-school part, Table 3.
"""

from gpt_jax.config import FinetuneConfig, TaskConfig


def config() -> FinetuneConfig:
    return FinetuneConfig(task=TaskConfig(name="race"))
