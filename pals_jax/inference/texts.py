"""The texts that a run shall answer: from Python, a data frame, a file or stdin, and what they fit.

Wherever they come from, an example is a `Row` with named columns, or `Fields` in the task's order.
"""

import dataclasses
import io
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from pals_jax.data.readers import Row, read_rows
from pals_jax.data.tasks import Task
from pals_jax.runtime.errors import UserError

if TYPE_CHECKING:
    import pandas

# One text, one pair, several of either, or a data frame with the task's columns.
Texts: TypeAlias = Union[
    str, tuple[str, str], Iterable[str], Iterable[Sequence[str]], "pandas.DataFrame"
]


@dataclasses.dataclass(frozen=True)
class Fields:
    """The texts of one example without names.

    Attributes:
        where: the example's place, as the beginning of an error message.
        texts: its texts.
        between: how two texts are told apart there, for an error message.
    """

    where: str
    texts: tuple[str, ...]
    between: str


Example: TypeAlias = Row | Fields


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Texts and the tasks that they fit.

    Attributes:
        tasks: the tasks.
        columns: the names of an example's one or two texts.
        texts: the texts of each example.
    """

    tasks: list[Task]
    columns: tuple[str, ...]
    texts: list[tuple[str, ...]]


def from_python(texts: Texts) -> list[Example]:
    """The examples in what a program hands over.

    Args:
        texts: see `Run.predict`.

    Raises:
        UserError: if there is none, or one is neither a text nor a pair of texts.
    """
    if is_frame(texts):
        rows = texts.to_dict("records")  # type: ignore[union-attr]
        examples: list[Example] = [
            Row(Path("the data frame"), number, row) for number, row in enumerate(rows, 1)
        ]
    else:
        one = isinstance(texts, str | bytes | tuple | Mapping) or not isinstance(texts, Iterable)
        examples = [_fields(n, x) for n, x in enumerate([texts] if one else texts, 1)]
    if not examples:
        raise UserError("there is no text to answer; give at least one.")
    return examples


def is_frame(texts: Any) -> bool:
    """Whether these are a pandas data frame, without importing pandas for it."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(texts, pandas.DataFrame)


def _fields(number: int, given: Any) -> Fields:
    where = f"text {number}"
    texts = (given,) if isinstance(given, str) else given
    if not isinstance(texts, tuple | list) or not all(isinstance(x, str) for x in texts):
        raise UserError(
            f"{where} is {_short(given)}, of type {type(given).__name__}; give a str, or a pair of"
            " them as a tuple."
        )
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair
            raise UserError(f"{where} is not valid Unicode; decode it again.") from error
    return Fields(where, tuple(texts), " as a tuple")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def from_file(path: Path | None) -> list[Example]:
    """The examples of a TSV, CSV or JSONL file, or of stdin if it is None.

    A file, or a JSON object on a line of stdin, has named columns. Any other line of stdin is one
    example: its texts in the task's order, separated by tabs.

    Raises:
        UserError: if there is none, or a file or line cannot be read.
    """
    if path is not None:
        return list(read_rows(path))
    if isinstance(sys.stdin, io.TextIOWrapper):  # lets the error name a line that is not UTF-8
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    examples = [_line(n, line) for n, line in enumerate(sys.stdin, 1) if line.strip()]
    if not examples:
        raise UserError("stdin has no examples; write one per line.")
    return examples


def _line(number: int, line: str) -> Example:
    """A line of stdin: a JSON object, or its fields."""
    where = f"stdin, line {number}"
    try:
        line.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: not valid UTF-8.") from error
    if not line.lstrip().startswith("{"):
        return Fields(where, tuple(line.rstrip("\r\n").split("\t")), ", separated by a tab")
    try:
        return Row(Path("stdin"), number, json.loads(line))
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}).") from error


def fit(tasks: Sequence[Task], examples: Sequence[Example]) -> Fitted:
    """The texts of the examples, and those of the tasks that they fit, judged by the first example.

    Raises:
        UserError: if an example does not fit, or several tasks with different columns fit.
    """
    # One task is not judged: reading the texts gives a more precise error.
    fitting = [task for task in tasks if len(tasks) == 1 or _columns(task, examples[0])]
    if not fitting:
        needed = "; ".join(f"{task.name}: {_needs(task)}" for task in tasks)
        raise UserError(f"the first example fits no task of the run; the tasks need {needed}.")
    if isinstance(examples[0], Row):
        kinds = {", ".join(_columns(task, examples[0])): None for task in fitting}
        if len(kinds) > 1:
            raise UserError(
                f"the input has columns of several kinds of tasks ({' or '.join(kinds)}); choose"
                " one with task=NAME (--task=NAME)."
            )
    columns = _columns(fitting[0], examples[0]) or fitting[0].text or fitting[0].columns(1)
    texts = [_texts(fitting[0], columns, example) for example in examples]
    return Fitted(fitting, columns, texts)


def _columns(task: Task, example: Example) -> tuple[str, ...]:
    """The columns of an example's texts under a task; empty if it does not fit."""
    if isinstance(example, Fields):
        return task.columns(len(example.texts))
    names = (task.columns(count) for count in (2, 1))  # a task may take one text or two
    return next((x for x in names if x and set(x) <= example.values.keys()), ())


def _needs(task: Task) -> str:
    return ", ".join(task.text) or f"{', '.join(task.columns(1))}, or {', '.join(task.columns(2))}"


def _texts(task: Task, columns: tuple[str, ...], example: Example) -> tuple[str, ...]:
    if isinstance(example, Row):
        return tuple(example.text(name) for name in columns)
    count = len(example.texts)
    if task.columns(count) and count != len(columns):
        raise UserError(
            f"{example.where}: the number of texts is {count}, and {len(columns)} before; give"
            " single texts and pairs in different calls."
        )
    if count != len(columns):
        needed = f"{len(task.text) or '1 or 2'}{example.between if len(task.text) != 1 else ''}"
        raise UserError(
            f"{example.where}: the number of texts is {count}; task {task.name} needs {needed}:"
            f" {_needs(task)}."
        )
    return example.texts
