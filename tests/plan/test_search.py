"""The search, with invented reports in place of compilations, and once with a compiler."""

import contextlib
import dataclasses
import importlib.util

import pytest

from gpt_jax.cli import main
from gpt_jax.config import DataConfig, ModelConfig, PretrainConfig, TokenizerConfig, TrainConfig
from gpt_jax.config.load import apply_overrides, load_config
from gpt_jax.errors import TrainingError
from gpt_jax.plan import search as module
from gpt_jax.plan.candidates import find_candidates
from gpt_jax.plan.report_file import read_report
from gpt_jax.plan.search import COMPILED, Planned, compilations, compile_best, search
from gpt_jax.runtime.accelerators import parse_accelerator
from gpt_jax.runtime.chips import GIB
from tests.plan.test_candidates import devices, small
from tests.tiny import replace_fields, write_config

CONFIG = small()


def report_of(seconds, exposed=0.0):
    """Returns what the search reads of a report."""
    return {
        "time": {"step": seconds, "exposed": exposed, "tokens_per_second": 1024 / seconds, "utilization": 0.25},
        "memory": {"peak": 9 * GIB},
    }


def invented_advice(report):
    if report["time"]["exposed"]:
        return "limited by collectives, above all one: use more sequences (a larger batch); 44% of the memory is free"
    return "limited by work other than products (40% of it); the largest part is the loss"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "WAIT", 0.0)


class Started(list):
    """Candidates, and the meshes that the compiler refuses as (fsdp, tensor)."""

    def __init__(self):
        super().__init__()
        self.refused = set()


@pytest.fixture
def compiled(monkeypatch):
    """The candidates whose compilation was started. That with fsdp 4 is modeled as the fastest."""
    started = Started()

    @contextlib.contextmanager
    def invented(folder, accelerator, slices):
        def start(candidate):
            started.append(candidate)
            mesh = candidate.config.mesh
            if (mesh.fsdp, mesh.tensor) in started.refused:
                return lambda: Planned(candidate, None, "too large")
            seconds = 0.1 if mesh.fsdp == 4 else 0.2 + 0.01 * mesh.fsdp
            return lambda: Planned(candidate, report_of(seconds, exposed=0.15 if mesh.fsdp == 2 else 0.0))

        yield start

    monkeypatch.setattr(module, "compilations", invented)
    monkeypatch.setattr(module, "advice", invented_advice)
    monkeypatch.setattr(module, "topology_devices", lambda name, slices: devices(2, 2, 1, slices=slices))
    return started


def find(write=None, slices=1):
    """Searches on 2 x 2 chips, or several such slices."""
    return search("small", CONFIG, parse_accelerator("v5e-4"), slices, write)


def test_the_best_few_are_compiled_and_the_fastest_comes_first(compiled, capsys):
    assert find() == report_of(0.1) | {"config": "small"}
    expected = find_candidates(CONFIG, devices(2, 2, 1))
    assert list(compiled) == expected[:COMPILED]
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("data=")]
    assert len(rows) == COMPILED
    assert rows[0].split()[:8] == ["data=1", "fsdp=4", "tensor=1", "1", "dots", "9.00", "100.0", "10,240"]
    assert rows[0].endswith(" 0.0  work other than products (40% of it)")
    assert rows[-1].endswith(" 150.0  collectives, above all one")
    assert [float(row.split()[6]) for row in rows] == sorted(float(row.split()[6]) for row in rows)


def test_the_options_of_the_best_one_make_its_config(compiled, capsys):
    find()
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(
        "the best one: --mesh.data 1 --mesh.fsdp 4 --mesh.tensor 1 --train.grad-accum-steps 1 --model.remat dots"
    )
    [best] = [each.config for each in compiled if each.config.mesh.fsdp == 4]
    assert apply_overrides(CONFIG, line.partition(": ")[2].split(), "") == best


def test_another_candidate_is_compiled_for_one_that_is_refused(compiled, capsys):
    order = find_candidates(CONFIG, devices(2, 2, 1))
    assert len(order) == COMPILED + 1
    first = order[0].config.mesh
    compiled.refused.add((first.fsdp, first.tensor))
    find()
    out, _ = capsys.readouterr()
    assert list(compiled) == order
    assert len([line for line in out.splitlines() if line.startswith("data=")]) == COMPILED
    assert f"refused: {order[0].options}: too large" in out


def test_if_all_are_refused(compiled, tmp_path):
    compiled.refused |= {(each.config.mesh.fsdp, each.config.mesh.tensor) for each in find_candidates(CONFIG, devices(2, 2, 1))}
    with pytest.raises(TrainingError, match="no candidate compiles for v5e-4: too large"):
        find(tmp_path / "new.py")
    assert not (tmp_path / "new.py").exists()


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_no_more_than_some_run_at_once(at_once):
    running, most = set(), []

    def start(candidate):
        running.add(candidate)
        most.append(len(running))
        polls = iter([None, None, Planned(candidate, report_of(0.1))])

        def poll():
            result = next(polls)
            running.discard(result and candidate)
            return result

        return poll

    planned = compile_best(find_candidates(CONFIG, devices(2, 2, 1)), start, at_once)
    assert len(planned) == COMPILED
    assert max(most) == at_once
    assert not running


@pytest.mark.parametrize("slices", [1, 2])
def test_the_config_of_the_best_one_is_saved(compiled, tmp_path, slices):
    path = tmp_path / "best.py"
    find(path, slices)
    [best] = [each.config for each in compiled if each.config.mesh.fsdp == 4]
    assert load_config(str(path)) == best
    assert best == replace_fields(CONFIG, mesh={"slice": slices, "data": 1, "fsdp": 4, "tensor": 1}, model={"remat": "dots"})
    hardware = "v5e-4" if slices == 1 else "2 x v5e-4"
    assert path.read_text().startswith(f'"""small for {hardware}, with the mesh, micro-batches and remat that ')


def test_a_file_that_cannot_be_created_is_refused_before_anything_is_compiled(compiled, tmp_path, capsys):
    existing = tmp_path / "existing.py"
    existing.write_text("x = 1\n")
    words = ["plan", str(write_config(CONFIG, tmp_path / "small.py")), "--topology", "v5e-4", "--search", "--write"]
    for path, message in [
        (existing, f"{existing} exists; name a new file"),
        (tmp_path / "nowhere" / "new.py", f"{tmp_path / 'nowhere'}: no such folder"),
        (tmp_path / "new.txt", f"{tmp_path / 'new.txt'} is not the path of a .py file, such as configs/NAME.py"),
    ]:
        assert main([*words, str(path)]) == 2
        assert capsys.readouterr().err == f"gpt-jax: --write: {message}\n"
    assert not compiled
    assert existing.read_text() == "x = 1\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--write", "x.py"], "--write: requires --search"),
        (["--search", "--price", "1"], "--price: cannot be used with --search; plan the config that it finds"),
        (["--search", "--corpus-tokens", "1000"], "--corpus-tokens: cannot be used with --search; plan the config that it finds"),
        (["--search", "--compare", "a", "b"], "--compare: not allowed with argument --search (see gpt-jax plan --help)"),
    ],
)
def test_options_that_do_not_go_together(capsys, words, message):
    assert main(["plan", "mini", "--topology", "v5e-4", *words]) == 2
    assert capsys.readouterr().err == f"gpt-jax: {message}\n"


def test_without_libtpu(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["plan", "mini", "--topology", "v5e-4", "--search"]) == 2
    assert capsys.readouterr().err == "gpt-jax: --search: needs libtpu: pip install 'gpt_jax[tpu]'\n"


def test_the_reason_of_a_refusal_is_the_processs_message(tpu_devices, tmp_path):
    [candidate, *_] = find_candidates(CONFIG, tpu_devices("v5e:2x2"))
    too_large = replace_fields(candidate.config, train={"batch_size": 400_000})
    with compilations(tmp_path, parse_accelerator("v5e-4"), 1) as start:
        [planned] = compile_best([candidate._replace(config=too_large)], start, 1)
    assert planned.report is None
    assert planned.refusal.startswith("--train.batch-size: 400000 is 100000 sequences a device, which with --model.remat ")


@pytest.mark.slow
def test_the_config_that_a_real_search_wrote_plans_again_to_the_same_report(tpu_devices, tmp_path, capsys):
    tpu_devices("v5e:2x2")
    config = PretrainConfig(
        model=ModelConfig(vocab_size=1000, context_length=128, num_layers=2, embed_dim=128, num_heads=2, mlp_dim=256),
        data=DataConfig(tokenizer=TokenizerConfig(kind="sentencepiece")),
        train=TrainConfig(batch_size=16),
    )
    path = write_config(config, tmp_path / "small.py")
    found, again, written = tmp_path / "found.json", tmp_path / "again.json", tmp_path / "written.py"
    words = ["--topology", "v5e-4", "--json"]
    assert main(["plan", str(path), *words, str(found), "--search", "--write", str(written)]) == 0
    table = capsys.readouterr().out
    assert main(["plan", str(written), *words, str(again)]) == 0
    reports = [read_report(path) for path in (found, again)]
    for report in reports:
        del report["config"]
    assert reports[0] == reports[1]
    rows = [line.split() for line in table.splitlines() if line.startswith("data=")]
    assert len(rows) == COMPILED
    chosen = load_config(str(written))
    assert rows[0][:3] == [f"{axis}={size}" for axis, size in dataclasses.asdict(chosen.mesh).items() if axis != "slice"]
    assert chosen.train == config.train
