"""SNLI: does a caption entail another, contradict it, or neither?

    gpt-jax finetune finetune/snli --init.from RUN --task.path FOLDER/snli_1.0 --workdir OUT

Without --task.path the rows come from tensorflow-datasets (snli). 549,367 training rows of 550,152; for the others the annotators
found no label. The settings are the paper's, defaults of gpt_jax/config.py; docs/paper.md ends with what differs on purpose.

Time: not measured at the paper's size. Expect: not measured either; the paper has 89.9 accuracy on the test split, Table 2.
"""

from gpt_jax.config import FinetuneConfig, TaskConfig


def config() -> FinetuneConfig:
    return FinetuneConfig(task=TaskConfig(name="snli"))
