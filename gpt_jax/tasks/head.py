"""The linear head on the extract token, and the loss of fine-tuning (section 3.2, equations 3 to 5)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gpt_jax.config import ModelConfig
from gpt_jax.model import network
from gpt_jax.model.dropout import Site, dropout, mask_stream
from gpt_jax.model.loss import Batch, cross_entropy
from gpt_jax.model.transformer import DropoutKey, Params, ParamSpec
from gpt_jax.train.step import TrainableModel


class Head(NamedTuple):
    """How a task's outputs are read from the network.

    Of a task with classes, the activations of an example's sequences are added (both orders of a pair) and one linear layer gives
    `outputs` scores. Of a multiple choice, one linear layer gives each choice's sequence one score. A softmax is over the scores.
    """

    outputs: int
    """Scores of an example: classes, or choices."""
    choices: bool
    """Whether the outputs are choices."""
    lm_weight: float
    """Weight of the auxiliary language-model loss (lambda in equation 5: 0.5)."""
    dropout: float
    """Rate on the activations before the linear layer, in [0, 1)."""

    def model_fns(self) -> TrainableModel:
        """What `train` minimises: mean over examples of the task's loss + lm_weight x mean over sequences of the mean over their
        next tokens of the language model's loss, all choices included."""
        return TrainableModel(self.loss, normalize, self.init, self.param_specs)

    def init(self, config: ModelConfig, key: PRNGKeyArray) -> Params:
        """The network's parameters, and a head N(0, init_stddev) with bias 0."""
        network_key, head_key = jax.random.split(key)
        width = 1 if self.choices else self.outputs
        kernel = config.init_stddev * jax.random.normal(head_key, (config.embed_dim, width))
        head = {"kernel": kernel.astype(config.param_dtype), "bias": jnp.zeros(width, config.param_dtype)}
        return network.init(config, network_key) | {"head": head}

    def param_specs(self, config: ModelConfig) -> Params:
        """As `network.param_specs`, with the head."""
        head = {"kernel": ParamSpec(("embed", None), decay=True), "bias": ParamSpec((None,), decay=False)}
        return network.param_specs(config) | {"head": head}

    def loss(self, config: ModelConfig, params: Params, batch: Batch, dropout_key: DropoutKey | None) -> Float[Array, ""]:
        """Sum over examples, whose weights `normalize` has scaled, of both losses.

        Args:
          batch: tokens and targets int32 [batch, sequences, time], weights float32 likewise (of each next token), extract and row
            int32 [batch, sequences] (position of the extract token, number of the sequence in the global batch), labels float32
            [batch, outputs] (weighted distributions).
        """
        batch = _fold(batch)
        if dropout_key is not None:
            dropout_key = dropout_key._replace(example_id=batch["example_id"])
        hidden = network.apply(config, params, batch["tokens"], dropout_key=dropout_key)
        scores = self._scores(config, params, hidden, batch, dropout_key)
        loss = -(batch["labels"] * jax.nn.log_softmax(scores)).sum()
        if self.lm_weight:
            table = params["embedding"]["tokens"]
            with jax.default_matmul_precision(config.matmul_precision):
                loss += self.lm_weight * cross_entropy(
                    hidden, table, batch["targets"], batch["loss_weights"], config.vocab_size, config.loss_chunk
                )
        return loss

    def log_probabilities(self, config: ModelConfig, params: Params, batch: Batch) -> Float[Array, "batch outputs"]:
        """Of each of an example's outputs, float32, without dropout."""
        batch = _fold(batch)
        hidden = network.apply(config, params, batch["tokens"])
        return jax.nn.log_softmax(self._scores(config, params, hidden, batch, None))

    def _scores(
        self,
        config: ModelConfig,
        params: Params,
        hidden: Float[Array, "folded time embed"],
        batch: Batch,
        dropout_key: DropoutKey | None,
    ) -> Float[Array, "batch outputs"]:
        examples = batch["labels"].shape[0]
        extracted = jnp.take_along_axis(hidden, batch["extract"][:, None, None], axis=1)
        extracted = extracted.reshape(examples, -1, hidden.shape[-1]).astype(jnp.float32)
        if dropout_key is not None and self.dropout:
            # One mask for all sequences of an example, as released.
            number = dropout_key.example_id[:: extracted.shape[1]] // extracted.shape[1]
            stream = mask_stream(dropout_key.seed, dropout_key.step, 0, Site.CLASSIFIER, number, 0)
            extracted = extracted * dropout(jnp.ones_like(extracted[:, :1]), stream, self.dropout)
        kernel, bias = (params["head"][name].astype(jnp.float32) for name in ("kernel", "bias"))
        with jax.default_matmul_precision(config.matmul_precision):
            if self.choices:
                return (extracted @ kernel + bias)[..., 0]
            return extracted.sum(axis=1) @ kernel + bias


def normalize(batch: Batch) -> Batch:
    """Divides the labels by the number of labelled examples and the next tokens' weights by the number of sequences, so that
    losses of micro-batches add up. (A sequence's weights, and an example's labels, add up to 1.)"""
    scaled = {name: batch[name] / jnp.maximum(batch[name].sum(), 1e-6) for name in ("labels", "loss_weights")}
    return batch | scaled


def _fold(batch: Batch) -> Batch:
    """Folds the sequences of each example into the batch axis."""
    return {name: x if name == "labels" else x.reshape(-1, *x.shape[2:]) for name, x in batch.items()}


def transfer(random: Params, trained: Params, blocks: int, entries: Int[Array, ""] | int) -> Params:
    """Puts pre-trained parameters in the place of random ones.

    Args:
      random: of the model to be fine-tuned, whose vocabulary may be larger by special tokens (and cross a multiple of 128).
      trained: of the pre-trained model; a head of its own is left behind.
      blocks: blocks taken over, counted from the input, besides the embeddings; -1: all.
      entries: entries of the vocabulary taken over; the others stay random.
    """
    table, old = random["embedding"]["tokens"], trained["embedding"]["tokens"]
    old = jnp.pad(old, ((0, max(len(table) - len(old), 0)), (0, 0)))[: len(table)]
    tokens = jnp.where(jnp.arange(len(table))[:, None] < entries, old.astype(table.dtype), table)
    result = random | {"embedding": random["embedding"] | trained["embedding"] | {"tokens": tokens}}
    for name in random.keys() - {"embedding", "head"}:  # "blocks", stacked along their first axis; or the "lstm"
        if blocks == -1:
            result[name] = trained[name]
        elif name == "blocks":
            result[name] = jax.tree.map(lambda new, old: new.at[:blocks].set(old[:blocks]), random[name], trained[name])
    return jax.tree.map(lambda new, like: new.astype(like.dtype), result, random)
