"""Sources of text: files, data sets of tensorflow-datasets, installed documentation."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpt_jax.config import DataConfig
from gpt_jax.data import installed_docs, sources
from gpt_jax.errors import UserError


def read(source: Path | str, **fields) -> list[str]:
    return list(sources.open_source(DataConfig(source=str(source), **fields)).documents())


# -- files ------------------------------------------------------------------------------------------------------------------


def test_files_are_read_as_the_config_says(tmp_path):
    (tmp_path / "rows").write_text('{"body": "one"}\n{"body": "two"}\n')
    (tmp_path / "empty").touch()
    lines: list[str] = []
    config = DataConfig(source=str(tmp_path), format="jsonl", text_field="body", allow_skipped=True)
    assert list(sources.open_source(config, lines.append).documents()) == ["one", "two"]
    assert len(lines) == 1
    assert "left out" in lines[0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "--data.source: name a file, a folder, a glob, tfds:NAME, or builtin:docs"),
        ("builtin:novels", "there is no built-in text 'novels'; write builtin:docs"),
        ("{tmp}", "contains no files to read"),
        ("{tmp}/novel.txt", r"novel.txt' does not exist; in .*: did you mean novels\?"),
    ],
)
def test_a_source_without_text_is_refused(tmp_path, source, message):
    (tmp_path / "novels").mkdir()
    with pytest.raises(UserError, match=message):
        read(source.format(tmp=tmp_path))


def test_names_are_told_apart_from_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:b.txt").write_text("text")
    assert read("a:b.txt") == ["text"]
    names = {"tfds:wiki40b/en": True, "builtin:docs": True, "tfds": False, "texts/tfds:x": False, "C:x": False, "": False}
    assert {name: sources.is_named(name) for name in names} == names


# -- tensorflow-datasets ----------------------------------------------------------------------------------------------------

TFDS_SCRIPT = """
import pathlib, sys
import numpy as np
import tensorflow_datasets as tfds
from gpt_jax.config import DataConfig
from gpt_jax.data import installed_docs, sources
from gpt_jax.errors import UserError

tfds.dataset_builders.store_as_tfds_dataset(
    name="tiny", version="1.2.3", data_dir=sys.argv[1], disable_shuffling=True,
    features=tfds.features.FeaturesDict({"story": tfds.features.Text(), "label": tfds.features.Scalar(np.int64)}),
    split_datasets={"train": [(0, {"story": "first caf\\u00e9", "label": 1}), (1, {"story": "second", "label": 2})],
                    "test": [(0, {"story": "held out", "label": 3})]},
)
tfds.dataset_builders.store_as_tfds_dataset(
    name="test_only", version="1.0.0", data_dir=sys.argv[1], features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
    split_datasets={"test": [(0, {"text": "held out"})]},
)
tfds.dataset_builders.store_as_tfds_dataset(
    name="latin", version="1.0.0", data_dir=sys.argv[1], features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
    split_datasets={"train": [(0, {"text": b"fine"}), (1, {"text": b"caf\\xe9"})]},
)
tfds.dataset_builders.store_as_tfds_dataset(
    name="cut", version="1.0.0", data_dir=sys.argv[1], features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
    split_datasets={"train": [(0, {"text": "first"}), (1, {"text": "second"})]},
)
for path in pathlib.Path(sys.argv[1], "cut").rglob("*.tfrecord*"):
    path.write_bytes(path.read_bytes()[:-5])
source = sources.open_source(DataConfig(source="tfds:tiny", text_field="story"))
print(source.identity(), sorted(source.documents()))
wrong = [("tiny", "text"), ("tinny", "text"), ("tiny", "label"), ("test_only", "text"), ("latin", "text"), ("cut", "text")]
for name, field in wrong:
    try:
        print(list(sources.open_source(DataConfig(source=f"tfds:{name}", text_field=field)).documents()))
    except UserError as error:
        print(error)
"""


@pytest.mark.slow
def test_the_training_split_of_a_tensorflow_data_set_is_read(tmp_path):
    # tensorflow-datasets 4.9.10 imports this package to make a data set, but does not require it.
    pytest.importorskip("importlib_resources", reason="importlib_resources is not installed")
    environment = {
        **os.environ,
        "TFDS_DATA_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-c", TFDS_SCRIPT, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    good, field, name, label, split, latin, cut = done.stdout.splitlines()[-7:]
    assert good == "{'tfds': 'tiny/1.2.3'} ['first café', 'second']"
    assert field.startswith("--data.text-field: tfds:tiny has no 'text'; ")
    assert name.startswith("--data.source: cannot open tfds:tinny (DatasetNotFoundError: ")
    assert label.startswith("--data.text-field: 'label' is a ")
    assert re.match(r"--data.source: cannot read tfds:test_only \(ValueError: Unknown split [\"']train[\"']", split)
    problem = r"\(UnicodeDecodeError: 'utf-8' codec can't decode byte 0xe9 "
    assert re.match(rf"--data.source: cannot read tfds:latin near example [12] of the split train {problem}", latin)
    assert re.match(r"--data.source: cannot read tfds:cut( near example 1 of the split train)? \(DataLossError: ", cut)


def test_without_tensorflow_datasets_the_message_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    message = (
        r"^--data.source: cannot open tfds:tiny \(ModuleNotFoundError[^\n]*check [^\n]* that tensorflow-datasets is installed$"
    )
    with pytest.raises(UserError, match=message):
        read("tfds:tiny")


# -- installed documentation ------------------------------------------------------------------------------------------------

PROSE = "This function returns the number of the items that are in the list, and it is never less than one of them. "
LICENSE = "Permission is granted to use this file in any way that you want, as long as this notice is kept with it. " * 2


def test_installed_documentation_is_prose_taken_once_from_files_that_are_not_imported(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text(
        f'"""{PROSE * 2}\n\n    >>> print(len([1, 2, 3]), "and some of the words that are in prose")\n\n{LICENSE}"""\n'
        f'class A:\n    """Short."""\n    def f(self):\n        """{PROSE * 3}"""\nraise SystemExit("imported")\n'
    )
    (tmp_path / "b.py").write_text(f'def g():\n    r"""{LICENSE}\n\n    It is {PROSE * 2}\n    """\n')
    (tmp_path / "topics.py").write_text(f"topics = {{'if': 'The if statement is used so that {PROSE * 2}'}}\n")
    (tmp_path / "page.md").write_text(f"# Title\n\n| a | b |\n\nThe page is here. {PROSE * 2}\n")
    (tmp_path / "broken.py").write_text('"""' + PROSE * 3 + '"""\nnot python\n')
    (tmp_path / "latin.txt").write_bytes(b"\xe9" + PROSE.encode() * 3)
    names = ["a.py", "b.py", "topics.py", "page.md", "broken.py", "latin.txt"]
    monkeypatch.setattr(installed_docs, "_installed_files", lambda: ((name, tmp_path / name, "some") for name in names))
    documents = read("builtin:docs")
    assert sorted(text.rstrip() for text in documents) == sorted(
        text.rstrip()
        for text in (
            # The license is in a.py too, but b.py comes first in the order of the hash of names.
            PROSE * 2,
            LICENSE + "\n\nIt is " + PROSE * 2,
            PROSE * 3,
            "The if statement is used so that " + PROSE * 2,
            "The page is here. " + PROSE * 2,
        )
    )


def test_the_documentation_of_this_machine_is_there_and_the_same_every_time():
    first, second = (sources.open_source(DataConfig(source="builtin:docs", max_bytes=60_000)) for _ in range(2))
    texts = list(first.documents())
    assert 60_000 <= sum(len(text.encode()) for text in texts) < 2_000_000
    assert len(set(texts)) == len(texts) > 10
    assert first.identity() == second.identity()
    words = " ".join(texts).lower().split()
    assert words.count("the") / len(words) > 0.03  # About 6 % of the words of English prose, and almost none of code.
