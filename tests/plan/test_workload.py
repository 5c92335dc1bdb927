"""Workloads: the batches of training runs are counted by hand, and the shape of generated text is checked."""

import subprocess
import sys

import pytest

from gpt_jax.config.load import apply_overrides, load_config
from gpt_jax.errors import UserError
from gpt_jax.plan.workload import workload_of
from gpt_jax.runtime.accelerators import parse_accelerator

BLOCKS = 12 * (4 * 768**2 + 2 * 768 * 3072)
"""Weights in the blocks of gpt1."""
LIKE = ("--init.from=none", "--init.like=gpt1")


def plan_of(config, *overrides, generate=None):
    return workload_of(apply_overrides(load_config(config), list(overrides), "test"), generate)


def test_a_pre_training_has_the_batch_of_its_config():
    workload = plan_of("gpt1", "--train.batch-size=48", "--train.grad-accum-steps=3")
    assert (workload.verb, workload.rows, workload.examples, workload.length) == ("pretrain", 48, 48, 512)
    assert (workload.micro_batches, workload.new_tokens, workload.task) == (3, 0, None)
    vocabulary = workload.config.model.vocab_size
    assert workload.flops == 48 * 512 * (6 * (BLOCKS + vocabulary * 768) + 12 * 12 * 768 * 512)


@pytest.mark.parametrize(
    ("name", "sequences"),
    [("sst2", 1), ("rte", 1), ("stsb", 2), ("race", 4), ("story_cloze", 2)],  # Figure 1 of the paper
)
def test_the_sequences_of_an_example_follow_from_the_task(name, sequences):
    workload = plan_of(f"finetune/{name}", *LIKE)
    examples = workload.config.train.batch_size
    assert (workload.verb, workload.examples, workload.rows) == ("finetune", examples, sequences * examples)
    assert workload.length == 512
    assert workload.config.model.vocab_size == load_config("gpt1").model.vocab_size + 3  # start, delimiter, extract


def test_a_fine_tuning_without_a_language_model_loss_has_no_output_layer():
    workload = plan_of("finetune/rte", *LIKE, "--task.max-tokens=100", "--train.batch-size=4")
    model = workload.config.model
    weights = BLOCKS + model.vocab_size * 768
    assert workload.flops == 4 * 100 * (6 * weights + 12 * 12 * 768 * 100)
    alone = plan_of("finetune/rte", *LIKE, "--task.max-tokens=100", "--train.batch-size=4", "--task.lm-weight=0")
    assert alone.flops == 4 * 100 * (6 * BLOCKS + 12 * 12 * 768 * 100)


def test_a_task_of_ones_own_needs_no_rows_if_its_labels_are_given():
    words = ("--task.kind=similarity", "--task.texts", "a", "b", "--task.labels", "x", "y", "z")
    workload = plan_of("finetune/own", *LIKE, "--task.train=absent.tsv", "--task.validation=absent.tsv", *words)
    assert workload.rows == 2 * workload.examples
    assert len(workload.task.labels) == 3


def test_the_operations_of_generation():
    """A third of training's: prompts without the output layer, and tokens that attend to those before them."""
    workload = plan_of("gpt1", generate="3x10+20")
    assert (workload.rows, workload.length, workload.new_tokens, workload.micro_batches) == (3, 10, 20, 1)
    vocabulary = workload.config.model.vocab_size
    prompts = 10 * (2 * BLOCKS + 4 * 12 * 768 * 10)
    tokens = 20 * (2 * (BLOCKS + vocabulary * 768) + 4 * 12 * 768 * 20)
    assert workload.flops == pytest.approx(3 * (prompts + tokens), rel=1e-12)


@pytest.mark.parametrize(("name", "fsdp"), [("v5e-1", 1), ("v5e-8", 8), ("v5p-8", 4)])
def test_generation_shards_the_weights_over_one_host(name, fsdp):
    sizes = plan_of("gpt1", "--mesh.tensor=3", generate="1x2+3").mesh_sizes(parse_accelerator(name), 1)
    assert sizes == {"slice": 1, "data": 1, "fsdp": fsdp, "tensor": 1}


def test_generation_needs_one_host():
    with pytest.raises(UserError, match="on one host, but 1 x v6e-16 has 4; the largest slice with one host is v6e-8"):
        plan_of("gpt1", generate="1x2+3").mesh_sizes(parse_accelerator("v6e-16"), 1)


def test_different_programs_have_different_facts():
    workloads = [
        plan_of("gpt1"),
        plan_of("gpt1", "--train.batch-size=32"),
        plan_of("gpt1", generate="8x32+100"),
        plan_of("gpt1", generate="8x32+101"),
        plan_of("gpt1", generate="4x32+100"),
        plan_of("finetune/rte", *LIKE),
        plan_of("finetune/rte", *LIKE, "--task.max-tokens=128"),
        plan_of("finetune/snli", *LIKE),
    ]
    facts = [workload.facts() for workload in workloads]
    assert all(one != other for k, one in enumerate(facts) for other in facts[:k])


def test_a_workload_is_found_without_jax():
    """A plan from the cache is printed before JAX could be imported."""
    code = "import sys, gpt_jax.plan.command, gpt_jax.plan.describe; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
