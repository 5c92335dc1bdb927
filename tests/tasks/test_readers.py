"""Tests of the readers on small files in the exact layouts of the releases, with valid and malformed rows."""

import collections
import gzip
import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest

from gpt_jax.config import TaskConfig
from gpt_jax.errors import UserError
from gpt_jax.tasks import registry
from gpt_jax.tasks.readers import Example, read_split


def write(path, *lines, end="\n"):
    """Writes rows. Each is a line of text, or a list of cells to be separated by tabs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else "\t".join(line)) + end for line in lines), newline="")


def split_of(name, path, split="train"):
    return read_split(registry.get_task(name), TaskConfig(name=name, path=str(path)), split)


def examples_of(name, path, split="train"):
    return split_of(name, path, split).examples


def contents(rows):
    return [(row.texts, row.label) for row in rows]


def error_of(name, path, split="train"):
    with pytest.raises(UserError) as error:
        split_of(name, path, split)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- GLUE -------------------------------------------------------------------------------------------------------------------


def test_cola_has_four_columns_without_a_header_and_a_test_with_one(tmp_path):
    write(tmp_path / "train.tsv", 'gj04\t1\t\tHe said "so.', "gj04\t0\t*\t The more  does Bill smoke. ", "", 'ks\t1\t\tA "b"" c.')
    write(tmp_path / "test.tsv", "index\tsentence", "0\tBill whistled.", "1\tIs it?")
    split = split_of("cola", tmp_path)
    assert contents(split.examples) == [(('He said "so.',), 1), (("The more  does Bill smoke.",), 0), (('A "b"" c.',), 1)]
    assert [row.where for row in split.examples] == [f"{tmp_path}/train.tsv:{line}" for line in (1, 2, 4)]
    assert [row.id for row in split.examples] == ["0", "1", "2"]
    assert (split.num_rows, split.dropped) == (3, {})
    assert examples_of("cola", tmp_path, "test")[1] == Example("1", ("Is it?",), None, f"{tmp_path}/test.tsv:3")


def test_the_folder_above_the_tasks_own_and_line_ends_of_two_characters_are_accepted(tmp_path):
    write(tmp_path / "SST-2" / "dev.tsv", "sentence\tlabel", "a gorgeous , witty film \t1", "unflinchingly bleak \t0", end="\r\n")
    assert contents(examples_of("sst2", tmp_path, "validation")) == [
        (("a gorgeous , witty film",), 1),
        (("unflinchingly bleak",), 0),
    ]
    assert examples_of("sst2", tmp_path, "validation") == examples_of("sst2", tmp_path / "SST-2", "validation")


@pytest.mark.parametrize(("name", "columns"), [("rte", ["sentence1", "sentence2"]), ("qnli", ["question", "sentence"])])
def test_rte_and_qnli(tmp_path, name, columns):
    write(
        tmp_path / "train.tsv", ["index", *columns, "label"], ["7", "A.", "B.", "not_entailment"], ["8", "C.", "D.", "entailment"]
    )
    write(tmp_path / "test.tsv", ["index", *columns], ["0", "E.", "F."])
    assert [row[:3] for row in examples_of(name, tmp_path)] == [("7", ("A.", "B."), 1), ("8", ("C.", "D."), 0)]
    assert contents(examples_of(name, tmp_path, "test")) == [(("E.", "F."), None)]


def test_mrpc_has_a_byte_order_mark(tmp_path):
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    write(tmp_path / "train.tsv", header, ["1", "70", "71", 'He said " no .', "No , he said ."], end="\r\n")
    write(tmp_path / "msr_paraphrase_train.txt", header, "1\t70\t71\ta\tb", "0\t72\t73\tc\td")
    write(tmp_path / "test.tsv", "index\t#1 ID\t#2 ID\t#1 String\t#2 String", "0\t1\t2\tE .\tF .")
    assert contents(examples_of("mrpc", tmp_path)) == [(('He said " no .', "No , he said ."), 1)]
    assert contents(examples_of("mrpc", tmp_path, "test")) == [(("E .", "F ."), None)]


def test_mrpc_as_first_released_has_labeled_tests_and_no_validation_split(tmp_path):
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    write(tmp_path / "msr_paraphrase_train.txt", header, "1\t70\t71\ta\tb", "0\t72\t73\tc\td")
    write(tmp_path / "msr_paraphrase_test.txt", header, "0\t74\t75\te\tf")
    assert contents(examples_of("mrpc", tmp_path)) == [(("a", "b"), 1), (("c", "d"), 0)]
    assert contents(examples_of("mrpc", tmp_path, "test")) == [(("e", "f"), 0)]
    assert error_of("mrpc", tmp_path, "validation") == (
        f"--task.path: the release of MRPC in {tmp_path} has no validation split; give the folder of the GLUE download, which "
        "has dev.tsv, or leave --task.path out to use tensorflow-datasets"
    )


def test_the_known_defects_of_qqp_are_dropped_and_counted(tmp_path):
    write(
        tmp_path / "train.tsv",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "133273\t213221\t213222\tHow is it?\tHow was it?\t1",
        '5\t6\t7\tWho\twas "he',
        '"\tand when?\t0',
        "9\t10\t11\tWhat?\t \t0",
    )
    write(tmp_path / "test.tsv", "id\tquestion1\tquestion2", "3\tWhy?\tWhen?")
    split = split_of("qqp", tmp_path)
    assert [row[:3] for row in split.examples] == [("133273", ("How is it?", "How was it?"), 1)]
    assert (split.num_rows, split.dropped) == (4, {"wrong number of columns": 2, "empty text": 1})
    assert [row[:3] for row in examples_of("qqp", tmp_path, "test")] == [("3", ("Why?", "When?"), None)]


@pytest.mark.parametrize(
    ("lines", "indices"),
    [
        (["0\ta\tb", "1\tbro", "ken\tc", "2\td\t "], (1, 2)),
        (["0\ta\tb", "1\tc\td", "2\tbro", "ken\te"], (2,)),
        (["0\ta\tb", "1\tshort"], (1,)),
        (["0\ta\tb", "1\tbro", "1984\tken"], (1,)),
    ],
)
def test_the_indices_of_rows_dropped_from_a_test_split_are_kept(tmp_path, lines, indices):
    """A piece of a broken row that begins with a number has no index: the number is greater than those of the file."""
    write(tmp_path / "train.tsv", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate")
    write(tmp_path / "test.tsv", "id\tquestion1\tquestion2", *lines)
    assert split_of("qqp", tmp_path, "test").dropped_indices == indices


def test_stsb_has_scores(tmp_path):
    columns = ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2"]
    row = ["0", "main-captions", "MSRvid", "2012test", "0001", "none", "none", "A plane is taking off.", "A plane takes off."]
    write(tmp_path / "train.tsv", [*columns, "score"], [*row, "3.800"], [*row, "0"])
    write(tmp_path / "test.tsv", columns, row)
    assert [row.label for row in examples_of("stsb", tmp_path)] == [3.8, 0.0]
    assert contents(examples_of("stsb", tmp_path, "test")) == [(("A plane is taking off.", "A plane takes off."), None)]


def test_mnli_has_two_groups_and_files_of_different_columns(tmp_path):
    common = ["index", "promptID", "pairID", "genre", "parse", "sentence1", "sentence2"]
    row = ["0", "31193", "31193n", "government", "( ( x ) )", "A.", "B."]
    write(tmp_path / "MNLI" / "train.tsv", [*common, "label1", "gold_label"], [*row, "neutral", "neutral"])
    for group, label in (("matched", "entailment"), ("mismatched", "contradiction")):
        labels = [f"label{number}" for number in range(1, 6)]
        write(tmp_path / "MNLI" / f"dev_{group}.tsv", [*common, *labels, "gold_label"], [*row, *["neutral"] * 5, label])
        write(tmp_path / "MNLI" / f"test_{group}.tsv", common, row)
    assert contents(examples_of("mnli", tmp_path)) == [(("A.", "B."), 1)]
    validation = examples_of("mnli", tmp_path, "validation")
    assert [(row.id, row.label, row.group) for row in validation] == [("0", 0, "matched"), ("0", 2, "mismatched")]
    assert [(row.label, row.group) for row in examples_of("mnli", tmp_path, "test")] == [(None, "matched"), (None, "mismatched")]
    (tmp_path / "MNLI" / "dev_mismatched.tsv").unlink()
    message = f"--task.path: {tmp_path}/MNLI has no dev_mismatched.tsv, which the validation split of MultiNLI needs"
    assert error_of("mnli", tmp_path, "validation") == message


# -- JSON lines -------------------------------------------------------------------------------------------------------------


def nli(label, number):
    pair = {"sentence1": f"A\u2028man {number}. ", "sentence2": 'A "man".', "gold_label": label, "pairID": f"{number}r1c"}
    return json.dumps(pair | {"annotator_labels": [label], "captionID": "x.jpg#0"}, ensure_ascii=False)


@pytest.mark.parametrize(
    ("name", "train", "validation"),
    [
        ("snli", "snli_1.0_train.jsonl", ["snli_1.0_dev.jsonl"]),
        ("mnli", "multinli_1.0_train.jsonl", ["multinli_1.0_dev_matched.jsonl", "multinli_1.0_dev_mismatched.jsonl"]),
    ],
)
def test_pairs_without_a_gold_label_are_dropped_and_counted(tmp_path, name, train, validation):
    write(tmp_path / train, nli("neutral", 1), nli("-", 2), nli("contradiction", 3), nli("-", 4))
    for file in validation:
        write(tmp_path / file, nli("entailment", 5))
    split = split_of(name, tmp_path)
    assert [row[:3] for row in split.examples] == [
        ("1r1c", ("A\u2028man 1.", 'A "man".'), 1),
        ("3r1c", ("A\u2028man 3.", 'A "man".'), 2),
    ]
    assert split.examples[1].where == f"{tmp_path / train}:3"
    assert (split.num_rows, split.dropped) == (4, {"no gold label": 2})
    assert [row.label for row in examples_of(name, tmp_path, "validation")] == [0] * len(validation)
    assert split_of(name, tmp_path, "test") is None


# -- SciTail, Story Cloze, RACE ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["", "tsv_format", "SciTailV1.1/tsv_format"])
def test_scitail(tmp_path, folder):
    write(tmp_path / folder / "scitail_1.0_train.tsv", 'Pluto "rotates.\tEarth rotates.\tneutral', '"A\tB.\tentails')
    assert contents(examples_of("scitail", tmp_path)) == [(('Pluto "rotates.', "Earth rotates."), 1), (('"A', "B."), 0)]


STORY_HEADER = (
    "InputStoryid,InputSentence1,InputSentence2,InputSentence3,InputSentence4,"
    "RandomFifthSentenceQuiz1,RandomFifthSentenceQuiz2,AnswerRightEnding"
)


def story(number, answer=1):
    return f'id-{number},"One, {number}.",Two. ,"He said ""three"".",Four.,Good end.,Bad end.,{answer}'


@pytest.mark.parametrize("name", ["cloze_test_val__spring2016.csv", "cloze_test_val__spring2016 - cloze_test_ALL_val.csv"])
def test_story_cloze_holds_out_the_rows_that_the_released_code_does(tmp_path, name):
    write(tmp_path / name, STORY_HEADER, *(story(number, number % 2 + 1) for number in range(1871)))
    train, validation = split_of("story_cloze", tmp_path), split_of("story_cloze", tmp_path, "validation")
    # This is how scikit-learn's train_test_split uses the seed. NumPy's legacy generator is frozen.
    order = np.random.RandomState(3535999445).permutation(1871)
    assert [row.id for row in validation.examples] == [f"id-{number}" for number in order[:374]]
    assert [row.id for row in train.examples] == [f"id-{number}" for number in order[374:]]
    assert (train.num_rows, validation.num_rows, train.dropped) == (1497, 374, {})
    first = next(row for row in train.examples if row.id == "id-0")
    assert first.texts == ('One, 0. Two.  He said "three". Four.', "Good end.", "Bad end.")
    assert [row.label for row in validation.examples] == [float(number % 2) for number in order[:374]]


@pytest.mark.parametrize("suffix", ["", "-cloze_test_ALL_val - 1 - 1"])
def test_story_cloze_of_2018_is_read_like_that_of_2016_and_has_a_hidden_test(tmp_path, suffix):
    """These are the names of the released file and of tensorflow-datasets. The test file lacks the column of the answer."""
    rows = [STORY_HEADER, *(story(number, number % 2 + 1) for number in range(1571))]
    write(tmp_path / f"cloze_test_val__winter2018{suffix}.csv", *rows)
    train, validation = split_of("story_cloze", tmp_path), split_of("story_cloze", tmp_path, "validation")
    order = np.random.RandomState(3535999445).permutation(1571)
    assert [row.id for row in validation.examples] == [f"id-{number}" for number in order[:374]]
    assert (train.num_rows, validation.num_rows) == (1197, 374)
    assert split_of("story_cloze", tmp_path, "test") is None
    test = [line.rpartition(",")[0] for line in (STORY_HEADER, story(0), story(1))]
    write(tmp_path / f"cloze_test_test__winter2018{suffix.replace('val - 1', 'test')}.csv", *test)
    texts = ('One, 0. Two.  He said "three". Four.', "Good end.", "Bad end.")
    assert contents(examples_of("story_cloze", tmp_path, "test"))[0] == (texts, None)


def test_two_releases_in_one_folder_are_refused(tmp_path):
    write(tmp_path / "cloze_test_val__spring2016.csv", STORY_HEADER, story(0))
    write(tmp_path / "cloze_test_test__winter2018.csv", STORY_HEADER, story(0))
    assert error_of("story_cloze", tmp_path) == (
        f"--task.path: {tmp_path} has 2 releases of Story Cloze, with cloze_test_val__spring2016.csv, "
        "cloze_test_test__winter2018.csv; keep the files of one, or give its own folder"
    )
    write(tmp_path / "MNLI" / "train.tsv", "sentence1\tsentence2\tgold_label", "A.\tB.\tneutral")
    write(tmp_path / "multinli_1.0" / "multinli_1.0_train.jsonl", nli("neutral", 1))
    message = f"{tmp_path} has 2 releases of MultiNLI, with MNLI/train.tsv, multinli_1.0/multinli_1.0_train.jsonl; keep the"
    assert message in error_of("mnli", tmp_path)
    assert len(examples_of("mnli", tmp_path / "MNLI")) == len(examples_of("mnli", tmp_path / "multinli_1.0")) == 1
    for folder in (tmp_path, tmp_path / "SST-2"):
        write(folder / "train.tsv", "sentence\tlabel", "fine\t1")
    assert "has 2 releases of SST-2, with train.tsv, SST-2/train.tsv; keep the files of one" in error_of("sst2", tmp_path)


def test_story_cloze_tests_on_the_test_file(tmp_path):
    write(tmp_path / "cloze_test_test__spring2016.csv", STORY_HEADER, story(0, 2))
    assert [row.label for row in examples_of("story_cloze", tmp_path, "test")] == [1]
    write(tmp_path / "cloze_test_val__spring2016.csv", STORY_HEADER, story(0))
    assert "cloze_test_val__spring2016.csv:2: the file has 1 rows, but 374 are to be held out for validation" in error_of(
        "story_cloze", tmp_path
    )
    write(tmp_path / "cloze_test_val__spring2016 - copy.csv", STORY_HEADER, story(0))
    assert error_of("story_cloze", tmp_path).endswith("; keep one of them")


def passage(folder, number, **changes):
    content = {
        "article": f"It rains.\nIt is day {number}.",
        "questions": ["What falls?", "It is _ ."],
        "options": [["snow", "rain", "hail", "leaves"], ["day", "night", "dusk", "dawn"]],
        "answers": ["B", "A"],
        "id": f"{number}.txt",
    }
    write(folder / f"{number}.txt", json.dumps(content | changes))


def test_race_has_two_groups_of_articles_with_several_questions(tmp_path):
    for split in ("train", "dev", "test"):
        passage(tmp_path / "RACE" / split / "middle", 1)
        passage(tmp_path / "RACE" / split / "high", 2)
    rows = examples_of("race", tmp_path, "validation")
    assert [(row.id, row.label, row.group) for row in rows] == [
        ("1.txt/0", 1, "middle"),
        ("1.txt/1", 0, "middle"),
        ("2.txt/0", 1, "high"),
        ("2.txt/1", 0, "high"),
    ]
    assert rows[1].texts == ("It rains.\nIt is day 1. It is _ .", "day", "night", "dusk", "dawn")
    assert examples_of("race", tmp_path / "RACE", "validation") == rows
    assert [row.label for row in examples_of("race", tmp_path, "test")] == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": [["snow", "rain", "hail"], ["a", "b", "c", "d"]]}, ":1 question 0: 3 options; every question must have 4"),
        ({"answers": ["B", "E"]}, ":1 question 1: the label is 'E'; it must be one of A, B, C, D"),
        ({"answers": ["B"]}, ":1: 'article' must be a string, and questions, options, answers must be lists of equal length"),
        ({"options": [["snow", "rain", "hail", " "], ["a", "b", "c", "d"]]}, ":1 question 0: 'D' is empty; "),
        ({"options": [[1, 2, 3, 4], ["a", "b", "c", "d"]]}, ":1 question 0: 'A' must be a string, not a number"),
    ],
)
def test_malformed_articles_are_refused(tmp_path, changes, message):
    passage(tmp_path / "train" / "high", 1)
    passage(tmp_path / "train" / "middle", 3, **changes)
    assert error_of("race", tmp_path).startswith(f"{tmp_path}/train/middle/3.txt{message}")


def test_articles_that_are_not_json_are_refused(tmp_path):
    passage(tmp_path / "train" / "high", 1)
    write(tmp_path / "train" / "middle" / "1.txt", '{"article": "x",', "broken")
    assert error_of("race", tmp_path).startswith(f"{tmp_path}/train/middle/1.txt:2: not valid JSON: ")
    write(tmp_path / "train" / "middle" / "1.txt", '{"article": "x"}')
    assert error_of("race", tmp_path).startswith(f"{tmp_path}/train/middle/1.txt:1: no column 'questions'; ")


# -- bad rows and files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1\tA.\tentailment", "3 columns; there must be 4: index, sentence1, sentence2, label"),
        ("1\tA.\tB.\tC.\tentailment", "5 columns; there must be 4: index, sentence1, sentence2, label"),
        ("1\tA.\tB.\tneutral", "the label is 'neutral'; it must be one of entailment, not_entailment"),
        ("1\tA.\tB.\t-", "the label is missing ('-'), which is only allowed in a test split"),
        ("1\tA.\t \u00a0\tentailment", "'sentence2' is empty; every text needs at least one character that is not white space"),
    ],
)
def test_malformed_rows_are_refused(tmp_path, row, message):
    write(tmp_path / "train.tsv", "index\tsentence1\tsentence2\tlabel", "0\tA.\tB.\tentailment", row)
    assert error_of("rte", tmp_path) == f"{tmp_path}/train.tsv:3: {message}"


@pytest.mark.parametrize("score", ["x", "inf", "5.2", "-1"])
def test_invalid_scores_are_refused(tmp_path, score):
    write(tmp_path / "train.tsv", "sentence1\tsentence2\tscore", f"A\tB\t{score}")
    assert (
        error_of("stsb", tmp_path)
        == f"{tmp_path}/train.tsv:2: the score is '{score}'; it must be a number from 0 to 5, with a decimal point"
    )


def test_bytes_that_are_not_utf_8_are_refused(tmp_path):
    write(tmp_path / "train.tsv", "sentence\tlabel", "fine\t1")
    with (tmp_path / "train.tsv").open("ab") as file:
        file.write("naïve\t1\n".encode("latin-1"))
    assert error_of("sst2", tmp_path) == f"{tmp_path}/train.tsv:3: byte 0xef is not UTF-8; convert the file to UTF-8"


def test_malformed_json_lines_are_refused(tmp_path):
    path = tmp_path / "snli_1.0_train.jsonl"
    for line, message in [
        ('{"sentence1": "A}', ":2: not valid JSON: "),
        ("[1]", ":2: a list, not a JSON object with named fields"),
        ("null", ":2: null, not a JSON object with named fields"),
        ('{"sentence1": "A", "sentence2": "B"}', ":2: no column 'gold_label'; known: sentence1, sentence2"),
        (
            '{"sentence1": "A", "sentence2": "B", "gold_label": null}',
            ":2: the label is missing, which is only allowed in a test split",
        ),
    ]:
        write(path, nli("neutral", 1), line)
        assert error_of("snli", tmp_path).startswith(f"{path}{message}")


def test_malformed_rows_of_a_file_are_counted(tmp_path):
    rows = ["A.\tB.\tentailment"] * 2 + ["A.\tB.\t"] * 20 + ["A.\tB.\tneutral"] * 2 + ["A.\tB.\tNaN", "A.\t\tentailment"]
    write(tmp_path / "train.tsv", "sentence1\tsentence2\tlabel", *rows)
    assert error_of("rte", tmp_path) == (
        f"{tmp_path}/train.tsv:4: the label is missing, which is only allowed in a test split; rows with errors: 24 "
        "(4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 and 12 more)"
    )


@pytest.mark.parametrize("label", ["", "-1", "-", "NaN", "null", "None", "-1.0"])
def test_labels_of_a_test_split_may_be_hidden_in_any_way(tmp_path, label):
    write(tmp_path / "train.tsv", "sentence1\tsentence2\tscore", "A\tB\t1.0")
    write(tmp_path / "test.tsv", "sentence1\tsentence2\tscore", f"A\tB\t{label}")
    assert [row.label for row in examples_of("stsb", tmp_path, "test")] == [None]
    write(tmp_path / "train.tsv", "sentence\tlabel", "A\t1")
    write(tmp_path / "test.tsv", "sentence\tlabel", f"A\t{label}", "B\t1")
    assert [row.label for row in examples_of("sst2", tmp_path, "test")] == [None, 1]


def test_files_of_another_task_are_refused(tmp_path):
    write(tmp_path / "train.tsv", "index\tsentence1\tsentence2\tlabel", "0\tA.\tB.\tentailment")
    assert error_of("qqp", tmp_path).startswith(f"{tmp_path}/train.tsv:1: no column 'question1'; ")
    write(tmp_path / "train.tsv", "sentence1\tsentence2", "A.\tB.")
    assert error_of("rte", tmp_path) == f"{tmp_path}/train.tsv:1: no column 'label'; known: sentence1, sentence2"
    write(tmp_path / "train.tsv")
    assert error_of("rte", tmp_path) == f"{tmp_path}/train.tsv:1: no column 'sentence1'; there are none"


def test_missing_files_are_refused(tmp_path):
    assert error_of("rte", tmp_path / "absent") == f"--task.path: there is no folder '{tmp_path}/absent'"
    message = f"--task.path: there are no files of RTE; looked for train.tsv in {tmp_path}, {tmp_path}/RTE"
    assert error_of("rte", tmp_path) == message
    write(tmp_path / "train.tsv", "index\tsentence1\tsentence2\tlabel")
    assert error_of("rte", tmp_path, "validation").endswith("has no dev.tsv, which the validation split of RTE needs")
    assert error_of("rte", tmp_path) == "--task.path: the train split of RTE has no usable rows (0 read, 0 dropped)"
    assert split_of("rte", tmp_path, "test") is None


# -- folders of releases ----------------------------------------------------------------------------------------------------


def test_names_are_compared_without_case_and_files_may_be_compressed(tmp_path):
    rows = b"sentence\tlabel\nfine\t1\n"
    for folder, name, pack in [("sst-2", "Train.TSV", bytes), ("SST-2", "train.tsv.gz", gzip.compress), ("a", "x", bytes)]:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_bytes(pack(rows))
    for given in (tmp_path / "sst-2", tmp_path / "SST-2"):
        assert contents(examples_of("sst2", given)) == [(("fine",), 1)]
    (tmp_path / "sst-2" / "train.tsv.zst").write_bytes(b"")
    assert error_of("sst2", tmp_path / "sst-2") == f"--task.path: {tmp_path}/sst-2 has Train.TSV, train.tsv.zst; keep one of them"


def test_hidden_files_are_not_read_and_links_are(tmp_path):
    """macOS puts files with metadata into archives, which are named like the files that they belong to."""
    for group in ("middle", "high"):
        passage(tmp_path / "train" / group, 1)
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        passage(tmp_path / "elsewhere", 2)
        (tmp_path / "train" / group / "2.txt").symlink_to(tmp_path / "elsewhere" / "2.txt")
    (tmp_path / "train" / "high" / "._1.txt").write_bytes(b"\0\x05\x16\x07")
    split = split_of("race", tmp_path)
    assert [row.id for row in split.examples] == ["1.txt/0", "1.txt/1", "2.txt/0", "2.txt/1"] * 2
    write(tmp_path / "train" / "._train.tsv", "")
    assert error_of("rte", tmp_path / "train").startswith("--task.path: there are no files of RTE")


def test_what_is_not_a_file_is_refused(tmp_path):
    (tmp_path / "train.tsv").mkdir()
    assert error_of("rte", tmp_path) == f"{tmp_path}/train.tsv: a folder, not a file"
    (tmp_path / "train.tsv").rmdir()
    (tmp_path / "train.tsv").symlink_to("nowhere.tsv")
    assert error_of("rte", tmp_path) == f"{tmp_path}/train.tsv: No such file or directory"


# -- own files --------------------------------------------------------------------------------------------------------------


def own_split(split="train", **fields):
    config = TaskConfig(**fields)
    return read_split(registry.task_from_config(config), config, split)


def test_own_files_of_every_format(tmp_path):
    write(tmp_path / "my.tsv", "label\tid\ttext", 'good\tx1\t "quoted', "bad\tx2\tcomma, dot.")
    write(tmp_path / "my.csv", "text,label", '"two', "", 'lines, ""quoted""", good', "plain,bad")
    write(tmp_path / "my.jsonl", '{"text": "a", "label": "bad"}', "", '{"text": "b"}')
    files = {"train": str(tmp_path / "my.tsv"), "validation": str(tmp_path / "my.csv"), "test": str(tmp_path / "my.jsonl")}
    labels = ("good", "bad")
    assert contents(own_split(**files).examples) == [(('"quoted',), 1), (("comma, dot.",), 0)]
    assert [row.id for row in own_split(**files).examples] == ["x1", "x2"]
    validation = own_split("validation", **files, labels=labels).examples
    assert contents(validation) == [(('two\n\nlines, "quoted"',), 0), (("plain",), 1)]
    assert [row.where for row in validation] == [f"{tmp_path}/my.csv:2", f"{tmp_path}/my.csv:5"]
    assert own_split("validation", train=files["train"]) is None


def test_own_tests_may_lack_labels(tmp_path):
    write(tmp_path / "train.csv", "a,b,same", "x,y,1", "x,z,0")
    write(tmp_path / "test.csv", "a,b", "x,y")
    fields = {"train": str(tmp_path / "train.csv"), "kind": "similarity", "texts": ("a", "b"), "label": "same"}
    assert contents(own_split("test", test=str(tmp_path / "test.csv"), **fields).examples) == [(("x", "y"), None)]
    with pytest.raises(UserError, match=r"test.csv:1: no column 'same' \(--task.label\); known: a, b$"):
        own_split("validation", validation=str(tmp_path / "test.csv"), **fields)


def test_own_multiple_choice(tmp_path):
    write(tmp_path / "train.jsonl", '{"c": "It rains.", "x": "Wet.", "y": "Dry.", "z": "Red.", "label": 2}')
    fields = {"train": str(tmp_path / "train.jsonl"), "kind": "multiple_choice", "texts": ("c", "x", "y", "z")}
    assert contents(own_split(**fields).examples) == [(("It rains.", "Wet.", "Dry.", "Red."), 2)]
    with pytest.raises(UserError, match=r"train.jsonl:1: the label is '2'; it must be one of a, b, c$"):
        own_split(**fields, labels=("a", "b", "c"))


def test_own_texts_may_join_columns_of_which_some_are_empty(tmp_path):
    write(tmp_path / "train.jsonl", '{"title": "A ", "body": "b", "label": 1}', '{"title": null, "body": "c", "label": 0}')
    fields = {"train": str(tmp_path / "train.jsonl"), "texts": ("title+body",)}
    assert contents(own_split(**fields).examples) == [(("A  b",), 1), (("c",), 0)]
    write(tmp_path / "train.csv", "title,body,label", "A,b,1", ",c,0", '"d",,1')
    fields = {"train": str(tmp_path / "train.csv"), "kind": "entailment", "texts": ("body+title", "title+body")}
    assert [row.texts for row in own_split(**fields).examples] == [("b A", "A b"), ("c", "c"), ("d", "d")]
    write(tmp_path / "train.csv", "a,b,c,label", "x,,z,1", "x, ,,0")
    fields = {"train": str(tmp_path / "train.csv"), "texts": ("a+b+c",)}
    assert contents(own_split(**fields).examples) == [(("x z",), 1), (("x",), 0)]
    write(tmp_path / "train.csv", "title,body,label", "A,b,1", " ,,0")
    with pytest.raises(UserError, match=r"train.csv:3: 'title\+body' is empty; every text needs"):
        own_split(train=str(tmp_path / "train.csv"), texts=("title+body",))
    write(tmp_path / "train.jsonl", '{"title": "A ", "body": 5, "label": 1}', '{"title": null, "body": "c", "label": 0}')
    with pytest.raises(UserError, match=r"train.jsonl:1: 'body' must be a string, not a number$"):
        own_split(train=str(tmp_path / "train.jsonl"), texts=("title+body",))


def test_own_scores_in_any_range(tmp_path):
    write(tmp_path / "train.csv", "text,label", "a,-1", "b,0.25", "c, 1.0 ")
    split = own_split(train=str(tmp_path / "train.csv"), score_range=(-1, 1))
    assert [row.label for row in split.examples] == [-1, 0.25, 1]
    for score in ("1.5", "abc", "1e999", "0_1", "80%", '"0,5"'):
        write(tmp_path / "train.csv", "text,label", "a,0", f"b,{score}")
        with pytest.raises(UserError) as error:
            own_split(train=str(tmp_path / "train.csv"), score_range=(-1, 1))
        score = score.strip('"')
        message = f"the score is '{score}'; it must be a number from -1 to 1, with a decimal point"
        assert str(error.value) == f"{tmp_path}/train.csv:3: {message}"


def test_own_labels_of_a_test_split_may_be_hidden_in_any_way(tmp_path):
    write(tmp_path / "train.csv", "text,label", "a,-1", "b,1")
    write(tmp_path / "test.jsonl", '{"text": "a"}', '{"text": "b", "label": null}', '{"text": "c", "label": NaN}')
    files = {"train": str(tmp_path / "train.csv"), "test": str(tmp_path / "test.jsonl")}
    assert [row.label for row in own_split("test", **files).examples] == [None] * 3
    write(tmp_path / "test.jsonl", '{"text": "a", "label": -1}', '{"text": "b", "label": "1.0"}')
    assert [row.label for row in own_split("test", **files).examples] == [0, 1], "-1 is a class here"
    assert [row.label for row in own_split("test", **files, labels=("0", "1")).examples] == [None, 1]
    write(tmp_path / "test.csv", "text,Label", "a,1")
    with pytest.raises(UserError, match=r"test.csv:1: no column 'label' \(--task.label\); did you mean Label\?$"):
        own_split("test", train=files["train"], test=str(tmp_path / "test.csv"))


def test_labels_are_the_same_in_files_of_different_formats(tmp_path):
    write(tmp_path / "train.jsonl", '{"text": "a", "label": 1}', '{"text": "b", "label": 0.0}')
    write(tmp_path / "dev.csv", "text,label", "a,1.0", "b, 0 ")
    files = {"train": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "dev.csv")}
    assert [row.label for row in own_split("validation", **files).examples] == [1, 0]
    assert [row.label for row in own_split("validation", **files, labels=("1.0", "0")).examples] == [0, 1]
    write(tmp_path / "train.jsonl", '{"text": "a", "label": true}', '{"text": "b", "label": false}')
    write(tmp_path / "dev.csv", "text,label", "a,True", "b,False")
    assert [row.label for row in own_split("validation", **files).examples] == [1, 0]


def test_a_label_that_no_training_row_has_is_refused(tmp_path):
    write(tmp_path / "train.csv", "text,label", *(f"{number},class {number % 15}" for number in range(60)))
    write(tmp_path / "dev.csv", "text,label", "a,class 1", "b,other", "c,another")
    with pytest.raises(UserError) as error:
        own_split("validation", train=str(tmp_path / "train.csv"), validation=str(tmp_path / "dev.csv"))
    listed = ", ".join(sorted(f"class {number}" for number in range(15))[:12])
    message = f"the label is 'other'; it must be one of {listed} and 3 more; rows with errors: 2 (3, 4)"
    assert str(error.value) == f"{tmp_path}/dev.csv:3: {message}"


def test_answers_that_are_counted_from_1_are_refused_with_a_hint(tmp_path):
    write(tmp_path / "train.csv", "c,x,y,label", "a,b,c,1", "a,b,c,2")
    fields = {"train": str(tmp_path / "train.csv"), "kind": "multiple_choice", "texts": ("c", "x", "y")}
    with pytest.raises(UserError, match=r":3: the label is '2'; it must be one of 0, 1$"):
        own_split(**fields)
    assert [row.label for row in own_split(**fields, labels=("1", "2")).examples] == [0, 1]


def test_malformed_own_files_are_refused(tmp_path):
    path = tmp_path / "my.csv"
    for lines, message in [
        (["text,label", "a,1", "b,2,3"], ":3: 3 columns; there must be 2: text, label"),
        (
            ["text,label", "a,1", '"b,2'],
            ":3: unexpected end of data; quote cells that contain separators or quotes, and double those quotes",
        ),
        (["words,label", "a,1", "b,2"], ":1: no column 'text' (--task.texts); known: words, label"),
        (["text,label", "a,1", ",2"], ":3: 'text' is empty; every text needs at least one character that is not white space"),
        (["text,label", "a,1", "b,0", "c,x"], ":4: the label is 'x'; it must be one of 1, 0"),
    ]:
        write(path, *lines)
        with pytest.raises(UserError) as error:
            own_split(train=str(path), labels=("1", "0"))
        assert str(error.value) == f"{path}{message}"


# -- real files, and tensorflow-datasets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "train", "validation", "test"), [("cola", 8551, 1043, 1063), ("rte", 2490, 277, 3000), ("sst2", 67349, 872, 1821)]
)
def test_the_real_files_are_read_whole(shared_data, name, train, validation, test):
    folder = shared_data("glue")
    for split, count in (("train", train), ("validation", validation), ("test", test)):
        content = split_of(name, folder, split)
        assert (len(content.examples), content.num_rows, content.dropped) == (count, count, {})
        labels = collections.Counter(row.label for row in content.examples)
        assert labels.keys() == ({None} if split == "test" else {0.0, 1.0})


def test_a_data_set_that_cannot_be_loaded_must_come_from_files(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(
        UserError, match=r"^--task.path: tensorflow-datasets cannot load glue/cola \(.*\); give the folder of the task"
    ):
        split_of("cola", "")


class FakeBuilder:
    """The builder of a data set with two rows. `prepared` is its state before `download_and_prepare`."""

    info = types.SimpleNamespace(homepage="https://cola.example", features={"idx": None, "sentence": None, "label": None})
    data_path = "/sets/cola"

    def __init__(self, prepared):
        self.prepared = prepared

    def is_prepared(self):
        return self.prepared

    def as_dataset(self, split, shuffle_files):
        return [{"idx": i, "sentence": b"A.", "label": i} for i in (1, 0)]


@pytest.mark.parametrize("prepared", [True, False])
def test_a_download_is_announced_before_it_begins(monkeypatch, capsys, prepared):
    """Without a network, minutes pass before anything else is printed."""
    builder = FakeBuilder(prepared)
    announced = []
    builder.download_and_prepare = lambda: announced.append(capsys.readouterr().err)
    library = types.SimpleNamespace(builder=lambda name: builder, as_numpy=lambda examples: examples)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", library)
    assert [row.id for row in examples_of("cola", "")] == ["0", "1"]
    line = (
        "tensorflow-datasets downloads glue/cola (https://cola.example) to /sets/cola; to read the task's own files instead, "
        "give their folder as --task.path\n"
    )
    assert announced == ["" if prepared else line]
    assert capsys.readouterr().err == ""


TFDS_SCRIPT = """
import json, sys
from pathlib import Path

import tensorflow_datasets as tfds
from gpt_jax.config import TaskConfig
from gpt_jax.tasks import readers, registry

tfds.disable_progress_bar()
folder = Path(sys.argv[1])
tfds.download.DownloadManager.download_and_extract = lambda self, url: folder  # the archives, unpacked
results = {}
for name in ("cola", "stsb", "mnli", "snli", "scitail", "race", "story_cloze"):
    task = registry.get_task(name)
    for split in ("train", "validation", "test"):
        here = readers.read_split(task, TaskConfig(name=name, path=str(folder)), split)
        there = readers.read_split(task, TaskConfig(name=name), split)
        alike = [sorted((row.texts, row.label, row.group) for row in content.examples) for content in (here, there)]
        ids = "glue" not in there.examples[0].where or [row.id for row in here.examples] == [row.id for row in there.examples]
        results[f"{name} {split}"] = [len(there.examples), alike[0] == alike[1] and ids, there.dropped, there.examples[-1].where]
names = {"cola": ["unacceptable", "acceptable"], "sst2": ["negative", "positive"], "mrpc": ["not_equivalent", "equivalent"]}
names["qqp"] = ["not_duplicate", "duplicate"]
for task in registry.TASKS.values():
    if task.kind != "multiple_choice" and not task.regression:
        features = tfds.builder(task.tfds.path.partition(":")[0]).info.features
        assert features["label"].names == names.get(task.name, list(task.labels)), task.name
print(json.dumps(results))
"""


def write_archives(folder):
    """Writes small archives of some tasks, with rows that both readers read alike and rows that they do not."""
    write(folder / "CoLA" / "train.tsv", 'gj04\t1\t\tHe "is.', "gj04\t0\t*\tIs he it.")
    write(folder / "CoLA" / "dev.tsv", "gj04\t1\t\tDev.")
    write(folder / "CoLA" / "test.tsv", "index\tsentence", "0\tA.", "1\tB.", "2\tC.")
    for split in ("train", "dev"):
        write(folder / "STS-B" / f"{split}.tsv", "index\tsentence1\tsentence2\tscore", "0\tA.\tB.\t3.800", "1\tC.\tD.\t0")
    write(folder / "STS-B" / "test.tsv", "index\tsentence1\tsentence2", "0\tA.\tB.")
    for file in ("train", "dev_matched", "dev_mismatched"):
        write(folder / "MNLI" / f"{file}.tsv", "index\tsentence1\tsentence2\tgold_label", f"0\tA {file}.\tB.\tneutral")
    for group in ("matched", "mismatched"):
        write(folder / "MNLI" / f"test_{group}.tsv", "index\tsentence1\tsentence2", f"0\tA {group}.\tB.")
    for split in ("train", "dev", "test"):
        write(folder / "snli_1.0" / f"snli_1.0_{split}.jsonl", nli("contradiction", 1), nli("-", 2))
        pairs = (json.loads(nli(label, number)) for number, label in ((1, "contradiction"), (2, "-")))
        lines = ["\t".join((pair["gold_label"], pair["sentence1"], pair["sentence2"])) for pair in pairs]
        write(folder / "snli_1.0" / f"snli_1.0_{split}.txt", "gold_label\tsentence1\tsentence2", *lines)
        lone = ['"A\tB.\tneutral', 'C"\tD.\tneutral'] if split == "train" else []
        write(folder / "SciTailV1.1" / "tsv_format" / f"scitail_1.0_{split}.tsv", "Pluto.\tEarth.\tentails", *lone)
        for group in ("middle", "high"):
            passage(folder / "RACE" / split / group, 1)
    for place in (folder, folder / "sets" / "downloads" / "manual"):
        for split in ("val", "test"):
            write(place / f"cloze_test_{split}__spring2016.csv", STORY_HEADER, *(story(number) for number in range(375)))


@pytest.mark.slow
def test_tensorflow_datasets_give_the_rows_of_the_files(tmp_path):
    # tensorflow-datasets 4.9.10 imports it to prepare a data set, but does not require it.
    pytest.importorskip("importlib_resources", reason="importlib_resources is not installed")
    write_archives(tmp_path)
    environment = {**os.environ, "TFDS_DATA_DIR": str(tmp_path / "sets"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", TFDS_SCRIPT, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    snli = {"no gold label": 1}
    joined = {"rows run together": 1}
    assert results == {
        "cola train": [2, True, {}, "tfds:glue/cola train 1"],
        "cola validation": [1, True, {}, "tfds:glue/cola validation 0"],
        "cola test": [3, True, {}, "tfds:glue/cola test 2"],
        "stsb train": [2, True, {}, "tfds:glue/stsb train 1"],
        "stsb validation": [2, True, {}, "tfds:glue/stsb validation 1"],
        "stsb test": [1, True, {}, "tfds:glue/stsb test 0"],
        "mnli train": [1, True, {}, "tfds:glue/mnli train 0"],
        "mnli validation": [2, True, {}, "tfds:glue/mnli validation_mismatched 0"],
        "mnli test": [2, True, {}, "tfds:glue/mnli test_mismatched 0"],
        "snli train": [1, True, snli, results["snli train"][3]],
        "snli validation": [1, True, snli, results["snli validation"][3]],
        "snli test": [1, True, snli, results["snli test"][3]],
        "scitail train": [1, False, joined, "tfds:sci_tail train 0"],  # the file has 3
        "scitail validation": [1, True, {}, "tfds:sci_tail validation 0"],
        "scitail test": [1, True, {}, "tfds:sci_tail test 0"],
        "race train": [4, True, {}, "tfds:race/high train 0 question 1"],
        "race validation": [4, True, {}, "tfds:race/high dev 0 question 1"],
        "race test": [4, True, {}, "tfds:race/high test 0 question 1"],
        "story_cloze train": [1, False, {}, results["story_cloze train"][3]],  # another order, so other rows are held out
        "story_cloze validation": [374, False, {}, results["story_cloze validation"][3]],
        "story_cloze test": [375, True, {}, "tfds:story_cloze/2016 test 374"],
    }
