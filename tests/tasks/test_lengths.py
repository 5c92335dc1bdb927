"""The lengths that batches are padded to: the best of each number, and the number that a run is long enough for."""

import itertools

import numpy as np
import pytest

from gpt_jax.config import FinetuneLoopConfig, FinetuneRunConfig, ModelConfig, TaskConfig
from gpt_jax.errors import UserError
from gpt_jax.tasks import lengths as lengths_module
from gpt_jax.tasks.batches import ScoringBatches, TaskBatches, count_steps
from gpt_jax.tasks.lengths import choose_lengths, count_passes, keep_lengths, resolve_lengths
from gpt_jax.train.schedule import Schedule
from tests.encoded import numbered, random_lengths

# -- the best lengths of a number ---------------------------------------------------------------------------------------------


def padded_tokens(splits, batch_size, lengths):
    """Returns the tokens in one row of every batch, with each split in order of length; infinite if a batch does not fit."""
    total = 0
    for longest in splits:
        ordered = sorted(longest, reverse=True)
        for begin in range(0, len(ordered), batch_size):
            total += min((length for length in lengths if length >= ordered[begin]), default=np.inf)
    return total


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("most", [1, 2, 3, 4])
def test_no_other_lengths_need_less_padding(batch_size, most):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        splits = [rng.geometric(0.2, size).clip(max=12) + 2 for size in (20, 5)]
        chosen = choose_lengths(splits, batch_size, most)
        assert len(chosen) <= most
        assert list(chosen) == sorted(set(chosen))
        candidates = itertools.combinations(range(3, 15), most)
        best = min(padded_tokens(splits, batch_size, lengths) for lengths in candidates)
        assert padded_tokens(splits, batch_size, chosen) == best


def test_there_are_no_more_lengths_than_distinct_ones():
    assert choose_lengths([np.array([4, 4, 9, 4])], 1, 8) == (4, 9)


def test_the_greatest_length_fits_every_split():
    assert choose_lengths([np.array([5, 6]), np.array([40])], 2, 3)[-1] == 40


# -- the number of lengths ----------------------------------------------------------------------------------------------------


def settings(batch_size=4, **task):
    model = ModelConfig(vocab_size=1000, context_length=128, num_layers=2, embed_dim=128, num_heads=4, mlp_dim=512)
    return FinetuneRunConfig(model=model, train=FinetuneLoopConfig(batch_size=batch_size), task=TaskConfig(**task))


def computed_tokens(encoded, passes, batch_size, chosen, cost):
    """Returns the tokens of all batches of a run, padding included, plus the cost of compiling for the chosen lengths."""
    total = len(chosen) * cost
    for name, split in encoded.items():
        total += passes[name] * padded_tokens([split.longest], batch_size, chosen) * batch_size * split.lengths.shape[1]
    return total


@pytest.mark.parametrize("sequences", [1, 2])
@pytest.mark.parametrize(("cost", "numbers"), [(0.5, (4, 5, 6, 7, 8)), (100.0, (1, 2, 3)), (1e6, (1,))])
def test_no_other_lengths_take_less_work(monkeypatch, sequences, cost, numbers):
    """All sets of lengths are tried. A compilation that is worth few tokens gives many lengths, and a long one a single one."""
    monkeypatch.setattr(lengths_module, "compilation_cost", lambda model, platform, num_devices: cost)
    passes = {"train": 2.5, "validation": 1.0, "test": 1 / 3}
    found = set()
    for seed in range(5):
        encoded = {name: numbered(random_lengths(size, sequences, 9, seed)) for name, size in (("train", 22), ("validation", 9))}
        encoded["test"] = numbered(random_lengths(5, sequences, 10, seed))
        chosen = resolve_lengths(settings(), encoded, passes, "cpu", 1)
        every = [subset for size in range(1, 9) for subset in itertools.combinations(range(3, 11), size)]
        best = min(computed_tokens(encoded, passes, 4, subset, cost) for subset in every)
        assert computed_tokens(encoded, passes, 4, chosen, cost) == pytest.approx(best)
        found.add(len(chosen))
    assert found <= set(numbers)


def test_a_longer_run_has_more_lengths():
    encoded = {"train": numbered(random_lengths(4000, longest=100)), "validation": numbered(random_lengths(100, longest=100))}
    numbers = []
    for steps in (10, 1000, 100_000):
        passes = count_passes(Schedule(steps, 0.0, 1000, 1000), count_steps(encoded["train"], 4))
        numbers.append(len(resolve_lengths(settings(), encoded, passes, "cpu", 1)))
    assert numbers[0] == 1
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == lengths_module.MAX_LENGTHS


def test_a_faster_device_has_fewer_lengths():
    """A compilation on an accelerator of any kind is worth more tokens, and on several still more. A CPU is one device."""
    encoded = {"train": numbered(random_lengths(4000, longest=100))}

    def number(platform, num_devices):
        return len(resolve_lengths(settings(), encoded, {"train": 30_000.0}, platform, num_devices))

    assert number("cpu", 8) == number("cpu", 1) > number("gpu", 1) == number("unknown", 1) > number("gpu", 8) >= 1


def test_passes_by_hand():
    """25 updates of 10 an epoch are 2.5 epochs, with evaluations after 10, 20 and 25 updates and of the best checkpoint."""
    assert count_passes(Schedule(25, 0.0, 10, 10), 10) == pytest.approx({"train": 2.5, "validation": 4 / 3, "test": 1 / 3})


def test_a_given_number_of_lengths_suits_the_splits_that_every_epoch_uses():
    """The test split, which is scored once, must fit but does not compete for lengths."""
    sizes = {"train": [5] * 4 + [10] * 4, "validation": [20] * 4, "test": [4, 8, 15, 30] * 50}
    encoded = {name: numbered([[size] for size in split]) for name, split in sizes.items()}
    assert resolve_lengths(settings(num_length_buckets=4), encoded, {}, "cpu", 1) == (5, 10, 20, 30)


def test_a_given_number_of_lengths_suits_a_test_split_that_is_scored_alone():
    encoded = {"test": numbered([[size] for size in [4, 8, 15, 30] * 50])}
    assert resolve_lengths(settings(num_length_buckets=4), encoded, {}, "cpu", 1) == (4, 8, 15, 30)


# -- resumption -----------------------------------------------------------------------------------------------------------------


def test_a_run_keeps_its_lengths():
    encoded = {"train": numbered(random_lengths(4000, longest=100)), "validation": numbered(random_lengths(100, longest=100))}
    passes = count_passes(Schedule(1000, 0.0, 1000, 1000), 1000)
    chosen = resolve_lengths(settings(), encoded, passes, "cpu", 1)

    def kept(stored, platform="cpu", **task):
        return keep_lengths(stored, settings(**task), encoded, passes, platform, 1)

    stored = {"platform": "cpu", "lengths": [50, 120], "config": {"task": {"num_length_buckets": 0}}}
    assert kept({}) == chosen
    assert kept(stored) == (50, 120)
    assert kept(stored, platform="gpu") == resolve_lengths(settings(), encoded, passes, "gpu", 1)
    assert kept(stored, num_length_buckets=3) == resolve_lengths(settings(num_length_buckets=3), encoded, passes, "cpu", 1)
    assert kept(stored | {"lengths": [50, 60]}) == chosen  # other data, whose sequences are longer
    for damaged in ([], [0, 120], [120, 50], [50, 50, 120]):
        with pytest.raises(UserError, match=r"^--workdir: in config.json, 'lengths' must be ascending positive numbers"):
            kept(stored | {"lengths": damaged})
    with pytest.raises(UserError, match=r"^--workdir: this folder contains a pre-training run; use another one"):
        kept({"platform": "cpu", "config": {"data": {}}})


@pytest.mark.parametrize(("recorded", "number"), [({"num_length_buckets": 5}, 5), ({"lengths": 3}, 3), ({}, 8)])
def test_a_run_of_an_earlier_version_keeps_its_number_of_lengths(recorded, number):
    encoded = {"train": numbered(random_lengths(4000, longest=100))}
    stored = {"platform": "cpu", "config": {"task": recorded}}
    expected = resolve_lengths(settings(num_length_buckets=number), encoded, {}, "cpu", 1)
    assert len(expected) == number
    assert keep_lengths(stored, settings(), encoded, {"train": 1.0}, "cpu", 1) == expected


def glue(path, columns, header):
    """Returns examples as long as those of a GLUE file in a context of 512, if a token has four bytes."""
    lines = path.read_text(encoding="utf-8").splitlines()[header:]
    texts = [[line.split("\t")[column] for column in columns] for line in lines]
    tokens = [sum(max(len(text.encode()) // 4, 1) for text in row) + len(row) + 1 for row in texts]
    return numbered(np.minimum(tokens, 512)[:, None])


@pytest.mark.parametrize(
    ("task", "columns", "header"), [("CoLA", (3,), 0), ("RTE", (1, 2), 1), ("SST-2", (0,), 1)], ids=["CoLA", "RTE", "SST-2"]
)
def test_eight_lengths_leave_little_padding(shared_data, task, columns, header):
    """At most 15% of the training tokens are padding, even though validation shares the lengths."""
    folder = shared_data("glue") / task
    training, validation = (glue(folder / name, columns, header) for name in ("train.tsv", "dev.tsv"))
    lengths = choose_lengths([training.longest, validation.longest], 32, 8)
    assert len(lengths) <= 8
    batches = TaskBatches(training, 32, 0, lengths, True)
    assert max(batches.padding_share(epoch) for epoch in range(3)) <= 0.15
    scoring = ScoringBatches(validation, 32, lengths)
    assert {scoring.batch_at(step, np.arange(1))["tokens"].shape[2] for step in range(scoring.num_batches)} <= set(lengths)
