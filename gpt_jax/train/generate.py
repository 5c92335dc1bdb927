"""Text from a trained model: prompts in, continuations out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gpt_jax.config import ModelConfig
from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.model.decode import generate
from gpt_jax.model.transformer import Params
from gpt_jax.train.restore import load_model


def continue_prompts(
    path: Path,
    prompts: Sequence[str],
    num_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Returns a continuation of each prompt by the model of a checkpoint; the settings are those of `decode.generate`.

    Args:
      path: a run's folder, or one checkpoint's.

    Raises:
      UserError: there is no sound checkpoint, a prompt has no tokens, or a prompt and `num_tokens` do not fit the context.
    """
    restored = load_model(path)
    model, params, tokenizer = restored.config.model, restored.params, restored.tokenizer
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    drawn = generate(
        model, params, encoded, num_tokens, temperature=temperature, top_k=top_k, top_p=top_p, stop=tokenizer.eos_id, seed=seed
    )
    return [tokenizer.decode(tokens) for tokens in drawn]


def sample_texts(
    model: ModelConfig, params: Params, tokenizer: Tokenizer, prompts: Sequence[str], num_tokens: int, seed: int
) -> list[str]:
    """Returns continuations of prompts to follow a training by, each token drawn from the forty likeliest.

    They are as long as the context allows; where it allows none they are empty. An empty prompt starts a new document.
    """
    encoded = [tokenizer.encode(prompt) or [tokenizer.eos_id] for prompt in prompts]
    count = min(num_tokens, model.context_length - max(map(len, encoded)))
    if count < 1:
        return ["" for _ in prompts]
    drawn = generate(model, params, encoded, count, top_k=40, stop=tokenizer.eos_id, seed=seed)
    return [tokenizer.decode(tokens) for tokens in drawn]
