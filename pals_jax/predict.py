"""Predictions of a run: for texts of yours, or for the test sets of GLUE's server."""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy.special

from pals_jax import submission
from pals_jax.data.examples import Examples
from pals_jax.data.readers import Row, read_rows
from pals_jax.data.tasks import GLUE, Task
from pals_jax.data.tokenize import encode
from pals_jax.errors import UserError
from pals_jax.evaluate import decide
from pals_jax.logging import say
from pals_jax.run import Run

Texts = list[tuple[str, ...]]


def read_texts(task: Task, path: Path | None) -> Texts:
    """The texts of a TSV, CSV or JSONL file with the task's columns, or of stdin.

    On stdin each line is one example: its text columns in the task's order, separated by a tab,
    or a JSON object.

    Raises:
        UserError: a file or a line that cannot be read so.
    """
    if path is not None:
        return [tuple(row.text(name) for name in task.text) for row in read_rows(path)]
    texts = [_line(task, number, line) for number, line in enumerate(sys.stdin, 1) if line.strip()]
    if not texts:
        raise UserError("stdin has no examples.")
    return texts


def _line(task: Task, number: int, line: str) -> tuple[str, ...]:
    if line.lstrip().startswith("{"):
        try:
            row = Row(Path("stdin"), number, json.loads(line))
        except ValueError as error:
            raise UserError(f"stdin, line {number}: not valid JSON ({error}).") from error
        return tuple(row.text(name) for name in task.text)
    fields = line.rstrip("\r\n").split("\t")
    if len(fields) != len(task.text):
        raise UserError(
            f"stdin, line {number}: {len(fields)} fields; task {task.name} needs"
            f" {len(task.text)}, separated by a tab: {', '.join(task.text)}."
        )
    return tuple(fields)


def predict(run: Run, task: Task, texts: Texts) -> Iterator[dict[str, Any]]:
    """For each example its columns, the prediction, and the probability of each label."""
    logits = _logits(run, task, texts)
    probabilities = scipy.special.softmax(logits, axis=-1)
    for text, decision, row in zip(texts, decide(task, logits), probabilities, strict=True):
        record: dict[str, Any] = dict(zip(task.text, text, strict=True))
        record["prediction"] = task.target_to_label(decision)
        if not task.is_regression:
            record |= {f"p({name})": float(p) for name, p in zip(task.labels, row, strict=True)}
        yield record


def _logits(run: Run, task: Task, texts: Texts) -> np.ndarray:
    split = encode(Examples(texts, None), run.tokenizer, run.experiment.config.data.max_length)
    return run.evaluator.logits(run.variables, task, split)


def write_records(records: Iterable[Mapping[str, Any]], as_json: bool, out: Any) -> None:
    """JSON lines, or a TSV with a header."""
    for index, record in enumerate(records):
        if as_json:
            print(json.dumps(record), file=out)
            continue
        if index == 0:
            print("\t".join(record), file=out)
        cells = (f"{x:.4f}" if isinstance(x, float) else x for x in record.values())
        # A CSV or JSON text may hold what separates the fields and rows of a TSV.
        print("\t".join(" ".join(cell.split()) for cell in cells), file=out)


def write_submission(run: Run, directory: Path, fill_missing: bool) -> Path:
    """Predicts every GLUE test set that the run's tasks answer, and writes the server's files.

    Returns:
        The zip.

    Raises:
        UserError: the submission would be incomplete, or test data are missing.
    """
    predictions = {}
    for task in (*run.experiment.tasks, *_diagnostics(run)):
        if task.name not in GLUE:
            continue
        for split in task.test_splits:
            examples = run.experiment.source(task).read(task, split)
            decisions = decide(task, _logits(run, run.task(task.head or task.name), examples.texts))
            labels = [task.target_to_label(decision) for decision in decisions]
            predictions[task.name, split] = submission.Predictions(examples.ids, labels)
    path = submission.write(predictions, directory, fill_missing=fill_missing)
    for name, answer in submission.defaults(predictions).items():
        say(f"{name} has no predictions of this run; every row of it answers {answer}")
    return path


def _diagnostics(run: Run) -> Iterator[Task]:
    """Test sets that have no training data of their own: another task's head answers them."""
    names = {task.name for task in run.experiment.tasks}
    return (task for task in GLUE.values() if task.head in names)
