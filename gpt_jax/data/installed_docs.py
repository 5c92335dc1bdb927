"""The documentation that is installed on this machine, as a source of English text that needs no download."""

import ast
import contextlib
import functools
import gc
import hashlib
import importlib.metadata
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGES = ("flax", "jax", "numpy", "optax", "orbax-checkpoint", "scipy", "tensorflow-datasets")
"""Distributions that are read in addition to the Python library: dependencies of this project with documentation in English."""

MIN_DOCUMENT_CHARS = 200
"""Minimum length of a document. Shorter docstrings contain little text and are often repeated ("Returns the value.")."""

COMMON_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be been but by can each for from has have if in into is it its may must no not of on one only or "
        "other so such than that the their then there these they this to used was when where which while will with would you",
    )
)
"""Words that make up about a third of English prose but are rare in code, tables and lists of names."""


class InstalledDocs:
    """Docstrings, reference topics and text pages of the Python installation and of `PACKAGES`.

    Source files are parsed and never imported. Only paragraphs of English prose are kept, and each only at its first occurrence,
    so that licenses and shared passages are not repeated. The same installation gives the same documents in the same order.

    Args:
      max_bytes: files are read in the order of the hash of their names until their documents have this many bytes; 0: all files.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes

    @functools.cached_property
    def passages(self) -> list[tuple[str, str]]:
        """Pairs of the package that a document comes from ("python" for the Python library) and the document."""
        gc.freeze()  # A new syntax tree makes the garbage collector run many times; it need not visit all of JAX's objects, too.
        try:
            return self._read()
        finally:
            gc.unfreeze()

    def _read(self) -> list[tuple[str, str]]:
        passages: list[tuple[str, str]] = []
        num_bytes = 0
        seen: set[bytes] = set()
        for _, path, package in sorted(_installed_files(), key=lambda file: hashlib.sha256(file[0].encode()).digest()):
            for text in _texts(path):
                prose = _new_prose(text, seen)
                if len(prose) >= MIN_DOCUMENT_CHARS:
                    passages.append((package, prose))
                    num_bytes += len(prose.encode("utf-8", "replace"))
            if self._max_bytes and num_bytes >= self._max_bytes:
                break
        return passages

    def identity(self) -> dict[str, Any]:
        """Returns the number of documents and a checksum of them."""
        digests = [hashlib.sha256(text.encode("utf-8", "replace")).digest() for text in self.documents()]
        return {"documents": len(digests), "sha256": hashlib.sha256(b"".join(digests)).hexdigest()}

    def documents(self) -> Iterator[str]:
        """Yields the documents."""
        return (text for _, text in self.passages)


def _installed_files() -> Iterator[tuple[str, Path, str]]:
    """Yields the relative name (the same on every machine), the path and the package of files that may contain documentation."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [(path.relative_to(library), path, "python") for path in library.rglob("*.py")]
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            pages = [file for file in importlib.metadata.files(package) or [] if file.suffix in (".py", ".md", ".rst", ".txt")]
            files += [(Path(file), Path(str(file.locate())), package) for file in pages]
    for name, path, package in files:
        if not any(part in ("site-packages", "dist-packages", "..") or "test" in part for part in name.parts):
            yield name.as_posix(), path, package


def _texts(path: Path) -> Iterator[str]:
    """Yields the complete text of a page, or the docstrings of a Python file and the texts of its dictionary `topics`."""
    try:
        source = path.read_text(encoding="utf-8")
        if path.suffix != ".py":
            yield source
            return
        if '"""' not in source and "topics" not in source:
            return
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        # Listed files may be missing, and some library files are invalid or nested too deeply on purpose.
        return
    yield from _docstrings(tree)
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict) and path.name == "topics.py":
            yield from ast.literal_eval(statement.value).values()


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """Yields the docstrings of a module, class or function and of the classes and functions that a module or class defines."""
    yield ast.get_docstring(node) or ""
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _docstrings(child)


def _new_prose(text: str, seen: set[bytes]) -> str:
    """Returns the paragraphs of English prose whose hash is not in `seen`, and adds their hashes to it."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text):
        words = re.findall(r"[A-Za-z']+", paragraph)
        num_plain = sum(map(len, words)) + paragraph.count(" ") + paragraph.count("\n")
        num_common = sum(word.lower() in COMMON_WORDS for word in words)
        if len(words) < 8 or num_plain < 0.85 * len(paragraph) or num_common < 0.2 * len(words) or ">>>" in paragraph:
            continue
        key = hashlib.sha256(" ".join(words).encode()).digest()
        if key not in seen:
            seen.add(key)
            paragraphs.append(paragraph.strip("\n"))
    return "\n\n".join(paragraphs)
