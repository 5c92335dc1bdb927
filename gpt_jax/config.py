"""The configuration of a run: frozen dataclasses whose defaults are the paper's settings.

Section numbers refer to "Improving Language Understanding by Generative Pre-Training" (2018). Each field says what it may
change: `result` (the numbers of the run), `speed` (how fast, where, how often it saves) or `display`. A run's folder refuses
to resume only when a `result` field differs. Every rule that needs nothing but the config is checked on construction.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Annotated, Any, Literal

import tyro

from gpt_jax.errors import UserError


def result(default: Any) -> Any:
    """A field that changes the numbers of a run."""
    return dataclasses.field(default=default, metadata={"effect": "result"})


def speed(default: Any) -> Any:
    """A field that changes how fast or where a run goes, not what it computes (beyond the order of a sum)."""
    return dataclasses.field(default=default, metadata={"effect": "speed"})


def display(default: Any) -> Any:
    """A field that changes only what a person sees."""
    return dataclasses.field(default=default, metadata={"effect": "display"})


def require(condition: bool, field: str, message: str) -> None:
    """Raises a `UserError` that names `field` unless `condition` holds."""
    if not condition:
        raise UserError(f"--{field.replace('_', '-')}: {message}")


# -- durations --------------------------------------------------------------------------------------------------------------

DURATION = re.compile(r"\s*(\d+(?:\.\d*)?(?:e\d+)?)\s*(steps?|epochs?|tokens|%)?\s*", re.IGNORECASE)


def steps_of(
    duration: str, field: str, *, batch_size: int, context_length: int | None, epoch: int, total: int | None = None
) -> float:
    """Converts "2000 steps", "3 epochs", "6e6 tokens" or "0.2%" (of the whole run) to a number of updates, fractions included.

    Args:
      duration: a number and a unit; without a unit, steps.
      field: the dotted name for error messages.
      batch_size: examples in one update, over all hosts.
      context_length: tokens in one example; None where examples differ.
      epoch: examples in one epoch.
      total: updates in the whole run, where "%" is allowed.
    """
    number, unit = parse_duration(duration, field)
    if unit == "%":
        require(
            total is not None,
            field,
            f"'{duration}' is a share of the run, which makes no sense here; give steps, tokens or epochs",
        )
        assert total is not None
        return number * total / 100
    if unit == "epochs":
        return number * epoch / batch_size
    if unit == "tokens":
        require(context_length is not None, field, "examples differ in their number of tokens; give steps or epochs")
        assert context_length is not None
        return number / (batch_size * context_length)
    return number


def parse_duration(duration: str, field: str) -> tuple[float, Literal["steps", "epochs", "tokens", "%"]]:
    """Splits a duration into its number and unit."""
    match = DURATION.fullmatch(duration)
    require(
        match is not None,
        field,
        f"'{duration}' is no duration; write for example '2000 steps', '3 epochs', '6e6 tokens' or '0.2%'",
    )
    assert match is not None
    unit: Any = {"s": "steps", "e": "epochs", "t": "tokens", "%": "%"}[(match[2] or "steps")[0].lower()]
    return float(match[1]), unit


# -- the parts of a config --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes token ids. Its number of entries is `model.vocab_size`."""

    kind: Literal["sentencepiece", "gpt1", "bytes"] = result("gpt1")
    """`gpt1`: the released vocabulary of 40,478 entries (section 4.1: 40,000 merges); `sentencepiece`: a BPE trained on the run's
    own text, with byte fallback; `bytes`: one entry a byte and an end-of-document entry (257), for tests."""
    path: str = result("")
    """Folder of a ready tokenizer. `gpt1` needs one with the released encoder_bpe_40000.json and vocab_40000.bpe; for
    `sentencepiece` an empty path means: train one."""
    normalization: Literal["identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf"] = result("nmt_nfkc")
    """SentencePiece's normalisation of text before it is split (`_cf` folds case; `identity` keeps every character). Fixed
    when the tokenizer is trained; unused by the other kinds."""
    sample_bytes: int = result(50_000_000)
    """Bytes of text, taken evenly over the documents, that a SentencePiece model is trained on. > 0."""

    def __post_init__(self) -> None:
        require(self.sample_bytes > 0, "data.tokenizer.sample_bytes", f"must be positive, not {self.sample_bytes}")


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """What makes the batches ahead of the training step that needs them."""

    pipeline: Literal["auto", "tf", "threads"] = speed("auto")
    """What drives and prefetches the batches: `tf` (tf.data), `threads` (no tensorflow needed), `auto`: tf if it is installed.
    The batches are the same."""
    prefetch: int = speed(4)
    """Batches kept ready ahead of the training step. > 0."""

    def __post_init__(self) -> None:
        require(self.prefetch > 0, "data.prefetch", f"must be positive, not {self.prefetch}")


@dataclasses.dataclass(frozen=True)
class DataConfig(PipelineConfig):
    """Which text, and the token store made from it."""

    source: str = result("")
    """What to read: a text file (.txt, .gz, .jsonl, or any other name as plain text), a folder, a glob, `tfds:NAME` for a
    tensorflow-datasets set, or `builtin:docs` for the documentation installed on this machine. Empty: whatever an existing store
    holds."""
    text_field: str = result("text")
    """The field of a .jsonl object or of a tensorflow-datasets example that holds the text."""
    max_bytes: int = result(0)
    """Keep this many bytes of text, documents in the order of their hash, so that the choice is even; 0: all of it."""
    validation_share: float = result(0.01)
    """Share of the documents held out for validation, chosen by the hash of their text. In [0, 1); 0 leaves none."""
    store: str = speed("")
    """Folder of the token store; empty: `store/` inside the run's folder. Where it lies changes nothing: a run is tied to its
    digest."""
    shard_bytes: int = result(64_000_000)
    """Bytes of text, roughly, behind one file of the store. > 0."""
    processes: int = speed(0)
    """Processes that tokenise; 0: one a core."""
    verify: bool = speed(True)
    """Check every shard's checksum when a store is opened (about 1.5 GB/s a core). Sizes are checked always."""
    tokenizer: TokenizerConfig = TokenizerConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.validation_share < 1, "data.validation_share", f"must lie in [0, 1), not {self.validation_share}")
        require(self.max_bytes >= 0, "data.max_bytes", f"must be 0 (no limit) or positive, not {self.max_bytes}")
        require(self.shard_bytes > 0, "data.shard_bytes", f"must be positive, not {self.shard_bytes}")
        require(self.processes >= 0, "data.processes", f"must be 0 (one a core) or positive, not {self.processes}")


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """How a model of any architecture is regularised and computed (section 4.1). Defaults are the paper's."""

    embed_dropout: float = result(0.1)
    """Dropout rate on the sum of token and position embeddings, in [0, 1) (section 4.1: 0.1)."""
    attention_dropout: float = result(0.1)
    """Dropout rate on attention probabilities, in [0, 1) (section 4.1: 0.1)."""
    residual_dropout: float = result(0.1)
    """Dropout rate on both residual branches, in [0, 1) (section 4.1: 0.1)."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = result("auto")
    """Type of activations and matrix products; `auto`: bfloat16 on accelerators, float32 on a CPU. Layer norms, softmaxes and
    the loss are computed in float32 whatever this says."""
    param_dtype: Literal["float32", "bfloat16"] = result("float32")
    """Type of the stored parameters. The optimiser computes, and keeps its moments, in float32."""
    matmul_precision: Literal["default", "high", "highest"] = result("default")
    """Precision of float32 matrix products on hardware that would otherwise shorten them (TPU, TF32 GPUs)."""
    remat: Literal["off", "dots", "full"] = speed("off")
    """What the backward pass computes again instead of keeping: `off` nothing, `dots` all but the outputs of matrix products with
    parameters, `full` each block from its input."""
    attention: Literal["auto", "plain"] = speed("auto")
    """Implementation of attention. `plain`: probabilities as an array, on any device. `auto`: the fastest that runs here."""
    loss_chunk: int = speed(0)
    """Time steps whose logits exist at once in the loss; 0: 128 on accelerators, and on a CPU as many as stay in its cache."""

    def __post_init__(self) -> None:
        for name in ("embed_dropout", "attention_dropout", "residual_dropout"):
            require(0 <= getattr(self, name) < 1, f"model.{name}", f"must lie in [0, 1), not {getattr(self, name)}")
        require(self.loss_chunk >= 0, "model.loss_chunk", f"must be 0 (by device) or positive, not {self.loss_chunk}")


@dataclasses.dataclass(frozen=True)
class ModelConfig(ModelOptions):
    """The model of section 4.1, "Model specifications", or the LSTM of section 5. Defaults are the paper's."""

    kind: Literal["transformer", "lstm"] = result("transformer")
    """The decoder-only Transformer, or in its place a single-layer LSTM (section 5, "Ablation studies"), which uses of the
    following fields only `vocab_size`, `context_length`, `embed_dim` and `lstm_units`."""
    vocab_size: int = result(40_478)
    """Entries of the vocabulary: the logical size. Arrays are padded up to a multiple of 128."""
    context_length: int = result(512)
    """Tokens the model sees at once, each with a learned position (section 4.1: 512)."""
    num_layers: int = result(12)
    """Transformer blocks (section 4.1: 12)."""
    embed_dim: int = result(768)
    """Width of the residual stream (section 4.1: 768)."""
    num_heads: int = result(12)
    """Attention heads; must divide `embed_dim` (section 4.1: 12)."""
    mlp_dim: int = result(3072)
    """Inner width of the position-wise feed-forward network (section 4.1: 3072)."""
    init_stddev: float = result(0.02)
    """Standard deviation of the normal initialisation of weights and embeddings (section 4.1: 0.02)."""
    layer_norm_epsilon: float = result(1e-5)
    """Added to the variance in layer normalisation (released code: 1e-5)."""
    lstm_units: int = result(2048)
    """Units of the LSTM (section 5: 2048)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vocab_size", "context_length", "num_layers", "embed_dim", "num_heads", "mlp_dim", "lstm_units"):
            require(getattr(self, name) > 0, f"model.{name}", f"must be positive, not {getattr(self, name)}")
        require(self.init_stddev > 0, "model.init_stddev", f"must be positive, not {self.init_stddev}")
        require(self.layer_norm_epsilon > 0, "model.layer_norm_epsilon", f"must be positive, not {self.layer_norm_epsilon}")
        require(
            self.kind == "lstm" or self.embed_dim % self.num_heads == 0,
            "model.num_heads",
            f"{self.num_heads} does not divide model.embed-dim {self.embed_dim}",
        )

    @property
    def head_dim(self) -> int:
        """Width of one attention head (64 in the paper)."""
        return self.embed_dim // self.num_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding array: `vocab_size` rounded up to a multiple of 128, the width of a TPU's matrix unit."""
        return -(-self.vocab_size // 128) * 128


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimiser and its schedule (section 4.1). Defaults are those of pre-training."""

    kind: Literal["adam_gpt1", "adamw"] = result("adam_gpt1")
    """`adam_gpt1`: Adam as released, with epsilon outside the bias correction and decay scaled by the rate; `adamw`: optax's."""
    peak_lr: float = result(2.5e-4)
    """Learning rate at the top of the schedule (section 4.1: 2.5e-4)."""
    schedule: Literal["cosine", "linear"] = result("cosine")
    """Shape after warm-up: `cosine` to 0 over all of the run (section 4.1), or `linear` to 0 (section 4.1, fine-tuning)."""
    warmup: str = result("2000 steps")
    """Duration of the linear warm-up from 0 (section 4.1: 2,000 updates); "%" is a share of the run."""
    b1: float = result(0.9)
    """Decay of Adam's first moment, in [0, 1) (released code)."""
    b2: float = result(0.999)
    """Decay of Adam's second moment, in [0, 1) (released code)."""
    epsilon: float = result(1e-8)
    """Adam's epsilon (released code)."""
    weight_decay: float = result(0.01)
    """Decay on matrices and embeddings, never on biases and gains (section 4.1: w = 0.01)."""
    clip_norm: float = result(0.0)
    """Largest global gradient norm; larger gradients are scaled down to it. 0: off (the paper's pre-training has none)."""

    def __post_init__(self) -> None:
        require(self.peak_lr > 0 and math.isfinite(self.peak_lr), "optim.peak_lr", f"must be positive, not {self.peak_lr}")
        parse_duration(self.warmup, "optim.warmup")
        for name in ("b1", "b2"):
            require(0 <= getattr(self, name) < 1, f"optim.{name}", f"must lie in [0, 1), not {getattr(self, name)}")
        require(self.epsilon > 0, "optim.epsilon", f"must be positive, not {self.epsilon}")
        require(self.weight_decay >= 0, "optim.weight_decay", f"must not be negative, is {self.weight_decay}")
        require(self.clip_norm >= 0, "optim.clip_norm", f"must be 0 (off) or positive, not {self.clip_norm}")


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long, in what batches, and what is kept on the way."""

    batch_size: int = result(64)
    """Examples in one update over all devices and hosts (section 4.1: 64). In pre-training an example is one window."""
    duration: str = result("100 epochs")
    """Length of the run (section 4.1: 100 epochs), in steps, tokens or epochs."""
    seed: int = result(0)
    """Seed of initialisation, of the order of windows and of dropout, in [0, 2^32)."""
    micro_batches: int = speed(1)
    """Parts that a batch is split into to save memory; must divide `batch_size`. The update is that of the whole batch."""
    eval_every: str = speed("1000 steps")
    """How often the validation split is scored; it is scored at the end too."""
    save_every: str = speed("1000 steps")
    """How often a checkpoint is written; one is written at the end too."""
    keep_latest: int = speed(3)
    """Newest checkpoints kept. > 0."""
    keep_best: int = speed(1)
    """Checkpoints with the best validation score kept besides; 0: none."""
    log_seconds: float = display(10.0)
    """Seconds between log lines where standard error is no terminal."""
    tensorboard: bool = display(True)
    """Write TensorBoard's event files beside metrics.jsonl."""

    def __post_init__(self) -> None:
        require(self.batch_size > 0, "train.batch_size", f"must be positive, not {self.batch_size}")
        require(
            self.micro_batches > 0 and self.batch_size % self.micro_batches == 0,
            "train.micro_batches",
            f"{self.micro_batches} does not divide train.batch-size {self.batch_size}",
        )
        require(0 <= self.seed < 2**32, "train.seed", f"must lie in [0, 2^32), not {self.seed}")
        for name in ("duration", "eval_every", "save_every"):
            number, unit = parse_duration(getattr(self, name), f"train.{name}")
            require(number > 0, f"train.{name}", f"must be positive, not '{getattr(self, name)}'")
            require(
                name != "duration" or unit != "%",
                "train.duration",
                "a share of itself makes no sense; give steps, tokens or epochs",
            )
        require(self.keep_latest > 0, "train.keep_latest", f"must be positive, not {self.keep_latest}")
        require(self.keep_best >= 0, "train.keep_best", f"must not be negative, is {self.keep_best}")
        require(self.log_seconds > 0, "train.log_seconds", f"must be positive, not {self.log_seconds}")


@dataclasses.dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """The same for pre-training, with what is scored and shown of a language model."""

    eval_windows: int = result(1024)
    """Most validation windows scored, from the split's beginning; 0: all of them."""
    prompts: tuple[str, ...] = display(("The", "It was", "In the"))
    """Texts that are continued at every evaluation, to be read."""
    sample_tokens: int = display(40)
    """Tokens of each continuation; 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.eval_windows >= 0, "train.eval_windows", f"must be 0 (all) or positive, not {self.eval_windows}")
        require(self.sample_tokens >= 0, "train.sample_tokens", f"must not be negative, is {self.sample_tokens}")


@dataclasses.dataclass(frozen=True)
class FinetuneLoopConfig(LoopConfig):
    """The same for fine-tuning, with the settings of section 4.1, "Fine-tuning details"."""

    batch_size: int = result(32)
    """Examples in one update over all devices and hosts (section 4.1: 32). A question with all its choices is one example."""
    duration: str = result("3 epochs")
    """Length of the run (section 4.1: 3 epochs), in steps or epochs; an epoch's last partial batch is dropped."""
    eval_every: str = result("1 epochs")
    """How often the validation split is scored and a checkpoint written, among which the best is chosen; at the end too."""
    save_every: str = speed("1 epochs")
    """How often a checkpoint is written besides, so that less is lost when the run is killed."""
    keep_latest: int = speed(1)
    """Newest checkpoints kept. > 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.keep_best > 0, "train.keep_best", "must be positive: the best checkpoint is what is scored in the end")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; at most one is -1, "all that are left"."""

    slice: int = speed(1)
    """TPU slices joined by the data-centre network; each holds a whole copy of the model."""
    data: int = speed(-1)
    """Copies of the model within a slice; each takes its share of the batch."""
    fsdp: int = speed(1)
    """Devices that share the batch and the storage of the parameters and of the optimiser's state."""
    tensor: int = speed(1)
    """Devices that split heads, feed-forward width and vocabulary between them."""

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            require(size == -1 or size > 0, f"mesh.{name}", f"must be positive, or -1 for all that are left, not {size}")
        require(list(sizes.values()).count(-1) <= 1, "mesh", "only one axis can be -1, all that are left")


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Several processes of one run. On TPU pods, SLURM and Kubernetes all of this is found by itself."""

    coordinator: str = speed("")
    """HOST:PORT of process 0; empty: found by itself, or a single process."""
    num_processes: int = speed(0)
    """Processes in all, with `coordinator`."""
    process_id: int = speed(-1)
    """This process's number from 0, with `coordinator`."""
    timeout_seconds: int = speed(300)
    """Seconds to wait for the other processes at the start."""

    def __post_init__(self) -> None:
        if self.coordinator:
            require(":" in self.coordinator, "distributed.coordinator", f"'{self.coordinator}' is not HOST:PORT")
            require(self.num_processes > 0, "distributed.num_processes", "must be given with distributed.coordinator")
            require(
                0 <= self.process_id < self.num_processes,
                "distributed.process_id",
                f"must lie in [0, {self.num_processes}), not {self.process_id}",
            )
        require(self.timeout_seconds > 0, "distributed.timeout_seconds", f"must be positive, not {self.timeout_seconds}")


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Where the parameters come from."""

    from_: Annotated[str, tyro.conf.arg(name="from")] = result("")
    """A run's folder (its newest sound checkpoint) or one checkpoint's folder whose parameters to start from; empty: random."""


@dataclasses.dataclass(frozen=True)
class TransferConfig(InitConfig):
    """Where the parameters of a fine-tuning come from, and with them its architecture and its tokenizer."""

    from_: Annotated[str, tyro.conf.arg(name="from")] = result("")
    """A run's folder (its newest sound checkpoint) or one checkpoint's folder, or `none`: random parameters (section 5, Table 5,
    "w/o pre-training")."""
    like: str = result("")
    """With `--init.from none`: the run or checkpoint whose architecture and tokenizer to take, or a pre-training config by name,
    whose architecture is taken."""
    tokenizer: str = result("")
    """With the name of a config in `like`: the folder of a tokenizer of that config's kind."""
    blocks: int = result(-1)
    """Pre-trained blocks taken over, counted from the input, besides the embeddings; -1: all (section 5, "Impact of number of
    layers transferred"). The other blocks start at random."""

    def __post_init__(self) -> None:
        require(self.blocks >= -1, "init.blocks", f"must be -1 (all) or a number of blocks, not {self.blocks}")
        require(
            self.from_ != "none" or self.blocks == -1, "init.blocks", "with --init.from none there are no blocks to take over"
        )
        require(
            self.from_ == "none" or not self.like,
            "init.like",
            "goes with --init.from none; a checkpoint brings its own architecture and tokenizer",
        )


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """A labelled task, and how its examples become the model's input (section 3.3, Figure 1)."""

    name: str = result("")
    """A task of the paper: snli, mnli, qnli, rte, scitail, story_cloze, race, mrpc, qqp, stsb, cola or sst2. Empty: a task of
    your own, described by the fields from `kind` to `labels`."""
    path: str = speed("")
    """Folder with the named task's files in their original layout; empty: from tensorflow-datasets."""
    kind: Literal["classification", "entailment", "similarity", "multiple_choice"] = result("classification")
    """Your own task's input transformation: one text; premise and hypothesis; two texts in both orders; a context and answers."""
    train: str = speed("")
    """Your own task's training rows: a .tsv, .csv or .jsonl file with named columns."""
    validation: str = speed("")
    """The same for validation, by which the best checkpoint is chosen."""
    test: str = speed("")
    """The same for testing; may be empty, and may lack labels."""
    texts: tuple[str, ...] = result(("text",))
    """Names of your own task's text columns in the order of the transformation: the text; premise, hypothesis; the two texts; the
    context and then each answer."""
    label: str = result("label")
    """Name of the column with the label. Of a multiple choice it is the answer's number from 0, or a member of `labels`."""
    labels: tuple[str, ...] = result(())
    """The label set in the order of the classifier's outputs; empty: the labels of the training rows, sorted."""
    max_train: int = result(0)
    """Use this many training rows, an even choice that is the same for every seed; 0: all of them."""
    max_tokens: int = result(0)
    """Longest input in tokens, special ones included; longer ones are truncated and counted. 0: the model's context."""
    truncation: Literal["longest", "released"] = result("longest")
    """`longest`: tokens are taken off the end of whichever segment is longest; `released`: every segment is cut at
    `max_tokens` / 2 - 2 tokens, as in the released code."""
    order: Literal["grouped", "random"] = result("grouped")
    """`grouped`: a batch holds examples of about one length, so that little of it is padding; `random`: any."""
    lengths: int = speed(8)
    """Most lengths that batches are padded to, each compiled once for training and once for scoring. > 0."""
    lm_weight: float = result(0.5)
    """Weight of the auxiliary language-model loss (section 4.1: lambda = 0.5); 0: off."""
    classifier_dropout: float = result(0.1)
    """Dropout rate before the classifier, in [0, 1) (section 4.1: 0.1)."""

    def __post_init__(self) -> None:
        own = bool(self.train or self.validation or self.test)
        require(
            not (self.name and own), "task.name", f"'{self.name}' is a task of the paper; drop it, or --task.train and its like"
        )
        for name in ("kind", "texts", "label", "labels"):
            given = getattr(self, name) != type(self).__dataclass_fields__[name].default
            require(not (self.name and given), f"task.{name}", f"describes a task of your own, and '{self.name}' is known")
        require(not (own and self.path), "task.path", "is for the paper's tasks; your own has --task.train and its like")
        require(self.max_train >= 0, "task.max_train", f"must be 0 (all) or positive, not {self.max_train}")
        require(self.max_tokens >= 0, "task.max_tokens", f"must be 0 (the context) or positive, not {self.max_tokens}")
        require(self.lengths > 0, "task.lengths", f"must be positive, not {self.lengths}")
        require(self.lm_weight >= 0, "task.lm_weight", f"must not be negative, is {self.lm_weight}")
        require(0 <= self.classifier_dropout < 1, "task.classifier_dropout", f"must lie in [0, 1), not {self.classifier_dropout}")
        wanted = {"classification": 1, "entailment": 2, "similarity": 2}.get(self.kind)
        if own and wanted is not None:
            require(len(self.texts) == wanted, "task.texts", f"{self.kind} takes {wanted} text columns, not {len(self.texts)}")
        elif own:
            require(
                len(self.texts) >= 3, "task.texts", "multiple_choice takes the context's column and those of at least two answers"
            )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What every training run has: a model, batches, an optimiser, a length, devices and a beginning."""

    model: ModelConfig = ModelConfig()
    data: PipelineConfig = PipelineConfig()
    optim: OptimConfig = OptimConfig()
    train: LoopConfig = LoopConfig()
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()
    init: InitConfig = InitConfig()


@dataclasses.dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Pre-training on unlabelled text (section 3.1). The defaults are the paper's settings."""

    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()

    def __post_init__(self) -> None:
        fixed = {"gpt1": 40_478, "bytes": 257}.get(self.data.tokenizer.kind)
        require(
            fixed is None or self.model.vocab_size == fixed,
            "model.vocab_size",
            f"the {self.data.tokenizer.kind} tokenizer has {fixed} entries, not {self.model.vocab_size}",
        )
        require(
            self.mesh.tensor == -1 or self.model.kind == "lstm" or self.model.num_heads % self.mesh.tensor == 0,
            "mesh.tensor",
            f"{self.mesh.tensor} does not divide model.num-heads {self.model.num_heads}",
        )


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """Fine-tuning on a labelled task (section 3.2). The defaults are the settings of section 4.1, "Fine-tuning details"."""

    # The architecture is the checkpoint's.
    model: ModelOptions = ModelOptions()  # type: ignore[assignment]
    optim: OptimConfig = OptimConfig(peak_lr=6.25e-5, schedule="linear", warmup="0.2%", clip_norm=1.0)
    train: FinetuneLoopConfig = FinetuneLoopConfig()
    init: TransferConfig = TransferConfig()
    task: TaskConfig = TaskConfig()


@dataclasses.dataclass(frozen=True)
class FinetuneRunConfig(FinetuneConfig):
    """A fine-tuning whose architecture is known: what its folder records."""

    model: ModelConfig = ModelConfig()
