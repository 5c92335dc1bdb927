"""Text generation: continues prompts with a trained model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt_jax.data.tokenizers import Bytes
from gpt_jax.model.decode import generate
from gpt_jax.runtime.console import Log, say
from gpt_jax.tasks.evaluate import best_checkpoint
from gpt_jax.train.restore import load_model


def continue_prompts(path: Path, prompts: Sequence[str], num_tokens: int, log: Log = say, **settings: Any) -> list[str]:
    """Returns a continuation of each prompt by the model of a checkpoint.

    Args:
      path: folder of a run, or of one checkpoint; for a fine-tuning run, its best checkpoint is used.
      prompts: texts to continue. A prompt without tokens, such as "", starts a new document.
      num_tokens: maximum number of tokens appended to each prompt.
      log: receives a line for each prompt with characters that the vocabulary cannot represent.
      settings: temperature, top_k, top_p and seed, as for `decode.generate`.

    Raises:
      UserError: there is no sound checkpoint, a prompt and `num_tokens` exceed the context, or a setting is out of range.
    """
    restored = load_model(best_checkpoint(path))
    tokenizer = restored.tokenizer
    encoded = [tokenizer.encode(prompt) or [tokenizer.eos_id] for prompt in prompts]
    for prompt, tokens in zip(prompts, encoded, strict=True):
        unknown = 0 if isinstance(tokenizer, Bytes) else tokens.count(0)  # In the other vocabularies, 0 is the unknown entry.
        if unknown:
            log(f"warning: {unknown} of the {len(tokens)} tokens of the prompt {prompt!r} are not in the vocabulary")
    drawn = generate(restored.config.model, restored.params, encoded, num_tokens, stop=tokenizer.eos_id, **settings)
    return [tokenizer.decode(tokens) for tokens in drawn]
