"""Whole pre-training runs: from a text file to a finished folder, from other parameters, from a custom dataset."""

import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from gpt_jax.config import TokenizerConfig
from gpt_jax.data.pipeline import make_dataset
from gpt_jax.data.store import Store
from gpt_jax.data.windows import Windows
from gpt_jax.errors import TrainingError, UserError
from gpt_jax.inputs.text_files import TextFiles
from gpt_jax.model import transformer
from gpt_jax.runtime import sharding
from gpt_jax.train import checkpoint, checkpoint_info
from gpt_jax.train.pretrain import open_store, pretrain
from gpt_jax.train.step import abstract_state
from tests.tiny import trajectory


def records(run, *kinds):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] in kinds]


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """The folder of a run of 20 updates that prepared its own store, and what `pretrain` returned."""
    folder = tmp_path_factory.mktemp("pretrain") / "run"
    return folder, pretrain(tiny(data={"store": ""}, train={"tensorboard": True}), folder)


def restored_params(config, info):
    return checkpoint.restore_params(info, abstract_state(config, sharding.make_mesh(config.mesh))["params"])


def test_a_finished_folder_is_complete(finished, tiny):
    run, result = finished
    names = {path.name for path in run.iterdir()} - {"uncommitted.diff"}  # It is there while the code differs from its commit.
    assert names == {"checkpoints", "config.json", "metrics.jsonl", "result.json", "store", "tensorboard", "tokenizer"}
    assert json.loads((run / "result.json").read_text()) == result
    assert result["step"] == 20
    assert result["tokens"] == 20 * 8 * 32
    # 257 x 16 tokens, 32 x 16 positions; two blocks of 16 x 48 + 48, 16 x 16 + 16, 16 x 64 + 64, 64 x 16 + 16, two norms of 32.
    assert result["parameters"] == 257 * 16 + 32 * 16 + 2 * (816 + 272 + 1088 + 1040 + 64)
    config = json.loads((run / "config.json").read_text())
    assert config["config"]["data"]["source"] == tiny().data.source
    assert {"commit", "versions", "xla_flags", "digest", "data_digest", "command"} <= set(config)
    evaluations = {record["step"]: record["loss"] for record in records(run, "eval")}
    assert list(evaluations) == [5, 10, 15, 20]
    kept = {info.step: info for info in checkpoint_info.list_checkpoints(run)}
    best = min(evaluations, key=evaluations.__getitem__)
    assert set(kept) == {10, 15, 20, best}
    for step, info in kept.items():
        assert (info.selection_metric, info.metrics["loss"]) == (evaluations[step], evaluations[step])
    (final,) = records(run, "final")
    assert {name: final[name] for name in result} == result
    assert [record["step"] for record in records(run, "train")] == list(range(1, 21))
    assert list((run / "tensorboard").glob("events.*"))
    assert Store.open(run / "store").tokenizer().fingerprint == Store.open(run / "store").index["tokenizer"]["fingerprint"]


def test_the_reported_loss_is_the_mean_over_every_held_out_token(finished, tiny):
    """The test recomputes it from the checkpoint and the store: there are 20 windows of 32 tokens each."""
    run, result = finished
    params = restored_params(tiny(), checkpoint_info.find_checkpoint(run, print))
    model, store = tiny().model, Store.open(run / "store")
    split = store.split("validation")
    tokens = split.read(np.zeros(1, np.int64), split.num_tokens)[0]
    count = 20 * 32  # --train.eval-windows
    assert count < split.num_tokens - 1
    logits = jax.jit(lambda tokens: transformer.logits(model, params, transformer.apply(model, params, tokens)))
    scores = np.asarray(logits(tokens[:count].reshape(20, 32)), np.float64).reshape(count, 257)
    losses = np.log(np.exp(scores).sum(axis=-1)) - scores[np.arange(count), tokens[1 : count + 1]]
    np.testing.assert_allclose(result["loss"], losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(result["perplexity"], math.exp(losses.mean()), rtol=1e-4)
    # A byte of text is a token. The end of a document is one more, whose cost its bytes share.
    documents = store.index["splits"]["validation"]["documents"]
    bits = losses.mean() / math.log(2) * (1 + documents / split.text_bytes)
    np.testing.assert_allclose(result["bits_per_byte"], bits, rtol=1e-5)
    assert records(run, "eval")[-1]["loss"] == result["loss"]


def test_a_finished_run_is_left_alone(finished, tiny, capsys):
    """This holds for another copy of its store, too, and if only `speed` and `display` fields differ."""
    run, result = finished
    before = (run / "metrics.jsonl").read_text()
    assert pretrain(tiny(train={"log_seconds": 3.0}, data={"prefetch": 2}), run) == result
    assert (run / "metrics.jsonl").read_text() == before
    assert "already finished at step 20" in capsys.readouterr().err


def test_a_finished_run_continues_for_longer_if_that_is_intended(finished, tiny, tmp_path, capsys):
    run = shutil.copytree(finished[0], tmp_path / "run")
    longer = tiny(train={"duration": "22 steps"})
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
    with pytest.raises(UserError, match=r"checkpoint 22 is beyond --train.duration \(7 steps\)"):
        pretrain(tiny(train={"duration": "7 steps"}), run, allow_changes=True)


def test_a_run_never_continues_on_other_tokens(finished, tiny, tmp_path):
    """The fields are equal, but the text has changed since: only the store's digest shows it."""
    run, _ = finished
    text = Path(tiny().data.source)
    content = text.read_text()
    text.write_text("".join(content.splitlines(keepends=True)[1:]))
    try:
        with pytest.raises(UserError, match=r"was trained on different data \(digest"):
            pretrain(tiny(data={"store": str(tmp_path / "store")}), run)
    finally:
        text.write_text(content)


def test_without_held_out_text_a_run_has_no_scores(tiny, tmp_path, capsys):
    config = tiny(
        data={"validation_share": 0.0, "store": str(tmp_path / "store")},
        optim={"warmup": "1 steps"},
        train={"duration": "3 steps", "eval_every": "1 steps", "save_every": "1 steps"},
    )
    result = pretrain(config, tmp_path / "run")
    assert result["step"] == 3
    assert "loss" not in result
    assert "nan" not in capsys.readouterr().err
    infos = checkpoint_info.list_checkpoints(tmp_path / "run")
    assert [(info.step, info.metrics, info.selection_metric) for info in infos] == [(1, {}, None), (2, {}, None), (3, {}, None)]


# -- from the parameters of another run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["", "checkpoints/20"])
def test_a_run_can_start_from_the_parameters_of_another(finished, tiny, tmp_path, capsys, which):
    """The first update of the warm-up has rate 0: after it the score is still that of the other run."""
    run, result = finished
    config = tiny(init={"from_": str(run / which)}, train={"duration": "5 steps", "eval_every": "1 steps"})
    pretrain(config, tmp_path)
    assert f"starting from the parameters of {run / 'checkpoints' / '20'}" in capsys.readouterr().err
    scores = [record["loss"] for record in records(tmp_path, "eval")]
    assert scores[0] == result["loss"]
    assert len(set(scores)) == 5
    assert [record["step"] for record in records(tmp_path, "train")] == [1, 2, 3, 4, 5]
    assert records(tmp_path, "train")[0]["learning_rate"] == 0


def test_parameters_of_another_tokenizer_are_refused(finished, tiny, tmp_path):
    config = tiny(
        init={"from_": str(finished[0])},
        data={"tokenizer": TokenizerConfig(kind="sentencepiece"), "store": str(tmp_path / "store")},
        model={"vocab_size": 300},
    )
    with pytest.raises(UserError, match=r"--init.from: .* was trained with a different tokenizer \(bytes, 257 entries"):
        pretrain(config, tmp_path / "run")


def test_parameters_of_another_shape_are_refused_by_name(finished, tiny, tmp_path):
    config = tiny(init={"from_": str(finished[0])}, model={"mlp_dim": 128})
    with pytest.raises(UserError) as caught:
        pretrain(config, tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert "params/blocks/mlp/up/kernel is float32[2,16,64], not float32[2,16,128]" in message
    assert "attention" not in message


def test_a_folder_without_a_checkpoint_is_refused_as_a_start(tiny, tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        pretrain(tiny(init={"from_": str(tmp_path / "nowhere")}), tmp_path / "run")


def test_a_run_killed_before_its_result_was_written_still_gets_its_scores(finished, tiny, tmp_path):
    run, result = finished
    again = shutil.copytree(run, tmp_path / "run")
    (again / "result.json").unlink()
    second = pretrain(tiny(data={"store": str(run / "store")}), again)
    for name in ("step", "loss", "perplexity", "bits_per_byte"):
        assert second[name] == result[name], name


# -- from a custom dataset --------------------------------------------------------------------------------------------------


def shift_tokens(source, start_step, end_step, rows):
    """Makes a dataset whose tokens and targets are the next ones in the vocabulary."""

    def shift(batch):
        return batch | {name: (batch[name] + 1) % 257 for name in ("tokens", "targets")}

    return make_dataset(source, start_step, end_step, rows).map(shift)


def data_digest(run):
    return json.loads((run / "config.json").read_text())["data_digest"]


def test_a_custom_dataset_that_changes_nothing_gives_an_equal_run(finished, tiny, tmp_path):
    def dataset_fn(source, start_step, end_step, rows):
        assert (start_step, end_step, rows.tolist()) == (0, 20, list(range(8)))
        return make_dataset(source, start_step, end_step, rows).map(lambda batch: batch)

    run, result = finished
    assert pretrain(tiny(data={"pipeline": "tf"}), tmp_path, dataset_fn=dataset_fn)["loss"] == result["loss"]
    assert trajectory(tmp_path) == trajectory(run)
    assert data_digest(tmp_path) == data_digest(run)


def test_a_custom_dataset_that_changes_results_is_part_of_the_data(finished, tiny, tmp_path):
    config = tiny(data={"pipeline": "tf"}, train={"duration": "4 steps"})
    result = pretrain(config, tmp_path, dataset_fn=shift_tokens, dataset_version="shifted by 1")
    for shifted, original in zip(records(tmp_path, "train"), records(finished[0], "train"), strict=False):
        assert shifted["loss"] != original["loss"]
    assert data_digest(tmp_path) != data_digest(finished[0])
    for version in ("", "shifted by 2"):
        with pytest.raises(UserError, match=r"was trained on different data \(digest [^\n]*$"):
            pretrain(config, tmp_path, dataset_fn=shift_tokens, dataset_version=version)
    assert pretrain(config, tmp_path, dataset_fn=shift_tokens, dataset_version="shifted by 1") == result  # It is finished.


def test_a_custom_dataset_that_ends_early_is_an_error(tiny, tmp_path):
    """The run continues once there are enough batches; its dataset is then made from the step of the checkpoint on."""
    config = tiny(data={"pipeline": "tf"}, train={"duration": "4 steps", "save_every": "1 steps"})
    made = []

    def dataset_fn(source, start_step, end_step, rows):
        made.append((start_step, end_step))
        return make_dataset(source, start_step, end_step, rows).take(3)

    with pytest.raises(UserError, match=r"^[^\n]*dataset.fn: the dataset ended after step 3 of 4$"):
        pretrain(config, tmp_path, dataset_fn=dataset_fn)
    assert not (tmp_path / "result.json").exists()
    assert pretrain(config, tmp_path, dataset_fn=dataset_fn)["step"] == 4
    assert made == [(0, 4), (3, 4)]
    assert [record["step"] for record in records(tmp_path, "train")] == [1, 2, 3, 4]


def test_a_run_whose_first_update_fails_can_be_run_again(tiny, tmp_path, monkeypatch):
    batch_at = Windows.batch_at

    def with_nan_weights(self, step, rows):
        batch = batch_at(self, step, rows)
        return batch | {"loss_weights": batch["loss_weights"] * np.float32("nan")}

    monkeypatch.setattr(Windows, "batch_at", with_nan_weights)
    for _ in range(2):
        with pytest.raises(TrainingError, match=r"^update 1 is not finite [^\n]* checkpoint 0, [^\n]*$"):
            pretrain(tiny(data={"pipeline": "threads"}, train={"duration": "4 steps"}), tmp_path)
    monkeypatch.undo()
    assert pretrain(tiny(data={"pipeline": "threads"}, train={"duration": "4 steps"}), tmp_path)["step"] == 4


# -- the store and its text -------------------------------------------------------------------------------------------------


def test_a_start_needs_no_text_but_notices_another_one_without_reading_it(tiny, tmp_path, monkeypatch):
    texts = shutil.copytree(Path(tiny().data.source).parent, tmp_path / "texts", ignore=shutil.ignore_patterns("store"))
    texts = texts / Path(tiny().data.source).name
    monkeypatch.setattr(TextFiles, "identity", lambda self: pytest.fail("the text was read"))
    lines: list[str] = []
    for source in (str(texts), f"{texts.parent}/./{texts.name}", "", str(tmp_path / "nowhere")):
        store = open_store(tiny(data={"source": source}), tmp_path / "run", lines.append)
        assert store.digest == Store.open(Path(tiny().data.store)).digest
    assert len(lines) == 1
    assert "this finished store is used without its text (--data.source: '" in lines[0]
    with texts.open("a") as file:
        file.write("one more line\n")
    with pytest.raises(
        UserError, match=r"the text of --data.source has changed from files 1, .* use the store as it is: --data.source ''"
    ):
        open_store(tiny(data={"source": str(texts)}), tmp_path / "run", lines.append)


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_inside_its_own_source_is_refused_and_leaves_nothing(tiny, tmp_path, finished):
    texts = shutil.copytree(Path(tiny().data.source).parent, tmp_path / "texts", ignore=shutil.ignore_patterns("store"))
    config = tiny(data={"source": str(texts), "store": tiny().data.store if finished else ""})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"^--workdir: '.*/texts/runs/one' is inside --data.source '.*/texts': "):
        pretrain(config, texts / "runs" / "one")
    assert sorted(tmp_path.rglob("*")) == before
