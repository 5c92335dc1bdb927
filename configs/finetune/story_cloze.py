"""Story Cloze: which of two endings does a story of four sentences have?

    gpt-jax finetune finetune/story_cloze --init.from RUN --task.path FOLDER --workdir OUT

FOLDER has the two files of the 2016 release. Without --task.path the rows come from tensorflow-datasets (story_cloze/2016), which
needs the same files in its manual folder. 1,497 training rows: as in the released code, 374 of the validation file's 1,871 rows
are held out and the others trained on. The settings are the paper's, defaults of gpt_jax/config.py; docs/paper.md ends with what
differs on purpose.

Time: not measured at the paper's size. Expect: not measured either; the paper has 86.5 accuracy on the test split, Table 3.
"""

from gpt_jax.config import FinetuneConfig, TaskConfig


def config() -> FinetuneConfig:
    return FinetuneConfig(task=TaskConfig(name="story_cloze"))
