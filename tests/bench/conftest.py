"""Settings that every benchmark's programs share."""

import pytest

from gpt_jax.config import PretrainConfig
from tests.tiny import tiny_config


@pytest.fixture
def tiny(tmp_path) -> PretrainConfig:
    """A config with a model that compiles in seconds."""
    return tiny_config(tmp_path)
