"""A whole pre-training: from a text file to a finished folder, from another run's parameters, and what is refused on the way."""

import json
import math
import shutil

import jax
import numpy as np
import pytest

from gpt_jax.data.store import Store
from gpt_jax.errors import UserError
from gpt_jax.model import transformer
from gpt_jax.runtime import sharding
from gpt_jax.train import checkpoint
from gpt_jax.train.pretrain import pretrain
from gpt_jax.train.step import abstract_state


def records(run, *kinds):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] in kinds]


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run of 20 steps that prepared its own store, and what it returned."""
    folder = tmp_path_factory.mktemp("pretrain") / "run"
    return folder, pretrain(tiny("--data.store=", "--train.tensorboard", "True"), folder)


def restored_params(config, info):
    mesh = sharding.make_mesh(config.mesh)
    return checkpoint.restore_part(info, abstract_state(config, mesh)["params"])


def test_a_finished_folder_is_whole(finished, tiny, text):
    run, result = finished
    names = {path.name for path in run.iterdir()} - {"uncommitted.diff"}  # there while the code is being changed
    assert names == {"checkpoints", "config.json", "metrics.jsonl", "result.json", "store", "tensorboard", "tokenizer"}
    assert json.loads((run / "result.json").read_text()) == result
    assert result["step"] == 20
    assert result["tokens"] == 20 * 8 * 16
    # 257 x 16 tokens, 16 x 16 positions; two blocks of 16 x 48 + 48, 16 x 16 + 16, 16 x 32 + 32, 32 x 16 + 16, two norms of 32.
    assert result["parameters"] == 257 * 16 + 16 * 16 + 2 * (816 + 272 + 544 + 528 + 64)
    config = json.loads((run / "config.json").read_text())
    assert config["config"]["data"]["source"] == str(text)
    assert {"commit", "versions", "xla_flags", "digest", "data_digest", "command"} <= set(config)
    assert [info.step for info in checkpoint.inspect(run)] == [10, 15, 20]
    (final,) = records(run, "final")
    assert {name: final[name] for name in result} == result
    assert [record["step"] for record in records(run, "train")] == list(range(1, 21))
    assert list((run / "tensorboard").glob("events.*"))
    assert Store.open(run / "store").tokenizer().fingerprint == Store.open(run / "store").index["tokenizer"]["fingerprint"]


def test_the_reported_loss_is_the_mean_over_every_held_out_token(finished, tiny):
    """Worked out anew from the checkpoint and the store: 20 windows of 16 tokens each."""
    run, result = finished
    params = restored_params(tiny(), checkpoint.resolve(run, print))
    model, split = tiny().model, Store.open(run / "store").split("validation")
    tokens = split.read(np.zeros(1, np.int64), split.num_tokens)[0]
    count = 20 * 16  # --train.eval-windows
    assert count < split.num_tokens - 1
    logits = jax.jit(lambda tokens: transformer.logits(model, params, transformer.apply(model, params, tokens)))
    scores = np.asarray(logits(tokens[:count].reshape(20, 16)), np.float64).reshape(count, 257)
    losses = np.log(np.exp(scores).sum(axis=-1)) - scores[np.arange(count), tokens[1 : count + 1]]
    np.testing.assert_allclose(result["loss"], losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(result["perplexity"], math.exp(losses.mean()), rtol=1e-4)
    # A byte of text is a token; each document's separator is one more, whose cost its bytes share.
    bits = losses.mean() / math.log(2) * (1 + split.documents / split.text_bytes)
    np.testing.assert_allclose(result["bits_per_byte"], bits, rtol=1e-5)
    assert records(run, "eval")[-1]["loss"] == result["loss"]


def test_a_finished_run_is_left_alone(finished, tiny, capsys):
    """Even where its store is another copy, or the folder is told how to show and where to run."""
    run, result = finished
    before = (run / "metrics.jsonl").read_text()
    assert pretrain(tiny("--train.log-seconds", "3", "--data.prefetch", "2"), run) == result
    assert (run / "metrics.jsonl").read_text() == before
    assert "finished at step 20 already" in capsys.readouterr().err


def test_a_finished_run_goes_on_for_longer_if_that_is_meant(finished, tiny, tmp_path, capsys):
    run = shutil.copytree(finished[0], tmp_path / "run")
    longer = tiny("--train.duration", "22 steps")
    with pytest.raises(UserError, match=r"differs in --train.duration '22 steps' \(was '20 steps'\)"):
        pretrain(longer, run)
    result = pretrain(longer, run, allow_changes=True)
    assert result["step"] == 22
    assert "resuming at step 20" in capsys.readouterr().err
    assert [(record["step"], record["attempt"]) for record in records(run, "train")] == [
        *((step, 1) for step in range(1, 21)),
        (21, 2),
        (22, 2),
    ]
    with pytest.raises(UserError, match=r"checkpoint 22 lies beyond --train.duration \(7 steps\)"):
        pretrain(tiny("--train.duration", "7 steps"), run, allow_changes=True)


def test_a_run_keeps_to_its_tokens(finished, tiny, text, tmp_path):
    """The same fields, but a text that has changed since: only the store's digest tells."""
    run, _ = finished
    content = text.read_text()
    text.write_text("".join(content.splitlines(keepends=True)[1:]))
    try:
        with pytest.raises(UserError, match=r"was trained on other data \(digest"):
            pretrain(tiny("--data.store", str(tmp_path / "store")), run)
    finally:
        text.write_text(content)


def test_without_held_out_text_a_run_has_no_scores(tiny, tmp_path, capsys):
    config = tiny("--data.validation-share", "0", "--data.store", str(tmp_path / "store"))
    result = pretrain(config, tmp_path / "run")
    assert result["step"] == 20
    assert "loss" not in result
    assert "nan" not in capsys.readouterr().err
    assert [info.metrics for info in checkpoint.inspect(tmp_path / "run")] == [{}] * 3


# -- from another run's parameters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["", "checkpoints/20"])
def test_a_run_can_start_from_anothers_parameters(finished, tiny, tmp_path, capsys, which):
    """The first update of the warm-up has rate 0: after it the score is still that of the other run."""
    run, result = finished
    config = tiny("--init.from", str(run / which), "--train.eval-every", "1 steps")
    pretrain(config, tmp_path)
    assert f"starting from the parameters of {run / 'checkpoints' / '20'}" in capsys.readouterr().err
    scores = [record["loss"] for record in records(tmp_path, "eval")]
    assert scores[0] == result["loss"]
    assert len(set(scores)) == 20
    assert [record["step"] for record in records(tmp_path, "train")] == list(range(1, 21))
    assert records(tmp_path, "train")[0]["learning_rate"] == 0


def test_parameters_of_another_tokenizer_are_refused(finished, tiny, tmp_path):
    config = tiny(
        *("--init.from", str(finished[0]), "--data.tokenizer.kind", "sentencepiece", "--model.vocab-size", "300"),
        *("--data.store", str(tmp_path / "store")),
    )
    with pytest.raises(UserError, match=r"--init.from: .* was trained with another tokenizer \(bytes, 257 entries"):
        pretrain(config, tmp_path / "run")


def test_parameters_of_another_shape_are_refused_by_name(finished, tiny, tmp_path):
    config = tiny("--init.from", str(finished[0]), "--model.mlp-dim", "64")
    with pytest.raises(UserError) as caught:
        pretrain(config, tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert "params/blocks/mlp/up/kernel is float32[2,16,32], not float32[2,16,64]" in message
    assert "attention" not in message


def test_a_folder_that_holds_no_checkpoint_is_refused_as_a_start(tiny, tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        pretrain(tiny("--init.from", str(tmp_path / "nowhere")), tmp_path / "run")


def test_a_run_killed_before_its_result_was_written_still_gets_its_scores(finished, tiny, tmp_path):
    run, result = finished
    again = shutil.copytree(run, tmp_path / "run")
    (again / "result.json").unlink()
    second = pretrain(tiny("--data.store", str(run / "store")), again)
    for name in ("step", "loss", "perplexity", "bits_per_byte"):
        assert second[name] == result[name], name
