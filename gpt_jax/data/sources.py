"""Sources of text: files, tensorflow-datasets, or the documentation that is installed on this machine.

A source yields documents. A document is one text: the text field of a JSON object, a table's row or an example, a docstring, or a
piece of a plain text file. Text is not normalized here, and a line counts whatever is left out. A token store records the
`identity` of its source, so that a later change of the text is detected.
"""

from collections.abc import Iterator
from typing import Any, Protocol

from gpt_jax.config import DataConfig
from gpt_jax.data.installed_docs import InstalledDocs
from gpt_jax.errors import UserError, nearest, one_line
from gpt_jax.inputs.text_files import MissingSourceError, TextFiles
from gpt_jax.runtime.console import Log, say


class TextSource(Protocol):
    """A source of text that can be read more than once."""

    def identity(self) -> dict[str, Any]:
        """Returns JSON values (names, versions, sizes, checksums) that change whenever the text changes."""

    def documents(self) -> Iterator[str]:
        """Yields the documents, in the same order every time."""


def open_source(config: DataConfig, log: Log = say) -> TextSource:
    """Returns the source that `config.source` names. `log` receives lines about what is left out.

    Raises:
      UserError: the name is empty or unknown.
      MissingSourceError: there is no file to read, or no such data set.
    """
    if not config.source:
        raise UserError("--data.source: name a file, a folder, a glob, tfds:NAME, or builtin:docs (installed documentation)")
    kind, _, name = config.source.partition(":")
    if not is_named(config.source):
        return TextFiles(config.source, config.format, config.text_field, config.allow_skipped, log)
    if kind == "tfds":
        return TfdsSource(name, config.text_field)
    if name != "docs":
        raise UserError(f"--data.source: there is no built-in text '{name}'; write builtin:docs")
    return InstalledDocs(config.max_bytes)


def is_named(source: str) -> bool:
    """Returns whether a source is a name ("tfds:NAME", "builtin:docs") and not a path."""
    return source.startswith(("tfds:", "builtin:"))


# -- tensorflow-datasets ----------------------------------------------------------------------------------------------------


class TfdsSource:
    """The training split of a data set in tensorflow-datasets ("wikipedia/20230601.en"). It is downloaded if necessary.

    Raises:
      MissingSourceError: tensorflow-datasets is not installed, or does not have this data set.
      UserError: the data set does not have this text field.
    """

    def __init__(self, name: str, text_field: str):
        try:
            import tensorflow_datasets as tfds

            self._builder = tfds.builder(name)
            features = list(self._builder.info.features)
        except Exception as error:
            hint = "check the name, and that tensorflow-datasets is installed"
            raise MissingSourceError(f"--data.source: cannot open tfds:{name} ({one_line(error)}); {hint}") from error
        if text_field not in features:
            raise UserError(f"--data.text-field: tfds:{name} has no '{text_field}'; {nearest(text_field, features)}")
        self._as_numpy = tfds.as_numpy
        self._text_field = text_field

    def identity(self) -> dict[str, Any]:
        """Returns the full name of the data set, with its configuration and version."""
        return {"tfds": self._builder.info.full_name}

    def documents(self) -> Iterator[str]:
        """Yields the text field of each training example.

        Raises:
          UserError: the data set needs another package, has no split "train", has no texts in this field, or is damaged.
        """
        number, name = 0, f"tfds:{self._builder.name}"
        try:
            self._builder.download_and_prepare()
            examples = self._as_numpy(self._builder.as_dataset(split="train", shuffle_files=False))
            for example in examples:
                number += 1
                text = example[self._text_field]
                if not isinstance(text, bytes):
                    raise UserError(f"--data.text-field: '{self._text_field}' is a {type(text).__name__}, not a string")
                yield text.decode()
        except UserError:
            raise
        except Exception as error:  # For example, another package is missing, or the data set has no split "train".
            place = f" near example {number} of the split train" if number else ""
            raise UserError(f"--data.source: cannot read {name}{place} ({one_line(error)})") from error
