"""The length and the intervals of a run in updates, from durations in steps, tokens, epochs or shares."""

import functools
from typing import NamedTuple

from gpt_jax.config import RunConfig, schema
from gpt_jax.errors import require
from gpt_jax.train.profile import parse_steps


class Schedule(NamedTuple):
    """The length and the intervals of a run, in updates."""

    total_steps: int
    warmup_steps: float
    """May be fractional if the config gives it as a share of the run."""
    eval_every: int
    save_every: int
    extra_evals: frozenset[int] = frozenset()
    """Steps of additional evaluations."""
    profiled: range = range(0)
    """Updates to profile, counted from 1."""


def resolve_schedule(config: RunConfig, context_length: int | None, epoch: int) -> Schedule:
    """Converts the durations of a config to updates.

    Args:
      context_length: tokens per example, for durations in tokens; None if examples differ in length.
      epoch: examples per epoch.

    Raises:
      UserError: the run is shorter than one update, or not longer than its warm-up, or ends before the last update to profile.
    """
    train = config.train
    steps = functools.partial(schema.duration_to_steps, batch_size=train.batch_size, context_length=context_length, epoch=epoch)
    length = steps(train.duration, "train.duration")
    require(length < 2**31, "train.duration", f"'{train.duration}' is {length:.3g} updates; a run has fewer than 2^31")
    total = int(length)
    require(total > 0, "train.duration", f"'{train.duration}' is less than one update of {train.batch_size} examples")
    warmup = steps(config.optim.warmup, "optim.warmup", total=total)
    require(warmup < total, "optim.warmup", f"must be shorter than the run of {total} steps, not {warmup:g} steps")
    eval_every = max(int(min(steps(train.eval_every, "train.eval_every", total=total), total)), 1)
    save_every = max(int(min(steps(train.save_every, "train.save_every", total=total), total)), 1)
    return Schedule(total, warmup, eval_every, save_every, profiled=parse_steps(config.profile.steps, total))
