"""The order of training examples: every window once an epoch, on any number of hosts, exactly as documented."""

import itertools
import math
import time

import numpy as np
import pytest

from gpt_jax.data.windows import EvaluationWindows, Windows, epoch_keys, permute
from gpt_jax.errors import UserError

MASK = 2**64 - 1


class Numbered:
    """Tokens whose values are their own positions, so that a batch shows where it was read. Reads outside fail."""

    def __init__(self, num_tokens):
        self.num_tokens = num_tokens
        self.starts = None

    def read(self, starts, length):
        assert starts.min() >= 0
        assert starts.max() + length <= self.num_tokens
        self.starts = starts
        return (starts[:, None] + np.arange(length)).astype(np.int32)


def orders(size, epochs, seed=0):
    """Returns int64 [epochs, size]: the window at each position of each epoch."""
    keys = epoch_keys(seed, np.repeat(np.arange(epochs, dtype=np.uint64), size))
    return permute(np.tile(np.arange(size, dtype=np.uint64), epochs), size, keys).astype(np.int64).reshape(epochs, size)


def starts_of(windows, examples, batch_size):
    """Returns the positions of the first `examples` examples in the tokens."""
    rows = np.arange(batch_size)
    batches = [windows.batch_at(step, rows)["tokens"][:, 0] for step in range(-(-examples // batch_size))]
    return np.concatenate(batches)[:examples]


# -- the definition, written out with Python's integers ---------------------------------------------------------------------


def mix64_by_hand(x):
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def key_by_hand(*words):
    key = 0
    for word in words:
        key = mix64_by_hand((key + word + 0x9E3779B97F4A7C15) & MASK)
    return key


def example_by_hand(example, size, offsets, seed):
    """Returns (epoch, window, offset) of one example."""
    epoch, position = divmod(example, size)
    a = next(side for side in itertools.count(2, 2) if side * side >= size)
    b = -(-size // a)
    while True:
        right, left = divmod(position, a)
        for j in range(0, 12, 2):
            left = (left + mix64_by_hand((right + key_by_hand(seed, epoch, j)) & MASK) // 2) % a
            right = (right + mix64_by_hand((left + key_by_hand(seed, epoch, j + 1)) & MASK) // 2) % b
        position = right * a + left
        if position < size:
            return epoch, position, key_by_hand(seed, epoch, 12) % offsets


def test_mixer_is_splitmix64():
    """The number is the third output of the authors' reference program with seed 1234567."""
    assert mix64_by_hand((1234567 + 3 * 0x9E3779B97F4A7C15) & MASK) == 9817491932198370423


@pytest.mark.parametrize(
    ("total", "context", "batch_size", "seed", "step"),
    [
        (999, 8, 16, 0, 0),
        (999, 8, 16, 0, 7),  # Straddles two epochs.
        (23, 8, 9, 5, 3),  # Several epochs in a batch.
        (10_000, 1, 64, 2**32 - 1, 12345),
        (987_654_321, 512, 64, 3, 1_000_000),
        (2**40, 1, 8, 1, 10**12),
    ],
)
def test_order_follows_the_documented_definition(total, context, batch_size, seed, step):
    tokens = Numbered(total)
    windows = Windows(tokens, context, batch_size, seed)
    windows.batch_at(step, np.arange(batch_size))
    provenance = windows.provenance(step)
    for row in range(batch_size):
        size = total // context - 1
        epoch, window, offset = example_by_hand(step * batch_size + row, size, total - size * context, seed)
        found = provenance["epochs"][row], provenance["windows"][row], tokens.starts[row]
        assert found == (epoch, window, offset + window * context)


def test_order_is_frozen():
    """The numbers were recorded when version 1 was made. If this fails, runs cannot be resumed; make a version 2 instead."""
    windows = Windows(Numbered(100_000), 16, 8, seed=7)
    assert windows.provenance(0)["windows"] == [5375, 717, 1645, 2246, 5826, 6058, 4747, 3145]
    starts = windows.batch_at(10**6, np.arange(8))["tokens"][:, 0]
    assert starts.tolist() == [75468, 15884, 94348, 83612, 63692, 30780, 29292, 72844]


# -- every window once an epoch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [range(1, 130), [255, 256, 257, 1000, 1023, 2025, 4095, 4096, 4097]])
def test_every_epoch_is_a_permutation(sizes):
    for size in sizes:
        epochs = orders(size, 3, seed=size)
        assert (np.sort(epochs, axis=1) == np.arange(size)).all(), size


@pytest.mark.parametrize("size", [2**33, 2**33 - 1, 2**39 + 12345])
def test_large_permutations_are_injective_where_sampled(size):
    positions = np.concatenate([np.arange(100_000), size - 1 - np.arange(100_000)]).astype(np.uint64)
    image = permute(positions, size, epoch_keys(1, np.full(positions.size, 5, np.uint64)))
    assert image.max() < size
    assert np.unique(image).size == positions.size


@pytest.mark.parametrize("total", [9, 10, 15, 16, 17, 31, 32, 100, 1003])
def test_an_epoch_reads_every_window_once_from_one_offset(total):
    context, epochs = 8, 120
    windows = Windows(Numbered(total), context, batch_size=7, seed=0)
    size = windows.windows_per_epoch
    assert size == (1 if total < 24 else total // 8 - 1)
    starts = np.sort(starts_of(windows, epochs * size, 7).reshape(epochs, size), axis=1)
    assert (np.diff(starts, axis=1) == context).all()
    # 120 draws from at most 15 offsets miss one of them with a probability of 15 * (14/15)^120 = 0.4 %.
    assert set(starts[:, 0]) == set(range(total - size * context))
    assert starts.max() + context == total - 1  # So every token is read, the last one as a target.


def test_epochs_and_seeds_differ():
    first, second = orders(500, 2)
    assert (first == second).mean() < 0.02
    assert (first == orders(500, 1, seed=1)[0]).mean() < 0.02


# -- no pattern in the order ------------------------------------------------------------------------------------------------


def deviation(counts, expected, freedom):
    """Returns the chi-square of counts that should be equal, in standard deviations from its mean."""
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("size", [12, 40, 100, 1000])
def test_order_passes_simple_statistics(size):
    """A random order hardly ever exceeds 5. Eight rounds give 173 at size 12 and 17 at 40, and ten rounds give 17 at 12."""
    epochs = 400_000 // size
    order = orders(size, epochs, seed=11)
    moved = np.bincount(((order - np.arange(size)) % size).ravel(), minlength=size)
    assert deviation(moved, epochs, size - 1) < 5
    successive = np.bincount(((order[:, 1:] - order[:, :-1]) % size).ravel(), minlength=size)[1:]
    assert deviation(successive, epochs, size - 2) < 5
    if size <= 100:
        places = np.zeros((size, size))
        np.add.at(places, (np.arange(size)[None], order), 1)
        assert deviation(places, epochs / size, (size - 1) ** 2) < 5


@pytest.mark.parametrize("size", [4, 5, 9])
def test_both_parities_of_order_occur(size):
    """A Feistel network with an odd number of rows and of columns makes only even permutations."""
    order = orders(size, 2000)
    first, second = np.triu_indices(size, 1)
    odd = (order[:, first] > order[:, second]).sum(axis=1) % 2
    assert 0.45 < odd.mean() < 0.55


# -- batches ----------------------------------------------------------------------------------------------------------------


def test_batch_has_its_documented_form():
    batch = Windows(Numbered(1000), 8, 6, seed=0).batch_at(3, np.array([4, 1]))
    assert {name: (array.dtype, array.shape) for name, array in batch.items()} == {
        "tokens": (np.int32, (2, 8)),
        "targets": (np.int32, (2, 8)),
        "loss_weights": (np.float32, (2, 8)),
        "example_id": (np.int32, (2,)),
    }
    assert (batch["targets"] == batch["tokens"] + 1).all()
    assert (batch["loss_weights"] == 1).all()
    assert batch["example_id"].tolist() == [4, 1]
    for name in ("tokens", "targets", "loss_weights"):
        with pytest.raises(ValueError, match="read-only"):
            batch[name][0, 0] = 0


@pytest.mark.parametrize("windows", [Windows(Numbered(1000), 8, 6, seed=0), EvaluationWindows(Numbered(1000), 8, 6, limit=0)])
def test_element_spec_describes_every_batch(windows):
    for rows in (np.arange(6), np.array([4, 1])):
        for step in (0, 20):
            batch = windows.batch_at(step, rows)
            assert list(windows.element_spec(rows.size).items()) == [
                (name, (array.shape, array.dtype)) for name, array in batch.items()
            ]
    assert list(windows.element_spec(2)) == ["tokens", "targets", "loss_weights", "example_id"]


def test_hosts_get_their_rows_of_the_same_batch():
    whole = Windows(Numbered(5000), 8, 12, seed=2).batch_at(40, np.arange(12))
    hosts = [Windows(Numbered(5000), 8, 12, seed=2).batch_at(40, rows) for rows in np.split(np.arange(12), 3)]
    for name, array in whole.items():
        np.testing.assert_array_equal(np.concatenate([host[name] for host in hosts]), array)


def test_a_late_step_costs_what_the_first_does():
    """The limit leaves time for a slow machine, but not for going through the earlier steps."""
    windows = Windows(Numbered(10**9), 512, 64, seed=0)

    def fastest(step):
        times = []
        for _ in range(20):
            begin = time.perf_counter()
            windows.provenance(step)
            times.append(time.perf_counter() - begin)
        return min(times)

    assert fastest(10**12) < 5e-3


@pytest.mark.parametrize("kind", ["training", "validation"])
def test_a_text_shorter_than_a_window_is_a_users_mistake(kind):
    def make(total):
        return Windows(Numbered(total), 8, 4, 0) if kind == "training" else EvaluationWindows(Numbered(total), 8, 4, 0)

    with pytest.raises(UserError, match=rf"^[^\n]*{kind} text has 8 tokens[^\n]* needs 9[^\n]*$"):
        make(8)
    assert make(9).batch_at(0, np.arange(4))["tokens"][0].tolist() == list(range(8))


# -- evaluation -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 4])
@pytest.mark.parametrize("total", range(9, 40))
def test_evaluation_scores_every_next_token_once(total, batch_size):
    windows = EvaluationWindows(Numbered(total), 8, batch_size, limit=0)
    batches = [windows.batch_at(step, np.arange(batch_size)) for step in range(windows.num_batches)]
    assert all(
        batch["tokens"].shape == (batch_size, 8) and batch["example_id"].tolist() == list(range(batch_size)) for batch in batches
    )
    assert all((batch["targets"] == batch["tokens"] + 1).all() for batch in batches)
    scored = np.concatenate([batch["targets"][batch["loss_weights"] == 1] for batch in batches])
    assert scored.tolist() == list(range(1, total))
    assert sum(batch["loss_weights"].sum() for batch in batches) == total - 1
    assert batches[-1]["loss_weights"].any()


@pytest.mark.parametrize("stride", range(1, 9))
@pytest.mark.parametrize("total", [9, 10, 16, 17, 18, 25, 40])
def test_windows_that_overlap_score_every_next_token_once(total, stride):
    """Every target has all tokens before it as context, or at least 8 - stride + 1 of them."""
    windows = EvaluationWindows(Numbered(total), 8, 4, limit=0, stride=stride)
    batches = [windows.batch_at(step, np.arange(4)) for step in range(windows.num_batches)]
    tokens, targets, counted = (
        np.concatenate([batch[name] for batch in batches]) for name in ("tokens", "targets", "loss_weights")
    )
    assert (targets == tokens + 1).all()
    assert targets[counted == 1].tolist() == list(range(1, total))
    assert (counted.sum(axis=1) > 0).sum() == windows.num_windows
    context = np.broadcast_to(np.arange(1, 9), counted.shape)[counted == 1]
    assert (context >= np.minimum(np.arange(1, total), 8 - stride + 1)).all()
    assert (counted.sum(axis=1)[1:] <= stride).all()


def test_evaluation_stops_at_its_limit():
    windows = EvaluationWindows(Numbered(1000), 8, 4, limit=6)
    assert (windows.num_windows, windows.num_batches) == (6, 2)
    weights = np.concatenate([windows.batch_at(step, np.arange(4))["loss_weights"] for step in range(2)])
    assert weights.sum(axis=1).tolist() == [8, 8, 8, 8, 8, 8, 0, 0]
    assert EvaluationWindows(Numbered(20), 8, 4, limit=6).num_windows == 3


def test_evaluation_gives_hosts_their_rows():
    windows = EvaluationWindows(Numbered(100), 8, 6, limit=0)
    whole = windows.batch_at(1, np.arange(6))
    for name, array in windows.batch_at(1, np.array([2, 5])).items():
        np.testing.assert_array_equal(array, whole[name][[2, 5]])
