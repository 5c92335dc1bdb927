"""Winograd schemas: sentences with a pronoun that one of two candidates can replace."""

import itertools
import re
from pathlib import Path

from gpt_jax.errors import UserError
from gpt_jax.tasks.readers import Example, TaskSplit

PLACEHOLDER = re.compile(r"\[MASK\]|(?<!\w)_+(?!\w)")
"""The placeholder that some files contain instead of the pronoun."""


def read_winograd(path: Path) -> TaskSplit:
    """Reads Winograd schemas in the layout of the Definite Pronoun Resolution Dataset (Rahman and Ng, 2012; test.c.txt).

    An example consists of four lines and a blank line: the sentence, the pronoun, the two candidates separated by a comma, and
    the correct candidate. If the pronoun occurs several times, its first occurrence as a separate word in the given case is used,
    as the data set specifies. A placeholder ("[MASK]" or "_") in the sentence takes precedence over the pronoun. Each run of
    white space becomes one space.

    Returns:
      Examples whose texts are the part before the pronoun, the part after it, and the two candidates. The label is the index of
      the correct candidate.

    Raises:
      UserError: the file cannot be read. For the following errors, the message names file and line: an example has the wrong
        number of lines or candidates, the pronoun is not in the sentence or ends it, or the answer is not one of the candidates.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a file of Winograd schemas") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: the file is not UTF-8; convert it to UTF-8") from None
    numbered = [(number, " ".join(line.split())) for number, line in enumerate(lines, start=1)]
    schemas = [list(group) for blank, group in itertools.groupby(numbered, lambda line: not line[1]) if not blank]
    examples = [_parse_schema(path, str(number), schema) for number, schema in enumerate(schemas)]
    return TaskSplit(examples, len(examples), {})


def _parse_schema(path: Path, identifier: str, lines: list[tuple[int, str]]) -> Example:
    def check(condition: object, line: int, message: str) -> None:
        if not condition:
            raise UserError(f"{path}:{lines[line][0]}: {message}")

    parts = "sentence, pronoun, the two candidates, answer"
    check(len(lines) == 4, 0, f"an example must have four lines ({parts}) before the blank one, not {len(lines)}")
    sentence, pronoun, listed, answer = (text for _, text in lines)
    match = PLACEHOLDER.search(sentence) or re.search(rf"(?<!\w){re.escape(pronoun)}(?!\w)", sentence)
    check(match, 1, f"the pronoun '{pronoun}' is not a word of the sentence '{sentence}'")
    assert match is not None
    before, after = sentence[: match.start()], re.sub(r"^ (?=[.,;:!?])", "", sentence[match.end() :])
    check(after, 1, f"nothing follows '{pronoun}' in the sentence, so there would be nothing to score")
    candidates = [candidate.strip() for candidate in listed.split(",")]
    check(len(candidates) == 2 and all(candidates), 2, f"'{listed}' must be the two candidates, separated by a comma")
    folded = [candidate.casefold() for candidate in candidates]
    check(answer.casefold() in folded, 3, f"the answer '{answer}' is not one of the candidates '{listed}'")
    label = folded.index(answer.casefold())
    return Example(identifier, (before, after, *candidates), float(label), f"{path}:{lines[0][0]}")


def substitute(candidate: str, before: str) -> str:
    """Returns `before` followed by the candidate, which takes the place of the pronoun.

    At the beginning of a sentence, the candidate is capitalized. Elsewhere, an article at its beginning is made lowercase.
    """
    if not before.strip() or before.rstrip()[-1] in ".!?":
        return before + candidate[0].upper() + candidate[1:]
    return before + re.sub(r"^(The|An|A)(?= )", lambda article: article[0].lower(), candidate)
