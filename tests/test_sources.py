"""GLUE's official files, user-defined files, and the readers of both."""

import json
import os
import re
from pathlib import Path

import ml_collections
import numpy as np
import pytest

from pals_jax.data.examples import Examples, read_examples
from pals_jax.data.glue_dir import GlueDir
from pals_jax.data.own_tasks import own_task
from pals_jax.data.readers import read_rows
from pals_jax.data.sources import source_of
from pals_jax.data.tasks import GLUE, Task
from pals_jax.runtime.errors import UserError

ROWS = {  # of the shared sample of GLUE
    "cola": (8551, 1043),
    "sst2": (67349, 872),
    "mrpc": (3668, 408),
    "stsb": (5749, 1500),
    "rte": (2490, 277),
    "qnli": (9999, 5463),
    "qqp": (31866, 1000),
    "mnli": (8999, 6870),
    "wnli": (635, 71),
}
PAIRS = Task("pairs", ("a", "b"), labels=("no", "yes"))


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def error_of(call, *args, **kwargs) -> str:
    """The message of the UserError that the call raises: one sentence."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# The official layout.


@pytest.mark.parametrize("name", ROWS)
def test_glue_dir_row_counts(shared, name):
    source, task = GlueDir(shared / "glue"), GLUE[name]
    for split, rows in zip(("train", task.eval_splits[0]), ROWS[name], strict=True):
        examples = source.read(task, split)
        assert len(examples) == rows == len(examples.targets)
        assert examples.targets.dtype == np.float32
        assert all(len(texts) == len(task.text) for texts in examples.texts)
        if not task.is_regression:
            assert set(np.unique(examples.targets)) == set(range(task.num_outputs))


def test_glue_dir_contents(shared):
    source = GlueDir(shared / "glue")
    cola = source.read(GLUE["cola"], "dev")
    assert cola.texts[0] == ("The sailors rode the breeze clear of the rocks.",)
    assert cola.texts[-1][0].endswith("out himself.")  # the last line has no line end
    mrpc = source.read(GLUE["mrpc"], "dev")
    assert mrpc.texts[0] == (
        "He said the foodservice pie business doesn 't fit the company 's long-term growth"
        " strategy .",
        '" The foodservice pie business does not fit our long-term growth strategy .',
    )
    assert mrpc.targets[0] == 1.0
    assert sum(mrpc.targets) == 279  # the majority is 68.4%
    stsb = source.read(GLUE["stsb"], "dev")
    assert stsb.targets.min() == 0.0
    assert stsb.targets.max() == stsb.targets[0] == 1.0
    rte = source.read(GLUE["rte"], "dev")
    assert rte.targets[0] == 1.0  # not_entailment
    mnli = source.read(GLUE["mnli"], "dev_matched")
    assert mnli.texts[0][1] == "Everyone really likes the newest benefits"
    assert mnli.targets[0] == 1.0  # neutral


def test_glue_dir_splits(shared):
    source = GlueDir(shared / "glue")
    assert source.splits(GLUE["rte"]) == ("train", "dev", "test")
    assert source.splits(GLUE["qqp"]) == ("train", "dev")
    assert source.splits(GLUE["mnli"]) == ("train", "dev_matched")
    assert source.splits(GLUE["ax"]) == ("test",)


def test_ids_are_the_index_column_of_the_test_files(shared):
    source = GlueDir(shared / "glue")
    tested = [(task, split) for task in GLUE.values() for split in source.splits(task)]
    tested = [(task, split) for task, split in tested if split in task.test_splits]
    assert len(tested) == 8
    for task, split in tested:
        examples = source.read(task, split)
        assert examples.targets is None
        index = [int(row["index"]) for row in read_rows(source._path(task, split))]
        assert examples.ids.tolist() == index


def test_glue_dir_errors(shared, tmp_path):
    source = GlueDir(shared / "glue")
    assert "no split 'validation'; its splits are train, dev, test" in error_of(
        source.read, GLUE["rte"], "validation"
    )
    assert "dev_mismatched.tsv: No such file" in error_of(
        source.read, GLUE["mnli"], "dev_mismatched"
    )
    assert "pairs is not a task of GLUE's directory layout" in error_of(source.splits, PAIRS)
    assert "no GLUE directory" in error_of(GlueDir, tmp_path / "absent")
    (tmp_path / "CoLA").mkdir()
    write(tmp_path / "CoLA" / "train.tsv", "gj04\t1\t\tFine.\ngj04\t2\t\tNot so fine.\n")
    message = error_of(GlueDir(tmp_path).read, GLUE["cola"], "train")
    assert "train.tsv, line 2: label '2' is not one of 0, 1" in message


def test_choice_of_source(tmp_path):
    assert source_of("glue_dir", str(tmp_path)) == GlueDir(tmp_path)
    assert source_of("tfds").data_dir is None
    assert "needs the directory" in error_of(source_of, "glue_dir")
    assert "no data source 'csv'" in error_of(source_of, "csv", tmp_path)


# The readers.


def test_tsv_quotes_and_line_separators_are_literal(tmp_path):
    odd = ['"', 'say "hi', "a\u2028b", "a\x85b", "a\x0cb", "a\rb", "\ufeffx", " "]
    text = "a\tb\tlabel\n" + "".join(f"{x}\tb{i}\tyes\n" for i, x in enumerate(odd))
    examples = read_examples(write(tmp_path / "t.tsv", text), PAIRS, labelled=True)
    assert examples.texts == [(x, f"b{i}") for i, x in enumerate(odd)]


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    text = "\ufeffa,b,label\r\nx,y,no\r\n\r\nz,w,yes\r\n"
    for suffix, content in ((".tsv", text.replace(",", "\t")), (".csv", text)):
        examples = read_examples(write(tmp_path / f"t{suffix}", content), PAIRS)
        assert examples.texts == [("x", "y"), ("z", "w")]
        assert examples.targets.tolist() == [0.0, 1.0]


def test_tsv_field_longer_than_the_limit_of_csv(tmp_path):
    long = "word " * 100_000
    path = write(tmp_path / "t.tsv", f"a\tb\n{long}\tx\n")
    assert read_examples(path, PAIRS) == Examples([(long, "x")], None)


def test_csv_quotes(tmp_path):
    path = write(tmp_path / "t.csv", 'a,b,label\n"one, ""two""\nthree",x,no\nlast,y,what\n')
    first, second = read_rows(path)
    assert first.values == {"a": 'one, "two"\nthree', "b": "x", "label": "no"}
    assert (first.line, second.line) == (2, 4)
    assert "t.csv, line 4: label 'what'" in error_of(read_examples, path, PAIRS)


def test_jsonl_labels_may_be_numbers(tmp_path):
    rows = [{"a": "x", "label": 1}, {"label": 0, "a": "\u2028", "more": [1]}]
    path = write(tmp_path / "t.jsonl", "\n".join(json.dumps(r, ensure_ascii=False) for r in rows))
    examples = read_examples(path, Task("t", ("a",), labels=("0", "1")))
    assert examples.texts == [("x",), ("\u2028",)]
    assert examples.targets.tolist() == [1.0, 0.0]


BAD_FILES = {
    "t.txt": ("x", "none of the known formats: .tsv, .csv, .jsonl"),
    "empty.tsv": ("", "empty.tsv is empty"),
    "header.tsv": ("a\tb\tlabel\n", "header.tsv has no rows"),
    "empty.csv": ("", "empty.csv is empty"),
    "empty.jsonl": ("\n", "empty.jsonl has no rows"),
    "ragged.tsv": (
        "a\tb\tlabel\nx\ty\tno\nx\tno\n",
        "ragged.tsv, line 3: 3 columns expected, 2 found",
    ),
    "ragged.csv": ("a,b,label\nx,y,no,\n", "ragged.csv, line 2: 3 columns expected, 4 found"),
    "column.tsv": ("a\tc\tlabel\nx\ty\tno\n", "no column 'b'; the columns are a, c, label"),
    "column.jsonl": ('{"a": "x"}\n', "line 1: there is no column 'b'; the columns are a"),
    "label.tsv": ("a\tb\tlabel\nx\ty\tNo\n", "line 2: label 'No' is not one of no, yes"),
    "unlabelled.tsv": ("a\tb\nx\ty\n", "no column 'label'"),
    "quote.csv": ('a,b,label\nx,"y"z,no\n', "quote.csv, line 2: not valid CSV"),
    "open.csv": ('a,b,label\nx,"y,no\n', "open.csv, line 2: not valid CSV"),
    "bad.jsonl": ('{"a": "x", "b": "y", "label": "no"}\n{"a"\n', "line 2: not valid JSON"),
    "list.jsonl": ("[1, 2]\n", "line 1: a JSON object expected, [1, 2] found"),
    "text.jsonl": ('{"a": 3, "b": "y"}', "line 1: the text in column 'a' is not a string: 3"),
    "half.jsonl": ('{"a": "\\ud800", "b": "y"}', "line 1: column 'a' is not valid Unicode"),
    "null.jsonl": ('{"a": "x", "b": "y", "label": null}', "neither a string nor a number: None"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path, name):
    content, expected = BAD_FILES[name]
    path = write(tmp_path / name, content)
    message = error_of(read_examples, path, PAIRS, labelled=True)
    assert expected in message
    assert str(path) in message


def test_files_that_cannot_be_read(tmp_path):
    assert "absent.tsv: No such file" in error_of(read_examples, tmp_path / "absent.tsv", PAIRS)
    (tmp_path / "folder.tsv").mkdir()
    assert "folder.tsv: Is a directory" in error_of(read_examples, tmp_path / "folder.tsv", PAIRS)
    (tmp_path / "latin.tsv").write_bytes("a\tb\nè\tx\n".encode("latin-1"))
    assert "not valid UTF-8" in error_of(read_examples, tmp_path / "latin.tsv", PAIRS)


# A task of your own.


@pytest.mark.parametrize("folder", ["airline", "emotion", "primary_emotions", "global_warming"])
def test_own_task_on_real_files(shared, folder):
    directory = shared / "extra_tasks" / folder
    declaration = ml_collections.ConfigDict(
        {split: str(directory / f"{split}.tsv") for split in ("train", "dev", "test")}
        | {"text": "sentence", "label": "label"}
    )
    task, source = own_task(folder, declaration)
    lines = (directory / "train.tsv").read_text().splitlines()[1:]
    assert list(task.labels) == sorted({line.split("\t")[1] for line in lines})
    assert (task.metrics, task.splits) == (("accuracy",), ("train", "dev", "test"))
    assert source.splits(task) == task.splits
    train = source.read(task, "train")
    restored = [f"{t[0]}\t{task.target_to_label(y)}" for t, y in zip(*_columns(train), strict=True)]
    assert restored == lines
    assert source.read(task, "test").targets is not None


def _columns(examples: Examples):
    return examples.texts, examples.targets


def test_own_pair_task_of_mixed_formats(tmp_path):
    write(tmp_path / "train.csv", "q,p,y\n1,2,b\n3,4,a\n")
    write(tmp_path / "dev.jsonl", '{"p": "2", "q": "1", "y": "a"}')
    write(tmp_path / "test.tsv", "p\tq\nP\tQ\n")
    task, source = own_task(
        "mine",
        {"train": tmp_path / "train.csv", "dev": tmp_path / "dev.jsonl"}
        | {"test": tmp_path / "test.tsv", "text": ["q", "p"], "label": "y", "labels": ["b", "a"]}
        | {"metrics": ["f1", "accuracy"]},
    )
    assert task == Task(
        "mine", ("q", "p"), label="y", labels=("b", "a"), metrics=("f1", "accuracy")
    )
    assert source.read(task, "train").targets.tolist() == [0.0, 1.0]
    assert source.read(task, "dev").texts == [("1", "2")]
    assert source.read(task, "test") == Examples([("Q", "P")], None)
    null = write(tmp_path / "test.jsonl", '{"p": "P", "q": "Q", "y": null}')
    assert read_examples(null, task) == Examples([("Q", "P")], None)


def test_own_regression_task(tmp_path):
    train = write(tmp_path / "train.tsv", "x\ty\none\t1\ntwo\t-3\nthree\t5e0\n")
    declaration = {"train": str(train), "text": "x", "label": "y", "regression": True}
    task, source = own_task("mine", declaration)
    assert (task.label_range, task.metrics) == ((-3.0, 5.0), ("pearson", "spearman"))
    assert task.splits == source.splits(task) == ("train",)
    assert source.read(task, "train").targets.tolist() == [0.5, 0.0, 1.0]
    task, source = own_task("mine", declaration | {"label_range": [-5, 5], "labels": None})
    assert source.read(task, "train").targets.tolist() == pytest.approx([0.6, 0.2, 1.0])
    assert "mine has no split 'dev'; its splits are train" in error_of(source.read, task, "dev")


BAD_DECLARATIONS = {
    "which is not among the keys train, dev, test, text,": {"separator": ","},
    "declaration of task mine lacks train, label": {"train": None, "label": None},
    "absent.tsv: No such file": {"train": "absent.tsv"},
    "no column 'y'": {"label": "y"},
    "3 text columns; give one or two": {"text": ["text", "text", "text"]},
    "text = 3; a list is needed": {"text": 3},
    "label = ['label']; give one name": {"label": ["label"]},
    "train = ['a.tsv', 'b.tsv']; give one name": {"train": ["a.tsv", "b.tsv"]},
    "regression = 'False'; give a bool": {"regression": "False"},
    "two or more labels, all different; it has a, a": {"labels": ["a", "a"]},
    "two or more labels, all different; it has a.": {"labels": ["a"]},
    "label_range, of no use in classification": {"label_range": [0, 1]},
    "labels, of no use in regression": {"labels": ["a", "b"], "regression": True},
    "train.tsv, line 2: label 'a' is not a finite number": {"regression": True},
    "label_range of task mine is not a pair of numbers": {
        "regression": True,
        "label_range": [1, 2, 3],
    },
    "cannot range from 2 to 2": {"regression": True, "label_range": [2, 2]},
}


@pytest.mark.parametrize("expected", BAD_DECLARATIONS)
def test_bad_declarations(tmp_path, expected):
    train = write(tmp_path / "train.tsv", "text\tlabel\nx\ta\ny\tb\n")
    declaration = {"train": str(train), "text": "text", "label": "label"}
    message = error_of(own_task, "mine", declaration | BAD_DECLARATIONS[expected])
    assert expected in message


def test_a_declaration_that_is_none():
    message = error_of(own_task, "mine", "data/train.tsv")
    assert message == "task mine is declared as 'data/train.tsv'; a mapping is needed."


def test_bad_labels_of_own_task(tmp_path):
    train = write(tmp_path / "train.tsv", "text\tlabel\nx\ta\ny\tb\n")
    dev = write(tmp_path / "dev.tsv", "text\tlabel\nx\tc\n")
    declaration = {"train": train, "dev": dev, "text": "text", "label": "label"}
    task, source = own_task("mine", declaration)
    message = error_of(source.read, task, "dev")
    assert re.search(r"dev.tsv, line 2: label 'c' is not one of a, b", message)
    number = write(tmp_path / "number.tsv", "text\tlabel\nx\t1\nz\t2\n")
    task, source = own_task("mine", declaration | {"train": number, "regression": True})
    assert "dev.tsv, line 2: label 'c' is not a finite number" in error_of(source.read, task, "dev")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    path = write(tmp_path / "t.tsv", "a\tb\nx\ty\n")
    path.chmod(0)
    assert "Permission denied" in error_of(read_examples, path, PAIRS)
