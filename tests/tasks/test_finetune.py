"""A whole fine-tuning: from a checkpoint to scores, resumed bit for bit, from random parameters, and with mistakes."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
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
from gpt_jax.data.tokenizers import Bytes
from gpt_jax.errors import UserError
from gpt_jax.experiments.score_tables import print_seed_scores
from gpt_jax.model import transformer
from gpt_jax.tasks import evaluate
from gpt_jax.tasks import finetune as finetuning
from gpt_jax.tasks.finetune import finetune, finetune_seeds, spread
from gpt_jax.tasks.init_source import find_init, resolve_config
from gpt_jax.tasks.registry import task_from_config
from gpt_jax.train.checkpoint_info import list_checkpoints
from gpt_jax.train.optimizer import learning_rate
from gpt_jax.train.restore import load_model
from gpt_jax.train.schedule import resolve_schedule
from tests.tiny import replace_fields, write_config

TINY = FinetuneConfig(
    model=ModelOptions(compute_dtype="float32"),
    data=PipelineConfig(pipeline="threads"),
    optim=OptimConfig(peak_lr=0.03, schedule="linear", warmup="10%", clip_norm=1.0),
    train=FinetuneLoopConfig(
        batch_size=8, duration="4 epochs", eval_every="2 epochs", save_every="8 steps", keep_latest=9, tensorboard=False
    ),
    task=TaskConfig(num_length_buckets=1),
)
"""Twenty updates on the 40 rows of `own_task`, in batches of one length, so that little is compiled."""

PLAIN = {
    "model": {"embed_dropout": 0.0, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "task": {"classifier_dropout": 0.0, "lm_weight": 0.0},
    "train": {"duration": "2 steps"},
}
"""Fields of two updates without dropout and without the auxiliary loss, which are compiled faster."""


def make_config(task, init, **task_fields):
    return dataclasses.replace(replace_fields(TINY, task=task | task_fields), init=init)


@pytest.fixture(scope="module")
def config(pretrained, own_task):
    return make_config(own_task, TransferConfig(str(pretrained)))


@pytest.fixture(scope="module")
def config_file(own_task, tmp_path_factory):
    """The path of a file with that config, without the checkpoint that it starts from."""
    return write_config(make_config(own_task, TransferConfig()), tmp_path_factory.mktemp("config") / "own.py")


@pytest.fixture(scope="module")
def finished(pretrained, config_file, tmp_path_factory):
    """The folder and the result of a fine-tuning by the command line."""
    run = tmp_path_factory.mktemp("finetune") / "run"
    assert main(["finetune", str(config_file), "--init.from", str(pretrained), "--workdir", str(run)]) == 0
    return run, read_result(run)


def read_result(run):
    return json.loads((run / "result.json").read_text())


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def trajectory(run):
    """Returns the records of updates and evaluations, without what differs between attempts; equal text means equal bits."""
    records = [json.loads(line, parse_float=str) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in record.items() if name not in ("time", "attempt")}
        for record in records
        if record["kind"] in ("train", "eval")
    ]


def error_of(function, *arguments):
    """Returns the message of the `UserError` that a call ends in, which is one line."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- a run and its result ---------------------------------------------------------------------------------------------------


def test_a_finished_folder_has_scores_predictions_and_the_best_checkpoint(finished):
    run, result = finished
    assert result["step"] == 20
    assert result["counts"]["train"] == {"read": 40, "used": 40, "truncated": 0}
    assert set(result["padding"]) == {"train", "validation"}
    stored = json.loads((run / "config.json").read_text())
    assert (stored["platform"], stored["devices"]) == ("cpu", "8 x cpu")
    scores = {record["step"]: record for record in read_lines(run / "metrics.jsonl") if record["kind"] == "eval"}
    assert set(scores) == {10, 20}
    best = max(scores.values(), key=lambda record: (record["accuracy"], -record["step"]))
    assert result["best_step"] == best["step"]
    assert result["validation"]["accuracy"] == best["accuracy"]
    assert (run / "checkpoints" / str(best["step"])).is_dir()
    rows = read_lines(run / "predictions" / "test.jsonl")
    assert len(rows) == 10
    correct = [row["gold"] == row["prediction"] for row in rows]
    assert np.mean(correct) == pytest.approx(result["test"]["accuracy"])
    for row in rows:
        assert sum(row["probabilities"]) == pytest.approx(1, abs=1e-5)
        assert row["prediction"] == ["no", "yes"][int(np.argmax(row["probabilities"]))]


def test_the_task_is_learned(finished):
    _, result = finished
    assert result["validation"]["accuracy"] > 0.9
    assert result["validation"]["loss"] < 0.2


def test_the_best_checkpoint_is_scored_although_training_went_on(config, own_task, tmp_path):
    """The labels of validation and test are swapped, so the first evaluation is the best and the last one the worst."""
    swapped = {}
    for split in ("validation", "test"):
        swapped[split] = str(tmp_path / f"{split}.tsv")
        rows = Path(own_task[split]).read_text()
        Path(swapped[split]).write_text(rows.replace("yes", "?").replace("no", "yes").replace("?", "no"))
    run = tmp_path / "run"
    often = {"eval_every": "1 epochs", "save_every": "20 steps", "keep_latest": 20}
    result = finetune(replace_fields(config, task=swapped, train=often), run)
    accuracies = {record["step"]: record["accuracy"] for record in read_lines(run / "metrics.jsonl") if record["kind"] == "eval"}
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


def test_evaluations_in_the_first_epoch_and_the_first_of_equal_checkpoints(config, tmp_path, monkeypatch):
    """The epoch has five updates. The rate is so small that all evaluations are equal."""
    assert finetuning.RELEASED_EVALS == (1000, 2000, 4000, 8000, 16_000, 32_000)
    assert not FinetuneConfig().train.eval_in_first_epoch
    monkeypatch.setattr(finetuning, "RELEASED_EVALS", (1, 2, 4, 8))
    train = {"duration": "2 epochs", "eval_in_first_epoch": True, "save_every": "10 steps", "keep_latest": 1}
    result = finetune(replace_fields(config, **PLAIN | {"train": train}, optim={"peak_lr": 1e-12}), tmp_path)
    evaluations = {
        record["step"]: record["accuracy"] for record in read_lines(tmp_path / "metrics.jsonl") if record["kind"] == "eval"
    }
    assert list(evaluations) == [1, 2, 4, 10]
    assert len(set(evaluations.values())) == 1
    assert result["best_step"] == 1
    assert [info.step for info in list_checkpoints(tmp_path)] == [1, 10]


def test_a_resumed_run_equals_the_uninterrupted_one_although_its_source_is_gone(finished, config, tmp_path, capsys):
    run, result = finished
    again = tmp_path / "again"
    shutil.copytree(run, again)
    for info in list_checkpoints(again):
        if info.step > 8:
            shutil.rmtree(info.path)
    (again / "result.json").unlink()
    gone = TransferConfig(str(tmp_path / "gone"))
    resumed = finetune(dataclasses.replace(config, init=gone), again)
    assert f"continuing with the model and the tokenizer of {again}/checkpoints/8 ({tmp_path}/gone: no such folder; " in (
        capsys.readouterr().err
    )
    start = json.loads((run / "config.json").read_text())["init"]
    assert json.loads((again / "config.json").read_text())["init"] == start
    assert resumed == read_result(again)
    assert trajectory(again) == trajectory(run)
    timeless = lambda scores: {k: v for k, v in scores.items() if "second" not in k and k != "init"}  # noqa: E731
    assert timeless(resumed) == timeless(result)
    superseded = (again / "metrics.superseded.jsonl").read_text().splitlines()
    assert min(json.loads(line)["step"] for line in superseded) == 9


def test_batches_of_several_lengths_compute_what_batches_of_one_length_compute(finished, config, tmp_path):
    """With two length buckets, shorter batches have less padding, and padding changes nothing but rounding."""
    run, result = finished
    bucketed = finetune(replace_fields(config, task={"num_length_buckets": 2}, train={"save_every": "20 steps"}), tmp_path)
    assert bucketed["padding"]["train"] < result["padding"]["train"] - 0.05
    one, several = trajectory(run), trajectory(tmp_path)
    assert [(record["kind"], record["step"]) for record in several] == [(record["kind"], record["step"]) for record in one]
    for expected, record in zip(one, several, strict=True):
        assert float(record["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-4)


def test_a_finished_run_is_left_as_it_is(finished, config):
    run, result = finished
    before = {path: path.read_bytes() for path in (run / "config.json", run / "metrics.jsonl", run / "result.json")}
    assert finetune(replace_fields(config, train={"keep_latest": 8}), run) == result
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("change", ["moved", "gone", "its tokenizer is gone", "all was moved", "its checkpoint was copied out"])
def test_a_finished_run_shows_its_result_wherever_its_source_is(finished, pretrained, config_file, tmp_path, capsys, change):
    """The labels, the special tokens, the architecture and the tokenizer are those of the run's own checkpoint."""
    run, result = finished
    source = shutil.copytree(pretrained, tmp_path / "source")
    if change == "gone":
        shutil.rmtree(source)
    elif change == "its tokenizer is gone":
        for folder in (source, *(source / "checkpoints").iterdir()):
            shutil.rmtree(folder / "tokenizer")
    elif change == "all was moved":
        run = shutil.copytree(run, tmp_path / "run")
    elif change == "its checkpoint was copied out":
        source = (source / "checkpoints" / "2").rename(tmp_path / "best-model")
    before = {path: path.read_bytes() for path in run.rglob("*.json")}
    assert main(["finetune", str(config_file), "--init.from", str(source), "--workdir", str(run)]) == 0
    log = capsys.readouterr().err.splitlines()
    assert log[-2:] == [f"{run}: already finished at step 20; nothing to do", f"done: {run}: {describe(result)}"]
    assert any(line.startswith(f"continuing with the model and the tokenizer of {run}/checkpoints/20") for line in log) == (
        "gone" in change
    )
    assert {path: path.read_bytes() for path in run.rglob("*.json")} == before


def describe(result):
    scores = [f"{split} accuracy {result[split]['accuracy']:.4f}" for split in ("validation", "test")]
    return f"checkpoint {result['best_step']} is the best: {'; '.join(scores)}"


def test_another_source_is_refused_although_its_architecture_is_the_same(finished, pretrained, config, tmp_path):
    run, _ = finished
    before = (run / "config.json").read_bytes()
    other = dataclasses.replace(config, init=TransferConfig(str(pretrained / "checkpoints" / "1")))
    message = error_of(finetune, other, run)
    assert message.startswith(f"{run} contains a run that started from {pretrained} (checkpoint 2, fingerprint ")
    assert f"), but --init.from is {pretrained}/checkpoints/1 (checkpoint 1, fingerprint " in message
    assert message.endswith("Use another --workdir, or add --allow-changes if this is intended")
    random = dataclasses.replace(config, init=TransferConfig("none", like=str(pretrained)))
    assert "), but --init.from is random parameters. " in error_of(finetune, random, run)
    assert (run / "config.json").read_bytes() == before
    assert finetune(other, run, allow_changes=True) == read_result(run)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"step": "20"}, "'step' is a string, not a whole number of at least 0"),
        ({"best_step": "../20"}, "'best_step' is a string, not a whole number of at least 0"),
        ({"validation": []}, "'validation' is a list, not an object"),
        ({"validation": {"accuracy": "high"}}, "'validation.accuracy' is a string, not a floating-point number"),
        ({"test": {"accuracy": [1]}}, "'test.accuracy' is a list, not a floating-point number"),
    ],
)
def test_a_result_with_bad_values_is_one_line(finished, config, tmp_path, content, problem):
    run = shutil.copytree(finished[0], tmp_path / "run")
    (run / "result.json").write_text(json.dumps(finished[1] | content))
    assert error_of(finetune, config, run) == f"{run}/result.json: {problem}; it has changed since it was written"
    if "best_step" in content:
        assert problem in error_of(evaluate.best_checkpoint, run)


def test_a_renamed_best_checkpoint_is_still_the_best(finished, tmp_path):
    run = shutil.copytree(finished[0], tmp_path / "run")
    best = run / "checkpoints" / str(finished[1]["best_step"])
    assert evaluate.best_checkpoint(run) == best
    best.rename(run / "checkpoints" / "best")
    assert evaluate.best_checkpoint(run) == run / "checkpoints" / "best"
    shutil.rmtree(run / "checkpoints" / "best")
    message = f"{run}: checkpoint {best.name} no longer exists; name the folder of another one"
    assert error_of(evaluate.best_checkpoint, run) == message


@pytest.mark.parametrize(("examples", "rates"), [(2490, [0.0, 1.0]), (8551, [0.0, 1 / 1.602])])
def test_the_warm_up_of_a_short_run_is_a_fraction_of_an_update(examples, rates):
    """It is 0.2 % of RTE's 231 updates and of CoLA's 801; the first update has rate 0 in both."""
    total_steps, warmup_steps, *_ = resolve_schedule(FinetuneConfig(), None, examples // 32 * 32)
    assert warmup_steps == pytest.approx(0.002 * total_steps)
    for step, rate in enumerate(rates):
        expected = 6.25e-5 * rate * (1 - step / total_steps)
        computed = learning_rate(FinetuneConfig().optim, total_steps, warmup_steps, step)
        assert float(computed) == pytest.approx(expected, rel=1e-3)


# -- evaluation -------------------------------------------------------------------------------------------------------------


def test_evaluate_gives_the_scores_of_the_best_checkpoint(finished, own_task, tmp_path):
    run, result = finished
    scores = evaluate.evaluate_task(run, [], "test", tmp_path / "out", print)
    assert scores == pytest.approx(result["test"], abs=1e-6)
    written = read_lines(tmp_path / "out" / "test.jsonl")
    before = read_lines(run / "predictions" / "test.jsonl")
    assert [row["prediction"] for row in written] == [row["prediction"] for row in before]
    other = evaluate.evaluate_task(run, ["--task.validation", own_task["test"], "--task.test", ""], "validation", None, print)
    assert other == pytest.approx(result["test"], abs=1e-6)


@pytest.mark.parametrize("tuned", [False, True], ids=["pretrained", "fine-tuned"])
def test_perplexity_is_that_of_the_network_without_the_head(pretrained, finished, tmp_path, tuned):
    run = finished[0] if tuned else pretrained
    text = "abc def gab " * 40
    (tmp_path / "text.txt").write_text(text)
    scores = evaluate.evaluate_text(run, evaluate.text_config(str(tmp_path / "text.txt"), []), print)
    assert scores["bytes"] == 480
    assert scores["perplexity"] == pytest.approx(np.exp(scores["loss"]))
    assert scores["bits_per_byte"] == pytest.approx(scores["loss"] / np.log(2))  # One token a byte; the last one ends the text.

    restored = load_model(run)
    model = restored.config.model
    assert model.vocab_size == 257 + 3 * tuned  # A fine-tuning adds the special tokens.
    tokens = jnp.array([*text.encode(), 256], jnp.int32)
    inputs, targets = jnp.stack([tokens[:-1], tokens[1:]]).reshape(2, -1, model.context_length)
    params = jax.device_put(restored.params, jax.devices()[0])
    logs = jax.nn.log_softmax(transformer.logits(model, params, transformer.apply(model, params, inputs)))
    loss = -jnp.take_along_axis(logs, targets[..., None], -1).mean()
    assert scores["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_a_hidden_test_of_glue_is_predicted_and_not_scored(pretrained, tmp_path, capsys):
    folder = tmp_path / "CoLA"
    folder.mkdir()
    for split, size in (("train", 16), ("dev", 6)):
        rows = [f"src\t{k % 2}\t\t{'ab'[k % 2] * (k + 3)}" for k in range(size)]
        (folder / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    (folder / "test.tsv").write_text("index\tsentence\n0\taaaa\n1\tbbbb\n2\tbaba\n")
    run = tmp_path / "run"
    cola = make_config({"name": "cola", "path": str(folder)}, TransferConfig(str(pretrained)))
    result = finetune(replace_fields(cola, **PLAIN), run)
    assert "test" not in result
    predicted = [row["prediction"] for row in read_lines(run / "predictions" / "test.jsonl")]
    submitted = (run / "predictions" / "CoLA.tsv").read_text().splitlines()
    assert submitted == ["index\tprediction", *(f"{index}\t{label}" for index, label in enumerate(predicted))]
    assert len(predicted) == 3
    assert main(["evaluate", str(run), "--split", "test"]) == 2
    assert "predictions can be written with --out FOLDER" in capsys.readouterr().err
    out = tmp_path / "out"
    assert main(["evaluate", str(run), "--split", "test", "--out", str(out)]) == 0
    assert f"predictions: {out}/test.jsonl, {out}/CoLA.tsv" in capsys.readouterr().err
    assert (out / "CoLA.tsv").read_bytes() == (run / "predictions" / "CoLA.tsv").read_bytes()


def test_outputs_of_another_kind_are_refused(finished, tmp_path):
    run, _ = finished
    rows = tmp_path / "choices.tsv"
    rows.write_text("context\ta\tb\tlabel\nx\ty\tz\t0\nx\ty\tz\t1\n")
    overrides = ["--task.kind", "multiple_choice", "--task.texts", "context", "a", "b", "--task.labels", "0", "1"]
    overrides += ["--task.validation", str(rows)]
    message = error_of(evaluate.evaluate_task, run, overrides, "validation", None, print)
    assert "2 classes" in message
    assert "2 answers" in message
    assert "has no test rows" in error_of(evaluate.evaluate_task, run, ["--task.test", ""], "test", None, print)


def test_the_command_line_evaluates_and_refuses(finished, config_file, pretrained, tmp_path, capsys):
    run = str(finished[0])

    def succeed(*words):
        capsys.readouterr()
        assert main(list(words)) == 0
        return capsys.readouterr().out

    def fail(*words):
        capsys.readouterr()
        assert main(list(words)) == 2
        output, error = capsys.readouterr()
        assert output == ""
        assert error.splitlines()[-1].startswith("gpt-jax: ")
        return error.splitlines()[-1]

    schemas = tmp_path / "schemas.txt"
    schemas.write_text("The bee saw the cup as it fell.\nit\nThe bee,the cup\nthe cup\n")
    accuracy = finished[1]["validation"]["accuracy"]
    assert ["accuracy", f"{accuracy:.4f}"] in [
        line.split() for line in succeed("evaluate", run, "--split", "validation").splitlines()
    ]
    assert succeed("generate", run, "--prompt", "abc", "--tokens", "3").startswith("abc")
    assert "is a config for gpt-jax finetune" in fail("pretrain", str(config_file), "--workdir", run)
    assert "is a pre-trained model" in fail("evaluate", str(pretrained))
    assert "is a fine-tuned model" in fail("evaluate", run, "--zero-shot", f"dprd={schemas}")
    assert "your own" in fail("report", "--paper", run)
    finetune_again = ("finetune", str(config_file), "--init.from", str(pretrained))
    assert "--workdir: name the folder for the run" in fail(*finetune_again)
    assert "--task.lm-weight 0.0 (was 0.5)" in fail(*finetune_again, "--workdir", run, "--task.lm-weight", "0")


# -- several seeds ----------------------------------------------------------------------------------------------------------


def test_seeds_are_runs_of_their_own_with_one_summary(own_task, pretrained, tmp_path):
    config = make_config(own_task, TransferConfig("none", like=str(pretrained)))
    result = finetune_seeds(replace_fields(config, **PLAIN), tmp_path, 2)
    losses = [read_result(tmp_path / f"seed-{seed}")["validation"]["loss"] for seed in (0, 1)]
    assert losses[0] != losses[1]
    assert result["validation"]["loss"]["values"] == losses
    assert result["validation"]["loss"]["median"] == pytest.approx(np.mean(losses))
    assert result["validation"]["loss"]["std"] == pytest.approx(np.std(losses, ddof=1))
    assert read_result(tmp_path) == result
    # Runs that have begun do not need the model that they started from.
    gone = dataclasses.replace(replace_fields(config, **PLAIN), init=TransferConfig("none", like=str(tmp_path / "gone")))
    assert finetune_seeds(gone, tmp_path, 2)["validation"] == result["validation"]
    assert f"--init.like: there is no folder '{tmp_path}/gone', and no config " in error_of(finetune_seeds, gone, tmp_path, 3)
    assert not (tmp_path / "seed-2").exists()


def test_one_seed_and_several_do_not_share_a_folder(finished, config, tmp_path):
    run, _ = finished
    assert "contains a run of one seed" in error_of(finetune_seeds, config, run, 2)
    (tmp_path / "many" / "seed-0").mkdir(parents=True)
    assert "contains runs of several seeds" in error_of(finetune, config, tmp_path / "many")


def test_several_seeds_are_shown_with_their_spread(capsys):
    result = {"seeds": [0, 1, 2], "validation": {"accuracy": spread([0.5, 0.7, 0.9]), "loss": spread([2.0, 1.0, 1.5])}}
    print_seed_scores(result)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["of", "3", "seeds", "metric", "median", "mean", "deviation", "lowest", "highest"],
        ["validation", "accuracy,", "%", "70.0", "70.0", "20.0", "50.0", "90.0"],
        ["validation", "loss,", "nats", "1.500", "1.500", "0.500", "1.000", "2.000"],
    ]


# -- what a run starts from -------------------------------------------------------------------------------------------------


def test_the_config_takes_its_architecture_from_the_source_and_its_labels_from_the_data(own_task, pretrained):
    """Blocks that start at random are initialized like those of the checkpoint, not like the paper's."""
    source = find_init(TransferConfig("none", like=str(pretrained)), print)
    config = make_config(own_task, TransferConfig("none", like=str(pretrained)))
    different = source._replace(model=dataclasses.replace(source.model, init_stddev=0.3))
    resolved = resolve_config(config, task_from_config(config.task), different.architecture)
    assert resolved.model.init_stddev == 0.3
    assert resolved.model.vocab_size == 257 + 3
    assert resolved.task.labels == ("no", "yes")


def test_other_data_are_refused(finished, config, own_task, tmp_path):
    run, _ = finished
    rows = tmp_path / "train.tsv"
    rows.write_text(Path(own_task["train"]).read_text() + "aaaa\tyes\n")
    before = (run / "config.json").read_bytes()
    assert "was trained on different data" in error_of(finetune, replace_fields(config, task={"train": str(rows)}), run)
    assert (run / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (TransferConfig(), "--init.from: name the run or checkpoint to fine-tune, or write none"),
        (TransferConfig("none"), "--init.like: name the run, checkpoint or config whose architecture"),
        (TransferConfig("none", like="gpt1"), "--init.tokenizer: name the folder of the gpt1 tokenizer"),
        (TransferConfig("none", like="gpt1", tokenizer="nowhere"), "--init.tokenizer: 'nowhere' lacks"),
        (TransferConfig("none", like="gtp1"), "did you mean gpt1"),
        (TransferConfig("none", like="finetune/cola"), "--init.like: 'finetune/cola' is a fine-tuning config"),
        (TransferConfig("nowhere"), "nowhere: no such folder"),
    ],
)
def test_a_source_that_does_not_exist_is_refused(own_task, init, message, tmp_path):
    assert message in error_of(finetune, make_config(own_task, init), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_with_another_models_tokenizer_is_refused(pretrained, monkeypatch):
    class Larger(Bytes):
        vocab_size = 258

    monkeypatch.setattr("gpt_jax.tasks.init_source.load_tokenizer", lambda folder: Larger())
    message = error_of(find_init, TransferConfig(str(pretrained)), print)
    assert "its model has 257 entries and its tokenizer 258" in message


def test_bad_tasks_are_refused_before_anything_is_trained(own_task, pretrained, tmp_path):
    init = TransferConfig(str(pretrained))
    run = tmp_path / "run"
    assert "did you mean cola" in error_of(finetune, make_config({"name": "coal"}, init), run)
    assert "--task.max-tokens: 64 is more than the model's context of 32" in error_of(
        finetune, make_config(own_task, init, max_tokens=64), run
    )
    assert "has no validation rows" in error_of(finetune, make_config({"train": own_task["train"]}, init), run)
    assert "--init.blocks: the checkpoint has 2 blocks, not 3" in error_of(
        finetune, make_config(own_task, dataclasses.replace(init, blocks=3)), run
    )
    rows = tmp_path / "one.tsv"
    rows.write_text("text\tlabel\nabc\tyes\nabd\tmaybe\n")
    message = error_of(finetune, make_config(own_task | {"validation": str(rows)}, init), run)
    assert message.startswith(f"{rows}:3: ")
    assert "maybe" in message
    assert not run.exists()
