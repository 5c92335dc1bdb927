"""MultiNLI: does a sentence entail another, contradict it, or neither? Scored on genres that training has seen, and on others.

    gpt-jax finetune finetune/mnli --init.from RUN --task.path GLUE/MNLI --workdir OUT

Without --task.path the rows come from tensorflow-datasets (glue/mnli). 392,702 training rows. Takes multinli_1.0's .jsonl files
too, which have no test split. The settings are the paper's, defaults of gpt_jax/config.py; docs/paper.md ends with what differs
on purpose.

Time: not measured at the paper's size. Expect: not measured either; the paper has 82.1 accuracy on matched and 81.4 on mismatched
genres, from GLUE's test server, Table 2.
"""

from gpt_jax.config import FinetuneConfig, TaskConfig


def config() -> FinetuneConfig:
    return FinetuneConfig(task=TaskConfig(name="mnli"))
