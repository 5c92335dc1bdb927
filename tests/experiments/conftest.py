"""A fine-tuning config that takes two updates."""

import pytest


@pytest.fixture(scope="session")
def config_file(own_task, tmp_path_factory):
    """Path of a config file for a fine-tuning of two updates on a task of one's own."""
    file = tmp_path_factory.mktemp("config") / "own.py"
    file.write_text(
        "from gpt_jax.config import FinetuneConfig, FinetuneLoopConfig, PipelineConfig, TaskConfig\n"
        "def config():\n"
        "    return FinetuneConfig(\n"
        f"        task=TaskConfig(train={own_task['train']!r}, validation={own_task['validation']!r}, num_length_buckets=1),\n"
        "        train=FinetuneLoopConfig(batch_size=8, duration='2 steps', tensorboard=False),\n"
        "        data=PipelineConfig(pipeline='threads'),\n"  # does not import tensorflow, which takes seconds
        "    )\n"
    )
    return str(file)
