"""The linear head on the extract token, and the loss of fine-tuning (section 3.2, equations 3 to 5)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gpt_jax.config import FinetuneRunConfig, ModelConfig
from gpt_jax.model.dropout import DropoutKey, Site, dropout, mask_stream
from gpt_jax.model.loss import Batch, cross_entropy, embed_tokens
from gpt_jax.model.network import network
from gpt_jax.model.transformer import Params, ParamSpec
from gpt_jax.tasks.registry import Task
from gpt_jax.train.step import TrainableModel


class Head(NamedTuple):
    """A classifier on top of the network.

    For a task with classes, the activations of an example's sequences (for example, both orders of a pair) are added, and one
    linear layer computes `outputs` scores. For multiple choice, one linear layer computes one score for the sequence of each
    choice. In both cases, a softmax over the scores gives the probabilities.
    """

    outputs: int
    """Number of scores of an example: one for each class or choice."""
    choices: bool
    """Whether the outputs are choices."""
    lm_weight: float
    """Weight of the auxiliary language-model loss (lambda in equation 5: 0.5)."""
    dropout: float
    """Dropout rate on the activations before the linear layer, in [0, 1)."""

    def trainable_model(self) -> TrainableModel:
        """Returns the network with this head and its loss.

        The loss is the task's loss, averaged over examples, plus lm_weight times the language model's loss, averaged first over
        the next tokens of each sequence and then over all sequences, including all choices.
        """
        return TrainableModel(self.loss, normalize, self.init, self.param_specs)

    def init(self, config: ModelConfig, key: PRNGKeyArray) -> Params:
        """Returns random parameters of the network, and of the head: weights N(0, init_stddev) and bias 0."""
        network_key, head_key = jax.random.split(key)
        width = 1 if self.choices else self.outputs
        kernel = config.init_stddev * jax.random.normal(head_key, (config.embed_dim, width))
        head = {"kernel": kernel.astype(config.param_dtype), "bias": jnp.zeros(width, config.param_dtype)}
        return network(config).init(config, network_key) | {"head": head}

    def param_specs(self, config: ModelConfig) -> Params:
        """Returns the parameter specs of the network and of the head."""
        head = {"kernel": ParamSpec(("embed", None), decay=True), "bias": ParamSpec((None,), decay=False)}
        return network(config).param_specs(config) | {"head": head}

    def loss(self, config: ModelConfig, params: Params, batch: Batch, dropout_key: DropoutKey | None) -> Float[Array, ""]:
        """Returns the sum of both losses over the examples, whose weights `normalize` has scaled.

        Args:
          batch: a dictionary of arrays: tokens and targets int32 [batch, sequences, time]; loss_weights float32 of the same
            shape, the weight of each target; extract int32 [batch, sequences], the position of the extract token; example_id
            int32 [batch, sequences], the number of the sequence in the global batch; labels float32 [batch, outputs], weighted
            distributions.
        """
        batch = _fold_sequences(batch)
        if dropout_key is not None:
            dropout_key = dropout_key._replace(example_id=batch["example_id"])
        token_rows, table = embed_tokens(config, params, batch["tokens"])
        hidden = network(config).apply(config, params, batch["tokens"], dropout_key=dropout_key, token_rows=token_rows)
        scores = self._scores(config, params, hidden, batch, dropout_key)
        loss = -(batch["labels"] * jax.nn.log_softmax(scores)).sum()
        if self.lm_weight:
            with jax.default_matmul_precision(config.matmul_precision):
                loss += self.lm_weight * cross_entropy(
                    hidden, table, batch["targets"], batch["loss_weights"], config.vocab_size, config.loss_chunk
                )
        return loss

    def log_probabilities(self, config: ModelConfig, params: Params, batch: Batch) -> Float[Array, "batch outputs"]:
        """Returns the log-probability of each output of each example, float32, without dropout."""
        batch = _fold_sequences(batch)
        hidden = network(config).apply(config, params, batch["tokens"])
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
            # All sequences of an example share one mask, as in the released code.
            example = dropout_key.example_id[:: extracted.shape[1]] // extracted.shape[1]
            stream = mask_stream(dropout_key.seed, dropout_key.step, 0, Site.CLASSIFIER, example, 0)
            extracted = extracted * dropout(jnp.ones_like(extracted[:, :1]), stream, self.dropout)
        kernel, bias = (params["head"][name].astype(jnp.float32) for name in ("kernel", "bias"))
        with jax.default_matmul_precision(config.matmul_precision):
            if self.choices:
                return (extracted @ kernel + bias)[..., 0]
            return extracted.sum(axis=1) @ kernel + bias


def make_head(task: Task, config: FinetuneRunConfig) -> Head:
    """Returns the head for a task."""
    choices = task.kind == "multiple_choice"
    return Head(len(task.labels), choices, config.task.lm_weight, config.task.classifier_dropout)


def normalize(batch: Batch) -> Batch:
    """Divides labels by the number of labeled examples and loss weights by the number of sequences.

    The losses of micro-batches then add up to the loss of the complete batch, because the weights of a sequence add up to 1, and
    so do the labels of an example.
    """
    return batch | {name: batch[name] / jnp.maximum(batch[name].sum(), 1e-6) for name in ("labels", "loss_weights")}


def _fold_sequences(batch: Batch) -> Batch:
    """Folds the sequences of each example into the batch axis."""
    return {name: x if name == "labels" else x.reshape(-1, *x.shape[2:]) for name, x in batch.items()}


def transfer(random: Params, pretrained: Params, blocks: int, entries: Int[Array, ""] | int) -> Params:
    """Replaces random parameters with pre-trained ones.

    Args:
      random: parameters of the model to be fine-tuned. Special tokens may make its vocabulary larger, and may increase the padded
        size of the array.
      pretrained: parameters of the pre-trained model. If it has a head, the head is not used.
      blocks: number of blocks transferred, counted from the input, in addition to the embeddings; -1: all.
      entries: number of vocabulary entries transferred; the others stay random.
    """
    table, old = random["embedding"]["tokens"], pretrained["embedding"]["tokens"]
    old = jnp.pad(old, ((0, max(len(table) - len(old), 0)), (0, 0)))[: len(table)]
    tokens = jnp.where(jnp.arange(len(table))[:, None] < entries, old.astype(table.dtype), table)
    result = random | {"embedding": random["embedding"] | pretrained["embedding"] | {"tokens": tokens}}
    for name in random.keys() - {"embedding", "head"}:  # "blocks", stacked along their first axis; or the "lstm"
        if blocks == -1:
            result[name] = pretrained[name]
        elif name == "blocks":
            result[name] = jax.tree.map(lambda new, old: new.at[:blocks].set(old[:blocks]), random[name], pretrained[name])
    return jax.tree.map(lambda new, like: new.astype(like.dtype), result, random)
