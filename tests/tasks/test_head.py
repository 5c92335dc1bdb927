"""The head and the loss of fine-tuning, against the paper's equations written out, and what is taken over of a checkpoint."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config import LoopConfig, MeshConfig, ModelConfig, OptimConfig, RunConfig
from gpt_jax.model import transformer
from gpt_jax.runtime import sharding
from gpt_jax.tasks.head import Head, normalize, transfer
from gpt_jax.train.optimizer import Horizon
from gpt_jax.train.step import init_state, lower_step

MODEL = ModelConfig(vocab_size=60, context_length=16, num_layers=2, embed_dim=16, num_heads=2, mlp_dim=32, init_stddev=0.2)
CLASSES = Head(outputs=3, choices=False, lm_weight=0.5, dropout=0.1)
CHOICES = Head(outputs=4, choices=True, lm_weight=0.5, dropout=0.1)
EXAMPLES, TIME = 8, 12


def random_batch(head, sequences, seed=0):
    """Sequences of random tokens and lengths; soft labels."""
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


def written_out(head, params, batch):
    """L3(C) = L2(C) + lambda L1(C), equation 5, an example and a sequence at a time."""
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
    params = head.init(MODEL, jax.random.key(0))
    batch = random_batch(head, sequences)
    loss, gradients = jax.jit(jax.value_and_grad(lambda p: head.loss(MODEL, p, normalize(batch), None)))(params)
    expected, reference = jax.jit(jax.value_and_grad(lambda p: written_out(head, p, batch)))(params)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        wanted = np.asarray(dict(jax.tree_util.tree_leaves_with_path(reference))[path])
        np.testing.assert_allclose(gradient, wanted, rtol=1e-3, atol=1e-5, err_msg=jax.tree_util.keystr(path))


def test_the_auxiliary_loss_is_what_its_weight_says():
    params = CLASSES.init(MODEL, jax.random.key(0))
    batch = normalize(random_batch(CLASSES, 1))
    losses = {w: float(CLASSES._replace(lm_weight=w).loss(MODEL, params, batch, None)) for w in (0.0, 0.5, 1.0)}
    assert losses[1.0] - losses[0.5] == pytest.approx(losses[0.5] - losses[0.0], rel=1e-4)
    assert losses[0.5] > losses[0.0] + 0.5
    logs = CLASSES.log_probabilities(MODEL, params, batch)
    assert losses[0.0] == pytest.approx(float(-(batch["labels"] * logs).sum()), rel=1e-5)


def test_the_choices_of_a_question_share_the_classifiers_mask():
    """Four equal choices get equal scores under dropout before the classifier, and other masks in other questions and steps."""
    model = dataclasses.replace(MODEL, embed_dropout=0.0, attention_dropout=0.0, residual_dropout=0.0)
    head = CHOICES._replace(dropout=0.5, lm_weight=0.0)
    params = head.init(model, jax.random.key(0))
    batch = random_batch(head, 4)
    batch |= {name: batch[name][:1, :1].repeat(4, axis=1).repeat(EXAMPLES, axis=0) for name in ("tokens", "extract")}
    labels = np.eye(4, dtype=np.float32)[np.arange(EXAMPLES) % 4] / EXAMPLES

    def loss(step):
        return head.loss(model, params, batch | {"labels": labels}, DropoutKey(0, step, batch["example_id"]))

    assert loss(0) == pytest.approx(np.log(4), rel=1e-5)  # equal scores, whatever was dropped
    classes = CLASSES._replace(dropout=0.5, lm_weight=0.0)
    params = classes.init(model, jax.random.key(0))
    one = {name: array[:, :1] if array.ndim > 1 and name != "labels" else array for name, array in batch.items()}
    one["labels"] = np.eye(3, dtype=np.float32)[np.zeros(EXAMPLES, int)] / EXAMPLES
    values = {float(classes.loss(model, params, one, DropoutKey(0, step, one["example_id"]))) for step in range(4)}
    assert len(values) == 4


@pytest.mark.parametrize(
    ("parts", "mesh"), [(4, MeshConfig(data=1)), (2, MeshConfig(data=2, fsdp=2, tensor=2))], ids=["single", "2 x 2 x 2"]
)
def test_parts_and_meshes_do_not_change_an_update(parts, mesh):
    """Dropout on: four micro-batches on one device, and two on eight, give the parameters that the whole batch gives on one."""
    batch = random_batch(CHOICES, 4)
    # With the usual epsilon the first update is hardly more than each gradient's sign, so that its size would not show.
    optim = OptimConfig(peak_lr=1e-2, warmup="0 steps", epsilon=1e-2)
    results = []
    for grad_accum_steps, shape in ((1, MeshConfig(data=1)), (parts, mesh)):
        config = RunConfig(model=MODEL, optim=optim, train=LoopConfig(batch_size=EXAMPLES, grad_accum_steps=grad_accum_steps))
        devices = sharding.make_mesh(shape, jax.devices()[: 1 if shape.data == 1 else 8])
        model_fns = CHOICES.trainable_model()
        placed = sharding.place_batch(devices, jax.device_get(batch), EXAMPLES)
        abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in placed.items()}
        step = lower_step(config, devices, horizon=Horizon(10, 0), model_fns=model_fns, batch=abstract).compile()
        state, metrics = step(init_state(config, devices, model_fns), placed)
        assert metrics["learning_rate"] == pytest.approx(optim.peak_lr)
        results.append((float(metrics["loss"]), float(metrics["grad_norm"]), jax.device_get(state["params"])))
    (loss, norm, params), (same_loss, same_norm, same_params) = results
    assert same_loss == pytest.approx(loss, rel=1e-5)
    assert same_norm == pytest.approx(norm, rel=1e-4)
    for (path, expected), got in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(same_params), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("vocab_size", [60, 127])
def test_special_tokens_are_added_behind_the_vocabulary(vocab_size):
    """Also where the padded table grows from 128 rows to 256."""
    old = dataclasses.replace(MODEL, vocab_size=vocab_size)
    new = dataclasses.replace(MODEL, vocab_size=vocab_size + 3)
    trained = network.init(old, jax.random.key(1))
    random = CLASSES.init(new, jax.random.key(2))
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
def test_so_many_blocks_are_taken_over_from_the_input_up(blocks):
    trained = network.init(MODEL, jax.random.key(1))
    random = CLASSES.init(MODEL, jax.random.key(2))
    moved = transfer(random, trained, blocks, MODEL.vocab_size)
    kernels = [tree["blocks"]["mlp"]["up"]["kernel"] for tree in (trained, random, moved)]
    for layer in range(2):
        np.testing.assert_array_equal(kernels[2][layer], kernels[0 if layer < blocks else 1][layer])
    np.testing.assert_array_equal(moved["embedding"]["positions"], trained["embedding"]["positions"])
