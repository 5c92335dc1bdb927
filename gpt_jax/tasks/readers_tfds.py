"""The rows of a labelled task in tensorflow-datasets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpt_jax.errors import UserError
from gpt_jax.runtime.console import say
from gpt_jax.tasks.tables import Record


def records(part: str, label: str, labels: tuple[str, ...], unlabelled: str | None) -> Iterator[Record]:
    """The examples of a split, in the order of their `idx` where they have one; the set is downloaded if it is not there yet,
    and a line on standard error says so.

    The items of a list NAME are also there as NAME/0, NAME/1, ...

    Args:
      part: "name/config:split".
      label: the feature that holds the label.
      labels: what takes the place of a class number.
      unlabelled: what takes the place of -1.

    Raises:
      UserError: the set cannot be had.
    """
    name, _, split = part.partition(":")
    builder, examples = _examples(name, split)
    features = builder.info.features
    if "idx" in features:
        examples.sort(key=lambda example: example["idx"])
    for number, example in enumerate(examples):
        fields = {feature: _plain(value) for feature, value in example.items()}
        for feature, value in tuple(fields.items()):
            if isinstance(value, list):
                fields |= {f"{feature}/{place}": item for place, item in enumerate(value)}
        if label in features:
            value = example[label]
            # As a text, a float32 has no more digits than it was given.
            fields[label] = unlabelled if value < 0 else labels[value] if hasattr(features[label], "names") else str(value)
        yield Record(f"tfds:{name} {split} {fields.get('idx', number)}", fields)


def _examples(name: str, split: str) -> tuple[Any, list[dict[str, Any]]]:
    """The set's builder, and a split's examples."""
    try:
        import tensorflow_datasets as tfds

        builder = tfds.builder(name)
        if not builder.is_prepared():  # without a network it tries again and again, for minutes
            say(
                f"tensorflow-datasets downloads {name} ({builder.info.homepage}) into {builder.data_path}; --task.path FOLDER "
                "reads the task's files instead"
            )
        builder.download_and_prepare()
    except Exception as error:  # a missing package, no network, a file to be fetched by hand: there is one way out
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"--task.path: tensorflow-datasets cannot give {name} ({reason}); give the folder of the task's files"
        ) from error
    return builder, list(tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False)))


def _plain(value: Any) -> Any:
    """Texts, numbers and lists in place of NumPy's and TensorFlow's."""
    if isinstance(value, bytes):
        return value.decode()
    if hasattr(value, "to_list"):  # a ragged tensor: a list of lists
        value = value.to_list()
    elif hasattr(value, "tolist"):
        value = value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list) else value
