"""Predictions of a run, for the user's texts or for the test sets of GLUE's server."""

import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pals_jax.data.examples import Examples
from pals_jax.data.readers import Row, read_rows
from pals_jax.data.tasks import GLUE, Task
from pals_jax.data.tokenize import TokenizedSplit, encode
from pals_jax.inference import submission
from pals_jax.inference.evaluator import decide
from pals_jax.inference.run import Run
from pals_jax.runtime.console import say
from pals_jax.runtime.errors import UserError

Texts = list[tuple[str, ...]]


def read_texts(tasks: Sequence[Task], path: Path | None) -> tuple[list[Task], Texts]:
    """Reads texts from a TSV, CSV or JSONL file or stdin; also returns the tasks they fit.

    A file, or a JSON object on a line of stdin, has the columns of the task. Any other line of
    stdin is one example: its texts in the task's order, separated by tabs. If several tasks are
    given, those that fit the first example are returned.

    Raises:
        UserError: if a file or line cannot be read, fits no task, or fits several tasks with
            different columns.
    """
    if path is not None:
        rows = list(read_rows(path))
        fitting = _fitting(tasks, rows[0])
        return fitting, [tuple(row.text(name) for name in fitting[0].text) for row in rows]
    if isinstance(sys.stdin, io.TextIOWrapper):  # lets the error name a line that is not UTF-8
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    lines = {n: _line(n, line) for n, line in enumerate(sys.stdin, 1) if line.strip()}
    if not lines:
        raise UserError("stdin has no examples; write one per line.")
    fitting = _fitting(tasks, next(iter(lines.values())))
    return fitting, [_texts(fitting[0], number, line) for number, line in lines.items()]


def _line(number: int, line: str) -> Row | list[str]:
    """A line of stdin: a JSON object, or its fields."""
    try:
        line.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"stdin, line {number}: not valid UTF-8.") from error
    if not line.lstrip().startswith("{"):
        return line.rstrip("\r\n").split("\t")
    try:
        return Row(Path("stdin"), number, json.loads(line))
    except ValueError as error:
        raise UserError(f"stdin, line {number}: not valid JSON ({error}).") from error


def _texts(task: Task, number: int, line: Row | list[str]) -> tuple[str, ...]:
    if isinstance(line, Row):
        return tuple(line.text(name) for name in task.text)
    if len(line) != len(task.text):
        raise UserError(
            f"stdin, line {number}: {len(line)} fields; task {task.name} needs"
            f" {len(task.text)}, separated by a tab: {', '.join(task.text)}."
        )
    return tuple(line)


def _fitting(tasks: Sequence[Task], first: Row | list[str]) -> list[Task]:
    """The tasks that an example fits; a single task is returned unchecked, for a precise error."""
    if len(tasks) == 1:
        return list(tasks)
    if isinstance(first, Row):
        fitting = [task for task in tasks if set(task.text) <= first.values.keys()]
        if len({task.text for task in fitting}) > 1:
            columns = " or ".join(dict.fromkeys(", ".join(task.text) for task in fitting))
            raise UserError(
                f"the input has columns of several kinds of tasks ({columns}); choose one with"
                " --task=NAME."
            )
    else:
        fitting = [task for task in tasks if len(task.text) == len(first)]
    if not fitting:
        needed = "; ".join(f"{task.name}: {', '.join(task.text)}" for task in tasks)
        raise UserError(f"the first example fits no task of the run; the tasks need {needed}.")
    return fitting


def predict(run: Run, tasks: Sequence[Task], texts: Texts) -> Iterator[dict[str, Any]]:
    """For each example: its columns, and each task's prediction and label probabilities.

    The keys are "prediction" and "p(LABEL)", prefixed with the task's name if there are several.
    """
    from scipy.special import softmax  # takes most of a second to import

    answers = run.evaluator.every_task(run.variables, tasks, _encode(run, texts))
    decisions = [decide(task, logits) for task, logits in zip(tasks, answers, strict=True)]
    shares = [softmax(logits, axis=-1) for logits in answers]
    for i, text in enumerate(texts):
        record: dict[str, Any] = dict(zip(tasks[0].text, text, strict=True))
        for task, decision, share in zip(tasks, decisions, shares, strict=True):
            before = f"{task.name}: " if len(tasks) > 1 else ""
            record[f"{before}prediction"] = task.target_to_label(decision[i])
            if not task.is_regression:
                names = (f"{before}p({name})" for name in task.labels)
                record |= dict(zip(names, share[i].tolist(), strict=True))
        yield record


def _encode(run: Run, texts: Texts) -> TokenizedSplit:
    return encode(Examples(texts, None), run.tokenizer, run.experiment.config.data.max_length)


def write_records(records: Iterable[Mapping[str, Any]], as_json: bool, out: Any) -> None:
    """Writes JSON lines, or a TSV with a header."""
    for index, record in enumerate(records):
        if as_json:
            print(json.dumps(record), file=out)
            continue
        if index == 0:
            print("\t".join(record), file=out)
        cells = (f"{x:.4f}" if isinstance(x, float) else x for x in record.values())
        # Texts from CSV or JSON may contain tabs and line ends, which would break the TSV.
        print("\t".join(" ".join(cell.split()) for cell in cells), file=out)


def write_submission(run: Run, directory: Path, fill_missing: bool) -> Path:
    """Predicts every GLUE test set that the run has a task for, and writes the server's files.

    Returns:
        The path of the zip file.

    Raises:
        UserError: if the submission would be incomplete, or test data are missing.
    """
    predictions = {}
    for task in (*run.experiment.tasks, *_diagnostics(run)):
        if task.name not in GLUE:
            continue
        for split in task.test_splits:
            examples = run.experiment.source(task).read(task, split)
            head, tokens = run.task(task.head or task.name), _encode(run, examples.texts)
            decisions = decide(task, run.evaluator.logits(run.variables, head, tokens))
            labels = [task.target_to_label(decision) for decision in decisions]
            predictions[task.name, split] = submission.Predictions(examples.ids, labels)
    path = submission.write(predictions, directory, fill_missing=fill_missing)
    for name, answer in submission.defaults(predictions).items():
        say(f"{name} has no predictions of this run; all its rows have the constant {answer}")
    return path


def _diagnostics(run: Run) -> Iterator[Task]:
    """The diagnostic sets (no training data of their own) that a head of the run can answer."""
    names = {task.name for task in run.experiment.tasks}
    return (task for task in GLUE.values() if task.head in names)
