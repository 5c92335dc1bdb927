"""gpt_jax: pre-train, fine-tune, evaluate and export GPT-1 in JAX, from a laptop's CPU to TPU pods."""

__version__ = "0.1.0"
