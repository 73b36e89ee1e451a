"""Submissions to GLUE's server: a zip with one TSV for each of its eleven test sets."""

import collections
import contextlib
import dataclasses
import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from pals_jax.data.tasks import GLUE, Task
from pals_jax.runtime import storage
from pals_jax.runtime.errors import UserError

ZIP = "submission.zip"
_HEADER = "index\tprediction"
_Rows = Sequence[tuple[int, str]]  # index and label of each example
_LONG_AGO = (1980, 1, 1, 0, 0, 0)  # a constant date makes the zip reproducible, byte for byte


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The answers for one test set.

    Attributes:
        ids: int [N], the index of each example.
        labels: N class names, or numbers for regression.
    """

    ids: np.ndarray
    labels: Sequence[str | float]


@dataclasses.dataclass(frozen=True)
class _File:
    """A file that the server expects: its test set and the number of its rows."""

    task: str
    split: str
    rows: int


_FILES = {
    "CoLA.tsv": _File("cola", "test", 1063),
    "SST-2.tsv": _File("sst2", "test", 1821),
    "MRPC.tsv": _File("mrpc", "test", 1725),
    "STS-B.tsv": _File("stsb", "test", 1379),
    "QQP.tsv": _File("qqp", "test", 390_965),
    "MNLI-m.tsv": _File("mnli", "test_matched", 9796),
    "MNLI-mm.tsv": _File("mnli", "test_mismatched", 9847),
    "QNLI.tsv": _File("qnli", "test", 5463),
    "RTE.tsv": _File("rte", "test", 3000),
    "WNLI.tsv": _File("wnli", "test", 146),
    "AX.tsv": _File("ax", "test", 1104),
}


def defaults(predictions: Mapping[tuple[str, str], Predictions]) -> dict[str, str]:
    """The files without predictions, each with the constant answer that `fill_missing` writes.

    The constant is the first label of the task in `GLUE`: "0" for CoLA, SST-2, MRPC, QQP and WNLI,
    "entailment" for MNLI, AX, QNLI and RTE; and "0.000" for STS-B.
    """
    return {
        name: _format(GLUE[file.task], (GLUE[file.task].labels or (0.0,))[0])
        for name, file in _FILES.items()
        if (file.task, file.split) not in predictions
    }


def write(
    predictions: Mapping[tuple[str, str], Predictions],
    directory: Path,
    *,
    fill_missing: bool = False,
) -> Path:
    """Writes the TSVs and their zip to a directory, all of them or none.

    STS-B is clipped to [0, 5] and written with three decimals.

    Args:
        predictions: the predictions by task and split, as named in `GLUE`; others are ignored.
        directory: the output directory, created if missing.
        fill_missing: whether to answer test sets without predictions with the constant from
            `defaults`, as is usual for WNLI. Their scores are then meaningless.

    Returns:
        The path of the zip file.

    Raises:
        UserError: if the server would refuse it (every problem is listed), or the directory cannot
            be written.
    """
    answers = {
        name: _rows(GLUE[file.task], predictions[file.task, file.split])
        for name, file in _FILES.items()
        if (file.task, file.split) in predictions
    }
    if fill_missing:
        for name, answer in defaults(predictions).items():
            answers[name] = [(row, answer) for row in range(_FILES[name].rows)]
    if problems := list(_problems(answers)):
        raise UserError(
            f"{directory / ZIP} would be refused by GLUE's server: {'; '.join(problems)}."
        )
    files = {
        name: "\n".join([_HEADER, *(f"{index}\t{label}" for index, label in rows), ""])
        for name, rows in answers.items()
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as whole:
            # Contexts end in reverse order: the zip comes last, because it signals completeness.
            parts = {
                name: whole.enter_context(storage.replacing(directory / name))
                for name in (ZIP, *files)
            }
            _write_all(files, parts)
    except OSError as error:
        raise UserError(f"cannot write the submission to {directory}: {error.strerror}.") from error
    return directory / ZIP


def _format(task: Task, label: str | float) -> str:
    if not task.is_regression:
        return str(label)
    return f"{float(np.clip(float(label), *(task.label_range or ()))):.3f}"


def _rows(task: Task, predictions: Predictions) -> _Rows:
    labels = [_format(task, label) for label in predictions.labels]
    return sorted(zip(predictions.ids.tolist(), labels, strict=True))


def _write_all(files: Mapping[str, str], paths: Mapping[str, Path]) -> None:
    with zipfile.ZipFile(paths[ZIP], "w") as archive:
        for name, text in files.items():
            paths[name].write_text(text, encoding="utf-8", newline="\n")
            info = zipfile.ZipInfo(name, _LONG_AGO)
            archive.writestr(info, text, compress_type=zipfile.ZIP_DEFLATED)


def _problems(answers: Mapping[str, _Rows]) -> Iterator[str]:
    """Everything for which the server would refuse the rows of the files."""
    if missing := [name for name in _FILES if name not in answers]:
        yield f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    for name, rows in answers.items():
        yield from _index_problems(name, [index for index, _ in rows])
        yield from _label_problems(name, rows)


def _index_problems(name: str, found: Sequence[int]) -> Iterator[str]:
    expected = range(_FILES[name].rows)
    if len(found) != len(expected):
        yield f"{name} has {len(found)} rows rather than {len(expected)}"
    counts = collections.Counter(found)
    for what, wrong in (
        ("lacks", [index for index in expected if index not in counts]),
        ("repeats", [index for index, count in counts.items() if count > 1]),
        ("has the unknown", [index for index in counts if index not in expected]),
    ):
        if wrong:
            plural = "index" if len(wrong) == 1 else "indices"
            first = ", ".join(map(str, wrong[:3]))
            yield f"{name} {what} {plural} {first}{' ...' * (len(wrong) > 3)}"


def _label_problems(name: str, rows: _Rows) -> Iterator[str]:
    task = GLUE[_FILES[name].task]
    wrong = [(index, label) for index, label in rows if not _is_label(task, label)]
    if wrong:
        index, label = wrong[0]
        expected = ", ".join(task.labels) or "a number from 0 to 5"
        yield (
            f"{name} has {len(wrong)} of its predictions not among {expected}, the first of them"
            f" {label!r} at index {index}"
        )


def _is_label(task: Task, label: str) -> bool:
    if not task.is_regression:
        return label in task.labels
    low, high = task.label_range or (-math.inf, math.inf)
    return low <= float(label) <= high
