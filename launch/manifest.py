"""YAML documents that are easy to read, because people check them before they submit them."""

from collections.abc import Iterable
from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):
    """A YAML writer that writes a string with several lines as a block."""


_Dumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)
)


def write_manifest(comments: Iterable[str], document: dict[str, Any]) -> str:
    """Returns a document as YAML in the order of its keys, after one comment line for each of `comments`."""
    return "".join(f"# {comment}\n" for comment in comments) + yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=120)
