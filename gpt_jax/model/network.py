"""The choice between the Transformer (section 4.1) and the LSTM of the ablation (section 5)."""

from types import ModuleType

from gpt_jax.config import ModelConfig
from gpt_jax.model import lstm, transformer


def network(config: ModelConfig) -> ModuleType:
    """Returns the module that implements the architecture of `config.kind`.

    Both modules provide `init`, `param_specs`, `apply`, `apply_cached`, `empty_cache` and `unstack_layers`, as specified by
    the docstrings of `transformer`.
    """
    return {"transformer": transformer, "lstm": lstm}[config.kind]
