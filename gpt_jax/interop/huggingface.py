"""The Hugging Face format of a model: config.json, the weights of the classifier, and the model in transformers.

Three `openai-gpt` classes in transformers are used. `OpenAIGPTLMHeadModel` is the language model. `OpenAIGPTDoubleHeadsModel`
scores each choice of a question with a linear layer that has a bias, as we do. `OpenAIGPTForSequenceClassification` has a linear
layer without a bias, so `score_weight` folds our bias into its weights. Similarity tasks add the activations of both orders of a
pair, which none of these classes does. Because the layer is linear, adding the scores of both orders gives the same result, as
the model card explains.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt_jax.config import ModelConfig, RunConfig
from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.errors import UserError, shortened
from gpt_jax.interop import tokenizer_json
from gpt_jax.interop.parity import Computation
from gpt_jax.tasks.head import Head
from gpt_jax.tasks.registry import Task
from gpt_jax.tasks.transforms import SpecialTokens

MODEL_TYPE = "openai-gpt"
LANGUAGE_MODEL = "OpenAIGPTLMHeadModel"
CLASSIFIER = "OpenAIGPTForSequenceClassification"
DOUBLE_HEADS = "OpenAIGPTDoubleHeadsModel"
SPECIALS = tuple(f"<{name}>" for name in SpecialTokens._fields)
"""Names of the special tokens that fine-tuning adds."""
SCORE = "score.weight"
"""Name of the tensor with the weights of the classifier."""
LARGEST_ADDITION = 10.0
"""Largest number that folding the bias may add to a weight. Larger numbers would cause rounding errors of 1e-5 and more."""

LARGEST = 2**31 - 1
"""Largest plausible number in config.json."""

# Name, type and default value in config.json of each of our fields. A field without a default is required.
FIELDS: dict[str, tuple[str, Any, Any]] = {
    "vocab_size": ("vocab_size", int, None),
    "context_length": ("n_positions", int, None),
    "num_layers": ("n_layer", int, None),
    "embed_dim": ("n_embd", int, None),
    "num_heads": ("n_head", int, None),
    "embed_dropout": ("embd_pdrop", (int, float), 0.1),
    "attention_dropout": ("attn_pdrop", (int, float), 0.1),
    "residual_dropout": ("resid_pdrop", (int, float), 0.1),
    "layer_norm_epsilon": ("layer_norm_epsilon", (int, float), 1e-5),
    "init_stddev": ("initializer_range", (int, float), 0.02),
}


def architecture(head: Head | None) -> str:
    """Returns the name of the class in transformers for a model."""
    if head is None:
        return LANGUAGE_MODEL
    return DOUBLE_HEADS if head.choices else CLASSIFIER


def to_config_json(config: RunConfig, tokenizer: Tokenizer, task: Task | None, head: Head | None, dtype: str) -> dict[str, Any]:
    """Returns the contents of config.json."""
    values: dict[str, Any] = {
        "architectures": [architecture(head)],
        "model_type": MODEL_TYPE,
        **{name: getattr(config.model, field) for field, (name, _, _) in FIELDS.items()},
        "afn": "gelu",  # In transformers this is the tanh approximation.
        "tie_word_embeddings": True,
        "dtype": dtype,
        "eos_token_id": tokenizer.eos_id,
        # The Hugging Face classifier uses the last token with a different id, which is the extract token.
        "pad_token_id": tokenizer_json.pad_id(tokenizer),
    }
    if task is None or head is None:
        return values
    if not head.choices:
        id2label = {str(number): label for number, label in enumerate(task.labels)}
        return values | {"id2label": id2label, "label2id": {label: number for number, label in enumerate(task.labels)}}
    return values | {
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "summary_proj_to_labels": True,
        "summary_activation": None,
        "summary_first_dropout": head.dropout,
        "num_labels": 1,
    }


def from_config_json(values: Mapping[str, Any], path: Path) -> ModelConfig:
    """Returns the model that a config.json describes.

    Args:
      values: the contents of the file.
      path: the file, for messages.

    Raises:
      UserError: the model has another architecture, or a field is missing or has the wrong type.
    """
    kind = values.get("model_type")
    if kind != MODEL_TYPE:
        raise UserError(f"{path}: the model type is '{shortened(str(kind))}', but only GPT-1 ('{MODEL_TYPE}') can be imported")
    if values.get("afn", "gelu") not in ("gelu", "gelu_new"):
        raise UserError(f"{path}: the activation (afn) is '{shortened(str(values['afn']))}', but GPT-1 has gelu")
    if values.get("tie_word_embeddings") is False:
        raise UserError(
            f"{path}: the output layer has its own weights (tie_word_embeddings false), but GPT-1 uses its embeddings"
        )
    fields: dict[str, Any] = {}
    for field, (name, kind, default) in FIELDS.items():
        value = values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, kind):
            number = "a whole number" if kind is int else "a number"
            problem = "but is missing" if value is None else f"not {shortened(repr(value))}"
            raise UserError(f"{path}: {name} must be {number}, {problem}")
        if not abs(value) <= LARGEST:
            raise UserError(f"{path}: {name} must be a number of at most {LARGEST:,}, not {shortened(str(value))}")
        fields[field] = value
    try:
        return ModelConfig(**fields, mlp_dim=4 * fields["embed_dim"])
    except UserError as error:
        message = str(error)
        for field, (name, _, _) in FIELDS.items():
            message = re.sub(rf"(--)?model\.{field.replace('_', '-')}\b", name, message)
        raise UserError(f"{path}: {message}") from None


def score_weight(kernel: np.ndarray, bias: np.ndarray, gain: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Returns the weights, float32 [outputs, embed], of a linear layer without a bias that computes our classifier's scores.

    The input of the layer is the output of a layer norm, h = gain x + shift, where the numbers x add up to 0. Therefore, sum(h /
    gain) = sum(shift / gain) is the same for every input, and adding bias / sum(shift / gain) times 1 / gain to the weights adds
    the bias to the scores.

    Args:
      kernel, bias: our head, [embed, outputs] and [outputs].
      gain, shift: parameters of the last layer norm, [embed].

    Raises:
      UserError: the sum is so small that float32 cannot represent the new weights precisely enough, or a gain is 0.
    """
    kernel, bias, gain, shift = (array.astype(np.float64) for array in (kernel, bias, gain, shift))
    if not bias.any():
        return kernel.T.astype(np.float32)
    constant = (shift / gain).sum() if gain.all() else 0.0
    if abs(constant) * LARGEST_ADDITION < np.abs(bias).max() * np.abs(1 / np.where(gain, gain, 1)).max():
        raise UserError(
            "--format: the Hugging Face classifier has no bias, and this model's bias cannot be folded into its weights because "
            "the last layer norm shifts too little; use npz, stablehlo, onnx or savedmodel"
        )
    return (kernel + np.outer(1 / gain, bias) / constant).T.astype(np.float32)


# -- the model in transformers ----------------------------------------------------------------------------------------------


def installed_versions() -> str:
    """Returns the versions of transformers and torch, or "" if one of them is missing."""
    try:
        import torch
        import transformers
    except ModuleNotFoundError:
        return ""
    return f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}"


def load_model(folder: Path, class_name: str, head: Head | None = None) -> Computation:
    """Loads an exported folder into one of the classes in transformers.

    Returns:
      A function of tokens int [batch, time] that returns logits float32 [batch, time, vocab]. With a head, it is a function of
      tokens int [batch, sequences, time] and extract int [batch, sequences] that returns log-probabilities float32 [batch,
      outputs].
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()  # A classifier's folder has a layer that the language model does not use.
    model = getattr(transformers, class_name).from_pretrained(folder, dtype=torch.float32).eval()

    def compute(*inputs: np.ndarray) -> np.ndarray:
        tokens, *extract = (torch.from_numpy(array.astype(np.int64)) for array in inputs)
        with torch.inference_mode():
            if head is None:
                return model(tokens).logits.numpy()
            if head.choices:
                scores = model(tokens, mc_token_ids=extract[0]).mc_logits
            else:
                scores = model(tokens.flatten(0, 1)).logits.reshape(*tokens.shape[:2], -1).sum(1)
            return torch.log_softmax(scores, -1).numpy()

    return compute
