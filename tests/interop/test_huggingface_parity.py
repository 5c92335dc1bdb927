"""Our model beside Hugging Face's `openai-gpt`, an independent implementation, with the same weights from an exported folder.

Each comparison is made with a small model, whose weights are large enough for every part to matter, and some comparisons with
the paper's model (section 4.1), initialized as in the paper. Gains and biases are random too, so that all parameters differ.
"""

import copy
import functools
import json
import os
import types
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from gpt_jax.config import LoopConfig, ModelConfig, OptimConfig, RunConfig
from gpt_jax.interop import export, huggingface, param_map, tensor_files
from gpt_jax.model import decode, transformer
from gpt_jax.model.network import network
from gpt_jax.runtime import sharding
from gpt_jax.tasks.batches import ScoringBatches
from gpt_jax.tasks.evaluate import evaluate_task
from gpt_jax.tasks.head import Head
from gpt_jax.tasks.readers import Example
from gpt_jax.tasks.transforms import SpecialTokens, encode_examples
from gpt_jax.train.compilation import CompiledByShape
from gpt_jax.train.restore import load_model
from gpt_jax.train.step import LANGUAGE_MODEL, TrainableModel, init_state, lower_step, state_shardings

os.environ["HF_HUB_OFFLINE"] = "1"  # read by transformers when it is first imported
torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

EXACT = {
    "embed_dropout": 0.0,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "compute_dtype": "float32",
    "matmul_precision": "highest",
}
SMALL = ModelConfig(
    vocab_size=300, context_length=256, num_layers=3, embed_dim=32, num_heads=4, mlp_dim=128, init_stddev=0.2, **EXACT
)
FULL = ModelConfig(**EXACT)
SIZES = [pytest.param(SMALL, id="small"), pytest.param(FULL, id="full size", marks=pytest.mark.slow)]

UPDATES = 10
ADAMW = OptimConfig(kind="adamw", peak_lr=2.5e-4, schedule="linear", warmup="0 steps", weight_decay=1.0)
"""The decay is so strong that a parameter in the wrong group would stand out."""

CHOICES = Head(outputs=3, choices=True, lm_weight=0.5, dropout=0.0)
CLASSES = Head(outputs=3, choices=False, lm_weight=0.5, dropout=0.0)


class Pair(NamedTuple):
    """One model in both implementations."""

    model: ModelConfig
    trainable: TrainableModel
    params: Any
    maps: list[param_map.TensorMap]
    theirs: Any

    def to_tensors(self, tree: Any) -> dict[str, np.ndarray]:
        """Our parameters, or their gradients, under Hugging Face's names."""
        return param_map.to_tensors(self.maps, tree, "float32")

    def loss_and_gradients(self, batch: dict[str, np.ndarray]) -> tuple[float, Any]:
        """Our loss and gradients, without dropout."""

        @jax.jit
        def compute(params: Any, batch: Any) -> Any:
            normalized = self.trainable.normalize(batch)
            return jax.value_and_grad(lambda params: self.trainable.loss(self.model, params, normalized, None))(params)

        loss, gradients = compute(self.params, batch)
        return float(loss), gradients

    def their_gradients(self, loss: Any) -> dict[str, np.ndarray]:
        """The gradients of those of their parameters that the loss depends on."""
        self.theirs.zero_grad()
        loss.backward()
        return {name: leaf.grad.numpy() for name, leaf in self.theirs.named_parameters() if leaf.grad is not None}


def make_pair(model: ModelConfig, head: Head | None, folder: Path, orders: int = 1) -> Pair:
    """Our model with random weights, and theirs loaded from the folder that we write."""
    trainable = head.trainable_model() if head else LANGUAGE_MODEL
    maps = param_map.tensor_maps("huggingface", model, head)
    pair = Pair(model, trainable, random_params(model, trainable), maps, None)
    tensors = pair.to_tensors(pair.params)
    if huggingface.architecture(head) == huggingface.CLASSIFIER:
        linear, norm = jax.device_get((pair.params["head"], pair.params["blocks"]["mlp_norm"]))
        tensors[huggingface.SCORE] = huggingface.score_weight(
            linear["kernel"], linear["bias"] / orders, norm["gain"][-1], norm["bias"][-1]
        )
    tensor_files.save_safetensors(folder, tensors, shard_bytes=200_000_000)
    task = types.SimpleNamespace(labels="abc") if head else None
    config = huggingface.to_config_json(RunConfig(model), types.SimpleNamespace(eos_id=0), task, head, "float32")
    (folder / "config.json").write_text(json.dumps(config))
    return pair._replace(theirs=load(getattr(transformers, huggingface.architecture(head)), folder))


def load(kind: Any, folder: Path) -> Any:
    """Their model; its weights are exactly those in the folder."""
    model, loading = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval()


@functools.partial(jax.jit, static_argnums=(0, 1))
def random_params(model: ModelConfig, trainable: TrainableModel) -> Any:
    """Initial parameters, except that gains are 1 + 0.1 N and biases 0.1 N."""

    def spread(path: tuple, leaf: jax.Array) -> jax.Array:
        if path[-1].key not in ("gain", "bias"):
            return leaf
        name = jax.tree_util.keystr(path)
        return leaf + 0.1 * jax.random.normal(jax.random.key(zlib.crc32(name.encode())), leaf.shape)

    return jax.tree_util.tree_map_with_path(spread, trainable.init(model, jax.random.key(0)))


def largest_difference(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """The largest norm of a tensor's difference, relative to the norm of theirs."""
    assert ours.keys() == theirs.keys()
    norms = {name: np.linalg.norm(theirs[name]) for name in theirs}
    assert min(norms.values()) > 0, norms
    relative = {name: np.linalg.norm(ours[name] - theirs[name]) / norms[name] for name in theirs}
    return max(relative.values())


def random_tokens(model: ModelConfig, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, model.vocab_size, shape, np.int32)


# -- the language model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=SIZES)
def pair(request, tmp_path_factory):
    return make_pair(request.param, None, tmp_path_factory.mktemp("language_model"))


def next_tokens(tokens):
    """A batch with the loss of their model, which predicts every token but the first."""
    counted = np.broadcast_to(np.arange(tokens.shape[1]) < tokens.shape[1] - 1, tokens.shape).astype(np.float32)
    row = np.arange(len(tokens), dtype=np.int32)
    return {"tokens": tokens, "targets": np.roll(tokens, -1, axis=1), "loss_weights": counted, "example_id": row}


def their_loss(theirs, tokens):
    ids = torch.from_numpy(tokens).long()
    return theirs(ids, labels=ids).loss


def test_every_parameter_is_theirs(pair):
    assert {m.name for m in pair.maps} == {name for name, _ in pair.theirs.named_parameters()}
    assert pair.model.num_parameters == sum(parameter.numel() for parameter in pair.theirs.parameters())


def test_logits_are_theirs_at_every_position(pair):
    model, tokens = pair.model, random_tokens(pair.model, 1, pair.model.context_length)
    ours = jax.jit(lambda params, tokens: transformer.logits(model, params, network(model).apply(model, params, tokens)))
    with torch.inference_mode():
        expected = pair.theirs(torch.from_numpy(tokens).long()).logits.numpy()
    assert expected.shape == (1, model.context_length, model.vocab_size)
    assert expected.std() > 0.5
    np.testing.assert_allclose(ours(pair.params, tokens), expected, rtol=0, atol=2e-4)


def test_loss_and_every_gradient_are_theirs(pair):
    tokens = random_tokens(pair.model, 1, pair.model.context_length)
    loss, gradients = pair.loss_and_gradients(next_tokens(tokens))
    expected = their_loss(pair.theirs, tokens)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert largest_difference(pair.to_tensors(gradients), pair.their_gradients(expected)) < 1e-4


def test_ten_updates_with_adamw_are_theirs(pair):
    """The losses before each update are compared, and the distances that the parameters have moved after the last update."""
    model, theirs = pair.model, copy.deepcopy(pair.theirs)
    batches = [random_tokens(model, 2, 64, seed=step) for step in range(UPDATES)]

    named = dict(theirs.named_parameters())
    kept = [parameter for name, parameter in named.items() if name.endswith("bias") or ".ln_" in name]
    decayed = [parameter for name, parameter in named.items() if not (name.endswith("bias") or ".ln_" in name)]
    groups = [{"params": decayed, "weight_decay": ADAMW.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, ADAMW.peak_lr, betas=(0.9, 0.999), eps=1e-8)
    rates = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=UPDATES)
    expected = []
    for tokens in batches:
        optimizer.zero_grad()
        loss = their_loss(theirs, tokens)
        loss.backward()
        optimizer.step()
        rates.step()
        expected.append(loss.item())

    config = RunConfig(model, optim=ADAMW, train=LoopConfig(batch_size=2))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    update = CompiledByShape(lambda batch: lower_step(config, mesh, total_steps=UPDATES, warmup_steps=0.0, batch=batch))
    state = init_state(config, mesh) | {"params": jax.tree.map(jax.numpy.copy, pair.params)}
    state = jax.device_put(state, state_shardings(config, mesh))
    losses = []
    for tokens in batches:
        state, metrics = update(state, sharding.place_batch(mesh, next_tokens(tokens), 2))
        losses.append(float(metrics["loss"]))

    np.testing.assert_allclose(losses, expected, rtol=1e-3)
    begin = pair.to_tensors(pair.params)

    def moved(end: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The changes, without the keys' biases: they cancel in every softmax, so Adam makes full steps of rounding errors."""
        keys = slice(model.embed_dim, 2 * model.embed_dim)
        return {name: np.delete(end[name] - begin[name], keys if "c_attn.bias" in name else [], axis=0) for name in end}

    theirs = {name: parameter.detach().numpy() for name, parameter in named.items()}
    assert largest_difference(moved(pair.to_tensors(state["params"])), moved(theirs)) < 1e-3


def test_greedy_text_is_theirs_token_for_token(pair):
    """The position embeddings are ten times as large; with small ones a random model repeats one token forever."""
    embedding, theirs = pair.params["embedding"], copy.deepcopy(pair.theirs)
    params = pair.params | {"embedding": embedding | {"positions": 10 * embedding["positions"]}}
    theirs.transformer.positions_embed.weight.data *= 10
    prompt = random_tokens(pair.model, 5).tolist()
    theirs.generation_config.eos_token_id = None
    text = theirs.generate(torch.tensor([prompt]), max_new_tokens=200, do_sample=False)[0].tolist()
    assert len(text) == 5 + 200
    assert len(set(text[5:])) > 10
    assert decode.generate(pair.model, params, [prompt], 200, temperature=0.0) == [text[5:]]


# -- fine-tuning ------------------------------------------------------------------------------------------------------------


class Examples(NamedTuple):
    """Labeled examples as the batch of a fine-tuning step, and as the sequences of Figure 1."""

    batch: dict[str, np.ndarray]
    sequences: list[list[list[int]]]
    """For each example, its sequences of tokens without padding."""
    labels: Any

    @property
    def tokens(self) -> Any:
        """The sequences as one tensor [examples, sequences, time]."""
        longest = max(len(sequence) for example in self.sequences for sequence in example)
        return torch.tensor([[one + [0] * (longest - len(one)) for one in example] for example in self.sequences])

    @property
    def ends(self) -> Any:
        """The positions of the extract tokens."""
        return torch.tensor([[len(sequence) - 1 for sequence in example] for example in self.sequences])

    def mean(self, values: Any) -> Any:
        """The mean over all sequences of the mean over a sequence's real next tokens; values [examples, sequences, time]."""
        kept = [one[:end].mean() for one, end in zip(values.flatten(0, 1), self.ends.flatten(), strict=True)]
        return torch.stack(kept).mean()

    def language_model_term(self, logits: Any) -> Any:
        """The `mean` of the next token's negative log-probability; logits [examples, sequences, time, vocabulary or more]."""
        targets = self.tokens[..., 1:, None]
        return self.mean(-logits[..., :-1, :].log_softmax(-1).take_along_dim(targets, -1)[..., 0])


def make_examples(model: ModelConfig, kind: Any) -> Examples:
    """Four examples of random words and lengths: through our transformation and batches, and written out by hand."""
    start, delimiter, extract = range(model.vocab_size - 3, model.vocab_size)
    draw = np.random.default_rng(0)
    number = {"classification": 1, "similarity": 2, "multiple_choice": 4}[kind]
    texts = [[draw.integers(0, start, draw.integers(1, 12)).tolist() for _ in range(number)] for _ in range(4)]
    rows = [Example("", tuple(" ".join(map(str, text)) for text in example), i % 3, "") for i, example in enumerate(texts)]
    words = lambda text: [int(word) for word in text.split()]  # noqa: E731
    special = SpecialTokens(start, delimiter, extract)
    encoded = encode_examples(rows, kind, words, special, np.arange(3.0), max_tokens=64, truncation="longest")
    batches = ScoringBatches(encoded, len(rows), [40])

    def figure_1(example: list[list[int]]) -> list[list[int]]:
        first, *others = example
        if kind == "classification":
            return [[start, *first, extract]]
        sequences = [[start, *first, delimiter, *other, extract] for other in others]
        return [*sequences, [start, *others[0], delimiter, *first, extract]] if kind == "similarity" else sequences

    order = batches.example_numbers(0)
    return Examples(
        batches.batch_at(0, np.arange(len(rows))), [figure_1(texts[i]) for i in order], torch.tensor([i % 3 for i in order])
    )


@pytest.fixture(scope="module", params=SIZES)
def choices(request, tmp_path_factory):
    return make_pair(request.param, CHOICES, tmp_path_factory.mktemp("choices"))


def test_a_multiple_choice_step_is_theirs(choices):
    data = make_examples(choices.model, "multiple_choice")
    loss, gradients = choices.loss_and_gradients(data.batch)
    output = choices.theirs(data.tokens, mc_token_ids=data.ends, mc_labels=data.labels)
    expected = output.mc_loss + 0.5 * data.language_model_term(output.logits)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    ours, theirs = choices.to_tensors(gradients), choices.their_gradients(expected)
    for side in (ours, theirs):  # Adding the same number to all choices changes nothing, so this gradient is only rounding.
        assert abs(side.pop("multiple_choice_head.summary.bias")) < 1e-6
    assert largest_difference(ours, theirs) < 1e-4


def test_the_released_loss_is_larger_by_the_share_that_its_softmax_gives_to_positions(choices):
    """The released embedding matrix has the positions below the tokens, and its softmax spans both; ours spans the tokens."""
    data = make_examples(choices.model, "multiple_choice")
    loss, _ = choices.loss_and_gradients(data.batch)
    with torch.inference_mode():
        output = choices.theirs(data.tokens, mc_token_ids=data.ends, mc_labels=data.labels, output_hidden_states=True)
        hidden = output.hidden_states[-1].reshape(*data.tokens.shape, -1)
        released = torch.cat([output.logits, hidden @ choices.theirs.transformer.positions_embed.weight.T], -1)
        expected = output.mc_loss + 0.5 * data.language_model_term(released)
        share = released.softmax(-1)[..., : choices.model.vocab_size].sum(-1)
    difference = 0.5 * data.mean(-share.log()).item()
    assert difference > 1e-3
    assert expected.item() == pytest.approx(loss + difference, rel=1e-5)


@pytest.fixture(scope="module", params=[("classification", 1), ("similarity", 2)], ids=["one text", "both orders"])
def classifier(request, tmp_path_factory):
    """Examples of a task with classes, and a model with their classifier."""
    kind, orders = request.param
    return make_examples(SMALL, kind), make_pair(SMALL, CLASSES, tmp_path_factory.mktemp("classes"), orders)


def test_scores_of_classes_are_theirs(classifier):
    """Their classifier scores each sequence, and the scores of both orders are added."""
    data, pair = classifier
    with torch.inference_mode():
        scores = pair.theirs(data.tokens.flatten(0, 1)).logits.reshape(*data.tokens.shape[:2], -1).sum(1)
    ours = jax.jit(functools.partial(CLASSES.log_probabilities, pair.model))(pair.params, data.batch)
    np.testing.assert_allclose(ours, scores.log_softmax(-1), atol=1e-5)


def test_a_step_with_classes_is_theirs(classifier):
    """Their network is followed by a PyTorch linear layer with a bias, on the sum of the extract tokens' activations."""
    data, pair = classifier
    loss, gradients = pair.loss_and_gradients(data.batch)
    kernel, bias = (torch.from_numpy(np.array(pair.params["head"][name])).requires_grad_() for name in ("kernel", "bias"))
    transformer = pair.theirs.transformer
    hidden = transformer(data.tokens.flatten(0, 1)).last_hidden_state.reshape(*data.tokens.shape, -1)
    extracted = hidden.take_along_dim(data.ends[..., None, None], dim=2).sum((1, 2))
    scores = torch.nn.functional.linear(extracted, kernel.T, bias)
    task = torch.nn.functional.cross_entropy(scores, data.labels)
    expected = task + 0.5 * data.language_model_term(hidden @ transformer.tokens_embed.weight.T)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    theirs = pair.their_gradients(expected) | {"kernel": kernel.grad.numpy(), "bias": bias.grad.numpy()}
    assert largest_difference(pair.to_tensors(gradients) | jax.device_get(gradients["head"]), theirs) < 1e-4


# -- exported folders -------------------------------------------------------------------------------------------------------


def exported(run, folder):
    """Exports a run and returns the report of the verification."""
    report = export.export(run, "huggingface", folder, print)
    assert report == json.loads((folder / "parity.json").read_text())
    assert report["verified_with"] == f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}"
    return report


def test_a_pretrained_folder_is_a_language_model_of_theirs(pretrained, tmp_path):
    report = exported(pretrained, tmp_path / "out")
    assert report["logits"]["max_abs_difference"] < 1e-4
    assert report["logits"]["top1_agreement"] == 1
    assert report["tokenizer"]["equal"] == report["tokenizer"]["texts"]
    model = load(transformers.AutoModelForCausalLM, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = load_model(pretrained, LANGUAGE_MODEL)
    ids = tokenizer("hello there")["input_ids"]
    assert ids == ours.tokenizer.encode("hello there")
    text = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=-1)[0].tolist()
    assert [text[len(ids) :]] == decode.generate(ours.config.model, ours.params, [ids], 8, temperature=0.0)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("classification", marks=pytest.mark.slow),
        pytest.param("entailment", marks=pytest.mark.slow),
        "similarity",
        "multiple_choice",
    ],
)
def test_a_fine_tuned_folder_is_a_classifier_of_theirs(kind, fine_tuned, tmp_path):
    """Their tokenizer and their model give the texts of the validation split the probabilities that our evaluation writes."""
    run = fine_tuned(kind)
    report = exported(run, tmp_path / "out")
    assert report["outputs"]["max_abs_difference"] < 1e-4
    assert report["outputs"]["top1_agreement"] == 1
    evaluate_task(run, [], "validation", tmp_path / "ours", print)
    expected = [json.loads(line)["probabilities"] for line in (tmp_path / "ours" / "validation.jsonl").read_text().splitlines()]

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    choices = kind == "multiple_choice"
    auto = transformers.OpenAIGPTDoubleHeadsModel if choices else transformers.AutoModelForSequenceClassification
    model = load(auto, tmp_path / "out")
    _, *rows = (run.parent / f"{kind}-validation.tsv").read_text().splitlines()
    for row, probabilities in zip(rows, expected, strict=True):
        first, *others = (text.strip() for text in row.split("\t")[:-1])
        pairs = [(first, other) for other in others] or [(first,)]
        pairs += [(others[0], first)] if kind == "similarity" else []
        sequences = [tokenizer(*pair)["input_ids"] for pair in pairs]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(sequence) for sequence in sequences], batch_first=True)
        ends = torch.tensor([len(sequence) - 1 for sequence in sequences])
        with torch.inference_mode():
            scores = model(ids[None], mc_token_ids=ends[None]).mc_logits[0] if choices else model(ids).logits.sum(0)
        np.testing.assert_allclose(scores.softmax(-1), probabilities, atol=1e-5)
    assert np.std(expected, axis=0).max() > 0.01  # The outputs depend on the texts.
