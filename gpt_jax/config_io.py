"""Configs as data: their fields, their digest, their JSON; read from files and overridden on the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import json
import typing
from pathlib import Path
from typing import Any, Literal

import tyro

from gpt_jax.config import FinetuneConfig, FinetuneRunConfig, PretrainConfig, RunConfig
from gpt_jax.errors import UserError, nearest

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


def from_dict(values: dict[str, Any]) -> RunConfig:
    """Rebuilds a run's config from `to_dict`'s JSON. Fields that did not exist when it was written take their defaults."""
    return _from_dict(FinetuneRunConfig if "task" in values else PretrainConfig, values)


def _from_dict(kind: type, values: dict[str, Any]) -> Any:
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if field.name in values:
            value = values[field.name]
            if dataclasses.is_dataclass(field.default):
                value = _from_dict(type(field.default), value)
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
            raise UserError(f"no config is named '{name}'; {nearest(name, names())} Or give the path of a .py file")
    if not path.is_file():
        raise UserError(f"{path}: no such config file")
    spec = importlib.util.spec_from_file_location(f"gpt_jax_config_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, "config", None)):
            raise UserError(f"{path}: a config file defines config(), a function that returns a PretrainConfig or FinetuneConfig")
        value = module.config()
    except UserError:
        raise
    except Exception as error:  # whatever a user's file does wrong is said in one line
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(value, PretrainConfig | FinetuneConfig):
        raise UserError(f"{path}: config() returned a {type(value).__name__}, not a PretrainConfig or FinetuneConfig")
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
