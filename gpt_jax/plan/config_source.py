"""The source code of config files, in the style of those under configs/."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

from gpt_jax.config import PretrainConfig
from gpt_jax.config.load import config_folder

LINE = 130
"""Maximum length of a line."""


def config_source(config: PretrainConfig, path: Path, sentence: str) -> str:
    """Returns the text of a file whose function `config()` returns the config.

    Args:
      path: the path that the file will have; the command in its header names it.
      sentence: the first sentence of the header.
    """
    folder, name = config_folder().resolve(), shlex.quote(str(path))
    if path.resolve().is_relative_to(folder):
        name = path.resolve().relative_to(folder).with_suffix("").as_posix()
    text = "" if config.data.store or config.data.source else " --data.store STORE"
    command = f"gpt-jax pretrain {name}{text} --workdir RUN"
    header = f"{sentence}\n\n    {command}\n\nTime: not measured.\nExpect: not measured.\n"
    header = header.replace("\\", "\\\\").replace('"', '\\"')
    classes = sorted(_classes(config))
    imports = f"from gpt_jax.config import {', '.join(classes)}"
    if len(imports) > LINE:
        imports = "from gpt_jax.config import (\n" + "".join(f"    {name},\n" for name in classes) + ")"
    return f'"""{header}"""\n\n{imports}\n\n\ndef config() -> PretrainConfig:\n    {_layout(config, 4, "return ")}\n'


def _changed(section: Any) -> dict[str, Any]:
    """Returns the fields of a section that do not have their default values."""
    default, names = type(section)(), [field.name for field in dataclasses.fields(section)]
    return {name: getattr(section, name) for name in names if getattr(section, name) != getattr(default, name)}


def _classes(section: Any) -> set[str]:
    """Returns the names of the classes in the expression of a section."""
    inside = [_classes(value) for value in _changed(section).values() if dataclasses.is_dataclass(value)]
    return {type(section).__name__}.union(*inside)


def _parts(value: Any) -> list[tuple[str, Any]]:
    """Returns the items in the parentheses of a section or a tuple: for each, its name with "=" (or ""), and its value."""
    if isinstance(value, tuple):
        return [("", each) for each in value]
    return [(f"{name}=", each) for name, each in _changed(value).items()]


def _flat(value: Any) -> str:
    """Returns the Python expression of a field's value or of a section on one line."""
    if dataclasses.is_dataclass(value) or isinstance(value, tuple):
        name, comma = ("", "," * (len(value) == 1)) if isinstance(value, tuple) else (type(value).__name__, "")
        return f"{name}({', '.join(key + _flat(each) for key, each in _parts(value))}{comma})"
    if isinstance(value, str):
        return repr(value) if '"' in value and "'" not in value else json.dumps(value, ensure_ascii=False)
    return f"{value:_}" if type(value) is int and value >= 10_000 else repr(value)


def _layout(value: Any, indent: int, before: str) -> str:
    """Returns `before` and the expression of a value, on several lines if one is too short.

    Args:
      indent: number of spaces before the first word and before the closing parenthesis.
    """
    flat = before + _flat(value)
    if indent + len(flat) < LINE or not (dataclasses.is_dataclass(value) or isinstance(value, tuple)):
        return flat
    parts = _parts(value)
    inside = ", ".join(name + _flat(each) for name, each in parts)
    if indent + 4 + len(inside) > LINE or len(parts) == 1:
        inside = f",\n{' ' * (indent + 4)}".join(_layout(each, indent + 4, name) for name, each in parts) + ","
    opening = "" if isinstance(value, tuple) else type(value).__name__
    return f"{before}{opening}(\n{' ' * (indent + 4)}{inside}\n{' ' * indent})"
