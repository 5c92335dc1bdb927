"""The PyTorch peers do the work of our training step: with our parameters, they compute our loss and our gradients."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.bench import finetune, torch_gpt, train
from gpt_jax.bench.comparison import Request
from gpt_jax.bench.peers import PEERS
from gpt_jax.config.load import load_config
from gpt_jax.model.loss import language_model_loss, normalize
from gpt_jax.model.transformer import Params
from gpt_jax.train.step import LANGUAGE_MODEL
from tests.tiny import replace_fields

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parents[2]
PADDINGS = ("buckets", "longest", "context")
NO_DROPOUT = {"embed_dropout": 0.0, "attention_dropout": 0.0, "residual_dropout": 0.0}


def installed(peers: Sequence[str]) -> list[str]:
    return [peer for peer in peers if all(importlib.util.find_spec(module) for module in PEERS[peer].modules)]


def parameter_pairs(params: Params, module) -> Iterator[tuple[str, Any, np.ndarray]]:
    """Returns the name and the value of each parameter of a `plain_gpt`, and our array in its layout."""
    blocks, width = params["blocks"], module.tokens.weight.shape[1]
    yield "tokens", module.tokens.weight, params["embedding"]["tokens"][: len(module.tokens.weight)]
    yield "positions", module.positions.weight, params["embedding"]["positions"]
    for number, block in enumerate(module.blocks):
        ours = jax.tree.map(lambda x: np.array(x[number]), blocks)  # noqa: B023
        for layer, linear in (("qkv", block.qkv), ("out", block.out)):
            kernel = ours["attention"][layer]["kernel"]
            yield (
                f"{number}.{layer}",
                linear.weight,
                kernel.reshape(width, -1).T if layer == "qkv" else kernel.reshape(-1, width).T,
            )
            yield f"{number}.{layer} bias", linear.bias, ours["attention"][layer]["bias"].reshape(-1)
        for layer, linear in (("up", block.up), ("down", block.down)):
            yield f"{number}.{layer}", linear.weight, ours["mlp"][layer]["kernel"].T
            yield f"{number}.{layer} bias", linear.bias, ours["mlp"][layer]["bias"]
        for layer, norm in (("attention_norm", block.attention_norm), ("mlp_norm", block.mlp_norm)):
            yield f"{number}.{layer} gain", norm.weight, ours[layer]["gain"]
            yield f"{number}.{layer} bias", norm.bias, ours[layer]["bias"]


def copy_parameters(params: Params, module) -> None:
    with torch.no_grad():
        for _, target, array in parameter_pairs(params, module):
            target.copy_(torch.from_numpy(np.array(array)))


@pytest.mark.parametrize("attention", ["plain", "blockwise"])
def test_the_plain_model_has_our_loss_and_our_gradients(tiny, attention):
    model = replace_fields(tiny, model=NO_DROPOUT | {"attention": attention}).model
    params = LANGUAGE_MODEL.init(model, jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(1), x.shape), params)  # Activations are not small.
    batch = train.random_batch(model, 3)
    loss, gradients = jax.value_and_grad(
        lambda params: language_model_loss(model, params, normalize({name: jnp.asarray(x) for name, x in batch.items()}), None)
    )(params)

    module = torch_gpt.plain_gpt(model)
    copy_parameters(params, module)
    tokens, targets = (torch_gpt.to_torch(batch[name], torch.device("cpu")) for name in ("tokens", "targets"))
    theirs = torch.nn.functional.cross_entropy(module(tokens).flatten(0, 1), targets.flatten())
    theirs.backward()
    assert theirs.item() == pytest.approx(float(loss), rel=1e-5)
    compared = list(parameter_pairs(gradients, module))
    assert len(compared) == len(list(module.parameters()))
    for name, parameter, expected in compared:
        difference = np.linalg.norm(parameter.grad.numpy() - expected) / np.linalg.norm(expected)
        assert difference < 1e-5, name


def test_every_dropout_is_on_in_training_and_off_in_evaluation(tiny):
    tokens = torch.zeros(2, 8, dtype=torch.long)
    for name in NO_DROPOUT:
        module = torch_gpt.plain_gpt(replace_fields(tiny, model=NO_DROPOUT | {name: 0.5}).model)
        assert not torch.equal(module(tokens), module(tokens)), name
        module.eval()
        assert torch.equal(module(tokens), module(tokens))


@pytest.mark.parametrize("kind", ["torch", "transformers"])
def test_the_training_step_of_a_peer_lowers_the_loss(tiny, kind):
    pytest.importorskip(kind)
    model = replace_fields(tiny, model=NO_DROPOUT).model
    device = torch_gpt.start_torch()
    make = {"torch": torch_gpt.plain_gpt, "transformers": torch_gpt.transformers_gpt}[kind]
    batch = train.random_batch(model, 4)
    tokens, targets = (torch_gpt.to_torch(batch[name], device) for name in ("tokens", "targets"))
    losses = []

    def loss(module, tokens, targets):
        output = module(tokens)
        logits = output if kind == "torch" else output.logits
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))
        return losses[-1]

    step = torch_gpt.training_step(make(model), loss, tiny.optim, device, compiled=False)
    for _ in range(20):
        step(tokens, targets)
    assert losses[0].item() == pytest.approx(np.log(model.vocab_size), rel=0.02)
    assert losses[-1].item() < losses[0].item() - 0.5


@pytest.mark.parametrize("name", ["train", "attention", "loss", "generate", "matmul"])
def test_programs_of_peers_run(tiny, name, monkeypatch):
    pytest.importorskip("transformers")
    from gpt_jax.bench.command import BENCHMARKS

    monkeypatch.setattr("gpt_jax.bench.generate.PROMPT_TOKENS", 8)
    monkeypatch.setattr("gpt_jax.bench.generate.NEW_TOKENS", 4)
    eager = [peer for peer in installed(BENCHMARKS[name].peers) if not peer.endswith("-compiled")]
    for comparison in BENCHMARKS[name].comparisons(Request(tiny, "tiny", (2,), eager)):
        assert set(comparison.peers) == set(eager)
        for peer in comparison.peers:
            comparison.programs[peer].build().run(2)


def test_the_process_of_a_peer_does_not_load_jax(tiny, task, monkeypatch):
    pytest.importorskip("transformers")
    from gpt_jax.bench.command import BENCHMARKS

    monkeypatch.setattr("gpt_jax.bench.generate.PROMPT_TOKENS", 8)
    monkeypatch.setattr("gpt_jax.bench.generate.NEW_TOKENS", 4)

    requests = {
        name: Request(task if name == "finetune" else tiny, name, (), installed(value.peers))
        for name, value in BENCHMARKS.items()
    }
    comparisons = [
        comparison for name in requests if requests[name].peers for comparison in BENCHMARKS[name].comparisons(requests[name])
    ]
    specs = [comparison.programs[peer] for comparison in comparisons for peer in comparison.peers]
    modules = {spec.function.partition(":")[0] for spec in specs}
    assert len(modules) == sum(bool(benchmark.peers) for benchmark in BENCHMARKS.values())
    code = (
        "import json, sys\n"
        "from gpt_jax.bench.program import ProgramSpec\n"
        "for spec in json.load(sys.stdin):\n"
        "    ProgramSpec(*spec).build()\n"
        "    print(spec[0], 'jax' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(specs), capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.splitlines() == [f"{spec.function} False" for spec in specs]


@pytest.fixture
def task(own_task, pretrained):
    """A fine-tuning config for a task of one's own, without dropout, that starts from random parameters."""
    config = replace_fields(load_config("finetune/own"), model=NO_DROPOUT | {"attention": "plain"}, train={"batch_size": 8})
    files = {name: own_task[name] for name in ("train", "validation")}
    return replace_fields(config, task={**files, "classifier_dropout": 0.0}, init={"from_": "none", "like": str(pretrained)})


def test_fine_tuning_peers_pad_random_batches_and_compute_our_loss(task, monkeypatch):
    monkeypatch.setattr(finetune, "BATCHES", 3)
    [comparison] = finetune.comparisons(Request(task, "own", (), ("torch", "torch-context")))
    assert comparison.work == 3 * 8
    assert comparison.peers == ("torch", "torch-context")
    settings = comparison.programs["gpt_jax"].arguments["config"]
    shapes = {padding: [batch["tokens"].shape for batch in finetune._load(settings, padding).batches] for padding in PADDINGS}
    assert {shape[0] for values in shapes.values() for shape in values} == {8}
    assert [shape[-1] for shape in shapes["context"]] == [32] * 3
    lasts = {padding: [batch["extract"] for batch in finetune._load(settings, padding).batches] for padding in PADDINGS}
    assert [shape[-1] for shape in shapes["longest"]] == [1 + last.max() for last in lasts["longest"]]
    assert max(shape[-1] for shape in shapes["buckets"]) < 32  # No example fills the context.
    spreads = {padding: np.mean([last.max() - last.min() for last in lasts[padding]]) for padding in PADDINGS}
    assert spreads["buckets"] < 0.5 * spreads["longest"]  # Only our batches have examples of similar length.

    seen = []
    monkeypatch.setattr(torch_gpt, "training_step", lambda network, loss, *rest, **options: seen.append((network, loss)))
    comparison.programs["torch-context"].build()
    [(network, loss)] = seen

    from gpt_jax.tasks.head import make_head

    data = finetune._load(settings, "context")
    model = make_head(data.task, data.config).trainable_model()
    params = model.init(data.config.model, jax.random.key(0))
    params["head"]["bias"] += 0.5
    copy_parameters(params, network)
    with torch.no_grad():
        network.classifier.weight.copy_(torch.from_numpy(np.array(params["head"]["kernel"]).T))
        network.classifier.bias.copy_(torch.from_numpy(np.array(params["head"]["bias"])))
    batch = data.batches[0]
    names = ("tokens", "targets", "loss_weights", "extract", "labels")
    theirs = loss(network, *(torch_gpt.to_torch(batch[name], torch.device("cpu")) for name in names))
    ours = model.loss(data.config.model, params, model.normalize({name: jnp.asarray(x) for name, x in batch.items()}), None)
    assert theirs.item() == pytest.approx(float(ours), rel=1e-5)
