"""A validator for the schemas beside this file, the handling of Ctrl-C, and plans that need no compiler.

The validator covers the part of JSON Schema that the schemas use, but an object has no fields other than the listed ones.
"""

import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpt_jax.launch import planning

TYPES = {"object": dict, "array": list, "string": str, "boolean": bool}


def problems(value: Any, schema: dict[str, Any], root: dict[str, Any], where: str = "$") -> Iterator[str]:
    """Yields a line for each place where a value violates its schema."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    if "anyOf" in schema and all(list(problems(value, option, root)) for option in schema["anyOf"]):
        yield f"{where}: {value!r} matches none of the alternatives"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where}: {value!r} is not one of {schema['enum']}"
    kind = schema.get("type")
    fits = (
        isinstance(value, int) and not isinstance(value, bool)
        if kind == "integer"
        else isinstance(value, TYPES.get(kind, object))
    )
    if not fits:
        yield f"{where}: {value!r} is not of type {kind}"
        return
    if "pattern" in schema and not re.fullmatch(schema["pattern"], value):
        yield f"{where}: {value!r} does not match {schema['pattern']}"
    if "minimum" in schema and value < schema["minimum"]:
        yield f"{where}: {value} is less than {schema['minimum']}"
    if kind == "array":
        for index, item in enumerate(value):
            yield from problems(item, schema["items"], root, f"{where}[{index}]")
    if kind == "object":
        yield from (f"{where}: {name} is missing" for name in schema.get("required", ()) if name not in value)
        for name, item in value.items():
            inner = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
            if inner is None:
                yield f"{where}: has no field {name}"
            else:
                yield from problems(item, inner, root, f"{where}.{name}")


@pytest.fixture
def invalid() -> Callable[[Any, str], list[str]]:
    """A function that takes a value and the name of a schema, and returns a line for each violation."""

    def check(value: Any, name: str) -> list[str]:
        schema = json.loads((Path(__file__).parent / "schemas" / f"{name}.json").read_text())
        return list(problems(value, schema, schema))

    return check


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """Enables Ctrl-C, which a shell disables for tests that run in its background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Plans(list[list[str]]):
    """The commands that would have been run, and what they answer: by default, that the step fits, with a short report."""

    answer = 0, "header\n\nmemory\n  1 of 2\n\nlimited\n", ""


@pytest.fixture(autouse=True)
def plans(monkeypatch: pytest.MonkeyPatch) -> Plans:
    """Replaces `gpt-jax plan`, which may compile for minutes."""
    commands = Plans()
    monkeypatch.setattr(planning, "run_plan", lambda command: commands.append(command) or commands.answer)
    return commands
