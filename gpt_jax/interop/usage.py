"""How the folder of an export is used: Markdown for its card, with code that runs in the folder."""

from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.interop import huggingface
from gpt_jax.interop.parity import ExportedFunction
from gpt_jax.interop.stablehlo import PLATFORMS
from gpt_jax.tasks.head import Head
from gpt_jax.tasks.registry import Task
from gpt_jax.tasks.transforms import special_tokens

LABELS = "labels.json"


def usage(format_: str, tokenizer: Tokenizer, task: Task | None, function: ExportedFunction) -> str:
    """Returns the section "Use" of a card."""
    if format_ == "huggingface":
        return _huggingface(task, function.head)
    if format_ in GRAPHS:
        return _graph(format_, tokenizer, task, function)
    text = FILES[format_]
    if task is not None:
        choices = function.head is not None and function.head.choices
        text += SCORE_OF_ANSWER if choices else SCORES_OF_LABELS
    return f"{text}\n\n`gpt-jax import FOLDER --workdir RUN` restores the run's checkpoint. {_about_ids(task)}\n"


def _about_ids(task: Task | None) -> str:
    text = "gpt_jax/tokenizer contains the tokenizer; `gpt_jax.data.tokenizers.load_tokenizer` reads it."
    return text + (f" {LABELS} names the outputs and has the ids of the special tokens." if task else "")


# -- files of tensors -------------------------------------------------------------------------------------------------------

FILES = {
    "npz": """params.npz contains the parameters under the paper's names: W_e and W_p are the embeddings, h0/... the blocks.

```python
import numpy as np

params = np.load("params.npz")
print(params["W_e"].shape)
```
""",
    "openai": "params_0.npy to params_9.npy are one array of all parameters, cut into ten parts, and params_shapes.json has "
    "their shapes, as in openai/finetune-transformer-lm.",
}
SCORES_OF_LABELS = f"\nColumn i of W_y and entry i of b_y give the score of label i in {LABELS}."
SCORE_OF_ANSWER = "\nW_y and b_y give the score of one answer."

# -- graphs -----------------------------------------------------------------------------------------------------------------

GRAPHS = {
    "stablehlo": """from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file

{inputs}

graph = jax.export.deserialize(bytearray(Path("model.stablehlo").read_bytes()))
{output} = np.asarray(graph.call(load_file("model.safetensors"), *inputs.values()))""",
    "savedmodel": """import numpy as np
import tensorflow as tf

{inputs}

serve = tf.saved_model.load(".").signatures["serving_default"]
{output} = serve(**{{name: tf.constant(array) for name, array in inputs.items()}})["{output}"].numpy()""",
    "onnx": """import numpy as np
import onnxruntime

{inputs}

session = onnxruntime.InferenceSession("model.onnx")
({output},) = session.run(["{output}"], inputs)""",
}

TEXTS = """texts = [[5, 9, 2], [7]]  # ids
tokens = np.zeros((len(texts), max(map(len, texts))), np.int32)
for row, text in enumerate(texts):
    tokens[row, : len(text)] = text  # What follows a text has no effect on it.
inputs = {"tokens": tokens}"""

EXAMPLE = """start, delimiter, extract = {special_tokens}
first, second = [5, 9, 2], [7]  # ids of texts
sequences = [{sequences}]
tokens = np.zeros((1, len(sequences), max(map(len, sequences))), np.int32)
for row, sequence in enumerate(sequences):
    tokens[0, row, : len(sequence)] = sequence
ends = [[len(sequence) - 1 for sequence in sequences]]
inputs = {{"tokens": tokens, "extract": np.array(ends, np.int32)}}"""

PAIR = "[start, *first, delimiter, *second, extract]"
SEQUENCES = {
    "classification": "[start, *first, extract]",
    "entailment": PAIR,
    "similarity": f"{PAIR}, [start, *second, delimiter, *first, extract]",
    "multiple_choice": "[start, *first, delimiter, *answer, extract] for answer in [second] * {answers}",
}

LABEL = """
labels = {labels}  # {file}
print(labels[log_probabilities[0].argmax()])"""
SCORE = """
print(np.exp(log_probabilities[0]) @ {values})  # the expected score"""

WRONG_TYPE = {
    "stablehlo": "JAX converts int64 to int32 and refuses other types.",
    "savedmodel": "The signature refuses other types, such as int64; convert them with `tf.cast(ids, tf.int32)`.",
    "onnx": "ONNX Runtime refuses other types, such as int64; convert them with `ids.astype(np.int32)`.",
}
OUT_OF_RANGE = "If an id or a position is out of range, all outputs of its example are NaN."
REFUSED = "ONNX Runtime refuses a batch with an id or a position that is out of range, including a negative one."


def _graph(format_: str, tokenizer: Tokenizer, task: Task | None, function: ExportedFunction) -> str:
    """Returns code that calls a graph, a table of its inputs and its output, and the rules for them."""
    output, output_shape = function.output
    shapes = [("input", name, "int32", shape) for name, shape in function.inputs.items()]
    shapes += [("output", output, "float32", output_shape)]
    table = ["| | name | type | shape |", "|---|---|---|---|"]
    table += [f"| {role} | {name} | {dtype} | [{', '.join(map(str, shape))}] |" for role, name, dtype, shape in shapes]
    limit = f"; time is at most {function.model.context_length}" if function.limits else ""
    rules = [
        f"Batch and time can have any size of at least 1{limit}.",
        f"Ids are in [0, {function.model.vocab_size}). {REFUSED if format_ == 'onnx' else OUT_OF_RANGE}",
        f"Inputs are int32. {WRONG_TYPE[format_]}",
    ]
    code = GRAPHS[format_].format(inputs=TEXTS, output=output)
    if task is None:
        rules.append("The logits are the scores of the next token before the softmax.")
    else:
        sequences = SEQUENCES[task.kind].format(answers=len(task.labels))
        example = EXAMPLE.format(special_tokens=", ".join(map(str, special_tokens(tokenizer))), sequences=sequences)
        code = GRAPHS[format_].format(inputs=example, output=output) + _print_prediction(task)
        rules.append("extract contains the positions of the extract tokens, in [0, time). What follows them has no effect.")
        rules.append(f"Output i is the logarithm of the probability of label i in {LABELS}.")
    if format_ == "stablehlo":
        rules.append(
            f"The graph runs on {', '.join(PLATFORMS)}. signature.json has the types, shapes and order of all its inputs."
        )
    return "\n".join(("```python", code, "```", "", *table, "", *(f"- {rule}" for rule in rules), "", _about_ids(task))) + "\n"


def _print_prediction(task: Task) -> str:
    if task.regression:
        return SCORE.format(values=task.output_values.tolist())
    return LABEL.format(labels=list(task.labels), file=LABELS)


# -- Hugging Face -----------------------------------------------------------------------------------------------------------

LOAD = """import torch
from transformers import AutoTokenizer, {model}

tokenizer = AutoTokenizer.from_pretrained(".")
model = {model}.from_pretrained(".").eval()
"""

LANGUAGE_MODEL = """```python
{load}batch = tokenizer(["A", "The"], padding=True, return_tensors="pt")
with torch.inference_mode():
    tokens = model.generate(**batch, max_new_tokens=5, do_sample=True)
print(tokenizer.batch_decode(tokens, skip_special_tokens=True))
```

The tokenizer pads on the left, so that each text ends where its continuation begins. `generate` takes this into account in
transformers 5.24, but not in 5.0; with older versions, give it texts of equal length. The longest text and the new tokens must
together fit into the context.

```python
{load}batch = tokenizer(["A", "The"], padding=True, padding_side="right", return_tensors="pt")
with torch.inference_mode():
    logits = model(**batch).logits
print(logits[batch.attention_mask.bool()].shape)
```

To compute the logits of several texts, pad on the right, which has no effect on them. The model counts positions from the start
of a row, and does not correct them for padding on the left.
"""

CLASSIFIER = """```python
{load}{texts}
padding = {{"padding": True, "truncation": True, "return_tensors": "pt"}}
with torch.inference_mode():
    scores = {scores}
{prediction}
```

The tokenizer adds the special tokens and pads on the right. The scores are read at the last token that is not padding, <extract>.
"""
BATCHES = {
    "classification": ('texts = ["A text.", "Another, longer text."]', "model(**tokenizer(texts, **padding)).logits"),
    "entailment": (
        'premises, hypotheses = ["A premise.", "A long premise."], ["A hypothesis.", "Another one."]',
        "model(**tokenizer(premises, hypotheses, **padding)).logits",
    ),
    "similarity": (
        'first, second = ["A text.", "A long text."], ["The other text.", "Another one."]',
        "sum(model(**tokenizer(*pair, **padding)).logits for pair in ((first, second), (second, first)))",
    ),
}
BOTH_ORDERS = "Each pair is scored in both orders, and the scores are added. Each includes half of the classifier's bias.\n"

CHOICES = """```python
{load}answers = {answers}
contexts = len(answers) * ["A context."]
batch = tokenizer(contexts, answers, padding=True, truncation="only_first", return_tensors="pt")
ends = batch.attention_mask.sum(-1) - 1  # the positions of the extract tokens
with torch.inference_mode():
    scores = model(batch.input_ids[None], attention_mask=batch.attention_mask, mc_token_ids=ends[None]).mc_logits
print([answers[i] for i in scores.argmax(-1).tolist()])
```

The input is one sequence for each answer. The tokenizer adds the special tokens and pads on the right.
"""


def _huggingface(task: Task | None, head: Head | None) -> str:
    load = LOAD.format(model=huggingface.architecture(head))
    if task is None:
        return LANGUAGE_MODEL.format(load=load)
    if head is not None and head.choices:
        return CHOICES.format(load=load, answers=[f"answer {label}" for label in task.labels])
    prediction = "print([model.config.id2label[i] for i in scores.argmax(-1).tolist()])"
    if task.regression:
        prediction = f"print(scores.softmax(-1) @ torch.tensor({task.output_values.tolist()}))  # the expected scores"
    texts, scores = BATCHES[task.kind]
    text = CLASSIFIER.format(load=load, texts=texts, scores=scores, prediction=prediction)
    return text + (BOTH_ORDERS if task.kind == "similarity" else "")
