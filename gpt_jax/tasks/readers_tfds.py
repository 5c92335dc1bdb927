"""The rows of a labeled task in tensorflow-datasets."""

from collections.abc import Iterator
from typing import Any

from gpt_jax.errors import UserError, one_line
from gpt_jax.runtime.console import say
from gpt_jax.tasks.tables import Record


def read_tfds(path: str, label: str, labels: tuple[str, ...], hidden_label: str | None) -> Iterator[Record]:
    """Yields the examples of a split, in the order of their feature `idx` if they have it.

    If the data set is not on this machine, it is downloaded, and a line on standard error announces this. If the feature NAME is
    a list, its items are also in the fields NAME/0, NAME/1, ...

    Args:
      path: "name/config:split".
      label: the feature that holds the label.
      labels: the strings that replace class numbers.
      hidden_label: the value that replaces the class number -1.

    Raises:
      UserError: the data set cannot be loaded.
    """
    name, _, split = path.partition(":")
    builder, examples = _load_examples(name, split)
    features = builder.info.features
    if "idx" in features:
        examples.sort(key=lambda example: example["idx"])
    for number, example in enumerate(examples):
        fields = {feature: _to_python(value) for feature, value in example.items()}
        for feature, value in tuple(fields.items()):
            if isinstance(value, list):
                fields |= {f"{feature}/{place}": item for place, item in enumerate(value)}
        if label in features:
            value = example[label]
            # Converting a float32 to a string gives only the digits that it was made from.
            fields[label] = hidden_label if value < 0 else labels[value] if hasattr(features[label], "names") else str(value)
        yield Record(f"tfds:{name} {split} {fields.get('idx', number)}", fields)


def _load_examples(name: str, split: str) -> tuple[Any, list[dict[str, Any]]]:
    """Returns the builder of a data set, and the examples of a split."""
    try:
        import tensorflow_datasets as tfds

        builder = tfds.builder(name)
        if not builder.is_prepared():  # without a network, the attempts continue for minutes
            say(
                f"tensorflow-datasets downloads {name} ({builder.info.homepage}) to {builder.data_path}; to read the task's own "
                "files instead, give their folder as --task.path"
            )
        builder.download_and_prepare()
    except Exception as error:  # a missing package, no network, a file to be downloaded by hand: the remedy is the same
        problem = f"tensorflow-datasets cannot load {name} ({one_line(error)})"
        raise UserError(f"--task.path: {problem}; give the folder of the task's own files") from error
    return builder, list(tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False)))


def _to_python(value: Any) -> Any:
    """Converts values of NumPy and TensorFlow to strings, numbers and lists."""
    if isinstance(value, bytes):
        return value.decode()
    to_list = getattr(value, "to_list", None) or getattr(value, "tolist", None)  # of a ragged tensor, or of an array
    value = to_list() if to_list else value
    return [_to_python(item) for item in value] if isinstance(value, list) else value
