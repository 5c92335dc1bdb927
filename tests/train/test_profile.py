"""Profiles of a few updates: the trace, the table, and ranges that a run does not make."""

import contextlib
from collections import Counter

import jax
import pytest

from gpt_jax.cli import main
from gpt_jax.errors import UserError
from gpt_jax.runtime.sharding import make_mesh
from gpt_jax.train.profile import describe, find_scopes, operation_times, parse_steps
from gpt_jax.train.step import lower_step
from tests.tiny import replace_fields, tiny_config, trajectory, write_config, write_text

# Python 3.12 warns about a type of jaxlib's profiler.
pytestmark = pytest.mark.filterwarnings("ignore:builtin type")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    source = write_text(tmp_path_factory.mktemp("text"))
    return replace_fields(tiny_config(source), train={"duration": "6 steps"})


def test_a_profile_changes_no_number_and_shows_each_part(config, tmp_path, capsys):
    file = write_config(config, tmp_path / "config.py")
    whole, profiled = tmp_path / "whole", tmp_path / "profiled"
    assert main(["pretrain", str(file), "--workdir", str(whole)]) == 0
    capsys.readouterr()
    assert main(["pretrain", str(file), "--workdir", str(profiled), "--profile.steps", "3:4"]) == 0
    assert trajectory(profiled) == trajectory(whole)
    lines = capsys.readouterr().err
    for part in ("attention", "attention, backward", "mlp", "mlp, backward", "loss", "optimizer"):
        assert f"%  {part}\n" in lines
    assert f"the trace of updates 3 to 4 is in {profiled / 'profile'}\n" in lines
    (trace,) = (profiled / "profile").rglob("*.xplane.pb")
    assert sum(operation_times(trace).values()) > 0


@pytest.mark.parametrize(
    ("steps", "problem"),
    [
        ("10", "is not FIRST:LAST, such as 10:15"),
        ("a:b", "is not FIRST:LAST, such as 10:15"),
        ("3:7", "must be a range of updates from 1 to 6"),
        ("0:3", "must be a range of updates from 1 to 6"),
        ("4:3", "must be a range of updates from 1 to 6"),
    ],
)
def test_wrong_ranges(steps, problem):
    with pytest.raises(UserError) as error:
        parse_steps(steps, 6)
    assert str(error.value) == f"--profile.steps: '{steps}' {problem}"


def test_ranges():
    assert parse_steps("", 6) == range(0)
    assert list(parse_steps("2:4", 6)) == [2, 3, 4]
    assert list(parse_steps("6:6", 6)) == [6]


def test_shares_by_hand():
    program = """
      %dot.1 = f32[2]{0} dot(%a, %b), metadata={op_name="jit(f)/jvp()/while/body/attention/dot_general"}
      ROOT %add.2 = f32[2]{0} add(%a, %b), metadata={op_name="jit(f)/transpose(jvp(loss))/add"}
      %copy.3 = f32[2]{0} copy(%a)
    """
    lines = describe(Counter({"dot.1": 3 * 10**9, "add.2": 10**9, "copy.3": 5 * 10**8}), find_scopes([program]), 2)
    assert lines[0] == "profile: 2.25 s of operations in an update"
    assert lines[1:4] == ["   66.7%  attention", "   22.2%  loss, backward", "   11.1%  other"]
    assert lines[5] == "   66.7%  dot.1  body/attention/dot_general"


def test_scopes_change_only_metadata(config, monkeypatch):
    mesh = make_mesh(config.mesh)
    scoped = lower_step(config, mesh).as_text()
    monkeypatch.setattr(jax, "named_scope", lambda name: contextlib.nullcontext())
    assert lower_step(config, mesh).as_text() == scoped


def test_a_range_beyond_the_run_is_refused_before_anything_is_written(config, tmp_path, capsys):
    run = tmp_path / "run"
    file = write_config(config, tmp_path / "config.py")
    assert main(["pretrain", str(file), "--workdir", str(run), "--profile.steps", "5:9"]) == 2
    assert capsys.readouterr().err.endswith("gpt-jax: --profile.steps: '5:9' must be a range of updates from 1 to 6\n")
    assert not (run / "checkpoints").exists()
    assert not (run / "metrics.jsonl").exists()
