"""The configuration of a run: frozen dataclasses whose defaults are the paper's settings.

Section numbers refer to "Improving Language Understanding by Generative Pre-Training" (2018). Each field says what it may
change: `result` (the numbers of the run), `speed` (how fast, where, how often it saves) or `display`. A run's folder refuses
to resume only when a `result` field differs. Every rule that needs nothing but the config is checked on construction.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import json
import math
import re
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gpt_jax.errors import UserError, nearest


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


def steps_of(duration: str, field: str, *, batch_size: int, context_length: int, epoch: int, total: int | None = None) -> int:
    """Converts "2000 steps", "3 epochs", "6e6 tokens" or "0.2%" (of the whole run) to a number of updates, rounded down.

    Args:
      duration: a number and a unit; without a unit, steps.
      field: the dotted name for error messages.
      batch_size: examples in one update, over all hosts.
      context_length: tokens in one example.
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
        return int(number * total / 100)
    if unit == "epochs":
        return int(number * epoch / batch_size)
    if unit == "tokens":
        return int(number / (batch_size * context_length))
    return int(number)


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
class DataConfig:
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
    pipeline: Literal["auto", "tf", "threads"] = speed("auto")
    """What drives and prefetches the batches: `tf` (tf.data), `threads` (no tensorflow needed), `auto`: tf if it is installed.
    The batches are the same."""
    prefetch: int = speed(4)
    """Batches kept ready ahead of the training step. > 0."""
    verify: bool = speed(True)
    """Check every shard's checksum when a store is opened (about 1.5 GB/s a core). Sizes are checked always."""
    tokenizer: TokenizerConfig = TokenizerConfig()

    def __post_init__(self) -> None:
        require(0 <= self.validation_share < 1, "data.validation_share", f"must lie in [0, 1), not {self.validation_share}")
        require(self.max_bytes >= 0, "data.max_bytes", f"must be 0 (no limit) or positive, not {self.max_bytes}")
        require(self.shard_bytes > 0, "data.shard_bytes", f"must be positive, not {self.shard_bytes}")
        require(self.processes >= 0, "data.processes", f"must be 0 (one a core) or positive, not {self.processes}")
        require(self.prefetch > 0, "data.prefetch", f"must be positive, not {self.prefetch}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The Transformer of section 4.1, "Model specifications". Defaults are the paper's."""

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
    embed_dropout: float = result(0.1)
    """Dropout rate on the sum of token and position embeddings, in [0, 1) (section 4.1: 0.1)."""
    attention_dropout: float = result(0.1)
    """Dropout rate on attention probabilities, in [0, 1) (section 4.1: 0.1)."""
    residual_dropout: float = result(0.1)
    """Dropout rate on both residual branches, in [0, 1) (section 4.1: 0.1)."""
    init_stddev: float = result(0.02)
    """Standard deviation of the normal initialisation of weights and embeddings (section 4.1: 0.02)."""
    layer_norm_epsilon: float = result(1e-5)
    """Added to the variance in layer normalisation (released code: 1e-5)."""
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
    loss_chunk: int = speed(128)
    """Time steps whose logits exist at once in the loss; must divide `context_length`, or be larger."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "num_layers", "embed_dim", "num_heads", "mlp_dim", "loss_chunk"):
            require(getattr(self, name) > 0, f"model.{name}", f"must be positive, not {getattr(self, name)}")
        for name in ("embed_dropout", "attention_dropout", "residual_dropout"):
            require(0 <= getattr(self, name) < 1, f"model.{name}", f"must lie in [0, 1), not {getattr(self, name)}")
        require(self.init_stddev > 0, "model.init_stddev", f"must be positive, not {self.init_stddev}")
        require(self.layer_norm_epsilon > 0, "model.layer_norm_epsilon", f"must be positive, not {self.layer_norm_epsilon}")
        require(
            self.embed_dim % self.num_heads == 0,
            "model.num_heads",
            f"{self.num_heads} does not divide model.embed-dim {self.embed_dim}",
        )
        require(
            self.loss_chunk >= self.context_length or self.context_length % self.loss_chunk == 0,
            "model.loss_chunk",
            f"{self.loss_chunk} does not divide model.context-length {self.context_length}",
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
class TrainConfig:
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
    eval_windows: int = result(1024)
    """Most validation windows scored, from the split's beginning; 0: all of them."""
    save_every: str = speed("1000 steps")
    """How often a checkpoint is written; one is written at the end too."""
    keep_latest: int = speed(3)
    """Newest checkpoints kept. > 0."""
    keep_best: int = speed(1)
    """Checkpoints with the lowest validation loss kept besides; 0: none."""
    log_seconds: float = display(10.0)
    """Seconds between log lines where standard error is no terminal."""
    prompts: tuple[str, ...] = display(("The", "It was", "In the"))
    """Texts that are continued at every evaluation, to be read."""
    sample_tokens: int = display(40)
    """Tokens of each continuation; 0: none."""
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
        require(self.eval_windows >= 0, "train.eval_windows", f"must be 0 (all) or positive, not {self.eval_windows}")
        require(self.keep_latest > 0, "train.keep_latest", f"must be positive, not {self.keep_latest}")
        require(self.keep_best >= 0, "train.keep_best", f"must not be negative, is {self.keep_best}")
        require(self.log_seconds > 0, "train.log_seconds", f"must be positive, not {self.log_seconds}")
        require(self.sample_tokens >= 0, "train.sample_tokens", f"must not be negative, is {self.sample_tokens}")


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
class PretrainConfig:
    """Pre-training on unlabelled text (section 3.1). The defaults are the paper's settings."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()
    init: InitConfig = InitConfig()

    def __post_init__(self) -> None:
        fixed = {"gpt1": 40_478, "bytes": 257}.get(self.data.tokenizer.kind)
        require(
            fixed is None or self.model.vocab_size == fixed,
            "model.vocab_size",
            f"the {self.data.tokenizer.kind} tokenizer has {fixed} entries, not {self.model.vocab_size}",
        )
        require(
            self.mesh.tensor == -1 or self.model.num_heads % self.mesh.tensor == 0,
            "mesh.tensor",
            f"{self.mesh.tensor} does not divide model.num-heads {self.model.num_heads}",
        )


# -- looking at configs -----------------------------------------------------------------------------------------------------


def flatten(config: Any, prefix: str = "") -> dict[str, tuple[Any, str]]:
    """Maps each leaf's dotted name (as on the command line) to its value and effect."""
    leaves: dict[str, tuple[Any, str]] = {}
    for field in dataclasses.fields(config):
        name = prefix + field.name.rstrip("_").replace("_", "-")
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            leaves |= flatten(value, name + ".")
        else:
            leaves[name] = (value, field.metadata["effect"])
    return leaves


def digest(config: Any) -> str:
    """A hexadecimal SHA-256 of the config's `result` fields: equal digests compute the same numbers."""
    fields = {name: value for name, (value, effect) in flatten(config).items() if effect == "result"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def to_dict(config: Any) -> dict[str, Any]:
    """The config as JSON-ready nested dictionaries."""
    return dataclasses.asdict(config)


def from_dict(kind: type, values: dict[str, Any]) -> Any:
    """Rebuilds a config from `to_dict`'s JSON. Fields that did not exist when it was written take their defaults."""
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if field.name in values:
            value = values[field.name]
            if dataclasses.is_dataclass(field.default):
                value = from_dict(type(field.default), value)
            arguments[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**arguments)


# -- config files -----------------------------------------------------------------------------------------------------------


def config_folder() -> Path:
    """The folder of the configs that come with the package (configs/ in the repository)."""
    spec = importlib.util.find_spec("gpt_jax.configs")
    assert spec is not None
    return Path(next(iter(spec.submodule_search_locations or ())))


def names() -> list[str]:
    """The bare names of the configs that come with the package."""
    folder = config_folder()
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.py") if path.stem != "__init__")


def load(name: str) -> Any:
    """Loads a config by its path ("my/config.py") or its bare name under configs/ ("smoke", "finetune/cola").

    Raises:
      UserError: no such config, or the file has no `config()` that returns a config.
    """
    path = Path(name)
    if path.suffix != ".py":
        path = config_folder() / f"{name}.py"
        if not path.is_file():
            raise UserError(f"no config is named '{name}'; {nearest(name, names())}, or give the path of a .py file")
    if not path.is_file():
        raise UserError(f"{path}: no such config file")
    spec = importlib.util.spec_from_file_location(f"gpt_jax_config_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, "config", None)):
            raise UserError(f"{path}: a config file defines config(), a function that returns a PretrainConfig")
        value = module.config()
    except UserError:
        raise
    except Exception as error:  # whatever a user's file does wrong is said in one line
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(value, PretrainConfig):
        raise UserError(f"{path}: config() returned a {type(value).__name__}, not a PretrainConfig")
    return value


def override(config: Any, arguments: list[str], prog: str) -> Any:
    """Applies command-line overrides such as `--optim.peak-lr 1e-4` to a config.

    Names are checked first and values one at a time, so that each mistake is one line; `--help` prints every field.

    Raises:
      UserError: a name that does not exist (the nearest are offered), a value of the wrong type, or a rule across fields.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        tyro.cli(type(config), default=config, args=["--help"], prog=prog, config=(tyro.conf.FlagConversionOff,))
    flags: list[list[str]] = []
    known = flatten(config)
    for argument in arguments:
        if argument.startswith("--"):
            name, *value = argument[2:].split("=", 1)
            name = name.replace("_", "-")
            if name not in known:
                sections = sorted({key.split(".")[0] for key in known})
                options = [key for key in known if key.startswith(name.split(".")[0] + ".")] or [*known, *sections]
                hint = nearest(name, options) if name not in sections else "it is a section: give one of its fields"
                raise UserError(f"--{name}: no such field; {hint}")
            flags.append(["--" + name, *value])
        elif flags:
            flags[-1].append(argument)
        else:
            raise UserError(f"'{argument}' stands before any --field; overrides are written --section.field value")
    for flag in flags:
        try:
            _parse(config, flag)
        except SystemExit:
            raise UserError(f"{flag[0]}: {_expectation(config, flag)}") from None
        except UserError:
            pass  # A rule across fields may hold only once all overrides are in.
    return _parse(config, [word for flag in flags for word in flag])


def _parse(config: Any, arguments: list[str]) -> Any:
    """Lets tyro apply overrides; its own messages are boxes of several lines, so they are swallowed."""
    with contextlib.redirect_stderr(io.StringIO()):
        return tyro.cli(
            type(config), default=config, args=arguments, config=(tyro.conf.FlagConversionOff,), console_outputs=False
        )


def _expectation(config: Any, flag: list[str]) -> str:
    """Says what a field would have accepted, for a value that it did not."""
    kind: Any = type(config)
    for part in flag[0][2:].split("."):
        kind = {name.rstrip("_").replace("_", "-"): hint for name, hint in typing.get_type_hints(kind).items()}[part]
    given = " ".join(flag[1:])
    if not given:
        return "needs a value"
    if typing.get_origin(kind) is Literal:
        return f"'{given}' is not one of {', '.join(map(str, typing.get_args(kind)))}"
    expected = {int: "a whole number", float: "a number", bool: "True or False", str: "one text (quote it)"}
    return f"'{given}' is not {expected.get(kind, 'a list of texts')}"
