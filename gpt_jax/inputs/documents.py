"""The documents in a file of a corpus, in each of its formats. Joined, the documents of a plain text file give the file again."""

import codecs
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt_jax.errors import UserError, described, nearest, one_line, shortened
from gpt_jax.inputs.archives import max_unpacked_size
from gpt_jax.inputs.formats import BYTE_ORDER_MARK, BinaryFile, TextFormat, open_file
from gpt_jax.inputs.json_values import is_cut_off, json_error, parse_json_object, require_characters
from gpt_jax.inputs.tally import Tally

MAX_DOCUMENT_BYTES = 32 * 1024
"""Maximum size of a document cut from plain text. If a book were one document, it would be in a single split and occupy a single
process. Pieces of this size can be divided evenly, and each still contains more than ten of the paper's windows of 512 tokens."""

MAX_JSON_BYTES = 64 << 20
"""Maximum size of a JSON value that contains a document. Longer ones are collections in one value, or files without line ends;
reading one takes several times its size in memory."""

JSON_CHUNK = 1 << 20
"""Number of bytes that are read at a time from a file of JSON without lines."""

WHITE_SPACE = re.compile(r"[ \t\r\n]*")

ROWS_AT_ONCE = 256
"""Number of rows that are read at a time from a Parquet file."""


def read_documents(path: Path, file_format: TextFormat, text_field: str, missing: Tally) -> Iterator[str]:
    """Yields the documents of a file in order.

    Args:
      path: the file, which may be compressed.
      file_format: its format.
      text_field: the field of a JSON object, or the column of a Parquet file, that contains the text.
      missing: counts the rows whose text is null. Their document is empty.

    Raises:
      UserError: the file is damaged or not in this format, or a row has no text. The message names the file and the line or row.
    """
    if file_format == "parquet":
        yield from parquet_documents(path, text_field, missing)
        return
    with open_file(path) as file:
        if file_format == "text":
            yield from text_documents(file, path)
            return
        for line, row in json_lines(file, path) if file_format == "jsonl" else json_objects(file, path):
            yield _text_of(row, text_field, path, line, missing)


# -- plain text -------------------------------------------------------------------------------------------------------------


def text_documents(file: BinaryFile, path: Path) -> Iterator[str]:
    """Cuts plain text into documents of at most MAX_DOCUMENT_BYTES. Joined, they give the text without its byte-order mark.

    Raises:
      UserError: there are NUL bytes, or bytes that are not UTF-8. The message names the line.
    """
    line = 1
    text = file.read(len(BYTE_ORDER_MARK)).removeprefix(BYTE_ORDER_MARK)
    while text := text + file.read(MAX_DOCUMENT_BYTES + 1 - len(text)):
        if b"\0" in text:
            line += text.count(b"\n", 0, text.index(b"\0"))
            raise UserError(f"{path}:{line}: a NUL byte; if the file is not text, name only text files, for example by a glob")
        size = len(text) if len(text) <= MAX_DOCUMENT_BYTES else _cut_position(text[:MAX_DOCUMENT_BYTES])
        yield _decode(text[:size], path, line)
        line += text.count(b"\n", 0, size)
        text = text[size:]


def _cut_position(text: bytes) -> int:
    """Returns the position at which to cut a text that is too long.

    The position is after the last blank line if that is in the second half of the text, else after the last line, else after the
    last space. If there is none of these, the position is chosen so that no character is cut in two.
    """
    for separator, start in ((b"\n\n", len(text) // 2), (b"\n", 0), (b" ", 0)):
        position = text.rfind(separator, start)
        if position >= 0:
            return position + len(separator)
    end = len(text)
    # A character has at most three continuation bytes (10xxxxxx). If there are more, decoding the text raises an error.
    while end > len(text) - 3 and text[end - 1] & 0xC0 == 0x80:
        end -= 1
    return end - 1 if text[end - 1] >= 0xC0 else end


def _decode(data: bytes, path: Path, line: int) -> str:
    """Decodes UTF-8 text that begins in the given line of a file."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _encoding_error(error, path, line) from error


def _encoding_error(error: UnicodeDecodeError, path: Path, line: int) -> UserError:
    line += error.object.count(b"\n", 0, error.start)
    return UserError(f"{path}:{line}: byte 0x{error.object[error.start]:02x} is not UTF-8; convert the file to UTF-8")


# -- JSON -------------------------------------------------------------------------------------------------------------------


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
        yield line, parse_json_object(_decode(data, path, line).removeprefix("\ufeff"), path, line)


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
                    raise UserError(f"{self._path}:{line}: not valid JSON: {error.msg} at {place}") from None
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
            raise _encoding_error(error, self._path, self.line + self._text.count("\n")) from error
        return bool(data)


def _text_of(row: dict[str, Any], text_field: str, path: Path, line: int, missing: Tally) -> str:
    """Returns the text of a JSON object."""
    if text_field not in row:
        hint = nearest(text_field, row)
        if tables := [name for name, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)]:
            hint += f"; if the texts are in the list '{shortened(tables[0])}', write its objects on lines of their own (.jsonl)"
        raise UserError(f"{path}:{line}: no field '{text_field}' (--data.text-field); {hint}")
    text = row[text_field]
    if text is None:
        missing.add(f"{path.name}:{line}")
        return ""
    if not isinstance(text, str):
        raise UserError(f"{path}:{line}: the field '{text_field}' is {described(text)}, not a string")
    return text


# -- Parquet ----------------------------------------------------------------------------------------------------------------


def parquet_documents(path: Path, text_field: str, missing: Tally) -> Iterator[str]:
    """Yields the texts in a column of a Parquet file.

    Raises:
      UserError: the file is damaged, would unpack to more than `archives.max_unpacked_size`, or has no such column of strings.
    """
    size, limit = 0, max_unpacked_size(path)
    for row, data in enumerate(_parquet_column(path, text_field, limit), start=1):
        if data is None:
            missing.add(f"{path.name}: row {row}")
            yield ""
            continue
        size += len(data)
        if size > limit:
            raise _too_large(path, limit)
        try:
            yield data.decode()
        except UnicodeDecodeError as error:
            problem = f"byte 0x{data[error.start]:02x} is not UTF-8"
            raise UserError(f"{path}: row {row} of the column '{text_field}': {problem}") from error


def _parquet_column(path: Path, text_field: str, limit: int) -> Iterator[bytes | None]:
    """Yields the strings of a column in UTF-8."""
    import pyarrow
    import pyarrow.parquet

    try:
        with path.open("rb") as file, pyarrow.parquet.ParquetFile(file) as table:
            schema = table.schema_arrow
            if schema.names.count(text_field) != 1:
                hint = nearest(text_field, schema.names) if text_field not in schema.names else "there are several of this name"
                raise UserError(f"{path}: no column '{text_field}' (--data.text-field); {hint}")
            kind = schema.field(text_field).type
            if not _contains_strings(kind):
                raise UserError(f"{path}: the column '{text_field}' contains {shortened(str(kind))}, not strings")
            if _unpacked_size(table.metadata, text_field) > limit:
                raise _too_large(path, limit)
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=[text_field]):
                values = batch.column(text_field)
                values = values.dictionary_decode() if pyarrow.types.is_dictionary(values.type) else values
                yield from values.cast(pyarrow.large_binary()).to_pylist()
    except UserError:
        raise
    except Exception as error:  # pyarrow raises exceptions of many types for files that are damaged.
        raise UserError(f"{path}: cannot be read as a Parquet file: {one_line(error)}") from error


def _contains_strings(kind: Any) -> bool:
    """Returns whether a column of this type of pyarrow's contains strings, or bytes, as which some programs store strings."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    texts = (types.is_string, types.is_large_string, types.is_string_view)
    return any(test(kind) for test in (*texts, types.is_binary, types.is_large_binary, types.is_binary_view))


def _unpacked_size(metadata: Any, text_field: str) -> int:
    """Returns the size in bytes of a column of a Parquet file before compression, according to the file."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == text_field)


def _too_large(path: Path, limit: int) -> UserError:
    return UserError(f"{path}: its texts take more than {limit:,} bytes, too many for its size (see the limit for archives)")
