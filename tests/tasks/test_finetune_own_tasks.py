"""Users' own tasks from tables to predictions: joined columns, a regression in a range of its own, and chosen metrics."""

import dataclasses
import json
import random

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score

from gpt_jax.config import FinetuneConfig, FinetuneLoopConfig, ModelOptions, PipelineConfig, TaskConfig, TransferConfig
from gpt_jax.config.load import apply_overrides
from gpt_jax.errors import UserError
from gpt_jax.tasks import evaluate
from gpt_jax.tasks.finetune import finetune

CONFIG = FinetuneConfig(
    model=ModelOptions(compute_dtype="float32", embed_dropout=0.0, attention_dropout=0.0, residual_dropout=0.0),
    data=PipelineConfig(pipeline="threads"),
    train=FinetuneLoopConfig(batch_size=8, duration="2 steps", eval_every="2 steps", save_every="2 steps", tensorboard=False),
    task=TaskConfig(num_length_buckets=1, lm_weight=0.0, classifier_dropout=0.0),
)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """The paths of three tables with titles (some are empty), bodies, scores from -1 to 2, and two classes."""
    folder = tmp_path_factory.mktemp("tables")
    rng = random.Random(0)
    for split, size in (("train", 16), ("validation", 10), ("test", 9)):
        rows = [["title;body;score;class"]]
        for number in range(size):
            score = rng.randint(-4, 8) / 4
            rows.append([f"{rng.choice(['', 'aa', 'Title'])};{'b' * (number + 3)};{score};{'high' if score > 0 else 'low'}"])
        (folder / f"{split}.csv").write_text("\r\n".join(row for (row,) in rows))
    return {split: str(folder / f"{split}.csv") for split in ("train", "validation", "test")}


def run_task(pretrained, workdir, **task):
    config = dataclasses.replace(CONFIG, init=TransferConfig(str(pretrained)), task=dataclasses.replace(CONFIG.task, **task))
    return finetune(config, workdir)


def read_predictions(workdir, split="test"):
    return [json.loads(line) for line in (workdir / "predictions" / f"{split}.jsonl").read_text().splitlines()]


def test_a_regression_over_joined_columns(pretrained, tables, tmp_path):
    run = tmp_path / "run"
    result = run_task(pretrained, run, **tables, texts=("title+body",), label="score", score_range=(-1, 2))
    assert set(result["test"]) == {"pearson", "spearman", "loss"}
    rows = read_predictions(run)
    assert len(rows) == 9
    predictions, gold = [row["prediction"] for row in rows], [row["gold"] for row in rows]
    np.testing.assert_allclose(predictions, [np.dot(row["probabilities"], [-1, 0, 1, 2]) for row in rows], atol=1e-5)
    assert result["test"]["pearson"] == pytest.approx(stats.pearsonr(gold, predictions).statistic)
    assert min(gold) < 0 < max(gold)
    scores = evaluate.evaluate_task(run, [], "validation", None, print)
    assert scores == pytest.approx(result["validation"], rel=1e-4)  # other devices and batches round differently
    stored = json.loads((run / "config.json").read_text())["config"]["task"]
    assert (stored["score_range"], stored["labels"], stored["texts"]) == ([-1, 2], [], ["title+body"])
    with pytest.raises(UserError, match=r"\(scores from -1 to 2\), not of own task \(scores from 0 to 3\)$"):
        evaluate.evaluate_task(run, ["--task.score-range", "0", "3"], "validation", None, print)


@pytest.mark.slow
def test_the_first_metric_is_chosen_and_all_are_reported(pretrained, tables, tmp_path):
    metrics = {"metrics": ("f1", "matthews"), "labels": ("low", "high")}
    result = run_task(pretrained, tmp_path / "run", **tables, texts=("body",), label="class", **metrics)
    assert set(result["validation"]) == {"f1", "matthews", "loss"}
    rows = read_predictions(tmp_path / "run")
    high = [[row[name] == "high" for row in rows] for name in ("gold", "prediction")]
    assert result["test"]["f1"] == pytest.approx(f1_score(*high, zero_division=0.0))


def test_the_fields_can_be_set_on_the_command_line(tables):
    words = [
        "--task.texts",
        "title+body",
        "--task.score-range",
        "-1",
        "2",
        "--task.metrics",
        "spearman",
        "--task.train",
        tables["train"],
    ]
    task = apply_overrides(CONFIG, words, "gpt-jax finetune CONFIG").task
    assert (task.texts, task.score_range, task.metrics) == (("title+body",), (-1, 2), ("spearman",))
    with pytest.raises(UserError, match=r"^--task.score-range: \(0, 'high'\) is not a tuple of whole numbers$"):
        apply_overrides(CONFIG, ["--task.score-range", "0", "high"], "gpt-jax finetune CONFIG")
