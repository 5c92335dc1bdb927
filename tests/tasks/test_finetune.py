"""A whole fine-tuning: from a checkpoint to scores, continued bit for bit, from nothing, and what is refused on the way."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gpt_jax.cli import main
from gpt_jax.config import (
    FinetuneConfig,
    FinetuneLoopConfig,
    ModelOptions,
    OptimConfig,
    PipelineConfig,
    TaskConfig,
    TransferConfig,
)
from gpt_jax.data import tokenizers
from gpt_jax.data.tokenizers import Bytes
from gpt_jax.errors import UserError
from gpt_jax.experiments.bench import show_spread
from gpt_jax.tasks import evaluate
from gpt_jax.tasks.finetune import find_source, finetune, finetune_seeds, resolve, spread
from gpt_jax.tasks.registry import task_from_config
from gpt_jax.train import checkpoint
from gpt_jax.train.optimizer import learning_rate
from gpt_jax.train.run import schedule


def make_config(task, init, **task_fields):
    return FinetuneConfig(
        model=ModelOptions(compute_dtype="float32"),
        data=PipelineConfig(pipeline="threads"),
        optim=OptimConfig(peak_lr=0.01, schedule="linear", warmup="10%", clip_norm=1.0),
        train=FinetuneLoopConfig(
            batch_size=8, duration="4 epochs", eval_every="2 epochs", save_every="4 steps", keep_latest=9, tensorboard=False
        ),
        task=TaskConfig(**task, num_length_buckets=2, **task_fields),
        init=init,
    )


@pytest.fixture(scope="module")
def config(pretrained, own_task):
    return make_config(own_task, TransferConfig(str(pretrained)))


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A fine-tuning of twenty updates, and what it returned."""
    folder = tmp_path_factory.mktemp("finetune") / "run"
    return folder, finetune(config, folder)


def trajectory(run):
    records = [json.loads(line, parse_float=str) for line in (run / "metrics.jsonl").read_text().splitlines()]
    left_out = ("time", "attempt")
    return [
        {name: value for name, value in record.items() if name not in left_out}
        for record in records
        if record["kind"] in ("train", "eval")
    ]


def test_a_finished_folder_has_scores_predictions_and_the_best_checkpoint(finished):
    run, result = finished
    assert json.loads((run / "result.json").read_text()) == result
    assert result["step"] == 20
    assert result["counts"]["train"] == {"read": 40, "used": 40, "truncated": 0}
    assert set(result["padding"]) == {"train", "validation"}
    stored = json.loads((run / "config.json").read_text())
    assert (stored["platform"], stored["devices"]) == ("cpu", "8 x cpu")
    scores = {
        record["step"]: record
        for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if record["kind"] == "eval"
    }
    assert set(scores) == {10, 20}
    best = max(scores.values(), key=lambda record: (record["accuracy"], record["step"]))
    assert result["best_step"] == best["step"]
    assert result["validation"]["accuracy"] == best["accuracy"]
    assert (run / "checkpoints" / str(best["step"])).is_dir()
    rows = [json.loads(line) for line in (run / "predictions" / "test.jsonl").read_text().splitlines()]
    assert len(rows) == 10
    right = [row["gold"] == row["prediction"] for row in rows]
    assert np.mean(right) == pytest.approx(result["test"]["accuracy"])
    for row in rows:
        assert sum(row["probabilities"]) == pytest.approx(1, abs=1e-5)
        assert row["prediction"] == ["no", "yes"][int(np.argmax(row["probabilities"]))]


def test_the_best_checkpoint_is_scored_though_training_went_on(config, own_task, tmp_path):
    """What is learnt is wrong in validation and test, so the first evaluation is the best and the last state the worst."""
    turned = {}
    for split in ("validation", "test"):
        turned[split] = str(tmp_path / f"{split}.tsv")
        rows = Path(own_task[split]).read_text()
        Path(turned[split]).write_text(rows.replace("yes", "?").replace("no", "yes").replace("?", "no"))
    task = dataclasses.replace(config.task, **turned)
    train = dataclasses.replace(config.train, eval_every="2 steps", save_every="2 steps", keep_latest=20)
    run = tmp_path / "run"
    result = finetune(dataclasses.replace(config, task=task, train=train), run)
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    accuracies = {record["step"]: record["accuracy"] for record in records if record["kind"] == "eval"}
    best = result["best_step"]
    assert best < result["step"]
    assert accuracies[best] == max(accuracies.values()) > accuracies[result["step"]]
    for split in ("validation", "test"):
        scores = {
            step: evaluate.evaluate_task(run / "checkpoints" / str(step), [], split, None, print)
            for step in (best, result["step"])
        }
        assert result[split] == pytest.approx(scores[best], abs=1e-6)
        assert scores[best]["loss"] < scores[result["step"]]["loss"] - 0.05


def test_the_task_is_learnt(finished):
    _, result = finished
    assert result["validation"]["accuracy"] > 0.9


def test_cut_short_and_started_again_it_equals_the_uninterrupted_run(finished, config, tmp_path):
    run, result = finished
    again = tmp_path / "again"
    shutil.copytree(run, again)
    for info in checkpoint.inspect(again):
        if info.step > 8:
            shutil.rmtree(info.path)
    (again / "result.json").unlink()
    resumed = finetune(config, again)
    assert trajectory(again) == trajectory(run)
    timeless = lambda found: {k: v for k, v in found.items() if "second" not in k}  # noqa: E731
    assert timeless(resumed) == timeless(result)
    superseded = (again / "metrics.superseded.jsonl").read_text().splitlines()
    assert min(json.loads(line)["step"] for line in superseded) == 9


def test_evaluate_gives_the_scores_of_the_best_checkpoint(finished, own_task, tmp_path):
    run, result = finished
    scores = evaluate.evaluate_task(run, [], "test", tmp_path / "out", print)
    assert scores == pytest.approx(result["test"], abs=1e-6)
    written = [json.loads(line) for line in (tmp_path / "out" / "test.jsonl").read_text().splitlines()]
    before = [json.loads(line) for line in (run / "predictions" / "test.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in written] == [row["prediction"] for row in before]
    other = evaluate.evaluate_task(run, ["--task.validation", own_task["test"], "--task.test", ""], "validation", None, print)
    assert other == pytest.approx(result["test"], abs=1e-6)


def test_a_pretrained_models_perplexity_is_the_same_before_and_after_the_special_tokens(pretrained, finished, tmp_path):
    (tmp_path / "text.txt").write_text("abc def gab " * 40)
    scores = evaluate.evaluate_text(pretrained, str(tmp_path / "text.txt"))
    assert scores["bytes"] == 480
    assert scores["perplexity"] == pytest.approx(np.exp(scores["loss"]))
    assert scores["bits_per_byte"] == pytest.approx(scores["loss"] / np.log(2))  # one token a byte; the last one ends the text
    tuned = evaluate.evaluate_text(finished[0], str(tmp_path / "text.txt"))
    assert tuned["loss"] != scores["loss"]


def test_seeds_are_runs_of_their_own_with_one_summary(own_task, pretrained, tmp_path):
    config = make_config(own_task, TransferConfig("none", like=str(pretrained)))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, duration="2 steps"))
    result = finetune_seeds(config, tmp_path, 2)
    each = [json.loads((tmp_path / f"seed-{seed}" / "result.json").read_text()) for seed in (0, 1)]
    losses = [one["validation"]["loss"] for one in each]
    assert losses[0] != losses[1]
    assert result["validation"]["loss"]["values"] == losses
    assert result["validation"]["loss"]["median"] == pytest.approx(np.mean(losses))
    assert result["validation"]["loss"]["std"] == pytest.approx(np.std(losses, ddof=1))
    assert json.loads((tmp_path / "result.json").read_text()) == result


def test_a_hidden_test_of_glue_is_predicted_and_not_scored(config, tmp_path, capsys):
    folder = tmp_path / "CoLA"
    folder.mkdir()
    for split, size in (("train", 16), ("dev", 6)):
        rows = [f"src\t{k % 2}\t\t{'ab'[k % 2] * (k + 3)}" for k in range(size)]
        (folder / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    (folder / "test.tsv").write_text("index\tsentence\n0\taaaa\n1\tbbbb\n2\tbaba\n")
    task = TaskConfig(name="cola", path=str(folder), num_length_buckets=1)
    run = tmp_path / "run"
    train = dataclasses.replace(config.train, duration="2 steps")
    result = finetune(dataclasses.replace(config, task=task, train=train), run)
    assert "test" not in result
    predicted = [json.loads(line)["prediction"] for line in (run / "predictions" / "test.jsonl").read_text().splitlines()]
    submitted = (run / "predictions" / "CoLA.tsv").read_text().splitlines()
    assert submitted == ["index\tprediction", *(f"{index}\t{label}" for index, label in enumerate(predicted))]
    assert len(predicted) == 3
    assert main(["evaluate", str(run), "--split", "test"]) == 2
    assert "predictions can be written with --out FOLDER" in capsys.readouterr().err
    out = tmp_path / "out"
    assert main(["evaluate", str(run), "--split", "test", "--out", str(out)]) == 0
    assert f"predictions: {out}/test.jsonl, {out}/CoLA.tsv" in capsys.readouterr().err
    assert (out / "CoLA.tsv").read_bytes() == (run / "predictions" / "CoLA.tsv").read_bytes()


def mistake(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_was_taken_over_keeps_its_initialisation(own_task, pretrained):
    """Blocks that start at random do so as those of the checkpoint did, not as the paper's."""
    source = find_source(TransferConfig("none", like=str(pretrained)), print)
    config = make_config(own_task, TransferConfig("none", like=str(pretrained)))
    different = source._replace(model=dataclasses.replace(source.model, init_stddev=0.3))
    resolved = resolve(config, task_from_config(config.task), different)
    assert resolved.model.init_stddev == 0.3
    assert resolved.model.vocab_size == 257 + 3
    assert resolved.task.labels == ("no", "yes")


@pytest.mark.parametrize(("examples", "rates"), [(2490, [0.0, 1.0]), (8551, [0.0, 1 / 1.602])])
def test_the_warm_up_of_a_short_run_is_a_fraction_of_an_update(examples, rates):
    """0.2 % of RTE's 231 updates and of CoLA's 801: the first update has rate 0 in both."""
    epoch = examples // 32 * 32
    horizon, _, _ = schedule(FinetuneConfig(), None, epoch)
    assert horizon.warmup == pytest.approx(0.002 * horizon.total)
    for step, rate in enumerate(rates):
        expected = 6.25e-5 * rate * (1 - step / horizon.total)
        assert float(learning_rate(FinetuneConfig().optim, horizon, step)) == pytest.approx(expected, rel=1e-3)


def test_outputs_of_another_kind_are_refused(finished, own_task, tmp_path):
    run, _ = finished
    rows = tmp_path / "choices.tsv"
    rows.write_text("context\ta\tb\tlabel\nx\ty\tz\t0\nx\ty\tz\t1\n")
    overrides = ["--task.kind", "multiple_choice", "--task.texts", "context", "a", "b", "--task.labels", "0", "1"]
    overrides += ["--task.validation", str(rows)]
    message = mistake(evaluate.evaluate_task, run, overrides, "validation", None, print)
    assert "2 classes" in message
    assert "2 answers" in message
    assert "has no test rows" in mistake(evaluate.evaluate_task, run, ["--task.test", ""], "test", None, print)


def test_one_seed_and_several_do_not_share_a_folder(finished, config, tmp_path):
    run, _ = finished
    assert "holds a run of one seed" in mistake(finetune_seeds, config, run, 2)
    (tmp_path / "many" / "seed-0").mkdir(parents=True)
    assert "holds runs of several seeds" in mistake(finetune, config, tmp_path / "many")


def test_other_data_are_refused(finished, config, own_task, tmp_path):
    run, _ = finished
    rows = tmp_path / "train.tsv"
    rows.write_text(Path(own_task["train"]).read_text() + "aaaa\tyes\n")
    changed = dataclasses.replace(config, task=dataclasses.replace(config.task, train=str(rows)))
    before = (run / "config.json").read_bytes()
    assert "was trained on other data" in mistake(finetune, changed, run)
    assert (run / "config.json").read_bytes() == before


def test_a_finished_run_is_left_as_it_is(finished, config):
    run, result = finished
    before = {path: path.read_bytes() for path in (run / "config.json", run / "metrics.jsonl", run / "result.json")}
    again = dataclasses.replace(config, train=dataclasses.replace(config.train, keep_latest=8))
    assert finetune(again, run) == result
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (TransferConfig(), "--init.from: say which run or checkpoint to fine-tune, or none"),
        (TransferConfig("none"), "--init.like: say whose architecture"),
        (TransferConfig("none", like="gpt1"), "--init.tokenizer: give the folder of the gpt1 tokenizer"),
        (TransferConfig("none", like="gpt1", tokenizer="nowhere"), "--init.tokenizer: 'nowhere' lacks"),
        (TransferConfig("none", like="gtp1"), "did you mean gpt1"),
        (TransferConfig("none", like="finetune/cola"), "--init.like: 'finetune/cola' is a fine-tuning config"),
        (TransferConfig("nowhere"), "nowhere: no such folder"),
    ],
)
def test_an_origin_that_is_none_is_refused(own_task, init, message, tmp_path):
    assert message in mistake(finetune, make_config(own_task, init), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_with_another_models_tokenizer_is_refused(pretrained, tmp_path, monkeypatch):
    class Larger(Bytes):
        vocab_size = 258

    monkeypatch.setattr(tokenizers, "load", lambda folder: Larger())
    message = mistake(find_source, TransferConfig(str(pretrained)), print)
    assert "its model has 257 entries and its tokenizer 258" in message


def test_several_seeds_are_shown_with_their_spread(capsys):
    result = {"seeds": [0, 1, 2], "validation": {"accuracy": spread([0.5, 0.7, 0.9]), "loss": spread([2.0, 1.0, 1.5])}}
    show_spread(result)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["of", "3", "seeds", "metric", "median", "mean", "deviation", "lowest", "highest"],
        ["validation", "accuracy,", "%", "70.0", "70.0", "20.0", "50.0", "90.0"],
        ["validation", "loss,", "nats", "1.500", "1.500", "0.500", "1.000", "2.000"],
    ]


def test_bad_tasks_are_refused_before_anything_is_trained(own_task, pretrained, tmp_path):
    init = TransferConfig(str(pretrained))
    run = tmp_path / "run"
    assert "did you mean cola" in mistake(finetune, make_config({"name": "coal"}, init), run)
    assert "--task.max-tokens: 64 is more than the model's context of 32" in mistake(
        finetune, make_config(own_task, init, max_tokens=64), run
    )
    assert "has no validation rows" in mistake(finetune, make_config({"train": own_task["train"]}, init), run)
    assert "--init.blocks: the checkpoint has 2 blocks, not 3" in mistake(
        finetune, make_config(own_task, dataclasses.replace(init, blocks=3)), run
    )
    rows = tmp_path / "one.tsv"
    rows.write_text("text\tlabel\nabc\tyes\nabd\tmaybe\n")
    message = mistake(finetune, make_config(own_task | {"validation": str(rows)}, init), run)
    assert message.startswith(f"{rows}:3: ")
    assert "maybe" in message
    assert not run.exists()


def test_the_command_line_fine_tunes_evaluates_and_reports(pretrained, own_task, tmp_path, capsys):
    config = tmp_path / "own.py"
    config.write_text(
        "from gpt_jax.config import FinetuneConfig, FinetuneLoopConfig, TaskConfig\n"
        "def config():\n"
        f"    return FinetuneConfig(task=TaskConfig(train={own_task['train']!r}, validation={own_task['validation']!r}),\n"
        "        train=FinetuneLoopConfig(batch_size=8, duration='2 steps', tensorboard=False))\n"
    )
    schemas = tmp_path / "schemas.txt"
    schemas.write_text("The bee saw the cup as it fell.\nit\nThe bee,the cup\nthe cup\n")
    run = str(tmp_path / "run")
    assert main(["finetune", str(config), "--init.from", str(pretrained), "--workdir", run]) == 0
    assert main(["evaluate", run, "--split", "validation"]) == 0
    out = capsys.readouterr().out
    assert "accuracy" in out
    assert main(["generate", run, "--prompt", "abc", "--tokens", "3"]) == 0
    capsys.readouterr()
    assert main(["pretrain", str(config), "--workdir", run]) == 2
    assert "is a config for gpt-jax finetune" in capsys.readouterr().err
    assert main(["evaluate", str(pretrained)]) == 2
    assert "is a pre-trained model" in capsys.readouterr().err
    assert main(["evaluate", run, "--zero-shot", f"dprd={schemas}"]) == 2
    assert "is a fine-tuned model" in capsys.readouterr().err
    assert main(["report", "--paper", run]) == 2
    assert "your own" in capsys.readouterr().err
    assert main(["finetune", str(config), "--init.from", str(pretrained)]) == 2
    assert main(["finetune", str(config), "--init.from", str(pretrained), "--workdir", run, "--task.lm-weight", "0"]) == 2
    assert "--task.lm-weight 0.0 (was 0.5)" in capsys.readouterr().err
