"""The documents in a corpus file of any format. Joining the documents of a plain text file gives the file again."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt_jax.errors import UserError, described, nearest
from gpt_jax.inputs.formats import BYTE_ORDER_MARK, NUL_BYTE, BinaryFile, TextFormat, decode_text, open_file
from gpt_jax.inputs.json_rows import json_objects
from gpt_jax.inputs.parquet import parquet_texts
from gpt_jax.inputs.tally import Tally

MAX_DOCUMENT_BYTES = 32 * 1024
"""Maximum size of a document cut from plain text. If a book were one document, it would be in a single split and occupy a single
process. Pieces of this size can be divided evenly, and each still contains more than ten of the paper's windows of 512 tokens."""


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
        for number, text in enumerate(parquet_texts(path, text_field), start=1):
            if text is None:
                missing.add(f"{path.name}: row {number}")
            yield text or ""
        return
    with open_file(path) as file:
        if file_format == "text":
            yield from text_documents(file, path)
            return
        for line, row in json_objects(file, path):
            text = _text_of(row, text_field, f"{path}:{line}")
            if text is None:
                missing.add(f"{path.name}:{line}")
            yield text or ""


# -- plain text -------------------------------------------------------------------------------------------------------------


def text_documents(file: BinaryFile, path: Path) -> Iterator[str]:
    """Cuts plain text into documents of at most MAX_DOCUMENT_BYTES. Joining them gives the text without its byte-order mark.

    Raises:
      UserError: there are NUL bytes, or bytes that are not UTF-8. The message names the line.
    """
    line = 1
    text = file.read(len(BYTE_ORDER_MARK)).removeprefix(BYTE_ORDER_MARK)
    while text := text + file.read(MAX_DOCUMENT_BYTES + 1 - len(text)):
        if b"\0" in text:
            line += text.count(b"\n", 0, text.index(b"\0"))
            raise UserError(f"{path}:{line}: {NUL_BYTE}")
        size = len(text) if len(text) <= MAX_DOCUMENT_BYTES else _cut_position(text[:MAX_DOCUMENT_BYTES])
        yield decode_text(text[:size], path, line)
        line += text.count(b"\n", 0, size)
        text = text[size:]


def _cut_position(text: bytes) -> int:
    """Returns the position at which to cut a text that is too long.

    The position is after the last blank line if that is in the second half of the text, else after the last line, else after the
    last space. If there are none, the position is chosen so that no character is cut in two.
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


# -- rows -------------------------------------------------------------------------------------------------------------------


def _text_of(row: dict[str, Any], text_field: str, where: str) -> str | None:
    """Returns the text of a JSON object, or None if it is null."""
    if text_field not in row:
        hint = f"{nearest(text_field, row)}; --data.format text reads the files of a source as plain text"
        raise UserError(f"{where}: no field '{text_field}' (--data.text-field); {hint}")
    text = row[text_field]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: the field '{text_field}' is {described(text)}, not a string")
    return text
