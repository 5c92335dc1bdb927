"""Runs OpenAI's code on small inputs and writes what it computes, for `test_released.py`.

    python tests/released_code.py CHECKOUT FOLDER

CHECKOUT is a checkout of openai/finetune-transformer-lm. FOLDER contains inputs.json and inputs.npz and receives outputs.json and
outputs.npz. The code was written for TensorFlow 1 and spaCy 2; it gets `tf.compat.v1`, and spaCy's English without a model.
"""

import functools
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import spacy
import tensorflow
import tensorflow.python.framework.function

tf = tensorflow.compat.v1


def main(checkout: Path, folder: Path) -> None:
    tf.disable_v2_behavior()
    sys.modules["tensorflow"] = tf
    sys.modules["analysis"] = types.SimpleNamespace(rocstories=None)  # It needs pandas and is not called.
    spacy.load = lambda name, **options: spacy.blank("en")
    sys.path.insert(0, str(checkout))
    inputs, arrays = json.loads((folder / "inputs.json").read_text()), dict(np.load(folder / "inputs.npz"))
    outputs: dict[str, Any] = {"tensorflow": tensorflow.__version__}
    results = run_schedules(inputs["schedules"]) | run_adam(inputs["adam"], arrays)
    results |= run_model(inputs["model"], arrays)
    outputs |= {"ids": encode(checkout, inputs["texts"]), "stories": split_stories(inputs["stories"])}
    results["soft_labels"] = import_released("utils").stsb_label_encoding(np.array(inputs["scores"]))
    np.savez(folder / "outputs.npz", **results)
    (folder / "outputs.json").write_text(json.dumps(outputs))


def import_released(name: str) -> Any:
    """Imports one of OpenAI's modules, whose names are general."""
    return __import__(name)


def run_schedules(runs: list[list[Any]]) -> dict[str, np.ndarray]:
    """Returns the share of the peak at every update of each run (name, updates, share of warm-up)."""
    results = {}
    with tf.Graph().as_default(), tf.Session() as session:
        for number, (name, total, warmup) in enumerate(runs):
            x = tf.placeholder(tf.float32, [None])
            steps = np.arange(total, dtype=np.float32)
            rate = import_released("opt").schedules[f"warmup_{name}"](x / total, warmup=warmup)
            results[f"schedule/{number}"] = session.run(rate, {x: steps})
    return results


def run_adam(settings: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns each parameter after each update, [updates, ...]."""
    names = settings["names"]
    with tf.Graph().as_default(), tf.Session() as session:
        opt = import_released("opt")
        params = [tf.Variable(arrays[f"adam/{name}"]) for name in names]
        gradients = [tf.placeholder(tf.float32, param.shape) for param in params]
        schedule = functools.partial(opt.schedules[f"warmup_{settings['schedule']}"], warmup=settings["warmup"])
        update = opt.adam(params, gradients, settings["lr"], schedule, settings["total"], l2=settings["l2"], max_grad_norm=1)
        session.run(tf.global_variables_initializer())
        history = []
        for step in range(settings["total"]):
            session.run(update, {g: arrays[f"gradients/{name}"][step] for g, name in zip(gradients, names, strict=True)})
            history.append(session.run(params))
    return {f"adam/{name}": np.stack(values) for name, values in zip(names, zip(*history, strict=True), strict=True)}


def run_model(settings: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Fine-tunes on two-choice questions; returns each batch's logits and losses, and the parameters after each update."""
    train = import_released("train")
    vars(train).update(settings["globals"])
    questions, batches = settings["questions"], settings["batches"]
    size = len(batches[0])
    train.n_batch, train.n_updates_total = size, len(batches)
    with tf.Graph().as_default(), tf.Session(config=tf.ConfigProto(allow_soft_placement=True)) as session:
        tokens = tf.placeholder(tf.int32, [size, 2, train.n_ctx, 2])
        mask = tf.placeholder(tf.float32, [size, 2, train.n_ctx])
        labels = tf.placeholder(tf.int32, [size])
        update, *values = train.mgpu_train(tokens, mask, labels)
        params = train.find_trainable_variables("model")
        session.run(tf.global_variables_initializer())
        names = [param.op.name.removeprefix("model/") for param in params]
        session.run([param.assign(arrays[f"model/{name}"]) for name, param in zip(names, params, strict=True)])
        results: dict[str, list[Any]] = {}
        for batch in batches:
            chosen = [questions[number] for number in batch]
            x, m = train.transform_roc(*zip(*[question[:3] for question in chosen], strict=True))
            batch_values = session.run([update, *values], {tokens: x, mask: m, labels: [question[3] for question in chosen]})[1:]
            after = session.run(params)
            for name, value in zip(["tokens", "mask", "logits", "task_loss", "lm_loss"], [x, m, *batch_values], strict=True):
                results.setdefault(name, []).append(value)
            for name, value in zip(names, after, strict=True):
                results.setdefault(f"model/{name}", []).append(value)
    return {name: np.stack(values) for name, values in results.items()}


def encode(checkout: Path, texts: list[str]) -> list[list[int]]:
    """Returns the ids of each text."""
    files = [str(checkout / "model" / name) for name in ("encoder_bpe_40000.json", "vocab_40000.bpe")]
    return import_released("text_utils").TextEncoder(*files).encode(texts, verbose=False)


def split_stories(folder: str) -> list[list[Any]]:
    """Returns the stories, endings and answers of the training split, then those of the validation split."""
    train, validation, _ = import_released("datasets").rocstories(folder)
    return [[*texts, answers.tolist()] for *texts, answers in (train, validation)]


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
