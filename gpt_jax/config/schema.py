"""The configuration of a run: frozen dataclasses whose defaults are the paper's settings.

Section numbers refer to "Improving Language Understanding by Generative Pre-Training" (2018). Each field declares what it
affects:

    result     the numbers of the run; a run cannot be resumed if such a field differs
    input      the numbers of the run, but only through the content that a path leads to; a resumed run may find the same content
               at another path (data are compared by the data digest, tokenizers and checkpoints by their fingerprints)
    speed      how fast and where the run is computed, and how often it saves
    display    what it prints and plots

In an input field, a leading `~` stands for the user's home folder. All rules that depend only on the config are checked when it
is constructed.
"""

import dataclasses
import os
import re
import typing
from typing import Annotated, Any, ClassVar, Literal

import tyro

from gpt_jax.errors import field_error, require, shortened
from gpt_jax.inputs.numbers import AXIS_SIZE, BLOCKS, FRACTION, NOT_NEGATIVE, POSITIVE, SEED, Range

Effect = Literal["result", "input", "speed", "display"]


def field(default: Any, *, affects: Effect, within: Range | None = None) -> Any:
    """Returns a config field with a default, an effect, and an allowed range for its value or for the number in its duration."""
    return dataclasses.field(default=default, metadata={"affects": affects, "within": within})


def check_type(value: Any, kind: Any) -> tuple[bool, str]:
    """Returns whether a value has a field's type, and a phrase for that type."""
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind), f"one of {', '.join(typing.get_args(kind))}"
    if typing.get_origin(kind) is tuple:
        part = typing.get_args(kind)[0]
        parts = {str: "strings", int: "whole numbers"}[part]
        return isinstance(value, tuple) and all(check_type(item, part)[0] for item in value), f"a tuple of {parts}"
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "a string"}
    if isinstance(value, int) and abs(value) >= 2**63:  # It would not fit into an array.
        return False, "a number below 2^63"
    # A float field accepts an int, but no numeric field accepts a bool.
    fits = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    return fits, words.get(kind, f"a {kind.__name__}")


@typing.dataclass_transform(frozen_default=True)
@dataclasses.dataclass(frozen=True)
class Section:
    """Base class of configs and of their sections. It turns each subclass into a frozen dataclass that checks its fields.

    Raises:
      UserError: a value has the wrong type or is out of range; the message names the field as on the command line.
    """

    section: ClassVar[str] = ""
    """The section's dotted name; empty for the whole config of a run."""

    def __init_subclass__(cls, section: str = "") -> None:
        cls.section = section or cls.section
        dataclasses.dataclass(frozen=True)(cls)

    def __post_init__(self) -> None:
        types = typing.get_type_hints(type(self))
        for spec in dataclasses.fields(self):
            value, kind, within = getattr(self, spec.name), types[spec.name], spec.metadata.get("within")
            name = f"{self.section}.{spec.name.rstrip('_')}".lstrip(".")
            shown, (fits, phrase) = shortened(repr(value)), check_type(value, kind)
            require(fits, name, f"{shown} is not {phrase}")
            text = "".join(map(str, value)) if isinstance(value, tuple) else str(value)
            require(text.encode(errors="ignore").decode() == text, name, f"{shown} is not UTF-8")
            if spec.metadata.get("affects") == "input":
                require("\0" not in value, name, f"{shown} is not a path, because it contains a NUL character")
                object.__setattr__(self, spec.name, os.path.expanduser(value))
            if within is not None:
                number = parse_duration(value, name)[0] if isinstance(spec.default, str) else value
                require(within.contains(number), name, f"must {within.words}, not {shown}")


# -- durations --------------------------------------------------------------------------------------------------------------

DURATION = re.compile(r"\s*(\d+(?:\.\d*)?(?:e\d+)?)\s*(steps?|epochs?|tokens|%)?\s*", re.IGNORECASE)


def duration_to_steps(
    duration: str, field: str, *, batch_size: int, context_length: int | None, epoch: int, total: int | None = None
) -> float:
    """Converts "2000 steps", "3 epochs", "6e6 tokens" or "0.2%" (of the run) to a number of updates, which may be fractional.

    Args:
      duration: a number and a unit; the default unit is steps.
      field: the field's dotted name, for error messages.
      batch_size: number of examples in one update, over all hosts.
      context_length: number of tokens in one example; None if it varies.
      epoch: number of examples in one epoch.
      total: number of updates in the complete run, if "%" is allowed.

    Raises:
      UserError: the duration cannot be parsed, or its unit makes no sense for this field.
    """
    number, unit = parse_duration(duration, field)
    if unit == "epochs":
        return number * epoch / batch_size
    if unit == "tokens":
        if context_length is None:
            raise field_error(field, "the number of tokens varies between examples; use steps or epochs")
        return number / (batch_size * context_length)
    if unit == "%":
        if total is None:
            raise field_error(field, f"'{shortened(duration)}' is a percentage of the run; use steps, tokens or epochs here")
        return number * total / 100
    return number


def parse_duration(duration: str, field: str) -> tuple[float, Literal["steps", "epochs", "tokens", "%"]]:
    """Splits a duration into its number and its unit.

    Raises:
      UserError: it is not a number, optionally followed by a known unit.
    """
    match = DURATION.fullmatch(duration)
    if match is None:
        example = "'2000 steps', '3 epochs', '6e6 tokens' or '0.2%'"
        raise field_error(field, f"'{shortened(duration)}' is not a duration; use, for example, {example}")
    unit: Any = {"s": "steps", "e": "epochs", "t": "tokens", "%": "%"}[(match[2] or "steps")[0].lower()]
    return float(match[1]), unit


# -- the sections of a config -----------------------------------------------------------------------------------------------


class TokenizerConfig(Section, section="data.tokenizer"):
    """The tokenizer, which converts text to token ids. Its number of entries is `model.vocab_size`."""

    kind: Literal["sentencepiece", "gpt1", "bytes"] = field("gpt1", affects="result")
    """`gpt1`: the released vocabulary of 40,478 entries (section 4.1: 40,000 merges); `sentencepiece`: a BPE trained on the run's
    own text, with byte fallback; `bytes`: one entry for each byte and an end-of-document entry (257), for tests."""
    path: str = field("", affects="input")
    """Folder of an existing tokenizer. `gpt1` needs a folder with the released encoder_bpe_40000.json and vocab_40000.bpe;
    `sentencepiece` trains a tokenizer if this is empty."""
    normalization: Literal["identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf"] = field("nmt_nfkc", affects="result")
    """SentencePiece's normalization of text before it is split (`_cf` folds case; `identity` keeps every character). It is fixed
    when the tokenizer is trained; the other kinds do not use it."""
    sample_bytes: int = field(50_000_000, affects="result", within=POSITIVE)
    """Number of bytes of text that a SentencePiece model is trained on, sampled evenly from the documents. > 0."""


class PipelineConfig(Section, section="data"):
    """The input pipeline, which makes batches ahead of the training step that needs them."""

    pipeline: Literal["auto", "tf", "threads"] = field("auto", affects="speed")
    """Implementation of the input pipeline: `tf` (tf.data), `threads` (without tensorflow), or `auto`, which selects `tf` if
    tensorflow is installed. The batches are the same."""
    prefetch: int = field(4, affects="speed", within=POSITIVE)
    """Number of batches that are prepared ahead of the training step. > 0."""


class DataConfig(PipelineConfig):
    """The text to train on, and the token store that is built from it."""

    source: str = field("", affects="input")
    """Text to read: a file, a folder, a glob, `tfds:NAME` for a data set from tensorflow-datasets, or `builtin:docs` for the
    documentation installed on this machine. Files may be plain text, .jsonl, .ndjson, .json or .parquet, and compressed as .gz or
    .zst. Empty: use the text of an existing store."""
    format: Literal["auto", "text", "jsonl", "json", "parquet"] = field("auto", affects="result")
    """Format of all files of the source. `auto`: decided for each file by its first bytes and its extension; a file whose format
    is unclear is refused."""
    allow_skipped: bool = field(False, affects="speed")
    """Whether more than 1 % of a folder's files, or of their bytes, may be left out because they contain no text (empty files,
    images, archives). They are counted in any case."""
    text_field: str = field("text", affects="result")
    """Field that contains the text in a JSON object, in a row of a .parquet file, or in a tensorflow-datasets example."""
    max_bytes: int = field(0, affects="result", within=NOT_NEGATIVE)
    """Maximum number of bytes of text to use. Documents are taken in the order of their hashes, so the sample is uniform.
    0: all."""
    validation_share: float = field(0.01, affects="result", within=FRACTION)
    """Fraction of the documents held out for validation, chosen by the hash of their text. In [0, 1); 0: none."""
    store: str = field("", affects="input")
    """Folder of the token store; empty: `store/` inside the run's folder. The folder can be moved, because a resumed run compares
    only the store's digest."""
    shard_bytes: int = field(64_000_000, affects="result", within=POSITIVE)
    """Approximate number of bytes of text in each shard of the store. > 0."""
    processes: int = field(0, affects="speed", within=NOT_NEGATIVE)
    """Number of processes that tokenize; 0: one for each core."""
    verify: bool = field(True, affects="speed")
    """Whether to verify every shard's checksum when a store is opened (about 1.5 GB/s per core). Sizes are always checked."""
    tokenizer: TokenizerConfig = TokenizerConfig()


class ModelOptions(Section, section="model"):
    """Settings for the regularization and computation of any model (section 4.1). The defaults are the paper's."""

    embed_dropout: float = field(0.1, affects="result", within=FRACTION)
    """Dropout rate on the sum of token and position embeddings, in [0, 1) (section 4.1: 0.1)."""
    attention_dropout: float = field(0.1, affects="result", within=FRACTION)
    """Dropout rate on attention probabilities, in [0, 1) (section 4.1: 0.1)."""
    residual_dropout: float = field(0.1, affects="result", within=FRACTION)
    """Dropout rate on both residual branches, in [0, 1) (section 4.1: 0.1)."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = field("auto", affects="result")
    """Type of activations and matrix products; `auto`: bfloat16 on accelerators, float32 on a CPU. Layer norms, softmaxes and
    the loss are always computed in float32, and gradients of matrices and embeddings are summed over devices in float32."""
    param_dtype: Literal["float32", "bfloat16"] = field("float32", affects="result")
    """Type of the stored parameters. The optimizer always computes in float32 and keeps its moments in float32."""
    matmul_precision: Literal["default", "high", "highest"] = field("default", affects="result")
    """Precision of float32 matrix products on hardware that would otherwise reduce it (TPUs, GPUs with TF32)."""
    remat: Literal["auto", "off", "dots", "full"] = field("auto", affects="speed")
    """Activations that the backward pass recomputes instead of storing. `off`: none; `dots`: all that can be recomputed without
    a matrix product with parameters, so that the queries, keys, values and results of attention, the inputs of GELU, the residual
    sums, and the gates of an LSTM are stored; `full`: all activations of a block; `auto`: `dots`, or `full` in a pre-training for
    which the memory of the accelerators would not suffice with `dots`, and `off` for an LSTM."""
    layer_unroll: int = field(0, affects="speed", within=NOT_NEGATIVE)
    """Number of layers that follow one another in each iteration of the loop over layers; must divide `num_layers`. On TPUs, more
    copy fewer activations and take longer to compile (docs/kernels.md). 0: all if a pre-training on TPUs has up to 12 and
    `remat` is not `full`, else 1."""
    attention: Literal["auto", "plain", "blockwise", "pallas_tpu", "pallas_gpu"] = field("auto", affects="speed")
    """Implementation of attention. `plain` computes all probabilities as one array; `blockwise` computes them in blocks, and
    again in the backward pass, and stores none; both run on any device. `pallas_tpu` and
    `pallas_gpu` are kernels for TPUs and NVIDIA GPUs. `auto`: `pallas_tpu` on a TPU, `blockwise` on a CPU, except for short
    sequences, and otherwise `plain`."""
    loss_chunk: int = field(0, affects="speed", within=NOT_NEGATIVE)
    """Number of time steps whose logits are in memory at once in the loss; 0: chosen automatically (128 on accelerators, and as
    many as fit into the cache on a CPU)."""


class ModelConfig(ModelOptions):
    """The model of section 4.1, "Model specifications", or the LSTM of section 5. The defaults are the paper's."""

    kind: Literal["transformer", "lstm"] = field("transformer", affects="result")
    """Architecture: a decoder-only Transformer, or a single-layer LSTM (section 5, "Ablation studies"). Of the following fields,
    the LSTM uses only `vocab_size`, `context_length`, `embed_dim`, `init_stddev` and `lstm_units`."""
    vocab_size: int = field(40_478, affects="result", within=POSITIVE)
    """Number of vocabulary entries (the logical size). Arrays are padded to a multiple of 128."""
    context_length: int = field(512, affects="result", within=POSITIVE)
    """Number of tokens that the model processes at once, each with a learned position embedding (section 4.1: 512)."""
    num_layers: int = field(12, affects="result", within=POSITIVE)
    """Number of Transformer blocks (section 4.1: 12)."""
    embed_dim: int = field(768, affects="result", within=POSITIVE)
    """Width of the residual stream (section 4.1: 768)."""
    num_heads: int = field(12, affects="result", within=POSITIVE)
    """Number of attention heads; must divide `embed_dim` (section 4.1: 12)."""
    mlp_dim: int = field(3072, affects="result", within=POSITIVE)
    """Inner width of the position-wise feed-forward network (section 4.1: 3072)."""
    init_stddev: float = field(0.02, affects="result", within=POSITIVE)
    """Standard deviation of the normal initialization of weights and embeddings (section 4.1: 0.02)."""
    layer_norm_epsilon: float = field(1e-5, affects="result", within=POSITIVE)
    """Term added to the variance in layer normalization (released code: 1e-5)."""
    lstm_units: int = field(2048, affects="result", within=POSITIVE)
    """Number of units of the LSTM (section 5: 2048)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        divides = self.kind == "lstm" or self.embed_dim % self.num_heads == 0
        require(divides, "model.num_heads", f"{self.num_heads} does not divide model.embed-dim {self.embed_dim}")
        if self.num_layers % (self.layer_unroll or 1):
            divisors = [str(n) for n in range(1, min(self.num_layers, 1000) + 1) if self.num_layers % n == 0]
            problem = f"{self.layer_unroll} does not divide model.num-layers {self.num_layers}; use one of {', '.join(divisors)}"
            raise field_error("model.layer-unroll", problem)

    @property
    def head_dim(self) -> int:
        """Width of one attention head (64 in the paper)."""
        return self.embed_dim // self.num_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding array: `vocab_size` rounded up to a multiple of 128, the width of a TPU's matrix unit."""
        return -(-self.vocab_size // 128) * 128

    @property
    def num_parameters(self) -> int:
        """Number of parameters, excluding the rows that pad the vocabulary (116,534,784 for the paper's Transformer)."""
        width, embeddings = self.embed_dim, self.vocab_size * self.embed_dim
        if self.kind == "lstm":
            gates = 4 * self.lstm_units * (width + self.lstm_units + 1)
            return embeddings + gates + (self.lstm_units + 1) * width
        attention = (width + 1) * 3 * width + (width + 1) * width
        mlp = (width + 1) * self.mlp_dim + (self.mlp_dim + 1) * width
        layer_norms = 2 * 2 * width
        return embeddings + self.context_length * width + self.num_layers * (attention + mlp + layer_norms)


class OptimConfig(Section, section="optim"):
    """The optimizer and its schedule (section 4.1). The defaults are those of pre-training."""

    kind: Literal["adam_gpt1", "adamw"] = field("adam_gpt1", affects="result")
    """Optimizer. `adam_gpt1`: Adam as in the released code, with epsilon outside the bias correction and with weight decay scaled
    by the learning rate; `adamw`: AdamW from Optax."""
    peak_lr: float = field(2.5e-4, affects="result", within=POSITIVE)
    """Maximum learning rate of the schedule (section 4.1: 2.5e-4)."""
    schedule: Literal["cosine", "linear"] = field("cosine", affects="result")
    """Decay to 0 after the warm-up: `cosine`, over the complete run (section 4.1), or `linear` (section 4.1,
    fine-tuning)."""
    warmup: str = field("2000 steps", affects="result", within=NOT_NEGATIVE)
    """Duration of the linear warm-up from 0 (section 4.1: 2,000 updates); "%" means a percentage of the run."""
    b1: float = field(0.9, affects="result", within=FRACTION)
    """Decay rate of Adam's first moment, in [0, 1) (released code: 0.9)."""
    b2: float = field(0.999, affects="result", within=FRACTION)
    """Decay rate of Adam's second moment, in [0, 1) (released code: 0.999)."""
    epsilon: float = field(1e-8, affects="result", within=POSITIVE)
    """Adam's epsilon (released code: 1e-8)."""
    weight_decay: float = field(0.01, affects="result", within=NOT_NEGATIVE)
    """Weight decay of matrices and embeddings; biases and gains do not decay (section 4.1: w = 0.01)."""
    clip_norm: float = field(0.0, affects="result", within=NOT_NEGATIVE)
    """Maximum global gradient norm; larger gradients are scaled down to it. 0: no clipping (as in the paper's pre-training)."""


class LoopConfig(Section, section="train"):
    """The training loop: its batches, its length, its evaluations, and its checkpoints."""

    batch_size: int = field(64, affects="result", within=POSITIVE)
    """Number of examples in one update, over all devices and hosts (section 4.1: 64). In pre-training, an example is one
    window."""
    duration: str = field("100 epochs", affects="result", within=POSITIVE)
    """Length of the run (section 4.1: 100 epochs), in steps, tokens or epochs."""
    seed: int = field(0, affects="result", within=SEED)
    """Seed of the initial parameters, the order of examples, and dropout, in [0, 2^32)."""
    grad_accum_steps: int = field(1, affects="speed", within=POSITIVE)
    """Number of micro-batches that a batch is split into to save memory; must divide `batch_size`. There is one update per
    batch."""
    eval_every: str = field("1000 steps", affects="speed", within=POSITIVE)
    """Interval between evaluations on the validation split; there is also one at the end."""
    save_every: str = field("1000 steps", affects="speed", within=POSITIVE)
    """Interval between checkpoints; there is also one at the end."""
    keep_latest: int = field(3, affects="speed", within=POSITIVE)
    """Number of newest checkpoints to keep. > 0."""
    keep_best: int = field(1, affects="speed", within=NOT_NEGATIVE)
    """Number of additional checkpoints to keep, those with the best validation scores; 0: none."""
    log_seconds: float = field(10.0, affects="display", within=POSITIVE)
    """Seconds between log lines if standard error is not a terminal."""
    tensorboard: bool = field(True, affects="display")
    """Whether to write TensorBoard event files in addition to metrics.jsonl."""

    def __post_init__(self) -> None:
        super().__post_init__()
        steps, size = self.grad_accum_steps, self.batch_size
        require(size % steps == 0, "train.grad_accum_steps", f"{steps} does not divide train.batch-size {size}")
        _, unit = parse_duration(self.duration, "train.duration")
        require(unit != "%", "train.duration", "cannot be a percentage of itself; use steps, tokens or epochs")


class TrainConfig(LoopConfig):
    """The training loop of pre-training, with the settings of its evaluations and sample texts."""

    eval_windows: int = field(1024, affects="result", within=NOT_NEGATIVE)
    """Maximum number of validation windows to score, from the beginning of the split; 0: all of them."""
    prompts: tuple[str, ...] = field(("The", "It was", "In the"), affects="display")
    """Prompts from which the model generates sample texts at every evaluation."""
    sample_tokens: int = field(40, affects="display", within=NOT_NEGATIVE)
    """Number of tokens in each sample text; 0: no sample texts."""


class FinetuneLoopConfig(LoopConfig):
    """The training loop of fine-tuning, with the settings of section 4.1, "Fine-tuning details"."""

    batch_size: int = field(32, affects="result", within=POSITIVE)
    """Number of examples in one update, over all devices and hosts (section 4.1: 32). A question with its choices is one
    example."""
    duration: str = field("3 epochs", affects="result", within=POSITIVE)
    """Length of the run (section 4.1: 3 epochs), in steps or epochs; the last partial batch of an epoch is dropped."""
    eval_every: str = field("1 epochs", affects="result", within=POSITIVE)
    """Interval at which the validation split is scored and a checkpoint is written; both also happen at the end. The best of
    these checkpoints is selected; in a tie, the first."""
    eval_in_first_epoch: bool = field(False, affects="result")
    """Whether to also score and save after updates 1,000, 2,000, 4,000, 8,000, 16,000 and 32,000 of the first epoch, as the
    released code does."""
    save_every: str = field("1 epochs", affects="speed", within=POSITIVE)
    """Interval between additional checkpoints, so that less work is lost if the run is killed."""
    keep_latest: int = field(1, affects="speed", within=POSITIVE)
    """Number of newest checkpoints to keep. > 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.keep_best > 0, "train.keep_best", "must be positive: the best checkpoint is scored at the end")


class MeshConfig(Section, section="mesh"):
    """Number of devices along each mesh axis. At most one axis can be -1, which means all remaining devices."""

    slice: int = field(1, affects="speed", within=AXIS_SIZE)
    """Number of TPU slices connected by the data-center network; each has a complete copy of the model."""
    data: int = field(-1, affects="speed", within=AXIS_SIZE)
    """Number of copies of the model within a slice; each processes its share of the batch."""
    fsdp: int = field(1, affects="speed", within=AXIS_SIZE)
    """Number of devices among which the batch, the parameters and the optimizer state are divided."""
    tensor: int = field(1, affects="speed", within=AXIS_SIZE)
    """Number of devices among which attention heads, feed-forward width and vocabulary are divided."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = dataclasses.astuple(self)
        require(sizes.count(-1) <= 1, "mesh", "only one axis can be -1 (all remaining devices)")


class DistributedConfig(Section, section="distributed"):
    """Settings for runs with several processes. They are detected on TPU pods, SLURM and Kubernetes."""

    coordinator: str = field("", affects="speed")
    """HOST:PORT of process 0; empty: detected automatically, or a single process."""
    num_processes: int = field(0, affects="speed", within=NOT_NEGATIVE)
    """Number of processes; required with `coordinator`."""
    process_id: int = field(-1, affects="speed")
    """Index of this process, counted from 0; required with `coordinator`."""
    timeout_seconds: int = field(300, affects="speed", within=POSITIVE)
    """Number of seconds to wait for the other processes at startup."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coordinator:
            count, number = self.num_processes, self.process_id
            require(":" in self.coordinator, "distributed.coordinator", f"'{shortened(self.coordinator)}' is not HOST:PORT")
            require(count > 0, "distributed.num_processes", "is required with distributed.coordinator")
            require(0 <= number < count, "distributed.process_id", f"must be in [0, {count}), not {number}")


class InitConfig(Section, section="init"):
    """The source of the initial parameters."""

    from_: Annotated[str, tyro.conf.arg(name="from")] = field("", affects="input")
    """Folder of a run (its newest sound checkpoint is used) or of one checkpoint, with the parameters to start from; empty:
    random parameters."""


class TransferConfig(InitConfig):
    """The source of the initial parameters, the architecture and the tokenizer of a fine-tuning run."""

    from_: Annotated[str, tyro.conf.arg(name="from")] = field("", affects="input")
    """Folder of a run (its newest sound checkpoint is used) or of one checkpoint; `none`: random parameters (section 5, Table 5,
    "w/o pre-training")."""
    like: str = field("", affects="input")
    """With `--init.from none`: the run or checkpoint whose architecture and tokenizer to use, or the name of a pre-training
    config whose architecture to use."""
    tokenizer: str = field("", affects="input")
    """Folder of a tokenizer of the kind that the config specifies. Used if `like` is the name of a config."""
    blocks: int = field(-1, affects="result", within=BLOCKS)
    """Number of pre-trained blocks to transfer, counted from the input, in addition to the embeddings; -1: all (section 5,
    "Impact of number of layers transferred"). The other blocks start with random parameters."""

    def __post_init__(self) -> None:
        super().__post_init__()
        random = self.from_ == "none"
        require(not random or self.blocks == -1, "init.blocks", "with --init.from none there are no blocks to transfer")
        require(random or not self.like, "init.like", "requires --init.from none; a checkpoint has its own architecture")


class TaskConfig(Section, section="task"):
    """A labeled task, and the transformation of its examples into the model's input (section 3.3, Figure 1)."""

    name: str = field("", affects="result")
    """Name of a task from the paper: snli, mnli, qnli, rte, scitail, story_cloze, race, mrpc, qqp, stsb, cola or sst2. Empty: a
    task of your own, which the fields from `kind` to `labels` describe."""
    path: str = field("", affects="input")
    """Folder with the files of the task `name` in their original layout; empty: read the task from tensorflow-datasets."""
    kind: Literal["classification", "entailment", "similarity", "multiple_choice"] = field("classification", affects="result")
    """Input transformation of your own task: one text; premise, hypothesis; two texts in both orders; a context and answers."""
    train: str = field("", affects="input")
    """Training rows of your own task: a table with named columns (.tsv, .csv, .txt, .json, .jsonl, .ndjson or .parquet, also
    compressed: .gz or .zst)."""
    validation: str = field("", affects="input")
    """Validation rows of your own task, used to select the best checkpoint."""
    test: str = field("", affects="input")
    """Test rows of your own task. They are optional and may have no labels."""
    texts: tuple[str, ...] = field(("text",), affects="result")
    """Names of your own task's text columns in the order of the transformation: the text; premise, hypothesis; the two texts; the
    context and then each answer. `title+body` joins two columns into one text with a space."""
    label: str = field("label", affects="result")
    """Name of the column with the label. For multiple choice, a label is the answer's index, counted from 0, or a member of
    `labels`."""
    labels: tuple[str, ...] = field((), affects="result")
    """The label set in the order of the classifier's outputs; empty: the labels of the training rows, sorted."""
    score_range: tuple[int, ...] = field((), affects="result")
    """The lowest and the highest score, for example `0 5`, if your own task is a regression; empty: labels are classes. Each
    whole number in the range is an output, a score between two of them is a mixture of both, and the prediction is the expected
    score."""
    metrics: tuple[str, ...] = field((), affects="result")
    """Metrics of your own task: `accuracy`, `f1` (of the second of two labels) or `matthews` for classes; `pearson` or `spearman`
    for scores. The first selects the best checkpoint. Empty: accuracy, or pearson and spearman."""
    max_train: int = field(0, affects="result", within=NOT_NEGATIVE)
    """Maximum number of training rows to use. They are sampled uniformly, identically for every seed. 0: all of them."""
    max_tokens: int = field(0, affects="result", within=NOT_NEGATIVE)
    """Maximum length of an input in tokens, including special tokens. Longer inputs are truncated and counted. 0: the model's
    context length."""
    truncation: Literal["longest", "released"] = field("longest", affects="result")
    """Method of truncation. `longest`: tokens are removed from the end of the longest segment until the input fits; `released`:
    every segment is cut to `max_tokens` / 2 - 2 tokens, as in the released code."""
    bucket_by_length: bool = field(True, affects="result")
    """Whether to put examples of similar length into the same batch, which reduces padding; False: random batches."""
    num_length_buckets: int = field(0, affects="speed", within=NOT_NEGATIVE)
    """Maximum number of lengths that batches are padded to. Training and scoring are each compiled once per length. 0: chosen by
    the length of the run, so that more compilations would take longer than the padding that they save."""
    lm_weight: float = field(0.5, affects="result", within=NOT_NEGATIVE)
    """Weight of the auxiliary language-model loss (section 4.1: lambda = 0.5); 0: off."""
    classifier_dropout: float = field(0.1, affects="result", within=FRACTION)
    """Dropout rate before the classifier, in [0, 1) (section 4.1: 0.1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        own, shown = bool(self.train or self.validation or self.test), shortened(self.name)
        hint = "omit it, or omit --task.train, --task.validation and --task.test"
        require(not (self.name and own), "task.name", f"'{shown}' is a task from the paper; {hint}")
        for name in ("kind", "texts", "label", "labels", "score_range", "metrics"):
            given = getattr(self, name) != type(self).__dataclass_fields__[name].default
            require(not (self.name and given), f"task.{name}", f"is only for your own tasks; omit it for '{shown}'")
        require(not (own and self.path), "task.path", "is only for the paper's tasks; for your own task, use --task.train etc.")
        given, wanted = len(self.texts), {"classification": 1, "entailment": 2, "similarity": 2}.get(self.kind)
        if own and wanted is not None:
            require(given == wanted, "task.texts", f"{self.kind} takes {wanted} text columns, not {given}")
        elif own:
            require(given >= 3, "task.texts", "multiple_choice takes a context column and at least two answer columns")


class ProfileConfig(Section, section="profile"):
    """A profile of a few updates."""

    steps: str = field("", affects="display")
    """Updates to profile, as FIRST:LAST, counted from 1; empty: none. The trace is written to `profile/` in the run's folder,
    and a table of where the time went is shown."""


class RunConfig(Section):
    """The settings of every training run: model, data, optimizer, training loop, devices and initial parameters."""

    model: ModelConfig = ModelConfig()
    data: PipelineConfig = PipelineConfig()
    optim: OptimConfig = OptimConfig()
    train: LoopConfig = LoopConfig()
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()
    init: InitConfig = InitConfig()
    profile: ProfileConfig = ProfileConfig()


class PretrainConfig(RunConfig):
    """Pre-training on unlabeled text (section 3.1). The defaults are the paper's settings."""

    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        model, kind = self.model, self.data.tokenizer.kind
        size = {"gpt1": 40_478, "bytes": 257}.get(kind, model.vocab_size)
        require(model.vocab_size == size, "model.vocab_size", f"the {kind} tokenizer has {size} entries, not {model.vocab_size}")


class FinetuneConfig(RunConfig):
    """Fine-tuning on a labeled task (section 3.2). The defaults are the settings of section 4.1, "Fine-tuning details"."""

    # The architecture comes from the checkpoint.
    model: ModelOptions = ModelOptions()  # type: ignore[assignment]
    optim: OptimConfig = OptimConfig(peak_lr=6.25e-5, schedule="linear", warmup="0.2%", clip_norm=1.0)
    train: FinetuneLoopConfig = FinetuneLoopConfig()
    init: TransferConfig = TransferConfig()
    task: TaskConfig = TaskConfig()


class FinetuneRunConfig(FinetuneConfig):
    """The config of a fine-tuning run with its architecture, as recorded in the run's folder."""

    model: ModelConfig = ModelConfig()
