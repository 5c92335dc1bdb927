"""OpenAI's code, run beside ours: schedules, Adam, Figure 1, the fine-tuned model with its losses, tokenizer, split, soft labels.

Name a checkout of openai/finetune-transformer-lm to run it:

    GPT_JAX_RELEASED=finetune-transformer-lm python -m pytest tests/test_released.py -s
"""

import csv
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from gpt_jax.config import ModelConfig, OptimConfig, TaskConfig
from gpt_jax.data.tokenizers import GPT1
from gpt_jax.interop.param_map import tensor_maps, to_tensors
from gpt_jax.model.transformer import ParamSpec
from gpt_jax.tasks.batches import TaskBatches
from gpt_jax.tasks.head import Head, normalize
from gpt_jax.tasks.readers import Example, read_split
from gpt_jax.tasks.registry import TASKS
from gpt_jax.tasks.transforms import EncodedSplit, SpecialTokens, encode_examples, label_distributions
from gpt_jax.train.optimizer import init_moments, learning_rate, make_optimizer

CHECKOUT = os.environ.get("GPT_JAX_RELEASED", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHECKOUT, reason="GPT_JAX_RELEASED does not name a checkout of openai/finetune-transformer-lm"),
]
ROOT = Path(__file__).parents[1]

SCHEDULES = [
    ("cosine", 100, 10.0, 0.1),
    ("cosine", 1500, 3.0, 0.002),
    ("cosine", 4321, 2000.0, 2000 / 4321),
    ("cosine", 231, 0.462, 0.002),
    ("linear", 100, 10.0, 0.1),
    ("linear", 231, 0.462, 0.002),
]
"""Name, updates, warm-up in updates, and the same as a share of the run."""

ADAM = OptimConfig(peak_lr=0.01, schedule="cosine", clip_norm=1.0)
ADAM_STEPS, ADAM_WARMUP = 32, 8.0
"""These are powers of two, so that the released code compares t / T with the share of the warm-up without a rounding error."""
SHAPES = {"matrix": (5, 4), "kernel": (1, 4, 6), "vector": (4,)}

OPTIM = OptimConfig(peak_lr=0.01, schedule="linear", clip_norm=1.0, epsilon=1e-3)
"""Epsilon is large because some gradients are zero but for rounding errors, which Adam would enlarge."""
UPDATES, WARMUP = 6, 2.4
SPECIAL = SpecialTokens(start=40, delimiter=41, extract=42)
MODEL = ModelConfig(
    vocab_size=43,
    context_length=16,
    num_layers=2,
    embed_dim=16,
    num_heads=2,
    mlp_dim=64,
    embed_dropout=0.0,
    attention_dropout=0.0,
    residual_dropout=0.0,
    matmul_precision="highest",
    loss_chunk=16,
)
HEAD = Head(outputs=2, choices=True, lm_weight=0.5, dropout=0.0)
GLOBALS = {
    **{"n_ctx": 16, "n_vocab": 40, "n_special": 3, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_gpu": 1, "max_len": 16 // 2 - 2},
    **{"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "clf_pdrop": 0.0, "afn": "gelu", "lm_coef": HEAD.lm_weight},
    **{"opt": "adam", "lr": OPTIM.peak_lr, "lr_schedule": "warmup_linear", "lr_warmup": WARMUP / UPDATES, "l2": 0.01},
    **{"b1": 0.9, "b2": 0.999, "e": OPTIM.epsilon, "max_grad_norm": 1, "vector_l2": False, "clf_token": SPECIAL.extract},
    "encoder": {"_start_": SPECIAL.start, "_delimiter_": SPECIAL.delimiter, "_classify_": SPECIAL.extract},
}
"""The variables of OpenAI's train.py."""

SCORES = [0.0, 0.25, 1.0, 2.5, 3.8, 4.999, 5.0]


class Released(NamedTuple):
    """The results of OpenAI's code, with its inputs."""

    arrays: dict[str, np.ndarray]
    outputs: dict[str, Any]
    texts: list[str]
    stories: Path
    params: Any
    encoded: EncodedSplit
    batches: TaskBatches


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Released:
    for name in ("tensorflow", "spacy", "ftfy", "sklearn", "joblib"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("released")
    rng = np.random.default_rng(0)
    arrays = {f"adam/{name}": rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in SHAPES.items()}
    arrays |= {
        f"gradients/{name}": rng.normal(
            0.1, 10.0 ** rng.integers(-4, 2, ADAM_STEPS).reshape(-1, *[1] * len(shape)), (ADAM_STEPS, *shape)
        )
        for name, shape in SHAPES.items()
    }
    params = make_params()
    arrays |= {f"model/{name}": tensor for name, tensor in released_tensors(params).items()}
    questions = [
        [rng.integers(0, 40, rng.integers(1, 10)).tolist() for _ in range(3)] + [int(rng.integers(2))] for _ in range(14)
    ]
    encoded = encode_questions(questions)
    batches = TaskBatches(encoded, 4, seed=0, lengths=(16,), bucket_by_length=False)
    texts, stories = list(make_texts()), write_stories(folder / "stories")
    inputs = {
        "schedules": [(name, total, share) for name, total, _, share in SCHEDULES],
        "adam": {"names": list(SHAPES), "schedule": "cosine", "warmup": ADAM_WARMUP / ADAM_STEPS, "total": ADAM_STEPS}
        | {"lr": ADAM.peak_lr, "l2": ADAM.weight_decay},
        "model": {
            "globals": GLOBALS,
            "questions": questions,
            "batches": [batches.example_numbers(step).tolist() for step in range(UPDATES)],
        },
        "texts": texts,
        "stories": str(stories),
        "scores": SCORES,
    }
    (folder / "inputs.json").write_text(json.dumps(inputs))
    np.savez(folder / "inputs.npz", **arrays)
    command = [sys.executable, str(ROOT / "tests/released_code.py"), str(Path(CHECKOUT).expanduser()), str(folder)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    results, outputs = dict(np.load(folder / "outputs.npz")), json.loads((folder / "outputs.json").read_text())
    return Released(
        arrays | {f"released/{name}": value for name, value in results.items()}, outputs, texts, stories, params, encoded, batches
    )


def make_params() -> Any:
    """Returns random parameters, biases and gains included.

    In the last layer norm, the last component is the constant 10. The position rows have -10 there and the tokens 0, so that the
    released softmax, which also spans the position rows, gives them no probability.
    """
    shapes = jax.eval_shape(lambda: HEAD.init(MODEL, jax.random.key(0)))
    rng = np.random.default_rng(1)
    arrays = {}
    for path, leaf in traverse_util.flatten_dict(shapes).items():
        arrays[path] = rng.normal(1.0 if path[-1] == "gain" else 0.0, 0.2, leaf.shape).astype(np.float32)
    arrays["embedding", "tokens"][MODEL.vocab_size :] = 0
    arrays["embedding", "tokens"][:, -1] = 0
    arrays["embedding", "positions"][:, -1] = -10
    arrays["blocks", "mlp_norm", "gain"][-1, -1] = 0
    arrays["blocks", "mlp_norm", "bias"][-1, -1] = 10
    return jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(arrays))


def released_tensors(params: Any) -> dict[str, np.ndarray]:
    """Returns the parameters under the names of the released train.py, where tokens and positions are rows of one matrix."""
    tensors = to_tensors(tensor_maps("openai", MODEL), {name: params[name] for name in ("embedding", "blocks")}, "float32")
    tensors["we"] = np.concatenate([tensors["we"], tensors.pop("pe")])
    return tensors | {"clf/w": np.asarray(params["head"]["kernel"]), "clf/b": np.asarray(params["head"]["bias"])}


def encode_questions(questions: list[list[Any]]) -> EncodedSplit:
    """Returns the sequences of questions whose context and two answers are lists of ids."""
    examples = [
        Example(str(number), tuple(" ".join(map(str, ids)) for ids in texts), label, f"question {number}")
        for number, (*texts, label) in enumerate(questions)
    ]
    encode_text = lambda text: [int(word) for word in text.split()]  # noqa: E731
    return encode_examples(
        examples, "multiple_choice", encode_text, SPECIAL, np.arange(2.0), max_tokens=MODEL.context_length, truncation="released"
    )


def make_texts() -> Iterator[str]:
    """Yields the lines and the pages of the documentation, and random sequences of spaCy's exceptions."""
    import spacy

    for page in sorted(ROOT.glob("docs/*.md")):
        text = page.read_text()
        yield text
        yield from filter(None, text.splitlines())
    rng = random.Random(0)
    pieces = [*spacy.blank("en").tokenizer.rules, *"':;=.-8()$", "&amp;", "\u00e2\u20ac\u2122", "\u2014", "\n", "the", "Cat"]
    for _ in range(500):
        yield "".join(rng.choice(pieces) + rng.choice(["", " "]) for _ in range(12))


def write_stories(folder: Path) -> Path:
    """Writes files in the layout of Story Cloze, and returns their folder."""
    folder.mkdir()
    header = ["InputStoryid", *(f"InputSentence{k}" for k in range(1, 5)), "RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2"]
    for split, count in (("val", 1871), ("test", 20)):
        with (folder / f"cloze_test_{split}__spring2016 - cloze_test_ALL_{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*header, "AnswerRightEnding"])
            for row in range(count):
                writer.writerow([f"id{row}", *(f'Story {row}, "part" {k}.' for k in range(1, 7)), row % 2 + 1])
    return folder


# -- schedules and Adam -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(SCHEDULES)))
def test_schedules(released, number):
    name, total, warmup, _ = SCHEDULES[number]
    config = OptimConfig(schedule=name, peak_lr=1.0)
    rates = jax.vmap(lambda step: learning_rate(config, total, warmup, step))(jnp.arange(total))
    np.testing.assert_allclose(rates, released.arrays[f"released/schedule/{number}"], rtol=0, atol=1e-6)


def updates_ahead(differences: list[float], tolerance: float) -> int:
    """Returns whether the released code read its counter before (0) or after (1) the counter was advanced, which must fit.

    Args:
      differences: the largest difference between their parameters and ours, for 0 and for 1.
    """
    ahead = int(np.argmin(differences))
    assert differences[ahead] < tolerance
    assert differences[1 - ahead] > 100 * tolerance
    return ahead


def test_adam(released):
    differences = []
    for ahead in (0, 1):
        optimizer = make_optimizer(ADAM, {name: len(shape) > 1 for name, shape in SHAPES.items()})
        params = {name: jnp.asarray(released.arrays[f"adam/{name}"]) for name in SHAPES}
        moments, worst = init_moments(params), 0.0
        for step in range(ADAM_STEPS):
            gradients = {name: jnp.asarray(released.arrays[f"gradients/{name}"][step], jnp.float32) for name in SHAPES}
            rate = learning_rate(ADAM, ADAM_STEPS, ADAM_WARMUP, step + ahead)
            changes, moments = optimizer.update(gradients, moments, params, step=jnp.int32(step), learning_rate=rate)
            params = jax.tree.map(jnp.add, params, changes)
            worst = max(worst, *(np.abs(params[name] - released.arrays[f"released/adam/{name}"][step]).max() for name in SHAPES))
        differences.append(worst)
    ahead = updates_ahead(differences, 1e-6)
    version = released.outputs["tensorflow"]
    print(
        f"Adam, {ADAM_STEPS} updates: largest difference {differences[ahead]:.1e}, schedule((t+{ahead})/T), TensorFlow {version}"
    )


# -- the model --------------------------------------------------------------------------------------------------------------


def test_inputs_of_the_model(released):
    for step in range(UPDATES):
        batch = released.batches.batch_at(step, np.arange(4))
        tokens, mask = released.arrays["released/tokens"][step], released.arrays["released/mask"][step]
        np.testing.assert_array_equal(batch["tokens"], tokens[..., 0])
        np.testing.assert_array_equal(batch["loss_weights"][..., :-1] > 0, mask[..., 1:] > 0)
    assert released.encoded.num_truncated > 0


def test_logits_losses_and_parameters_of_a_fine_tuning(released):
    decay = jax.tree.map(lambda s: s.decay, HEAD.param_specs(MODEL), is_leaf=lambda leaf: isinstance(leaf, ParamSpec))
    optimizer = make_optimizer(OPTIM, decay)
    step_losses = jax.jit(jax.value_and_grad(lambda params, batch: HEAD.loss(MODEL, params, normalize(batch), None)))
    log_probabilities = jax.jit(lambda params, batch: HEAD.log_probabilities(MODEL, params, batch))
    theirs = {name: value for name, value in released.arrays.items() if name.startswith("released/")}
    differences: list[float] = []
    for ahead in (0, 1):
        params, moments, worst = released.params, init_moments(released.params), 0.0
        for step in range(UPDATES):
            batch = jax.tree.map(jnp.asarray, released.batches.batch_at(step, np.arange(4)))
            (loss, gradients), scores = step_losses(params, batch), log_probabilities(params, batch)
            if step == 0:
                np.testing.assert_allclose(scores, jax.nn.log_softmax(theirs["released/logits"][0]), rtol=0, atol=2e-5)
                expected = theirs["released/task_loss"][0].mean() + 0.5 * theirs["released/lm_loss"][0].mean()
                np.testing.assert_allclose(loss, expected, rtol=2e-6)
            rate = learning_rate(OPTIM, UPDATES, WARMUP, step + ahead)
            changes, moments = optimizer.update(gradients, moments, params, step=jnp.int32(step), learning_rate=rate)
            params = jax.tree.map(jnp.add, params, changes)
            ours = released_tensors(params)
            worst = max(worst, *(np.abs(ours[name] - theirs[f"released/model/{name}"][step]).max() for name in ours))
        differences.append(worst)
    ahead = updates_ahead(differences, 1e-5)
    print(f"fine-tuning, {UPDATES} updates: largest difference of a parameter {differences[ahead]:.1e}, schedule((t+{ahead})/T)")


# -- data -------------------------------------------------------------------------------------------------------------------


def test_ids_of_texts(released):
    tokenizer = GPT1.read(Path(CHECKOUT).expanduser() / "model")
    wrong = [text for text, ids in zip(released.texts, released.outputs["ids"], strict=True) if tokenizer.encode(text) != ids]
    assert wrong == []
    print(f"{len(released.texts):,} texts, {sum(map(len, released.outputs['ids'])):,} tokens: all ids are equal")


def test_stories_held_out_for_validation(released):
    config = TaskConfig(name="story_cloze", path=str(released.stories))
    for split, (contexts, first, second, answers) in zip(("train", "validation"), released.outputs["stories"], strict=True):
        rows = read_split(TASKS["story_cloze"], config, split).examples
        assert [row.texts for row in rows] == list(zip(contexts, first, second, strict=True))
        assert [row.label for row in rows] == answers


def test_soft_labels(released):
    np.testing.assert_allclose(label_distributions(SCORES, np.arange(6.0)), released.arrays["released/soft_labels"], atol=1e-6)
