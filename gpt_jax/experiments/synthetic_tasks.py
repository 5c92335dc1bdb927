"""Four small tasks made from the documentation installed on this machine, one for each input transformation of Figure 1.

    word_order     classification    whether the words of a sentence are in their original order or shuffled
    origin         entailment        whether a text is documentation of the package that the second text names
    same_package   similarity        whether two texts are documentation of the same package
    continuation   multiple choice   which of four sentences follows the first one in its text

Validation rows are made from documents that were also held out in pre-training, so the model has never been trained on them. In
each task, every label is equally frequent, except that the positions of the correct answers in `continuation` are random. In
`origin` and `same_package`, every package occurs equally often with each label, so one text alone does not reveal the label.
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

PACKAGES = 4  # number of packages to distinguish
CHOICES = 4
SENTENCE_CHARS = range(40, 160)  # lengths of the sentences that are used; the demo's model has a context of 128 tokens
MIN_WORDS = 6  # in a sentence that is shuffled

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
    largest = sorted(sizes, key=lambda package: (-sizes[package], package))[:PACKAGES]
    pair = TaskConfig(kind="entailment", texts=("first", "second"), labels=("no", "yes"))
    answers = tuple(f"answer {k}" for k in range(CHOICES))
    makers: dict[str, tuple[Callable[[Sequence[Passage], random.Random], Rows], TaskConfig]] = {
        "word_order": (_word_order_rows, dataclasses.replace(pair, kind="classification", texts=("text",))),
        "origin": (functools.partial(_origin_rows, packages=largest), pair),
        "same_package": (functools.partial(_same_package_rows, packages=largest), dataclasses.replace(pair, kind="similarity")),
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


def _word_order_rows(passages: Sequence[Passage], rng: random.Random) -> Rows:
    """Yields a sentence of one text, and a shuffled sentence of another."""
    texts = ([sentence.split(" ") for sentence in text] for text in _split_texts(passages, 1))
    usable = ([words for words in text if len(set(words)) >= MIN_WORDS] for text in texts)
    sentences = [rng.choice(text) for text in usable if text]
    for words, others in zip(sentences[::2], sentences[1::2], strict=False):
        yield {"text": " ".join(words), "label": "yes"}
        shuffled = others
        while shuffled == others:
            shuffled = rng.sample(others, len(others))
        yield {"text": " ".join(shuffled), "label": "no"}


def _origin_rows(passages: Sequence[Passage], rng: random.Random, packages: Sequence[str]) -> Rows:
    """Yields, for every package in turn, a row with its name and its own text and a row with its name and another's text."""
    rounds = list(_one_of_each(passages, packages))
    for ours, theirs in zip(rounds[::2], rounds[1::2], strict=False):
        shift = rng.randrange(1, len(packages))
        for k, package in enumerate(packages):
            claim = f"This is documentation of {package}."
            yield {"first": ours[k], "second": claim, "label": "yes"}
            yield {"first": theirs[k - shift], "second": claim, "label": "no"}


def _same_package_rows(passages: Sequence[Passage], rng: random.Random, packages: Sequence[str]) -> Rows:
    """Yields, for every package in turn, a row with two of its texts and a row with one of its texts and one of another's."""
    rounds = list(_one_of_each(passages, packages))
    for one, two, three, four in zip(*(rounds[k::4] for k in range(4)), strict=False):
        shift = rng.randrange(1, len(packages))
        for k in range(len(packages)):
            yield {"first": one[k], "second": two[k], "label": "yes"}
            yield {"first": three[k], "second": four[k - shift], "label": "no"}


def _continuation_rows(passages: Sequence[Passage], rng: random.Random) -> Rows:
    texts = _split_texts(passages, 2)
    for number, text in enumerate(texts):
        k = rng.randrange(len(text) - 1)
        right = rng.randrange(CHOICES)
        others = rng.sample(texts[:number] + texts[number + 1 :], CHOICES - 1)
        answers = [rng.choice(other) for other in others]
        answers.insert(right, text[k + 1])
        yield {"context": text[k], "label": str(right)} | {f"answer {k}": answer for k, answer in enumerate(answers)}


def _one_of_each(passages: Sequence[Passage], packages: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yields tuples with the beginning of one text of each package. No text occurs twice."""
    texts_by_package = ([text for package, text in passages if package == label] for label in packages)
    for texts in zip(*texts_by_package, strict=False):
        yield tuple(" ".join(text.split())[: SENTENCE_CHARS.stop] for text in texts)


def _split_texts(passages: Sequence[Passage], min_sentences: int) -> list[list[str]]:
    """Returns the sentences of each text in order, without the texts that have too few sentences.

    Sentences outside of `SENTENCE_CHARS` are left out. A line break within a sentence becomes a space.
    """
    texts = (re.split(r"(?<=[.!?])\s+", " ".join(text.split())) for _, text in passages)
    usable = ([sentence for sentence in text if len(sentence) in SENTENCE_CHARS] for text in texts)
    return [text for text in usable if len(text) >= min_sentences]
