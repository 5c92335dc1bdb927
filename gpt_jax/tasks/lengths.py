"""The lengths that batches of a task are padded to: few, because each is compiled, and enough to waste little on padding."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Integer

from gpt_jax.config import FinetuneRunConfig, ModelConfig
from gpt_jax.errors import UserError, require
from gpt_jax.tasks.transforms import EncodedSplit
from gpt_jax.train.flops import flops_per_token
from gpt_jax.train.schedule import Schedule

CPU_COMPILATION_FLOPS = 2e11
"""Floating-point operations that a CPU could have made, at the rate of training, while the programs of a length are compiled: 4 s
at 50 GFLOP/s (measured on two cores).

The number is fixed, because a measured time would make the lengths, and with them the last bits of a loss, differ between two
runs. The devices that a CPU simulates share it."""
ACCELERATOR_COMPILATION_FLOPS = 2e15
"""Floating-point operations for each accelerator instead: 20 s at 100 TFLOP/s (assumed)."""
SCORING_PASS = 1 / 3
"""The work of scoring a token, in units of training on it. Training also has a backward pass, which is twice as much work."""
EARLIER_NUMBER = 8
"""Number of lengths of runs that recorded neither the lengths nor their number."""
MAX_LENGTHS = 16
"""Maximum number of lengths. With 16, padding is rarely more than a few percent, and each program takes memory."""


def compilation_cost(model: ModelConfig, platform: str, num_devices: int) -> float:
    """Returns the number of tokens that could be trained on while the programs of one length are compiled."""
    flops = CPU_COMPILATION_FLOPS if platform == "cpu" else ACCELERATOR_COMPILATION_FLOPS * num_devices
    return flops / flops_per_token(model)


def resolve_lengths(
    config: FinetuneRunConfig, encoded: Mapping[str, EncodedSplit], passes: Mapping[str, float], platform: str, num_devices: int
) -> tuple[int, ...]:
    """Returns the lengths that batches are padded to, ascending: `task.num_length_buckets` of them, or a number that is chosen.

    The number is chosen by the tokens that a run computes: those of all batches, padding included, plus those that it could have
    trained on during its compilations. The result is a pure function of the config, the data and the devices.

    Args:
      encoded: the splits that share the lengths.
      passes: for each split, the number of times that the run goes through it, in units of training (`SCORING_PASS`).
      platform: that of the devices: "cpu", "gpu" or "tpu".
      num_devices: number of devices that share a batch.
    """
    batch_size, number = config.train.batch_size, config.task.num_length_buckets
    if number:  # The test split determines only the greatest length, because it is scored once, unless it is the only split.
        least_used = "test" if len(encoded) > 1 else ""
        longest = [split.longest.max(keepdims=True) if name == least_used else split.longest for name, split in encoded.items()]
        return choose_lengths(longest, batch_size, number)
    sequences = next(iter(encoded.values())).lengths.shape[1]
    cost = compilation_cost(config.model, platform, num_devices) / (batch_size * sequences)
    longest, weights = [split.longest for split in encoded.values()], [passes[name] for name in encoded]
    return choose_lengths(longest, batch_size, MAX_LENGTHS, weights, cost)


def keep_lengths(
    stored: Mapping[str, Any],
    config: FinetuneRunConfig,
    encoded: Mapping[str, EncodedSplit],
    passes: Mapping[str, float],
    platform: str,
    num_devices: int,
) -> tuple[int, ...]:
    """Returns the lengths of a run that resumes on the same platform, and otherwise those that `resolve_lengths` chooses.

    Args:
      stored: the contents of the run's config.json; empty for a new run.
      config, encoded, passes, platform, num_devices: as for `resolve_lengths`.

    Raises:
      UserError: the run is a pre-training run, or its record is damaged.
    """
    task = config.task
    if task.num_length_buckets or not stored or stored.get("platform", platform) != platform:
        return resolve_lengths(config, encoded, passes, platform, num_devices)
    if stored.get("lengths") is None:  # Runs of earlier versions recorded only the number, which was never chosen.
        recorded = stored["config"].get("task")
        require(recorded is not None, "workdir", "this folder contains a pre-training run; use another one")
        number = recorded.get("num_length_buckets", recorded.get("lengths", EARLIER_NUMBER))  # "lengths" was its first name.
        config = dataclasses.replace(config, task=dataclasses.replace(task, num_length_buckets=number))
        return resolve_lengths(config, encoded, passes, platform, num_devices)
    longest = max(int(split.longest.max()) for split in encoded.values())
    lengths = tuple(stored["lengths"])
    if not lengths or lengths[0] < 1 or list(lengths) != sorted(set(lengths)):
        raise UserError(
            "--workdir: in config.json, 'lengths' must be ascending positive numbers; it has changed since it was written"
        )
    if longest > lengths[-1]:  # The data have changed.
        return resolve_lengths(config, encoded, passes, platform, num_devices)
    return lengths


def count_passes(schedule: Schedule, steps_per_epoch: int) -> dict[str, float]:
    """Returns the number of times that a run goes through each split, in units of training."""
    evaluations = -(-schedule.total_steps // schedule.eval_every) + len(schedule.extra_evals)
    scored_at_end = 1
    return {
        "train": schedule.total_steps / steps_per_epoch,
        "validation": SCORING_PASS * (evaluations + scored_at_end),
        "test": SCORING_PASS * scored_at_end,
    }


def choose_lengths(
    splits: Sequence[Integer[np.ndarray, " n"]],
    batch_size: int,
    max_lengths: int,
    weights: Sequence[float] | None = None,
    cost: float = 0.0,
) -> tuple[int, ...]:
    """Returns the lengths, ascending and at most `max_lengths`, for which the splits' batches need the least padding.

    The batches of a split contain its examples in order of length, so the lengths of the batches are those of every
    `batch_size`-th example, starting from the longest. Dynamic programming over these lengths is exact for `ScoringBatches`
    without growth. For bucketed training batches, it ignores the shift by the few examples that an epoch leaves out.

    Args:
      splits: for each split that shares the result, the lengths of the examples' longest sequences (`EncodedSplit.longest`).
      batch_size: examples in a batch.
      max_lengths: maximum number of lengths. > 0.
      weights: for each split, the number of times that its batches count; None: once.
      cost: the tokens in one row of all batches that a length must save in order to be used.
    """
    batches = [np.sort(longest)[::-1][::batch_size] for longest in splits]
    times = np.repeat([1.0] * len(splits) if weights is None else weights, [split.size for split in batches])
    distinct, kind = np.unique(np.concatenate(batches), return_inverse=True)
    ends = np.concatenate([[0], distinct])
    below = np.concatenate([[0], np.bincount(kind, times).cumsum()])  # number of batches of at most ends[i] tokens
    # padded[i, j]: tokens in one row of each batch that is longer than ends[i] and at most ends[j] long, padded to ends[j].
    padded = np.where(ends[:, None] <= ends, (below - below[:, None]) * ends, np.inf)
    least = padded[0]
    totals = [least[-1] + cost]  # totals[k]: the least sum for k + 1 lengths
    steps = []  # steps[k][j]: the best i for the length before ends[j], if ends[j] is the last of k + 2 lengths
    for number in range(2, max_lengths + 1):
        sums = least[:, None] + padded
        steps.append(sums.argmin(axis=0))
        least = sums.min(axis=0)
        totals.append(least[-1] + cost * number)
    chosen = [len(ends) - 1]
    for step in reversed(steps[: int(np.argmin(totals))]):
        chosen.append(step[chosen[-1]])
    return tuple(sorted({int(ends[i]) for i in chosen} - {0}))
