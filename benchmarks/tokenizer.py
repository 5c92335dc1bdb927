"""The speed of the released encoder (openai/finetune-transformer-lm, text_utils.py) and of our tokenizer `gpt1`, side by side.

    python benchmarks/tokenizer.py CHECKOUT TEXT...

CHECKOUT is a checkout of the released code with its vocabulary, which runs with spaCy's current rules for English. The text files
TEXT are read as 400 single lines and as documents of 100 KB. Both encoders must give the same ids. They take turns: each encodes
the texts once with empty caches and then five times more, so the ratios hardly depend on what else the machine does.
"""

import importlib
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import spacy

from gpt_jax.data.tokenizers import GPT1
from gpt_jax.experiments.score_tables import format_table

ROUNDS = 5
Encode = Callable[[str], list[int]]


def fresh_encoders(checkout: Path) -> tuple[Encode, Encode]:
    """Returns the released encoder and ours with empty caches."""
    released = importlib.import_module("text_utils").TextEncoder(*(str(checkout / "model" / name) for name in GPT1.files))
    ours = GPT1.read(checkout / "model")
    released.encode(["a"], verbose=False)
    ours.encode("a")
    return lambda text: released.encode([text], verbose=False)[0], ours.encode


def timed(encode: Encode, texts: list[str]) -> tuple[float, list[list[int]]]:
    """Returns the seconds that encoding takes, and the ids."""
    begin = time.perf_counter()
    ids = [encode(text) for text in texts]
    return time.perf_counter() - begin, ids


def main(checkout: Path, files: list[Path]) -> None:
    spacy.load = lambda name, **options: spacy.blank("en")
    sys.path.insert(0, str(checkout))
    contents = [file.read_text(encoding="utf-8") for file in files]
    lines = [line for content in contents for line in content.splitlines() if 20 < len(line) < 200]
    samples = {
        "400 single lines": random.Random(0).sample(lines, 400),
        "documents of 100 KB": [content[:100_000] for content in contents],
    }
    table: list[tuple[str, ...]] = [("texts", "tokens", "caches", "released, tokens/s", "ours, tokens/s", "ratio")]
    for name, texts in samples.items():
        seconds: dict[str, list[tuple[float, float]]] = {"empty": [], "warm": []}
        for _ in range(ROUNDS):
            encoders = fresh_encoders(checkout)
            for repeat in range(1 + ROUNDS):
                (released, expected), (ours, ids) = (timed(encode, texts) for encode in encoders)
                if ids != expected:
                    sys.exit("the ids differ")
                seconds["warm" if repeat else "empty"].append((released, ours))
        tokens = sum(map(len, ids))
        for caches, pairs in seconds.items():
            rates = (tokens / statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(released / ours for released, ours in pairs)
            table.append((name, f"{tokens:,}", caches, *(f"{rate:,.0f}" for rate in rates), f"{ratio:.2f}"))
    print(format_table(table))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
