"""Benchmark `tokenize`: encoding text, document by document, on one core, beside the sentencepiece library alone in a loop."""

import functools
from collections.abc import Callable
from typing import Any

from gpt_jax.bench.comparison import Comparison, Request
from gpt_jax.bench.program import Program, ProgramSpec
from gpt_jax.data.installed_docs import InstalledDocs
from gpt_jax.data.tokenizers import SentencePiece

TEXT_BYTES = 1_000_000
VOCABULARY = 4096
LIBRARY = "sentencepiece alone"


def comparisons(request: Request) -> list[Comparison]:
    """Returns the only comparison."""
    programs = {"gpt_jax": ProgramSpec(f"{__name__}:ours", {}), LIBRARY: ProgramSpec(f"{__name__}:library", {})}
    work = sum(len(text.encode("utf-8", "replace")) for text in _documents()) / 1e6
    title = f"tokenize: installed documentation, {work:.1f} MB, {VOCABULARY:,} pieces"
    return [Comparison(title, "MB", work, programs, peers=(LIBRARY,))]


@functools.cache
def _documents() -> list[str]:
    return list(InstalledDocs(TEXT_BYTES).documents())


def ours() -> Program:
    """Returns `SentencePiece.encode`."""
    return _encoding(_tokenizer().encode)


def library() -> Program:
    """Returns the library's own function for a text."""
    return _encoding(_tokenizer().processor.encode)


def _encoding(encode: Callable[[str], Any]) -> Program:
    """Returns a program that encodes all documents."""

    def run(count: int) -> None:
        for _ in range(count):
            for text in _documents():
                encode(text)

    return Program(run)


def _tokenizer() -> SentencePiece:
    return SentencePiece.train(_documents(), VOCABULARY, "identity")
