"""The examples of a split, and reading them from a file."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pals_jax.data.readers import Row, read_rows
from pals_jax.data.tasks import Task
from pals_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Examples:
    """The N examples of one split, in the order of the file.

    Attributes:
        texts: one or two strings per example.
        targets: float32 [N], class ids or regression labels rescaled to [0, 1]; None where the
            split is unlabelled or the targets are texts.
        target_texts: the texts to write, one per example; None where there are none.
    """

    texts: list[tuple[str, ...]]
    targets: np.ndarray | None
    target_texts: list[str] | None = None

    def __len__(self) -> int:
        """N."""
        return len(self.texts)

    @property
    def ids(self) -> np.ndarray:
        """int64 [N], the index for a submission; in all GLUE test files it is the row number."""
        return np.arange(len(self), dtype=np.int64)


def check_split(task: Task, split: str) -> None:
    """Raises UserError unless the task may have that split."""
    if split not in task.splits:
        raise UserError(
            f"task {task.name} has no split {split!r}; its splits are {', '.join(task.splits)}."
        )


def read_examples(
    path: Path,
    task: Task,
    *,
    labelled: bool | None = None,
    columns: Mapping[str, str] | None = None,
    header: Sequence[str] | None = None,
) -> Examples:
    """Reads examples of a task from a TSV, CSV or JSONL file.

    Args:
        path: the file; its suffix determines the format.
        task: the task, which defines the columns and the labels.
        labelled: whether to read labels, or target texts; None: only if the first row has one.
        columns: maps the task's column names to the file's, where they differ.
        header: the file's columns, if it has no header line.

    Raises:
        UserError: if the file is invalid (see `readers.read_rows`), a column is missing, a text is
            not a string, a label is not one of the task's, or a target text is empty.
    """
    own = columns or {}
    answer = task.target or task.label
    answer = own.get(answer, answer)
    texts: list[tuple[str, ...]] = []
    targets: list[float] = []
    target_texts: list[str] = []
    for row in read_rows(path, header):
        texts.append(tuple(row.text(own.get(name, name)) for name in task.text))
        if labelled is None:
            labelled = row.values.get(answer) is not None
        if labelled and task.output == "text":
            target_texts.append(_target_text(row, answer, task))
        elif labelled:
            targets.append(_target(row, answer, task))
    if task.output == "text":
        return Examples(texts, None, target_texts if labelled else None)
    return Examples(texts, np.array(targets, np.float32) if labelled else None)


def _target_text(row: Row, column: str, task: Task) -> str:
    text = row.text(column)
    if not text.strip():
        raise UserError(
            f"{row.where}: the target in column {column!r} is empty; task {task.name} needs a text"
            " there: complete the row, or leave it out."
        )
    return text


def _target(row: Row, column: str, task: Task) -> float:
    try:
        return task.label_to_target(row.label(column))
    except ValueError as error:
        raise UserError(f"{row.where}: {error} (task {task.name}).") from error
