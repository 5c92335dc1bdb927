"""Four small tasks made from the documentation installed on this machine, one for each input transformation of Figure 1.

    package        classification    the package that a passage of documentation comes from
    neighbors      entailment        whether the second sentence follows the first one in its text
    same_text      similarity        whether two sentences come from the same text
    continuation   multiple choice   which of four sentences follows the first one

Validation rows are made from documents that were also held out in pre-training, so the model has never been trained on them. All
classes are equally frequent, except that the positions of the correct answers in `continuation` are random.
"""

import collections
import dataclasses
import functools
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gpt_jax.config import TaskConfig
from gpt_jax.runtime.rundir import write_atomic

CLASSES = 4  # number of packages to distinguish
CHOICES = 4
SENTENCE_CHARS = range(40, 160)  # lengths of the sentences that are used; the demo's model has a context of 128 tokens

Passage = tuple[str, str]
"""A package and a text of its documentation, as in `installed_docs.InstalledDocs.passages`."""
Rows = Iterator[dict[str, str]]


def make_tasks(
    passages: Sequence[Passage], held_out: Callable[[str], bool], folder: Path, train: int, validation: int, seed: int = 0
) -> dict[str, TaskConfig]:
    """Writes the rows of the tasks to folder/NAME/train.jsonl and folder/NAME/validation.jsonl.

    Args:
      held_out: whether a text was held out from pre-training. Validation rows are made from these texts, and training rows from
        the other texts.
      train, validation: maximum number of rows in each split.
      seed: seed for the choice of rows. Equal arguments give equal files.

    Returns:
      The config of each task by name.
    """
    sizes = collections.Counter(package for package, _ in passages)
    largest = sorted(sizes, key=lambda package: (-sizes[package], package))[:CLASSES]
    pair = TaskConfig(kind="entailment", texts=("first", "second"), labels=("no", "yes"))
    answers = tuple(f"answer {k}" for k in range(CHOICES))
    makers: dict[str, tuple[Callable[[Sequence[Passage], random.Random], Rows], TaskConfig]] = {
        "package": (functools.partial(_package_rows, packages=largest), TaskConfig(kind="classification", texts=("text",))),
        "neighbors": (_neighbors_rows, pair),
        "same_text": (_same_text_rows, dataclasses.replace(pair, kind="similarity")),
        "continuation": (_continuation_rows, TaskConfig(kind="multiple_choice", texts=("context", *answers))),
    }
    tasks = {}
    for name, (make_rows, task) in makers.items():
        files = {split: folder / name / f"{split}.jsonl" for split in ("train", "validation")}
        for (split, file), num_rows in zip(files.items(), (train, validation), strict=True):
            chosen = [passage for passage in passages if held_out(passage[1]) == (split == "validation")]
            rng = random.Random(f"{seed} {name} {split}")
            rng.shuffle(chosen)
            rows = itertools.islice(make_rows(chosen, rng), num_rows)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, "".join(json.dumps(row) + "\n" for row in rows))
        tasks[name] = dataclasses.replace(task, train=str(files["train"]), validation=str(files["validation"]))
    return tasks


def _package_rows(passages: Sequence[Passage], rng: random.Random, packages: Sequence[str]) -> Rows:
    """Yields a row of each package in turn."""
    texts_by_package = ([text for package, text in passages if package == label] for label in packages)
    for texts in zip(*texts_by_package, strict=False):
        for label, text in zip(packages, texts, strict=True):
            yield {"text": " ".join(text.split())[: SENTENCE_CHARS.stop], "label": label}


def _neighbors_rows(passages: Sequence[Passage], rng: random.Random) -> Rows:
    texts = _split_texts(passages, 3)
    for text, other in zip(texts[::2], texts[1::2], strict=False):
        k = rng.randrange(len(text) - 1)
        yield {"first": text[k], "second": text[k + 1], "label": "yes"}
        yield {"first": text[k], "second": rng.choice(other), "label": "no"}


def _same_text_rows(passages: Sequence[Passage], rng: random.Random) -> Rows:
    texts = _split_texts(passages, 3)
    for text, other in zip(texts[::2], texts[1::2], strict=False):
        first, second = rng.sample(text, 2)
        yield {"first": first, "second": second, "label": "yes"}
        yield {"first": first, "second": rng.choice(other), "label": "no"}


def _continuation_rows(passages: Sequence[Passage], rng: random.Random) -> Rows:
    texts = _split_texts(passages, 2)
    for text, *others in zip(*(texts[k::CHOICES] for k in range(CHOICES)), strict=False):
        k = rng.randrange(len(text) - 1)
        right = rng.randrange(CHOICES)
        answers = [rng.choice(other) for other in others]
        answers.insert(right, text[k + 1])
        yield {"context": text[k], "label": str(right)} | {f"answer {k}": answer for k, answer in enumerate(answers)}


def _split_texts(passages: Sequence[Passage], min_sentences: int) -> list[list[str]]:
    """Returns the sentences of each text in order, without the texts that have too few sentences.

    Sentences outside of `SENTENCE_CHARS` are left out. A line break within a sentence becomes a space.
    """
    texts = (re.split(r"(?<=[.!?])\s+", " ".join(text.split())) for _, text in passages)
    usable = ([sentence for sentence in text if len(sentence) in SENTENCE_CHARS] for text in texts)
    return [text for text in usable if len(text) >= min_sentences]
