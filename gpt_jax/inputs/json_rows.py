"""Files of JSON objects: one per line, one after the other, or in an array. They are read one object at a time."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt_jax.errors import UserError
from gpt_jax.inputs.formats import BinaryFile, encoding_error
from gpt_jax.inputs.json_values import WHITE_SPACE, is_cut_off, json_error, require_characters, require_object

MAX_JSON_BYTES = 64 << 20
"""Maximum size of a JSON value that contains a document. Longer ones are whole collections, and reading one takes several times
its size in memory."""

JSON_CHUNK = 1 << 20
"""Number of bytes that are read at a time."""


def json_objects(file: BinaryFile, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the objects of a JSON array, or objects that follow one another, each with the number of the line it begins in.

    Raises:
      UserError: the file contains something else, or an object is too long. The message names the file and the line.
    """
    text = JsonText(file, path)
    end = "]" if text.skip("[") else ""
    more = text.next_character() != end
    while more:
        text.next_character()
        line = text.line
        yield line, require_object(text.parse_value(), path, line)
        more = text.skip(",") if end else text.next_character() != ""
    if not text.skip(end):
        problem = "a comma or the end of the array is missing, or the file is incomplete"
        raise UserError(f"{path}:{text.line}: not valid JSON: {problem}")
    if text.next_character():
        raise UserError(f"{path}:{text.line}: not valid JSON: something follows the array")


class JsonText:
    """A file of JSON values that is parsed one value at a time, so that the whole file need not fit into memory.

    Attributes:
      line: the number of the line of the next character.
    """

    def __init__(self, file: BinaryFile, path: Path):
        self.line = 1
        self._file = file
        self._path = path
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._position = 0

    def next_character(self) -> str:
        """Skips white space. Returns the character after it, which remains the next one; empty at the end of the file."""
        while True:
            self._move(WHITE_SPACE.match(self._text, self._position).end())  # type: ignore[union-attr]
            if self._position < len(self._text) or not self._read_more():
                return self._text[self._position : self._position + 1]

    def skip(self, character: str) -> bool:
        """Skips white space, and then `character` if it comes next. Returns whether it does."""
        found = self.next_character() == character
        self._move(self._position + len(character) * found)
        return found

    def parse_value(self) -> Any:
        """Returns the value that begins with the next character, and moves past it.

        Raises:
          UserError: there is no valid JSON value, or it is too long.
        """
        while True:
            start = self._position
            try:
                value, end = json.JSONDecoder().raw_decode(self._text, start)
                require_characters(value, self._text, start, end)
                break
            except (ValueError, RecursionError) as error:
                if not is_cut_off(error) or not self._read_more():
                    raise json_error(error, self._path, self.line, start) from None
        self._move(end)
        return value

    def _move(self, end: int) -> None:
        self.line += self._text.count("\n", self._position, end)
        self._position = end

    def _read_more(self) -> bool:
        """Appends the next part of the file to the text. Returns whether there was more."""
        self._text, self._position = self._text[self._position :], 0
        if len(self._text) > MAX_JSON_BYTES:
            hint = "write one object per document, each on its own line (.jsonl)"
            raise UserError(f"{self._path}:{self.line}: a JSON value is longer than {MAX_JSON_BYTES:,} bytes; {hint}")
        data = self._file.read(max(JSON_CHUNK, len(self._text)))
        try:
            self._text += self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise encoding_error(error, self._path, self.line + self._text.count("\n")) from error
        return bool(data)
