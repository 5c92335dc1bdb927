"""Winograd schemas: sentences with a pronoun that one of a few candidates can replace."""

import itertools
import re
from pathlib import Path

from gpt_jax.errors import UserError, shortened
from gpt_jax.tasks.readers import Example, TaskSplit
from gpt_jax.tasks.tables import read_lines

PLACEHOLDER = re.compile(r"\[MASK\]|(?<!\w)_+(?!\w)")
"""The placeholder that some files contain instead of the pronoun."""


MAX_CANDIDATES = 5
"""Maximum number of candidates. Schemas have two, and the pronoun disambiguation problems of the 2016 challenge up to five."""


def read_winograd(path: Path) -> TaskSplit:
    """Reads Winograd schemas in the layout of the Definite Pronoun Resolution Dataset (Rahman and Ng, 2012; test.c.txt).

    An example consists of four lines and a blank line: the sentence, the pronoun, two to five candidates separated by commas, and
    the correct candidate. If the pronoun occurs several times, its first occurrence as a separate word in the given case is used,
    as the data set specifies. A placeholder ("[MASK]" or "_") in the sentence takes precedence over the pronoun. Each run of
    white space becomes one space.

    Returns:
      Examples whose texts are the part before the pronoun, the part after it, and the candidates. The label is the index of the
      correct candidate.

    Raises:
      UserError: the file cannot be read. For the following errors, the message names file and line: an example has the wrong
        number of lines or candidates, the pronoun is not in the sentence or ends it, or the answer is not one of the candidates.
    """
    numbered = [(number, " ".join(line.split())) for number, line in enumerate(read_lines(path), start=1)]
    schemas = [list(group) for blank, group in itertools.groupby(numbered, lambda line: not line[1]) if not blank]
    examples = [_parse_schema(path, str(number), schema) for number, schema in enumerate(schemas)]
    return TaskSplit(examples, len(examples), {})


def _parse_schema(path: Path, identifier: str, lines: list[tuple[int, str]]) -> Example:
    def check(condition: object, line: int, message: str) -> None:
        if not condition:
            raise UserError(f"{path}:{lines[line][0]}: {message}")

    parts = "sentence, pronoun, candidates, answer"
    check(len(lines) == 4, 0, f"an example must have four lines ({parts}) before the blank one, not {len(lines)}")
    sentence, pronoun, listed, answer = (text for _, text in lines)
    match = PLACEHOLDER.search(sentence) or re.search(rf"(?<!\w){re.escape(pronoun)}(?!\w)", sentence)
    check(match, 1, f"the pronoun '{shortened(pronoun)}' is not a word of the sentence '{shortened(sentence)}'")
    assert match is not None
    before, after = sentence[: match.start()], re.sub(r"^ (?=[.,;:!?])", "", sentence[match.end() :])
    check(after, 1, f"nothing follows '{shortened(pronoun)}' in the sentence, so there would be nothing to score")
    candidates = [candidate.strip() for candidate in listed.split(",")]
    folded = [candidate.casefold() for candidate in candidates]
    given = f"'{shortened(listed)}' must be two to five candidates, separated by commas"
    check(2 <= len(candidates) <= MAX_CANDIDATES and all(candidates), 2, given)
    check(len(set(folded)) == len(folded), 2, f"a candidate occurs twice in '{shortened(listed)}'")
    check(answer.casefold() in folded, 3, f"the answer '{shortened(answer)}' is not one of the candidates '{shortened(listed)}'")
    label = folded.index(answer.casefold())
    return Example(identifier, (before, after, *candidates), float(label), f"{path}:{lines[0][0]}")


def substitute(candidate: str, before: str) -> str:
    """Returns `before` followed by the candidate, which takes the place of the pronoun.

    At the beginning of a sentence, the candidate is capitalized. Elsewhere, an article at its beginning is made lowercase.
    """
    if not before.strip() or before.rstrip()[-1] in ".!?":
        return before + candidate[0].upper() + candidate[1:]
    return before + re.sub(r"^(The|An|A)(?= )", lambda article: article[0].lower(), candidate)
