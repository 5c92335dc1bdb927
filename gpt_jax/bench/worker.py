"""The process of one program in a benchmark: builds the program, runs it on request, and reports times as JSON lines.

It reads JSON lines from standard input: first the fields of a `ProgramSpec`, then one integer for each round, the number of
repetitions. For each line it writes one line to the original standard output. When the input ends, it writes a last line. What
libraries print goes to standard error.
"""

import contextlib
import json
import os
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

from gpt_jax.bench.program import ProgramSpec
from gpt_jax.errors import UserError, one_line


def main() -> None:
    """Serves one program until standard input ends, or until an error has been reported."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as channel:
        os.dup2(2, 1)

        def answer(**fields: Any) -> None:
            print(json.dumps(fields), file=channel, flush=True)

        try:
            _serve(answer)
        except UserError as error:
            answer(mistake=str(error))
        except Exception as error:
            answer(failure=one_line(error))
            raise  # The traceback goes to standard error.


def _serve(answer: Any) -> None:
    begin = time.perf_counter()
    program = ProgramSpec(*json.loads(sys.stdin.readline())).build()
    program.run(1)
    answer(setup=time.perf_counter() - begin)
    for line in sys.stdin:
        begin = time.perf_counter()
        program.run(int(line))
        answer(seconds=time.perf_counter() - begin)
    answer(peak_bytes=peak_memory(), details=program.details(), device=program.device, num_devices=program.num_devices)


def peak_memory() -> int:
    """Returns the largest resident memory so far, in bytes, of this process or of one that it has started."""
    unit = 1 if sys.platform == "darwin" else 1024
    own, children = (resource.getrusage(who).ru_maxrss * unit for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    with contextlib.suppress(OSError):  # On Linux, ru_maxrss includes the memory that the starting process had at that moment.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        if match := re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE):
            own = int(match[1]) * 1024
    return max(own, children)


if __name__ == "__main__":
    main()
