"""A count of things that were left out, with examples, for a line shown to the user."""

from gpt_jax.errors import printable, shortened

EXAMPLES = 3


class Tally:
    """A number of files or rows, their total size in bytes, and the first of them by name."""

    def __init__(self) -> None:
        self.count = 0
        self.bytes = 0
        self.examples: list[str] = []

    def add(self, example: object, size: int = 0) -> None:
        """Counts one more."""
        self.count += 1
        self.bytes += size
        if self.count <= EXAMPLES:
            self.examples.append(shortened(printable(str(example))))

    def __str__(self) -> str:
        more = ", ..." if self.count > EXAMPLES else ""
        return f"{self.count:,} ({', '.join(self.examples)}{more})"
