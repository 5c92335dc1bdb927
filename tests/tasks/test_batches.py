"""Tests of batches of labeled examples: each example once, the same batches on any host, and little padding."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gpt_jax.data.windows import epoch_keys, permute
from gpt_jax.errors import UserError
from gpt_jax.tasks.batches import EPOCHS_AHEAD, ScoringBatches, TaskBatches, largest_scoring_batches
from tests.encoded import numbered, random_lengths


def epoch_of(batches, epoch):
    """Returns the numbers of the examples of an epoch, int64 [steps, batch_size]."""
    return np.array(
        [batches.example_numbers(epoch * batches.steps_per_epoch + number) for number in range(batches.steps_per_epoch)]
    )


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


# -- a batch, by hand -------------------------------------------------------------------------------------------------------


def test_a_batch_by_hand():
    """Example 0 has the tokens 1 2 3 4 and 5 6 7, example 1 has 8 9 10 and 11 12 13 14 15. The longer one comes first."""
    batch = ScoringBatches(numbered([[4, 3], [3, 5]]), 3, [4, 6, 9]).batch_at(0, np.arange(3))
    pad = [0] * 6
    assert batch["tokens"].tolist() == [
        [[8, 9, 10, 0, 0, 0], [11, 12, 13, 14, 15, 0]],
        [[1, 2, 3, 4, 0, 0], [5, 6, 7, 0, 0, 0]],
        [pad, pad],
    ]
    assert batch["targets"].tolist() == [
        [[9, 10, 0, 0, 0, 0], [12, 13, 14, 15, 0, 0]],
        [[2, 3, 4, 0, 0, 0], [6, 7, 0, 0, 0, 0]],
        [pad, pad],
    ]
    third = np.float32(1 / 3)
    assert batch["loss_weights"].tolist() == [
        [[0.5, 0.5, 0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25, 0, 0]],
        [[third, third, third, 0, 0, 0], [0.5, 0.5, 0, 0, 0, 0]],
        [pad, pad],
    ]
    assert batch["extract"].tolist() == [[2, 4], [3, 2], [0, 0]]
    assert batch["labels"].tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert batch["example_id"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert {name: array.dtype.name for name, array in batch.items()} == {
        "tokens": "int32",
        "targets": "int32",
        "loss_weights": "float32",
        "extract": "int32",
        "labels": "float32",
        "example_id": "int32",
    }


@pytest.mark.parametrize("bucket_by_length", [True, False])
def test_training_batches_hold_their_examples(bucket_by_length):
    encoded = numbered(random_lengths(50, sequences=3))
    batches = TaskBatches(encoded, 8, 0, [10, 20, 30], bucket_by_length)
    for step in range(12):
        batch = batches.batch_at(step, np.arange(8))
        longest = 0
        for row, example in enumerate(batches.example_numbers(step)):
            np.testing.assert_array_equal(batch["labels"][row], encoded.labels[example])
            for s, length in enumerate(encoded.lengths[example]):
                begin = encoded.begins[example, s]
                ids = list(range(begin + 1, begin + length + 1))
                padding = [0] * (batch["tokens"].shape[2] - length)
                assert batch["tokens"][row, s].tolist() == ids + padding
                assert batch["targets"][row, s].tolist() == [*ids[1:], 0, *padding]
                assert batch["tokens"][row, s, batch["extract"][row, s]] == ids[-1]
                longest = max(longest, length)
        assert batch["tokens"].shape == (8, 3, -(-longest // 10) * 10)
        np.testing.assert_allclose(batch["loss_weights"].sum(axis=2), 1, rtol=1e-6)
        assert ((batch["loss_weights"] > 0) == (batch["targets"] > 0)).all()


@pytest.mark.parametrize("sequences", [1, 3])
def test_batches_have_the_shapes_and_dtypes_of_their_element_spec(sequences):
    encoded = numbered(random_lengths(21, sequences), num_outputs=4)
    for batches in (TaskBatches(encoded, 8, 0, [10, 20, 30], True), ScoringBatches(encoded, 8, [10, 20, 30])):
        spec = batches.element_spec(5)
        for step in range(2):
            batch = batches.batch_at(step, np.arange(3, 8))
            actual = {name: (array.shape, array.dtype) for name, array in batch.items()}
            padded = {
                name: (tuple(batch["tokens"].shape[2] if size is None else size for size in shape), dtype)
                for name, (shape, dtype) in spec.items()
            }
            assert list(spec) == list(batch)
            assert actual == padded
        assert spec["tokens"][0] == (5, sequences, None)
        assert spec["labels"][0] == (5, 4)


# -- epochs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bucket_by_length", [True, False])
@pytest.mark.parametrize("count", [8, 15, 16, 67])
def test_an_epoch_has_no_example_twice_and_leaves_out_the_remainder(bucket_by_length, count):
    batches = TaskBatches(numbered(random_lengths(count)), 8, 0, [30], bucket_by_length)
    assert batches.steps_per_epoch == count // 8
    for epoch in range(5):
        examples = epoch_of(batches, epoch).ravel()
        assert np.unique(examples).size == examples.size == count - count % 8
        assert set(examples) <= set(range(count))


@pytest.mark.parametrize("bucket_by_length", [True, False])
def test_every_epoch_leaves_out_different_examples(bucket_by_length):
    """With 7 of 15 left out, the chance that 20 epochs miss an example is 15 * (7/15)^20, one in 300,000."""
    batches = TaskBatches(numbered(random_lengths(15)), 8, 0, [30], bucket_by_length)
    assert set(np.concatenate([epoch_of(batches, epoch).ravel() for epoch in range(20)])) == set(range(15))


@pytest.mark.parametrize("bucket_by_length", [True, False])
def test_epochs_and_seeds_differ(bucket_by_length):
    encoded = numbered(random_lengths(400))
    epochs = [epoch_of(TaskBatches(encoded, 8, seed, [30], bucket_by_length), epoch) for seed in (0, 1) for epoch in (0, 1)]
    for one, other in itertools.combinations(epochs, 2):
        assert (one == other).mean() < 0.05


def test_bucketed_batches_have_one_length_each_and_are_shuffled():
    encoded = numbered(random_lengths(400))
    first, second = (epoch_of(TaskBatches(encoded, 8, 0, [30], True), epoch) for epoch in (0, 1))
    for examples in (first, second):
        shortest, longest = encoded.longest[examples].min(axis=1), encoded.longest[examples].max(axis=1)
        by_length = np.lexsort([longest, shortest])
        assert (longest[by_length][:-1] <= shortest[by_length][1:]).all()  # no two batches overlap
        assert (np.diff(longest) < 0).sum() > 10  # 0 if the 50 batches were still sorted
    together = {frozenset(batch) for batch in first}
    assert not together & {frozenset(batch) for batch in second}  # examples of one length meet others in the next epoch


def test_unbucketed_batches_mix_lengths():
    encoded = numbered(random_lengths(400))
    examples = epoch_of(TaskBatches(encoded, 8, 0, [30], False), 0)
    assert np.ptp(encoded.longest[examples], axis=1).mean() > 15


def test_order_follows_the_documented_definition():
    """The order must never change, because a resumed fine-tuning must see the same examples. (Another test freezes `permute`.)"""
    encoded = numbered(random_lengths(67, longest=8))
    bucketed, unbucketed = (TaskBatches(encoded, 8, 2**32 - 1, [8], bucket_by_length) for bucket_by_length in (True, False))

    def permutation(size, number):
        keys = epoch_keys(2**32 - 1, np.full(size, number, np.uint64))
        return permute(np.arange(size, dtype=np.uint64), size, keys).tolist()

    for epoch in range(3):
        cut = permutation(67, 2 * epoch)[:64]
        assert epoch_of(unbucketed, epoch).ravel().tolist() == cut
        ordered = sorted(cut, key=lambda example: encoded.lengths[example, 0])
        batches = [ordered[8 * number : 8 * number + 8] for number in permutation(8, 2 * epoch + 1)]
        assert epoch_of(bucketed, epoch).tolist() == batches


# -- purity ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bucket_by_length", [True, False])
def test_a_batch_depends_on_its_step_alone(bucket_by_length):
    """It does not depend on earlier calls: threads call in any order, and a resumed run begins in the middle."""
    encoded = numbered(random_lengths(67, sequences=2))
    lengths = [10, 20, 30]
    rows = np.arange(8)
    steps = range(30)
    in_order = TaskBatches(encoded, 8, 5, lengths, bucket_by_length)
    expected = [in_order.batch_at(step, rows) for step in steps]
    for step in (29, 3, 17, 3, 0):
        assert_equal(in_order.batch_at(step, rows), expected[step])
        assert_equal(TaskBatches(encoded, 8, 5, lengths, bucket_by_length).batch_at(step, rows), expected[step])
    shared = TaskBatches(encoded, 8, 5, lengths, bucket_by_length)
    with ThreadPoolExecutor(4) as pool:
        for batch, step in zip(pool.map(lambda step: shared.batch_at(step, rows), steps), steps, strict=True):
            assert_equal(batch, expected[step])


@pytest.mark.parametrize("bucket_by_length", [True, False])
def test_hosts_get_their_rows_of_the_same_batch(bucket_by_length):
    """A host pads its rows like the whole batch, even if another host has the longest sequence."""
    encoded = numbered(random_lengths(67, sequences=2))
    lengths = list(range(3, 31))
    training = TaskBatches(encoded, 8, 5, lengths, bucket_by_length)
    scoring = ScoringBatches(encoded, 8, lengths)
    for batches, steps in ((training, range(20)), (scoring, range(scoring.num_batches))):
        for step in steps:
            whole = batches.batch_at(step, np.arange(8))
            hosts = [batches.batch_at(step, rows) for rows in np.split(np.arange(8), 4)]
            assert_equal({name: np.concatenate([host[name] for host in hosts]) for name in whole}, whole)
            assert_equal(batches.batch_at(step, np.array([6, 1])), {name: array[[6, 1]] for name, array in whole.items()})


def test_fewer_examples_than_a_batch_are_refused():
    with pytest.raises(UserError, match=r"^--train\.batch-size: 8 is more than the 7 examples[^\n]*$"):
        TaskBatches(numbered(random_lengths(7)), 8, 0, [30], True)


# -- scoring ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7, 8, 9, 30])
def test_scoring_covers_every_example_once(count):
    encoded = numbered(random_lengths(count, sequences=2))
    batches = ScoringBatches(encoded, 8, [10, 20, 30])
    assert batches.num_batches == -(-count // 8)
    examples = np.concatenate([batches.example_numbers(step) for step in range(batches.num_batches)])
    assert np.sort(examples[:count]).tolist() == list(range(count))
    assert (examples[count:] == -1).all()
    assert (np.diff(encoded.longest[examples[:count]]) <= 0).all()
    seen = np.concatenate([batches.batch_at(step, np.arange(8))["tokens"].ravel() for step in range(batches.num_batches)])
    assert np.sort(seen[seen > 0]).tolist() == encoded.tokens.tolist()


# -- padding ---------------------------------------------------------------------------------------------------------------


def test_padding_share_by_hand():
    """Batches of two, longest first: 5 and 4 tokens are padded to 5, and 3 tokens and an empty row to 4."""
    encoded = numbered([[5], [4], [3]])
    assert ScoringBatches(encoded, 2, [4, 5]).padding_share() == pytest.approx(6 / 18)
    assert TaskBatches(encoded, 3, 0, [6], False).padding_share() == pytest.approx(6 / 18)


def test_padding_share_is_that_of_the_batches():
    batches = TaskBatches(numbered(random_lengths(67, sequences=2)), 8, 0, [10, 20, 30], True)
    for epoch in (0, 3):
        made = [batches.batch_at(epoch * batches.steps_per_epoch + number, np.arange(8)) for number in range(8)]
        padding = sum((batch["tokens"] == 0).sum() for batch in made)
        assert batches.padding_share(epoch) == pytest.approx(padding / sum(batch["tokens"].size for batch in made))


# -- larger batches for scoring ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("growth", [1, 2, 3, 7])
def test_shorter_sequences_come_in_larger_batches_of_no_more_tokens(growth):
    """Lengths of 10, 20 and 40 tokens, of which at least two are a whole batch of 8 rows of 40 tokens."""
    encoded = numbered(random_lengths(200, sequences=2, longest=40))
    batches = ScoringBatches(encoded, 8, [10, 20, 40], growth)
    examples = [batches.example_numbers(step) for step in range(batches.num_batches)]
    together = np.concatenate(examples)
    assert np.sort(together[together >= 0]).tolist() == list(range(200))
    assert (np.concatenate(examples[:-1]) >= 0).all()
    expected = {40: 8, 20: 8 * min(growth, 2), 10: 8 * min(growth, 4)}
    for step, numbers in enumerate(examples):
        rows, length = batches.shape_at(step)
        assert rows == numbers.size == expected[length]
        assert rows * length <= 8 * 40
        assert batches.batch_at(step, np.arange(rows))["tokens"].shape == (rows, 2, length)


def test_scoring_batches_are_the_largest_without_more_padding_than_allowed():
    encoded, lengths = numbered(random_lengths(300, longest=40)), [10, 20, 40]
    shares = {growth: ScoringBatches(encoded, 8, lengths, growth).padding_share() for growth in (1, 2, 3, 4)}
    assert len(set(shares.values())) > 1
    for allowed in shares.values():
        best = max(growth for growth, share in shares.items() if share <= allowed)
        chosen = largest_scoring_batches(encoded, 8, lengths, allowed)
        expected = ScoringBatches(encoded, 8, lengths, best)
        assert [chosen.shape_at(step) for step in range(chosen.num_batches)] == [
            expected.shape_at(step) for step in range(expected.num_batches)
        ]
    assert largest_scoring_batches(encoded, 8, lengths, 0.0).padding_share() == shares[1]
    assert largest_scoring_batches(encoded, 8, lengths).padding_share() <= shares[1]


def test_padding_share_of_larger_batches_by_hand():
    """Two rows of 8 tokens, then four of 4: 7 + 6 and 4 + 3 + 2 of 16 + 16 tokens."""
    batches = ScoringBatches(numbered([[3], [6], [4], [2], [7]]), 2, [4, 8], 2)
    assert [batches.shape_at(step) for step in range(batches.num_batches)] == [(2, 8), (4, 4)]
    assert batches.padding_share() == pytest.approx(1 - 22 / 32)


# -- lengths in the order of their use --------------------------------------------------------------------------------------


def test_used_lengths_arrange_few_epochs(monkeypatch):
    """Once all lengths that an example has are found, or after `EPOCHS_AHEAD` epochs, the others are not arranged."""
    batches = TaskBatches(numbered(random_lengths(67)), 8, 0, [8, 14, 20, 30, 40], True)
    arranged = []
    monkeypatch.setattr(batches, "_epoch", lambda epoch: [arranged.append(epoch), batches._arrange(epoch)][1])
    assert sorted(batches.used_lengths(0, 10_000)) == [8, 14, 20, 30]
    assert arranged == [0]
    arranged.clear()
    # No batch consists of the only short example.
    batches = TaskBatches(numbered([[3], *[[30]] * 66]), 8, 0, [8, 30], False)
    monkeypatch.setattr(batches, "_epoch", lambda epoch: [arranged.append(epoch), batches._arrange(epoch)][1])
    assert batches.used_lengths(20, 10_000) == [30]
    assert arranged == list(range(2, 2 + EPOCHS_AHEAD))


@pytest.mark.parametrize("bucket_by_length", [True, False])
@pytest.mark.parametrize(("start", "end"), [(0, 1), (0, 30), (3, 5), (7, 9), (8, 8), (12, 40)])
def test_used_lengths_are_those_of_the_batches_in_order(bucket_by_length, start, end):
    batches = TaskBatches(numbered(random_lengths(67)), 8, 0, [8, 14, 20, 30], bucket_by_length)
    made = [batches.batch_at(step, np.arange(1))["tokens"].shape[2] for step in range(start, end)]
    assert batches.used_lengths(start, end) == list(dict.fromkeys(made))
