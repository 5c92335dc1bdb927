"""The head and the loss of fine-tuning, compared with the paper's equations, and the transfer of a checkpoint's parameters."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config import LoopConfig, MeshConfig, ModelConfig, OptimConfig, RunConfig
from gpt_jax.model import transformer
from gpt_jax.model.dropout import DropoutKey
from gpt_jax.runtime import sharding
from gpt_jax.tasks.head import Head, normalize, transfer
from gpt_jax.train.step import init_state, lower_step, state_shardings

MODEL = ModelConfig(vocab_size=60, context_length=16, num_layers=2, embed_dim=16, num_heads=2, mlp_dim=32, init_stddev=0.2)
CLASSES = Head(outputs=3, choices=False, lm_weight=0.5, dropout=0.1)
CHOICES = Head(outputs=4, choices=True, lm_weight=0.5, dropout=0.1)
EXAMPLES, TIME = 8, 12


def initial(model, config, seed):
    """Returns the parameters that a head, or the module of a network, starts with."""
    return jax.jit(model.init, static_argnums=0)(config, jax.random.key(seed))


def random_batch(head, sequences, seed=0):
    """Returns a batch of sequences of random tokens and lengths, with soft labels."""
    rng = np.random.default_rng(seed)
    lengths = rng.choice([4, 9, TIME], (EXAMPLES, sequences))
    tokens = rng.integers(0, MODEL.vocab_size, (EXAMPLES, sequences, TIME + 1), np.int32)
    real = np.arange(TIME) < lengths[..., None] - 1
    labels = rng.dirichlet(np.ones(head.outputs), EXAMPLES).astype(np.float32)
    batch = {
        "tokens": tokens[..., :-1],
        "targets": tokens[..., 1:],
        "loss_weights": (real / (lengths - 1)[..., None]).astype(np.float32),
        "extract": (lengths - 1).astype(np.int32),
        "labels": labels,
        "example_id": np.arange(EXAMPLES * sequences, dtype=np.int32).reshape(EXAMPLES, sequences),
    }
    return {name: jnp.asarray(array) for name, array in batch.items()}


def reference_loss(head, params, batch):
    """Returns L3(C) = L2(C) + lambda L1(C), equation 5, computed by example and sequence."""
    tokens = batch["tokens"].reshape(-1, TIME)
    hidden = transformer.apply(MODEL, params, tokens).reshape(*batch["tokens"].shape, -1)
    logs = jax.nn.log_softmax(transformer.logits(MODEL, params, hidden.reshape(*tokens.shape, -1))).reshape(*hidden.shape[:3], -1)
    kernel, bias = params["head"]["kernel"], params["head"]["bias"]
    total = 0.0
    for b, ends in enumerate(batch["extract"].tolist()):
        extracted = [hidden[b, s, end] for s, end in enumerate(ends)]
        lm = [-logs[b, s, jnp.arange(end), batch["targets"][b, s, :end]].mean() for s, end in enumerate(ends)]
        scores = jnp.stack([(h @ kernel + bias)[0] for h in extracted]) if head.choices else sum(extracted) @ kernel + bias
        task = -(batch["labels"][b] * jax.nn.log_softmax(scores)).sum()
        total += task / EXAMPLES + head.lm_weight * sum(lm) / (EXAMPLES * len(lm))
    return total


@pytest.mark.parametrize(("head", "sequences"), [(CLASSES, 1), (CLASSES, 2), (CHOICES, 4)], ids=["one", "pair", "choices"])
def test_loss_and_gradients_are_those_of_the_equations(head, sequences):
    params = initial(head, MODEL, 0)
    batch = random_batch(head, sequences)
    loss, gradients = jax.jit(jax.value_and_grad(lambda p: head.loss(MODEL, p, normalize(batch), None)))(params)
    expected, reference = jax.jit(jax.value_and_grad(lambda p: reference_loss(head, p, batch)))(params)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        wanted = np.asarray(dict(jax.tree_util.tree_leaves_with_path(reference))[path])
        np.testing.assert_allclose(gradient, wanted, rtol=1e-3, atol=1e-5, err_msg=jax.tree_util.keystr(path))


def test_the_auxiliary_loss_is_scaled_by_its_weight():
    params = initial(CLASSES, MODEL, 0)
    batch = normalize(random_batch(CLASSES, 1))
    losses = {w: float(CLASSES._replace(lm_weight=w).loss(MODEL, params, batch, None)) for w in (0.0, 0.5, 1.0)}
    assert losses[1.0] - losses[0.5] == pytest.approx(losses[0.5] - losses[0.0], rel=1e-4)
    assert losses[0.5] > losses[0.0] + 0.5
    logs = CLASSES.log_probabilities(MODEL, params, batch)
    assert losses[0.0] == pytest.approx(float(-(batch["labels"] * logs).sum()), rel=1e-5)


def test_the_choices_of_a_question_share_the_classifiers_mask():
    """With dropout before the classifier, four equal choices get equal scores, and other questions and steps get other masks."""
    model = dataclasses.replace(MODEL, embed_dropout=0.0, attention_dropout=0.0, residual_dropout=0.0)
    head = CHOICES._replace(dropout=0.5, lm_weight=0.0)
    params = initial(head, model, 0)
    batch = random_batch(head, 4)
    batch |= {name: batch[name][:1, :1].repeat(4, axis=1).repeat(EXAMPLES, axis=0) for name in ("tokens", "extract")}
    labels = np.eye(4, dtype=np.float32)[np.arange(EXAMPLES) % 4] / EXAMPLES

    def loss(step):
        return head.loss(model, params, batch | {"labels": labels}, DropoutKey(0, step, batch["example_id"]))

    assert loss(0) == pytest.approx(np.log(4), rel=1e-5)  # Equal scores, whatever was dropped.
    classes = CLASSES._replace(dropout=0.5, lm_weight=0.0)
    params = initial(classes, model, 0)
    one = {name: array[:, :1] if array.ndim > 1 and name != "labels" else array for name, array in batch.items()}
    one["labels"] = np.eye(3, dtype=np.float32)[np.zeros(EXAMPLES, int)] / EXAMPLES
    values = {float(classes.loss(model, params, one, DropoutKey(0, step, one["example_id"]))) for step in range(4)}
    assert len(values) == 4


class Update(NamedTuple):
    """The result of one update."""

    loss: float
    grad_norm: float
    params: dict[str, Any]


# With the usual epsilon the first update is little more than each gradient's sign and would hide an error in its size.
OPTIM = OptimConfig(peak_lr=1e-2, warmup="0 steps", epsilon=1e-2)


def update_once(state, grad_accum_steps, devices):
    """Makes one update of a state from the host, with dropout, on a batch of multiple-choice questions."""
    config = RunConfig(model=MODEL, optim=OPTIM, train=LoopConfig(batch_size=EXAMPLES, grad_accum_steps=grad_accum_steps))
    model = CHOICES.trainable_model()
    batch = sharding.place_batch(devices, jax.device_get(random_batch(CHOICES, 4)), EXAMPLES)
    abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in batch.items()}
    step = lower_step(config, devices, total_steps=10, model=model, batch=abstract).compile()
    state, metrics = step(jax.device_put(state, state_shardings(config, devices, model)), batch)
    assert metrics["learning_rate"] == pytest.approx(OPTIM.peak_lr)
    return Update(float(metrics["loss"]), float(metrics["grad_norm"]), jax.device_get(state["params"]))


SINGLE, MIXED = MeshConfig(data=1), MeshConfig(data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def whole_batch():
    """The initial state, and its update by the whole batch on one device."""
    device = sharding.make_mesh(SINGLE, jax.devices()[:1])
    state = jax.device_get(init_state(RunConfig(model=MODEL), device, CHOICES.trainable_model()))
    return state, update_once(state, 1, device)


@pytest.mark.parametrize(("parts", "mesh"), [(4, SINGLE), (2, MIXED)], ids=["single", "2 x 2 x 2"])
def test_micro_batches_and_meshes_do_not_change_an_update(whole_batch, parts, mesh):
    """With dropout, four micro-batches on one device and two on eight give the parameters that the whole batch gives on one."""
    state, expected = whole_batch
    update = update_once(state, parts, sharding.make_mesh(mesh, jax.devices()[: 1 if mesh == SINGLE else 8]))
    assert update.loss == pytest.approx(expected.loss, rel=1e-5)
    assert update.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    paths = jax.tree_util.tree_leaves_with_path(expected.params)
    for (path, leaf), initial, updated in zip(paths, *map(jax.tree.leaves, (state["params"], update.params)), strict=True):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(updated, leaf, rtol=0, atol=1e-6, err_msg=name)
        # The bias of choices has no gradient, since a softmax over the choices does not depend on it.
        assert np.abs(leaf - initial).max() > 1e-4 or name == "['head']['bias']", name


@pytest.mark.parametrize("vocab_size", [60, 127])
def test_special_tokens_are_added_behind_the_vocabulary(vocab_size):
    """With 127 entries, the padded table grows from 128 rows to 256."""
    old = dataclasses.replace(MODEL, vocab_size=vocab_size)
    new = dataclasses.replace(MODEL, vocab_size=vocab_size + 3)
    trained = initial(transformer, old, 1)
    random = initial(CLASSES, new, 2)
    moved = transfer(random, trained, -1, vocab_size)
    table = moved["embedding"]["tokens"]
    assert table.shape == (new.padded_vocab_size, 16)
    np.testing.assert_array_equal(table[:vocab_size], trained["embedding"]["tokens"][:vocab_size])
    np.testing.assert_array_equal(table[vocab_size:], random["embedding"]["tokens"][vocab_size:])
    assert (np.abs(table[vocab_size : vocab_size + 3]).max(axis=1) > 0).all()
    assert not np.any(table[vocab_size + 3 :])
    np.testing.assert_array_equal(moved["head"]["kernel"], random["head"]["kernel"])
    for old_leaf, leaf in zip(jax.tree.leaves(trained["blocks"]), jax.tree.leaves(moved["blocks"]), strict=True):
        np.testing.assert_array_equal(leaf, old_leaf)


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_blocks_are_transferred_from_the_input_upward(blocks):
    trained = initial(transformer, MODEL, 1)
    random = initial(CLASSES, MODEL, 2)
    moved = transfer(random, trained, blocks, MODEL.vocab_size)
    kernels = [tree["blocks"]["mlp"]["up"]["kernel"] for tree in (trained, random, moved)]
    for layer in range(2):
        np.testing.assert_array_equal(kernels[2][layer], kernels[0 if layer < blocks else 1][layer])
    np.testing.assert_array_equal(moved["embedding"]["positions"], trained["embedding"]["positions"])
