"""Report files, as `gpt-jax plan --json` writes them. Neither this module nor those that print reports need JAX."""

from pathlib import Path
from typing import Any

from gpt_jax.errors import UserError
from gpt_jax.runtime.rundir import read_json

Report = dict[str, Any]
"""The result of `make_report` in report.py: times in seconds, memory and transfers in bytes on one device."""
REPORT_VERSION = 2
"""Version of the format of reports."""
REPORT_SHAPE: Any = {
    "version": int,
    "memory": {"parameters": int, "moments": int, "temporaries": int, "peak": int},
    "cycles": dict,
    "collectives": list,
    "time": {"compute": float, "exposed": float, "step": float, "utilization": float},
}
"""The parts of a report that a comparison reads."""


def read_report(path: Path) -> Report:
    """Returns the report in a file that `--json` wrote.

    Raises:
      UserError: the file cannot be read, is not a report, or has another version.
    """
    report = read_json(path)
    if type(report.get("version")) is not int:
        raise UserError(f"{path}: is not a report that gpt-jax plan --json wrote")
    if report["version"] != REPORT_VERSION:
        hint = f"this is version {REPORT_VERSION}; plan it again"
        raise UserError(f"{path}: a report of version {report['version']}, and {hint}")
    return read_json(path, REPORT_SHAPE)
