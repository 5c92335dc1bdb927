"""Handling of stop signals: SIGTERM from a scheduler, Ctrl-C from a user."""

import signal
import threading
from types import FrameType
from typing import Any, Self

_active: list["StopSignals"] = []


def stop_requested() -> bool:
    """Returns whether a `StopSignals` whose block is being executed has counted a signal."""
    return any(signals.count for signals in _active)


class StopSignals:
    """Counts SIGTERM and SIGINT inside a `with` block instead of letting them end the process.

    Nothing is counted outside the main thread, because Python does not allow signal handlers there.

    Args:
      second_interrupt_kills: whether to restore Python's Ctrl-C handler after the first signal, so a second one stops at once.
    """

    def __init__(self, second_interrupt_kills: bool = False) -> None:
        self.count = 0
        self._second_interrupt_kills = second_interrupt_kills
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            _active.append(self)
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._notice)
        return self

    def __exit__(self, *_: object) -> None:
        if self in _active:
            _active.remove(self)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self._second_interrupt_kills:
            signal.signal(signal.SIGINT, signal.default_int_handler)
