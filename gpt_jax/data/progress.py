"""How far the preparation of a text is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

LOG_SECONDS = 5.0
"""Time between lines of progress where there is no terminal."""


class Progress:
    """Bytes of text done: a bar on a terminal, elsewhere a line every few seconds."""

    def __init__(self, what: str, total: int | None, log: Callable[[str], None]):
        self._what, self._total, self._log = what, total, log
        self._done = 0
        self._begun = self._logged = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            import tqdm

            self._bar = tqdm.tqdm(total=total, desc=what, unit="B", unit_scale=True, leave=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, size: int) -> None:
        """Counts `size` more bytes."""
        self._done += size
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(size)
        elif now - self._logged >= LOG_SECONDS:
            self._logged = now
            total = "" if self._total is None else f" of {self._total / 1e6:,.0f}"
            self._log(f"{self._what}: {self._done / 1e6:,.0f}{total} MB, {self._done / 1e6 / (now - self._begun):.2f} MB/s")

    def over(self, values: Iterable[Any], sizes: Iterable[int]) -> Iterator[Any]:
        """Hands `values` through and counts the size of each."""
        for value, size in zip(values, sizes, strict=True):
            self.add(size)
            yield value
