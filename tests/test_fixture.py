"""Files that the first release wrote are read, and gone on from, by this one: store, order of windows, masks, checkpoint."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gpt_jax.data.store import Store
from gpt_jax.train import checkpoint

FIXTURES = Path(__file__).parent / "fixtures"

# (step, loss, gradient norm) as written when the fixture was made, by jax 0.10.2 on a CPU.
RECORDED = [(7, 4.742159366607666, 1.1913390159606934), (8, 4.741739749908447, 1.0206799507141113)]


@pytest.fixture
def run(tmp_path):
    return shutil.copytree(FIXTURES / "run_v1", tmp_path / "run")


def test_an_old_checkpoint_and_store_are_sound(run):
    (info,) = checkpoint.inspect(run)
    assert (info.step, info.state, info.problem) == (6, "sound", "")
    assert checkpoint.read_manifest(info)["format_version"] == 1
    store = Store.open(run / "store")
    assert (
        store.tokenizer().decode(store.split("train").read(np.zeros(1, np.int64), 30)[0].tolist())
        == "# The map of the code, and why"
    )


def test_an_old_run_goes_on_to_the_same_numbers(run, capsys):
    from gpt_jax.cli import main

    words = ["pretrain", str(FIXTURES / "tiny.py"), "--data.source", "docs/architecture.md", "--mesh.data", "8"]
    assert main([*words, "--workdir", str(run)]) == 0
    assert "resuming at step 6" in capsys.readouterr().err
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    got = [(record["step"], record["loss"], record["grad_norm"]) for record in records if record["kind"] == "train"][-2:]
    for (step, loss, norm), (step_then, loss_then, norm_then) in zip(got, RECORDED, strict=True):
        assert step == step_then
        assert loss == pytest.approx(loss_then, rel=1e-5)
        assert norm == pytest.approx(norm_then, rel=1e-4)
