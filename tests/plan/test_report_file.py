"""Files of reports, sound and not."""

import json

import pytest

from gpt_jax.errors import UserError
from gpt_jax.plan.report_file import REPORT_VERSION, read_report
from tests.plan.test_compare import REPORT


def test_a_report_is_read_as_it_was_written(tmp_path):
    report = {"version": REPORT_VERSION, **REPORT}
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert read_report(tmp_path / "report.json") == report


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        ("{", ""),
        ("[]", ""),
        ("{}", "is not a report that gpt-jax plan --json wrote"),
        ('{"version": 999}', f"a report of version 999, and this is version {REPORT_VERSION}; plan it again"),
        (json.dumps({"version": REPORT_VERSION}), "'memory' is missing"),
    ],
)
def test_another_file_is_an_error_in_one_line(tmp_path, content, message):
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_report(path)
    assert str(caught.value).startswith(f"{path}")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
