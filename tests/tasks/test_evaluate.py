"""Perplexity of text against a loop over its tokens, and the mistakes that can be made with a text."""

import dataclasses
import functools
import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.cli import main
from gpt_jax.config import FinetuneLoopConfig, FinetuneRunConfig, ModelConfig, TaskConfig, TransferConfig
from gpt_jax.data.tokenizers import Bytes
from gpt_jax.errors import UserError
from gpt_jax.model.network import network
from gpt_jax.model.transformer import logits
from gpt_jax.tasks.evaluate import evaluate_text, text_config
from gpt_jax.tasks.head import make_head
from gpt_jax.tasks.registry import task_from_config
from gpt_jax.train.checkpoint import CheckpointWriter
from tests.tiny import tiny_config

CONTEXT = 24
MODELS = {
    "transformer": ModelConfig(vocab_size=257, context_length=CONTEXT, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=32),
    "lstm": ModelConfig(kind="lstm", vocab_size=257, context_length=CONTEXT, embed_dim=16, num_heads=2, lstm_units=16),
}


def random_params(init, model, seed):
    """Random parameters of such a size that the loss of a token depends on all tokens before it."""
    draw = np.random.default_rng(seed)
    shapes = jax.eval_shape(functools.partial(init, model), jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape) / 3, jnp.float32), shapes)


def write_run(folder, config, params_of_steps):
    Bytes().save(folder / "tokenizer")
    with CheckpointWriter(folder / "checkpoints", config, "", folder / "tokenizer") as writer:
        for step, params in params_of_steps.items():
            writer.save(step, {"params": params}, {})
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, own_task):
    """The folder, the model and the parameters of a pre-trained model of each kind, and of a fine-tuned one."""
    folder = tmp_path_factory.mktemp("runs")
    made = {}
    for name, model in MODELS.items():
        params = random_params(network(model).init, model, 0)
        config = dataclasses.replace(tiny_config(folder / "none"), model=model)
        made[name] = write_run(folder / name, config, {3: params}), model, params
    model = dataclasses.replace(MODELS["transformer"], vocab_size=260)
    config = FinetuneRunConfig(
        model=model,
        train=FinetuneLoopConfig(keep_latest=2),
        task=TaskConfig(**own_task),
        init=TransferConfig(str(made["transformer"][0])),
    )
    head = make_head(task_from_config(config.task), config)
    best, newest = (random_params(head.init, model, seed) for seed in (1, 2))
    run = write_run(folder / "fine-tuned", config, {5: best, 9: newest})
    (run / "result.json").write_text(json.dumps({"best_step": 5}))
    made["fine-tuned"] = run, model, best
    return made


@functools.partial(jax.jit, static_argnums=0)
def log_probabilities(model, params, tokens):
    return jax.nn.log_softmax(logits(model, params, network(model).apply(model, params, tokens)))


def loss_by_hand(model, params, tokens, stride):
    """The mean loss of all tokens but the first, token by token.

    The first `CONTEXT` targets have all tokens before them as context. After these, each group of `stride` targets has its own
    window, which ends with the group. The last group may be smaller.
    """
    total, scored = 0.0, 0
    while scored < len(tokens) - 1:
        last = min(scored + (stride if scored else CONTEXT), len(tokens) - 1)
        begin = max(last - CONTEXT, 0)
        window = np.zeros((1, CONTEXT), np.int32)  # Zeros at the end do not change what comes before them.
        window[0, : last - begin] = tokens[begin:last]
        table = np.asarray(log_probabilities(model, params, window), np.float64)[0]
        total -= sum(table[target - 1 - begin, tokens[target]] for target in range(scored + 1, last + 1))
        scored = last
    return total / scored


def text_of(length):
    return "".join(random.Random(length).choices("abcdefgh .", k=length))


def quiet(line):
    pass


@pytest.mark.parametrize(
    ("name", "length", "stride"),
    [
        ("transformer", 1, None),  # One byte, and the end of the document.
        ("transformer", 2, 1),
        ("transformer", CONTEXT - 1, 5),
        ("transformer", CONTEXT, None),
        ("transformer", CONTEXT + 1, 1),
        ("transformer", 4 * CONTEXT + 3, None),
        ("transformer", 4 * CONTEXT + 3, 1),
        ("transformer", 4 * CONTEXT + 3, 10),
        ("transformer", 40 * CONTEXT, CONTEXT - 1),  # Several batches.
        ("lstm", 1, None),
        ("lstm", 3 * CONTEXT, 7),
        ("fine-tuned", 5, None),
        ("fine-tuned", 3 * CONTEXT, 7),
    ],
)
def test_the_loss_is_that_of_a_loop_over_the_tokens(runs, tmp_path, name, length, stride):
    run, model, params = runs[name]
    text = text_of(length)
    (tmp_path / "text.txt").write_text(text)
    scores = evaluate_text(run, text_config(str(tmp_path / "text.txt"), []), quiet, stride=stride)
    expected = loss_by_hand(model, params, [*text.encode(), 256], stride or CONTEXT)
    assert scores["loss"] == pytest.approx(expected, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(np.exp(expected), rel=1e-4)
    # There are as many bytes as scored tokens.
    assert scores["bits_per_byte"] == pytest.approx(expected / np.log(2), rel=1e-5)
    sizes = {"tokens": length + 1, "scored_tokens": length, "documents": 1, "bytes": length}
    assert {key: scores[key] for key in sizes} == sizes
    assert (scores["context"], scores["stride"]) == (CONTEXT, stride or CONTEXT)


def test_documents_are_joined_as_in_a_store(runs, tmp_path):
    """Each document is followed by the end-of-document token. Blank documents are left out, repeated ones are not."""
    run, model, params = runs["transformer"]
    texts = ["first", "", " \n", "second é", "first"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    data = text_config(str(tmp_path / "rows.jsonl"), ["--data.text-field", "body"])
    tokens = [*b"first", 256, *"second é".encode(), 256, *b"first", 256]
    scores = evaluate_text(run, data, quiet, stride=9)
    assert scores["loss"] == pytest.approx(loss_by_hand(model, params, tokens, 9), rel=1e-5)
    assert (scores["documents"], scores["bytes"], scores["tokens"]) == (3, 19, 22)
    assert evaluate_text(run, data, quiet, max_bytes=6)["documents"] == 2  # The second one reaches the limit.


def test_the_command_prints_units_and_windows(runs, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(text_of(60))
    assert main(["evaluate", str(runs["transformer"][0]), "--text", str(tmp_path / "text.txt"), "--stride", "8"]) == 0
    out, err = capsys.readouterr()
    assert "scoring 6 windows of 24 tokens with a stride of 8 tokens" in err
    table = dict(line.rsplit(maxsplit=1) for line in out.splitlines())
    assert list(table) == [
        *("loss (nats per token)", "perplexity", "bits_per_byte", "tokens", "scored_tokens", "documents", "bytes"),
        *("context", "stride"),
    ]
    assert (table["tokens"], table["scored_tokens"], table["context"], table["stride"]) == ("61", "60", "24", "8")


@pytest.mark.parametrize("stride", [0, -1, CONTEXT + 1, 10**30])
def test_a_stride_out_of_range_is_refused(runs, tmp_path, stride):
    (tmp_path / "text.txt").write_text("abc")
    with pytest.raises(UserError) as error:
        evaluate_text(runs["transformer"][0], text_config(str(tmp_path / "text.txt"), []), quiet, stride=stride)
    assert str(error.value) == f"--stride: must be at least 1 and at most the model's context of {CONTEXT}, not {stride}"


def test_a_text_without_a_token_to_score_is_refused(runs, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": ""}\n{"text": " "}\n')
    with pytest.raises(UserError) as error:
        evaluate_text(runs["transformer"][0], text_config(str(tmp_path / "rows.jsonl"), []), quiet)
    assert str(error.value).startswith(f"--text: {tmp_path / 'rows.jsonl'} has no tokens to score")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--text nowhere.txt", "--text: 'nowhere.txt' does not exist"),
        ("--text builtin:text", "--text: there is no built-in text 'text'; write builtin:docs"),
        ("--text empty.txt", "empty.txt: the file is empty"),
        ("--text rows.jsonl", "rows.jsonl:1: no field 'text' (--data.text-field); known: body"),
        ("--text rows.jsonl --data.text-field bodi", "no field 'bodi' (--data.text-field); did you mean body?"),
        ("--text rows.jsonl --data.source x", "'--data.source' is not an argument of gpt-jax evaluate with --text, which takes"),
        ("--text rows.jsonl --task.path x", "'--task.path' is not an argument of gpt-jax evaluate with --text, which takes"),
        ("--text rows.jsonl --stride", "--stride: expected one argument"),
        ("--text rows.jsonl --max-bytes 0", "--max-bytes: must be positive, not 0"),
        ("--text=", "--text: the name is empty"),
        ("--stride 8", "--stride: requires --text"),
        ("--max-bytes 8", "--max-bytes: requires --text"),
    ],
)
def test_a_mistake_with_a_text_is_one_line(runs, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "rows.jsonl").write_text('{"body": "abc"}\n')
    assert main(["evaluate", str(runs["transformer"][0]), *words.split(" ")]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
