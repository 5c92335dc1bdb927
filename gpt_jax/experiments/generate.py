"""Text generation: continues prompts with a trained model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt_jax.model.decode import generate
from gpt_jax.train.restore import load_model


def continue_prompts(path: Path, prompts: Sequence[str], num_tokens: int, **settings: Any) -> list[str]:
    """Returns a continuation of each prompt by the model of a checkpoint.

    Args:
      path: folder of a run or of one checkpoint.
      prompts: texts of at least one token.
      num_tokens: maximum number of tokens appended to each prompt.
      settings: temperature, top_k, top_p and seed, as for `decode.generate`.

    Raises:
      UserError: there is no sound checkpoint, a prompt has no tokens, or a prompt and `num_tokens` do not fit the context.
    """
    restored = load_model(path)
    tokenizer = restored.tokenizer
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    drawn = generate(restored.config.model, restored.params, encoded, num_tokens, stop=tokenizer.eos_id, **settings)
    return [tokenizer.decode(tokens) for tokens in drawn]
