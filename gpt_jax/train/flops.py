"""The number of floating-point operations that training takes, by the usual convention. This module does not depend on JAX."""

from gpt_jax.config import ModelConfig


def flops_per_token(model: ModelConfig) -> int:
    """Returns the number of floating-point operations that training on one token takes.

    This is 6 per parameter in a matrix product (the embedding counts once, as the output layer), plus 12 x layers x width x
    context for attention. As is customary, the causal mask is ignored.
    """
    embed, units = model.embed_dim, model.lstm_units
    if model.kind == "lstm":
        return 6 * (4 * units * (embed + units) + units * embed + model.vocab_size * embed)
    block = 4 * embed**2 + 2 * embed * model.mlp_dim
    return 6 * (model.num_layers * block + model.vocab_size * embed) + 12 * model.num_layers * embed * model.context_length
