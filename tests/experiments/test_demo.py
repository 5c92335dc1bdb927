"""The demo: its n-gram models, its comparison of fine-tuned models, its criteria, and a run of all of it with a tiny model."""

import collections
import itertools
import json
import math

import numpy as np
import pytest

from gpt_jax.config.load import load_config
from gpt_jax.data.store import Store
from gpt_jax.experiments import demo as module
from gpt_jax.experiments.demo import TaskScores, compare_predictions, demo, find_failures, ngram_losses, read_passages
from tests.tiny import replace_fields, tiny_config

# -- n-gram models ----------------------------------------------------------------------------------------------------------


def test_ngram_losses_follow_from_the_counts_of_the_training_split(pretrained):
    """The formulas once more, token by token."""
    config = replace_fields(load_config(str(pretrained.parent / "tiny.py")), train={"eval_windows": 0})
    store = Store.open(pretrained / "store")
    train, validation = (
        store.split(name).read(np.zeros(1, np.int64), store.split(name).num_tokens)[0].tolist()
        for name in ("train", "validation")
    )
    words, pairs = collections.Counter(train), collections.Counter(itertools.pairwise(train))
    histories, followers = collections.Counter(train[:-1]), collections.Counter(history for history, _ in pairs)
    losses = np.zeros(2)
    for history, word in itertools.pairwise(validation):
        unigram = (words[word] + 1) / (len(train) + config.model.vocab_size)
        weight = max(followers[history], 1)
        bigram = (pairs[history, word] + weight * unigram) / (histories[history] + weight)
        losses -= math.log(unigram), math.log(bigram)
    assert ngram_losses(config, store) == pytest.approx(tuple(losses / (len(validation) - 1)))


# -- fine-tuned models ------------------------------------------------------------------------------------------------------


def write_predictions(path, gold, predictions):
    rows = ({"id": str(k), "gold": g, "prediction": p} for k, (g, p) in enumerate(zip(gold, predictions, strict=True)))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_standard_error_is_that_of_the_differences_on_the_same_rows(tmp_path):
    ours = write_predictions(tmp_path / "ours", "aaabb", "aaabb")
    theirs = write_predictions(tmp_path / "theirs", "aaabb", "aabab")
    scores = compare_predictions(ours, theirs)
    assert (scores.pretrained, scores.scratch, scores.gain, scores.majority) == pytest.approx((1.0, 0.6, 0.4, 0.6))
    assert scores.error == pytest.approx(math.sqrt(sum((d - 0.4) ** 2 for d in (0, 0, 1, 1, 0)) / 4 / 5))
    assert scores.cells() == ("100.0", "60.0", "40.0", "24.5", "60.0")


def test_models_that_agree_on_every_row_have_no_gain_and_no_error(tmp_path):
    ours = write_predictions(tmp_path / "ours", "ab" * 10, "aa" * 10)
    scores = compare_predictions(ours, ours)
    assert (scores.pretrained, scores.gain, scores.error) == (0.5, 0.0, 0.0)
    assert len(find_failures(1.0, 2.0, [scores] * 4)) == 1


def scores_with_gain(gain, error=0.02):
    return TaskScores(0.5 + gain, 0.5, error, 0.5)


@pytest.mark.parametrize(
    ("loss", "gains", "failures"),
    [
        (3.9, (0.05, 0.05, 0.0, -0.05), []),
        (3.9, (0.05, 0.039, 0.0, 0.0), ["at least 2 tasks must gain more than 2 standard errors; 1 did"]),
        (3.96, (0.05, 0.05, 0.05, 0.05), ["the model's loss must be at least 0.05 nats/token below that of the bigram model"]),
    ],
)
def test_the_demo_fails_unless_the_model_beats_the_bigram_and_two_tasks_gain(loss, gains, failures):
    assert find_failures(loss, 4.0, [scores_with_gain(gain) for gain in gains]) == failures


# -- the whole demo ---------------------------------------------------------------------------------------------------------


class Docs:
    """A stand-in for `InstalledDocs`: the documentation of four packages, each with words of its own."""

    def __init__(self, max_bytes):
        topics = {"alpha": "array axis", "beta": "file path", "gamma": "layer state", "delta": "matrix solver"}
        sentence = "Sentence {} of text {} is about the {} and about one thing of {}."
        self.passages = [
            (package, " ".join(sentence.format(k, text, topic, k * text) for k in range(5)))
            for text in range(60)
            for package, topic in topics.items()
        ]


def test_the_documentation_is_read_once_and_kept_with_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "InstalledDocs", Docs)
    file = tmp_path / "run" / "documents.jsonl"
    passages = read_passages(file, 1000)
    assert passages == Docs(1000).passages
    monkeypatch.setattr(module, "InstalledDocs", None)  # A package may have been upgraded.
    assert read_passages(file, 1000) == passages


def test_half_characters_in_the_documentation_are_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "InstalledDocs", lambda max_bytes: type("Docs", (), {"passages": [("p", "a \ud800 \u2028 b")]}))
    assert read_passages(tmp_path / "documents.jsonl", 1000) == [("p", "a ? \u2028 b")]


@pytest.fixture
def tiny_demo(monkeypatch):
    """Makes the demo tiny: bytes as tokens, twenty updates, sixteen rows of each task."""
    data = {"source": "builtin:docs", "validation_share": 0.3}
    config = tiny_config("", data=data, train={"prompts": ("The",), "sample_tokens": 4})
    monkeypatch.setattr(module, "load_config", lambda name: config)
    monkeypatch.setattr(module, "InstalledDocs", Docs)
    for name, value in {"TRAIN_ROWS": 16, "VALIDATION_ROWS": 16, "MAX_TOKENS": 32}.items():
        monkeypatch.setattr(module, name, value)


@pytest.mark.slow
def test_the_whole_demo_continues_after_an_interruption_and_prints_the_same_again(tiny_demo, tmp_path, monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(module, "compare_predictions", interrupt)
        with pytest.raises(KeyboardInterrupt):
            demo(tmp_path / "demo", seed=1)
    begun = json.loads((tmp_path / "demo" / "config.json").read_text())
    code = demo(tmp_path / "demo", seed=1)
    printed = capsys.readouterr().out
    assert code == 1  # Twenty updates of so small a model do not beat a bigram model.
    assert "The demo failed: the model's loss must be at least 0.05 nats/token below that of the bigram model." in printed
    for task in ("classification: word_order", "entailment: origin", "similarity: same_package", "multiple_choice: continuation"):
        (row,) = (line for line in printed.splitlines() if line.startswith(task))
        assert len(row.removeprefix(task).split()) == 5
    assert json.loads((tmp_path / "demo" / "config.json").read_text()) == begun
    for path in ("huggingface/config.json", "tasks/continuation/nothing/result.json", "documents.jsonl"):
        assert (tmp_path / "demo" / path).is_file()
    assert {json.loads(file.read_text())["seed"] for file in tmp_path.glob("demo/tasks/*/*/result.json")} == {1}

    monkeypatch.setattr(module, "InstalledDocs", None)  # A rerun does not even need the documentation.
    assert demo(tmp_path / "demo", seed=1) == 1
    assert without_time(capsys.readouterr().out) == without_time(printed)


def without_time(printed):
    return [line for line in printed.splitlines() if not line.startswith("time ")]
