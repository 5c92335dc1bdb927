"""The machine that a benchmark runs on: its processor, the cores at hand, and how busy other programs keep them."""

import contextlib
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path


def num_cores() -> int:
    """Returns the number of cores that this process, and so each program, may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_name() -> str:
    """Returns the name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"


def busy_seconds() -> float | None:
    """Returns the processor time that all programs of this machine have used since it was started; None if it is not known.

    Time that a virtual machine's host took away is included.
    """
    with contextlib.suppress(OSError, ValueError):
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return None


def process_seconds(pid: int) -> float:
    """Returns the processor time that a process and its ended children have used; 0 if it is not known."""
    with contextlib.suppress(OSError, ValueError):
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return 0.0


class OtherLoad:
    """Measures how busy the programs other than some processes keep this machine, from its creation on."""

    def __init__(self, own: Sequence[int]):
        self._own = own
        self._start = time.monotonic(), *self._used()

    def cores(self) -> float | None:
        """Returns the mean number of cores that other programs have used; None if it is not known."""
        (start, machine, own), (machine_now, own_now) = self._start, self._used()
        if machine is None or machine_now is None:
            return None
        return max(0.0, (machine_now - machine) - (own_now - own)) / (time.monotonic() - start)

    def _used(self) -> tuple[float | None, float]:
        return busy_seconds(), sum(map(process_seconds, self._own))
