"""Files of JSON objects: one on each line, one after the other, or in an array. They are read one object at a time."""

import codecs
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt_jax.errors import UserError, described, shortened
from gpt_jax.inputs.formats import BinaryFile, decode_text, encoding_error
from gpt_jax.inputs.json_values import is_cut_off, json_error, parse_json_object, require_characters

MAX_JSON_BYTES = 64 << 20
"""Maximum size of a JSON value that contains a document. Longer ones are collections in one value, or files without line ends;
reading one takes several times its size in memory."""

JSON_CHUNK = 1 << 20
"""Number of bytes that are read at a time from a file of JSON without lines."""

WHITE_SPACE = re.compile(r"[ \t\r\n]*")


def json_lines(file: BinaryFile, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the number and the JSON object of each line that is not blank.

    Raises:
      UserError: a line is not a JSON object, or is too long. The message names it.
    """
    lines = iter(functools.partial(file.readline, MAX_JSON_BYTES + 1), b"")
    for line, data in enumerate(lines, start=1):
        if data.isspace():
            continue
        if len(data) > MAX_JSON_BYTES:
            raise _too_long(path, line)
        yield line, parse_json_object(decode_text(data.rstrip(), path, line).removeprefix("\ufeff"), path, line)


def _too_long(path: Path, line: int) -> UserError:
    limit = f"a JSON value of more than {MAX_JSON_BYTES:,} bytes, which is too long for one document"
    return UserError(f"{path}:{line}: {limit}; write one object per document, each on its own line (.jsonl)")


def json_objects(file: BinaryFile, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the objects of a JSON array, or objects that follow one another, each with the number of the line it begins in.

    Raises:
      UserError: something else is there, or an object is too long. The message names the file and the line.
    """
    text = JsonText(file, path)
    in_array = text.next_character() == "["
    if in_array:
        text.skip_character()
    while (character := text.next_character()) and not (in_array and character == "]"):
        line = text.line
        value = text.parse_value()
        if not isinstance(value, dict):
            raise UserError(f"{path}:{line}: {described(value)}, not a JSON object with named fields")
        yield line, value
        if in_array and text.next_character() == ",":
            text.skip_character()
            if text.next_character() == "]":
                raise UserError(f"{path}:{text.line}: not valid JSON: a comma before the end of the array")
        elif in_array and text.next_character() not in ("]", ""):
            raise UserError(f"{path}:{text.line}: not valid JSON: no comma between two values of the array")
    if in_array:
        if not character:
            raise UserError(f"{path}:{text.line}: not valid JSON: the array does not end; the file may be incomplete")
        text.skip_character()
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
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._position = 0

    def next_character(self) -> str:
        """Skips white space. Returns the character after it, which remains the next one; empty at the end of the file."""
        while True:
            self._skip(WHITE_SPACE.match(self._text, self._position).end())  # type: ignore[union-attr]
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._read_more():
                return ""

    def skip_character(self) -> None:
        self._skip(self._position + 1)

    def parse_value(self) -> Any:
        """Returns the value that begins with the next character, and skips it.

        Raises:
          UserError: there is no valid JSON value, or it is too long.
        """
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._text, self._position)
                require_characters(value, self._text, self._position, end)
                break
            except json.JSONDecodeError as error:
                if not is_cut_off(error) or not self._read_more():
                    line = self.line + self._text.count("\n", self._position, error.pos)
                    place = repr(shortened(error.doc[error.pos :], 20)) if error.pos < len(error.doc) else "the end of the file"
                    raise UserError(f"{self._path}:{line}: not valid JSON: {error.msg.removesuffix(' at')} at {place}") from None
            except (ValueError, RecursionError) as error:
                raise json_error(error, self._path, self.line) from None
        self._skip(end)
        return value

    def _skip(self, end: int) -> None:
        self.line += self._text.count("\n", self._position, end)
        self._position = end

    def _read_more(self) -> bool:
        """Appends the next part of the file to the text. Returns whether there was more."""
        self._text, self._position = self._text[self._position :], 0
        if len(self._text) > MAX_JSON_BYTES:
            raise _too_long(self._path, self.line)
        data = self._file.read(max(JSON_CHUNK, len(self._text)))
        try:
            self._text += self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise encoding_error(error, self._path, self.line + self._text.count("\n")) from error
        return bool(data)
