"""The n-gram models that the demo compares its model with."""

import collections
import itertools
import math

import numpy as np
import pytest

from gpt_jax.config.load import load_config
from gpt_jax.data.store import Store
from gpt_jax.experiments.demo import ngram_losses
from tests.tiny import replace_fields


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
