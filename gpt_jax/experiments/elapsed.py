"""The elapsed time as a sign of life for commands with long silent steps, such as imports and compilation."""

import contextlib
import threading
import time
from collections.abc import Iterator

from gpt_jax.runtime import console


@contextlib.contextmanager
def show_elapsed_time(interval: float) -> Iterator[None]:
    """Prints the time since the beginning of the block whenever nothing has been shown for `interval` seconds."""
    began = time.monotonic()
    ended = threading.Event()

    def watch() -> None:
        wait = interval
        while not ended.wait(wait):
            now = time.monotonic()
            if now - console.last_shown >= interval:
                console.say(f"    {console.format_duration(now - began)}")
            wait = console.last_shown + interval - now

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
