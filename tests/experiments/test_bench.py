"""Benchmarks: every way is measured, on the same examples."""

import pytest

from gpt_jax.cli import main
from gpt_jax.experiments.bench import bench_input


def test_the_input_pipeline_is_timed_for_every_batch_size(pretrained, capsys):
    bench_input(pretrained / "store", context_length=32, batch_sizes=(4, 8), seconds=0.02, kinds=("threads",))
    title, header, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith(f"{pretrained / 'store'}, ")
    assert header.split("  ")[0] == "pipeline"
    assert [line.split()[:2] for line in rows] == [["threads", "4"], ["threads", "8"]]
    assert all(float(line.split()[2]) > 0 for line in rows)


@pytest.mark.slow
def test_padding_is_timed_three_ways_on_the_same_examples(config_file, pretrained, capsys):
    arguments = ["--config", config_file, "--init.from", str(pretrained), "--train.batch-size", "16"]
    assert main(["bench", "padding", *arguments]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "%" in line]
    padding = [float(next(word for word in line.split() if word.endswith("%"))[:-1]) for line in lines]
    assert len(lines) == 3
    assert lines[0].startswith("grouped, 1 lengths")
    assert padding[2] > padding[0]
    assert all(float(line.split()[-1]) > 0 for line in lines)
