"""The Hugging Face side of a model: config.json, the head in the form of their classes, the model card, and their model itself.

Their `openai-gpt` has three classes that matter. `OpenAIGPTLMHeadModel` is the language model. `OpenAIGPTDoubleHeadsModel` scores
each choice of a question by a linear layer with bias, as we do. `OpenAIGPTForSequenceClassification` has a linear layer without
bias, into which `score_weight` puts ours. A similarity task adds the activations of both orders of a pair, which none of their
classes does; as the layer is linear, adding the two orders' scores comes to the same, and the card says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt_jax.config import ModelConfig, RunConfig
from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.errors import UserError
from gpt_jax.interop import tokenizer_json
from gpt_jax.tasks.head import Head
from gpt_jax.tasks.registry import Task
from gpt_jax.tasks.transforms import Specials

MODEL_TYPE = "openai-gpt"
LANGUAGE_MODEL, CLASSIFIER, DOUBLE_HEADS = (
    "OpenAIGPTLMHeadModel",
    "OpenAIGPTForSequenceClassification",
    "OpenAIGPTDoubleHeadsModel",
)
SPECIALS = tuple(f"<{name}>" for name in Specials._fields)
SCORE = "score.weight"
LARGEST_ADDITION = 10.0
"""What the bias may add to a classifier's weight at most: beyond, rounding would show at 1e-5 and more."""
PAD = 0
"""Their classifier reads the last token that is not this one, which the extract token never is."""


# Ours, theirs, what it must be, and what theirs defaults to.
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
    """Which of their classes a model is."""
    if head is None:
        return LANGUAGE_MODEL
    return DOUBLE_HEADS if head.choices else CLASSIFIER


def model_config(config: RunConfig, tokenizer: Tokenizer, task: Task | None, head: Head | None, dtype: str) -> dict[str, Any]:
    """The contents of config.json."""
    model = config.model
    assert isinstance(model, ModelConfig)
    values: dict[str, Any] = {
        "architectures": [architecture(head)],
        "model_type": MODEL_TYPE,
        "vocab_size": model.vocab_size,
        "n_positions": model.context_length,
        "n_embd": model.embed_dim,
        "n_layer": model.num_layers,
        "n_head": model.num_heads,
        "afn": "gelu",  # which there means the tanh approximation
        "embd_pdrop": model.embed_dropout,
        "attn_pdrop": model.attention_dropout,
        "resid_pdrop": model.residual_dropout,
        "layer_norm_epsilon": model.layer_norm_epsilon,
        "initializer_range": model.init_stddev,
        "tie_word_embeddings": True,
        "dtype": dtype,
        "eos_token_id": tokenizer.eos_id,
    }
    if task is not None and head is not None:
        values["pad_token_id"] = PAD
        if head.choices:
            values |= {
                "summary_type": "cls_index",
                "summary_use_proj": True,
                "summary_proj_to_labels": True,
                "summary_activation": None,
                "summary_first_dropout": head.dropout,
                "num_labels": 1,
            }
        else:
            values["id2label"] = {str(number): label for number, label in enumerate(task.labels)}
            values["label2id"] = {label: number for number, label in enumerate(task.labels)}
    return values


def model_of(values: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that a config.json describes.

    Raises:
      UserError: it is of another architecture, or lacks a field.
    """
    kind = values.get("model_type")
    if kind != MODEL_TYPE:
        raise UserError(f"{where}: describes a model of the type '{kind}', and only {MODEL_TYPE} is GPT-1; no other is imported")
    if values.get("afn", "gelu") not in ("gelu", "gelu_new"):
        raise UserError(f"{where}: has the activation '{values['afn']}', and GPT-1 has gelu")
    if values.get("tie_word_embeddings") is False:
        raise UserError(f"{where}: has an output layer of its own (tie_word_embeddings false), and GPT-1's is its embeddings")
    found: dict[str, Any] = {}
    for ours, (theirs, kind, default) in FIELDS.items():
        value = values.get(theirs, default)
        if isinstance(value, bool) or not isinstance(value, kind):
            what = "a whole number" if kind is int else "a number"
            raise UserError(f"{where}: {theirs} must be {what}, " + ("and is missing" if value is None else f"not {value!r}"))
        found[ours] = value
    return ModelConfig(**found, mlp_dim=4 * found["embed_dim"])


def score_weight(kernel: np.ndarray, bias: np.ndarray, gain: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Our classifier as a linear layer without bias, exactly, float32 [outputs, embed].

    Its input is a layer norm's output h = gain x + shift with numbers x that add up to 0. So sum(h / gain) = sum(shift / gain) is
    the same for every input, and adding bias / sum(shift / gain) times 1 / gain to the weights adds the bias to the scores.

    Args:
      kernel, bias: our head, [embed, outputs] and [outputs].
      gain, shift: of the last layer norm, [embed].

    Raises:
      UserError: that sum is so small that float32 could not hold what is added to the weights, or a gain is 0.
    """
    kernel, bias, gain, shift = (array.astype(np.float64) for array in (kernel, bias, gain, shift))
    if not bias.any():
        return kernel.T.astype(np.float32)
    constant = (shift / gain).sum() if gain.all() else 0.0
    if abs(constant) * LARGEST_ADDITION < np.abs(bias).max() * np.abs(1 / np.where(gain, gain, 1)).max():
        raise UserError(
            "--format: their classifier has no bias, and this model's cannot be put into its weights, as its last layer norm "
            "shifts too little; npz and the graphs take it"
        )
    return (kernel + np.outer(1 / gain, bias) / constant).T.astype(np.float32)


# -- the card ---------------------------------------------------------------------------------------------------------------


def card(config: RunConfig, tokenizer: Tokenizer, facts: Mapping[str, Any], task: Task | None, head: Head | None) -> str:
    """README.md of an exported folder.

    Args:
      facts: what is known of the checkpoint: "step", "data_digest", "config_digest", "scores" {name: number}, "dtype".
    """
    model = config.model
    assert isinstance(model, ModelConfig)
    what = f"fine-tuned on {task.title}" if task else "language model"
    lines = [
        "---",
        "library_name: transformers",
        "---",
        "",
        f"# GPT-1, {what}",
        "",
        f"Trained with gpt_jax and exported in {facts['dtype']}. {model.num_layers} layers of width {model.embed_dim} with "
        f"{model.num_heads} heads, {model.vocab_size:,} tokens, context {model.context_length}. Architecture and training follow "
        '"Improving Language Understanding by Generative Pre-Training" (2018).',
        "",
        "    " + _usage(head),
        "",
    ]
    if head is not None:
        lines += [_inputs(task, head), ""]
    lines += ["## Scores", ""]
    scores = facts["scores"]
    lines += [f"- {name}: {value:.4f}" for name, value in scores.items()] or ["None was measured."]
    lines += ["", "## Where it comes from", ""]
    lines += [f"- {name}: {facts[name]}" for name in ("step", "config_digest", "data_digest") if facts[name] != ""]
    lines += ["", "parity.json says how closely this folder was checked against the original.", ""]
    lines += ["## Tokenizer", ""]
    lines += [f"- {line}" for line in tokenizer_json.differences(tokenizer)] or [
        "tokenizer.json gives the ids that the model was trained with."
    ]
    lines += ["", "## Configuration", "", "```json", json.dumps(facts["config"], indent=1), "```", ""]
    return "\n".join(lines)


def _usage(head: Head | None) -> str:
    if head is None:
        return "model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER)"
    if head.choices:
        return "model = transformers.OpenAIGPTDoubleHeadsModel.from_pretrained(FOLDER)"
    return "model = transformers.AutoModelForSequenceClassification.from_pretrained(FOLDER)"


def _inputs(task: Task | None, head: Head) -> str:
    kind = task.kind if task else "classification"
    if kind == "similarity":
        return (
            "A pair is scored in both orders: tokenize (a, b) and (b, a), and add the two outputs' scores before the softmax; "
            "each holds half of the classifier's bias. tokenizer.json puts the special tokens where they belong."
        )
    if head.choices:
        return (
            "Tokenize (context, answer) for each answer and give `mc_token_ids` the position of each <extract>; `mc_logits` are "
            "the choices' scores. tokenizer.json puts the special tokens where they belong."
        )
    return (
        "tokenizer.json puts the special tokens where they belong, around one text or between two; scores are read at <extract>."
    )


# -- their model ------------------------------------------------------------------------------------------------------------


def installed() -> str:
    """The versions of transformers and torch, or "" where one is missing."""
    try:
        import torch
        import transformers
    except ModuleNotFoundError:
        return ""
    return f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}"


def load_language_model(folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Their language model: tokens int [batch, time] -> logits float32 [batch, time, vocab]."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()  # a classifier's folder has a layer that the language model has no use for
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def logits(tokens: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()

    return logits


def load_classifier(folder: Path, head: Head) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Their classifier: tokens int [batch, sequences, time], extract int [batch, sequences] -> log-probabilities float32
    [batch, outputs]."""
    import torch
    import transformers

    kind = transformers.OpenAIGPTDoubleHeadsModel if head.choices else transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()

    def log_probabilities(tokens: np.ndarray, extract: np.ndarray) -> np.ndarray:
        ids, last = torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(extract.astype(np.int64))
        with torch.inference_mode():
            if head.choices:
                scores = model(ids, mc_token_ids=last).mc_logits
            else:
                scores = model(ids.flatten(0, 1)).logits.reshape(*tokens.shape[:2], -1).sum(1)
            return torch.log_softmax(scores, -1).numpy()

    return log_probabilities
