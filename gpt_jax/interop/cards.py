"""What the folder of an export says about itself: README.md, the model card, and labels.json, the meaning of the outputs.

Every card shows how to use its folder, in code that runs in the folder. labels.json is the only place where all formats name
labels:

    task, kind      the task's title and its kind, as in `--task.kind`
    id2label        the label of each output, by its number; of multiple choice, the names of the answers
    score_range     the lowest and the highest score of a regression, whose outputs are the whole numbers in this range; or null
    special_tokens  the ids of the special tokens that fine-tuning added
"""

import json
from collections.abc import Sequence
from typing import Any

from gpt_jax.config import RunConfig
from gpt_jax.config.load import config_to_dict
from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.interop import huggingface, tokenizer_json
from gpt_jax.interop.parity import ExportedFunction, Shape
from gpt_jax.interop.stablehlo import PLATFORMS
from gpt_jax.tasks.head import Head
from gpt_jax.tasks.registry import Task
from gpt_jax.tasks.transforms import special_tokens
from gpt_jax.train.checkpoint import CheckpointInfo, read_manifest

LABELS = "labels.json"


def labels_json(task: Task, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the contents of labels.json."""
    values = task.output_values
    return {
        "task": task.title,
        "kind": task.kind,
        "id2label": {str(number): label for number, label in enumerate(task.labels)},
        "score_range": [float(values.min()), float(values.max())] if task.regression else None,
        "special_tokens": special_tokens(tokenizer)._asdict(),
    }


def card(
    format_: str,
    info: CheckpointInfo,
    config: RunConfig,
    tokenizer: Tokenizer,
    task: Task | None,
    function: ExportedFunction,
    dtype: str,
) -> str:
    """Returns the contents of README.md."""
    model = config.model
    scores = [f"- {name}: {value:.4f}" for name, value in info.metrics.items()] or ["No scores were measured."]
    manifest = read_manifest(info)
    names = ("step", "config_digest", "config_digest_version", "data_digest")
    origin = [f"- {name}: {manifest[name]}" for name in names if manifest.get(name, "") != ""]
    size = f"{model.num_layers} layers" if model.kind == "transformer" else "one layer"
    heads = f" with {model.num_heads} heads" if model.kind == "transformer" else f" with an LSTM of {model.lstm_units} units"
    paragraphs = [
        *(["---\nlibrary_name: transformers\n---"] if format_ == "huggingface" else []),
        f"# GPT-1, fine-tuned on {task.title}" if task else "# GPT-1, language model",
        f"Trained with gpt_jax and exported as {format_} in {dtype}. The model has {size} of width {model.embed_dim}{heads}, "
        f"{model.vocab_size:,} tokens and a context of {model.context_length}. Architecture and training follow "
        '"Improving Language Understanding by Generative Pre-Training" (2018).',
        "## Use",
        *(_use_huggingface(task, function.head) if format_ == "huggingface" else _use(format_, tokenizer, task, function)),
        "## Scores",
        "\n".join(scores),
        "## Origin",
        "\n".join(origin),
        "parity.json contains the results of comparing this export with the original model.",
        "## Configuration",
        f"```json\n{json.dumps(config_to_dict(config), indent=1)}\n```",
    ]
    if format_ == "huggingface":
        differences = "\n".join(f"- {sentence}" for sentence in tokenizer_json.differences(tokenizer))
        paragraphs[-2:-2] = ["## Tokenizer", differences]
    return "\n\n".join(paragraphs) + "\n"


def _code(*lines: str) -> str:
    return "\n".join(("```python", *lines, "```"))


def _label_lines(task: Task, log_probabilities: str, id2label: str) -> list[str]:
    """Returns code that prints the prediction for each example, given expressions for two of its parts."""
    if task.regression:
        scores = f"[float({id2label}[i]) for i in {id2label}]"
        return [f"print(np.exp({log_probabilities}) @ {scores})  # the expected scores"]
    return [f"print([{id2label}[str(i)] for i in {log_probabilities}.argmax(-1)])"]


# -- tensors and graphs -----------------------------------------------------------------------------------------------------

FILES = {
    "npz": "params.npz has the parameters by the paper's names: W_e and W_p are the embeddings of tokens and positions, and "
    "h0/attn/... the blocks{head}.",
    "openai": "params_0.npy to params_9.npy are one array of all parameters, cut into ten, as in openai/finetune-transformer-lm, "
    "and params_shapes.json has their shapes.",
    "stablehlo": "model.stablehlo is a serialized `jax.export.Exported` for {platforms}. model.safetensors has its parameters, "
    "and signature.json the types, shapes and order of all inputs.",
    "savedmodel": "This folder is a TensorFlow SavedModel with the signature `serving_default`.",
    "onnx": "model.onnx is the graph with its weights (large weights are in model.onnx.data).",
}

IMPORTS = {
    "stablehlo": ("import jax", "import numpy as np", "from safetensors.numpy import load_file"),
    "savedmodel": ("import numpy as np", "import tensorflow as tf"),
    "onnx": ("import numpy as np", "import onnxruntime"),
}
RANGE = {
    "stablehlo": "An id or a position that is out of range makes all outputs of its example NaN.",
    "savedmodel": "An id or a position that is out of range makes all outputs of its example NaN.",
    "onnx": "ONNX Runtime refuses a batch with an id or a position that is out of range, negative ones included.",
}
TYPE = {
    "stablehlo": "JAX converts arrays of int64 to int32, and refuses other types.",
    "savedmodel": "The signature refuses tensors of other types, such as int64; convert them with `tf.cast(ids, tf.int32)`.",
    "onnx": "ONNX Runtime refuses arrays of other types, such as int64; convert them with `ids.astype(np.int32)`.",
}
SEQUENCES = {
    "classification": "[start, *first, extract]",
    "entailment": "[start, *first, delimiter, *second, extract]",
    "similarity": "[start, *first, delimiter, *second, extract], [start, *second, delimiter, *first, extract]",
}
EXPLANATIONS = {
    "classification": "An example is one sequence: the text between the start token and the extract token.",
    "entailment": "An example is one sequence: the premise, the delimiter and the hypothesis, between start and extract.",
    "similarity": "An example is two sequences: both orders of the texts, with the delimiter between them.",
    "multiple_choice": "An example is one sequence for each answer: the context, the delimiter and the answer, between start and "
    "extract.",
}


def _use(format_: str, tokenizer: Tokenizer, task: Task | None, function: ExportedFunction) -> list[str]:
    """Returns the paragraphs on the files, the inputs and the outputs of a format other than Hugging Face's."""
    head = ", and column i of W_y with entry i of b_y belongs to label i of labels.json" if task else ""
    if function.head is not None and function.head.choices:
        head = ", and W_y with b_y gives the score of an answer"
    files = FILES[format_].format(head=head, platforms=" and ".join(PLATFORMS))
    ids = "The tokenizer that makes ids from text is in gpt_jax/tokenizer; `gpt_jax.data.tokenizers.load_tokenizer` reads it." + (
        f" {LABELS} names the outputs and the ids of the special tokens." if task else ""
    )
    if format_ not in IMPORTS:
        code = (
            [_code("import numpy as np", 'params = np.load("params.npz")', 'print(params["W_e"].shape)')]
            if format_ == "npz"
            else []
        )
        return [files, *code, "`gpt-jax import FOLDER --workdir RUN` restores the run's checkpoint.", ids]
    standard = [*(["import json"] if task else []), *(["from pathlib import Path", ""] if task or format_ == "stablehlo" else [])]
    example = _example_lines(task, tokenizer) if task else _text_lines()
    lines = [*standard, *IMPORTS[format_], "", *example, "", *_call(format_, function)]
    if task:
        lines.append(f'id2label = json.loads(Path("{LABELS}").read_text())["id2label"]')
        lines += _label_lines(task, "log_probabilities", "id2label")
    return [files, _code(*lines), _signature(function), _rules(format_, function, task), ids]


def _text_lines() -> list[str]:
    return [
        "texts = [[5, 9, 2], [7]]  # ids",
        "tokens = np.zeros((len(texts), max(map(len, texts))), np.int32)",
        "for row, text in enumerate(texts):",
        "    tokens[row, : len(text)] = text  # What is behind a text has no effect on it.",
    ]


def _example_lines(task: Task, tokenizer: Tokenizer) -> list[str]:
    """Returns code that makes the inputs of a fine-tuned model for one example."""
    answers = [f"[start, *first, delimiter, *answer, extract] for answer in ({', '.join(['second'] * len(task.labels))})"]
    sequences = SEQUENCES.get(task.kind) or answers[0]
    return [
        f"start, delimiter, extract = {', '.join(map(str, special_tokens(tokenizer)))}",
        "first, second = [5, 9, 2], [7]  # ids of texts",
        f"sequences = [{sequences}]",
        "tokens = np.zeros((1, len(sequences), max(map(len, sequences))), np.int32)",
        "for row, sequence in enumerate(sequences):",
        "    tokens[0, row, : len(sequence)] = sequence",
        "positions = np.array([[len(sequence) - 1 for sequence in sequences]], np.int32)  # of the extract tokens",
    ]


def _call(format_: str, function: ExportedFunction) -> list[str]:
    """Returns code that loads a graph and calls it with the arrays `tokens` and, for a fine-tuned model, `positions`."""
    output, _ = function.output
    variables = dict(zip(function.inputs, ("tokens", "positions"), strict=False))
    if format_ == "onnx":
        inputs = ", ".join(f'"{name}": {variable}' for name, variable in variables.items())
        return ['session = onnxruntime.InferenceSession("model.onnx")', f'({output},) = session.run(["{output}"], {{{inputs}}})']
    if format_ == "savedmodel":
        inputs = ", ".join(f"{name}=tf.constant({variable})" for name, variable in variables.items())
        return [
            'serve = tf.saved_model.load(".").signatures["serving_default"]',
            f'{output} = serve({inputs})["{output}"].numpy()',
        ]
    return [
        'graph = jax.export.deserialize(bytearray(Path("model.stablehlo").read_bytes()))',
        'parameters = load_file("model.safetensors")',
        f"{output} = np.asarray(graph.call(parameters, {', '.join(variables.values())}))",
    ]


def _signature(function: ExportedFunction) -> str:
    """Returns a table of the inputs and the output."""

    def row(role: str, name: str, dtype: str, shape: Shape) -> str:
        return f"| {role} | `{name}` | {dtype} | [{', '.join(map(str, shape))}] |"

    rows = [row("input", name, "int32", shape) for name, shape in function.inputs.items()]
    name, shape = function.output
    return "\n".join(("| | name | type | shape |", "|---|---|---|---|", *rows, row("output", name, "float32", shape)))


def _rules(format_: str, function: ExportedFunction, task: Task | None) -> str:
    """Returns a list of what the inputs may be and what the outputs mean."""
    model = function.model
    limit = f" Time is at most {model.context_length}." if function.limits else ""
    rules = [f"Batch and time may have any size from 1 on.{limit}", f"Inputs are int32. {TYPE[format_]}"]
    positions = "" if task is None else " Positions are those of the extract tokens, in [0, time)."
    rules.append(f"Ids are in [0, {model.vocab_size}).{positions} {RANGE[format_]}")
    if task is None:
        rules.append("`logits` are the scores of the next token, before the softmax.")
    else:
        rules.append(f"{EXPLANATIONS[task.kind]} Shorter sequences are followed by any id, such as 0.")
        rules.append(f"Output i is the logarithm of the probability of label i in {LABELS}.")
    if task is not None and task.regression:
        rules.append("The labels are the whole numbers in the range of the scores. The predicted score is their expectation.")
    return "\n".join(f"- {rule}" for rule in rules)


# -- Hugging Face -----------------------------------------------------------------------------------------------------------


def _use_huggingface(task: Task | None, head: Head | None) -> list[str]:
    """Returns the paragraphs on a Hugging Face folder, with code for batches of texts."""
    name = huggingface.architecture(head)
    begin = [
        "import torch",
        f"from transformers import AutoTokenizer, {name}",
        "",
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        f'model = {name}.from_pretrained(".").eval()',
    ]
    if task is None:
        return [_code(*begin, *GENERATE), GENERATE_TEXT, _code(*begin, *LOGITS), LOGITS_TEXT]
    if head is not None and head.choices:
        answers = ", ".join(f'"answer {label}"' for label in task.labels)
        return [_code(*begin, f"answers = [{answers}]", *CHOICES, *_huggingface_labels(task)), CHOICES_TEXT]
    call = {
        "classification": [
            'batch = tokenizer(["A text.", "Another, longer text."], **padding)',
            "scores = model(**batch).logits",
        ],
        "entailment": [
            'batch = tokenizer(["A premise.", "A long premise."], ["A hypothesis.", "Another one."], **padding)',
            "scores = model(**batch).logits",
        ],
        "similarity": [
            'one, other = ["A text.", "A long text."], ["The other text.", "Another one."]',
            "scores = model(**tokenizer(one, other, **padding)).logits + model(**tokenizer(other, one, **padding)).logits",
        ],
    }[task.kind]
    padding = 'padding = {"padding": True, "truncation": True, "return_tensors": "pt"}'
    inside = [f"    {line}" for line in call]
    lines = [*begin, padding, "with torch.inference_mode():", *inside, *_huggingface_labels(task)]
    pair = " Each of the two scores includes half of the classifier's bias." if task.kind == "similarity" else ""
    return [_code(*lines), CLASSIFIER_TEXT + pair]


def _huggingface_labels(task: Task) -> Sequence[str]:
    """Returns code that prints the predictions for `scores`."""
    if task.regression:
        return (
            f"values = torch.tensor([{', '.join(str(float(value)) for value in task.output_values)}])",
            "print(scores.softmax(-1) @ values)",
        )
    labels = "answers" if task.kind == "multiple_choice" else "model.config.id2label"
    return (f"print([{labels}[i] for i in scores.argmax(-1).tolist()])",)


GENERATE = (
    'batch = tokenizer(["The", "It was a"], padding=True, return_tensors="pt")',
    "with torch.inference_mode():",
    "    tokens = model.generate(**batch, max_new_tokens=5, do_sample=True)",
    "print(tokenizer.batch_decode(tokens, skip_special_tokens=True))",
)
GENERATE_TEXT = (
    "The tokenizer pads on the left, so that each text ends where its continuation begins. `generate` takes this into account in "
    "transformers 5.24, but not in 5.0; with an old version, give it texts of equal length. The longest text and the new tokens "
    "must fit into the context."
)
LOGITS = (
    'batch = tokenizer(["The", "It was a"], padding=True, padding_side="right", return_tensors="pt")',
    "with torch.inference_mode():",
    "    logits = model(**batch).logits",
    "print(logits[batch.attention_mask.bool()].shape)",
)
LOGITS_TEXT = (
    "To compute the logits of several texts, pad on the right: the model counts positions from the start of a row, and does not "
    "correct them for padding on the left. Padding on the right has no effect on the logits of a text."
)
CHOICES = (
    'contexts = len(answers) * ["A context."]',
    'batch = tokenizer(contexts, answers, padding=True, truncation="only_first", return_tensors="pt")',
    "ends = batch.attention_mask.sum(-1) - 1  # the positions of the extract tokens",
    "with torch.inference_mode():",
    "    scores = model(batch.input_ids[None], attention_mask=batch.attention_mask, mc_token_ids=ends[None]).mc_logits",
)
CHOICES_TEXT = (
    "The input is one sequence for each answer. tokenizer.json adds the special tokens and pads on the right. `mc_logits` are "
    "the scores of the answers."
)
CLASSIFIER_TEXT = (
    "tokenizer.json adds the special tokens and pads on the right. The scores are read at the last token that is not padding, "
    "<extract>. `model.config.id2label` names them."
)
