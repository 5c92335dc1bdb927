"""Descriptions in the folder of an export: README.md, the model card, and labels.json, the meaning of the outputs.

labels.json has the same fields in every format:

    task, kind      the task's title and its kind, as in `--task.kind`
    id2label        the label of each output by its number; for multiple choice, the names of the answers
    score_range     the lowest and the highest score of a regression, whose outputs are the whole numbers in this range; or null
    special_tokens  the ids of the special tokens that fine-tuning added
"""

import json
from typing import Any

from gpt_jax.config import RunConfig
from gpt_jax.config.load import config_to_dict
from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.interop import tokenizer_json
from gpt_jax.interop.parity import ExportedFunction
from gpt_jax.interop.usage import usage
from gpt_jax.tasks.registry import Task
from gpt_jax.tasks.transforms import special_tokens
from gpt_jax.train.checkpoint_info import CheckpointInfo, read_manifest


def labels_json(task: Task, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the contents of labels.json."""
    values = task.output_values.tolist()
    return {
        "task": task.title,
        "kind": task.kind,
        "id2label": {str(number): label for number, label in enumerate(task.labels)},
        "score_range": [min(values), max(values)] if task.regression else None,
        "special_tokens": special_tokens(tokenizer)._asdict(),
    }


def card(
    format_: str,
    dtype: str,
    info: CheckpointInfo,
    config: RunConfig,
    tokenizer: Tokenizer,
    task: Task | None,
    function: ExportedFunction,
) -> str:
    """Returns the contents of README.md."""
    model = config.model
    layers = f"{model.num_layers} layers with {model.num_heads} heads"
    scores = [f"- {name}: {value:.4f}" for name, value in info.metrics.items()] or ["No scores were measured."]
    manifest = read_manifest(info)
    names = ("step", "config_digest", "config_digest_version", "data_digest")
    origin = [f"- {name}: {manifest[name]}" for name in names if manifest.get(name, "") != ""]
    paragraphs = [
        *(["---\nlibrary_name: transformers\n---"] if format_ == "huggingface" else []),
        f"# GPT-1, fine-tuned on {task.title}" if task else "# GPT-1 language model",
        f"Trained with gpt_jax and exported as {format_} in {dtype}. The model has "
        f"{layers if model.kind == 'transformer' else f'an LSTM of {model.lstm_units} units'}, width {model.embed_dim}, "
        f"a vocabulary of {model.vocab_size:,} and a context of {model.context_length}. Architecture and training follow "
        '"Improving Language Understanding by Generative Pre-Training" (2018).',
        "## Use",
        usage(format_, tokenizer, task, function).rstrip(),
        "## Scores",
        "\n".join(scores),
        "## Origin",
        "\n".join(origin),
        "parity.json contains the results of comparing this export with the original model.",
        "## Configuration",
        f"```json\n{json.dumps(config_to_dict(config), indent=1)}\n```",
    ]
    if format_ == "huggingface":
        paragraphs[-2:-2] = ["## Tokenizer", "\n".join(f"- {sentence}" for sentence in tokenizer_json.differences(tokenizer))]
    return "\n\n".join(paragraphs) + "\n"
