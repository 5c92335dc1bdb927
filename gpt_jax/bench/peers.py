"""The programs of other projects that ours are compared with, and what they need."""

import importlib.util
import os
import shutil
from typing import NamedTuple

from gpt_jax.errors import field_error
from gpt_jax.runtime.console import say


class Peer(NamedTuple):
    """A peer and its requirements."""

    modules: tuple[str, ...]
    """Python modules that must be installed."""
    install: str
    """The command that installs them."""
    compiled: bool = False
    """Whether it runs torch.compile, which needs a C++ compiler for CPUs."""


_HUGGINGFACE = "pip install 'gpt_jax[huggingface]'"

PEERS = {
    "transformers": Peer(("torch", "transformers"), _HUGGINGFACE),
    "transformers-compiled": Peer(("torch", "transformers"), _HUGGINGFACE, compiled=True),
    "torch": Peer(("torch",), _HUGGINGFACE),
    "torch-compiled": Peer(("torch",), _HUGGINGFACE, compiled=True),
    "torch-context": Peer(("torch",), _HUGGINGFACE),
    "ctranslate2": Peer(("ctranslate2",), "pip install ctranslate2"),
}
"""All peers by their names in `--against`."""


def usable_peers(names: list[str]) -> list[str]:
    """Returns the given peers without those that need a compiler if there is none; one line says so.

    Raises:
      UserError: a peer is not installed; the message has the command that installs it.
    """
    usable = []
    for name in dict.fromkeys(names):
        peer = PEERS[name]
        for module in peer.modules:
            if importlib.util.find_spec(module) is None:
                raise field_error("against", f"{name} needs {module}, which is not installed: {peer.install}")
        if peer.compiled and not has_compiler():
            say(f"{name} is left out: torch.compile needs a C++ compiler (g++ or clang++ in PATH, or the variable CXX)")
        else:
            usable.append(name)
    return usable


def has_compiler() -> bool:
    """Returns whether there is a C++ compiler for torch.compile."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name)
