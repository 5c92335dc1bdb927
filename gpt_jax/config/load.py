"""Config loading, command-line overrides, and conversion to and from JSON, including digests and renamed fields."""

import contextlib
import dataclasses
import hashlib
import importlib.resources
import json
import os
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from gpt_jax.config.schema import Effect, FinetuneConfig, FinetuneRunConfig, PretrainConfig, RunConfig
from gpt_jax.errors import UserError, described, nearest, shortened
from gpt_jax.inputs.config_files import run_config_file

# -- fields that were renamed -----------------------------------------------------------------------------------------------

CONFIG_VERSION = 2
"""Version of the field names below, recorded in config.json. Version 1 had the names on the left of `RENAMED_FIELDS`."""

DIGEST_VERSION = 2
"""Version of `config_digest`, recorded wherever a digest is. Version 1 included the paths of some inputs."""


class Renamed(NamedTuple):
    """The current name of a renamed field, and a mapping from its old values to the current ones."""

    name: str
    values: Mapping[Any, Any] = {}

    def __str__(self) -> str:
        values = ", ".join(f"{old} is now {new}" for old, new in self.values.items())
        return f"--{self.name}" + (f" ({values})" if values else "")


RENAMED_FIELDS: dict[str, Renamed] = {
    "train.micro-batches": Renamed("train.grad-accum-steps"),
    "task.lengths": Renamed("task.num-length-buckets"),
    "task.order": Renamed("task.bucket-by-length", {"grouped": True, "random": False}),
}
"""Maps the dotted names of version 1 fields to their current names. Recorded configs are translated when they are read."""


def upgrade_field(name: str, value: Any) -> tuple[str, Any]:
    """Returns the current name and value of a field recorded under a dotted name of any version."""
    renamed = RENAMED_FIELDS.get(name, Renamed(name))
    return renamed.name, next((new for old, new in renamed.values.items() if old == value), value)


# -- configs as data --------------------------------------------------------------------------------------------------------


def flatten_config(config: Any, prefix: str = "") -> dict[str, tuple[Any, Effect]]:
    """Maps the dotted name of each field (as on the command line) to its value and what it affects."""
    leaves: dict[str, tuple[Any, Effect]] = {}
    for field in dataclasses.fields(config):
        name = prefix + _option_name(field.name)
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            leaves |= flatten_config(value, name + ".")
        else:
            leaves[name] = (value, field.metadata["affects"])
    return leaves


def config_digest(config: Any) -> str:
    """Returns a hexadecimal SHA-256 of the config's `result` fields.

    Configs with equal digests compute the same numbers from the same data, starting from the same parameters.
    """
    fields = {name: value for name, (value, affects) in flatten_config(config).items() if affects == "result"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def config_to_dict(config: Any) -> dict[str, Any]:
    """Returns the config as nested dictionaries, ready for JSON."""
    return dataclasses.asdict(config)


def config_from_dict(values: Mapping[str, Any], where: str | Path = "config.json") -> RunConfig:
    """Rebuilds a run's config from the JSON of `config_to_dict`, which may have been written by an earlier version.

    Fields that did not exist when it was written get their default values.

    Args:
      values: the nested dictionaries.
      where: the file that they were read from, for error messages.

    Raises:
      UserError: a field is unknown in every version, or its value is not allowed.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: the config is {described(values)}, not an object with named fields")
    default = FinetuneRunConfig() if "task" in values else PretrainConfig()
    known = flatten_config(default)
    fields = dict(upgrade_field(name, value) for name, value in _flatten_dict(values).items())
    for name in sorted(fields.keys() - known.keys()):
        raise UserError(f"{where}: no config field is named '{shortened(name)}'; {nearest(name, known)}")
    try:
        return _replace_fields(default, fields)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _flatten_dict(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Maps the dotted name of each field in nested dictionaries to its value."""
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        name = prefix + _option_name(key)
        nested = isinstance(value, dict) and name.count(".") < 3  # No config nests sections any deeper.
        leaves |= _flatten_dict(value, name + ".") if nested else {name: value}
    return leaves


def _replace_fields(config: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """Returns a copy of a config with new values for the fields with the given dotted names."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        name, value = prefix + _option_name(field.name), getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = _replace_fields(value, values, name + ".")
        elif name in values:
            changes[field.name] = tuple(values[name]) if isinstance(values[name], list) else values[name]
    return dataclasses.replace(config, **changes)


def _option_name(field: str) -> str:
    return field.rstrip("_").replace("_", "-")


# -- config files -----------------------------------------------------------------------------------------------------------


def config_folder() -> Path:
    """The folder of the configs that come with the package (configs/ in the repository)."""
    return Path(str(importlib.resources.files("gpt_jax.configs")))


def config_names() -> list[str]:
    """The bare names of the configs that come with the package."""
    folder = config_folder()
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.py") if path.stem != "__init__")


def load_config(name: str) -> Any:
    """Loads a config by its path ("my/config.py") or its bare name under configs/ ("smoke", "finetune/cola").

    Raises:
      UserError: the config does not exist, or its file does not define a `config()` that returns a config.
    """
    path = Path(os.path.expanduser(name))
    if path.suffix != ".py":
        path = config_folder() / f"{name}.py"
        if not path.is_file():
            raise UserError(f"no config is named '{name}'; {nearest(name, config_names())} (or give the path of a .py file)")
    value = run_config_file(path, _renamed_argument)
    if not isinstance(value, PretrainConfig | FinetuneConfig):
        raise UserError(f"{path}: config() returned a {type(value).__name__}, not a PretrainConfig or FinetuneConfig")
    return value


def _renamed_argument(error: BaseException) -> str:
    """Returns a hint with the current name of a renamed dataclass argument; empty for any other error."""
    match = re.search("unexpected keyword argument '(\\w+)'", str(error))
    old = next((old for old in RENAMED_FIELDS if match and old.split(".")[1] == _option_name(match[1])), None)
    return f"; it was renamed: use {str(RENAMED_FIELDS[old]).partition('.')[2].replace('-', '_')}" if old else ""


def apply_overrides(config: Any, arguments: list[str], prog: str) -> Any:
    """Applies command-line overrides such as `--optim.peak-lr 1e-4` to a config; `--help` prints every field.

    All names are checked before any value. Rules that involve several fields are checked last.

    Raises:
      UserError: a name does not exist (the message suggests similar ones), a value has the wrong type, or a rule is violated.
    """
    options: list[tuple[str, list[str]]] = []
    known = flatten_config(config)
    if any(argument in ("-h", "--help") for argument in arguments):
        paths = ", ".join(f"--{name}" for name, (_, affects) in known.items() if affects == "input")
        text = "A run resumes only if all fields that affect its numbers have the same values. Paths to the same content count as"
        text = f"{type(config).__doc__}\n\n{text} the same value: {paths}."
        tyro.cli(
            type(config), default=config, args=["--help"], prog=prog, description=text, config=(tyro.conf.FlagConversionOff,)
        )
    for argument in arguments:
        if argument.startswith("--"):
            name, *words = argument[2:].split("=", 1)
            name = name.replace("_", "-")
            if name in RENAMED_FIELDS:
                raise UserError(f"--{name}: was renamed; use {RENAMED_FIELDS[name]}")
            if name not in known:
                sections = sorted({key.split(".")[0] for key in known})
                similar = [key for key in known if key.startswith(name.split(".")[0] + ".")] or [*known, *sections]
                hint = nearest(name, similar) if name not in sections else "it is a section; set one of its fields"
                raise UserError(f"--{name}: no such field; {hint}")
            options.append((name, words))
        elif options:
            options[-1][1].append(argument)
        else:
            raise UserError(f"'{argument}' comes before any --field; write overrides as --section.field value")
    return _replace_fields(config, {name: _parse_value(config, name, words) for name, words in options})


def _parse_value(config: Any, name: str, words: list[str]) -> Any:
    """Converts the words after a field's option to the field's type; words that do not parse remain strings."""
    kind: Any = type(config)
    for part in name.split("."):
        kind = {_option_name(field): hint for field, hint in typing.get_type_hints(kind).items()}[part]
    if typing.get_origin(kind) is tuple:
        return tuple(_parse_word(word, typing.get_args(kind)[0]) for word in words)
    if len(words) != 1:
        raise UserError(f"--{name}: '{' '.join(words)}' is not one value (quote it)" if words else f"--{name}: needs a value")
    return _parse_word(words[0], kind)


def _parse_word(word: str, kind: Any) -> Any:
    if kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(word)
    return {"True": True, "False": False}.get(word, word) if kind is bool else word
