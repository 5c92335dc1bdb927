"""Encoded splits of a task whose sequences have given lengths."""

import numpy as np

from gpt_jax.tasks.transforms import EncodedSplit


def numbered(lengths, num_outputs=3):
    """Returns examples with sequences of these lengths [n, S]. Their tokens are 1, 2, 3, ..., so each reveals its position."""
    lengths = np.array(lengths, np.int32)
    ends = lengths.cumsum(dtype=np.int64).reshape(lengths.shape)
    labels = np.eye(num_outputs, dtype=np.float32)[np.arange(len(lengths)) % num_outputs]
    return EncodedSplit(np.arange(1, lengths.sum() + 1, dtype=np.int32), ends - lengths, lengths, labels, num_truncated=0)


def random_lengths(count, sequences=1, longest=30, seed=0):
    return np.random.default_rng(seed).integers(3, longest + 1, (count, sequences))
