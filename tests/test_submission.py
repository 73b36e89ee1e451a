"""Submission files: valid for the server, or refused with all problems listed."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from pals_jax.data.tasks import GLUE
from pals_jax.inference import submission
from pals_jax.inference.submission import Predictions
from pals_jax.runtime.errors import UserError

COUNTS = {
    "CoLA": 1063, "SST-2": 1821, "MRPC": 1725, "STS-B": 1379, "QQP": 390965, "MNLI-m": 9796,
    "MNLI-mm": 9847, "QNLI": 5463, "RTE": 3000, "WNLI": 146, "AX": 1104,
}  # fmt: skip
SPLITS = {
    "CoLA": ("cola", "test"), "SST-2": ("sst2", "test"), "MRPC": ("mrpc", "test"),
    "STS-B": ("stsb", "test"), "QQP": ("qqp", "test"), "MNLI-m": ("mnli", "test_matched"),
    "MNLI-mm": ("mnli", "test_mismatched"), "QNLI": ("qnli", "test"), "RTE": ("rte", "test"),
    "WNLI": ("wnli", "test"), "AX": ("ax", "test"),
}  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that expects only as many answers for QQP as for RTE; most tests need no more."""
    monkeypatch.setitem(submission._FILES, "QQP.tsv", submission._File("qqp", "test", 3000))
    monkeypatch.setitem(COUNTS, "QQP", 3000)


def predictions() -> dict[tuple[str, str], Predictions]:
    """An answer for every test example, all labels being used."""
    answers: dict[tuple[str, str], Predictions] = {}
    for name, (task, split) in SPLITS.items():
        count = COUNTS[name]
        labels = GLUE[task].labels
        answers[task, split] = Predictions(
            np.arange(count),
            [labels[i % len(labels)] for i in range(count)]
            if labels
            else np.linspace(-1, 6, count).tolist(),
        )
    return answers


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return submission.write(predictions(), tmp_path_factory.mktemp("good") / "new" / "folder")


def read(good: Path, name: str) -> str:
    return zipfile.ZipFile(good).read(name).decode()


def assert_the_server_accepts(path: Path) -> None:
    """The zip has every file with its header, each index once, and labels of the task."""
    with zipfile.ZipFile(path) as archive:
        assert sorted(archive.namelist()) == sorted(f"{name}.tsv" for name in COUNTS)
        for name, count in COUNTS.items():
            text = archive.read(f"{name}.tsv").decode()
            header, *rows = text.splitlines()
            assert header == "index\tprediction"
            indices, labels = zip(*(row.split("\t") for row in rows), strict=True)
            assert indices == tuple(str(i) for i in range(count))
            if known := GLUE[SPLITS[name][0]].labels:
                assert set(labels) <= set(known)
            else:
                assert all(0 <= float(label) <= 5 for label in labels)
            assert (path.parent / f"{name}.tsv").read_text() == text


def test_writes_what_the_server_expects(good: Path) -> None:
    assert_the_server_accepts(good)
    assert sorted(path.name for path in good.parent.iterdir()) == sorted(
        [submission.ZIP, *(f"{name}.tsv" for name in COUNTS)]
    )
    assert read(good, "AX.tsv").splitlines()[1:4] == [
        "0\tentailment",
        "1\tneutral",
        "2\tcontradiction",
    ]
    assert read(good, "RTE.tsv").splitlines()[2] == "1\tnot_entailment"
    assert read(good, "WNLI.tsv").splitlines()[2] == "1\t1"


def test_stsb_is_clipped_and_has_three_decimals(good: Path) -> None:
    values = [line.split("\t")[1] for line in read(good, "STS-B.tsv").splitlines()[1:]]
    assert values[0] == "0.000"
    assert values[-1] == "5.000"
    assert {len(value) for value in values} == {5}
    assert len(set(values)) > 900


def test_the_same_predictions_make_the_same_zip(small: None, tmp_path: Path) -> None:
    first = submission.write(predictions(), tmp_path / "first")
    shuffled = predictions()
    for key, answers in shuffled.items():
        order = np.random.default_rng(0).permutation(len(answers.ids))
        shuffled[key] = Predictions(answers.ids[order], [answers.labels[i] for i in order])
    again = submission.write(shuffled, tmp_path / "again")
    assert again.read_bytes() == first.read_bytes()


def test_counts_are_those_of_the_official_files(shared: Path) -> None:
    found = {
        name: len((shared / "glue" / name / "test.tsv").read_text().splitlines()) - 1
        for name in ("CoLA", "SST-2", "MRPC", "STS-B", "QNLI", "RTE", "WNLI")
    }
    text = (shared / "glue" / "diagnostic" / "diagnostic.tsv").read_text()
    found["AX"] = len(text.splitlines()) - 1
    assert found == {name: COUNTS[name] for name in found}


def test_missing_test_sets_are_refused_and_nothing_is_written(small: None, tmp_path: Path) -> None:
    some = predictions()
    del some["wnli", "test"], some["qqp", "test"]
    with pytest.raises(UserError, match=r"refused by GLUE's server: QQP\.tsv, WNLI\.tsv are miss"):
        submission.write(some, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_test_sets_are_filled_on_request(small: None, tmp_path: Path) -> None:
    some = {key: value for key, value in predictions().items() if key[0] in ("cola", "qqp")}
    filled = submission.defaults(some)
    assert filled == {
        "SST-2.tsv": "0",
        "MRPC.tsv": "0",
        "STS-B.tsv": "0.000",
        "MNLI-m.tsv": "entailment",
        "MNLI-mm.tsv": "entailment",
        "QNLI.tsv": "entailment",
        "RTE.tsv": "entailment",
        "WNLI.tsv": "0",
        "AX.tsv": "entailment",
    }
    path = submission.write(some, tmp_path, fill_missing=True)
    assert_the_server_accepts(path)
    assert {line.split("\t")[1] for line in read(path, "WNLI.tsv").splitlines()[1:]} == {"0"}
    assert {line.split("\t")[1] for line in read(path, "CoLA.tsv").splitlines()[1:]} == {"0", "1"}


def test_predictions_the_server_would_refuse_are_not_written(small: None, tmp_path: Path) -> None:
    wrong = predictions()
    wrong["rte", "test"] = Predictions(np.arange(2999), ["maybe"] + ["entailment"] * 2998)
    wrong["stsb", "test"] = Predictions(np.arange(1379), [float("nan")] * 1379)
    with pytest.raises(UserError) as error:
        submission.write(wrong, tmp_path / "out")
    for part in (
        "RTE.tsv has 2999 rows rather than 3000",
        "RTE.tsv lacks index 2999",
        "RTE.tsv has 1 of its predictions not among entailment, not_entailment, the first of them"
        " 'maybe' at index 0",
        "STS-B.tsv has 1379 of its predictions not among a number from 0 to 5",
    ):
        assert part in str(error.value)
    assert not (tmp_path / "out").exists()


def test_every_wrong_index_is_listed(small: None, tmp_path: Path) -> None:
    wrong = predictions()
    wrong["wnli", "test"].ids[[3, 145]] = 2, 146
    wrong["mrpc", "test"] = Predictions(np.arange(1726), ["1"] * 1726)
    wrong["ax", "test"] = Predictions(np.arange(0), [])
    with pytest.raises(UserError) as error:
        submission.write(wrong, tmp_path / "out")
    for part in (
        "WNLI.tsv lacks indices 3, 145",
        "WNLI.tsv repeats index 2",
        "WNLI.tsv has the unknown index 146",
        "MRPC.tsv has 1726 rows rather than 1725",
        "MRPC.tsv has the unknown index 1725",
        "AX.tsv has 0 rows rather than 1104",
        "AX.tsv lacks indices 0, 1, 2 ...",
    ):
        assert part in str(error.value)
    assert "QQP" not in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unwritable_directory_is_one_sentence(small: None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the submission to .*file"):
        submission.write(predictions(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == ""
