"""What a person sees of a run: a header, a live line or log lines, samples, TensorBoard's curves."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt_jax.config import ModelConfig
from gpt_jax.runtime.console import format_duration, say

# Peak dense bfloat16 rate of one JAX device in FLOP/s, from the makers' data sheets, by `device_kind`. A chip that is not here
# has no peak that we know, and its utilisation is not printed. (TPU v7x shows each chip as two devices.)
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
}


def flops_per_token(model: ModelConfig) -> float:
    """Floating-point operations that training one token takes: 6 for each parameter in a matrix product (the embedding counts
    once, as the output layer), and 12 x layers x width x context for attention, counted without regard to its mask as is usual.
    """
    embed, units = model.embed_dim, model.lstm_units
    if model.kind == "lstm":
        return 6 * (4 * units * (embed + units) + units * embed + model.vocab_size * embed)
    block = 4 * embed**2 + 2 * embed * model.mlp_dim
    return 6 * (model.num_layers * block + model.vocab_size * embed) + 12 * model.num_layers * embed * model.context_length


class Progress:
    """Follows a run. On a terminal one line is redrawn in place; elsewhere a line is logged every `log_seconds`.

    Args:
      total: updates in the whole run.
      unit: what the rate counts: "tokens" or "examples".
      units_per_step: units of one update, over all hosts.
      flops: FLOPs of a unit, over the peak of all devices together, for the utilisation; 0 where that is not known.
      log_seconds: seconds between log lines.
      tensorboard: folder of TensorBoard's event files, or None.
      primary: whether this process talks; the others say nothing.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        units_per_step: int,
        flops: float,
        log_seconds: float,
        tensorboard: Path | None,
        primary: bool,
    ):
        self.say: Callable[[str], None] = say if primary else lambda line: None
        self._total, self._unit, self._units_per_step, self._flops = total, unit, units_per_step, flops
        self._primary, self._live = primary, sys.stderr.isatty()
        self._interval = 0.2 if self._live else log_seconds
        self._writer: Any = None
        if tensorboard is not None and primary:
            # Not TensorFlow's writer, since training must not need it; and not tensorboardX's own thread, which dies on a full
            # disk and then blocks whoever writes.
            from tensorboardX.event_file_writer import EventsWriter

            tensorboard.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(tensorboard / "events"))
        self._mark: tuple[float, int] | None = None  # time and step that the rate shown counts from
        self._last: tuple[float, int] | None = None  # time and step of the last update seen without a pause after it
        self._busy = self._updates = 0.0  # seconds and updates of the whole run, without compilation, evaluations and saves
        self._shown = time.monotonic()
        self._rate_shown = 0.0

    def start(self, step: int) -> None:
        """The clock of the rate starts here: called whenever a compilation, an evaluation or a save is over."""
        self._mark = self._last = (time.monotonic(), step)

    @property
    def rate(self) -> float:
        """Mean units a second of the whole run, pauses for compilation, evaluations and saves left out."""
        return self._updates * self._units_per_step / self._busy if self._busy else 0.0

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Shows one update's numbers, when it is time to."""
        self.scalars("train", step, metrics)
        now = time.monotonic()
        if self._last is not None:
            self._busy += now - self._last[0]
            self._updates += step - self._last[1]
            self._last = (now, step)
        if self._mark is None:
            self.start(step)
            self._shown = now
        elif now - self._shown >= self._interval or step == self._total:
            since, first = self._mark
            if step > first:
                self._rate_shown = (step - first) * self._units_per_step / max(now - since, 1e-9)
            if now - since > 30:  # the rate of the last half minute or so
                self._mark = (now, step)
            self._show(f"step {step}/{self._total}  loss {metrics['loss']:.4f}  {self._rate(step)}")
            self._shown = now

    def scalars(self, group: str, step: int, values: dict[str, float]) -> None:
        """Adds points to TensorBoard's curves."""
        if self._writer is None:
            return
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        try:
            for name, value in values.items():
                summary = scalar(f"{group}/{name}", value)
                self._writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        except OSError as error:
            self._writer = None
            self.say(f"TensorBoard's curves end here ({error.strerror}); metrics.jsonl has them all")

    def close(self) -> None:
        """Brings TensorBoard's curves to the disk."""
        if self._writer is not None:
            with contextlib.suppress(OSError):  # the curves stand in metrics.jsonl too
                self._writer.close()

    def _rate(self, step: int) -> str:
        if not self._rate_shown:
            return ""
        left = (self._total - step) * self._units_per_step / self._rate_shown
        utilisation = f"  MFU {self._rate_shown * self._flops:.1%}" if self._flops else ""
        return f"{self._rate_shown:,.0f} {self._unit}/s{utilisation}  {format_duration(left)} left"

    def _show(self, line: str) -> None:
        if self._primary and self._live:
            sys.stderr.write("\r\x1b[K" + line)
            sys.stderr.flush()
        elif self._primary:
            say(time.strftime("%H:%M:%S ") + line)
