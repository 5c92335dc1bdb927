"""The text, the token store and the config of the tiny run that the training tests use."""

import functools

import pytest

from gpt_jax.data.prepare import prepare
from tests.tiny import replace_fields, tiny_config, write_config, write_text


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A function that changes fields of the tiny config, whose token store is ready (see `replace_fields`)."""
    folder = tmp_path_factory.mktemp("text")
    config = tiny_config(write_text(folder), data={"store": str(folder / "store")})
    prepare(config, folder / "store", lambda line: None)
    return functools.partial(replace_fields, config)


@pytest.fixture(scope="session")
def config_file(tiny, tmp_path_factory):
    """The path of a file with the tiny config."""
    return write_config(tiny(), tmp_path_factory.mktemp("config") / "tiny.py")
