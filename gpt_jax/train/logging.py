"""Progress display during training: a live line or log lines, and TensorBoard curves."""

import contextlib
import math
import time
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh

from gpt_jax.config import RunConfig
from gpt_jax.runtime.chips import CHIPS
from gpt_jax.runtime.console import Log, ProgressLine, format_duration
from gpt_jax.train.flops import flops_per_token

Unit = Literal["tokens", "examples"]
"""The unit of the training throughput."""

FADE_SECONDS = 30
"""Time constant, in seconds, of the exponential average behind the displayed throughput."""


class ProgressLogger:
    """Shows step, loss, throughput and remaining time during training, and writes TensorBoard curves.

    Args:
      total_steps: number of updates in the whole run.
      unit: the unit of the throughput. Model FLOPs utilization (MFU) is shown only for tokens, since examples differ in length.
      tensorboard: folder for TensorBoard event files.
      log: prints a line; None on all processes except the first, so that they show and write nothing.
    """

    def __init__(self, config: RunConfig, mesh: Mesh, total_steps: int, unit: Unit, tensorboard: Path, log: Log | None):
        train, chip = config.train, CHIPS.get(mesh.devices.flat[0].device_kind)
        self._total_steps, self._unit, self._log = total_steps, unit, log
        self._units_per_step = train.batch_size * (config.model.context_length if unit == "tokens" else 1)
        self._utilization_per_rate = 0.0  # Utilization is not shown for chips that are not listed.
        if chip is not None and unit == "tokens":
            self._utilization_per_rate = flops_per_token(config.model) / (chip.peak_flops["bfloat16"] * mesh.size)
        self._line = ProgressLine(train.log_seconds, lambda line: log(time.strftime("%H:%M:%S ") + line)) if log else None
        self._writer: Any = None
        if train.tensorboard and log is not None:
            # TensorFlow's writer is not an option, because training must not require TensorFlow. Neither is tensorboardX's
            # asynchronous writer, whose thread dies on a full disk and then blocks every caller.
            from tensorboardX.event_file_writer import EventsWriter

            tensorboard.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(tensorboard / "events"))
        # Updates and their duration, excluding compilation, evaluations and saves: over the whole run, and over recent updates.
        self._updates = self._seconds = self._recent_updates = self._recent_seconds = 0.0
        self.resume_clock(0)

    def resume_clock(self, step: int) -> None:
        """Restarts the throughput clock after a compilation, an evaluation or a save."""
        self._last_time, self._last_step = time.monotonic(), step

    @property
    def rate(self) -> float:
        """Mean units per second over the whole run, excluding compilation, evaluations and saves."""
        return self._updates * self._units_per_step / self._seconds if self._seconds else 0.0

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Records the metrics of one update, and shows them if the display is due."""
        self.scalars("train", step, metrics)
        updates, seconds = step - self._last_step, time.monotonic() - self._last_time
        self.resume_clock(step)
        self._updates += updates
        self._seconds += seconds
        remaining = math.exp(-seconds / FADE_SECONDS)
        self._recent_updates = self._recent_updates * remaining + updates
        self._recent_seconds = self._recent_seconds * remaining + seconds
        if self._line is not None:
            self._line.show(lambda: self._describe(step, metrics["loss"]), last=step == self._total_steps)

    def scalars(self, group: str, step: int, values: dict[str, float]) -> None:
        """Adds points to the TensorBoard curves."""
        if self._writer is None or self._log is None:
            return
        from tensorboardX.proto import event_pb2, summary_pb2

        points = [summary_pb2.Summary.Value(tag=f"{group}/{name}", simple_value=value) for name, value in values.items()]
        try:
            self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary_pb2.Summary(value=points)))
        except OSError as error:
            self._writer = None
            self._log(f"TensorBoard curves end here ({error.strerror}); metrics.jsonl contains all metrics")

    def close(self) -> None:
        """Flushes the TensorBoard curves to disk."""
        if self._writer is not None:
            with contextlib.suppress(OSError):  # metrics.jsonl contains the same numbers.
                self._writer.close()

    def _describe(self, step: int, loss: float) -> str:
        """Returns the progress line of an update, without the throughput until that is known."""
        line = f"step {step}/{self._total_steps}  loss {loss:.4f}  "
        if not self._recent_updates:
            return line
        rate = self._recent_updates * self._units_per_step / max(self._recent_seconds, 1e-9)
        utilization = f"  MFU {rate * self._utilization_per_rate:.1%}" if self._utilization_per_rate else ""
        left = format_duration((self._total_steps - step) * self._units_per_step / rate)
        return f"{line}{rate:,.0f} {self._unit}/s{utilization}  {left} left"
