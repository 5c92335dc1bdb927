"""The identity of this machine, of its CPU and of its processes: which process a previously recorded process id belongs to."""

import contextlib
import functools
import os
import subprocess
from pathlib import Path

CPU_FIELDS = {
    *("vendor_id", "cpu family", "model", "flags"),  # x86
    *("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features"),  # ARM
}
"""The fields of /proc/cpuinfo that determine for which CPU a compiler produces code."""


def cpu_model() -> str:
    """Returns a string that identifies the model and the instruction sets of this machine's CPU; empty if they are unknown."""
    with contextlib.suppress(OSError):
        first_core = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
        return "\n".join(line for line in first_core.splitlines() if line.partition(":")[0].strip() in CPU_FIELDS)
    return _output("sysctl", "-n", "machdep.cpu.brand_string")  # macOS


@functools.cache
def machine_id() -> str:
    """Returns a string that identifies this machine since it was started, and this process namespace; empty if unknown.

    Two processes can see each other's process ids if theirs are the same. Containers have their own, even on the same machine.
    """
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return _output("sysctl", "-n", "kern.bootsessionuuid")  # macOS


def process_start(pid: int) -> str | None:
    """Returns a string that identifies when a process of this machine started, or None if that is unknown.

    The string is empty if there is no such process, or if it is a zombie.
    """
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return ""
    except PermissionError:  # It belongs to another user.
        pass
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode().split()
        return "" if fields[0] in "ZX" else fields[19]
    state, _, start = _output("ps", "-o", "stat=,lstart=", "-p", str(pid)).partition(" ")
    return "" if state.startswith("Z") else start.strip() or None


def _output(*command: str) -> str:
    """Returns the output of a command, or an empty string if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
