"""Four small tasks made from the documentation installed on this machine, one for each input transformation of Figure 1.

    package        classification    which package a passage of documentation comes from
    neighbours     entailment        whether the second sentence follows the first in its text
    same_text      similarity        whether two sentences come from one text
    continuation   multiple choice   which of four sentences goes on from the first one

What is scored comes from documents that pre-training has held out too, so neither training has seen them. Classes are of one
size, but for the places of `continuation`.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gpt_jax.config import TaskConfig
from gpt_jax.runtime.rundir import write_atomic

CLASSES = 4  # packages told apart
CHOICES = 4
SENTENCE_CHARS = range(40, 160)  # sentences of other lengths are passed over: the model of the demo sees 128 tokens

Row = dict[str, str]


def make_tasks(
    passages: Sequence[tuple[str, str]],
    held_out: Callable[[str], bool],
    folder: Path,
    train: int,
    validation: int,
    seed: int = 0,
) -> dict[str, TaskConfig]:
    """Writes the tasks as folder/NAME/train.jsonl and validation.jsonl.

    Args:
      passages: (package, text), as `corpus.InstalledDocs.passages` has them.
      held_out: whether a text was kept from pre-training; the validation rows are made from those that were, the training rows
        from the others.
      train, validation: most rows of each split.
      seed: of the choice of rows; equal arguments write equal files.

    Returns:
      The description of each task by name.
    """
    kinds = {
        "package": (_package, TaskConfig(kind="classification", texts=("text",))),
        "neighbours": (_neighbours, TaskConfig(kind="entailment", texts=("first", "second"), labels=("no", "yes"))),
        "same_text": (_same_text, TaskConfig(kind="similarity", texts=("first", "second"), labels=("no", "yes"))),
        "continuation": (
            _continuation,
            TaskConfig(kind="multiple_choice", texts=("context", *(f"answer {k}" for k in range(CHOICES)))),
        ),
    }
    sizes = collections.Counter(package for package, _ in passages)
    largest = sorted(sizes, key=lambda package: (-sizes[package], package))[:CLASSES]
    tasks = {}
    for name, (make, task) in kinds.items():
        files = {}
        for split, size in (("train", train), ("validation", validation)):
            mine = [passage for passage in passages if held_out(passage[1]) == (split == "validation")]
            if name == "package":
                mine = [(package, text) for package, text in mine if package in largest]
            rng = random.Random(f"{seed} {name} {split}")
            rng.shuffle(mine)
            rows = [row for row, _ in zip(make(mine, rng), range(size), strict=False)]
            files[split] = folder / name / f"{split}.jsonl"
            files[split].parent.mkdir(parents=True, exist_ok=True)
            write_atomic(files[split], "".join(json.dumps(row) + "\n" for row in rows))
        tasks[name] = dataclasses.replace(task, train=str(files["train"]), validation=str(files["validation"]))
    return tasks


def _sentences(text: str) -> list[str]:
    """The sentences of a text that are neither short nor long, in order; a line break inside of one becomes a space."""
    found = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
    return [sentence for sentence in found if len(sentence) in SENTENCE_CHARS]


def _package(passages: Sequence[tuple[str, str]], rng: random.Random) -> Iterator[Row]:
    """Rows of each package in turn."""
    by_package = collections.defaultdict(list)
    for package, text in passages:
        by_package[package].append(text)
    for texts in zip(*by_package.values(), strict=False):
        for package, text in zip(by_package, texts, strict=True):
            yield {"text": " ".join(text.split())[: SENTENCE_CHARS.stop], "label": package}


def _pairs(passages: Sequence[tuple[str, str]]) -> Iterator[tuple[list[str], list[str]]]:
    """The sentences of two texts at a time; of the first there are three or more."""
    texts = [sentences for _, text in passages if len(sentences := _sentences(text)) >= 3]
    yield from zip(texts[::2], texts[1::2], strict=False)


def _neighbours(passages: Sequence[tuple[str, str]], rng: random.Random) -> Iterator[Row]:
    for one, other in _pairs(passages):
        k = rng.randrange(len(one) - 1)
        yield {"first": one[k], "second": one[k + 1], "label": "yes"}
        yield {"first": one[k], "second": rng.choice(other), "label": "no"}


def _same_text(passages: Sequence[tuple[str, str]], rng: random.Random) -> Iterator[Row]:
    for one, other in _pairs(passages):
        first, second = rng.sample(one, 2)
        yield {"first": first, "second": second, "label": "yes"}
        yield {"first": first, "second": rng.choice(other), "label": "no"}


def _continuation(passages: Sequence[tuple[str, str]], rng: random.Random) -> Iterator[Row]:
    texts = [sentences for _, text in passages if len(sentences := _sentences(text)) >= 2]
    groups = zip(*(texts[k::CHOICES] for k in range(CHOICES)), strict=False)
    for right, *wrong in groups:
        k = rng.randrange(len(right) - 1)
        place = rng.randrange(CHOICES)
        answers = [rng.choice(sentences) for sentences in wrong]
        answers.insert(place, right[k + 1])
        yield {"context": right[k], "label": str(place)} | {f"answer {k}": answer for k, answer in enumerate(answers)}
